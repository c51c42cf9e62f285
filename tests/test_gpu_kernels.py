"""On an NVIDIA GPU: our own kernels through a Runner, on what has gone wrong in attention kernels before.

Each test stands for a class of bugs met in the trackers of other kernels: tails of tiles, rows without a key, masks in
the wrong base of the exponential, fp16 inside, offsets in 32 bits, drift over long rows, the wrong device, graphs.
"""

import pytest
import torch

pytest.importorskip("triton")
from kernel_checks import Case, check, compile_ahead

from videoattn.backend import backends
from videoattn.policy import EXACT
from videoattn.runner import Runner
from videoattn.testing import assert_close_to_oracle, make_qkv

pytestmark = pytest.mark.gpu
FP16, BF16 = torch.float16, torch.bfloat16
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
OWN = {
    backend.name: backend
    for backend in backends()
    if backend.own and backend.computes(EXACT) and (HOPPER or backend.name != "triton_hopper")
}
LONG = [name for name in OWN if name != "triton_temporal"]
HEAD_DIMS = (40, 64, 72, 80, 96, 112, 120, 128, 160, 192, 256)
LENGTHS = [(1, 1), (7, 7), (63, 63), (65, 65), (129, 129), (4097, 4097), (300, 1), (1, 300), (4097, 77), (77, 4097)]
SHORT_LENGTHS = [(1, 1), (7, 7), (63, 63), (65, 65), (128, 128), (77, 1), (1, 77), (16, 100)]


def tokens(name):
    """A usual length of a row."""
    return 300 if name in LONG else 14


def qkv(name, seed=0, **options):
    n = tokens(name)
    return make_qkv(2, n, n, 4, 64, **{"dtype": BF16, "device": "cuda", "seed": seed} | options)


def cases():
    for name in OWN:
        usual = {"backend": name, "q_len": tokens(name), "kv_len": tokens(name)}
        for q_len, kv_len in LENGTHS if name in LONG else SHORT_LENGTHS:
            heads = 1 if max(q_len, kv_len) > 1000 else 4  # the oracle's scores take the memory
            yield Case(backend=name, q_len=q_len, kv_len=kv_len, heads=heads, kv_heads=heads)
        for head_dim in HEAD_DIMS if name == "triton_hopper" else (4, 44, *HEAD_DIMS):
            yield Case(**usual, head_dim=head_dim, dtype=FP16 if head_dim % 16 else BF16)
        for layout in ("BHND", "fused"):
            yield Case(**usual, layout=layout)
        for kv_heads in (1, 2):
            yield Case(**usual, kv_heads=kv_heads)
        for lengths in ((0, 5), (tokens(name), 1)):
            yield Case(**usual, kv_lens=lengths)
    usual = {"backend": "triton_flash", "q_len": 129, "kv_len": 300}
    for mask in ("bool", "additive"):
        yield Case(**usual, mask=mask)
        yield Case(**usual, mask=mask, kv_lens=(300, 7))
    yield Case(**usual, causal=True)
    yield Case(**usual, causal=True, mask="bool", kv_lens=(0, 100))
    yield Case(**usual, dtype=torch.float32)


CASES = list(dict.fromkeys(cases()))


@pytest.fixture(scope="module", autouse=True)
def ahead():
    compile_ahead(CASES)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_equals_the_oracle(case, poisoned):
    case.check()


@pytest.mark.parametrize("name", OWN)
def test_both_dimension_orders_give_the_same_bits(name):
    q, k, v = qkv(name, layout="BHND")
    runner = Runner("full", EXACT, name)
    swapped = runner(*(x.transpose(1, 2) for x in (q, k, v)), layout="BHND")
    assert torch.equal(swapped.transpose(1, 2), runner(q, k, v))


@pytest.mark.parametrize("value", [0.0, 3.0])
@pytest.mark.parametrize("name", OWN)
def test_constant_inputs(name, value, poisoned):
    q, k, v = (torch.full_like(x, value) for x in qkv(name))
    assert torch.equal(Runner("full", EXACT, name)(q, k, v), v)


@pytest.mark.parametrize("name", OWN)
def test_values_that_fp16_cannot_hold(name):
    q, k, v = qkv(name)
    v = v * 1e5
    assert v.abs().max() > 65504
    assert_close_to_oracle(Runner("full", EXACT, name)(q, k, v), q, k, v)


@pytest.mark.parametrize("name", OWN)
def test_keys_with_a_huge_common_offset(name):
    q, k, v = qkv(name)
    k = k + 100 * torch.randn(64, device="cuda").to(BF16)
    assert_close_to_oracle(Runner("full", EXACT, name)(q, k, v), q, k, v)


@pytest.mark.parametrize("name", OWN)
def test_an_outlier_channel(name):
    q, k, v = qkv(name)
    k[..., 5] *= 50
    v[..., 9] *= 50
    assert_close_to_oracle(Runner("full", EXACT, name)(q, k, v), q, k, v)


@pytest.mark.parametrize("name", LONG)
def test_160_000_keys(name):
    q, k, v = make_qkv(1, 160_000, 160_000, 1, 64, dtype=BF16, device="cuda")
    out = Runner("full", EXACT, name)(q, k, v)
    rows = torch.linspace(0, 159_999, 64, device="cuda").long()
    assert_close_to_oracle(out[:, rows], q[:, rows], k, v)


@pytest.mark.parametrize("name", OWN)
def test_addresses_that_are_not_aligned(name, poisoned):
    q, k, v = (torch.randn(2, tokens(name), 4, 65, device="cuda").to(BF16)[..., 1:] for _ in "qkv")
    assert_close_to_oracle(Runner("full", EXACT, name)(q, k, v), q, k, v)


@pytest.mark.parametrize("far", ["batch", "token", "head"])
@pytest.mark.parametrize("name", OWN)
def test_offsets_beyond_2_31_elements(name, far):
    if torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GiB of free GPU memory")
    n, h, d = tokens(name), 2, 64
    apart = -(-(2**31) // (n - 1) // 8) * 8
    strides = {"batch": (2**31, h * d, d, 1), "head": (n * d, d, 2**31, 1), "token": (h * d, apart, d, 1)}[far]
    memory = torch.full((2**31 + 2**24,), torch.nan, dtype=BF16, device="cuda")
    q, k, v = (memory.as_strided((2, n, h, d), strides, 2 * n * h * d * place) for place in range(3))
    for x, near in zip((q, k, v), make_qkv(2, n, n, h, d, dtype=BF16, device="cuda"), strict=True):
        x.copy_(near)
    assert_close_to_oracle(Runner("full", EXACT, name)(q, k, v), q, k, v)


@pytest.mark.parametrize("lengths", [None, (0, 9)], ids=str)
@pytest.mark.parametrize("name", OWN)
def test_log_sum_exp_in_the_natural_logarithm(name, lengths, poisoned):
    options = {} if lengths is None else {"kv_len": torch.tensor(lengths, dtype=torch.int32, device="cuda")}
    check(OWN[name].attend, *qkv(name, kv_heads=2), **options)


def test_log_sum_exp_of_masked_scores(poisoned):
    (q, k, v), given = Case(backend="triton_flash", q_len=129, kv_len=300, mask="additive").inputs()
    check(OWN["triton_flash"].attend, q, k, v, **given)


@pytest.mark.parametrize("name", OWN)
def test_the_same_bits_every_time(name):
    q, k, v = qkv(name)
    runner = Runner("full", EXACT, name)
    first = runner(q, k, v)
    assert all(torch.equal(runner(q, k, v), first) for _ in range(20))


@pytest.mark.parametrize("name", OWN)
def test_branches_of_guidance_do_not_meet(name):
    branches = [qkv(name, seed) for seed in (1, 2)]
    alone = [Runner("full", EXACT, name)(*branch) for branch in branches]
    runner = Runner("full", EXACT, name)
    for _ in range(3):
        for branch, expected in zip(branches, alone, strict=True):
            assert torch.equal(runner(*branch), expected)


@pytest.mark.parametrize("name", OWN)
def test_outputs_that_are_not_finite_are_told(name):
    q, k, v = qkv(name)
    runner = Runner("full", EXACT, name)
    runner(q, k, v)
    torch.cuda.synchronize()
    assert runner.replace_flagged() == []
    v[1, 2, 3, 4] = torch.nan
    runner(q, k, v)
    torch.cuda.synchronize()
    (line,) = runner.replace_flagged()
    assert line.startswith(f"output of {name} was not finite")


@pytest.mark.parametrize("name", OWN)
def test_a_cuda_graph(name):
    """Captured once its plan is made, it computes on what is there at each replay, and still tells of NaN."""
    q, k, v = qkv(name)
    runner = Runner("full", EXACT, name)
    runner(q, k, v)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = runner(q, k, v)
    for seed in (1, 2):
        for x, new in zip((q, k, v), qkv(name, seed), strict=True):
            x.copy_(new)
        graph.replay()
        assert torch.equal(out, Runner("full", EXACT, name)(q, k, v))
    v[1, 2, 3, 4] = torch.nan
    graph.replay()
    torch.cuda.synchronize()
    assert len(runner.replace_flagged()) == 1


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", OWN)
@torch.no_grad()
def test_torch_compile(name, fresh_dynamo):
    runner = Runner("full", EXACT, name)
    attend = runner.entry
    backend = "inductor" if name == "triton_flash" else "aot_eager"  # of which the first takes seconds
    compiled = torch.compile(lambda q, k, v: attend(q * 2, k, v) + 1, fullgraph=True, backend=backend)
    for seed in (0, 1):
        q, k, v = qkv(name, seed)
        assert torch.equal(compiled(q, k, v), runner(q * 2, k, v) + 1)
    (plan,) = runner.plans.values()
    assert plan.choice.backend.name == name and plan.calls == 4


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", OWN)
def test_tensors_on_another_gpu_than_the_current_one(name, poisoned):
    q, k, v = qkv(name, device="cuda:1")
    with torch.cuda.device(0):
        out = Runner("full", EXACT, name)(q, k, v)
        assert torch.cuda.current_device() == 0
    assert out.device == q.device
    assert_close_to_oracle(out, q, k, v)
