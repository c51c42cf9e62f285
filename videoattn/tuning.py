"""`videoattn tune`: what each precision errs in each layer of a model, and the fastest that keeps a target.

SageAttention takes its faster kernel in a layer where that is as accurate as the finer one (Zhang et al.,
arXiv:2410.02367, section 4.5), SageAttention 2 tells layers and timesteps apart (arXiv:2411.10958). So here: the model
generates in exact attention, and in some steps of each part of the schedule every self-attention call is computed once
more in each precision, on a sample of its queries and all of its keys, by plain torch that errs as the kernels do
(kernels/quantised_reference.py). The worst over prompts, guidance branches and steps counts.

Shape letters: B batch, N tokens, H heads, D head dimension.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import videoattn
from videoattn import runner
from videoattn.call import Step
from videoattn.kernels import quantised_reference, reference
from videoattn.policy import Policy, Precision, Tuned
from videoattn.runner import Plan
from videoattn.session import Session
from videoattn.testing import plain_attention

if TYPE_CHECKING:
    from videoattn.window_tuning import WindowTuning

OFFERED: tuple[Precision, ...] = ("int8_qk_fp8_pv", "int8_qk_16bit_pv", "exact")  # the fastest first
STUDIED = "int4_qk_fp8_pv"  # shown beside them, not offered: no card's Triton multiplies INT4
BLOCK = 128  # queries that lie side by side in a sample: INT4 smooths them together
BLOCKS = 2
METRICS = ("cosine", "rel_l1", "rel_l2")


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a layer's output must keep: "cosine=0.998" at least, "rel_l1=0.05" or "rel_l2=0.05" at most."""

    metric: str
    value: float

    @classmethod
    def parse(cls, text: str) -> Target:
        metric, _, value = text.partition("=")
        if metric not in METRICS or not is_share(value):
            raise ValueError(f"target: wanted one of {', '.join(METRICS)}, =, and a number in 0..1, got {text!r}")
        return cls(metric=metric, value=float(value))

    def kept_by(self, error: Error) -> bool:
        got = getattr(error, self.metric)
        return got >= self.value if self.metric == "cosine" else got <= self.value

    def __str__(self) -> str:
        return f"{self.metric}={self.value:g}"


@dataclass(frozen=True, kw_only=True)
class Error:
    """An attention output against exact attention, all elements together; see SageAttention, section 5.1."""

    cosine: float
    rel_l1: float
    rel_l2: float

    @classmethod
    def of(cls, out: Tensor, exact: Tensor) -> Error:
        a, b = out.double().flatten(), exact.flatten()
        return cls(
            cosine=float(torch.cosine_similarity(a, b, dim=0)),
            rel_l1=float((a - b).abs().sum() / b.abs().sum()),
            rel_l2=float((a - b).norm() / b.norm()),
        )

    def worse(self, other: Error) -> Error:
        """The worse of the two in each metric; NaN, which keeps no target, is the worst."""
        return Error(
            cosine=_worst(min, self.cosine, other.cosine),
            rel_l1=_worst(max, self.rel_l1, other.rel_l1),
            rel_l2=_worst(max, self.rel_l2, other.rel_l2),
        )


Errors = dict[str, Error]
"""Precision -> its error."""


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What was found out of a model.

    Args:
        model: the denoiser's class, target, prompts, steps: how it was tuned.
        errors: (site, part of the schedule) -> the worst error of each precision, "exact" and the studied one included.
    """

    model: str
    target: Target
    prompts: int
    steps: int
    ranges: int
    errors: dict[tuple[str, int], Errors]

    @property
    def sites(self) -> list[str]:
        return list(dict.fromkeys(site for site, _ in self.errors))

    def chosen(self, site: str, part: int) -> Precision:
        """The fastest precision that keeps the target there; exact where none does, or where nothing was seen."""
        errors = self.errors.get((site, part), {})
        return next((each for each in OFFERED if each in errors and self.target.kept_by(errors[each])), "exact")

    def policy(self, name: str = "tuned") -> Policy:
        sites = tuple((site, tuple(self.chosen(site, part) for part in range(self.ranges))) for site in self.sites)
        return Policy(name=name, tuned=Tuned(sites=sites))

    def toml(self) -> str:
        """What `Policy.load` reads, and the errors behind it."""
        lines = [
            f"# videoattn tune: {self.model}, {self.target}, {self.prompts} prompts of {self.steps} steps",
            "# A precision for each of equally many steps. Sites that are not named stay exact.",
            "[sites]",
        ]
        for site, precisions in self.policy().tuned.sites:
            lines.append(f'"{site}" = [{", ".join(f"{each!r}" for each in precisions)}]')
        for (site, part), errors in self.errors.items():
            lines += ["", "[[errors]]", f'site = "{site}"', f"part = {part}"]
            for precision, error in errors.items():
                values = ", ".join(f"{metric} = {getattr(error, metric):.6g}" for metric in METRICS)
                lines.append(f"{precision} = {{ {values} }}")
        return "\n".join(lines).replace("'", '"') + "\n"

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        shown = (STUDIED, *OFFERED)
        table = Table(title=f"{self.model}: worst {self.target.metric} by precision, wanted {self.target}")
        table.title_justify = "left"
        for column in ("layer", "steps", *shown, "chosen"):
            table.add_column(column, justify="left" if column in ("layer", "chosen") else "right")
        for (site, part), errors in self.errors.items():
            first, last = (-(-each * self.steps // self.ranges) for each in (part, part + 1))
            values = (f"{getattr(errors[each], self.target.metric):.5f}" if each in errors else "" for each in shown)
            table.add_row(site, f"{first}-{last - 1}", *values, self.chosen(site, part))
        console = Console(width=160, force_terminal=False, highlight=False, markup=False, emoji=False)
        with console.capture() as capture:
            console.print(table)
            kept = [self.chosen(*key) for key in self.errors]
            console.print(
                ", ".join(f"{each}: {kept.count(each)} of {len(kept)}" for each in OFFERED)
                + f". {STUDIED} is shown for comparison and not offered: no card's Triton multiplies INT4."
            )
        return capture.get()


def tune(
    pipe: object,
    calls: Iterable[Callable[[], object]],
    *,
    target: Target,
    ranges: int = 3,
    samples: int = 2,
    progress: Callable[[], None] = lambda: None,
) -> Tuning:
    """Generate in exact attention and look at every self-attention call of some steps.

    Args:
        pipe: a pipeline; what is enabled on it is put back afterwards.
        calls: each runs it once, on a prompt of its own.
        target: what a layer must keep.
        ranges: parts of the schedule that are told apart, samples: steps of each that are looked at.
        progress: told after each generation.

    Raises:
        ValueError: fewer than one range or sample, or no self-attention was seen.
    """
    if ranges < 1 or samples < 1:
        raise ValueError(f"tune: wanted at least one range and one sample, got {ranges} and {samples}")
    meter = _Meter(ranges=ranges, samples=samples)
    seen = observe(pipe, calls, meter.see, progress)
    if not meter.errors:
        raise ValueError("tune: wanted self-attention without a mask, got none in these generations")
    order = sorted(meter.errors, key=lambda key: (seen.order[key[0]], key[1]))
    return Tuning(
        model=seen.model,
        target=target,
        prompts=seen.prompts,
        steps=meter.steps,
        ranges=ranges,
        errors={key: meter.errors[key] for key in order},
    )


@dataclass(kw_only=True)
class _Meter:
    """What calls err in each precision."""

    ranges: int
    samples: int
    errors: dict[tuple[str, int], Errors] = field(default_factory=dict)
    steps: int = 0

    def see(self, site: str, step: Step, q, k, v, kv_len, scale) -> None:
        self.steps = max(self.steps, step.total)
        part = min(step.index * self.ranges // max(step.total, 1), self.ranges - 1)
        if step.index not in self._looked_at(part, step.total):
            return
        errors = measure(_sample(q), k, v, scale=scale, kv_len=kv_len)
        known = self.errors.setdefault((site, part), errors)
        self.errors[site, part] = {each: known[each].worse(error) for each, error in errors.items()}

    def _looked_at(self, part: int, total: int) -> set[int]:
        first, last = -(-part * total // self.ranges), -(-(part + 1) * total // self.ranges)
        return {first + i * (last - first) // self.samples for i in range(self.samples)}


See = Callable[[str, Step, Tensor, Tensor, Tensor, Tensor | None, float | None], None]
"""(site, step, q [B, Nq, H, D], k and v [B, Nk, Hkv, D], kv_len, scale) of a call of self-attention, before it runs."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """Generations that were observed.

    Args:
        model: the denoiser's class. prompts: how many there were.
        order: site -> its running number. Denoisers of one pipeline share the names of their sites.
    """

    model: str
    prompts: int
    order: dict[str, int]


def observe(pipe: object, calls: Iterable[Callable[[], object]], see: See, progress: Callable[[], None]) -> Seen:
    """Generate in exact attention and show every call of self-attention without a mask, that is not causal either.

    Args:
        pipe, calls, progress: see `tune`.
        see: what they are shown to.
    """
    prompts = 0
    with videoattn.fast_attention(pipe, "exact") as sessions, _Observed(sessions=sessions, see=see) as order:
        for call in calls:
            call()
            prompts += 1
            progress()
    return Seen(model=sessions[0].model_name, prompts=prompts, order=order)


@dataclass(kw_only=True)
class _Observed:
    """A context that shows the calls of sessions; entered, it tells the running number of each site."""

    sessions: Sequence[Session]
    see: See

    def __post_init__(self) -> None:
        self._running: tuple[Session, str] | None = None  # of the attention module that runs
        self._undo = ExitStack()

    def __enter__(self) -> dict[str, int]:
        order: dict[str, int] = {}
        for session in self.sessions:
            for patch in session.patches:
                if patch.ours is not None and patch.site.kind in session.policy.kinds:
                    order.setdefault(patch.site.name, patch.site.layer)
                    handle = patch.attn.register_forward_pre_hook(self._enter(session, patch.site.name))
                    self._undo.callback(handle.remove)
                    handle = patch.attn.register_forward_hook(self._leave, always_call=True)
                    self._undo.callback(handle.remove)
        runner.observers.append(self._see)
        self._undo.callback(runner.observers.remove, self._see)
        return order

    def __exit__(self, *error: object) -> None:
        self._undo.close()

    def _enter(self, session: Session, site: str) -> Callable[..., None]:
        def enter(module: nn.Module, args: object) -> None:
            self._running = session, site

        return enter

    def _leave(self, module: nn.Module, args: object, output: object) -> None:
        self._running = None

    def _see(self, plan: Plan, q, k, v, mask, kv_len, scale) -> None:
        if self._running is None or mask is not None or plan.call.causal:
            return
        session, site = self._running
        if plan.call.layout == "BHND":
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        self.see(site, session.step, q, k, v, kv_len, scale)


@torch.no_grad()
def measure(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, kv_len: Tensor | None = None) -> Errors:
    """The error of every precision on q [B, Nq, H, D], k and v [B, Nk, Hkv, D], a head at a time."""
    options = {"scale": scale, "kv_len": kv_len}
    group = q.shape[2] // k.shape[2]
    outs: dict[str, list[Tensor]] = {each: [] for each in (STUDIED, *OFFERED)}
    exact = []
    with torch.autocast(q.device.type, enabled=False):
        for head in range(k.shape[2]):
            part = q[:, :, head * group : (head + 1) * group], k[:, :, head : head + 1], v[:, :, head : head + 1]
            exact.append(reference.attend(*part, **options)[0])
            for each, made in outs.items():
                made.append(_attend(each, *part, **options))
    wanted = torch.cat(exact, dim=2)
    return {each: Error.of(torch.cat(heads, dim=2), wanted) for each, heads in outs.items()}


def _attend(precision: str, q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    if precision == "exact":
        return plain_attention(q, k, v, **options)
    return quantised_reference.attend(q, k, v, precision=precision, **options)[0]


def _sample(q: Tensor) -> Tensor:
    """Some blocks of queries, evenly spread."""
    blocks = q.split(BLOCK, dim=1)
    if len(blocks) <= BLOCKS:
        return q
    return torch.cat([blocks[(2 * i + 1) * (len(blocks) - 1) // (2 * BLOCKS)] for i in range(BLOCKS)], dim=1)


def _worst(pick: Callable[[float, float], float], a: float, b: float) -> float:
    return math.nan if math.isnan(a) or math.isnan(b) else pick(a, b)


def is_share(text: str) -> bool:
    """Whether a text is a number from 0 to 1."""
    try:
        return 0 <= float(text) <= 1
    except ValueError:
        return False


def write(tuning: Tuning | WindowTuning, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(tuning.toml(), encoding="utf-8")
