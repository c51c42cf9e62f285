"""The result of a comparison, before and after: frozen facts, and the few figures that follow from them.

"Base" is the pipeline without fast attention, "patched" the same pipeline with it. Both ran in one process with the same
seed and initial latents. The JSON form is that of profile.py; what has no finite value (the PSNR of identical frames) is
None there, since JSON knows no infinity.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from videoattn.profiling import summary
from videoattn.profiling.profile import Profile, plain
from videoattn.quality import VideoDifference

SCHEMA = "videoattn.comparison/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Wall times of whole generations without any instrument, in ms.

    Args:
        base_ms, patched_ms: two of each a round, in the order in which they ran.
        ratio: median over the rounds of base time / patched time, above 1 is faster.
        ci_lo, ci_hi: its 95 % bootstrap interval.
        noise: how far from 1 the interval of the control reaches: the first half of each round against its second half,
            in which the same two things ran.
        verdict: "faster" or "slower" where the whole interval is beyond that noise, else "not shown"; never of fewer than
            three rounds.
        first_base_ms, first_patched_ms: of the first generation, which compiles and plans and is in no other figure.
        planning_ms: of it, the choice, check and compilation of our kernels.
    """

    base_ms: tuple[float, ...]
    patched_ms: tuple[float, ...]
    ratio: float
    ci_lo: float
    ci_hi: float
    noise: float
    verdict: str
    first_base_ms: float
    first_patched_ms: float
    planning_ms: float

    @property
    def rounds(self) -> int:
        return len(self.base_ms) // 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """One video against the base run's, on raw frames; the measures are those of `quality.VideoDifference`.

    Args:
        identical: every value is equal.
        psnr, psnr_mean, psnr_worst, flicker_psnr: dB; None where nothing differs.
        psnr_frames: dB of each frame, None where it is identical.
        worst_frame: its index.
        ssim, ssim_worst: mean over the frames, and the least.
        motion: energy of the differences between frames over the base run's; None where that stands still.
    """

    identical: bool
    psnr: float | None
    psnr_mean: float | None
    psnr_frames: tuple[float | None, ...]
    worst_frame: int
    psnr_worst: float | None
    ssim: float
    ssim_worst: float
    flicker_psnr: float | None
    motion: float | None

    @classmethod
    def of(cls, difference: VideoDifference) -> Quality:
        values = {f.name: getattr(difference, f.name) for f in fields(cls)}
        finite = {name: _finite(value) for name, value in values.items()}
        return cls(**finite | {"psnr_frames": tuple(_finite(value) for value in difference.psnr_frames)})

    def __str__(self) -> str:
        if self.identical:
            return "identical"
        motion = "" if self.motion is None else f", motion x{self.motion:.3f}"
        return (
            f"PSNR {decibel(self.psnr)} (worst {decibel(self.psnr_worst)} at frame {self.worst_frame}), "
            f"SSIM {self.ssim:.4f} (worst {self.ssim_worst:.4f}), flicker {decibel(self.flicker_psnr)}{motion}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """The base sampler with as many network calls as the patched run makes: what that many calls give by themselves.

    Args:
        why: what the control is, or why there is none.
        steps: scheduler steps of the control; None where the base run itself is the control, or where there is none.
        calls: network calls in it.
        ms: wall times; () where the base run itself is the control.
        quality: against the base run at its full number of steps.
    """

    why: str
    steps: int | None = None
    calls: float = 0
    ms: tuple[float, ...] = ()
    quality: Quality | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One frame of both videos as small PNGs, base64: base, patched, and |difference| x 8 from black over red to white."""

    index: int
    base: str
    patched: str
    difference: str


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One generation before and after.

    Args:
        title: what ran, in one line.
        policy: of the patched runs.
        base, patched: one profile of each; their `clean_ms` are the times of `timing`.
        timing: wall times and what they show.
        base_calls, patched_calls: how often the whole network of the denoisers ran in a generation; a call in which a
            cache skipped half of the layers is half a call.
        quality: the patched video against the base video.
        floor: two exact kernels of torch against each other on this generation: less than that says nothing.
        latents: relative L2 of the latents after each step, patched against base; () where the pipeline does not tell.
        lpips: None where it was not computed; `lpips_why` says why.
        control: the base sampler with as many network calls.
        pairs: a few frames spread over the video.
        notes: what a reader must know.
    """

    title: str
    policy: str
    base: Profile
    patched: Profile
    timing: Timing
    base_calls: float
    patched_calls: float
    quality: Quality
    floor: Quality | None
    latents: tuple[float, ...]
    lpips: float | None
    lpips_why: str
    control: Control
    pairs: tuple[Pair, ...]
    notes: tuple[str, ...]
    schema: str = SCHEMA

    def to_json(self) -> str:
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        stored = {name: json.loads(v.to_json()) if isinstance(v, Profile) else plain(v) for name, v in parts.items()}
        return json.dumps(stored, separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Comparison:
        """Raises ValueError where the text is no comparison of this schema."""
        try:
            read = json.loads(text)
            if read.get("schema") != SCHEMA:
                raise ValueError(f"schema: wanted {SCHEMA}, got {read.get('schema')!r}")
            control = read["control"]
            return cls(
                **read
                | {
                    "base": Profile.from_json(json.dumps(read["base"])),
                    "patched": Profile.from_json(json.dumps(read["patched"])),
                    "timing": Timing(**_tuples(read["timing"])),
                    "quality": _quality(read["quality"]),
                    "floor": _quality(read["floor"]),
                    "latents": tuple(read["latents"]),
                    "control": Control(**_tuples(control) | {"quality": _quality(control["quality"])}),
                    "pairs": tuple(Pair(**pair) for pair in read["pairs"]),
                    "notes": tuple(read["notes"]),
                }
            )
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"wanted the JSON of a comparison ({SCHEMA}), got {error}") from error

    @classmethod
    def read(cls, path: Path) -> Comparison:
        return cls.from_json(path.read_text())

    def save(self, folder: Path | str) -> None:
        """Write report.html, report.json, report.md and both traces into a folder, which is made if need be."""
        from videoattn.profiling.folder import write

        write(self, Path(folder))

    def __str__(self) -> str:
        from videoattn.profiling import text

        return text.comparison(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """A category before and after, in ms of one generation."""

    name: str
    base_ms: float
    patched_ms: float

    @property
    def speedup(self) -> float | None:
        """Base time / patched time; None where a category is in one of them only."""
        return self.base_ms / self.patched_ms if self.base_ms and self.patched_ms else None


def categories(comparison: Comparison) -> list[Delta]:
    """Time by category in both, the greatest first. Scaled, so that each side sums to its median wall time."""
    base, patched = _scaled(comparison.base), _scaled(comparison.patched)
    deltas = [
        Delta(name=name, base_ms=base.get(name, 0.0), patched_ms=patched.get(name, 0.0))
        for name in dict.fromkeys((*base, *patched))
    ]
    return sorted(deltas, key=lambda delta: -max(delta.base_ms, delta.patched_ms))


def medians(timing: Timing) -> tuple[float, float]:
    """Median wall times in ms, base and patched."""
    return statistics.median(timing.base_ms), statistics.median(timing.patched_ms)


def is_shown(timing: Timing) -> bool:
    """Whether a difference in wall time was shown; without one, factors of its parts mean nothing either."""
    return timing.verdict in ("faster", "slower")


def verdict(comparison: Comparison) -> str:
    """What was shown, in a sentence: speed, its interval, and the difference of the videos."""
    timing = comparison.timing
    base, patched = medians(timing)
    interval = f"[{timing.ci_lo:.2f}, {timing.ci_hi:.2f}]"
    if is_shown(timing):
        shown = f"{timing.verdict}, {timing.ratio:.2f}x {interval}"
    else:  # a ratio in front would be read as one
        shown = f"no difference in time shown, the ratio lies in {interval}"
    speed = f"{comparison.policy}: {shown}, {base / 1e3:.3g} s -> {patched / 1e3:.3g} s"
    floor = ""
    if comparison.floor is not None and not comparison.quality.identical:
        apart = "identical here" if comparison.floor.identical else f"{decibel(comparison.floor.psnr)} apart"
        floor = f"; two exact kernels are {apart}"
    return f"{speed}. Video: {comparison.quality}{floor}."


def decibel(value: float | None) -> str:
    return "identical" if value is None else f"{value:.2f} dB"


def _scaled(profile: Profile) -> dict[str, float]:
    total = summary.total_ms(profile)
    scale = summary.clean_ms(profile) / total if total else 1.0
    return {share.name: share.ms * scale for share in summary.categories(profile)}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _tuples(read: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in read.items()}


def _quality(read: Mapping[str, Any] | None) -> Quality | None:
    return read and Quality(**_tuples(read))
