"""Profiles of pipelines whose costs are known, and of the tiny pipelines of every family."""

import re
import weakref

import pytest
import torch
from attention_kinds import EXPECTED
from torch import nn

import videoattn
from videoattn import runner
from videoattn.benchmarks.toy import PRODUCTS, SIZE, Toy, share_error
from videoattn.profiling import ceilings, recorder, summary
from videoattn.profiling.profile import Ceilings, Profile
from videoattn.profiling.scopes import Scopes


@pytest.fixture(autouse=True)
def no_measurement(monkeypatch):
    """The machine's ceilings are another test's."""
    found = Ceilings(flops={"float32": 1e11}, copy_bandwidth=1e10)
    monkeypatch.setattr(ceilings, "measure", lambda *_: found)


def parts(pipe):
    return [part for part in pipe.components.values() if isinstance(part, nn.Module)]


def assert_untouched(pipe):
    for part in parts(pipe):
        for module in part.modules():
            assert not module._forward_hooks and not module._forward_pre_hooks
            assert "decode" not in vars(module)
    assert "_progress_bar_config" not in vars(pipe)


def test_shares_of_operators_that_take_known_times():
    pipe = Toy()
    made = recorder.record(pipe, {"num_inference_steps": 3}, clean_runs=1)
    shares = {share.name: share.share for share in summary.categories(made)}
    assert share_error(shares, pipe.expected_ms(3, run=2)) < 3, shares  # after a warm-up and a clean pass
    assert_untouched(pipe)


@pytest.mark.parametrize(
    ("shares", "points"), [({"a": 0.25, "b": 0.75}, 0), ({"a": 0.3, "b": 0.7}, 5), ({"b": 1.0}, 25)]
)
def test_an_error_of_the_shares_would_show(shares, points):
    assert share_error(shares, {"a": 10.0, "b": 30.0}) == pytest.approx(points)


def test_every_module_has_its_own_time_and_work():
    pipe = Toy()
    made = recorder.record(pipe, {"num_inference_steps": 2}, clean_runs=1)
    rows = {(row.module, row.operator): row for row in made.rows}
    waits, idles = rows["transformer.conv_wait", "convolution"], rows["transformer.idle", "host"]
    assert 60 <= waits.ms == pytest.approx(pipe.transformer.conv_wait.ms(run=2, steps=2), rel=0.05)
    assert 30 <= idles.ms == pytest.approx(pipe.transformer.idle.ms(run=2, steps=2), rel=0.05)
    assert waits.calls == 2
    assert rows["vae.decoder", "convolution"].stage == "vae.decode"
    product = rows["transformer.products.proj", "linear"]
    products = 2 * PRODUCTS["cpu"]
    assert product.flops == products * 2 * SIZE["cpu"] ** 3
    assert product.bytes == products * 3 * 4 * SIZE["cpu"] ** 2
    assert sum(row.ms for row in made.rows) == pytest.approx(made.recorded_ms, rel=0.02)


def test_a_generation_that_raises_leaves_a_marked_report():
    pipe = Toy(fails_at=1)
    with pytest.raises(recorder.ProfileAborted, match="the card is on fire") as raised:
        recorder.record(pipe, {"num_inference_steps": 2})
    assert isinstance(raised.value.__cause__, RuntimeError)
    made = raised.value.profile
    assert made.error == "RuntimeError: the card is on fire"
    assert made.clean_ms == () and made.recorded_ms > 0
    rows = {(row.module, row.operator): row.calls for row in made.rows}
    assert rows["transformer.conv_wait", "convolution"] == 1  # the step before
    assert ("vae.decoder", "convolution") not in rows
    assert Profile.from_json(made.to_json()).to_json() == made.to_json()
    assert_untouched(pipe)


@pytest.mark.parametrize("run", range(len(recorder.PASSES)))
def test_a_user_who_interrupts_is_obeyed(run):
    pipe, calls, state = Toy(), [], torch.random.get_rng_state()
    forward = pipe.transformer.forward

    def interrupt(x, timestep=None):
        calls.append(len(pipe.transformer._forward_hooks) + len(pipe.transformer._forward_pre_hooks))
        if len(calls) > run:
            raise KeyboardInterrupt
        return forward(x)

    pipe.transformer.forward = interrupt
    with pytest.raises(KeyboardInterrupt):
        recorder.record(pipe, {"num_inference_steps": 1}, clean_runs=1)
    assert len(calls) == run + 1 and bool(calls[run]) == (run > 1)  # where passes hook it
    assert_untouched(pipe)
    assert not runner.watchers
    assert torch.equal(torch.random.get_rng_state(), state)


def fails_in(pipe, run, error):
    """Raise in the generation number `run`: 0 warms up, 1 is clean, 2 recorded, 3 counted, 4 of the memory."""
    decode, runs = pipe.vae.decode, iter(range(9))

    def told(x):
        if next(runs) == run:
            raise error
        return decode(x)

    pipe.vae.decode = told


@pytest.mark.parametrize("run", [2, 4])
def test_what_a_pass_cannot_read_hides_neither_an_error_nor_an_interrupt(run, monkeypatch):
    """A GPU that has not begun to work shows no kernel, and a pass that never began no trace."""

    def unreadable(profiler):
        raise ValueError("no trace")

    monkeypatch.setattr(recorder, "exported", unreadable)
    pipe, error = Toy(), RuntimeError("the card is on fire")
    fails_in(pipe, run, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        recorder.record(pipe, {"num_inference_steps": 1}, clean_runs=1)
    if run == 2:  # nothing could be read before
        fails_in(pipe, run, error)
        with pytest.raises(recorder.ProfileAborted, match="on fire") as raised:
            recorder.record(pipe, {"num_inference_steps": 1}, clean_runs=1)
        assert raised.value.__cause__ is error


def test_what_broke_off_holds_no_memory_of_the_next_pass():
    pipe, held, alive = Toy(), [], []

    def breaks(x):
        alive.append(sum(tensor() is not None for tensor in held))
        large = x.clone()
        held.append(weakref.ref(large))
        raise RuntimeError("out of memory")

    pipe.vae.decode = breaks
    with pytest.raises(recorder.ProfileAborted, match="out of memory"):
        recorder.record(pipe, {"num_inference_steps": 1})
    assert alive == [0] * len(recorder.PASSES)


def test_a_machine_that_cannot_be_measured_any_more_costs_no_report(monkeypatch):
    def poisoned(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(ceilings, "measure", poisoned)
    with pytest.raises(recorder.ProfileAborted, match="the card is on fire") as raised:
        recorder.record(Toy(fails_at=1), {"num_inference_steps": 2})
    assert raised.value.profile.rows and raised.value.profile.ceilings is None


def test_what_cannot_be_profiled_is_told_before_anything_runs(tmp_path):
    pipe = Toy(fails_at=0)  # would raise
    with pytest.raises(TypeError, match="pipe: wanted a pipeline of diffusers, got Denoiser"):
        videoattn.profile(Toy().transformer)
    with pytest.raises(ValueError, match="num_inference_steps: wanted at least 1, got 0"):
        videoattn.profile(pipe, num_inference_steps=0)
    with pytest.raises(ValueError, match="Toy takes no prompt"):
        videoattn.profile(pipe, prompt="a cat")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="wanted a folder that can be written, got .*file"):
        videoattn.profile(pipe, out=tmp_path / "file")
    without = Toy()
    del without.transformer
    type(without).components, before = property(lambda self: {"vae": self.vae}), type(without).components
    try:
        with pytest.raises(ValueError, match="Toy: wanted a pipeline with a denoiser, got one without"):
            videoattn.profile(without)
    finally:
        type(without).components = before


def test_hooks_go_where_installing_them_fails():
    pipe = Toy()
    components = {"transformer": pipe.transformer, "scheduler": _Locked()}
    with pytest.raises(AttributeError), Scopes(components, recorder.Ranges()):
        pass
    assert_untouched(pipe)


def test_hooks_go_where_one_of_them_cannot_be_undone():
    pipe, scheduler = Toy(), _Scheduler()
    with pytest.raises(AttributeError), Scopes(pipe.components | {"scheduler": scheduler}, recorder.Ranges()):
        del scheduler.step  # what stands in for it
    assert_untouched(pipe)


class _Scheduler:
    def step(self):
        pass


class _Locked(_Scheduler):
    def __setattr__(self, name, value):
        raise AttributeError(name)


def profiled(name, **options):
    from tiny_pipelines import build, inputs

    pipe = build(name)
    arguments = inputs(name, pipe) | options
    return pipe, recorder.record(pipe, arguments, clean_runs=1)


PLAIN = {"mochi": {("time_embed.pooler", "text")}}  # attention without a processor: no site of ours, but it takes time


@pytest.mark.parametrize("name", EXPECTED)
def test_every_attention_call_of_the_tiny_pipelines_has_its_site_and_kind(name):
    _, made = profiled(name)
    kinds = EXPECTED[name][1]
    called = [call for call in made.calls if call.step >= 0]
    seen = {(re.sub(r"(?<=\.)\d+", "#", call.site.partition(".")[2]), call.kind) for call in called}
    assert seen == set(kinds.items()) | PLAIN.get(name, set())
    assert summary.labelled_share(made) >= 0.99
    assert summary.named_share(made) >= 0.97
    steps = {call.step for call in called}
    assert len(steps) >= 2 and steps == set(range(min(steps), max(steps) + 1))  # image to image skips the first
    assert {call.steps for call in called} == {max(steps) + 1}
    assert all(call.ms > 0 and call.flops > 0 and call.bytes > 0 for call in called)
    failed = {check.name for check in made.checks if not check.passed}
    assert failed <= {"cost of recording"}, made.checks  # a few milliseconds of work on a busy machine
    assert Profile.from_json(made.to_json()).to_json() == made.to_json()


def test_two_denoisers():
    _, made = profiled("wan22")
    assert len(made.denoisers) == 2
    assert {call.site.partition(".")[0] for call in made.calls if call.step >= 0} == {"transformer", "transformer_2"}


def test_a_denoiser_under_two_names_runs_once_a_call():
    from tiny_pipelines import build, inputs

    pipe = build("wan22")
    pipe.transformer_2 = pipe.transformer
    runs = []

    class Listener:
        def enter(self, scope):
            runs.append(scope.module)

        def leave(self, scope):
            pass

    with Scopes(pipe.components, Listener(), pipe):
        pipe(**inputs("wan22", pipe))
    steps = [module for module in runs if module == "scheduler.step"]
    denoiser = [module for module in runs if module in ("transformer", "transformer_2")]
    assert denoiser == ["transformer"] * 2 * len(steps)  # with and without the prompt
    assert not [module for module in runs if module.startswith("transformer_2")]


def test_a_patched_pipeline_shows_our_backends_and_the_same_calls():
    from tiny_pipelines import build, inputs

    pipe = build("wan")
    plain = recorder.record(pipe, inputs("wan", pipe), clean_runs=1)
    videoattn.enable_fast_attention(pipe, "exact")
    fast = recorder.record(pipe, inputs("wan", pipe), clean_runs=1)

    def places(made):
        return [(c.site, c.kind, c.step, c.branch, c.q_len, c.kv_len, c.heads, c.head_dim) for c in made.calls]

    assert fast.policy == "exact" and plain.policy == ""
    assert places(fast) == places(plain)
    assert sum(c.flops for c in fast.calls) == sum(c.flops for c in plain.calls)
    assert not [check for check in fast.checks if not check.passed and check.name != "cost of recording"]
    videoattn.disable(pipe)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            assert not any(module._forward_pre_hooks or module._forward_hooks for module in part.modules())


def test_compiled_blocks_are_regions_and_the_report_says_so():
    from tiny_pipelines import build, inputs

    torch._dynamo.reset()
    pipe = build("wan")
    for block in pipe.transformer.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    arguments = inputs("wan", pipe)
    graphs = torch._dynamo.utils.counters["stats"]
    before = dict(graphs)
    pipe(**arguments | {"generator": torch.Generator().manual_seed(0)})
    made_graphs = graphs["unique_graphs"] - before.get("unique_graphs", 0)
    made = recorder.record(pipe, arguments, clean_runs=1)
    assert graphs["unique_graphs"] - before.get("unique_graphs", 0) == made_graphs  # no recompilation
    assert any("compiled" in note for note in made.notes)
    calls = [call for call in made.calls if call.step >= 0]
    assert {call.kind for call in calls} == {"full", "cross"}
    assert all(call.ms > 0 for call in calls)
    assert {row.module for row in made.rows if row.operator == "full"} == {
        f"transformer.blocks.{index}" for index in range(len(pipe.transformer.blocks))
    }
    torch._dynamo.reset()


@pytest.fixture
def compiler():
    """Graphs that this test made, and those that torch made anew because a guard failed."""
    torch._dynamo.reset()
    yield lambda: dict(torch._dynamo.utils.counters["stats"])
    torch._dynamo.reset()


def test_a_compiled_denoiser_has_the_kinds_of_its_attention(compiler):
    from tiny_pipelines import build, inputs

    pipe = build("wan")
    plain = recorder.record(pipe, inputs("wan", pipe), clean_runs=1)
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    made = recorder.record(pipe, inputs("wan", pipe), clean_runs=1)
    assert [(call.site, call.kind, call.step) for call in made.calls] == [
        (call.site, call.kind, call.step) for call in plain.calls
    ]
    assert not [check for check in made.checks if not check.passed and check.name != "cost of recording"]


@pytest.mark.parametrize("compiled", ["vae.decode", "transformer.forward"])
def test_a_compiled_method_is_one_region_and_is_not_compiled_again(compiled, compiler):
    from tiny_pipelines import build, inputs

    pipe = build("wan")
    arguments = inputs("wan", pipe) | {"output_type": "np"}
    owner, method = getattr(pipe, compiled.partition(".")[0]), compiled.partition(".")[2]
    function = torch.compile(getattr(owner, method), backend="eager")
    setattr(owner, method, function)
    pipe(**arguments)
    before = compiler()
    made = recorder.record(pipe, arguments, clean_runs=1)
    assert compiler() == before
    assert vars(owner)[method] is function
    assert any("1 modules or methods are compiled" in note for note in made.notes)
    region = compiled.removesuffix(".forward")
    inside = {row.module for row in made.rows if row.stage == region}
    assert inside == {region}
    assert not [check for check in made.checks if not check.passed and check.name != "cost of recording"]


class _Wrapped(nn.Module):
    """A processor that is a module, as those of image prompts are."""

    def __init__(self, processor):
        super().__init__()
        self.wrapped = processor

    def forward(self, *args, **kwargs):
        return self.wrapped(*args, **kwargs)


class _Linear:
    """Attention without a softmax."""

    def __call__(self, attn, hidden_states, *args, **kwargs):
        q, k, v = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        return attn.to_out[0](q.relu() @ (k.relu().transpose(1, 2) @ v))


def test_attention_that_is_not_recognised_is_told():
    from tiny_pipelines import build, inputs

    pipe = build("wan")
    known = recorder.record(pipe, inputs("wan", pipe), clean_runs=1)
    assert not [note for note in known.notes if "attention modules" in note]
    pipe.transformer.blocks[1].attn1.set_processor(_Linear())
    made = recorder.record(pipe, inputs("wan", pipe), clean_runs=1)
    (note,) = [note for note in made.notes if "attention modules" in note]
    assert note.startswith("1 attention modules") and "transformer.blocks.1.attn1 among them" in note
    assert not [call for call in made.calls if call.site == "transformer.blocks.1.attn1"]


@pytest.mark.parametrize("fused", [True, False])
def test_attention_of_a_processor_that_is_a_module(fused):
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
    from tiny_pipelines import build, inputs

    pipe = build("animatediff")
    processor = AttnProcessor2_0 if fused else AttnProcessor
    pipe.unet.set_attn_processor(processor())
    plain = recorder.record(pipe, inputs("animatediff", pipe), clean_runs=1)
    pipe.unet.set_attn_processor({name: _Wrapped(processor()) for name in pipe.unet.attn_processors})
    made = recorder.record(pipe, inputs("animatediff", pipe), clean_runs=1)
    assert [(call.site, call.kind, call.backend) for call in made.calls] == [
        (call.site, call.kind, call.backend) for call in plain.calls
    ]
    assert all(call.ms > 0 for call in made.calls)
    assert not [check for check in made.checks if not check.passed and check.name != "cost of recording"]


def test_the_output_of_a_pass_is_no_memory_of_the_next():
    pipe, held, alive = Toy(), [], []
    decode = pipe.vae.decode

    def told(x):
        alive.append(sum(tensor() is not None for tensor in held))
        video = decode(x)
        held.append(weakref.ref(video))
        return video

    pipe.vae.decode = told
    recorder.record(pipe, {"num_inference_steps": 1}, clean_runs=1)
    assert alive == [0] * len(recorder.PASSES)


def test_a_modular_pipeline():
    from diffusers.modular_pipelines import WanBlocks
    from tiny_pipelines import build, inputs

    pipe = build("wan")
    modular = WanBlocks().init_pipeline()
    taken = modular.components.keys() & pipe.components.keys()
    modular.update_components(**{name: pipe.components[name] for name in taken})
    made = recorder.record(modular, inputs("wan", pipe) | {"output_type": "np"}, clean_runs=1)
    assert made.denoisers == ("WanTransformer3DModel",) and "9 frames" in made.title and made.frames
    assert {call.kind for call in made.calls if call.step >= 0} == {"full", "cross"}
    checks = {check.name: check.passed for check in made.checks}
    assert checks.pop("the recorded pass makes the same video")
    assert all(passed for name, passed in checks.items() if name != "cost of recording")
    assert_untouched(modular)


def test_nothing_is_different_afterwards(monkeypatch):
    from tiny_pipelines import build, run

    pipe = build("svd")
    before = run("svd", pipe)
    state = torch.random.get_rng_state()
    config = dict(pipe._progress_bar_config)
    from tiny_pipelines import inputs

    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    made = recorder.record(pipe, inputs("svd", pipe), clean_runs=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not seeded  # of a GPU that has nothing to do with it
    assert pipe._progress_bar_config == config
    assert torch.equal(run("svd", pipe), before)
    assert made.memory.peak_bytes > made.memory.weights_bytes > 0
    assert "decode" not in vars(pipe.vae) and "step" not in vars(pipe.scheduler)
