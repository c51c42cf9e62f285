"""Only videoattn.* is installed, from a checkout as from a wheel, and Hugging Face's `kernels` is never hidden."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAPPED = ("kernels", "pipelines", "benchmarks")  # folders of the checkout that ship as videoattn.<folder>


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run(
        [*map(str, command)], check=False, cwd=cwd, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"
    return done.stdout


def shipped_files(tree: Path) -> set[str]:
    """What a wheel must hold: every module, and the data beside it, under its name inside videoattn."""
    paths = [path.relative_to(tree) for folder in ("videoattn", *MAPPED) for path in (tree / folder).rglob("*")]
    kept = [path for path in paths if path.suffix in {".py", ".toml", ".json", ".typed", ".html", ".css", ".js"}]
    kept = [path for path in kept if path.parts[:2] != ("benchmarks", "results")]  # figures, not data of the package
    return {path.as_posix() if path.parts[0] == "videoattn" else f"videoattn/{path.as_posix()}" for path in kept}


@dataclass(frozen=True, kw_only=True)
class Built:
    sdist: Path
    wheel: Path  # built from that sdist
    shipped: set[str]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Built:
    """Made offline, from a copy of the tree."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("videoattn", *MAPPED):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", tree / "dist", cwd=tree)
    (sdist,), (wheel,) = (tree / "dist").glob("*.tar.gz"), (tree / "dist").glob("*.whl")
    return Built(sdist=sdist, wheel=wheel, shipped=shipped_files(tree))


def empty_venv(folder: Path) -> Path:
    """The Python of a new environment that holds nothing of ours; third-party packages come from this environment."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    here = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    purelib = sysconfig.get_path("purelib", "venv", vars={"base": str(folder), "platbase": str(folder)})
    # .pth files of a folder that was itself added by a .pth are not read: an editable videoattn stays invisible.
    Path(purelib, "third_party.pth").write_text("\n".join(sorted(here)))
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    missing = "import importlib.util as u; print(u.find_spec('videoattn'), u.find_spec('torch') is not None)"
    assert run(python, "-c", missing, cwd=folder).split() == ["None", "True"]
    return python


@pytest.mark.parametrize("folder", [*MAPPED, "tests"])
def test_no_init_in_folders_that_would_shadow_other_packages(folder):
    assert not list((ROOT / folder).rglob("__init__.py"))


def test_hugging_face_kernels_is_not_shadowed_in_the_checkout():
    script = """
import diffusers, json, kernels, transformers
from kernels import get_kernel
import videoattn, videoattn.kernels.reference as ours
print(json.dumps([kernels.__file__, ours.__file__]))
"""
    theirs, ours = json.loads(run(sys.executable, "-c", script, cwd=ROOT))
    assert Path(sysconfig.get_path("purelib")) in Path(theirs).parents
    assert Path(ours) == ROOT / "kernels" / "reference.py"


def test_without_hugging_face_kernels_the_checkout_does_not_pretend_to_be_it():
    script = """
import importlib.util, sys
sys.path = [entry for entry in sys.path if not entry.endswith("site-packages")]
spec = importlib.util.find_spec("kernels")
print(spec is None or spec.origin is None)
"""
    assert run(sys.executable, "-c", script, cwd=ROOT).strip() == "True"


@pytest.mark.parametrize("cwd", [ROOT, Path(sys.base_prefix)], ids=["in the checkout", "elsewhere"])
def test_import_is_light(cwd):
    """Neither triton nor diffusers is imported, nor needed, by `import videoattn`."""
    script = """
import sys
sys.modules["triton"] = sys.modules["diffusers"] = None  # importing either now raises ImportError
import videoattn
print(sorted(name for name in sys.modules if name.split(".")[0] == "transformers"))
"""
    assert run(sys.executable, "-c", script, cwd=cwd).strip() == "[]"


def test_wheel_holds_exactly_our_modules(built):
    names = zipfile.ZipFile(built.wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"videoattn", built.wheel.name.split("-py3")[0] + ".dist-info"}
    assert {name for name in names if name.startswith("videoattn/")} == built.shipped


def install(package: Path, folder: Path) -> Path:
    """The Python of a new environment in which the package was installed without a network."""
    python = empty_venv(folder)
    options = ("--quiet", "--no-deps", "--no-index", "--no-build-isolation")
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, package, cwd=folder)
    return python


def test_wheel_runs_in_an_empty_environment(built, tmp_path):
    python = install(built.wheel, tmp_path / "venv")
    modules = [name.removesuffix(".py").removesuffix("/__init__") for name in built.shipped if name.endswith(".py")]
    script = f"""
import importlib, videoattn
from importlib.metadata import entry_points
for name in {sorted(modules)!r}:
    importlib.import_module(name.replace("/", "."))
print(videoattn.__file__)
(command,) = entry_points(group="console_scripts", name="videoattn")
command.load()(["--help"])
"""
    first, *rest = run(python, "-c", script, cwd=tmp_path).splitlines()
    assert Path(first).is_relative_to(tmp_path / "venv")
    assert "generate" in " ".join(rest)
    assert (python.parent / "videoattn").is_file()


def test_sdist_installs_what_the_wheel_does(built, tmp_path):
    install(built.sdist, tmp_path / "venv")
    (package,) = (tmp_path / "venv").rglob("site-packages/videoattn")
    files = {path.relative_to(package.parent).as_posix() for path in package.rglob("*") if path.is_file()}
    assert {name for name in files if "__pycache__" not in name} == built.shipped


def test_sdist_holds_what_the_wheel_needs(built):
    with tarfile.open(built.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE"} <= names
