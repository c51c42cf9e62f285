"""GroupNorm whose work is cut evenly, whatever the rows: moments of pieces, their merging, one pass that normalises.

    y = (x - mean) / sqrt(squares / count + eps) * weight + bias = x * scale + shift,    then, if asked for, y / (1 + e^-y)

over the values of a group (Wu and He, arXiv:1803.08494); squares: of what is left without the mean, summed. torch reads a
group with one block of threads: of a few frames these are fewer than a card has multiprocessors. Here a group is read by
as many programs as it takes. x is read twice and y written once, in their own dtype.

A program sums d = x - k and d^2 in fp32, lane by lane, where k is the mean of one of its tiles, and is left with

    mean = k + sum(d) / n,    squares = sum(d^2) - sum(d)^2 / n.

The subtraction costs a few bits whatever the mean: k is the mean of a 128th of the n values or more, and these alone make
squares >= n (mean - k)^2 / 127, so that what is subtracted is at most 127 times what is left. Pieces are merged by Chan's
formula (Chan, Golub and LeVeque, 1983) in fp64, in a fixed order, and with what slices before have given.

SiLU is of the fp32 value, so that there is one rounding; as an operator of its own it is of the rounded value: that moves
its argument by up to half a unit in the last place, and its output by 1.1 times as much, beside the rounding of the output.

A tile has rows of what lies side by side in memory: places, of one channel and maybe one frame a row, or channels, of one
place a row (channels_last), whose sums are kept channel by channel until they are merged.

Letters: B rows of the batch, C channels, G groups; R rows and N columns of a tile.

Refuses: other than fp16, bf16 and fp32; more than two steps of places after merging what lies end to end; sizes of 2^31.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from videoattn.kernels.tiles import alignment
from videoattn.kernels.triton_backend import Launch, on_device_of

TILE = 4096  # values; 16 a thread, which are two loads of 16 bytes in 16 bits
WARPS = 8
MOST = 64  # tiles of a program: its sums of a lane are no longer than that
PROGRAMS = 2048  # wanted: some on every multiprocessor of a large card, with an end that is not noticed
PARTIALS = 256  # that a merge reads at a time
Strides = tuple[int, ...]


class Moments(NamedTuple):
    """Of groups: how many values each has, their mean and squares around it, fp64 [B, G]."""

    count: int
    mean: Tensor
    squares: Tensor


class _Layout(NamedTuple):
    """A tensor as rows of columns: row r begins at r // inner of the outer steps and r % inner of the inner ones.

    Args:
        steps: outer, inner and from column to column; of each of the tensors that are walked together.
        keep: columns are channels.
    """

    rows: int
    inner: int
    columns: int
    steps: tuple[Strides, ...]
    keep: bool

    @property
    def tile(self) -> dict[str, object]:
        """R, N and what of the layout makes another kernel."""
        n = _width(self.columns)
        unit = all(step == 1 for *_, step in self.steps)
        r = min(TILE // n, triton.next_power_of_2(self.rows))
        return {"R": r, "N": n, "KEEP": self.keep, "UNIT": unit, "num_warps": WARPS}

    def aligned(self, *steps: int) -> dict[str, int]:
        """What divides all steps to the beginning of a row, these too, and the columns."""
        steps = (*steps, *(step for of in self.steps for step in of[:2]))
        return {"ALIGN": alignment(*steps), "ALIGN_COLUMNS": alignment(self.columns)}


def _width(columns: int) -> int:
    """Columns of a tile: the greatest power of two of which at most an eighth is left empty, from 64 on.

    >>> _width(320), _width(1152), _width(100000), _width(5)
    (64, 256, 4096, 8)
    """
    if columns <= 64:
        return triton.next_power_of_2(columns)
    n = min(TILE, triton.next_power_of_2(columns))
    while n > 64 and 8 * (-columns % n) > columns:
        n //= 2
    return n


def _merged(dims: list[Strides]) -> list[Strides]:
    """(size, step, ...) of dimensions, largest step first, those that lie end to end as one."""
    merged: list[Strides] = []
    for size, *steps in sorted((dim for dim in dims if dim[0] != 1), key=lambda dim: -dim[1]):
        if merged and all(outer == size * step for outer, step in zip(merged[-1][1:], steps, strict=True)):
            merged[-1] = (merged[-1][0] * size, *steps)
        else:
            merged.append((size, *steps))
    return merged


def _layout(shape: Strides, strides: tuple[Strides, ...], each: int = 0) -> _Layout | None:
    """Of a row of the batch; with `each`, of a group of so many channels unless channels are kept. None: more steps."""
    places = _merged([*zip(shape[2:], *(s[2:] for s in strides), strict=True)])
    channels, one = tuple(s[1] for s in strides), (1, *(0 for _ in strides))
    keep = channels[0] == 1 and all(step != 1 for _, step, *_ in places)
    if keep:
        dims = [*places, (shape[1], *channels)]
    elif each:  # of a group it does not matter which channel a value is of
        dims = _merged([(each, *channels), *places])
    else:  # a row is of one channel
        dims = [(shape[1], *channels), *[one] * (2 - len(places)), *places]
    if len(dims) > 3:
        return None
    (outer, *first), (inner, *second), (columns, *last) = [one] * (3 - len(dims)) + dims
    return _Layout(outer * inner, inner, columns, (*zip(first, second, last, strict=True),), keep)


def refuses(x: Tensor) -> str | None:
    """Why the kernels do not take x [B, C, ...], or None."""
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"takes fp16, bf16 and fp32, got {x.dtype}"
    return _refuses_layout(x.shape, x.stride())


@functools.lru_cache(maxsize=1024)
def _refuses_layout(shape: Strides, strides: Strides) -> str | None:
    layout = _layout(shape, (strides,))
    if layout is None:
        return f"takes places in two steps, got shape {tuple(shape)} with strides {strides}"
    if max(layout.rows, layout.columns) * shape[1] >= 2**31:
        return f"takes less than 2^31 values a row of the batch, got shape {tuple(shape)}"
    return None


# Sizes and strides are run-time numbers: no value of theirs makes another kernel. ALIGN says what vector loads need.
@triton.jit
def _rows(start, inner, outer_step, inner_step, R: tl.constexpr, ALIGN: tl.constexpr):
    """Where R rows begin, from row `start` on."""
    row = start + tl.arange(0, R)
    at = (row // inner).to(tl.int64) * outer_step + (row % inner).to(tl.int64) * inner_step
    return tl.multiple_of(at, ALIGN)


@triton.jit
def _columns(start, step, N: tl.constexpr, UNIT: tl.constexpr):
    """Where N columns are, from column `start` on."""
    column = start + tl.arange(0, N)
    return column if UNIT else column.to(tl.int64) * step


@triton.jit
def _load(
    x, index, column_tiles, rows, inner, columns, outer_step, inner_step, column_step,
    R: tl.constexpr, N: tl.constexpr, KEEP: tl.constexpr, UNIT: tl.constexpr,
    ALIGN: tl.constexpr, ALIGN_COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile [R, N] in fp32, which of it is there, and how many values, of all or of each column."""
    row, column = index // column_tiles * R, index % column_tiles * N
    left = tl.multiple_of(columns - column, ALIGN_COLUMNS)  # without it masks let no vectors be loaded
    there = (tl.arange(0, R) < rows - row)[:, None] & (tl.arange(0, N) < left)[None, :]
    at = _rows(row, inner, outer_step, inner_step, R, ALIGN)[:, None] + _columns(column, column_step, N, UNIT)[None, :]
    values = tl.minimum(rows - row, R)
    if not KEEP:
        values = values * tl.minimum(left, N)
    return tl.load(x + at, there, 0.0).to(tl.float32), there, values.to(tl.float32)


@triton.jit(do_not_specialize=[
    "per", "chunks", "tiles", "column_tiles", "parts", "width", "plane",
    "rows", "inner", "columns", "batch_step", "part_step", "outer_step", "inner_step", "column_step",
])  # fmt: skip
def _norm_moments(
    x, partials,
    per, chunks, tiles, column_tiles, parts, width, plane,  # per: tiles of a program; plane: partials of all
    rows, inner, columns, batch_step, part_step, outer_step, inner_step, column_step,
    R: tl.constexpr, N: tl.constexpr, KEEP: tl.constexpr, UNIT: tl.constexpr,
    ALIGN: tl.constexpr, ALIGN_COLUMNS: tl.constexpr,
):  # fmt: skip
    """partials [3, B, chunks, width] of x: counts, means, squares; width: G, or C where channels are kept apart.

    A part of x is a group, or N channels.
    """
    pid = tl.program_id(0)
    part, chunk, b = pid % parts, pid // parts % chunks, pid // parts // chunks
    x += tl.multiple_of(b.to(tl.int64) * batch_step, ALIGN) + tl.multiple_of(part.to(tl.int64) * part_step, ALIGN)
    if KEEP:
        columns = columns - part * N
    first, last = chunk * per, tl.minimum(chunk * per + per, tiles)

    # The end of a row may be a narrow tile. The one behind it begins a row: of 64 tiles, one of R rows of which as many are
    # there as in the others behind it, and R is 64 at most where a row is several tiles.
    usual = tl.where((column_tiles > 1) & (first % column_tiles == column_tiles - 1), first + 1, first)
    tile, there, values = _load(
        x, tl.minimum(usual, last - 1), column_tiles,
        rows, inner, columns, outer_step, inner_step, column_step, R, N, KEEP, UNIT, ALIGN, ALIGN_COLUMNS,
    )  # fmt: skip
    if KEEP:
        k = tl.sum(tile, 0, keep_dims=True) / values
    else:
        k = tl.sum(tile) / values
    count = 0.0
    sums, squares = tl.zeros([R, N], tl.float32), tl.zeros([R, N], tl.float32)
    for index in range(first, last):
        tile, there, values = _load(
            x, index, column_tiles,
            rows, inner, columns, outer_step, inner_step, column_step, R, N, KEEP, UNIT, ALIGN, ALIGN_COLUMNS,
        )  # fmt: skip
        count += values
        d = tl.where(there, tile - k, 0.0)
        sums += d
        squares += d * d

    to = partials + (pid // parts).to(tl.int64) * width + part * (N if KEEP else 1)
    if KEEP:
        sums, squares, k = tl.sum(sums, 0), tl.sum(squares, 0), tl.reshape(k, [N])
        to, there, count = to + tl.arange(0, N), tl.arange(0, N) < columns, tl.zeros([N], tl.float32) + count
    else:
        sums, squares, there = tl.sum(sums), tl.sum(squares), True
    tl.store(to, count, there)
    tl.store(to + plane, k + sums / count, there)
    tl.store(to + 2 * plane, tl.maximum(squares - sums * (sums / count), 0.0), there)


@triton.jit
def _partial(start, b, group, chunks, width, APART: tl.constexpr, BLOCK: tl.constexpr):
    """Where BLOCK partials of a group are, and which of them there are."""
    i = start + tl.arange(0, BLOCK)
    return (b * chunks + i // APART).to(tl.int64) * width + (group * APART + i % APART), i < chunks * APART


@triton.jit(do_not_specialize=["groups", "chunks", "width", "plane", "before_count"])
def _norm_merge(
    partials, mean_before, squares_before, mean_out, squares_out, weight, bias, scale, shift,  # or None
    eps,
    groups, chunks, width, plane, before_count,
    EACH: tl.constexpr, APART: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Mean and squares [B, G] of partials and of what was before; or scale and shift [B, C] from them.

    EACH: channels of a group. APART: partials of a group that lie side by side, its channels where they were kept apart.
    """
    pid = tl.program_id(0)
    b, group = pid // groups, pid % groups
    n, total = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    if partials is not None:
        for start in range(0, chunks * APART, BLOCK):
            at, here = _partial(start, b, group, chunks, width, APART, BLOCK)
            count = tl.load(partials + at, here, 0.0).to(tl.float64)
            n += count
            total += count * tl.load(partials + plane + at, here, 0.0).to(tl.float64)
    n, total = tl.sum(n), tl.sum(total)
    if mean_before is not None:
        earlier, mean_earlier = before_count.to(tl.float64), tl.load(mean_before + pid)
        n, total = n + earlier, total + earlier * mean_earlier
    mean = total / n
    squares = tl.zeros([BLOCK], tl.float64)
    if partials is not None:
        for start in range(0, chunks * APART, BLOCK):
            at, here = _partial(start, b, group, chunks, width, APART, BLOCK)
            count = tl.load(partials + at, here, 0.0).to(tl.float64)
            apart = tl.load(partials + plane + at, here, 0.0).to(tl.float64) - mean
            squares += tl.load(partials + 2 * plane + at, here, 0.0).to(tl.float64) + count * apart * apart
    squares = tl.sum(squares)
    if mean_before is not None:
        squares += tl.load(squares_before + pid) + earlier * (mean_earlier - mean) * (mean_earlier - mean)
    if scale is None:
        tl.store(mean_out + pid, mean)
        tl.store(squares_out + pid, squares)
    else:
        inverse = 1.0 / tl.sqrt(squares / n + eps)
        for start in tl.static_range(0, EACH, 64):
            e = start + tl.arange(0, 64)
            channel, here = group * EACH + e, e < EACH
            factor = tl.zeros([64], tl.float64) + inverse
            if weight is not None:
                factor = factor * tl.load(weight + channel, here, 0.0).to(tl.float64)
            offset = -mean * factor
            if bias is not None:
                offset = offset + tl.load(bias + channel, here, 0.0).to(tl.float64)
            tl.store(scale + b * groups * EACH + channel, factor.to(tl.float32), here)
            tl.store(shift + b * groups * EACH + channel, offset.to(tl.float32), here)


@triton.jit(do_not_specialize=[
    "row_tiles", "column_tiles", "channels", "rows", "inner", "columns",
    *(f"{x}_{step}" for x in ("x", "out") for step in ("batch", "outer", "inner", "column")),
])  # fmt: skip
def _normalise(
    x, scale, shift, out,
    row_tiles, column_tiles, channels, rows, inner, columns,
    x_batch, x_outer, x_inner, x_column, out_batch, out_outer, out_inner, out_column,
    R: tl.constexpr, N: tl.constexpr, KEEP: tl.constexpr, UNIT: tl.constexpr,
    ALIGN: tl.constexpr, ALIGN_COLUMNS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    b = pid // column_tiles // row_tiles
    row, column = pid // column_tiles % row_tiles * R, pid % column_tiles * N
    left = tl.multiple_of(columns - column, ALIGN_COLUMNS)
    rows_there, columns_there = tl.arange(0, R) < rows - row, tl.arange(0, N) < left
    there = rows_there[:, None] & columns_there[None, :]
    x += tl.multiple_of(b.to(tl.int64) * x_batch, ALIGN)
    out += tl.multiple_of(b.to(tl.int64) * out_batch, ALIGN)
    at = _rows(row, inner, x_outer, x_inner, R, ALIGN)[:, None] + _columns(column, x_column, N, UNIT)[None, :]
    to = _rows(row, inner, out_outer, out_inner, R, ALIGN)[:, None] + _columns(column, out_column, N, UNIT)[None, :]
    if KEEP:
        channel = tl.multiple_of(b * channels, ALIGN_COLUMNS) + column + tl.arange(0, N)
        factor, offset = tl.load(scale + channel, columns_there, 0.0), tl.load(shift + channel, columns_there, 0.0)
        factor, offset = factor[None, :], offset[None, :]
    else:
        channel = b * channels + (row + tl.arange(0, R)) // inner
        factor, offset = tl.load(scale + channel, rows_there, 0.0), tl.load(shift + channel, rows_there, 0.0)
        factor, offset = factor[:, None], offset[:, None]
    y = tl.load(x + at, there, 0.0).to(tl.float32) * factor + offset
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    tl.store(out + to, y.to(out.dtype.element_ty), there)


class _Cut(NamedTuple):
    """How partials of a tensor lie.

    Args:
        chunks: of a part, each a program's. width: partials of a chunk. apart: of them, of a group.
    """

    chunks: int
    width: int
    apart: int


@functools.lru_cache(maxsize=1024)
def _moments_plan(shape: Strides, strides: Strides, groups: int, device: torch.device) -> tuple[Launch, _Cut]:
    """A launch, looked up instead of worked out at every call. A plan is of one device: what is compiled is loaded there."""
    (batch, channels), each = shape[:2], shape[1] // groups
    layout = _layout(shape, (strides,), each)
    tile = layout.tile
    row_tiles, column_tiles = -(-layout.rows // tile["R"]), -(-layout.columns // tile["N"])
    if layout.keep:
        parts, part_step, tiles, column_tiles = column_tiles, tile["N"], row_tiles, 1
    else:
        parts, part_step, tiles = groups, each * strides[1], row_tiles * column_tiles
    chunks = -(-tiles // max(1, min(MOST, tiles * batch * parts // PROGRAMS)))
    per = -(-tiles // chunks)
    cut = _Cut(-(-tiles // per), *((channels, each) if layout.keep else (groups, 1)))
    steps = (strides[0] if batch > 1 else 0, part_step if parts > 1 else 0)
    numbers = (per, cut.chunks, tiles, column_tiles, parts, cut.width, batch * cut.chunks * cut.width)
    numbers += (layout.rows, layout.inner, layout.columns, *steps, *layout.steps[0])
    return Launch(batch * parts * cut.chunks, numbers, tile | layout.aligned(*steps)), cut


@functools.lru_cache(maxsize=4096)
def _merge_plan(batch: int, channels: int, groups: int, cut: _Cut, before: int, device: torch.device) -> Launch:
    """As `_moments_plan`. before: values that were counted before."""
    constants = {"EACH": channels // groups, "APART": cut.apart, "BLOCK": PARTIALS, "num_warps": 4}
    return Launch(batch * groups, (groups, cut.chunks, cut.width, batch * cut.chunks * cut.width, before), constants)


@functools.lru_cache(maxsize=1024)
def _normalise_plan(shape: Strides, strides: Strides, to: Strides, silu: bool, device: torch.device) -> Launch:
    """As `_moments_plan`."""
    layout = _layout(shape, (strides, to))
    if layout is None:
        raise ValueError(f"takes places in two steps, got shape {tuple(shape)} with strides {strides}, to {to}")
    tile = layout.tile
    row_tiles, column_tiles = -(-layout.rows // tile["R"]), -(-layout.columns // tile["N"])
    x, out = (((s[0] if shape[0] > 1 else 0), *of) for s, of in zip((strides, to), layout.steps, strict=True))
    numbers = (row_tiles, column_tiles, shape[1], layout.rows, layout.inner, layout.columns, *x, *out)
    constants = tile | layout.aligned(x[0], out[0]) | {"SILU": silu}
    return Launch(shape[0] * row_tiles * column_tiles, numbers, constants)


def _partials(x: Tensor, groups: int) -> tuple[Tensor, _Cut]:
    """[3, B, chunks, width]"""
    if x.numel() == 0 or x.ndim < 2 or x.shape[1] % groups:
        raise ValueError(f"wanted x [B, C, ...] with values, C in {groups} groups, got shape {tuple(x.shape)}")
    reason = refuses(x)
    if reason is not None:
        raise ValueError(reason)
    launch, cut = _moments_plan(x.shape, x.stride(), groups, x.device)
    partials = torch.empty((3, x.shape[0], cut.chunks, cut.width), dtype=torch.float32, device=x.device)
    with on_device_of(x):
        launch(_norm_moments, (x, partials))
    return partials, cut


def moments(x: Tensor, groups: int, before: Moments | None = None) -> Moments:
    """Of the groups of x [B, C, ...], and of what was before.

    Raises:
        ValueError: an empty x, channels that are no whole groups, or what `refuses` names.
    """
    partials, cut = _partials(x, groups)
    batch, channels = x.shape[:2]
    mean, squares = torch.empty((2, batch, groups), dtype=torch.float64, device=x.device).unbind()
    count, *given = before or (0, None, None)
    launch = _merge_plan(batch, channels, groups, cut, count, x.device)
    with on_device_of(x):
        launch(_norm_merge, (partials, *given, mean, squares, None, None, None, None), 0.0)
    return Moments(count + x.numel() // (batch * groups), mean, squares)


def affine(of: Moments, weight: Tensor | None, bias: Tensor | None, channels: int, eps: float) -> tuple[Tensor, Tensor]:
    """Scale and shift [B, C], fp32, of values with these moments. weight, bias: [C], of any float dtype, or None."""
    batch, groups = of.mean.shape
    launch = _merge_plan(batch, channels, groups, _Cut(0, 0, 1), of.count, of.mean.device)
    scale, shift = torch.empty((2, batch, channels), dtype=torch.float32, device=of.mean.device).unbind()
    with on_device_of(scale):
        launch(_norm_merge, (None, of.mean, of.squares, None, None, weight, bias, scale, shift), eps)
    return scale, shift


def normalise(x: Tensor, scale: Tensor, shift: Tensor, *, silu: bool = False, out: Tensor | None = None) -> Tensor:
    """x * scale + shift, and SiLU of it if asked for, rounded once, in x's dtype and layout.

    Args:
        x: [B, C, ...]. scale, shift: fp32 [B, C].
        out: where it goes: x's shape, x itself or memory apart from it; made where None.

    Raises:
        ValueError: an empty x, other shapes, or what `refuses` names.
    """
    if x.numel() == 0 or x.ndim < 2 or not x.shape[:2] == scale.shape == shift.shape:
        raise ValueError(
            f"wanted x [B, C, ...] with values, scale and shift [B, C], got shapes {tuple(x.shape)}, "
            f"{tuple(scale.shape)} and {tuple(shift.shape)}"
        )
    if out is None:
        out = torch.empty_like(x)
    elif out.shape != x.shape:
        raise ValueError(f"out: wanted shape {tuple(x.shape)}, got {tuple(out.shape)}")
    reason = refuses(x)
    if reason is not None:
        raise ValueError(reason)
    launch = _normalise_plan(x.shape, x.stride(), out.stride(), silu, x.device)
    with on_device_of(x):
        launch(_normalise, (x, scale.contiguous(), shift.contiguous(), out))
    return out


def group_norm(x: Tensor, norm: nn.GroupNorm, *, silu: bool = False, out: Tensor | None = None) -> Tensor:
    """`norm(x)` of x [B, C, ...], and SiLU of it if asked for, in x's dtype and layout; `out` as of `normalise`.

    Raises:
        ValueError: as `moments`; channels other than the norm's.
    """
    if x.ndim < 2 or x.shape[1] != norm.num_channels:
        raise ValueError(f"wanted x [B, {norm.num_channels}, ...], got shape {tuple(x.shape)}")
    partials, cut = _partials(x, norm.num_groups)
    batch, channels = x.shape[:2]
    scale, shift = torch.empty((2, batch, channels), dtype=torch.float32, device=x.device).unbind()
    launch = _merge_plan(batch, channels, norm.num_groups, cut, 0, x.device)
    with on_device_of(x):
        launch(_norm_merge, (partials, None, None, None, None, norm.weight, norm.bias, scale, shift), norm.eps)
    return normalise(x, scale, shift, silu=silu, out=out)
