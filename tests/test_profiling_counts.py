"""The counting pass: what torch's own counter says, what a hand count says, every operator once, and the very same output."""

import pytest
import tiny_pipelines
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from videoattn import runner
from videoattn.backend import Choice
from videoattn.policy import EXACT
from videoattn.profiling.categories import ATTENTION
from videoattn.profiling.costs import crosses, nbytes
from videoattn.profiling.counts import Counts, Work
from videoattn.profiling.scopes import Scope, Scopes
from videoattn.runner import Runner

F32 = 4  # bytes
KEY = ("pipeline", "pipeline")  # where an operator lands that no scope surrounds


def counted(function, **options) -> Counts:
    counts = Counts(**options)
    with torch.no_grad(), counts:
        function()
    return counts


def work(counts: Counts) -> dict[str, Work]:
    """By operator, places added up."""
    total: dict[str, Work] = {}
    for (_, _, operator), row in counts.rows().items():
        total[operator] = Work(*(a + b for a, b in zip(total.get(operator, Work()), row, strict=True)))
    return total


# ---- bytes, elements and FLOPs of single operators


X = torch.randn(8, 16)
Y = torch.randn(8, 16)
SQUARE = torch.randn(16, 16)
XS = 8 * 16 * F32  # bytes of X


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (lambda: X.view(16, 8).t()[2:].unsqueeze(0).expand(3, -1, -1), {}),
        (lambda: torch.empty(5).detach(), {}),
        (lambda: X.contiguous(), {}),  # it is
        (lambda: X + Y, {"elementwise": Work(1, 0, 128, 3 * XS)}),
        (lambda: X + X, {"elementwise": Work(1, 0, 128, 2 * XS)}),  # one input, read once
        (lambda: X + X[:1], {"elementwise": Work(1, 0, 128, 2 * XS + XS // 8)}),
        (lambda: X[:1].expand(8, 16) * 2, {"elementwise": Work(1, 0, 128, XS + XS // 8)}),
        (lambda: X.clone().add_(Y), {"layout": Work(1, 0, 0, 2 * XS), "elementwise": Work(1, 0, 128, 3 * XS)}),
        (lambda: torch.add(X, Y, out=torch.empty(8, 16)), {"elementwise": Work(1, 0, 128, 3 * XS)}),
        (lambda: torch.empty(8, 16).copy_(X), {"layout": Work(1, 0, 0, 2 * XS)}),
        (lambda: torch.empty(8, 16).copy_(X[:1]), {"layout": Work(1, 0, 0, XS + XS // 8)}),
        (lambda: torch.zeros(8, 16), {"layout": Work(1, 0, 0, XS)}),
        (lambda: torch.cat([X, Y]), {"layout": Work(1, 0, 0, 4 * XS)}),
        (lambda: X.t().contiguous(), {"layout": Work(1, 0, 0, 2 * XS)}),
        (lambda: X.double(), {"layout": Work(1, 0, 0, 3 * XS)}),
        (lambda: F.embedding(torch.tensor([3, 3]), X), {"layout": Work(1, 0, 0, 2 * XS // 4 + 16)}),
        (lambda: X.sum(), {"elementwise": Work(1, 0, 1, XS + F32)}),
        (lambda: X @ SQUARE, {"linear": Work(1, 2 * 8 * 16 * 16, 0, 2 * XS + 16 * 16 * F32)}),
        (lambda: F.linear(X, SQUARE, SQUARE[0]), {"linear": Work(1, 4096, 0, 2 * XS + 16 * 16 * F32 + 16 * F32)}),
        (lambda: torch.mv(SQUARE, X[0]), {"linear": Work(1, 512, 0, 16 * 16 * F32 + 2 * 16 * F32)}),
        (
            lambda: F.conv1d(X[None], torch.randn(4, 8, 3)),
            {
                "elementwise": Work(1, 0, 96, 96 * F32),
                "convolution": Work(1, 2 * 4 * 14 * 8 * 3, 0, XS + (96 + 56) * F32),
            },
        ),
        (lambda: F.layer_norm(X, (16,)), {"normalisation": Work(1, 0, 128 + 16, 2 * XS + 16 * F32)}),
        (lambda: X[0, 0].item(), {"transfer": Work(1, 0, 0, F32)}),
    ],
)
def test_an_operator_costs_what_its_shapes_say(run, expected):
    assert work(counted(run)) == expected


def test_views_of_one_memory_are_as_large_as_what_they_cover():
    assert nbytes(X.expand(5, 8, 16)) == nbytes(X.t()) == XS
    assert nbytes(X.flatten().unfold(0, 32, 16)) == XS  # windows that overlap
    assert nbytes(X[:0]) == 0


# ---- against torch's own counter


@pytest.fixture(scope="module")
def pipes():
    return {name: tiny_pipelines.build(name) for name in ("wan", "animatediff", "svd", "latte", "hunyuan_video")}


def test_flops_of_whole_generations_are_those_of_torch_and_the_output_keeps_its_bits(pipes):
    """Torch has no formula for SDPA on a CPU: what it lacks is what the calls say, 4 B H Nq Nk D each."""
    for name, pipe in pipes.items():
        plain = tiny_pipelines.run(name, pipe)
        counts = Counts()
        with Scopes(pipe.components, counts, pipe), counts:
            assert torch.equal(tiny_pipelines.run(name, pipe), plain), name
        with FlopCounterMode(display=False) as torchs:
            tiny_pipelines.run(name, pipe)
        attention = sum(call.flops for call in counts.calls)
        assert {call.backend for call in counts.calls} == {"sdpa_cpu"}
        assert sum(row.flops for row in counts.rows().values()) == torchs.get_total_flops() + attention
        assert counts.overcounted() == 1.0
        assert not runner.watchers


def test_the_math_path_of_sdpa_is_one_call_and_counts_as_torch_counts_it():
    q, k, v = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 4)  # no fused kernel takes this v

    def run():
        F.scaled_dot_product_attention(q, k, v)

    counts = counted(run)
    with FlopCounterMode(display=False) as torchs:
        run()
    (call,) = counts.calls
    assert (call.backend, call.batch, call.heads, call.q_len, call.kv_len, call.head_dim) == (
        "sdpa_math",
        2,
        3,
        5,
        7,
        8,
    )
    assert call.bytes == (q.numel() + k.numel() + v.numel() + 2 * 3 * 5 * 4) * F32
    rows = work(counts)
    assert set(rows) == {ATTENTION}  # scaling, softmax and copies in it are attention too
    assert rows[ATTENTION].flops == torchs.get_total_flops() == 2 * 2 * 3 * 5 * 7 * (8 + 4)


# ---- each attention call, and each once


SITE = Scope("transformer", "transformer.blocks.0.attn1", ATTENTION, "full")


class Own:
    """A kernel of ours, which launches work of its own."""

    name, own = "triton_test", True

    def plan(self, call, decision, flag=None):
        def run(q, k, v, mask, kv_len, scale):
            q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
            weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
            return (weights @ v).transpose(1, 2).float().contiguous()

        return run


@pytest.fixture
def own_kernel(monkeypatch):
    def select(call, decision, name):
        return Choice(backend=Own(), decision=EXACT, why="", refusals=())

    monkeypatch.setattr(runner, "select_verified", select)


def through_runner(backend: str = "auto"):
    run = Runner("full", EXACT, backend)
    q, k, v = (torch.randn(2, n, 3, 8) for n in (5, 7, 7))
    return lambda: run(q, k, v)


CALL_FLOPS = 4 * 2 * 3 * 5 * 7 * 8
CALL_BYTES = 2 * (5 + 7 + 7 + 5) * 3 * 8 * F32


def counted_at_site(function) -> Counts:
    function()  # plans are made
    counts = Counts(where=lambda: (3, 50, "1"))
    with torch.no_grad(), counts:
        counts.enter(SITE)
        function()
        counts.leave(SITE)
    return counts


def assert_counted_once(counts: Counts) -> None:
    assert len(counts.calls) == 1
    call = counts.calls[0]
    assert (call.stage, call.site, call.kind, call.backend) == ("transformer", SITE.module, "full", "triton_test")
    assert (call.step, call.steps, call.branch, call.ms) == (3, 50, "1", 0.0)
    assert (call.batch, call.heads, call.kv_heads, call.q_len, call.kv_len, call.head_dim) == (2, 3, 3, 5, 7, 8)
    assert (call.dtype, call.flops, call.bytes) == ("float32", CALL_FLOPS, CALL_BYTES)
    assert counts.rows() == {("transformer", SITE.module, "full"): Work(1, CALL_FLOPS, 0, CALL_BYTES)}
    assert counts.overcounted() == 1.0


def test_a_kernel_of_ours_counts_once_by_its_shapes(own_kernel):
    assert_counted_once(counted_at_site(through_runner()))


def forgets_that_the_kernel_is_ours(counts, plan):
    counts._close(counts._planned(plan.call))


def adds_its_work_twice(counts, plan):
    begin(counts, plan)
    counts._add("full", CALL_FLOPS, 0, CALL_BYTES)


begin = Counts.begin


@pytest.mark.parametrize("planted", [forgets_that_the_kernel_is_ours, adds_its_work_twice])
def test_a_planted_double_count_is_found(planted, own_kernel, monkeypatch):
    function = through_runner()
    monkeypatch.setattr(Counts, "begin", planted)
    counts = counted_at_site(function)
    with pytest.raises(AssertionError):
        assert_counted_once(counts)
    if planted is adds_its_work_twice:  # the recorder's own check finds it; the other shows as a second call
        assert counts.overcounted() == 2.0
    else:
        assert [call.backend for call in counts.calls] == ["sdpa", "unfused"]


@pytest.mark.parametrize(("backend", "ran"), [("sdpa", "sdpa_cpu"), ("sdpa_math", "sdpa_math")])
def test_torchs_kernel_through_the_runner_counts_once_under_the_name_of_what_ran(backend, ran):
    counts = counted(through_runner(backend))
    (call,) = counts.calls
    assert (call.backend, call.flops, call.bytes) == (ran, CALL_FLOPS, CALL_BYTES)
    assert work(counts)[ATTENTION].flops == CALL_FLOPS
    assert counts.overcounted() == 1.0


def test_the_operator_of_compiled_graphs_counts_once():
    run = Runner("full", EXACT)
    q, k, v = (torch.randn(2, n, 3, 8) for n in (5, 7, 7))
    counts = counted(lambda: torch.ops.videoattn.attend(q, k, v, None, None, None, "BNHD", False, run.key))
    (call,) = counts.calls
    assert (call.backend, call.flops, call.bytes) == ("sdpa", CALL_FLOPS, CALL_BYTES)
    assert work(counts) == {ATTENTION: Work(1, CALL_FLOPS, 0, CALL_BYTES)}


def test_a_watcher_that_is_told_twice_counts_once(own_kernel):
    function = through_runner()
    function()
    counts = Counts()
    runner.watchers += [counts, counts]
    try:
        with torch.no_grad(), counts:
            assert runner.watchers == [counts, counts]  # it adds itself where nobody did
            function()
        assert runner.watchers == [counts, counts]
    finally:
        runner.watchers.clear()
    assert work(counts)[ATTENTION].flops == CALL_FLOPS and len(counts.calls) == 1


def test_sdpa_past_its_function_is_a_call_too():
    q = torch.randn(2, 3, 5, 8)
    counts = counted(lambda: torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, q, q))
    assert [(call.backend, call.q_len) for call in counts.calls] == [("sdpa_cpu", 5)]
    assert counts.overcounted() == 1.0
    again = Counts()
    with torch.inference_mode(), again:
        F.scaled_dot_product_attention(q, q, q)
    assert again.calls == counts.calls and again.rows() == counts.rows()


def test_attention_that_is_written_out_is_recovered_with_its_heads():
    from diffusers.models.attention_processor import Attention, AttnProcessor

    attn = Attention(query_dim=24, cross_attention_dim=10, heads=3, dim_head=8, processor=AttnProcessor()).eval()
    x, text = torch.randn(2, 5, 24), torch.randn(2, 7, 10)
    module = nn.ModuleDict({"attn2": attn})
    counts = Counts()
    with torch.no_grad(), Scopes({"unet": module}, counts), counts:
        attn(x, text)
    (call,) = counts.calls
    assert (call.site, call.backend, call.dtype) == ("unet.attn2", "unfused", "float32")
    assert (call.batch, call.heads, call.q_len, call.kv_len, call.head_dim) == (2, 3, 5, 7, 8)
    assert (call.flops, call.bytes) == (CALL_FLOPS, CALL_BYTES)
    assert counts.overcounted() == 1.0
    assert call.layout_bytes == counts.rows()["unet", "unet.attn2", "layout"].bytes > 0


def test_eager_attention_of_transformers_is_recovered():
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
    config = CLIPTextConfig(**sizes, vocab_size=50, bos_token_id=0, eos_token_id=1, attn_implementation="eager")
    model = CLIPTextModel(config).eval()
    counts = Counts()
    with torch.no_grad(), Scopes({"text_encoder": model}, counts), counts:
        model(input_ids=torch.ones(2, 9, dtype=torch.int64))
    assert [(c.kind, c.backend, c.batch, c.heads, c.q_len, c.head_dim) for c in counts.calls] == [
        ("text", "unfused", 2, 4, 9, 4)
    ] * 2


# ---- layout copies around attention


def test_copies_go_to_the_calls_that_they_are_made_for():
    """A temporal transformer brings frames together and apart again; its cross-attention and what is around it copy too."""
    x = torch.randn(4, 6, 8)  # [frames, places, width]
    size = x.numel() * F32
    block = Scope("unet", "unet.block")
    temporal = Scope("unet", "unet.block.temp")
    attn1 = Scope("unet", "unet.block.temp.attn1", ATTENTION, "temporal")
    to_q = Scope("unet", "unet.block.temp.attn1.to_q", "linear", "temporal")
    attn2 = Scope("unet", "unet.block.temp.attn2", ATTENTION, "cross")
    spatial = Scope("unet", "unet.block.attn1", ATTENTION, "spatial")
    ff = Scope("unet", "unet.block.temp.ff")

    def attend(counts, scope, x):
        counts.enter(scope)
        F.scaled_dot_product_attention(x[None], x[None], x[None])
        counts.leave(scope)

    counts = Counts()
    with torch.no_grad(), counts:
        counts.enter(block)
        torch.cat([x, x])  # for no attention
        attend(counts, spatial, x)
        counts.enter(temporal)
        rows = x.permute(1, 0, 2).contiguous()
        counts.enter(attn1)
        counts.enter(to_q)
        rows[:3].clone()
        counts.leave(to_q)
        F.scaled_dot_product_attention(rows[None], rows[None], rows[None])
        counts.leave(attn1)
        attend(counts, attn2, rows)
        counts.enter(ff)
        rows.clone()  # the feed-forward's own
        counts.leave(ff)
        rows.permute(1, 0, 2).contiguous()
        counts.leave(temporal)
        counts.leave(block)
    assert {call.kind: call.layout_bytes for call in counts.calls} == {
        "spatial": 0,
        "temporal": 2 * (2 * size) + size,
        "cross": 0,
    }


def test_temporal_attention_of_the_unets_pays_for_its_permutes(pipes):
    for name in ("animatediff", "svd"):
        pipe = pipes[name]
        counts = Counts()
        with Scopes(pipe.components, counts, pipe), counts:
            tiny_pipelines.run(name, pipe, steps=1)
        by_kind = {}
        for call in counts.calls:
            by_kind.setdefault(call.kind, []).append(call.layout_bytes)
        assert min(by_kind["temporal"]) > 0 and max(by_kind["spatial"]) == 0, name


# ---- whatever runs it


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.project, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        q, k, v = self.project(self.norm(x)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x *= 2
        x[:, 0].zero_()
        return x.relu_()


def toy_rows(x, around=torch.no_grad, model=None):
    model = model or Toy().eval()
    counts = Counts(memory=True)
    with around(), Scopes({"toy": model}, counts), counts:
        out = model(x)
    return counts, out


def test_fake_tensors_and_the_meta_device_count_as_real_ones():
    real, _ = toy_rows(torch.randn(3, 5, 16))
    with FakeTensorMode():
        fake, out = toy_rows(torch.randn(3, 5, 16), model=Toy().eval())
    assert type(out).__name__ == "FakeTensor"
    assert fake.rows() == real.rows() and fake.calls == real.calls
    assert (fake.peak_bytes, fake.peak_module) == (real.peak_bytes, real.peak_module)
    meta, _ = toy_rows(torch.randn(3, 5, 16, device="meta"), model=Toy().eval().to("meta"))
    linear = ("toy", "toy.project", "linear")
    assert meta.rows()[linear] == real.rows()[linear]
    assert [call.flops for call in meta.calls] == [call.flops for call in real.calls]


def test_a_copy_to_another_device_is_a_transfer(monkeypatch):
    with FakeTensorMode() as mode:
        x = torch.randn(8, 16)
        there = FakeTensor(mode, torch.empty(8, 16, device="meta"), torch.device("cuda"))
    assert crosses((x,), there) and not crosses((x,), x)
    assert not crosses((x,), torch.empty(8, device="meta"))
    monkeypatch.setattr("videoattn.profiling.costs.crosses", lambda args, out: True)
    assert work(counted(lambda: X.clone())) == {"transfer": Work(1, 0, 0, 2 * XS)}


@pytest.mark.parametrize("around", [torch.inference_mode, torch.enable_grad])
def test_inference_mode_and_gradients_change_no_count(around):
    model, x = Toy().eval(), torch.randn(3, 5, 16)
    plain, wanted = toy_rows(x, model=model)
    counts, out = toy_rows(x, around, model)
    assert torch.equal(out, wanted) and counts.calls == plain.calls
    flops = {key: row.flops for key, row in plain.rows().items() if row.flops}
    assert {key: row.flops for key, row in counts.rows().items() if row.flops} == flops


def test_a_compiled_module_that_runs_eagerly():
    model, x = Toy().eval(), torch.randn(3, 5, 16)
    plain, wanted = toy_rows(x, model=model)
    compiled = torch.compile(model, backend="eager")
    counts = Counts()
    scopes = Scopes({"toy": compiled}, counts, into_compiled=True)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), scopes, counts:
        out = compiled(x)
    assert torch.equal(out, wanted)
    assert counts.rows() == plain.rows()


def test_quantised_weights_count_as_the_operators_that_they_are_written_out_in():
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

    x = torch.randn(2, 3, 64)
    for config, weight_bytes in ((Int8WeightOnlyConfig(), 1), (Int8DynamicActivationInt8WeightConfig(), 1)):
        model = nn.Sequential(nn.Linear(64, 32))
        quantize_(model, config)
        with torch.no_grad():
            plain = model(x)
        counts = Counts()
        with torch.no_grad(), Scopes({"toy": model}, counts), counts:
            assert torch.equal(model(x), plain)
        assert counts.rows()["toy", "toy.0", "linear"].flops == 2 * 6 * 64 * 32
        assert sum(row.bytes for row in counts.rows().values()) >= 64 * 32 * weight_bytes


def test_what_is_alive_at_the_peak():
    size = 1000 * F32

    class Two(nn.Module):
        def forward(self, x):
            kept = x + 1
            return (kept * 2).view(10, 100).t() + kept.view(10, 100).t()  # input, kept, its double, their sum

    module = nn.ModuleDict({"two": Two()})
    counts = Counts(memory=True)
    with torch.no_grad(), Scopes({"toy": module}, counts), counts:
        out = module["two"](torch.zeros(1000, device="meta"))
        assert counts.alive.bytes == size  # the output lives
        del out
        module["two"](torch.zeros(1000, device="meta"))
    assert counts.peak_bytes == 4 * size and counts.peak_module == "toy.two"
    assert counts.alive.bytes == 0


def test_a_generation_that_raises_leaves_nothing_behind(pipes):
    pipe = pipes["wan"]

    def broken(*_):
        raise RuntimeError("no more")

    handle = pipe.transformer.blocks[1].attn1.to_q.register_forward_hook(broken)
    counts = Counts()
    try:
        with pytest.raises(RuntimeError, match="no more"), Scopes(pipe.components, counts, pipe), counts:
            tiny_pipelines.run("wan", pipe)
    finally:
        handle.remove()
    assert not runner.watchers and not torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    assert [call.site for call in counts.calls if call.stage == "transformer"] == [
        "transformer.blocks.0.attn1",
        "transformer.blocks.0.attn2",
    ]
    before = counts.rows()
    tiny_pipelines.run("wan", pipe)
    assert counts.rows() == before


def test_attention_that_raises_is_no_call():
    q = torch.randn(2, 3, 5, 8)
    counts = Counts()
    with torch.no_grad(), counts:
        with pytest.raises(RuntimeError):
            F.scaled_dot_product_attention(q, q[..., :4], q)
        F.scaled_dot_product_attention(q, q, q)
    assert len(counts.calls) == 1 and counts.overcounted() == 1.0


def test_a_call_without_keys_is_counted_without_work():
    run = Runner("full", EXACT)
    counts = counted(lambda: run(torch.randn(2, 5, 3, 8), torch.randn(2, 0, 3, 8), torch.randn(2, 0, 3, 8)))
    assert [(call.q_len, call.kv_len, call.flops) for call in counts.calls] == [(5, 0, 0)]


@pytest.mark.parametrize("without_memory", [FakeTensorMode, lambda: torch.device("meta")], ids=["fake", "meta"])
def test_an_rms_norm_of_a_gpu_is_one_kernel(without_memory):
    """On tensors without memory, which stand for a GPU's: what a dispatch mode makes of it is not what runs there."""
    with without_memory():
        norm, x = nn.RMSNorm(64, eps=1e-6), torch.empty(8, 32, 64)
        counts = Counts()
        with torch.no_grad(), Scopes({"transformer": nn.Sequential(norm)}, counts), counts:
            norm(x)
    (row,) = counts.rows().values()
    assert row == Work(calls=1, flops=0, pointwise=8 * 32 * 64, bytes=4 * (2 * 8 * 32 * 64 + 64))
