"""Attention by blocks of queries and chunks of keys that come and go, and the merge of what chunks give."""

import functools
from itertools import pairwise

import pytest
import torch

from videoattn.benchmarks import results
from videoattn.benchmarks import streaming as benchmark
from videoattn.kernels import merge, reference
from videoattn.slicing import streaming
from videoattn.slicing.streaming import Sizes, plan, predicted, stream_attention
from videoattn.testing import assert_close_to_oracle, make_qkv

GIB = 2**30


def exact(q, k, v, *, scale=None):
    out, lse = reference.attend(q, k, v, scale=scale)
    return out.to(q.dtype), lse.float()


@pytest.mark.parametrize(
    "sizes", (Sizes(queries=7, keys=5), Sizes(queries=40, keys=11), Sizes(queries=3, keys=99), 8, 1)
)
@pytest.mark.parametrize("attend", (exact, None), ids=("oracle", "torch"))
def test_equal_to_the_oracle(sizes, attend, poisoned):
    q, k, v = make_qkv(2, 29, 23, 4, 8, kv_heads=2)
    out, lse = stream_attention(q, k, v, chunk=sizes, attend=attend, scale=0.3, return_lse=True)
    expected, expected_lse = reference.attend(q, k, v, scale=0.3)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


def test_sixteen_bits_lose_no_more_than_plain_attention():
    q, k, v = make_qkv(1, 200, 331, 2, 64, dtype=torch.bfloat16)
    assert_close_to_oracle(stream_attention(q, k, v, chunk=64)[0], q, k, v)


def test_into_a_tensor_and_as_views():
    """Projections leave heads within tokens; text may be cut off."""
    wide = torch.randn(2, 40, 4, 8)
    q, k, v = wide[:, 3:33], wide[:, :37, :2], wide[:, 3:, 2:]
    out = torch.empty(2, 30, 4, 8)
    k, v = k.contiguous(), v.contiguous()
    made, lse = stream_attention(q, k, v, chunk=9, out=out)
    assert made is out and lse is None
    torch.testing.assert_close(out.double(), reference.attend(q, k, v)[0], rtol=1e-5, atol=1e-5)


def test_nothing_to_attend_to():
    q, k, v = torch.randn(1, 3, 2, 4), torch.randn(1, 0, 2, 4), torch.randn(1, 0, 2, 4)
    out, lse = stream_attention(q, k, v, chunk=2, return_lse=True)
    assert not out.any() and (lse == -torch.inf).all()
    assert stream_attention(q[:, :0], q, q, chunk=2)[0].shape == (1, 0, 2, 4)


def test_chunks_walk_to_and_fro_and_stay_where_they_are_needed_again():
    q, k, v = make_qkv(1, 30, 20, 1, 4)
    call = streaming._Stream(q, k, v, torch.empty_like(q), None, Sizes(queries=10, keys=5), exact, None, q.device)
    brought, at_work = [], []
    bring, keys = call._bring, call._keys

    def bringing(chunk, at):
        new = chunk not in call.held
        kept = [held for held in call.held if held == at]
        bring(chunk, at)
        brought.extend([chunk] * new)
        assert all(held in call.held for held in kept)  # what is at work is not overwritten

    call._bring, call._keys = bringing, lambda chunk: (at_work.append(chunk), keys(chunk))[1]
    call.run()
    assert at_work == [0, 1, 2, 3, 3, 2, 1, 0, 0, 1, 2, 3]
    assert brought == [0, 1, 2, 3, 1, 0, 2, 3]
    torch.testing.assert_close(call.out.double(), reference.attend(q, k, v)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    (
        (lambda q, k, v: (q, k, v[:, :3]), "wanted q .* and k, v"),
        (lambda q, k, v: (q, k[..., :2], v[..., :2]), "wanted q .* and k, v"),
        (lambda q, k, v: (q[:, :, :3], k, v), "wanted heads that divide"),
        (lambda q, k, v: (q, k.double(), v), "k: wanted q's float dtype"),
        (lambda q, k, v: (q.int(), k.int(), v.int()), "q: wanted q's float dtype"),
        (lambda q, k, v: (q, k, v.to("meta")), "v: wanted it on k's cpu"),
        (lambda q, k, v: (q, k.to("meta"), v.to("meta")), "k: wanted it on cpu"),
    ),
)
def test_what_does_not_fit_together(change, message):
    q, k, v = make_qkv(1, 6, 5, 4, 4, kv_heads=2)
    with pytest.raises(ValueError, match=message):
        stream_attention(*change(q, k, v), chunk=4, device="cpu")


def test_what_else_is_refused(monkeypatch):
    q, k, v = make_qkv(1, 6, 5, 2, 4)
    with pytest.raises(ValueError, match="out: wanted q's shape"):
        stream_attention(q, k, v, chunk=4, out=torch.empty(1, 6, 2, 3))
    with pytest.raises(ValueError, match="1 query and 1 key"):
        stream_attention(q, k, v, chunk=0)
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: False)
    with pytest.raises(ValueError, match="q: wanted pinned memory"):
        streaming._validate(q, k, v, q, device)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: True)
    with pytest.raises(ValueError, match="k: wanted rows of tokens side by side"):
        streaming._validate(q, k.transpose(1, 2).contiguous().transpose(1, 2), v, q, device)


# -- plan ------------------------------------------------------------------------------------------------------------


def test_a_million_tokens_in_8_gib():
    sizes = plan(1_000_000, 12, 128, torch.bfloat16, "8GiB")
    assert 6 * GIB < sizes.bytes <= 8 * GIB
    assert sizes.bytes == predicted(
        sizes.queries, sizes.keys, heads=12, kv_heads=12, head_dim=128, dtype=torch.bfloat16
    )
    assert sizes.queries >= 300_000 and 32_768 <= sizes.keys <= 65_536
    assert sizes.queries % 384 == 0 and sizes.keys % 128 == 0


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
@pytest.mark.parametrize("kv_heads", (None, 2))
def test_every_budget_is_kept_and_more_of_it_is_never_less(dtype, kv_heads):
    budgets = [2**exponent for exponent in range(23, 38)]
    made = [plan(300_000, 8, 64, dtype, budget, batch=2, kv_heads=kv_heads) for budget in budgets]
    assert all(sizes.bytes <= budget for sizes, budget in zip(made, budgets, strict=True))
    blocks = [-(-300_000 // sizes.queries) for sizes in made]
    assert all(more <= fewer for fewer, more in pairwise(blocks))
    assert made[-1].queries == 300_000
    assert all(size * 2 * 8 * 64 < 2**31 for sizes in made for size in (sizes.queries, sizes.keys))


def test_a_budget_that_holds_nothing():
    with pytest.raises(ValueError, match=r"wanted (\d+) at least .* got 1048576") as caught:
        plan(1_000_000, 12, 128, torch.bfloat16, "1MiB")
    least = int(str(caught.value).split("wanted ")[1].split()[0])
    assert plan(1_000_000, 12, 128, torch.bfloat16, least).bytes == least
    assert plan(10, 2, 8, torch.float32, "1MiB") == Sizes(
        queries=10, keys=10, bytes=predicted(10, 10, heads=2, kv_heads=2, head_dim=8, dtype=torch.float32)
    )


# -- merge -----------------------------------------------------------------------------------------------------------


def test_merge_of_parts_in_any_order():
    q, k, v = make_qkv(2, 9, 30, 4, 8, kv_heads=2)
    parts = [reference.attend(q, k[:, a:b], v[:, a:b]) for a, b in ((0, 1), (1, 17), (17, 30))]
    expected, expected_lse = reference.attend(q, k, v)
    for order in ((0, 1, 2), (2, 0, 1)):
        out, lse = functools.reduce(lambda a, b: merge.merge(*a, *b), (parts[index] for index in order))
        assert out.dtype == lse.dtype == torch.float32
        torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-6, atol=1e-6)


def test_merge_with_rows_that_have_no_key_and_with_scores_far_apart():
    out, other = torch.randn(2, 1, 3, 1, 4)
    lse = torch.tensor([[[-torch.inf, -torch.inf, 300.0]]])
    lse_other = torch.tensor([[[-torch.inf, 2.0, -300.0]]])
    out[0, :2] = other[0, 0] = 0
    before = [x.clone() for x in (out, lse, other, lse_other)]
    for a, b in (((out, lse), (other, lse_other)), ((other, lse_other), (out, lse))):
        made, joint = merge.merge(*a, *b)
        assert torch.equal(joint, torch.tensor([[[-torch.inf, 2.0, 300.0]]]))
        assert torch.equal(made[0], torch.stack((torch.zeros(1, 4), other[0, 1], out[0, 2])))
    assert all(torch.equal(x, y) for x, y in zip(before, (out, lse, other, lse_other), strict=True))


# -- on a GPU, and the benchmark -------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("held", ("host", "keys on the host", "queries on the host", "device"))
def test_streams_of_a_gpu(held):
    """Chunks so small that a copy which came early or late would show."""
    q, k, v = make_qkv(2, 5000, 7001, 4, 128, dtype=torch.bfloat16, device="cuda")
    expected = reference.attend(q, k, v)[0]
    plain = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    host = [x.cpu().pin_memory() for x in (q, k, v)]
    q = host[0] if held in ("host", "queries on the host") else q
    k, v = host[1:] if held in ("host", "keys on the host") else (k, v)
    for sizes in (Sizes(queries=384, keys=128), Sizes(queries=1100, keys=3000), Sizes(queries=9000, keys=9000)):
        for _ in range(3):
            out, lse = stream_attention(q, k, v, chunk=sizes, device="cuda", return_lse=True)
            assert out.device == q.device and torch.isfinite(lse).all()
            error = (out.cuda().double() - expected).abs().max()
            assert error <= 2 * (plain.double() - expected).abs().max() + 2**-9 * expected.abs().max()


@pytest.mark.gpu
def test_memory_of_a_gpu_is_as_predicted():
    sizes = plan(40_000, 12, 128, torch.bfloat16, "256MiB")
    q, k, v = (torch.randn(1, 40_000, 12, 128).bfloat16().pin_memory() for _ in "qkv")
    stream_attention(q[:, :600], k[:, :600], v[:, :600], chunk=256, device="cuda")  # what kernels keep for themselves
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]  # without the allocator's rounding of each tensor
    torch.cuda.reset_peak_memory_stats()
    stream_attention(q, k, v, chunk=sizes, device="cuda")
    made = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
    assert 0.9 * sizes.bytes < made <= sizes.bytes


def test_benchmark(tmp_path, capsys):
    argv = ["--device", "cpu", "--tokens", "700", "--heads", "2", "--head-dim", "16", "--budget", "192KiB"]
    assert benchmark.main([*argv, "--rows", "20", "--commit", "0" * 40, "--results", str(tmp_path)]) == 0
    rows = {row["metric"]: row for row in results.read(tmp_path / "streaming.csv")}
    assert {"seconds", "tflops", "predicted", "rel_l2", "rel_l2 of torch"} <= rows.keys()
    assert float(rows["rel_l2"]["value"]) < 0.01 and float(rows["predicted"]["value"]) <= 192 * 1024
    assert rows["seconds"]["case"] == "1x2x700x16 bfloat16 in 192KiB"
    assert "queries" in capsys.readouterr().out
