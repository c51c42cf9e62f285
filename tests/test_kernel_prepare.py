"""Norm, rotation and joining in one kernel: what the torch Prologue gives, and what the host's own processors give."""

from dataclasses import replace

import diffusers.models.transformers.transformer_hunyuan_video as host_hunyuan
import diffusers.models.transformers.transformer_ltx as host_ltx
import diffusers.models.transformers.transformer_wan as host_wan
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0
from diffusers.models.normalization import RMSNorm
from kernel_checks import DEVICE
from projection_cases import BF16, FAMILIES, FP16, make, norm, streams
from tiny_pipelines import build, denoisers, run
from torch import nn

from videoattn.kernels.prepare import prepare, refuses
from videoattn.pipelines.cogvideox import CogVideoXProcessor
from videoattn.pipelines.hunyuan_video import JointProcessor
from videoattn.pipelines.ltx import LTXProcessor
from videoattn.pipelines.wan import WanProcessor
from videoattn.profiling.scopes import Scopes
from videoattn.prologue import Stream


def assert_same(got, wanted):
    """Equal but for the order of sums.

    That moves a norm by some units of fp32, and so a few elements to the next number of 16 bits; the rotation makes two
    elements of two such, each of which it may move by half a step, and rounds once more.
    """
    assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
    got, wanted, eps = got.float(), wanted.float(), torch.finfo(wanted.dtype).eps
    pairs = wanted.unflatten(-1, (-1, 2)).norm(dim=-1).repeat_interleave(2, -1)
    apart = (got - wanted).abs()
    assert (apart <= 2 * eps * pairs + 1e-6).all(), f"{(apart / (pairs + 1e-6)).max():.2e} of a pair apart"
    assert (apart > 0).float().mean() < 0.01


def check(case):
    assert refuses(case.prologue, case.heads, *streams(case)) is None
    wanted = case.prologue(case.heads, *streams(case, fresh=True))
    given = streams(case)
    got = prepare(case.prologue, case.heads, *given)
    for a, b in zip(got, wanted, strict=True):
        assert_same(a, b)
    assert torch.equal(got[2], wanted[2])
    assert all(x is None for stream in given for x in (stream.q, stream.k, stream.v))
    return got


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_as_the_torch_prologue(name, dtype, poisoned):
    q, k, _ = check(make(name, dtype=dtype))
    assert q.is_contiguous() and k.is_contiguous()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("wan", {"tokens": 1, "head_dim": 16, "heads": 1}),
        ("wan", {"tokens": 19, "head_dim": 128, "heads": 5, "fused": True}),
        ("wan", {"tokens": 33, "head_dim": 24, "table": BF16}),
        ("wan", {"tokens": 33, "head_dim": 24, "table": FP16}),
        ("ltx", {"tokens": 21, "head_dim": 64, "heads": 4, "batch": 3, "table": BF16}),
        ("hunyuan dual", {"tokens": 31, "head_dim": 128, "heads": 2, "fused": True}),
        ("hunyuan single", {"tokens": 40, "head_dim": 72, "batch": 1}),
        ("cogvideox", {"tokens": 45, "head_dim": 40, "heads": 3, "fused": True}),
        ("cogvideox", {"tokens": 12, "head_dim": 256, "heads": 1}),
    ],
    ids=str,
)
def test_sizes_strides_and_tables(name, options, poisoned):
    check(make(name, **options))


def test_a_norm_without_weights(poisoned):
    case = make("wan")
    for part in case.parts:
        part[1:3] = [nn.RMSNorm(case.heads * case.head_dim, eps=1e-5, elementwise_affine=False) for _ in range(2)]
    check(case)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_weights_wider_than_the_projections(poisoned):
    case = make("wan")
    for part in case.parts:
        part[1:3] = [norm.float() for norm in part[1:3]]
    check(case)


def test_no_copy_where_there_is_nothing_to_do():
    case = make("plain")
    q, k, v = (x.data_ptr() for x in case.parts[0][0])
    assert [x.data_ptr() for x in prepare(case.prologue, case.heads, *streams(case))] == [q, k, v]


def test_keys_of_another_length_than_queries(poisoned):
    """Cross-attention: a norm and no rotation."""
    case = make("wan")
    q, k, v = case.parts[0][0]
    case.parts[0][0] = [q, k[:, :13], v[:, :13]]
    case.parts[0][3] = None
    check(case)


def test_elements_that_are_not_finite_stay_where_they_are():
    case = make("hunyuan single")
    case.parts[0][0][0][1, 3, 5] = torch.inf
    wanted, _, _ = case.prologue(case.heads, *streams(case, fresh=True))
    got, _, _ = prepare(case.prologue, case.heads, *streams(case))
    assert torch.equal(got.isfinite(), wanted.isfinite()) and not got.isfinite().all()


class Attended(Exception):
    """The tensors that came to attention."""

    def __init__(self, *tensors):
        super().__init__()
        self.tensors = tensors


def attended(call, *args, **kwargs):
    with pytest.raises(Attended) as caught:
        call(*args, **kwargs)
    return caught.value.tensors


def on_device(x):
    """Every tensor in it on the device of the kernels."""
    if isinstance(x, (tuple, list)):
        return type(x)(map(on_device, x))
    if isinstance(x, dict):
        return {key: on_device(value) for key, value in x.items()}
    return x.to(DEVICE) if isinstance(x, torch.Tensor) else x


@pytest.mark.parametrize(
    ("name", "host", "ours", "size"),
    [
        ("wan", host_wan.WanAttnProcessor, WanProcessor, {"head_dim": 16}),
        ("ltx", host_ltx.LTXVideoAttnProcessor, LTXProcessor, {}),
        ("hunyuan_video", host_hunyuan.HunyuanVideoAttnProcessor2_0, JointProcessor, {}),
        ("cogvideox", CogVideoXAttnProcessor2_0, CogVideoXProcessor, {}),
        ("cogvideox_rope", CogVideoXAttnProcessor2_0, CogVideoXProcessor, {}),
    ],
)
def test_as_the_hosts_processor(name, host, ours, size, monkeypatch):
    """What the host's own code hands to attention, with the model's own norms and tables, in bf16."""
    pipe = build(name, **size)
    (_, denoiser), *_ = denoisers(pipe)
    calls = {}
    for module_name, module in denoiser.named_modules():
        if type(getattr(module, "processor", None)) is host and "refiner" not in module_name:
            module.register_forward_pre_hook(
                lambda module, args, kwargs: calls.setdefault(module, (args, dict(kwargs))) and None, with_kwargs=True
            )
    run(name, pipe, steps=1)
    assert calls

    def stop(q, k, v, *args, **kwargs):
        raise Attended(q, k, v)

    for module in (host_wan, host_ltx, host_hunyuan):
        monkeypatch.setattr(module, "dispatch_attention_fn", stop)
    monkeypatch.setattr(F, "scaled_dot_product_attention", stop)
    fused = []

    class Stop:
        """Stands for a Runner."""

        sparse = False

        def attend(self, prologue, heads, *given, kv_len):
            assert refuses(prologue, heads, *given) is None
            fused.append(len(given))
            raise Attended(*prepare(prologue, heads, *given))

    for module, (args, kwargs) in calls.items():
        if kwargs.get("attention_mask") is not None and ours is LTXProcessor:
            continue  # its padded text
        module.to(DEVICE, BF16)
        args, kwargs = on_device(args), on_device(kwargs)
        args = [x.to(BF16) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args]
        kwargs |= {key: x.to(BF16) for key, x in kwargs.items() if key.endswith("hidden_states") and x is not None}
        wanted = attended(host(), module, *args, **kwargs)
        processor = ours(host())
        processor.bind(Stop())
        got = attended(processor, module, *args, **kwargs)
        for a, b in zip(got, wanted, strict=True):
            assert_same(a, b.transpose(1, 2) if host is CogVideoXAttnProcessor2_0 else b)
    assert set(fused) == ({1, 2} if name == "hunyuan_video" else {1})


def hooked(norm):
    norm.register_forward_pre_hook(lambda module, args: None)
    return norm


def forwarded(norm):
    norm.forward = norm.forward
    return norm


class Other(nn.RMSNorm):
    pass


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda width: hooked(nn.RMSNorm(width, eps=1e-6)), "hooks on the norm torch.nn.modules.normalization.RMSNorm"),
        (
            lambda width: forwarded(nn.RMSNorm(width, eps=1e-6)),
            "hooks on the norm torch.nn.modules.normalization.RMSNorm",
        ),
        (lambda width: Other(width, eps=1e-6), "does not know the norm test_kernel_prepare.Other across heads"),
        (
            lambda width: nn.LayerNorm(width),
            "does not know the norm torch.nn.modules.normalization.LayerNorm across heads",
        ),
        (lambda width: nn.RMSNorm(width), "the norm torch.nn.modules.normalization.RMSNorm has no eps"),
        (lambda width: nn.RMSNorm(width // 2, eps=1e-6), "is over"),
        (lambda width: RMSNorm(width, 1e-6), "are torch.float32, projections torch.bfloat16"),
        (lambda width: RMSNorm(width, 1e-6, bias=True).to(BF16), "has a bias"),
        (lambda width: nn.RMSNorm(width, eps=1e-6, device="meta"), "lie elsewhere or in another form"),
        (lambda width: nn.RMSNorm(width, eps=1e-6).to(torch.float8_e4m3fn), "are torch.float8_e4m3fn"),
        (lambda width: None, "only some of q and k have a norm"),
    ],
)
def test_refuses_norms(change, reason):
    case = make("wan")
    for place in (1, 2) if change(64) is not None else (1,):
        norm = case.parts[0][place] = change(case.heads * case.head_dim)
        if norm is not None and not norm.weight.is_meta:
            norm.to(DEVICE)
    assert reason in refuses(case.prologue, case.heads, *streams(case))


def test_refuses_the_rest():
    def reason(name, prologue=None, **options):
        case = make(name, **options)
        case.prologue = replace(case.prologue, **(prologue or {}))
        return refuses(case.prologue, case.heads, *streams(case))

    assert "got torch.float32" in reason("wan", dtype=torch.float32)
    assert "got 20" in reason("wan", head_dim=20)
    assert reason("wan", {"pairs": None}) == "does not know the rotation"
    assert "tables of the rotation are torch.float64" in reason("wan", table=torch.float64)
    case = make("hunyuan dual")
    assert "one stream or two, got 3" in refuses(case.prologue, case.heads, *streams(case), *streams(case)[:1])
    assert refuses(case.prologue, case.heads, *streams(case)[:1] * 2) == "rotates in one stream only"
    case.parts[1][1] = norm(RMSNorm, case.head_dim, eps=1e-3)
    assert refuses(case.prologue, case.heads, *streams(case)) == "norms of several kinds"
    case = make("cogvideox")
    case.parts[0][4] = slice(3, None)
    assert "tokens for" in refuses(case.prologue, case.heads, *streams(case))
    case.parts[0][4] = slice(0, None, 2)
    assert refuses(case.prologue, case.heads, *streams(case)) == "rotates neighbouring tokens only"
    case = make("ltx")
    case.parts[0][3] = tuple(table[0] for table in case.parts[0][3])
    assert "by repeated tables of all tokens only" in refuses(case.prologue, case.heads, *streams(case))
    case = make("hunyuan dual")
    for part, dtype in zip(case.parts, (BF16, torch.float32), strict=True):
        part[1], part[2] = (norm(nn.RMSNorm, case.head_dim).to(dtype) for _ in range(2))
    assert refuses(case.prologue, case.heads, *streams(case)) == "weights of the streams' norms differ in dtype"


def test_refuses_while_all_modules_are_hooked():
    case = make("wan")
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: None)
    try:
        assert refuses(case.prologue, case.heads, *streams(case)) == "hooks on all modules"
    finally:
        handle.remove()


def test_hooks_that_come_later():
    """A site that was fused is no longer from the call on that a hook, or another weight, is there."""
    case = make("wan")
    norm = case.parts[0][2]

    def reason():
        return refuses(case.prologue, case.heads, *streams(case))

    assert reason() is None
    handle = norm.register_forward_hook(lambda module, args, out: None)
    assert "hooks on the norm" in reason()
    handle.remove()
    assert reason() is None
    norm.weight = nn.Parameter(norm.weight.to("meta"), requires_grad=False)
    assert "lie elsewhere" in reason()


def test_a_profile_runs_what_runs_without_it():
    """The profiler's hooks on norms only observe."""

    class Told:
        scopes = 0

        def enter(self, scope):
            self.scopes += 1

        def leave(self, scope):
            pass

    case, listener = make("wan"), Told()
    norms = nn.ModuleDict({"norm_q": case.parts[0][1], "norm_k": case.parts[0][2]})
    with Scopes({"transformer": norms}, listener):
        assert refuses(case.prologue, case.heads, *streams(case)) is None
        case.prologue(case.heads, *streams(case, fresh=True))
        assert listener.scopes == 2, "nothing was hooked"
        norms["norm_q"].register_forward_pre_hook(lambda module, args: None)
        assert "hooks on the norm" in refuses(case.prologue, case.heads, *streams(case))


def test_families_declare_their_rotation():
    for processor in (WanProcessor, LTXProcessor, JointProcessor, CogVideoXProcessor):
        assert processor.prologue.pairs is not None and hash(processor.prologue)
    assert Stream(torch.zeros(1), torch.zeros(1), torch.zeros(1)).rope is None
    assert DEVICE in ("cpu", "cuda")
