"""A profile and a comparison as Markdown for a pull request: some twenty lines to be seen, the rest folded.

GitHub strips style, script and embedded pictures, so bars are text. What a user typed (titles, arguments, errors) is
escaped: a prompt may hold a pipe, a tag or somebody's name.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Mapping, Sequence

from videoattn.profiling import summary as derived
from videoattn.profiling.categories import label
from videoattn.profiling.comparison import Comparison, Quality, categories, decibel, medians, verdict
from videoattn.profiling.profile import Profile
from videoattn.profiling.text import bar, factor, facts, kind_lines, lengths, of_roof, seconds, size, some

ROWS = 7  # categories that are seen; the rest is folded
_BAR = 10
_LEAST = 0.9995  # shares that print as 100.0 %


def summary(profile: Profile) -> str:
    """A profile: time by category, what attention takes, Amdahl's line, and the rest folded."""
    attention = derived.attention_ms(profile) / (derived.total_ms(profile) or 1.0)
    seen = [
        f"### {escape(profile.title)}",
        "",
        f"**{escape(seconds(profile))}** on {escape(profile.device)}. {_first(profile)}",
        "",
    ]
    if profile.rows:
        seen += [
            *_categories(profile),
            "",
            f"- attention: {attention:.1%} of the time, {len(profile.calls):,} calls" + _tail(kind_lines(profile)),
            f"- if attention were free, this run would be {derived.without_attention(profile):.2f}x faster",
        ]
    seen += [f"- {_environment(profile.environment)}", *_broken(profile)]
    return "\n".join([*seen, "", *_folded(profile)]) + "\n"


def comparison(compared: Comparison) -> str:
    """A comparison: the verdict, time by category with its change, memory and quality, and the rest folded."""
    deltas = categories(compared)
    base, patched = medians(compared.timing)
    longest = max((max(delta.base_ms, delta.patched_ms) for delta in deltas), default=0.0) or 1.0
    rows = [
        (
            escape(delta.name),
            f"{delta.base_ms:,.1f}",
            f"{delta.patched_ms:,.1f}",
            factor(delta.speedup),
            f"`{bar(delta.base_ms / longest, _BAR)}`",
            f"`{bar(delta.patched_ms / longest, _BAR)}`",
        )
        for delta in deltas
    ]
    whole = ("**wall time**", f"**{base:,.1f}**", f"**{patched:,.1f}**", f"**{factor(base / patched)}**", "", "")
    head, align = ("category", "base ms", "patched ms", "speed-up", "base", "patched"), "lrrrll"
    quality = [f"video {compared.quality}"]
    if compared.floor is not None:
        quality.append(f"noise floor {compared.floor}")
    seen = [
        f"### {escape(compared.title)}",
        "",
        f"**{escape(verdict(compared))}**",
        "",
        *_table(head, align, [*rows[:ROWS], whole]),
        "",
        f"- {escape('; '.join(quality))}",
        f"- {_change_of_memory(compared)}",
        f"- network calls {compared.base_calls:.4g} -> {compared.patched_calls:.4g}; {escape(_control(compared))}",
        f"- {_environment(compared.base.environment)}",
        *_broken(compared.base, "base, "),
        *_broken(compared.patched, "patched, "),
    ]
    folded = _details(
        "everything else",
        [
            *(f"- {escape(line.strip())}" for line in facts(compared)),
            *(f"- note: {escape(note)}" for note in compared.notes),
            "",
            *(_table(head, align, rows[ROWS:]) if rows[ROWS:] else ()),
            "",
            *_curve(compared.quality),
            "",
            *_latents(compared.latents),
            "",
            *_arguments(compared.base.arguments),
        ],
    )
    return "\n".join([*seen, "", *folded]) + "\n"


def escape(text: str) -> str:
    """One line that GitHub shows as it is: no markup, no table cell that ends early, nobody mentioned.

    >>> escape("a|b <i> *c*")
    'a\\\\|b &lt;i&gt; \\\\*c\\\\*'
    """
    line = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", line).replace("@", "@\u200b").replace("#", "#\u200b")


def _categories(profile: Profile) -> list[str]:
    shares = derived.categories(profile)
    head, align = ("category", "ms", "share", "", "TFLOP", "% of roof"), "lrrlrr"
    reached = of_roof(profile)

    def row(share: derived.Share) -> tuple[str, ...]:
        roof = f"{reached[share.name]:.0%}" if share.name in reached else ""
        return (
            escape(share.name),
            f"{share.ms:,.1f}",
            f"{share.share:.1%}",
            f"`{bar(share.share, _BAR)}`",
            some(share.flops / 1e12),
            roof,
        )

    rows = [row(share) for share in shares[:ROWS]]
    left = shares[ROWS:]
    if left:
        share = sum(part.share for part in left)
        ms = f"{sum(part.ms for part in left):,.1f}"
        rows.append((f"{len(left)} others", ms, f"{share:.1%}", f"`{bar(share, _BAR)}`", "", ""))
    return _table(head, align, rows)


def _first(profile: Profile) -> str:
    ranked = derived.categories(profile)
    if not ranked:
        return "Nothing was recorded."
    first = ranked[0]
    free = f": free, it would make the run {1 / (1 - first.share):.2f}x faster" if first.share < _LEAST else ""
    return f"{escape(first.name)} takes {first.share:.0%} of the time{free}."


def _folded(profile: Profile) -> list[str]:
    shapes = [
        (
            shape.kind or "unknown",
            shape.backend,
            " x ".join(map(str, (shape.batch, shape.heads, shape.q_len, shape.kv_len, shape.head_dim))),
            f"{shape.calls:,}",
            f"{shape.ms:,.1f}",
            f"{shape.share:.1%}",
            some(shape.tflops),
            some(shape.gbs),
            "" if shape.padding_waste is None else f"{shape.padding_waste:.0%}",
            "" if shape.over_bound is None else f"{shape.over_bound:.1f}x",
        )
        for shape in derived.shapes(profile)
    ]
    kinds = [
        (label(kind.kind), f"{kind.calls:,}", f"{kind.ms:,.1f}", some(kind.ms_per_tflop), lengths(kind.q_lens))
        for kind in derived.kinds(profile)
    ]
    heaviest = [(escape(s.name), f"{s.ms:,.1f}", f"{s.share:.1%}") for s in derived.heaviest(profile)]
    checks = [(escape(c.name), escape(c.value), escape(c.wanted), "yes" if c.passed else "NO") for c in profile.checks]
    head = (
        "kind",
        "backend",
        "B x H x Nq x Nk x D",
        "calls",
        "ms",
        "share",
        "TFLOP/s",
        "GB/s",
        "padding",
        "bytes/bound",
    )
    lines: list[str] = []
    for block in (
        _table(head, "lllrrrrrrr", shapes),
        _table(("attention of the denoiser", "calls", "ms", "ms/TFLOP", "Nq"), "lrrrl", kinds),
        _table(("heaviest operators", "ms", "share"), "lrr", heaviest),
        _memory(profile),
        _table(("check", "is", "wanted", "passed"), "lrrl", checks),
        [f"- note: {escape(note)}" for note in profile.notes],
        _arguments(profile.arguments),
    ):
        if block:
            lines += [*block, ""]
    return _details("attention by shape, heaviest operators, memory, checks, arguments", lines)


def _memory(profile: Profile) -> list[str]:
    memory = profile.memory
    if memory is None:
        return []
    rows = [(f"`{alive.module}`", alive.what, size(alive.bytes)) for alive in memory.alive[:ROWS]]
    title = f"alive at the peak of {size(memory.peak_bytes)}, in {escape(memory.peak_module) or 'no module'}"
    return _table((title, "what", "size"), "llr", rows)


def _control(compared: Comparison) -> str:
    control = compared.control
    if control.quality is None:
        return control.why
    return f"{control.why}, in {statistics.median(control.ms) / 1e3:.3g} s: {control.quality}"


def _change_of_memory(compared: Comparison) -> str:
    before, after = compared.base.memory, compared.patched.memory
    if before is None or after is None:
        return "memory: not measured"
    change = after.peak_bytes / before.peak_bytes - 1 if before.peak_bytes else 0.0
    return f"peak memory {size(before.peak_bytes)} -> {size(after.peak_bytes)} ({change:+.1%})"


def _curve(quality: Quality) -> list[str]:
    """PSNR of each frame; a frame that is identical fills its bar."""
    finite = [psnr for psnr in quality.psnr_frames if psnr is not None]
    top = max(finite, default=1.0)
    rows = [
        (str(index), decibel(psnr), f"`{bar(1.0 if psnr is None else psnr / top)}`")
        for index, psnr in enumerate(quality.psnr_frames)
    ]
    return _table(("frame", "PSNR to base", ""), "rrl", rows)


def _latents(latents: Sequence[float]) -> list[str]:
    rows = [(str(step), f"{value:.2e}") for step, value in enumerate(latents)]
    return _table(("step", "latents, relative L2 to base"), "rr", rows)


def _broken(profile: Profile, whose: str = "") -> Iterable[str]:
    """What must be seen first when a report cannot be trusted."""
    if profile.error:
        yield f"- **{whose}partial, the generation broke off: {escape(profile.error)}**"
    for check in profile.checks:
        if not check.passed:
            line = f"{whose}check failed: {check.name}: {check.value}, wanted {check.wanted}"
            yield f"- **{escape(line)}**"


def _environment(environment: Mapping[str, str]) -> str:
    return escape(", ".join(f"{name} {value}" for name, value in environment.items() if value)) or "environment unknown"


def _arguments(arguments: Mapping[str, object]) -> list[str]:
    return _table(("argument", "value"), "ll", [(f"`{name}`", escape(str(v))) for name, v in arguments.items()])


def _tail(lines: Sequence[str]) -> str:
    return "".join(f"; {line}" for line in lines)


def _details(title: str, lines: Sequence[str]) -> list[str]:
    return ["<details>", f"<summary>{title}</summary>", "", *lines, "</details>"]


def _table(head: Sequence[str], align: str, rows: Sequence[Sequence[str]]) -> list[str]:
    """A table of GitHub's Markdown; `align` has one of l, r a column. Nothing without rows."""
    if not rows:
        return []
    rule = "|".join({"l": "---", "r": "--:"}[side] for side in align)
    return [f"| {' | '.join(head)} |", f"|{rule}|", *(f"| {' | '.join(row)} |" for row in rows)]
