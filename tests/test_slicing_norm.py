"""Norms of slices by kernels of ours: who computes, with which weights, and that modules get their own norms back.

Without a GPU the kernels run in Triton's interpreter, on tensors for which `norm` would leave them alone.
"""

import copy

import accelerate
import pytest
import torch
import torch.nn.functional as F
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.resnet import ResnetBlock2D
from kernel_checks import DEVICE
from torch import nn

from videoattn.kernels import group_norm as kernels
from videoattn.slicing import norm as slicing_norm
from videoattn.slicing.norm import FewRows, Statistics, statistics

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # NumPy's, of what is 0 then


@pytest.fixture
def ours(monkeypatch):
    """Kernels also where there is no GPU, and for small tensors; what they were called with."""
    calls = []

    class Kernels:
        Moments = kernels.Moments

        def __getattr__(self, name):
            def call(x, *args, **kwargs):
                calls.append((name, x))
                return getattr(kernels, name)(x, *args, **kwargs)

            return call

    monkeypatch.setattr(slicing_norm, "_kernels", lambda x: None if x.is_meta or x.numel() == 0 else Kernels())
    monkeypatch.setattr(slicing_norm, "_pays", lambda norm, x, device: x.numel() > 0)
    return calls


def normed(groups, channels, dtype=torch.float32):
    norm = nn.GroupNorm(groups, channels).requires_grad_(False)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm.to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("silu", [False, True])
def test_over_slices(ours, dtype, silu, poisoned):
    """Halves of another mean, as a video in the memory of its frames."""
    norm = normed(4, 20, dtype)
    frames = 20 + torch.randn(6, 20, 40)
    frames[..., 20:] += 5
    x = frames.to(DEVICE, dtype).unflatten(0, (2, 3)).transpose(1, 2)
    of = statistics(norm, x.split(11, dim=-1))
    made = torch.cat([of.normalised(part, silu) for part in x.split(17, dim=-1)], dim=-1)
    exact = F.group_norm(x.double(), 4, norm.weight.double(), norm.bias.double(), norm.eps)
    exact = F.silu(exact) if silu else exact
    torch.testing.assert_close(made.double(), exact, rtol=torch.finfo(dtype).eps, atol=3e-5)
    assert [name for name, _ in ours] == ["moments"] * 4 + ["affine"] + ["normalise"] * 3


@pytest.mark.parametrize("silu", [False, True])
def test_torch_does_the_same(silu, monkeypatch):
    """Whoever computes, and in turns: what one has counted the other goes on from."""
    norm, x = normed(4, 20), 5 + torch.randn(2, 20, 3, 60, device=DEVICE)
    made = []
    for pattern in ("kkk", "ttt", "ktk", "tkt"):
        of = Statistics(norm)
        for who, part in zip(pattern, x.split(20, dim=-1), strict=True):
            monkeypatch.setattr(slicing_norm, "_kernels", lambda x, who=who: kernels if who == "k" else None)
            of.add(part)
        made.append(of.normalised(x, silu))
    for other in made[1:]:
        torch.testing.assert_close(made[0], other, rtol=1e-5, atol=1e-5)


def test_torch_with_silu_rounds_once():
    x = torch.randn(2, 8, 50).to(torch.bfloat16)
    norm = nn.GroupNorm(2, 8).to(torch.bfloat16).requires_grad_(False)
    of = statistics(norm, [x])
    exact = F.silu(F.group_norm(x.double(), 2))
    error = (of.normalised(x, silu=True).double() - exact).abs()
    assert (error <= torch.finfo(torch.bfloat16).eps / 2 * exact.abs() + 1e-5).all()


def test_who_computes(monkeypatch):
    """Torch: on the CPU and the meta device, of nothing, of what kernels refuse, with gradients, and where they are wrong."""
    assert slicing_norm._kernels(torch.randn(2, 8, 5)) is None
    assert slicing_norm._kernels(torch.randn(2, 8, 5, device="meta")) is None

    class OnCard:
        """Stands for a tensor on a card."""

        device = torch.device("cuda", 0)
        requires_grad = False
        dtype = torch.float16
        shape = torch.Size((2, 8, 50))

        def numel(self):
            return self.shape.numel()

        def stride(self, dim=None):
            return (400, 50, 1) if dim is None else (400, 50, 1)[dim]

    faults = []
    monkeypatch.setattr(slicing_norm, "_module", lambda device: kernels)
    monkeypatch.setattr(slicing_norm, "_found", {})
    monkeypatch.setattr(slicing_norm, "_fault", lambda *args: faults.append(args) or None)
    monkeypatch.setattr(slicing_norm.guard, "capturing", lambda device: True)
    x = OnCard()
    assert slicing_norm._kernels(x) is None and not faults  # not found out while a graph is captured
    monkeypatch.setattr(slicing_norm.guard, "capturing", lambda device: False)
    assert slicing_norm._kernels(x) is kernels and slicing_norm._kernels(x) is kernels
    assert faults == [(kernels, x.device, torch.float16, False)]  # once
    for name, value in (("requires_grad", True), ("dtype", torch.float64), ("shape", torch.Size((0, 8, 50)))):
        with monkeypatch.context() as changed:
            changed.setattr(OnCard, name, value)
            assert slicing_norm._kernels(x) is None
    assert slicing_norm._kernels(x) is kernels


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_the_check_before_the_first_call(last, dtype, monkeypatch):
    device = torch.device(DEVICE)
    state = torch.get_rng_state()
    assert slicing_norm._fault(kernels, device, dtype, last) is None
    assert torch.equal(torch.get_rng_state(), state)
    normalise = kernels.normalise
    monkeypatch.setattr(kernels, "normalise", lambda *args, **options: normalise(*args, **options) * 1.01)
    assert "greatest error" in slicing_norm._fault(kernels, device, dtype, last)


def test_a_wrong_kernel_is_not_used(monkeypatch):
    monkeypatch.setattr(slicing_norm, "_found", {})
    monkeypatch.setattr(slicing_norm, "_fault", lambda *args: "it is off")
    with pytest.warns(RuntimeWarning, match="as our kernel is wrong here: it is off"):
        assert not slicing_norm._right(kernels, torch.randn(2, 8, 5))
    assert not slicing_norm._right(kernels, torch.randn(2, 8, 5))  # told once


# --- norms of few rows ---


class Observing(ModelHook):
    """One of diffusers' hooks that changes nothing."""

    def pre_forward(self, module, *args, **kwargs):
        return args, kwargs


def block():
    return ResnetBlock2D(in_channels=8, out_channels=16, groups=4, temb_channels=None).eval().requires_grad_(False)


def as_it_was(module):
    pass


def offloaded(module):
    accelerate.cpu_offload(module, execution_device=torch.device(DEVICE))


def hooked(module):
    for each in list(module.modules()):
        HookRegistry.check_if_exists_or_initialize(each).register_hook(Observing(), "observing")


@pytest.mark.parametrize("around", [as_it_was, offloaded, hooked])
def test_few_rows(ours, around):
    resnet, x = block().to(DEVICE), torch.randn(2, 8, 6, 7, device=DEVICE)
    expected = resnet(x, None)
    keys = list(resnet.state_dict())
    around(resnet)
    before = {name: dict(vars(each)) for name, each in resnet.named_modules()}
    alone = resnet(x, None)
    few = FewRows(resnet)
    few.install()
    torch.testing.assert_close(resnet(x, None), expected, rtol=1e-5, atol=1e-5)
    assert [name for name, _ in ours] == ["group_norm"] * 2
    assert list(resnet.state_dict()) == keys
    few.remove()
    ours.clear()
    assert torch.equal(resnet(x, None), alone) and not ours
    for name, each in resnet.named_modules():
        assert vars(each).keys() == before[name].keys()
        if around is as_it_was:
            assert "forward" not in vars(each)


@pytest.mark.parametrize("around", [offloaded, hooked])
def test_few_rows_below_hooks_that_come_later(ours, around):
    resnet, x = block().to(DEVICE), torch.randn(2, 8, 6, 7, device=DEVICE)
    expected = resnet(x, None)
    few = FewRows(resnet)
    few.install()
    around(resnet)
    torch.testing.assert_close(resnet(x, None), expected, rtol=1e-5, atol=1e-5)
    assert len(ours) == 2
    few.remove()
    assert torch.equal(resnet(x, None), expected) and len(ours) == 2


@pytest.mark.parametrize("around", [as_it_was, offloaded])
def test_statistics_of_a_norm_of_few_rows(ours, around):
    """Weights as its own call has them, which no kernel computes meanwhile."""
    norm, x = nn.Sequential(normed(4, 20)), torch.randn(2, 20, 3, 60, device=DEVICE)
    expected = norm(x)
    around(norm)
    few = FewRows(norm)
    few.install()
    ours.clear()
    made = statistics(norm[0], x.split(20, dim=-1)).normalised(x)
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-5)
    assert "group_norm" not in [name for name, _ in ours]
    few.remove()


def test_norms_that_are_something_else_are_left_alone():
    class Other(nn.GroupNorm):
        pass

    model = nn.Sequential(Other(2, 8), nn.LayerNorm(8), nn.GroupNorm(2, 8))
    few = FewRows(model)
    assert [forward.module for forward in few.forwards] == [model[2]]
    few.install()
    copied = copy.deepcopy(model.state_dict())
    assert list(copied) == list(model.state_dict())
    few.remove()


def test_on_the_cpu_nothing_changes():
    model, x = nn.Sequential(nn.GroupNorm(2, 8)), torch.randn(2, 8, 50)
    expected = model(x)
    few = FewRows(model)
    few.install()
    assert torch.equal(model(x), expected)
    assert torch.equal(model(input=x), expected)
    assert model.to("meta")(x.to("meta")).shape == x.shape
    few.remove()


@pytest.mark.gpu
@torch.no_grad()
def test_when_it_pays():
    def used(x, norm=None):
        norm = normed(32, x.shape[1], x.dtype) if norm is None else norm
        return slicing_norm._pays(norm, x, x.device) and slicing_norm._kernels(x) is not None

    x = torch.randn(2, 128, 256, 256, device="cuda", dtype=torch.float16)
    assert used(x) and used(x.to(memory_format=torch.channels_last))
    assert not used(x[..., :1])  # small
    assert not used(torch.empty(64, 128, 64, 64, device="cuda", dtype=torch.float16))  # torch keeps the card busy
    assert used(x, normed(32, 128, torch.float32)) and not used(x, normed(32, 128, torch.bfloat16))
    with torch.autocast("cuda"):
        assert not used(x)
    few = FewRows(norm := nn.Sequential(normed(32, 128, torch.float16)))
    expected = norm(x)
    few.install()
    torch.testing.assert_close(norm(x), expected, rtol=2e-3, atol=1e-3)
    few.remove()
    assert torch.equal(norm(x), expected)
