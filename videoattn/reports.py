"""What was swapped, what runs there, and why: for people (`str`) and for programs (the rows)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from videoattn import measured
from videoattn.policy import Policy
from videoattn.runner import Plan
from videoattn.session import Patch, Session

if TYPE_CHECKING:
    from videoattn.caches.session import Rehash
    from videoattn.slicing.session import Slicing

QUANTISED_KINDS = Policy().kinds


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteRow:
    """One attention layer and one shape that it met.

    Args:
        name, kind: the site.
        adapter: "wan", ... where the family's own processor stands in, "generic", or "untouched".
        decision: what the policy asked for; what is computed if it differs follows in `why`.
        computed: what is computed, "" before the first call or where the host's own path runs.
        backend: who computes it.
        fused: whether norm and rotation of q and k run in one pass of ours.
        why: the reason of a fallback or a refusal, "" where there is none.
        shape: (batch, q_len, kv_len, heads, head_dim), None before the first call.
        calls: calls of this kind, head shape and shape so far, over all sites that share them.
    """

    name: str
    kind: str
    adapter: str
    decision: str
    computed: str = ""
    backend: str = ""
    fused: bool = False
    why: str = ""
    shape: tuple[int, int, int, int, int] | None = None
    calls: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All denoisers of a pipeline.

    Args:
        title: the pipeline or denoiser and its policy.
        sites: one row for each site and shape.
        refused: (site, reason) of every attention layer that was left untouched.
        notes: facts about the whole, e.g. that the last forward took the host's own path, that an output of ours was not
            finite in this generation, or that a table of measured times was passed over.
        generations, denoiser_calls: since attention was enabled.
        shares: what is computed -> its share of the calls of self-attention that a policy may quantise, the greatest first.
        planning_seconds: what the first call of every shape took longer, `videoattn.warmup` included.
    """

    title: str
    sites: tuple[SiteRow, ...]
    refused: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    generations: int
    denoiser_calls: int
    shares: Mapping[str, float]
    planning_seconds: float

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        table = Table(title=self.title, title_justify="left")
        for column in ("attention", "sites", "adapter", "decision", "backend", "B x Nq x Nk x H x D", "calls", "why"):
            table.add_column(column, justify="right" if column in ("sites", "calls") else "left")
        for (kind, adapter, decision, backend, fused, shape, why, calls), sites in _group(self.sites).items():
            size = "" if shape is None else " x ".join(map(str, shape))
            who = f"{backend}, fused norm" if fused else backend
            table.add_row(kind, str(sites), adapter, decision, who, size, str(calls), why)
        console = Console(width=160, force_terminal=False, highlight=False, markup=False, emoji=False)
        with console.capture() as capture:
            if self.sites:
                console.print(table)
            else:
                console.print(self.title)
            if self.shares.keys() - {"exact"}:
                told = (f"{computed} {share:.1%}" for computed, share in self.shares.items())
                console.print(f"self-attention calls: {', '.join(told)}")
            for note in self.notes:
                console.print(note)
            if self.planning_seconds >= 0.05:
                console.print(
                    f"{self.planning_seconds:.1f} s went into plans, once; videoattn.warmup spends them ahead"
                )
        return capture.get()


def build(
    title: str, sessions: Sequence[Session], slicings: Sequence[Slicing] = (), rehashes: Sequence[Rehash] = ()
) -> Report:
    rows = [row for session in sessions for patch in session.patches for row in _rows(session, patch)]
    devices = {plan.call.device for session in sessions for plan in session.plans}
    return Report(
        title=title,
        sites=tuple(rows),
        refused=tuple((p.site.name, p.refusal) for session in sessions for p in session.patches if p.refusal),
        notes=(
            *(f"{session.model_name}: {note}" for session in sessions for note in _notes(session)),
            *sorted({measured.note(device) for device in devices} - {""}),
            *(f"{type(slicing.model).__name__}: {note}" for slicing in slicings for note in slicing.notes()),
            *(f"{rehash.model_name}: {note}" for rehash in rehashes for note in rehash.notes()),
        ),
        generations=max((session.clock.generation + 1 for session in sessions), default=0),
        denoiser_calls=sum(session.clock.calls for session in sessions),
        shares=_shares(plan for session in sessions for plan in session.plans),
        planning_seconds=sum(session.planning_seconds for session in sessions),
    )


def _shares(plans: Iterable[Plan]) -> dict[str, float]:
    calls: dict[str, int] = {}
    for plan in plans:
        if plan.call.kind in QUANTISED_KINDS and plan.calls:
            computed = str(plan.choice.decision)
            calls[computed] = calls.get(computed, 0) + plan.calls
    return {
        computed: count / sum(calls.values()) for computed, count in sorted(calls.items(), key=lambda item: -item[1])
    }


def _notes(session: Session) -> list[str]:
    marks = [f"generation {session.clock.generation} is marked: {mark}" for mark in session.marks]
    return [*([session.bypass] if session.bypass else []), *marks, *_sparse(session)]


def _sparse(session: Session) -> Iterator[str]:
    """What lists of key blocks hold; waits for the device."""
    for kept in session.kept:
        if kept.density is None:
            continue
        line = f"{kept.density:.1%} of the key blocks kept, mean of {kept.selections} selections"
        if kept.missed is not None:
            line += f"; kept on for {kept.steps} steps, lists lack {kept.missed:.1%} of what a new selection keeps"
        if session.in_place:
            line += f"; tokens change order in every layer: {session.in_place}"
        yield line


def _rows(session: Session, patch: Patch) -> list[SiteRow]:
    site = patch.site
    if patch.ours is None or patch.ours.run is None:
        waiting = patch.ours is not None and not patch.refusal and not session.bypass
        why = "not called yet" if waiting else patch.refusal or session.bypass
        decision = str(session.policy(site, session.step))
        adapter = patch.adapter if patch.ours is not None else "untouched"
        return [SiteRow(name=site.name, kind=site.kind, adapter=adapter, decision=decision if waiting else "", why=why)]
    run = patch.ours.run
    rows = []
    for plan in run.plans.values():
        call = plan.call
        if (site.heads or call.heads, site.head_dim or call.head_dim) != (call.heads, call.head_dim):
            continue  # another level of a UNet
        rows.append(
            SiteRow(
                name=site.name,
                kind=site.kind,
                adapter=patch.adapter,
                decision=str(run.decision),
                computed=str(plan.choice.decision),
                backend=plan.choice.backend.name,
                fused=plan.fused,
                why=plan.choice.why,
                shape=(call.batch, call.q_len, call.kv_len, call.heads, call.head_dim),
                calls=plan.calls,
            )
        )
    no_call = SiteRow(
        name=site.name, kind=site.kind, adapter=patch.adapter, decision=str(run.decision), why="needs no attention call"
    )
    return rows or [no_call]


def _group(rows: Sequence[SiteRow]) -> dict[tuple, int]:
    """Rows that read alike, with how many sites share them."""
    groups: dict[tuple, int] = {}
    for row in rows:
        key = (row.kind, row.adapter, row.decision, row.backend, row.fused, row.shape, row.why, row.calls)
        groups[key] = groups.get(key, 0) + 1
    return groups
