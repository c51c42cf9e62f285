"""`videoattn tune --windows`: for each head of each layer the smallest sliding-tile window that keeps most of its attention.

Sliding Tile Attention (Zhang et al., arXiv:2502.04507) searches a window for each head, by what the loss of each costs the
output, candidate by candidate. Ours goes by the softmax mass that a window keeps, which one look at a call tells of all
candidates: the model generates in exact attention, and in some of the steps that will not be dense, the mass between each
pair of tiles is computed on a sample of the queries and all keys (`selection/recall.py`). A window's recall is the mass in
the blocks that a kernel would compute with it, what is required included. The worst over prompts, guidance branches and
steps counts, and of the windows that keep the target the one with the fewest blocks is taken.

What it costs beside the generations: scores of R queries by N keys a call and head, 2 R N D operations in fp32. Wan 1.3B at
480p (N = 32,760, 12 heads of 128, 30 layers), R = 1,024: 0.1 TFLOP a call, and 20 TFLOP for 3 steps of both branches of a
prompt, some seconds at the fp32 rate of an H100; the candidates, 60 windows over 270 x 270 tiles, are nothing beside it. So
a few prompts take the minutes of their generations.

Letters: B batch, N tokens, H heads, Hkv key heads, D head_dim, R sampled rows, n blocks, C candidate windows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from videoattn.call import Grid, Step
from videoattn.policy import Policy, Precision, Sparse, Windows
from videoattn.selection.arrangement import Arrangement, Tile, Tokens, arrange
from videoattn.selection.recall import SCORES, block_mass
from videoattn.selection.selector import required
from videoattn.selection.sliding_tiles import SlidingTiles, Window
from videoattn.tuning import is_share, observe


def parse_recall(text: str) -> float:
    """ "recall=0.9" -> 0.9.

    Raises:
        ValueError: anything else than recall= and a share.
    """
    metric, _, value = text.partition("=")
    if metric != "recall" or not is_share(value):
        raise ValueError(f"windows: wanted recall= and a number in 0..1, got {text!r}")
    return float(value)


@dataclass(frozen=True, kw_only=True)
class Heads:
    """What was found for the heads of one site, a value for each.

    Args:
        windows: in tokens. densities: the shares of all blocks that are computed. recalls: the worst that were seen.
    """

    windows: tuple[Window, ...]
    densities: tuple[float, ...]
    recalls: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class WindowTuning:
    """What was found of a model.

    Args:
        model: the denoiser's class; recall, precision, dense_steps, prompts, steps: how it was tuned, and for what.
        grid, tile: of the video and of the blocks.
        sites: name -> its heads.
    """

    model: str
    recall: float
    precision: Precision
    dense_steps: float
    prompts: int
    steps: int
    grid: Grid
    tile: Tile
    sites: dict[str, Heads]

    @property
    def density(self) -> float:
        """The share of blocks that is computed in a step that is not dense, mean over all heads of all sites."""
        densities = [density for heads in self.sites.values() for density in heads.densities]
        return sum(densities) / len(densities)

    def policy(self, name: str = "tuned") -> Policy:
        """Sites that were not seen have one window as large as the grid."""
        windows = Windows(
            sites=tuple((site, heads.windows) for site, heads in self.sites.items()), grid=self.grid, tile=self.tile
        )
        decision = Sparse(SlidingTiles(windows=(_axes(self.grid),)), self.precision)
        return Policy(name=name, decision=decision, windows=windows, dense_steps=self.dense_steps)

    def toml(self) -> str:
        """What `Policy.load` reads, and the densities and recalls behind it."""
        lines = [
            f"# videoattn tune: {self.model}, recall={self.recall:g}, {self.prompts} prompts of {self.steps} steps",
            f'precision = "{self.precision}"',
            f"dense_steps = {self.dense_steps}",
            "",
            "# (frames, height, width) in tokens, for this grid and this tile, a window a head; of another grid they keep as",
            "# many frames, rows and columns. Sites that are not named have one window as large as the grid.",
            "[windows]",
            f"grid = {list(_axes(self.grid))}",
            f"tile = {list(self.tile)}",
            "",
            "[windows.sites]",
            *(f'"{site}" = {list(map(list, heads.windows))}' for site, heads in self.sites.items()),
        ]
        for site, heads in self.sites.items():
            values = {"densities": heads.densities, "recalls": heads.recalls}
            lines += ["", "[[found]]", f'site = "{site}"']
            lines += [f"{name} = [{', '.join(f'{x:.6f}' for x in of)}]" for name, of in values.items()]
        return "\n".join(lines) + "\n"

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        table = Table(title=f"{self.model}: windows of heads, wanted recall={self.recall:g}", title_justify="left")
        for column in ("layer", "density", "recall", "least recall", "heads", "that keep all"):
            table.add_column(column, justify="left" if column == "layer" else "right")
        for site, heads in self.sites.items():
            count, recalls = len(heads.windows), heads.recalls
            means = f"{sum(heads.densities) / count:.1%}", f"{sum(recalls) / count:.4f}", f"{min(recalls):.4f}"
            table.add_row(site, *means, str(count), str(heads.windows.count(_axes(self.grid))))
        console = Console(width=160, force_terminal=False, highlight=False, markup=False, emoji=False)
        with console.capture() as capture:
            console.print(table)
            console.print(
                f"{self.density:.1%} of all blocks are computed in sparse steps, mean over layers and heads; the first "
                f"{self.dense_steps:.0%} of the steps are dense. Grid {_axes(self.grid)} in tiles of {self.tile}."
            )
        return capture.get()


def tune(
    pipe: object,
    calls: Iterable[Callable[[], object]],
    *,
    recall: float,
    precision: Precision = "int8_qk_fp8_pv",
    dense_steps: float = 0.2,
    samples: int = 3,
    rows: int = 1024,
    block: int = 128,
    progress: Callable[[], None] = lambda: None,
) -> WindowTuning:
    """Generate in exact attention and look at every call of self-attention over the video in some steps.

    Calls with a mask or with lengths, and those whose grid is not known, are passed over: no kernel takes tiles there.

    Args:
        pipe, calls, progress: see `tuning.tune`.
        recall: the share of the softmax mass that a window must keep, in 0..1.
        precision, dense_steps: of the policy. Nothing is looked at in the first `dense_steps` of the steps.
        samples: how many of the other steps are looked at.
        rows: R, queries of a call. 1,024 tell a recall of 0.9 to within 0.01: a query's own has a deviation of 0.3 at most.
        block: tokens that a tile may have, as in the kernel that will run: 128 on Hopper, 64 by torch's masks.

    Raises:
        ValueError: a value that is out of range; videos of more than one size; or no such call was seen.
    """
    if not 0 <= recall <= 1:
        raise ValueError(f"tune: wanted a recall in 0..1, got {recall}")
    if min(samples, rows, block) < 1:
        raise ValueError(f"tune: wanted samples, rows and a block of 1 at least, got {samples}, {rows} and {block}")
    # Validates both, and says which steps are sparse.
    schedule = Policy(decision=Sparse(SlidingTiles(), precision), dense_steps=dense_steps)
    meter = _Meter(schedule=schedule, samples=samples, rows=rows, block=block)
    seen = observe(pipe, calls, meter.see, progress)
    if not meter.kept:
        raise ValueError(
            "tune: wanted self-attention over a video whose grid is known, without a mask or lengths, in a step that is not "
            "dense, got none in these generations"
        )
    search = next(iter(meter.searches.values()))
    return WindowTuning(
        model=seen.model,
        recall=recall,
        precision=precision,
        dense_steps=dense_steps,
        prompts=seen.prompts,
        steps=meter.steps,
        grid=search.arrangement.tokens.grid,
        tile=search.arrangement.tile,
        sites={site: search.cheapest(meter.kept[site], recall) for site in sorted(meter.kept, key=seen.order.get)},
    )


@dataclass(kw_only=True)
class _Meter:
    """What every candidate keeps at each site, fp32 [C, H], on the CPU: the least that was seen."""

    schedule: Policy
    samples: int
    rows: int
    block: int
    kept: dict[str, Tensor] = field(default_factory=dict)
    searches: dict[tuple[Tokens, torch.device], Search] = field(default_factory=dict)
    steps: int = 0

    def see(self, site: str, step: Step, q: Tensor, k: Tensor, v: Tensor, kv_len: Tensor | None, scale) -> None:
        self.steps = max(self.steps, step.total)
        count, grid = q.shape[1], step.grid
        if kv_len is not None or grid is None or k.shape[1] != count or count < grid.tokens:
            return
        if step.index not in self._looked_at(step.total):
            return
        search = self._search(Tokens(grid=grid, after=count - grid.tokens), q.device)
        q, k = (search.arrangement.arranged(x) for x in (q, k))
        kept = search.kept(block_mass(q, k, search.arrangement, rows=self.rows, scale=scale)).cpu()
        self.kept[site] = torch.minimum(kept, self.kept.get(site, kept))  # NaN stays

    def _looked_at(self, total: int) -> set[int]:
        sparse = [i for i in range(max(total, 1)) if self.schedule.sparse_at(Step(index=i, total=total))]
        return {sparse[i * len(sparse) // self.samples] for i in range(self.samples)} if sparse else set()

    def _search(self, tokens: Tokens, device: torch.device) -> Search:
        grids = {tokens.grid, *(known.grid for known, _ in self.searches)}
        if len(grids) > 1:
            raise ValueError(f"tune: wanted videos of one size, got {', '.join(map(str, grids))}")
        if (tokens, device) not in self.searches:
            arrangement = arrange(tokens, "tiles", device, block_q=self.block, block_k=self.block)
            self.searches[tokens, device] = Search(arrangement)
        return self.searches[tokens, device]


class Search:
    """The candidate windows of an arrangement in tiles.

    Attributes:
        windows: C of them, the whole video last.
        masks: bool [C, n, n], the blocks that a kernel computes with each, what is required included.
        blocks: int64 [C], how many these are.
    """

    def __init__(self, arrangement: Arrangement) -> None:
        self.arrangement = arrangement
        self.windows = candidates(arrangement.tokens.grid, arrangement.tile)
        keep = SlidingTiles(windows=self.windows).keep(arrangement, len(self.windows))[0]
        self.masks = keep | required(arrangement)
        self.blocks = self.masks.sum((1, 2))

    def kept(self, mass: Tensor) -> Tensor:
        """The recall of each window, the least over the batch, fp32 [C, H]; mass [B, H, n, n] of `block_mass`."""
        batch, heads, n, _ = mass.shape
        mass = mass.flatten(2).flatten(0, 1).T
        with torch.autocast(mass.device.type, enabled=False):
            some = self.masks.flatten(1).split(max(1, SCORES // n**2))  # of which fp32 copies are made
            kept = torch.cat([masks.float() @ mass for masks in some])
        return kept.unflatten(1, (batch, heads)).amin(1)

    def cheapest(self, kept: Tensor, recall: float) -> Heads:
        """For each head the window of the fewest blocks that keeps the target, by [C, H]; the whole video where none does.

        Of windows with as many blocks the one that keeps most.
        """
        blocks = self.blocks.cpu().double()
        able = kept >= recall
        able[-1] = True
        cost = (blocks[:, None] - kept.nan_to_num().clamp(0, 1) / 2).masked_fill(~able, torch.inf)
        chosen = cost.argmin(0)
        return Heads(
            windows=tuple(self.windows[i] for i in chosen.tolist()),
            densities=tuple((blocks[chosen] / self.masks[0].numel()).tolist()),
            recalls=tuple(kept.gather(0, chosen[None])[0].tolist()),
        )


def candidates(grid: Grid, tile: Tile) -> tuple[Window, ...]:
    """Windows of an odd number of tiles on each axis, or of the whole axis, in tokens; the whole video last.

    >>> candidates(Grid(frames=21, height=6, width=7), (7, 3, 7))
    ((7, 3, 7), (7, 6, 7), (21, 3, 7), (21, 6, 7))
    """
    axes = zip(_axes(grid), tile, strict=True)
    return tuple(itertools.product(*((*range(step, size, 2 * step), size) for size, step in axes)))


def _axes(grid: Grid) -> Window:
    return grid.frames, grid.height, grid.width
