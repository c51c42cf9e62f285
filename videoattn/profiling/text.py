"""A profile and a comparison for the terminal: tables of rich, at most 120 columns wide, the verdict last."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from videoattn.profiling import summary
from videoattn.profiling.categories import label
from videoattn.profiling.comparison import Comparison, categories, medians, verdict
from videoattn.profiling.profile import Ceilings, Memory, Profile

WIDTH = 120
SHAPES = 12  # attention shapes that are listed
ALIVE = 6  # what is alive at the peak: entries that are listed
_BAR = 16
_EIGHTHS = " ▏▎▍▌▋▊▉"


def table(profile: Profile, *, colour: bool = False) -> str:
    """A profile as text.

    Args:
        colour: with the escape codes of a terminal.
    """
    parts: list[RenderableType] = [heading(profile.title), _ran(profile)]
    if profile.rows:
        parts.append(_categories(profile))
    if profile.calls:
        parts.append(_shapes(profile))
    if summary.kinds(profile):
        parts.append(_kinds(profile))
    if profile.memory is not None:
        parts += [Text(_peak(profile.memory)), _alive(profile.memory)]
    parts += _warnings(profile)
    parts.append(Text(summary.advice(profile), style="bold"))
    return _printed(parts, colour)


def comparison(compared: Comparison, *, colour: bool = False) -> str:
    """A comparison as text: time by category, memory, quality, and the verdict."""
    base, patched = medians(compared.timing)
    times = Table("", "base", "patched", "speed-up", title="time by category, ms", title_justify="left")
    for column in times.columns[1:]:
        column.justify = "right"
    for delta in categories(compared):
        times.add_row(delta.name, f"{delta.base_ms:,.1f}", f"{delta.patched_ms:,.1f}", factor(delta.speedup))
    times.add_section()
    times.add_row("wall time (median)", f"{base:,.1f}", f"{patched:,.1f}", factor(base / patched))
    parts: list[RenderableType] = [heading(compared.title), times]
    parts += [Text(line) for line in facts(compared)]
    parts += [*_failed(compared.base, "base: "), *_failed(compared.patched, "patched: ")]
    parts += [Text(f"note: {note}") for note in compared.notes]
    parts.append(Text(verdict(compared), style="bold"))
    return _printed(parts, colour)


def facts(compared: Comparison) -> list[str]:
    """What a comparison says beside its times, one line each."""
    timing, control = compared.timing, compared.control
    first = (
        f"first generation: base {timing.first_base_ms / 1e3:.3g} s, patched {timing.first_patched_ms / 1e3:.3g} s, "
        f"of it {timing.planning_ms / 1e3:.3g} s for plans"
    )
    lines = [
        "by category: one recorded pass of each, scaled to its wall time; only the wall time has an interval",
        f"rounds of two runs each: {timing.rounds}; noise of the control: {timing.noise:.1%}",
        first,
        f"network calls: base {compared.base_calls:.4g}, patched {compared.patched_calls:.4g}",
    ]
    memories = compared.base.memory, compared.patched.memory
    if None not in memories:
        lines.append("peak memory: base {}, patched {}".format(*(size(memory.peak_bytes) for memory in memories)))
    lines.append(f"video: {compared.quality}")
    if compared.floor is not None:
        lines.append(f"noise floor, two exact kernels against each other: {compared.floor}")
    if compared.latents:
        last, worst = compared.latents[-1], max(compared.latents)
        lines.append(f"latents, relative L2 to base: {last:.2e} after the last step, greatest {worst:.2e}")
    lpips = f"not computed, {compared.lpips_why}" if compared.lpips is None else f"{compared.lpips:.4f}"
    lines.append(f"LPIPS: {lpips}")
    lines.append(f"control, the base sampler with as many network calls: {control.why}")
    if control.quality is not None:
        taken = statistics.median(control.ms) / 1e3
        lines.append(f"    {control.steps} steps, {control.calls:.4g} calls, {taken:.3g} s: {control.quality}")
    return lines


def bar(share: float, width: int = _BAR) -> str:
    """A bar of Unicode blocks, exact to an eighth of a character; `share` 0..1 of `width` characters.

    >>> bar(0.5, 5), bar(1.0, 3), bar(0.0, 3)
    ('██▌  ', '███', '   ')
    """
    eighths = round(max(0.0, min(share, 1.0)) * width * 8)
    return ("█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()).ljust(width)


def size(count: int) -> str:
    """
    >>> size(3 * 2**29), size(5 * 2**19)
    ('1.50 GiB', '2.5 MiB')
    """
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def factor(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def some(value: float) -> str:
    """Three digits; nothing for zero."""
    return f"{value:.3g}" if value and abs(value) < 1000 else f"{value:,.0f}" if value else ""


def seconds(profile: Profile) -> str:
    """The latency of the untouched generation, or that none was measured."""
    if not profile.clean_ms:
        return f"recorded pass {profile.recorded_ms / 1e3:.3g} s, no clean run"
    return f"{summary.clean_ms(profile) / 1e3:.3g} s (median of {len(profile.clean_ms)} clean)"


def kind_lines(profile: Profile) -> list[str]:
    """Sequence length over the run, and what temporal attention costs beside spatial."""
    lengths = [call.q_len for call in profile.calls if call.step >= 0]
    lines = []
    if lengths:
        low, high = min(lengths), max(lengths)
        varies = f"{low:,} to {high:,} ({high / low:.3g}x)" if low < high else f"{low:,} throughout"
        lines.append(f"sequence length in the denoiser: {varies}")
    ratio = summary.temporal_per_flop(profile)
    if ratio is not None:
        lines.append(f"temporal attention takes {ratio:.3g} times as long for a FLOP as spatial attention")
    return lines


def of_roof(profile: Profile) -> dict[str, float]:
    """Category -> share of what the machine's ceilings allow at its intensity; empty without ceilings."""
    if profile.ceilings is None:
        return {}
    points = summary.roofline(profile, summary.categories(profile))
    return {point.name: _reached(point, profile.ceilings) for point in points}


def _reached(point: summary.Point, ceilings: Ceilings) -> float:
    """Copies have no operations: their roof is the bandwidth."""
    return point.flops_per_second / point.roof if point.roof else point.bytes_per_second / ceilings.copy_bandwidth


def heading(title: str) -> Text:
    return Text(" ".join(title.split()), style="bold")


def _ran(profile: Profile) -> Text:
    clock = "GPU time" if profile.clock == "device" else "CPU time of the recorded pass"
    over = f", recorded at {summary.overhead(profile):.2f}x of it" if any(profile.clean_ms) else ""
    return Text(f"{profile.device}; {seconds(profile)}{over}; ms are {clock}")


def _categories(profile: Profile) -> Table:
    found = Table("category", title="time by category", title_justify="left")
    for name in ("calls", "ms", "share", "", "TFLOP", "GB", "FLOP/B", "% of roof"):
        found.add_column(name, justify="right" if name else "left", no_wrap=True)
    reached = of_roof(profile)
    for share in summary.categories(profile):
        found.add_row(
            share.name,
            f"{share.calls:,}",
            f"{share.ms:,.1f}",
            f"{share.share:.1%}",
            Text(bar(share.share), style="cyan"),
            some(share.flops / 1e12),
            some(share.bytes / 1e9),
            some(share.work / share.bytes if share.bytes else 0.0),
            f"{reached[share.name]:.0%}" if share.name in reached else "",
        )
    return found


def _shapes(profile: Profile) -> Table:
    shapes = summary.shapes(profile)
    left = len(shapes) - SHAPES
    title = "attention shapes" + (f", {left} more in the JSON" if left > 0 else "")
    found = Table("kind", "backend", title=title, title_justify="left")
    for name in ("B x H x Nq x Nk x D", "calls", "ms", "share", "TFLOP/s", "GB/s", "padding"):
        found.add_column(name, justify="right", no_wrap=True)
    for shape in shapes[:SHAPES]:
        dims = (shape.batch, shape.heads, shape.q_len, shape.kv_len, shape.head_dim)
        found.add_row(
            shape.kind or "unknown",
            shape.backend,
            " x ".join(map(str, dims)),
            f"{shape.calls:,}",
            f"{shape.ms:,.1f}",
            f"{shape.share:.1%}",
            some(shape.tflops),
            some(shape.gbs),
            "" if shape.padding_waste is None else f"{shape.padding_waste:.0%}",
        )
    return found


def _kinds(profile: Profile) -> Table:
    found = Table(
        "attention of the denoiser",
        title="attention by kind",
        title_justify="left",
        caption="\n".join(kind_lines(profile)),
        caption_justify="left",
    )
    for name in ("calls", "ms", "TFLOP", "ms/TFLOP", "copies around, GB", "Nq"):
        found.add_column(name, justify="right")
    for total in summary.kinds(profile):
        found.add_row(
            label(total.kind),
            f"{total.calls:,}",
            f"{total.ms:,.1f}",
            some(total.flops / 1e12),
            some(total.ms_per_tflop),
            some(total.layout_bytes / 1e9),
            lengths(total.q_lens),
        )
    return found


def lengths(found: Sequence[int]) -> str:
    """
    >>> lengths((16, 64, 256)), lengths((1, 2, 3, 4, 5, 6))
    ('16, 64, 256', '6 of 1 to 6')
    """
    return ", ".join(map(str, found)) if len(found) <= 4 else f"{len(found)} of {found[0]} to {found[-1]}"


def _peak(memory: Memory) -> str:
    return (
        f"memory: peak {size(memory.peak_bytes)} at {memory.peak_ms:,.0f} ms in {memory.peak_module or 'no module'}, "
        f"weights {size(memory.weights_bytes)}"
    )


def _alive(memory: Memory) -> Table:
    found = Table("alive at the peak", "what")
    found.add_column("size", justify="right", no_wrap=True)
    for alive in memory.alive[:ALIVE]:
        found.add_row(alive.module, alive.what, size(alive.bytes))
    return found


def _warnings(profile: Profile) -> Iterable[Text]:
    if profile.error:
        yield Text(f"partial, the generation broke off: {profile.error}", style="bold red")
    yield from _failed(profile)
    for note in profile.notes:
        yield Text(f"note: {note}")


def _failed(profile: Profile, whose: str = "") -> Iterable[Text]:
    for check in profile.checks:
        if not check.passed:
            yield Text(f"{whose}check failed: {check.name}: {check.value}, wanted {check.wanted}", style="bold red")


def _printed(parts: Sequence[RenderableType], colour: bool) -> str:
    console = Console(width=WIDTH, force_terminal=colour, highlight=False, markup=False, emoji=False)
    with console.capture() as capture:
        for part in parts:
            console.print(part)
    return "\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n"
