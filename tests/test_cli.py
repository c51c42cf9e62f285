"""The command line: a video from each kind of pipeline, an environment that is judged rightly, one clear line on errors."""

import re
import sys
from dataclasses import replace

import imageio.v3 as iio
import numpy as np
import pytest
import tiny_pipelines
import torch
from PIL import Image

import videoattn
from videoattn import cli, doctor, generation, measured
from videoattn.kernels import sdpa
from videoattn.policy import EXACT
from videoattn.video import write_contact_sheet, write_video


@pytest.fixture(scope="module")
def tiny_wan(tmp_path_factory) -> str:
    """A saved WanPipeline, as a user has it on disk."""
    folder = tmp_path_factory.mktemp("models") / "tiny-wan"
    tiny_pipelines.build("wan").save_pretrained(folder)
    return str(folder)


SMALL = ("--prompt", "a red cube", "--steps", "2", "--height", "32", "--width", "48", "--frames", "5")


def test_generate_writes_the_video_and_prints_the_report(tiny_wan, tmp_path, capsys):
    out = tmp_path / "new folder" / "video.mp4"
    assert cli.main(["generate", tiny_wan, *SMALL, "--preset", "balanced", "--out", str(out)]) == 0
    assert iio.imread(out).shape == (5, 32, 48, 3)
    printed = capsys.readouterr().out
    assert "4 calls of the denoiser" in printed  # 2 steps, each with and without the prompt
    if not torch.cuda.is_available():
        assert "int8_qk_fp8_pv -> exact: no GPU" in printed


FAMILIES = ("wan", "wan21_i2v", "cogvideox_rope", "ltx", "latte", "animatediff", "svd", "text_to_video_sd")


@pytest.mark.parametrize("family", FAMILIES)
def test_one_set_of_settings_serves_every_family(family):
    pipe = tiny_pipelines.build(family)
    own = tiny_pipelines.PIPELINES[family].call
    settings = generation.Settings(
        prompt="a red cube" if family != "svd" else None,
        image=generation.synthetic_image(own["width"], own["height"]) if generation.needs_image(pipe) else None,
        steps=2,
        guidance=2.0 if family != "svd" else None,
        height=own["height"],
        width=own["width"],
        frames=own.get("num_frames", own.get("video_length")),
    )
    plain = generation.generate(pipe, settings)
    assert plain.frames.shape == (settings.frames, own["height"], own["width"], 3)
    assert plain.frames.std() > 0.01
    assert plain.seconds > 0 and plain.peak_gib > 0
    for change in ({"seed": 1}, {"steps": 3}, {"guidance": 5.0} if family != "svd" else {"seed": 2}):
        assert not np.array_equal(plain.frames, generation.generate(pipe, replace(settings, **change)).frames)

    videoattn.enable_fast_attention(pipe, "exact")
    fast = generation.generate(pipe, settings)
    np.testing.assert_allclose(fast.frames, plain.frames, atol=1e-3)
    assert plain.calls == fast.calls == videoattn.report(pipe).denoiser_calls > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["generate", "wan-9000b", *SMALL], "wanted a folder, a hub id (owner/name) or one of wan-1.3b, "),
        (["generate", "no/such/folder", *SMALL], "got 'no/such/folder'"),
        (["generate", "TMP", *SMALL], "model_index.json"),
        (["generate", "WAN"], "WanPipeline needs a prompt"),
        (["generate", "WAN", *SMALL, "--image", "first.png"], "WanPipeline takes no image, got 'first.png'"),
        (["generate", "WAN", *SMALL, "--height", "47"], "47"),
        (["generate", "WAN", *SMALL, "--guidance", "strong"], "invalid float value: 'strong'"),
        (["generate", "WAN", *SMALL, "--steps", "0"], "steps: wanted at least 1, got 0"),
        (["generate", "WAN", *SMALL, "--preset", "turbo"], "'turbo'"),
        (["generate", "WAN", *SMALL, "--out", "video.txt"], "ends in .mp4, got video.txt"),
        (["bench", "speed"], "'speed'"),
    ],
)
def test_wrong_use_is_one_line_and_exit_status_2(arguments, message, tiny_wan, tmp_path, capsys):
    paths = {"WAN": tiny_wan, "TMP": str(tmp_path)}
    with pytest.raises(SystemExit) as stopped:
        cli.main([paths.get(argument, argument) for argument in arguments])
    assert stopped.value.code == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("videoattn")]
    assert len(said) == 1 and message in said[0]


def test_traceback_on_request(tiny_wan):
    with pytest.raises(ValueError, match="needs a prompt"):
        cli.main(["--traceback", "generate", tiny_wan])


def test_a_hub_id_without_a_network(monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["generate", "nobody/no-such-video-model", *SMALL])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("videoattn: ")


@pytest.mark.parametrize("script", cli.BENCHMARKS)
def test_bench_runs_the_script_with_the_flags_behind_its_name(script, monkeypatch):
    got = []
    monkeypatch.setattr(f"videoattn.benchmarks.{script}.main", lambda argv: got.append(argv) or 3)
    assert cli.main(["bench", script, "--only", "wan"]) == 3
    assert got == [["--only", "wan"]]


def test_doctor_looks_at_what_is_here():
    checks = {check.name: check for check in doctor.examine()}
    assert checks["torch"].found == torch.__version__ and checks["torch"].state == "ok"
    assert checks["sdpa"].state == checks["sdpa_math"].state == "ok"
    if not torch.cuda.is_available():
        assert checks["GPU"].state == "note"
        assert (checks["sdpa_flash"].state, checks["sdpa_flash"].why) == ("note", "no GPU")


def test_doctor_finds_a_package_outside_the_tested_range(monkeypatch):
    monkeypatch.setattr(
        doctor.importlib.metadata, "requires", lambda _: ["torch<2", "no-such-package>=1", "x; extra == 'y'"]
    )
    checks = {check.name: check for check in doctor.examine()}
    assert (checks["torch"].state, checks["torch"].why) == ("broken", "tested with <2")
    assert (checks["no-such-package"].state, checks["no-such-package"].found) == ("broken", "missing")
    assert "x" not in checks


def test_doctor_says_that_videoattn_is_not_installed_and_goes_on(monkeypatch):
    def requires(name):
        raise doctor.importlib.metadata.PackageNotFoundError(name)

    installed = {check.name: check for check in doctor.examine()}
    monkeypatch.setattr(doctor.importlib.metadata, "requires", requires)
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)  # what was not installed may lack its requirements
    checks = {check.name: check for check in doctor.examine()}
    assert (installed["videoattn"].found, installed["videoattn"].state) == (videoattn.__version__, "ok")
    assert (checks["videoattn"].found, checks["videoattn"].state) == ("not installed", "note")
    assert "pip install -e" in checks["videoattn"].why
    assert (checks["ffmpeg"].found, checks["ffmpeg"].state) == ("missing", "broken")
    assert checks["sdpa"] == installed["sdpa"]


def test_doctor_finds_a_kernel_that_computes_nonsense(monkeypatch):
    class Wrong:
        name = "wrong"

        def computes(self, decision):
            return decision == EXACT

        def refuses(self, call, decision):
            return None

        def plan(self, call, decision, flag=None):
            return lambda q, k, v, mask, kv_len, scale: torch.zeros_like(q)

    monkeypatch.setattr(doctor, "backends", lambda: (Wrong(),))
    assert {check.name: check.state for check in doctor.examine()}["wrong"] == "broken"


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    """A machine with one GPU of compute capability 8.6, an empty cache folder, and the shipped table of sm_90."""
    card = measured.Card(gpu="NVIDIA RTX 1", architecture="sm_86")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(measured, "card", lambda device: card)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured.evidence.cache_clear()
    yield card
    measured.evidence.cache_clear()


def found_of_times() -> list[doctor.Check]:
    return [check for check in doctor.examine() if check.name == "measured times, GPU 0"]


def test_doctor_tells_a_borrowed_table_from_the_cards_own(gpu):
    (borrowed,) = found_of_times()
    assert borrowed.state == "note" and "NVIDIA H200" in borrowed.found and "sm_90" in borrowed.why
    assert "videoattn calibrate" in borrowed.why
    shipped = measured.evidence(gpu).sources[0].table
    path = measured.user_path(gpu.gpu)
    versions = {"torch": torch.__version__, "triton": measured._triton(), "date": "2020-01-01T00:00:00Z"}
    replace(shipped, gpu=gpu.gpu, **versions).write(path)
    measured.evidence.cache_clear()
    (own,) = found_of_times()
    assert (own.state, own.why) == ("ok", str(path))
    assert gpu.gpu in own.found and f"torch {torch.__version__}" in own.found
    assert int(re.search(r"(\d+) days old", own.found)[1]) > 365 * 6


def test_doctor_says_that_a_table_is_passed_over(gpu):
    replace(measured.evidence(gpu).sources[0].table, torch="1.0").write(measured.user_path(gpu.gpu))
    measured.evidence.cache_clear()
    passed_over, borrowed = found_of_times()
    assert (passed_over.found, passed_over.state) == ("passed over", "note") and "torch 1.0" in passed_over.why
    assert "NVIDIA H200" in borrowed.found


def test_doctor_says_that_there_is_no_table(gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(measured, "TABLES", tmp_path)
    measured.evidence.cache_clear()
    (none,) = found_of_times()
    assert (none.found, none.state) == ("none", "note")


def test_doctor_tries_a_kernel_on_a_call_that_it_takes(monkeypatch):
    class ShortRows:
        name = "short"

        def computes(self, decision):
            return decision == EXACT

        def refuses(self, call, decision):
            return "more than 128 tokens" if call.q_len > 128 else None

        def plan(self, call, decision, flag=None):
            return sdpa.BACKENDS[0].plan(call, decision)

    monkeypatch.setattr(doctor, "backends", lambda: (ShortRows(),))
    (check,) = (check for check in doctor.examine() if check.name == "short")
    assert check.state == "ok" and "16 tokens" in check.found


def test_doctor_finds_a_folder_that_hides_hugging_face_kernels(tmp_path, monkeypatch):
    hiding = tmp_path / "kernels" / "__init__.py"
    hiding.parent.mkdir()
    hiding.touch()
    before = {check.name: check for check in doctor.examine()}["kernels (Hugging Face)"]
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    after = {check.name: check for check in doctor.examine()}["kernels (Hugging Face)"]
    assert (before.state, after.state, after.found) == ("ok", "broken", str(hiding))


@pytest.mark.parametrize(
    ("script", "driver"),
    [("echo 580.65; echo 580.65", "580.65"), ("exit 0", None), ("echo no devices; exit 6", None), (None, None)],
)
def test_the_driver_is_what_nvidia_smi_tells(script, driver, tmp_path, monkeypatch):
    if script is not None:
        command = tmp_path / "nvidia-smi"
        command.write_text(f"#!/bin/sh\n{script}\n")
        command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.nvidia_driver() == driver


@pytest.mark.parametrize(("state", "status"), [("ok", 0), ("note", 0), ("broken", 1)])
def test_doctor_exit_status(state, status, monkeypatch):
    monkeypatch.setattr(doctor, "examine", lambda: [doctor.Check(name="a", found="b", state=state)])
    assert cli.main(["doctor"]) == status


def test_contact_sheet_shows_the_first_and_the_last_frame_of_every_video(tmp_path):
    shades = np.linspace(0, 1, 11, dtype=np.float32)
    up = np.broadcast_to(shades[:, None, None, None], (11, 20, 30, 3))
    write_contact_sheet({"up": up, "down": up[::-1]}, tmp_path / "sheet.png", columns=3)
    pixels = np.asarray(Image.open(tmp_path / "sheet.png"))
    row = pixels[:, 8 + 15]  # through the first column of frames
    column_colours = [pixels[y, [8 + 15, 8 + 38 + 15, 8 + 76 + 15], 0].tolist() for y in range(len(pixels))]
    assert [0, 128, 255] in column_colours and [255, 128, 0] in column_colours
    assert row.shape == (8 + 2 * (16 + 8 + 20 + 8), 3)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_black_frames_are_not_written_in_silence(bad, tmp_path):
    frames = np.zeros((5, 16, 16, 3), np.float32)
    frames[2, 3, 4] = bad
    with pytest.raises(ValueError, match="NaN or infinities"):
        write_video(frames, tmp_path / "video.mp4")
    with pytest.raises(ValueError, match=r"wanted \[T, H, W, 3\]"):
        write_video(frames[..., 0], tmp_path / "video.mp4")
