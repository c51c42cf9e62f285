"""A plan for the terminal: tables of rich, what was asked for first and the verdict last."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

from videoattn.profiling.plan import Part, Plan
from videoattn.profiling.text import WIDTH, bar, heading, size, some

_LENGTHS = 9  # sequence lengths of a kind that are listed


def table(plan: Plan, *, colour: bool = False) -> str:
    """A plan as text, with the escape codes of a terminal where `colour`."""
    title = (
        f"{plan.model} ({plan.pipeline}): {plan.height}x{plan.width}, {plan.frames} frames, {plan.steps} steps, "
        f"on {plan.card.name}"
    )
    parts = [heading(title), _categories(plan), _parts(plan)]
    parts += [Text(line) for line in _facts(plan)]
    parts.append(Text(verdict(plan), style="bold"))
    console = Console(width=WIDTH, force_terminal=colour, highlight=False, markup=False, emoji=False)
    with console.capture() as capture:
        for part in parts:
            console.print(part)
    return "\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n"


def verdict(plan: Plan) -> str:
    """What attention is of the whole, in a sentence."""
    return (
        f"Attention is {plan.attention_share():.0%} of the denoiser's FLOPs. If it were free, the generation's floor of "
        f"{_time(plan.ms)} would be {plan.without_attention():.2f}x lower."
    )


def _categories(plan: Plan) -> Table:
    grid = _table("the generation by category", "category", "TFLOP", "GB", "floor", "share", "")
    for share in plan.categories():
        grid.add_row(
            share.name,
            some(share.flops / 1e12),
            some(share.bytes / 1e9),
            _time(share.ms),
            f"{share.share:.1%}",
            bar(share.share),
        )
    grid.add_section()
    grid.add_row("all", some(plan.flops / 1e12), some(plan.bytes / 1e9), _time(plan.ms), "", "")
    return grid


def _parts(plan: Plan) -> Table:
    grid = _table(
        "by part, one call", "part", "class", "dtype", "calls", "TFLOP", "attention", "floor", "weights", "activations"
    )
    for part in plan.parts:
        grid.add_row(
            part.name,
            part.kind,
            part.dtype,
            str(part.calls),
            f"{part.flops / 1e12:,.2f}",
            f"{part.attention_flops / part.flops:.0%}" if part.flops else "",
            _time(part.ms),
            size(part.weights_bytes),
            size(part.activations_bytes),
        )
    return grid


def _table(title: str, *columns: str) -> Table:
    grid = Table(title=title, title_justify="left")
    for column in columns:
        text = column in ("category", "part", "class", "dtype", "")
        grid.add_column(column, justify="left" if text else "right", overflow="fold")
    return grid


def _facts(plan: Plan) -> Iterator[str]:
    for part in plan.denoisers:
        yield from _lengths(part)
    greatest = max(plan.parts, key=lambda part: part.activations_bytes)
    yield (
        f"memory: weights {size(plan.weights_bytes())}, and {size(greatest.activations_bytes)} of activations in "
        f"{greatest.peak_module}: {size(plan.peak_bytes())} with every part on the card"
    )
    for name, why in plan.unplanned:
        yield f"not planned: {name}, {why}"
    for note in plan.notes:
        yield f"note: {note}"


def _lengths(part: Part) -> Iterator[str]:
    """How N moves through a call, for each kind of attention: the queries, and the keys where they are others."""
    for kind, lengths in part.lengths().items():
        shown = [str(q) if q == k else f"{q} to {k}" for q, k in lengths[:_LENGTHS]]
        more = f", and {len(lengths) - _LENGTHS} more" if len(lengths) > _LENGTHS else ""
        calls = sum(call.kind == kind for call in part.attention)
        yield f"{part.name}, {kind} attention, {calls} calls, tokens: {', '.join(shown)}{more}"


def _time(ms: float) -> str:
    """
    >>> _time(0.25), _time(12.5), _time(2400.0), _time(1e-6)
    ('0.25 ms', '12.5 ms', '2.4 s', '< 0.01 ms')
    """
    if ms < 0.01:
        return "< 0.01 ms"
    return f"{ms / 1e3:,.3g} s" if ms >= 1e3 else f"{ms:.3g} ms"
