"""On an NVIDIA GPU: every backend that quantises, through a Runner, on what has gone wrong in attention kernels before.

The counterparts of test_gpu_kernels.py. What a result may err is what the emulation errs on the same tensors, which rounds
where the algorithm rounds and nowhere else (videoattn/verify.py holds kernels to it before their first call).
"""

import pytest
import torch

pytest.importorskip("triton")

from videoattn.backend import backends
from videoattn.kernels import quantised_reference, reference
from videoattn.kernels.quantise import quantise
from videoattn.policy import EXACT
from videoattn.runner import Runner
from videoattn.testing import make_hard_qkv, make_qkv
from videoattn.verify import PLAIN

pytestmark = pytest.mark.gpu
FP16, BF16 = torch.float16, torch.bfloat16
CAPABILITY = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
BACKENDS = {
    backend.name: backend
    for backend in backends()
    if backend.own
    and not backend.computes(EXACT)
    and (CAPABILITY == (9, 0) or "hopper" not in backend.name)
    and (CAPABILITY >= (8, 9) or not backend.name.endswith("fp8"))
}
NAMES = list(BACKENDS)
LENGTHS = [(1, 1), (7, 7), (63, 63), (65, 65), (129, 129), (4097, 4097), (300, 1), (1, 300), (4097, 77), (77, 4097)]
HEAD_DIMS = (40, 64, 72, 80, 96, 112, 120, 128, 160, 192, 256)
FACTOR = 1.1


def runner(name):
    return Runner("full", BACKENDS[name].decision, name)


def qkv(seed=0, n=300, **options):
    return make_qkv(2, n, n, 4, 64, **{"dtype": BF16, "device": "cuda", "seed": seed} | options)


def assert_close(out, q, k, v, decision, **options):
    """Relative L2 against attention in fp64 no more than FACTOR times the emulation's, and half a unit of the output."""
    exact, _ = reference.attend(q, k, v, **options)
    assert out.shape == q.shape and out.dtype == q.dtype and out.isfinite().all()
    norm = torch.linalg.vector_norm
    allowed = FACTOR * norm(PLAIN[decision](q, k, v, **options).double() - exact)
    allowed += norm(exact) * torch.finfo(out.dtype).eps / 2
    error = norm(out.double() - exact)
    assert error <= allowed, f"off by {error / norm(exact):.3e} of the norm, allowed {allowed / norm(exact):.3e}"


def check(name, q, k, v, **options):
    run = runner(name)
    out = run(q, k, v, **options)
    (plan,) = run.plans.values()
    assert plan.choice.backend.name == name and plan.choice.decision == BACKENDS[name].decision
    assert_close(out, q, k, v, BACKENDS[name].decision, **options)
    return out


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_lengths(name, lengths, poisoned):
    """With rows enough that their errors are compared, and not the luck of one."""
    heads = 1 if max(lengths) > 1000 else max(4, 64 // lengths[0])
    check(name, *make_qkv(2, *lengths, heads, 64, dtype=BF16, device="cuda"))


@pytest.mark.parametrize(
    ("name", "head_dim"), [(name, d) for name in NAMES for d in ((64, 128) if "hopper" in name else HEAD_DIMS)]
)
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_head_dims(name, head_dim, dtype, poisoned):
    check(name, *make_qkv(2, 200, 300, 4, head_dim, dtype=dtype, device="cuda"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", ["BHND", "fused"])
@pytest.mark.parametrize("lengths", [(300, 300), (300, 77)], ids=str)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_layouts_and_shared_heads(name, layout, lengths, kv_heads, poisoned):
    q, k, v = make_qkv(2, *lengths, 4, 64, kv_heads=kv_heads, layout=layout, dtype=BF16, device="cuda")
    check(name, q, k, v, scale=0.2)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("lengths", [(0, 5), (300, 1), (0, 0), (129, 256)], ids=str)
def test_prefix_lengths(name, lengths, poisoned):
    kv_len = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    out = check(name, *qkv(kv_heads=2), kv_len=kv_len)
    assert all((row == 0).all() for row, n in zip(out, lengths, strict=True) if n == 0)


@pytest.mark.parametrize("name", NAMES)
def test_both_dimension_orders_give_the_same_bits(name):
    q, k, v = qkv(layout="BHND")
    run = runner(name)
    swapped = run(*(x.transpose(1, 2) for x in (q, k, v)), layout="BHND")
    assert torch.equal(swapped.transpose(1, 2), run(q, k, v))


@pytest.mark.parametrize("value", [0.0, 3.0])
@pytest.mark.parametrize("name", NAMES)
def test_constant_inputs(name, value, poisoned):
    q, k, v = (torch.full_like(x, value) for x in qkv())
    check(name, q, k, v)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("zeros", ["q", "k", "v", "block"])
def test_zeros(name, zeros, poisoned):
    q, k, v = qkv()
    {"q": q, "k": k, "v": v, "block": k[:, :128]}[zeros].zero_()
    if zeros == "block":
        v[:, 128:256] = 0.0
        q[:, 7:40] = 0.0
    check(name, q, k, v)


@pytest.mark.parametrize("name", NAMES)
def test_values_that_fp16_cannot_hold(name, poisoned):
    q, k, v = qkv()
    v = v * 1e5
    assert v.abs().max() > 65504
    check(name, q, k, v)


@pytest.mark.parametrize("name", NAMES)
def test_keys_with_a_huge_common_offset(name):
    """One that is taken off: the error is no greater than without it, but for the roundings of bf16 in the keys."""
    q, k, v = qkv()
    k = k + 100 * torch.randn(64, device="cuda").to(BF16)
    check(name, q, k, v)


@pytest.mark.parametrize("name", NAMES)
def test_an_outlier_channel(name):
    q, k, v = qkv()
    k[..., 5] *= 50
    v[..., 9] *= 50
    check(name, q, k, v)


@pytest.mark.parametrize("kind", ["outlier channels", "common k offset", "heavy tails", "biased channels"])
@pytest.mark.parametrize("name", NAMES)
def test_inputs_that_are_hard_to_quantise(name, kind):
    check(name, *make_hard_qkv(kind, 1, 1000, 2, 128, dtype=BF16, device="cuda"))


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", NAMES)
def test_160_000_keys(name, head_dim):
    """Sums do not drift: 1,250 tiles of keys."""
    q, k, v = make_qkv(1, 160_000, 160_000, 1, head_dim, dtype=BF16, device="cuda")
    out = runner(name)(q, k, v)
    rows = torch.linspace(0, 159_999, 64, device="cuda").long()
    assert out.isfinite().all()
    assert_close(out[:, rows], q[:, rows], k, v, BACKENDS[name].decision)


@pytest.mark.parametrize("name", NAMES)
def test_addresses_that_are_not_aligned(name, poisoned):
    q, k, v = (torch.randn(2, 300, 4, 65, device="cuda").to(BF16)[..., 1:] for _ in "qkv")
    check(name, q, k, v)


@pytest.mark.parametrize("far", ["batch", "token", "head"])
@pytest.mark.parametrize("name", NAMES)
def test_offsets_beyond_2_31_elements(name, far):
    if torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GiB of free GPU memory")
    n, h, d = 300, 2, 64
    apart = -(-(2**31) // (n - 1) // 8) * 8
    strides = {"batch": (2**31, h * d, d, 1), "head": (n * d, d, 2**31, 1), "token": (h * d, apart, d, 1)}[far]
    memory = torch.full((2**31 + 2**24,), torch.nan, dtype=BF16, device="cuda")
    q, k, v = (memory.as_strided((2, n, h, d), strides, 2 * n * h * d * place) for place in range(3))
    near = make_qkv(2, n, n, h, d, dtype=BF16, device="cuda")
    for x, y in zip((q, k, v), near, strict=True):
        x.copy_(y)
    assert torch.equal(runner(name)(q, k, v), runner(name)(*near))


@pytest.mark.parametrize("name", NAMES)
def test_many_queries(name):
    """Over 2^31 elements of q, of its operand and of the output."""
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    n, h, d = 2**20 + 65, 32, 64
    q = torch.randn(1, n, h, d, device="cuda", dtype=BF16)
    k, v = (torch.randn(1, 77, h, d, device="cuda", dtype=BF16) for _ in "kv")
    out = runner(name)(q, k, v)
    rows = torch.tensor([0, 1, n // 2, n - 66, n - 1], device="cuda")
    assert_close(out[:, rows], q[:, rows], k, v, BACKENDS[name].decision)


@pytest.mark.parametrize("lengths", [None, (0, 9)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_log_sum_exp_in_the_natural_logarithm(name, lengths, poisoned):
    """As near to fp64 as the operands let it be, with the smoothing of keys put back."""
    q, k, v = qkv(kv_heads=2)
    k = k + 10 * torch.randn(64, device="cuda").to(BF16)
    options = {} if lengths is None else {"kv_len": torch.tensor(lengths, dtype=torch.int32, device="cuda")}
    backend = BACKENDS[name]
    _, lse = backend.attend(q, k, v, return_lse=True, **options)
    exact = reference.attend(q, k, v, **options)[1]
    x = quantise(q, k, v, pv=backend.pv, return_lse=True, **options)
    plain = quantised_reference.attend_quantised(x, head_dim=64, dtype=BF16, **options)[1]
    blind = exact == -torch.inf
    assert torch.equal(lse == -torch.inf, blind)
    norm = torch.linalg.vector_norm
    wrong, allowed = (norm((y.double() - exact)[~blind]) for y in (lse, plain))
    assert wrong <= FACTOR * allowed + norm(exact[~blind]) * 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_the_same_bits_every_time(name):
    q, k, v = qkv()
    run = runner(name)
    first = run(q, k, v)
    assert all(torch.equal(run(q, k, v), first) for _ in range(20))


@pytest.mark.parametrize("name", NAMES)
def test_branches_of_guidance_do_not_meet(name):
    branches = [qkv(seed) for seed in (1, 2)]
    alone = [runner(name)(*branch) for branch in branches]
    run = runner(name)
    for _ in range(3):
        for branch, expected in zip(branches, alone, strict=True):
            assert torch.equal(run(*branch), expected)


@pytest.mark.parametrize("name", NAMES)
def test_resolutions_that_change_between_calls(name):
    run = runner(name)
    for n in (300, 77, 1000, 300):
        q, k, v = qkv(n=n)
        assert torch.equal(run(q, k, v), runner(name)(q, k, v))


@pytest.mark.parametrize("name", NAMES)
def test_outputs_that_are_not_finite_are_told(name):
    q, k, v = qkv()
    run = runner(name)
    run(q, k, v)
    torch.cuda.synchronize()
    assert run.replace_flagged() == []
    v[1, 2, 3, 4] = torch.nan
    run(q, k, v)
    torch.cuda.synchronize()
    (line,) = run.replace_flagged()
    assert line.startswith(f"output of {name} was not finite")


@pytest.mark.parametrize("name", NAMES)
def test_a_cuda_graph(name):
    """Captured once its plan is made, it computes on what is there at each replay, and still tells of NaN."""
    q, k, v = qkv()
    run = runner(name)
    run(q, k, v)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(q, k, v)
    for seed in (1, 2):
        for x, new in zip((q, k, v), qkv(seed), strict=True):
            x.copy_(new)
        graph.replay()
        assert torch.equal(out, runner(name)(q, k, v))
    v[1, 2, 3, 4] = torch.nan
    graph.replay()
    torch.cuda.synchronize()
    assert len(run.replace_flagged()) == 1


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_torch_compile(name, fresh_dynamo):
    run = runner(name)
    attend = run.entry
    compiled = torch.compile(lambda q, k, v: attend(q * 2, k, v) + 1, fullgraph=True, backend="aot_eager")
    for seed in (0, 1):
        q, k, v = qkv(seed)
        assert torch.equal(compiled(q, k, v), run(q * 2, k, v) + 1)
    (plan,) = run.plans.values()
    assert plan.choice.backend.name == name and plan.calls == 4


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", NAMES)
def test_tensors_on_another_gpu_than_the_current_one(name, poisoned):
    q, k, v = qkv(device="cuda:1")
    with torch.cuda.device(0):
        out = runner(name)(q, k, v)
        assert torch.cuda.current_device() == 0
    assert out.device == q.device
    assert_close(out, q, k, v, BACKENDS[name].decision)


@pytest.mark.parametrize("pv", ["fp8", "16bit"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.skipif(CAPABILITY != (9, 0), reason="needs compute capability 9.0")
def test_both_kernels_on_the_same_operands(pv, head_dim, poisoned):
    """They round p by maxima of other tiles, and add it rounded or not: apart by no more than e4m3 and bf16 explain."""
    q, k, v = make_qkv(2, 500, 900, 4, head_dim, kv_heads=2, dtype=BF16, device="cuda")
    x = quantise(q, k, v, pv=pv)
    options = {"head_dim": head_dim, "dtype": BF16}
    one, other = (BACKENDS[f"triton_{kind}int8_{pv}"].attend_quantised(x, **options)[0] for kind in ("", "hopper_"))
    rounding = 2.0**-4 if pv == "fp8" else 2.0**-7  # of one p and of the output: those of p average out
    assert torch.linalg.vector_norm(one - other) <= rounding * torch.linalg.vector_norm(one)
