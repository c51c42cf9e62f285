"""The examples and the README's own code run, on tiny pipelines in the place of downloaded ones."""

import functools
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import diffusers
import imageio.v3 as iio
import numpy as np
import pytest
import tiny_pipelines
import torch
from PIL import Image

import videoattn

ROOT = Path(__file__).parents[1]
README = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
SMALL = {"height": 48, "width": 64, "num_frames": 9, "num_inference_steps": 2}


@pytest.fixture
def no_downloads(monkeypatch, tmp_path):
    """`from_pretrained` gives tiny pipelines, `.to("cuda")` stays here, and generations are small."""
    made = []

    def pretend(cls, family):
        call = cls.__call__

        @functools.wraps(call)
        def small(pipe, **arguments):
            return call(pipe, **arguments | SMALL)

        def from_pretrained(*_, **__):
            made.append(tiny_pipelines.build(family))
            return made[-1]

        monkeypatch.setattr(cls, "__call__", small)
        monkeypatch.setattr(cls, "from_pretrained", from_pretrained)

    pretend(diffusers.WanPipeline, "wan")
    pretend(diffusers.AnimateDiffPipeline, "animatediff")
    for part in (diffusers.AutoencoderKLWan, diffusers.MotionAdapter, diffusers.DDIMScheduler):
        monkeypatch.setattr(part, "from_pretrained", lambda *_, **__: None)
    monkeypatch.setattr(diffusers.DiffusionPipeline, "to", lambda pipe, device: pipe)
    monkeypatch.chdir(tmp_path)
    return made


@pytest.mark.parametrize(("example", "written"), [("wan", "wan.mp4"), ("animatediff", "animatediff.gif")])
def test_example_on_a_real_model(example, written, no_downloads, capsys):
    runpy.run_path(str(ROOT / "examples" / f"{example}.py"))
    (pipe,) = no_downloads
    assert {site.adapter for site in videoattn.report(pipe).sites} == {example}
    assert sum(site.calls for site in videoattn.report(pipe).sites) > 0
    assert str(videoattn.report(pipe)) in capsys.readouterr().out
    assert len(iio.imread(written)) == SMALL["num_frames"]


@pytest.mark.parametrize("code", README, ids=[code.splitlines()[-1] for code in README])
def test_readme_code_runs(code, no_downloads, tmp_path):
    script = tmp_path / "readme.py"
    script.write_text(code)
    runpy.run_path(str(script), {"torch": torch, "videoattn": videoattn, "pipe": tiny_pipelines.build("wan")})


def test_demo_runs_the_small_model_as_it_was_judged():
    demo = runpy.run_path(str(ROOT / "examples" / "text_to_video.py"))
    settings, judged = demo["TINY_SETTINGS"], json.loads((ROOT / "examples/train_tiny/logs/demo.json").read_text())
    assert "{frames}x{height}x{width}".format(**settings) == judged["size"]
    assert (settings["steps"], settings["guidance"]) == (judged["steps"], judged["guidance"])
    assert (Path(demo["TINY"]) / "model_index.json").is_file()


PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/train_tiny/README.md", "benchmarks/README.md")


def test_tables_of_the_findings_are_those_of_the_results():
    check = [sys.executable, "docs/fill_tables.py", "--check"]
    assert subprocess.run(check, cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("page", [*PAGES, *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_links_lead_somewhere(page):
    page = ROOT / page
    links = re.findall(r"\]\(([^)]+)\)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link.partition("#")[0]).exists()]
    assert not missing


@pytest.mark.parametrize(("backend", "psnr"), [("auto", "identical"), ("sdpa_math", r"\d+\.\d dB")])
def test_demo_shows_both_runs_and_what_was_swapped(backend, psnr, monkeypatch, tmp_path, capsys):
    model = tmp_path / "model"
    tiny_pipelines.build("wan").save_pretrained(model)
    enable = functools.partial(videoattn.enable_fast_attention, backend=backend)
    monkeypatch.setattr(videoattn, "enable_fast_attention", enable)
    sizes = ("--steps", "2", "--height", "32", "--width", "64", "--frames", "9")
    arguments = ("--model", str(model), "--prompt", "a red cube", *sizes, "--preset", "exact", "--out", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["text_to_video.py", *arguments])
    monkeypatch.setenv("COLUMNS", "200")
    runpy.run_path(str(ROOT / "examples" / "text_to_video.py"), run_name="__main__")

    printed = capsys.readouterr().out
    for expected in ("seconds", "denoiser calls", "peak memory", "PSNR", "WanPipeline, policy exact"):
        assert expected in printed
    if not torch.cuda.is_available():
        assert re.search(psnr, printed) and "no speed-up is to be expected" in printed
        assert ("Noise floor" in printed) == (psnr != "identical")
    baseline, fast = (iio.imread(tmp_path / name) for name in ("baseline.mp4", "fast.mp4"))
    assert baseline.shape == fast.shape == (9, 32, 64, 3)
    assert np.asarray(Image.open(tmp_path / "contact_sheet.png")).std() > 0
