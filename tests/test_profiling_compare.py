"""Before and after on tiny pipelines: what is equal is called so, what is wrong shows, and nothing is left behind."""

import base64
import contextlib
import io
import json
import math
from pathlib import Path

import numpy as np
import profile_samples
import pytest
import tiny_pipelines
import torch
from PIL import Image

import videoattn
from videoattn import cli, quality
from videoattn.backend import backends
from videoattn.profiling import alternating, ceilings, compare, comparison, folder, recorder
from videoattn.profiling.alternating import Timed
from videoattn.profiling.comparison import Comparison
from videoattn.profiling.profile import Ceilings
from videoattn.session import session_of

TINY_WAN = Path(__file__).parents[1] / "examples" / "models" / "tiny-wan"


@pytest.fixture(autouse=True, scope="module")
def no_measurement():
    """The machine's ceilings are another test's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ceilings, "measure", lambda *_: Ceilings(flops={"float32": 1e11}, copy_bandwidth=1e10))
        yield


@pytest.fixture
def no_profiles(monkeypatch):
    """For tests of times and frames: profiles are the recorder's tests, and those of exact attention below."""
    monkeypatch.setattr(recorder, "record", lambda *_, **__: profile_samples.empty())


def arguments_of(name, pipe, **more):
    given = tiny_pipelines.inputs(name, pipe)
    del given["output_type"]
    return given | more


def used(name="wan"):
    """A pipeline that has generated before: the first generation leaves attributes of diffusers' own on it."""
    pipe = tiny_pipelines.build(name)
    tiny_pipelines.run(name, pipe, steps=1)
    return pipe


def state_of(pipe):
    """What `compare` must leave: the very processors, the hooks and the scheduler with what it holds."""
    return {
        "processors": {name: id(p) for name, p in pipe.transformer.attn_processors.items()},
        "hooks": [
            (name, len(module._forward_pre_hooks), len(module._forward_hooks))
            for name, module in pipe.transformer.named_modules()
        ],
        "session": id(session_of(pipe.transformer)),
        "scheduler": id(pipe.scheduler),
        "timesteps": id(getattr(pipe.scheduler, "timesteps", None)),
        "attributes": sorted(vars(pipe)),
        "progress bar": vars(pipe).get("_progress_bar_config"),
    }


def picture(png: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(png))))


# -- equal --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    """(comparison of exact attention on a CPU, what was told, folder, state before, state after)."""
    torch.set_num_threads(1)
    pipe = used()
    before, told, out = state_of(pipe), [], tmp_path_factory.mktemp("out") / "new"
    torch.manual_seed(0)
    random = torch.get_rng_state()
    made = compare.compare(
        pipe,
        policy="exact",
        rounds=2,
        out=out,
        progress=told.append,
        **arguments_of("wan", pipe, num_inference_steps=3),
    )
    assert torch.equal(torch.get_rng_state(), random)
    return made, told, out, before, state_of(pipe)


def test_exact_attention_on_a_cpu_is_identical(exact):
    made = exact[0]
    assert made.policy == "exact" and made.quality.identical and str(made.quality) == "identical"
    assert made.quality.psnr is None and made.quality.psnr_frames == (None,) * 9
    assert made.latents == (0.0,) * 3
    assert all(not picture(pair.difference).any() for pair in made.pairs)
    assert all(pair.base == pair.patched for pair in made.pairs) and made.pairs[-1].index == 8
    assert (
        made.notes == ("2 rounds show no difference in time: that takes 3",)
        and not made.base.error
        and not made.patched.error
    )
    assert made.base.policy == "" and "exact" in made.patched.policy


def test_the_noise_floor_is_that_of_two_exact_kernels(exact):
    floor = exact[0].floor
    assert not floor.identical and floor.psnr > 60


def test_both_make_as_many_calls_so_base_is_the_control(exact):
    made = exact[0]
    assert made.base_calls == made.patched_calls == 6  # three steps, with and without the prompt
    assert made.control.steps is None and made.control.quality is None
    assert "the base run itself is the control" in made.control.why


def test_times_are_those_of_clean_runs(exact):
    made = exact[0]
    timing = made.timing
    assert timing.rounds == 2 and len(timing.base_ms) == len(timing.patched_ms) == 4
    assert made.base.clean_ms == timing.base_ms and made.patched.clean_ms == timing.patched_ms
    assert timing.ci_lo <= timing.ratio <= timing.ci_hi and timing.noise > 0
    assert 0 < timing.planning_ms < timing.first_patched_ms
    base, patched = comparison.medians(timing)
    for side, whole in (("base_ms", base), ("patched_ms", patched)):
        assert sum(getattr(d, side) for d in comparison.categories(made)) == pytest.approx(whole)
    assert {"full 3-D self-attention", "VAE decode", "linear"} <= {d.name for d in comparison.categories(made)}


def test_memory_of_both_is_there(exact):
    base, patched = exact[0].base.memory, exact[0].patched.memory
    assert base.weights_bytes == patched.weights_bytes > 0
    assert base.peak_bytes > base.weights_bytes and patched.peak_bytes > patched.weights_bytes


def test_progress_is_told_what_was_promised(exact):
    assert tuple(exact[1]) == compare.runs(2)


def test_every_form_is_written(exact):
    made, _, out, _, _ = exact
    assert sorted(file.name for file in out.iterdir()) == [
        "report.html",
        "report.json",
        "report.md",
        "trace_base.json.gz",
        "trace_patched.json.gz",
    ]
    again = folder.read(out / "report.json")
    assert isinstance(again, Comparison) and again.to_json() == made.to_json()
    assert "Infinity" not in made.to_json() and "NaN" not in made.to_json()


def test_lpips_is_said_to_be_missing(exact):
    made = exact[0]
    assert made.lpips is None and made.lpips_why


def test_nothing_is_left_on_an_untouched_pipeline(exact):
    assert exact[3] == exact[4] and exact[3]["session"] == id(None)


# -- wrong --------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def changed_output(module, change):
    handle = module.register_forward_hook(lambda _, args, output: change(output))
    try:
        yield
    finally:
        handle.remove()


def test_a_wrong_kernel_shows(monkeypatch, no_profiles):
    """torch's own kernel, 5 % too large wherever a session runs it by itself: what a flat cosine would not see."""
    pipe = tiny_pipelines.build("wan")
    sdpa = next(type(backend) for backend in backends() if backend.name == "sdpa")
    right = sdpa.plan

    def wrong(self, call, decision, flag=None):
        run = right(self, call, decision, flag)
        return run if self.name != "sdpa" else lambda *tensors: 1.05 * run(*tensors)

    monkeypatch.setattr(sdpa, "plan", wrong)
    made = compare.compare(pipe, policy="exact", rounds=1, control=0, **arguments_of("wan", pipe))
    assert not made.quality.identical and made.quality.psnr < 70
    assert 0 < made.latents[0] < made.latents[1] < 1
    assert made.control.why == "left out, as asked" and made.control.quality is None
    worst = next(pair for pair in made.pairs if pair.index == made.quality.worst_frame)
    assert worst.base != worst.patched
    assert f"PSNR {made.quality.psnr:.2f} dB" in comparison.verdict(made)


def test_changed_frames_show_where_they_are(no_profiles):
    pipe = tiny_pipelines.build("wan")

    def brighter(output):
        frames = output[0].clone()
        frames[:, :, 4, 10:20, 10:20] += 0.5  # of -1..1: a quarter of the range
        return (frames,)

    decode = pipe.vae.decode

    @contextlib.contextmanager
    def patched():
        pipe.vae.decode = lambda *args, **kwargs: brighter(decode(*args, **kwargs))
        try:
            yield
        finally:
            del pipe.vae.decode

    made = compare.compare_states(pipe, patched, arguments_of("wan", pipe), name="a bright square", rounds=1)
    assert made.policy == "a bright square"
    assert made.quality.worst_frame == 4 and not made.quality.identical
    assert [psnr is None for psnr in made.quality.psnr_frames] == [index != 4 for index in range(9)]
    assert made.latents == (0.0, 0.0)  # what happens after the sampler is not its doing
    pair = next(pair for pair in made.pairs if pair.index == 4)  # the worst frame is among those shown
    heat = picture(pair.difference)
    inside, outside = heat[10:20, 10:20], heat.astype(int).sum() - heat[10:20, 10:20].astype(int).sum()
    assert inside[..., 0].max() == 255 and outside == 0
    assert made.quality.motion > 1  # the square comes and goes


def test_frames_that_are_not_finite_are_said_to_be(no_profiles):
    pipe = tiny_pipelines.build("wan")
    block = pipe.transformer.blocks[0].attn1
    made = compare.compare_states(
        pipe, lambda: changed_output(block, lambda x: x * math.nan), arguments_of("wan", pipe), name="nan", rounds=1
    )
    assert "patched: 9 of 9 frames are not finite; such values count as black" in made.notes
    assert made.latents == () and made.quality.psnr < 20
    assert Comparison.from_json(made.to_json()).notes == made.notes


def test_a_run_with_fewer_calls_is_held_against_as_few_of_base(no_profiles):
    """Blocks are skipped in every second step, as a cache does: the control has half of the steps."""
    pipe, passed = tiny_pipelines.build("wan"), 0

    def count(*_):
        nonlocal passed
        passed += 1

    @contextlib.contextmanager
    def patched():
        nonlocal passed
        passed = 0
        handle = pipe.transformer.register_forward_pre_hook(count)
        originals = [block.forward for block in pipe.transformer.blocks]
        for block, forward in zip(pipe.transformer.blocks, originals, strict=True):
            block.forward = lambda x, *rest, run=forward: run(x, *rest) if passed % 4 in (1, 2) else x
        try:
            yield
        finally:
            handle.remove()
            for block in pipe.transformer.blocks:
                del block.forward

    arguments = arguments_of("wan", pipe, num_inference_steps=4)
    made = compare.compare_states(pipe, patched, arguments, name="every second step", rounds=2)
    assert (made.base_calls, made.patched_calls) == (8, 4)
    assert (made.control.steps, made.control.calls, len(made.control.ms)) == (2, 4, 2)
    assert not made.quality.identical and not made.control.quality.identical
    plain = recorder.Generation(pipe, arguments_of("wan", pipe, num_inference_steps=4, output_type="np"))
    half = recorder.Generation(pipe, arguments_of("wan", pipe, num_inference_steps=2, output_type="np"))
    by_hand = quality.compare_videos(half.run()[1].frames[0], plain.run()[1].frames[0])
    assert made.control.quality.psnr == pytest.approx(by_hand.psnr)
    assert "2 of 4 steps" in str(made)


# -- left behind --------------------------------------------------------------------------------------------------------


def test_the_very_session_is_compared_and_put_back():
    pipe = videoattn.enable_fast_attention(used(), "exact", backend="sdpa_math")
    session, before = session_of(pipe.transformer), state_of(pipe)
    made = compare.compare(pipe, rounds=1, **arguments_of("wan", pipe))
    assert made.policy == "exact, backend sdpa_math" and not made.quality.identical  # other rounding than sdpa's
    assert {call.backend for call in made.patched.calls if call.step >= 0} == {"sdpa_math"}
    assert made.base.policy == "" and {call.backend for call in made.base.calls if call.step >= 0} == {"sdpa_cpu"}
    assert session_of(pipe.transformer) is session and state_of(pipe) == before
    calls = session.clock.calls
    tiny_pipelines.run("wan", pipe)
    assert session.clock.calls == calls + 4  # it serves again


def test_a_policy_stands_in_for_the_session_that_is_there(no_profiles):
    pipe = videoattn.enable_fast_attention(used(), "exact", backend="sdpa_math")
    before = state_of(pipe)
    made = compare.compare(pipe, policy="exact", rounds=1, **arguments_of("wan", pipe))
    assert made.policy == "exact" and made.quality.identical
    assert state_of(pipe) == before


def test_both_profiles_are_of_the_generation_that_was_timed(monkeypatch):
    pipe, seen = tiny_pipelines.build("wan"), []
    arguments = arguments_of("wan", pipe)
    start = arguments["generator"].get_state()

    def record(pipe, arguments, **_):
        seen.append((torch.equal(arguments["generator"].get_state(), start), session_of(pipe.transformer) is not None))
        return profile_samples.empty()

    monkeypatch.setattr(recorder, "record", record)
    compare.compare(pipe, policy="exact", rounds=1, **arguments)
    assert seen == [(True, False), (True, True)]


@pytest.mark.parametrize("enabled", [False, True])
def test_all_is_put_back_when_a_generation_raises(enabled):
    pipe = used()
    if enabled:
        videoattn.enable_fast_attention(pipe, "exact")
    runs = []

    def fail(module, args):
        runs.append(session_of(pipe.transformer))
        if len(runs) == 7:  # in the second generation, which is the patched one
            raise RuntimeError("out of luck")

    handle = pipe.transformer.register_forward_pre_hook(fail, prepend=True)
    before = state_of(pipe)
    with pytest.raises(RuntimeError, match="out of luck"):
        compare.compare(pipe, policy="exact", rounds=1, **arguments_of("wan", pipe))
    assert runs[0] is None and runs[-1] is not None
    assert state_of(pipe) == before
    handle.remove()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_inference_steps": 0}, ValueError, "num_inference_steps: wanted at least 1, got 0"),
        ({"rounds": 0}, ValueError, "rounds: wanted at least 1, got 0"),
        ({"control": -1}, ValueError, "control: wanted steps"),
        ({"policy": "turbo"}, ValueError, "turbo"),
        ({"output_type": "pt"}, ValueError, "wanted no output_type 'pt'"),
        ({"callback_on_step_end": print}, ValueError, "wanted no callback_on_step_end"),
        ({"colour": "red"}, ValueError, "takes no colour"),
        ({"out": "FILE"}, ValueError, "wanted a folder that can be written"),
        ({"lpips_weights": Path("nowhere.pth")}, ValueError, "lpips_weights: wanted a file, got nowhere.pth"),
        ({"pipe": "a pipeline"}, TypeError, "wanted a pipeline"),
        ({"pipe": "NO DENOISER"}, ValueError, "denoiser"),
    ],
)
def test_errors_come_before_anything_runs(change, error, message, tmp_path):
    pipe = tiny_pipelines.build("wan")
    before, ran = state_of(pipe), []
    file = tmp_path / "file"
    file.touch()
    given = arguments_of("wan", pipe, rounds=1) | {k: file / "x" if v == "FILE" else v for k, v in change.items()}
    subject = given.pop("pipe", pipe)
    if subject == "NO DENOISER":
        subject = tiny_pipelines.build("wan")
        subject.register_modules(transformer=None)
    pipe.text_encoder.register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(error, match=message):
        compare.compare(subject, **given)
    assert not ran and state_of(pipe) == before


# -- times --------------------------------------------------------------------------------------------------------------


def shown(base, patched):
    """base, patched: [rounds, 2] in ms."""
    times = Timed(base_ms=base, patched_ms=patched, base=None, patched=None)
    return alternating.shown(times, first_base_ms=0.0, first_patched_ms=0.0, planning_ms=0.0)


def test_a_drift_of_the_clocks_is_no_difference():
    """A B B A and B A A B and again while everything takes 1 % longer with every run: base and patched are the same."""
    at = [100 * 1.01**i for i in range(12)]
    found = shown([(at[0], at[3]), (at[5], at[6]), (at[8], at[11])], [(at[1], at[2]), (at[4], at[7]), (at[9], at[10])])
    assert (found.ratio, found.ci_lo, found.ci_hi) == pytest.approx((1, 1, 1)) and found.verdict == "not shown"
    assert found.base_ms[:4] == (at[0], at[3], at[5], at[6]) and found.noise > 0.01


def test_the_noise_is_that_of_the_first_half_of_a_round_against_the_second():
    found = shown([(100, 110)] * 3, [(50, 40)] * 3)
    assert found.noise == pytest.approx(math.sqrt(100 * 50 / (110 * 40)) - 1)
    assert found.ratio == pytest.approx(math.sqrt(100 * 110 / (50 * 40)))


def test_two_rounds_show_nothing():
    assert shown([(100, 100)] * 2, [(50, 50)] * 2).verdict == "not shown"
    assert shown([(100, 100)] * 3, [(50, 50)] * 3).verdict == "faster"


def test_a_difference_within_the_noise_is_not_shown():
    quiet = shown([(100, 101), (101, 100), (100, 100)], [(90, 91), (91, 90), (90, 90)])
    noisy = shown([(100, 140), (101, 139), (100, 141)], [(90, 125), (91, 127), (90, 126)])
    assert quiet.verdict == "faster" and noisy.verdict == "not shown"
    assert quiet.ratio == pytest.approx(1.11, abs=0.01)
    slower = shown([(90, 91), (91, 90), (90, 90)], [(100, 101), (101, 100), (100, 100)])
    assert slower.verdict == "slower" and slower.ratio == pytest.approx(0.9, abs=0.01)


# -- LPIPS --------------------------------------------------------------------------------------------------------------

PACKAGE = """
import torch
class LPIPS(torch.nn.Module):
    '''What LPIPS looks like from outside: AlexNet cut into slices that keep the layers' numbers.'''
    def __init__(self, net, pnet_rand, verbose):
        super().__init__()
        assert net == "alex" and pnet_rand  # anything else would download
        self.net = torch.nn.Module()
        self.net.slice1 = torch.nn.Sequential()
        self.net.slice1.add_module("0", torch.nn.Conv2d(3, 4, 3))
        self.net.slice2 = torch.nn.Sequential()
        self.net.slice2.add_module("3", torch.nn.Conv2d(4, 4, 3))
    def forward(self, a, b):
        assert a.shape[:2] == (1, 3) and -1 <= a.min() < -0.5 and 0.5 < a.max() <= 1
        features = lambda x: self.net.slice2(self.net.slice1(x))
        return (features(a) - features(b)).abs().mean()
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    (tmp_path / "lpips.py").write_text(PACKAGE)
    (tmp_path / "torchvision.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    yield
    for name in ("lpips", "torchvision"):
        __import__("sys").modules.pop(name, None)


def test_lpips_takes_the_weights_that_are_here(package, tmp_path):
    video, reference = np.random.default_rng(0).uniform(0, 1, (2, 3, 16, 16, 3))
    assert "no weights of AlexNet" in quality.lpips(video, reference)
    weights = {
        f"features.{layer}.{part}": torch.randn(shape)
        for layer, inputs in ((0, 3), (3, 4))
        for part, shape in (("weight", (4, inputs, 3, 3)), ("bias", (4,)))
    }
    torch.save(weights | {"classifier.1.weight": torch.zeros(2)}, tmp_path / "alex.pth")
    found = quality.lpips(video, reference, tmp_path / "alex.pth")

    def features(frame):
        x = torch.from_numpy(frame).float().permute(2, 0, 1)[None] * 2 - 1
        for layer in (0, 3):
            x = torch.nn.functional.conv2d(x, weights[f"features.{layer}.weight"], weights[f"features.{layer}.bias"])
        return x

    expected = np.mean([(features(a) - features(b)).abs().mean() for a, b in zip(video, reference, strict=True)])
    assert found == pytest.approx(expected, rel=1e-5)
    assert quality.lpips(video, video, tmp_path / "alex.pth") == 0


def test_a_package_that_does_not_load_is_said_to(package, tmp_path):
    """As torchvision where it was built for another torch."""
    (tmp_path / "lpips.py").write_text("raise RuntimeError('operator torchvision::nms\\n does not exist')")
    torch.save({}, tmp_path / "alex.pth")
    video = np.zeros((2, 16, 16, 3))
    assert quality.lpips(video, video, tmp_path / "alex.pth") == (
        "the package lpips does not work here: operator torchvision::nms does not exist"
    )


def test_lpips_without_its_package_says_so_and_never_downloads(monkeypatch):
    monkeypatch.setattr(quality.importlib.util, "find_spec", lambda name: None)
    video = np.zeros((2, 16, 16, 3))
    assert quality.lpips(video, video) == "no package lpips and torchvision here"
    with pytest.raises(ValueError, match=r"got nowhere\.pth"):
        quality.lpips(video, video, Path("nowhere.pth"))


# -- the command line ---------------------------------------------------------------------------------------------------


def test_compare_and_report_on_the_shipped_model(tmp_path, capsys):
    flags = ("--prompt", "a red circle moves left", "--steps", "2", "--height", "64", "--width", "64", "--frames", "5")
    out, again = tmp_path / "compared", tmp_path / "again"
    assert cli.main(["compare", str(TINY_WAN), *flags, "--preset", "exact", "--rounds", "1", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "exact: no difference in time shown" in printed and "that takes 3" in printed
    assert "Video: identical." in printed and "report.html" in printed
    assert json.loads((out / "report.json").read_text())["patched"]["arguments"]["num_inference_steps"] == 2

    assert cli.main(["report", str(out / "report.json"), "--out", str(again)]) == 0
    for name in ("report.html", "report.md", "report.json"):
        assert (again / name).read_text() == (out / name).read_text(), name
    assert (again / "report.txt").read_text() in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "TINY"], "WanPipeline needs a prompt"),
        (["compare", "TINY", "--prompt", "x", "--rounds", "0"], "rounds: wanted at least 1, got 0"),
        (["compare", "TINY", "--prompt", "x", "--out", "FILE/x"], "wanted a folder that can be written"),
        (["report", "nowhere.json", "--out", "OUT"], "nowhere.json"),
        (["report", "FILE", "--out", "OUT"], "wanted the JSON of a report"),
    ],
)
def test_wrong_use_is_one_line(arguments, message, tmp_path, capsys):
    (tmp_path / "file").write_text("no report")
    names = {"TINY": str(TINY_WAN), "OUT": str(tmp_path / "out")}
    with pytest.raises(SystemExit) as stopped:
        cli.main([names.get(a, a.replace("FILE", str(tmp_path / "file"))) for a in arguments])
    assert stopped.value.code == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("videoattn")]
    assert len(said) == 1 and message in said[0]
