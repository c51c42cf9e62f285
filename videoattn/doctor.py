"""What works in this environment, and what does not. Nothing is guessed: versions are read, kernels are tried."""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import platform
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch
from packaging.requirements import Requirement

from videoattn import guard, measured
from videoattn.backend import Backend, backends
from videoattn.call import Call, Grid
from videoattn.kernels import reference
from videoattn.policy import Precision, Sparse
from videoattn.selection.arrangement import Tokens
from videoattn.selection.random import Random
from videoattn.testing import excess, make_qkv
from videoattn.verify import PLAIN, fault

State = Literal["ok", "note", "broken"]
_COLOUR = {"ok": "green", "note": "yellow", "broken": "red"}


@dataclass(frozen=True, kw_only=True)
class Check:
    """One fact; `why` says what is wrong, or what follows from it."""

    name: str
    found: str
    state: State = "ok"
    why: str = ""


def examine() -> list[Check]:
    """Every check, in the order in which they are shown."""
    return [
        *_python(),
        *_packages(),
        _hugging_face_kernels(),
        _video_encoder(),
        *_device(),
        *_measured_times(),
        *_attention(),
    ]


def show(checks: list[Check]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="videoattn doctor", title_justify="left")
    for column in ("", "what", "found", "why"):
        table.add_column(column, overflow="fold")
    for check in checks:
        table.add_row(f"[{_COLOUR[check.state]}]{check.state}", check.name, check.found, check.why)
    Console().print(table)


def _python() -> Iterator[Check]:
    yield Check(name="python", found=f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _packages() -> Iterator[Check]:
    """videoattn itself, then what pyproject.toml asks for, as the installed metadata says it."""
    try:
        requirements = importlib.metadata.requires("videoattn") or []
    except importlib.metadata.PackageNotFoundError:  # a checkout on PYTHONPATH, which may work all the same
        root = Path(__file__).parents[1]
        why = f"its requirements are not checked: pip install -e '{root}'"
        yield Check(name="videoattn", found="not installed", state="note", why=why)
        return
    yield Check(name="videoattn", found=importlib.metadata.version("videoattn"))
    for text in requirements:
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            found = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            yield Check(
                name=wanted.name, found="missing", state="broken", why=f"pip install '{wanted.name}{wanted.specifier}'"
            )
            continue
        fits = wanted.specifier.contains(found, prereleases=True)
        why = "" if fits else f"tested with {wanted.specifier}"
        yield Check(name=wanted.name, found=found, state="ok" if fits else "broken", why=why)


def _hugging_face_kernels() -> Check:
    """`import kernels` must find Hugging Face's package or nothing: a folder of that name on sys.path may hide it."""
    spec = importlib.util.find_spec("kernels")
    if spec is None or spec.origin is None:  # none, or a bare folder, which any installed package takes precedence over
        return Check(name="kernels (Hugging Face)", found="not installed", why="optional")
    try:
        distribution = importlib.metadata.distribution("kernels")
    except importlib.metadata.PackageNotFoundError:
        distribution = None
    if distribution is None or Path(distribution.locate_file("kernels/__init__.py")) != Path(spec.origin):
        return Check(
            name="kernels (Hugging Face)", found=spec.origin, state="broken", why="hides Hugging Face's package"
        )
    return Check(name="kernels (Hugging Face)", found=distribution.version)


def _video_encoder() -> Check:
    try:
        import imageio_ffmpeg

        return Check(name="ffmpeg", found=imageio_ffmpeg.get_ffmpeg_version())
    except (ImportError, RuntimeError, OSError) as error:
        return Check(name="ffmpeg", found="missing", state="broken", why=str(error))


def _device() -> Iterator[Check]:
    if not torch.cuda.is_available():
        why = "every preset computes exactly here, and no speed-up is to be expected"
        yield Check(name="GPU", found="none", state="note", why=why)
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, compute capability "
        found += f"{properties.major}.{properties.minor}"
        if torch.version.hip is None and properties.major < 8:  # 64 KiB of shared memory; Triton serves them no more
            why = "our kernels need compute capability 8.0: torch's attention runs, and every preset computes exactly"
            yield Check(name=f"GPU {index}", found=found, state="note", why=why)
            continue
        yield Check(name=f"GPU {index}", found=found)
    yield Check(name="driver", found=nvidia_driver() or "unknown: no nvidia-smi")
    if torch.version.hip:
        yield Check(
            name="ROCm", found=torch.version.hip, state="note", why="not tested: torch's own choice of SDPA runs"
        )
    else:
        cudnn = torch.backends.cudnn.version()
        yield Check(name="CUDA", found=f"{torch.version.cuda}, cuDNN {cudnn}")


def nvidia_driver() -> str | None:
    """The driver's version, None where nvidia-smi is missing or has none to tell."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        printed = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return next(iter(printed.splitlines()), None)  # a line for each card, all alike


def _measured_times() -> Iterator[Check]:
    """Which table of measured times picks the kernels, for each GPU."""
    for index in range(torch.cuda.device_count()):
        card, name = measured.card(torch.device("cuda", index)), f"measured times, GPU {index}"
        if card is None:
            continue
        evidence = measured.evidence(card)
        if evidence.note:
            yield Check(name=name, found="passed over", state="note", why=evidence.note)
        if not evidence.sources:
            yield Check(name=name, found="none", state="note", why="torch's own choice runs; try videoattn calibrate")
            continue
        source = evidence.sources[0]
        table, days = source.table, _days_since(source.table.date)
        found = f"{len(table.rows)} calls, {table.gpu}, torch {table.torch}, triton {table.triton}, {days} days old"
        if source.borrowed:
            why = f"of {source.borrowed}: kernels are taken where they gained {measured.BORROWED_GAIN}x there; "
            yield Check(name=name, found=found, state="note", why=f"{why}videoattn calibrate measures this card")
        else:
            yield Check(name=name, found=found, why=str(source.path))


def _days_since(date: str) -> int:
    then = datetime.datetime.strptime(date, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=datetime.timezone.utc)
    return (datetime.datetime.now(datetime.timezone.utc) - then).days


def _attention() -> Iterator[Check]:
    """Every attention backend against the fp64 oracle, on the first of two small calls that it takes; one that quantises
    may err as its emulation does."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    calls = [
        Call(
            kind=kind,
            layout="BNHD",
            batch=2,
            q_len=tokens,
            kv_len=tokens,
            heads=4,
            kv_heads=4,
            head_dim=64,
            dtype=dtype,
            device=device,
        )
        for kind, tokens in (("full", 256), ("temporal", 16))
    ]
    for backend in backends():
        decision = next((decision for decision in PLAIN if backend.computes(decision)), None)
        if decision is None:
            yield _lists(backend, calls[0])
            continue
        refusals = [backend.refuses(call, decision) for call in calls]
        if None not in refusals:
            yield Check(name=backend.name, found="refuses", state="note", why=refusals[0])
            continue
        call = calls[refusals.index(None)]
        q, k, v = make_qkv(call.batch, call.q_len, call.kv_len, call.heads, call.head_dim, dtype=dtype, device=device)
        try:
            out = backend.plan(call, decision, guard.flag())(q, k, v, None, None, None)
            wrong = excess(out, reference.attend(q, k, v)[0], PLAIN[decision](q, k, v))
        except RuntimeError as error:
            wrong = str(error)
        if wrong is not None:
            yield Check(name=backend.name, found="fails", state="broken", why=wrong)
            continue
        dtype_name = str(dtype).removeprefix("torch.")
        yield Check(name=backend.name, found=f"works: {call.q_len} tokens, {dtype_name} on {device}")


def _lists(backend: Backend, call: Call) -> Check:
    """A backend that leaves key blocks out, on random lists."""
    call = replace(call, tokens=Tokens(grid=Grid(frames=1, height=16, width=call.q_len // 16)))
    decisions = (Sparse(Random(density=0.5), precision) for precision in get_args(Precision))
    decision = next(decision for decision in decisions if backend.computes(decision))
    reason = backend.refuses(call, decision)
    if reason is not None:
        return Check(name=backend.name, found="refuses", state="note", why=reason)
    wrong = fault(backend, call, decision)
    if wrong is not None:
        return Check(name=backend.name, found="fails", state="broken", why=wrong)
    return Check(
        name=backend.name, found=f"works: lists of key blocks, {call.dtype} on {call.device}".replace("torch.", "")
    )
