"""Pre-pass on a GPU: right at real sizes, then its time against the torch Prologue and a device copy of the same bytes.

    python prepass_bench.py [family ...]        from the repository's root
"""

import contextlib
import functools
import sys
import time

import torch
import triton

sys.path.insert(0, "tests")
from quantised_operands import assert_close, operands
from torch import nn

from videoattn.kernels import prepare as P
from videoattn.kernels import quantise as Q
from videoattn.prologue import Prologue, Stream, rotate_pairs

BF16 = torch.bfloat16
DEVICE = "cuda"


class DiffusersRMSNorm(nn.Module):
    """diffusers' own where it is installed; this stands in for it where not, with the same operations."""

    def __init__(self, dim, eps):
        super().__init__()
        self.eps, self.dim, self.bias = eps, torch.Size((dim,)), None
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
        return (x * torch.rsqrt(variance + self.eps)).to(self.weight.dtype) * self.weight


try:
    from diffusers.models.normalization import RMSNorm as DiffusersRMSNorm  # noqa: F811
except ImportError:
    DiffusersRMSNorm.__module__, DiffusersRMSNorm.__qualname__ = "diffusers.models.normalization", "RMSNorm"


def rotate_heads(x, rope):
    """diffusers' apply_rotary_emb(sequence_dim=1)."""
    cos, sin = (table[None, :, None, :] for table in rope)
    real, imag = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return (x.float() * cos + torch.stack([-imag, real], dim=-1).flatten(3).float() * sin).to(x.dtype)


def rotate_across(x, rope):
    """LTX's apply_rotary_emb."""
    real, imag = x.unflatten(2, (-1, 2)).unbind(-1)
    return (x.float() * rope[0] + torch.stack([-imag, real], dim=-1).flatten(2).float() * rope[1]).to(x.dtype)


def norm(cls, width):
    made = cls(width, eps=1e-6).to(DEVICE, BF16).requires_grad_(False)
    made.weight.data = torch.rand(width, device=DEVICE, dtype=BF16) + 0.5
    if getattr(made, "bias", None) is not None:
        made.bias.data = torch.randn(width, device=DEVICE, dtype=BF16)
    return made


def table(*shape):
    angles = torch.rand(*shape[:-1], shape[-1] // 2, device=DEVICE) * 6.28
    return angles.cos().repeat_interleave(2, -1), angles.sin().repeat_interleave(2, -1)


def projections(b, n, c):
    return [torch.randn(b, n, c, device=DEVICE, dtype=BF16) + 0.5 * torch.randn(c, device=DEVICE, dtype=BF16) for _ in range(3)]


def family(name):
    """heads, prologue, and the streams as (projections, rest)."""
    if name.startswith("wan"):
        n, h, d = {"wan1.3b": (32760, 12, 128), "wan14b": (75600, 40, 128)}[name]
        cos, sin = table(1, n, 1, d)
        rope = cos[..., 0::2], sin[..., 1::2]
        rest = (norm(nn.RMSNorm, h * d), norm(nn.RMSNorm, h * d), rope)
        return h, Prologue(norm="across_heads", rotate=rotate_pairs, pairs="halves"), [(projections(1, n, h * d), rest)]
    if name == "ltx":
        n, h, d = 4992, 32, 64
        prologue = Prologue(norm="across_heads", rope="across_heads", rotate=rotate_across, pairs="repeated")
        return h, prologue, [(projections(1, n, h * d), (norm(nn.RMSNorm, h * d), norm(nn.RMSNorm, h * d), table(1, n, h * d)))]
    prologue = Prologue(norm="per_head", rotate=rotate_heads, pairs="repeated")
    if name == "hunyuan":
        n, h, d = 119056, 24, 128
        video = (norm(DiffusersRMSNorm, d), norm(DiffusersRMSNorm, d), table(n, d))
        text = (norm(DiffusersRMSNorm, d), norm(DiffusersRMSNorm, d))
        return h, prologue, [(projections(1, n, h * d), video), (projections(1, 256, h * d), text)]
    if name == "cogvideox":
        n, h, d = 17776, 48, 64
        rest = (norm(nn.LayerNorm, d), norm(nn.LayerNorm, d), table(n - 226, d), slice(226, None))
        return h, prologue, [(projections(2, n, h * d), rest)]
    n, h, d = {"unet40": (2 * 9216, 8, 40), "unet64": (2 * 9216, 5, 64)}[name]
    return h, Prologue(norm="per_head"), [(projections(2, n, h * d), ())]


def streams(parts):
    return [Stream(*x, *rest) for x, rest in parts]


def traffic(parts, d, out_bytes):
    """Bytes that must move: q, k, v and the tables read once, outputs written once. out_bytes: of q, k, v an element."""
    numbers = sum(x.numel() for x, _ in parts for x in x[:1])
    tables = sum(t.numel() * t.element_size() * (2 if t.stride(-1) == 2 else 1) for _, rest in parts if len(rest) > 2 for t in rest[2])
    q, k, v, out = numbers * 2, numbers * 2, numbers * 2, sum(out_bytes) * numbers
    return (q + k + v if out_bytes[2] else q + k) + out, tables


def bench(run):
    return triton.testing.do_bench(run, warmup=30, rep=80, return_mode="median") * 1e3


def copy_us(size):
    x = torch.empty(int(size) // 2, dtype=torch.uint8, device=DEVICE)
    y = torch.empty_like(x)
    return bench(lambda: y.copy_(x))


def check(name, h, prologue, parts):
    wanted = prologue(h, *([Stream(*(x.clone() for x in xs), *rest) for xs, rest in parts]))
    reason = P.refuses(prologue, h, *streams(parts))
    assert reason is None, reason
    got = P.prepare(prologue, h, *streams(parts))
    for what, a, b in zip("qkv", got, wanted, strict=True):
        differ = (a != b).float().mean().item()
        worst = ((a.float() - b.float()).abs() / b.float().abs().clamp_min(1e-2)).max().item()
        print(f"  exact {what}: {differ:.2e} of the elements differ, by up to {worst:.1e} of their size")
        assert differ < 2e-2 and worst < 2**-5
    q, k, v = wanted
    n = k.shape[1]
    lens = torch.tensor([n - 77] * k.shape[0], dtype=torch.int32, device=DEVICE)
    for pv in ("fp8", "int8", "16bit"):
        for kv_len in (None, lens):
            made = Q.quantise_streams(prologue, h, *streams(parts), pv=pv, kv_len=kv_len, return_lse=True)
            again = Q.quantise_streams(prologue, h, *streams(parts), pv=pv, kv_len=kv_len, return_lse=True)
            same = [torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(made, again, strict=True) if a is not None and a.is_contiguous()]
            assert all(same), "not the same bits twice"
            heads = [0, h - 1]
            want = operands(*(x[:, :, heads] for x in wanted), pv=pv, kv_len=kv_len, return_lse=True)
            part = Q.Quantised(*(x if x is None else x[:, :, heads] if i == 4 and pv == "16bit" else x[:, heads].contiguous() for i, x in enumerate(made)))
            if pv == "16bit":
                assert torch.equal(part.v, v[:, :, heads])
                want = want._replace(v=part.v)
            try:
                # k's mean and q's rounding come from other orders of summation: a few more ties than in the tests
                assert_close(part, want, ties=3e-2)
            except AssertionError as error:
                print(f"  WRONG {pv} {'kv_len' if kv_len is not None else ''}: {str(error)[:300]}")
            del made, again, want, part
    print("  quantised: checked")


@contextlib.contextmanager
def variant(module, maxnreg=None, **changes):
    """Another config."""
    shipped = module.config
    module.config = lambda *args: shipped(*args) | changes
    module._plan.cache_clear()
    yield
    module.config = shipped
    module._plan.cache_clear()


def main(names):
    print(torch.cuda.get_device_name(), torch.__version__, triton.__version__)
    for name in names:
        begun = time.time()
        torch.manual_seed(0)
        h, prologue, parts = family(name)
        d = parts[0][0][0].shape[-1] // h
        print(f"{name}: {[tuple(x[0].shape) for x, _ in parts]}, {h} x {d}")
        torch.cuda.empty_cache()
        check(name, h, prologue, parts)
        torch.cuda.empty_cache()
        eager = bench(lambda: prologue(h, *[Stream(*x, *rest) for x, rest in parts]))
        joined = 2 if len(parts) > 1 else 0
        size, tables = traffic(parts, d, (2, 2, joined))
        prepared = bench(lambda: P.prepare(prologue, h, *streams(parts)))
        copied, with_tables = copy_us(size), copy_us(size + tables)
        print(f"  torch prologue {eager:8.1f} us")
        print(f"  prepare        {prepared:8.1f} us: {eager / prepared:.1f} x; copy {copied:.1f} us -> {copied / prepared:.0%}, with tables {with_tables:.1f} us -> {with_tables / prepared:.0%}")
        torch.cuda.empty_cache()
        for pv, outs in (("fp8", (1, 1, 1)), ("16bit", (1, 1, 0))):
            size, tables = traffic(parts, d, outs)
            made = bench(lambda: Q.quantise_streams(prologue, h, *streams(parts), pv=pv))
            copied, with_tables = copy_us(size), copy_us(size + tables)
            print(f"  quantise {pv:5s} {made:8.1f} us: {eager / made:.1f} x; copy {copied:.1f} us -> {copied / made:.0%}, with tables {with_tables:.1f} us -> {with_tables / made:.0%}")
        launches(h, prologue, parts)
        torch.cuda.empty_cache()
        padded = triton.next_power_of_2(d)
        for warps, rows, together in ((4, 4096, 1), (4, 4096, 4), (4, 2048, 1), (4, 2048, 4), (8, 8192, 1), (8, 4096, 1), (8, 4096, 4), (8, 8192, 4)):
            rows = min(rows // padded, 128 * together)
            if rows // together < 1 or name in ("hunyuan", "wan14b") and (warps, rows) == (4, 2048 // padded):
                continue
            label = f"{warps} warps, {rows} rows, {together} heads"
            with variant(P, T=rows // together, HB=together, num_warps=warps):
                a = bench(lambda: P.prepare(prologue, h, *streams(parts)))
            with variant(Q, T=rows // together, HB=together, num_warps=warps):
                b = bench(lambda: Q.quantise_streams(prologue, h, *streams(parts), pv="fp8"))
            print(f"    {label}: prepare {a:8.1f} us, quantise fp8 {b:8.1f} us")
            if time.time() - begun > 60:
                break
        del parts
        torch.cuda.empty_cache()
        print(f"  {time.time() - begun:.0f} s", flush=True)
    host()


def launches(h, prologue, parts):
    """Time of each kernel of a quantise call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(5):
            Q.quantise_streams(prologue, h, *streams(parts), pv="fp8")
        torch.cuda.synchronize()
    for event in profile.key_averages():
        if event.key.startswith("_"):
            print(f"    {event.key}: {event.self_device_time_total / event.count:.1f} us each")


def host():
    """Host time of a call, on tensors so small that the GPU waits."""
    for name, size in (("ltx", 64), ("wan1.3b", 64)):
        h, prologue, parts = family(name)
        parts = [
            ([x[:, :size].contiguous() for x in xs], (*rest[:2], tuple(t[:, :size] for t in rest[2]))) for xs, rest in parts
        ]
        for what, run in (
            ("prepare", lambda: P.prepare(prologue, h, *streams(parts))),
            ("refuses", lambda: P.refuses(prologue, h, *streams(parts))),
            ("quantise", lambda: Q.quantise_streams(prologue, h, *streams(parts), pv="fp8")),
            ("torch", lambda: prologue(h, *streams(parts))),
        ):
            for _ in range(20):
                run()
            torch.cuda.synchronize()
            begun = time.perf_counter()
            for _ in range(200):
                run()
            spent = (time.perf_counter() - begun) / 200
            torch.cuda.synchronize()
            print(f"host {name} {what}: {spent * 1e6:.1f} us a call")


if __name__ == "__main__":
    with torch.inference_mode():
        main(sys.argv[1:] or ["wan1.3b", "ltx", "cogvideox", "unet40", "hunyuan", "wan14b"])
