"""GroupNorm's kernels against fp64: layouts, sizes, a large mean, pieces that are merged, and what is refused."""

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import DEVICE
from torch import nn

from videoattn.kernels import group_norm as kernels
from videoattn.kernels.group_norm import Moments, affine, group_norm, moments, normalise, refuses
from videoattn.slicing.norm import Statistics

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # NumPy's, of what is 0 then
FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
PLANS = (kernels._moments_plan, kernels._merge_plan, kernels._normalise_plan)


def normed(groups, channels, dtype):
    norm = nn.GroupNorm(groups, channels).requires_grad_(False)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm.to(DEVICE, dtype)


def images(*shape):
    return torch.randn(*shape, device=DEVICE)


def channels_last(*shape):
    return images(*shape).to(memory_format=torch.channels_last)


def video(batch, channels, frames, places):
    """Frames, as they lie in memory, as a video [B, C, T, P]."""
    return images(batch * frames, channels, places).unflatten(0, (batch, frames)).transpose(1, 2)


def video_channels_last(batch, channels, frames, height, width):
    frames_of = channels_last(batch * frames, channels, height, width)
    return frames_of.unflatten(0, (batch, frames)).transpose(1, 2)


LAYOUTS = {
    "image": (4, lambda: images(2, 12, 9, 7)),
    "image, one channel a group": (5, lambda: images(3, 5, 8, 16)),
    "image of a part of the channels": (2, lambda: images(2, 20, 6, 50)[:, 3:17]),
    "channels last": (4, lambda: channels_last(2, 40, 11, 13)),
    "channels last, more than a tile": (8, lambda: channels_last(1, 320, 5, 3)),
    "channels last, rows of the picture": (4, lambda: channels_last(2, 24, 12, 10)[:, :, 3:8, 2:]),
    "video": (4, lambda: video(2, 20, 5, 300)),
    "video, a slice": (4, lambda: video(2, 20, 5, 300)[..., 64:192]),
    "video, an odd slice": (4, lambda: video(2, 20, 5, 300)[..., 101:278]),
    "video, rows of the picture": (2, lambda: images(6, 10, 9, 16).unflatten(0, (2, 3)).transpose(1, 2)[..., 2:7, :]),
    "video, channels last": (2, lambda: video_channels_last(2, 16, 3, 5, 7)),
    "video, a slice with a dimension of 1": (4, lambda: video(1, 20, 5, 300)[..., 100:200, None]),
    "one place": (4, lambda: images(2, 40, 1, 1)),
    "no place": (4, lambda: images(3, 40)),
    "places apart": (2, lambda: images(2, 6, 5, 40)[..., ::4]),
    "the same everywhere": (2, lambda: images(2, 6, 1).expand(2, 6, 50)),
}


def exactly(x, norm, silu=False):
    y = F.group_norm(x.double(), norm.num_groups, norm.weight.double(), norm.bias.double(), norm.eps)
    return F.silu(y) if silu else y


def bound(x, norm, silu=False, apart=1.0):
    """How far from `exactly` rounding may take it, element by element.

    Half a unit in the last place of the output (or of its least number); in fp32, with u half a unit: a sum has MOST terms a
    lane, and 12 + 4 more in the tree over a tile and around it, each with an error of u of the sum so far. So the mean errs
    by MOST + 16 such, of the mean distance to k, and the deviation by half as many, relatively, of the squares around k over
    those around the mean, which is 1 + apart^2; k is `apart` deviations from the mean. Scale, shift and their product with x
    and sum round once each. SiLU's slope is below 1.1; its own operations round a few times, the exponential in its argument.
    """
    shape = (1, -1, *(1,) * (x.ndim - 2))
    weight, bias = (y.double().abs().view(shape) for y in (norm.weight, norm.bias))
    groups = x.double().reshape(len(x), norm.num_groups, -1)
    mean = groups.mean(-1).repeat_interleave(x.shape[1] // norm.num_groups, 1).view(len(x), *shape[1:])
    variance = groups.var(-1, correction=0).repeat_interleave(x.shape[1] // norm.num_groups, 1).view_as(mean)
    scale = weight / (variance + norm.eps).sqrt()
    u = torch.finfo(FP32).eps / 2
    sums = (kernels.MOST + 16) * u * (1 + apart**2)
    z = (x.double() - mean).abs() * scale
    errs = sums * (z + weight) + 3 * u * (scale * (x.double().abs() + mean.abs()) + bias + z)
    y = exactly(x, norm, silu).abs()
    if silu:
        errs = 1.1 * errs + 8 * u * (y + 1)
    half = torch.finfo(x.dtype).eps / 2 * (y + errs) + torch.finfo(x.dtype).smallest_normal * torch.finfo(x.dtype).eps
    return errs + half


def check(x, groups, silu=False, apart=1.0):
    norm = normed(groups, x.shape[1], x.dtype)
    assert refuses(x) is None
    y = group_norm(x, norm, silu=silu)
    assert (y.shape, y.dtype, y.stride()) == (x.shape, x.dtype, torch.empty_like(x).stride())
    excess = (y.double() - exactly(x, norm, silu)).abs() - bound(x, norm, silu, apart)
    assert (excess <= 0).all(), f"{excess.max():.2e} more than it may be off"


@pytest.fixture
def small(monkeypatch):
    """Tiles of a few values, of which a program has several, and a group several programs."""
    for name, value in (("TILE", 256), ("MOST", 4), ("PROGRAMS", 1), ("PARTIALS", 8)):
        monkeypatch.setattr(kernels, name, value)
    for plan in PLANS:
        plan.cache_clear()
    yield
    for plan in PLANS:
        plan.cache_clear()


@pytest.mark.parametrize("dtype", [FP16, BF16, FP32], ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name, dtype, poisoned):
    groups, make = LAYOUTS[name]
    x = make()
    check(
        torch.empty_strided(x.shape, x.stride(), dtype=dtype, device=DEVICE).copy_(x) if 0 not in x.stride() else x,
        groups,
    )


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_many_tiles_and_chunks(name, silu, small, poisoned):
    groups, make = LAYOUTS[name]
    check(make(), groups, silu)


@pytest.mark.parametrize("name", ["image", "channels last", "video, an odd slice"])
def test_a_large_mean(name, poisoned):
    """fp16 has steps of 0.5 there: squares of it are 10^6, around the mean 1."""
    groups, make = LAYOUTS[name]
    check((1000 + make()).to(FP16), groups)
    check((1000 + make()).to(FP16), groups, silu=True)


@pytest.mark.parametrize("last", [False, True])
def test_a_program_that_begins_with_what_is_unlike_the_rest(last, small, poisoned):
    """Its first tile, a quarter of its values, is 0 where the others are about 1000."""
    x = 1000 + images(1, 4, 32, 64)
    if last:
        x = x.to(memory_format=torch.channels_last)
    x[:, :, :4] = 0
    check(x, 1, apart=11.3)  # sqrt(127), as far as it can be


def test_the_narrow_end_of_a_row(monkeypatch, small):
    """A program that begins with one does not take its few values for what is usual."""
    monkeypatch.setattr(kernels, "MOST", 63)
    x = images(1, 8, 32, 80)[..., :65]
    tile = kernels._layout(x.shape, (x.stride(),), 8).tile
    per = kernels._moments_plan(x.shape, x.stride(), 1, x.device)[0].numbers[0]
    assert (tile["R"], tile["N"], per) == (4, 64, 43)  # two tiles a row: the second program begins with the end of one
    x[0, 2, 20:24, 64] = 1e4  # rows 84 to 87
    exact = (x.double() - x.double().mean()).square().sum()
    torch.testing.assert_close(moments(x, 1).squares.view(()), exact, rtol=1e-6, atol=0)


def test_moments(poisoned):
    for x in (video(2, 20, 5, 300).to(FP16), channels_last(2, 20, 9, 30)):
        of = moments(x, 4)
        groups = x.double().reshape(2, 4, -1)
        variance, mean = torch.var_mean(groups, -1, correction=0)
        assert of.count == groups.shape[-1] and of.mean.dtype == of.squares.dtype == torch.float64
        torch.testing.assert_close(of.mean, mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(of.squares / of.count, variance, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["video", "video, channels last", "channels last"])
def test_slices_are_merged(name, poisoned):
    """In an order of memory that may change from slice to slice."""
    groups, make = LAYOUTS[name]
    x = make()
    x[..., : x.shape[-1] // 2] += 30
    norm, of = normed(groups, x.shape[1], FP32), None
    for start in range(0, x.shape[-1], 3 * x.shape[-1] // 7):
        part = x[..., start : start + 3 * x.shape[-1] // 7]
        of = moments(part if start else part.contiguous(), groups, of)
    whole = moments(x, groups)
    assert of.count == whole.count
    torch.testing.assert_close(of.mean, whole.mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(of.squares, whole.squares, rtol=1e-6, atol=0)
    scale, shift = affine(of, norm.weight, norm.bias, x.shape[1], norm.eps)
    y = normalise(x, scale, shift)
    assert ((y.double() - exactly(x, norm)).abs() <= bound(x, norm)).all()


def test_as_the_torch_code_over_slices(poisoned):
    """Which computes on the CPU: values, and where they lie."""
    for x in (video(2, 20, 5, 300).to(FP16)[..., 40:160], channels_last(2, 20, 9, 30), images(2, 20, 3, 50, 1)):
        norm = normed(4, 20, x.dtype)
        by_torch, host = Statistics(norm.cpu()), x.cpu()
        host = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).copy_(x)
        by_torch.add(host)
        expected = by_torch.normalised(host, silu=True)
        norm.to(DEVICE)
        made = group_norm(x, norm, silu=True)
        assert made.stride() == expected.stride()
        torch.testing.assert_close(made.cpu(), expected, rtol=torch.finfo(x.dtype).eps, atol=1e-5)


@pytest.mark.parametrize("affine_of", [(False, False), (True, False), (True, True)])
def test_weights(affine_of):
    """None, in 16 bits, and without a bias."""
    x = images(2, 12, 9, 7).to(BF16)
    weight, bias = (torch.randn(12, device=DEVICE).to(BF16) if given else None for given in affine_of)
    y = normalise(x, *affine(moments(x, 3), weight, bias, 12, 1e-5))
    exact = F.group_norm(x.double(), 3, *(None if z is None else z.double() for z in (weight, bias)), 1e-5)
    torch.testing.assert_close(y.double(), exact, rtol=torch.finfo(BF16).eps / 2, atol=1e-4)


def test_out(poisoned):
    """In the place of x, and of another order of memory."""
    x = video(2, 20, 5, 300).to(FP16)
    norm = normed(4, 20, FP16)
    given = affine(moments(x, 4), norm.weight, norm.bias, 20, norm.eps)
    expected = normalise(x, *given)
    turned = torch.empty(2, 5, 300, 20, dtype=FP16, device=DEVICE).permute(0, 3, 1, 2)
    room = torch.zeros(2, 20, 5, 302, dtype=FP16, device=DEVICE)
    for out in (turned, room[..., 1:301], x):
        assert normalise(x.clone() if out is x else x, *given, out=out) is out and torch.equal(out, expected)
    assert not room[..., 0].any() and not room[..., 301].any()


def test_the_same_bits_every_time():
    x = images(2, 32, 65, 70).to(FP16)
    norm = normed(8, 32, FP16)
    assert torch.equal(group_norm(x, norm), group_norm(x, norm))


def test_what_is_not_finite_stays_in_its_group():
    x = images(2, 12, 9, 7)
    x[1, 5, 3, 3] = torch.inf
    y = group_norm(x, normed(4, 12, FP32))
    assert torch.equal(y.isnan().flatten(2).any(-1), torch.arange(24, device=DEVICE).view(2, 12) // 3 == 5)


def test_refuses():
    assert refuses(images(2, 12, 9).double()) == "takes fp16, bf16 and fp32, got torch.float64"
    apart = images(2, 4, 6, 6, 6)[..., ::2, ::2, ::2]
    assert "takes places in two steps" in refuses(apart)
    huge = torch.empty(1, 32, 2**27, device="meta")
    assert "less than 2^31 values" in refuses(huge)
    scale = torch.ones(2, 12, device=DEVICE)
    for wrong, message in (
        (lambda: moments(images(2, 0, 9), 4), "wanted x .* with values"),
        (lambda: moments(images(2, 12, 0), 4), "wanted x .* with values"),
        (lambda: moments(images(2, 12, 9), 5), "C in 5 groups"),
        (lambda: moments(apart, 2), "two steps"),
        (lambda: moments(images(2, 12, 9).double(), 4), "got torch.float64"),
        (lambda: group_norm(images(2, 8, 9), normed(4, 12, FP32)), r"wanted x \[B, 12"),
        (lambda: normalise(images(2, 12, 0), scale, scale), "with values"),
        (lambda: normalise(images(2, 10, 9), scale, scale), "scale and shift"),
        (lambda: normalise(images(2, 12, 9), scale, scale, out=images(2, 12, 8)), "out: wanted shape"),
        (lambda: normalise(images(2, 12, 9).double(), scale, scale), "got torch.float64"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()


def test_moments_of_nothing_before():
    x = images(2, 12, 9)
    nothing = Moments(0, *torch.zeros(2, 2, 4, dtype=torch.float64, device=DEVICE))
    assert all(torch.equal(a, b) for a, b in zip(moments(x, 4, nothing)[1:], moments(x, 4)[1:], strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_real_sizes(dtype):
    """Frames of a decoder and of a U-Net, against torch in fp32."""
    for shape in ((2, 128, 576, 1024), (2, 512, 288, 512), (4, 320, 72, 128)):
        norm = normed(32, shape[1], dtype)
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x = (3 + torch.randn(shape, device=DEVICE)).to(dtype).to(memory_format=memory_format)
            exact = F.group_norm(x.float(), 32, norm.weight.float(), norm.bias.float(), norm.eps)
            torch.testing.assert_close(group_norm(x, norm).float(), exact, rtol=torch.finfo(dtype).eps, atol=1e-4)
            made, exact = group_norm(x, norm, silu=True).float(), F.silu(exact)
            torch.testing.assert_close(made, exact, rtol=torch.finfo(dtype).eps, atol=1e-4)


@pytest.mark.gpu
def test_more_than_2_to_the_31_values():
    """Offsets in 64 bits: 4.5 GiB of frames, and slices of them as a video."""
    x = torch.randn(34, 128, 576, 1024, device=DEVICE, dtype=FP16)
    assert x.numel() > 2**31
    norm = normed(32, 128, FP16)
    y = group_norm(x, norm)
    part = x.flatten(2)[None].transpose(1, 2)[..., -1000:]
    made = group_norm(part, norm)
    norm.float()
    torch.testing.assert_close(y[-1:].float(), norm(x[-1:].float()), rtol=2e-3, atol=1e-3)
    torch.testing.assert_close(made.float(), norm(part.float()), rtol=2e-3, atol=1e-3)


@pytest.mark.gpu
def test_in_a_graph():
    x = torch.randn(2, 320, 72, 128, device=DEVICE, dtype=FP16)
    norm = normed(32, 320, FP16)
    expected = group_norm(x, norm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = group_norm(x, norm)
    made.zero_()
    graph.replay()
    assert torch.equal(made, expected)
