"""The one line and its undoing; the only place that changes somebody else's object."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from videoattn import reports, warming
from videoattn.pipelines.registry import MODELS, adapter_for
from videoattn.policy import Policy
from videoattn.reports import Report
from videoattn.session import Session, session_of

if TYPE_CHECKING:
    from videoattn.caches.session import Rehash
    from videoattn.caches.settings import Keys, Mode, Point
    from videoattn.caches.timetable import Coordinate
    from videoattn.profiling.profile import Profile
    from videoattn.slicing.session import Slicing

Pipe = TypeVar("Pipe")

_DENOISERS = ("transformer", "transformer_2", "unet")


def enable_fast_attention(pipe: Pipe, policy: Policy | str = "balanced", *, backend: str = "auto") -> Pipe:
    """Run the attention of a diffusers video pipeline on the best kernels here. In place; calling again replaces.

    Args:
        pipe: a DiffusionPipeline, a ModularPipeline, or a bare denoiser.
        policy: "exact" (same mathematics, other rounding), "balanced" (quantised where that is faster), "fast" (also
            leaves key blocks out), or a Policy.
        backend: "auto", or the name of one backend, which then never falls back to another.

    Returns:
        `pipe` itself.

    Raises:
        TypeError: `pipe` or `policy` is of no kind that is known.
        ValueError: an unknown preset or backend, a backend that refuses, or no denoiser with video attention. Nothing
            has been changed then.
    """
    policy = Policy.of(policy)
    denoisers = _denoisers(pipe)
    made = [
        (model, Session(model, _adapter(model), policy, backend, pipe=None if pipe is model else pipe))
        for model in denoisers
    ]
    for model, session in made:
        previous = session_of(model)
        if previous is not None:
            previous.detach()
        session.attach(model)
    return pipe


def disable_fast_attention(pipe: Pipe) -> Pipe:
    """Put back the very processors that were there; nothing happens where attention is not enabled. Returns `pipe`."""
    for model in _denoisers(pipe):
        session = session_of(model)
        if session is not None:
            session.detach()
    return pipe


def enable_feature_slicing(
    pipe: Pipe,
    *,
    memory: int | str | None = None,
    slices: int | None = None,
    vae: bool = True,
    vae_frames: int | None = None,
    vae_tiling: bool = False,
) -> Pipe:
    """Run a pipeline's denoisers, and its VAE's decoder, slice by slice: the same videos in less memory. In place; calling
    again replaces.

    Args:
        pipe: a DiffusionPipeline, a ModularPipeline, or a bare denoiser.
        memory: what lies on the device at most, weights included: bytes, or "11GiB", "11 GB". The fewest slices that keep it
            are chosen for each size of video, before its first step.
        slices: instead: into how many slices every group of operators is cut.
        vae: whether the decoder is sliced too.
        vae_frames: how many frames a decoder that takes the whole video at once is given at a time, as by the pipeline's
            `decode_chunk_size`. This changes the videos of a decoder that mixes frames (Stable Video Diffusion), and
        vae_tiling: whether the decoder works in tiles, by its own switch, until disabled, does so too; nothing else here does.

    Returns:
        `pipe` itself.

    Raises:
        TypeError, ValueError: neither or both of `memory` and `slices`, or no such number; nothing that can be sliced.
            Nothing has been changed then. When a generation of a size begins, a budget that it cannot keep raises OverBudget, a
            ValueError, and so does a model whose memory cannot be foretold.
    """
    from videoattn.slicing import budget, decoder_switches, decoding
    from videoattn.slicing.session import Slicing, slicing_of

    if (memory is None) == (slices is None):
        raise ValueError(f"slicing: wanted one of memory and slices, got {memory!r} and {slices!r}")
    if slices is not None and (isinstance(slices, bool) or not isinstance(slices, int)):
        raise TypeError(f"slices: wanted an int, got {type(slices).__name__}")
    if slices is not None and slices < 1:
        raise ValueError(f"slices: wanted 1 or more, got {slices}")
    options = {"slices": slices, "budget": None if memory is None else budget.parse(memory)}
    found = list(_sliced_models(pipe, vae=vae))
    if vae_frames is not None and (isinstance(vae_frames, bool) or not isinstance(vae_frames, int) or vae_frames < 1):
        raise ValueError(f"vae_frames: wanted an int of 1 or more, got {vae_frames!r}")
    if vae_frames is not None and not any(type(model).__name__ in decoder_switches.OF_FRAMES for model, _ in found):
        raise ValueError(f"vae_frames: wanted a pipeline whose VAE takes frames as rows of a batch, got {_name(pipe)}")
    if vae_tiling and not any(entry == "decode" and hasattr(model, "use_tiling") for model, entry in found):
        raise ValueError(f"vae_tiling: wanted a pipeline with a VAE that decodes in tiles, got {_name(pipe)}")
    lossy = {"tiling": vae_tiling, "frames": vae_frames}
    made = [Slicing(model, entry, **options, **(lossy if entry == "decode" else {})) for model, entry in found]
    for slicing in made:
        previous = slicing_of(slicing.model)
        if previous is not None:
            previous.detach()
        slicing.attach()
    decoding.check_ahead(made)
    return pipe


def disable_feature_slicing(pipe: Pipe) -> Pipe:
    """Put back the very forwards that were there; nothing happens where slicing is not enabled. Returns `pipe`."""
    for slicing in _slicings(pipe):
        slicing.detach()
    return pipe


def enable_step_rehash(
    pipe: Pipe,
    *,
    steps: int | Sequence[int] | None = None,
    similarity: float | None = None,
    threshold: float | None = None,
    mode: Mode | None = None,
    keys: Keys | None = None,
    point: Point = "output",
    coordinate: Coordinate | None = None,
    calibration: Path | str | None = None,
) -> Pipe:
    """Let some of a sampler's steps run the network, and the others reuse what those gave. In place; calling again replaces.
    This changes the videos (docs/rehash.md).

    Args:
        pipe: a DiffusionPipeline or ModularPipeline.
        steps: so many of the sampler's steps run; or which, indices from 0.
        similarity: instead: a step runs where its output is less alike to that of the last step that ran (cosine).
        threshold: instead, with point "first_block": a step runs where the first block's output has changed more, relatively.
        mode: what a step that does not run gives. "hold": the last output; "extrapolate", "extrapolate2": a line or a parabola
            through the last ones; "fit": the weights of the last two that were best in a calibration; "correct": "fit", and the
            next step that runs makes up for what was guessed wrong. Default: "correct"; "fit" at another point;
            "extrapolate" with threshold; and with a multistep sampler always "hold".
        keys: which steps run, "similarity" by the search of Zhan et al. (NeurIPS 2024); those with which a calibration's "error"
            is the least; or "uniform".
        point: what is reused: the network's "output"; of UNets what the last up block is given, "late_block"; of transformers
            what all blocks behind the first one add, "first_block".
        coordinate: over which modes extrapolate: "sigma", "log_snr", "timestep"; by the scheduler where None.
        calibration: a TOML file of how alike steps are, read and added to. Where nothing is known of a model, a scheduler and
            its steps, the first generation runs them all to find out. Keys "uniform" with a mode that extrapolates need none.

    Returns:
        `pipe` itself.

    Raises:
        TypeError: `pipe` is of no kind that is known.
        ValueError: settings that exclude each other, a bare denoiser, or one that cannot be served. Nothing has been changed
            then. A generation that cannot be served runs every step, and `report` says why.
    """
    from videoattn.caches.session import Rehash, rehash_of
    from videoattn.caches.settings import Settings

    models = _denoisers(pipe)
    if isinstance(pipe, nn.Module) or not hasattr(pipe, "scheduler"):
        raise ValueError(f"step rehash: wanted a pipeline, whose scheduler tells the steps, got {_name(pipe)}")
    settings = Settings(
        steps=tuple(steps) if isinstance(steps, Sequence) and not isinstance(steps, str) else steps,
        similarity=similarity,
        threshold=threshold,
        mode=mode,
        keys=keys,
        point=point,
        coordinate=coordinate,
        calibration=None if calibration is None else Path(calibration),
    )
    made = [(model, Rehash(model, settings, pipe)) for model in models]
    for model, rehash in made:
        rehash.siblings = [each for _, each in made]
        previous = rehash_of(model)
        if previous is not None:
            previous.detach()
        rehash.attach(model)
    return pipe


def disable_step_rehash(pipe: Pipe) -> Pipe:
    """Have every step run the network again; nothing happens where rehash is not enabled. Returns `pipe`."""
    for rehash in _rehashes(pipe):
        rehash.detach()
    return pipe


def disable(pipe: Pipe) -> Pipe:
    """Undo everything that videoattn has enabled on a pipeline, last first. Returns `pipe`."""
    return disable_fast_attention(disable_feature_slicing(disable_step_rehash(pipe)))


@contextlib.contextmanager
def fast_attention(
    pipe: object, policy: Policy | str = "balanced", *, backend: str = "auto"
) -> Iterator[tuple[Session, ...]]:
    """`enable_fast_attention` for the length of a with block; what was set before comes back at its end.

    Yields the sessions, one for each denoiser.
    """
    models = _denoisers(pipe)
    before = [session_of(model) for model in models]
    enable_fast_attention(pipe, policy, backend=backend)
    try:
        yield tuple(session_of(model) for model in models)
    finally:
        for model, session in zip(models, before, strict=True):
            disable_fast_attention(model)
            if session is not None:
                session.attach(model)


def report(pipe: object) -> Report:
    """What was swapped or cut, what runs there and why; `str()` of it is a table. Waits for what runs.

    Raises:
        ValueError: nothing is enabled on `pipe`.
    """
    slicings, rehashes = _slicings(pipe), _rehashes(pipe)
    sessions = [] if (slicings or rehashes) and not _enabled(pipe) else _sessions(pipe, "report")
    for session in sessions:
        session.look(session.clock.generation, wait=True)
    title = f"{_name(pipe)}, policy {sessions[0].policy.name}" if sessions else _name(pipe)
    return reports.build(title, sessions, slicings, rehashes)


def warmup(
    pipe: object,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    prompt: str | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> float:
    """Make the plans and compile the kernels of a size ahead of its first generation; returns the seconds it took.

    The pipeline itself begins a generation, which stops once every denoiser was called and is thrown away: a step or
    two. The report counts it. The next generation gives the same bits as without.

    Args:
        pipe: a DiffusionPipeline with fast attention enabled.
        height, width, num_frames: of the videos to come; the pipeline's own defaults where None.
        prompt: "" where None; its length matters to pipelines that do not pad it.
        arguments: whatever else the pipeline's call takes and those videos will have: {"image": ...}.

    Raises:
        TypeError: `pipe` is no pipeline.
        ValueError: attention is not enabled, or the pipeline takes no argument of a name.
    """
    if isinstance(pipe, nn.Module) or not hasattr(pipe, "scheduler"):
        raise TypeError(
            f"warmup: wanted a diffusers pipeline, got {_name(pipe)}; a bare denoiser is warm after one call"
        )
    named = {"height": height, "width": width, "num_frames": num_frames, "prompt": prompt}
    given = {name: value for name, value in named.items() if value is not None}
    return warming.warm_up(pipe, _sessions(pipe, "warmup"), {**given, **(arguments or {})})


def profile(pipe: object, *, out: Path | str | None = None, progress: bool = True, **arguments: Any) -> Profile:
    """Where the time, the bytes and the memory of a generation go, operator by operator.

    The pipeline runs five times with the same arguments and seed, patched or not, as it is; two to four steps tell as
    much as fifty. Nothing is left on it.

    Args:
        pipe: a DiffusionPipeline or ModularPipeline.
        out: folder for report.html, report.json, report.md and trace.json.gz; none is written where None.
        progress: whether to show the passes on a terminal.
        arguments: of the pipeline's call: prompt="...", num_inference_steps=2.

    Returns:
        The profile; `str()` of it is a table, `profile.save(folder)` writes the other forms.

    Raises:
        TypeError: `pipe` is no pipeline.
        ValueError: it has no denoiser, or does not take an argument; or `out` cannot be written. Nothing has run then.
        ProfileAborted: the generation raised; its `profile` is the report up to there, also written to `out`.
    """
    from videoattn.profiling import folder, recorder, shown

    if out is not None:
        folder.require_writable(Path(out))
    with shown.passes(recorder.PASSES, enabled=progress) as told:
        try:
            made = recorder.record(pipe, arguments, progress=told)
        except recorder.ProfileAborted as aborted:
            if out is not None:
                folder.write(aborted.profile, Path(out))
            raise
    if out is not None:
        folder.write(made, Path(out))
    return made


def _enabled(pipe: object) -> list[Session]:
    return [session for model in _denoisers(pipe) if (session := session_of(model)) is not None]


def _sessions(pipe: object, asked: str) -> list[Session]:
    """The sessions of a pipeline's denoisers. ValueError, which names what was asked, where there are none."""
    sessions = _enabled(pipe)
    if not sessions:
        raise ValueError(f"{asked}: wanted a pipeline with fast attention enabled, got an untouched {_name(pipe)}")
    return sessions


def _denoisers(pipe: object) -> list[nn.Module]:
    """The denoisers of a pipeline, or the bare denoiser itself."""
    if isinstance(pipe, nn.Module):
        return [_unwrapped(pipe)]
    found = [getattr(pipe, name, None) for name in _DENOISERS]
    models = [_unwrapped(model) for model in found if isinstance(model, nn.Module)]
    if not models:
        raise TypeError(
            f"pipe: wanted a diffusers pipeline with one of {', '.join(_DENOISERS)}, or a denoiser, got {_name(pipe)}"
        )
    return models


def _sliced_models(pipe: object, *, vae: bool = True) -> Iterator[tuple[nn.Module, str]]:
    """(model, what the pipeline calls of it) of what can be sliced; a VAE of a class that is not known stays as it is."""
    from videoattn.slicing.session import sliceable

    for model in _denoisers(pipe):
        yield model, "forward"
    autoencoder = None if isinstance(pipe, nn.Module) or not vae else getattr(pipe, "vae", None)
    if isinstance(autoencoder, nn.Module) and any(sliceable(autoencoder, [])):
        yield autoencoder, "decode"


def _slicings(pipe: object) -> list[Slicing]:
    from videoattn.slicing.session import slicing_of

    found = [slicing_of(model) for model, _ in _sliced_models(pipe)]
    return [slicing for slicing in found if slicing is not None]


def _rehashes(pipe: object) -> list[Rehash]:
    from videoattn.caches.session import rehash_of

    return [rehash for model in _denoisers(pipe) if (rehash := rehash_of(model)) is not None]


def _unwrapped(model: nn.Module) -> nn.Module:
    """The module inside a torch.compile wrapper."""
    return getattr(model, "_orig_mod", model)


def _adapter(model: nn.Module):
    adapter = adapter_for(model)
    if adapter is None:
        raise ValueError(
            f"denoiser: wanted a video denoiser of diffusers (of our own adapters: {', '.join(sorted(MODELS))}; "
            f"others the generic way), got {type(model).__name__}"
        )
    return adapter


def _name(pipe: object) -> str:
    return type(pipe).__name__
