"""What both kernels for Hopper are made of: one warp loads tiles into a ring of shared memory, groups of four compute.

Letters as in flash_hopper.py.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

M = gl.constexpr(64)  # queries of a warp group
LN2 = gl.constexpr(0.6931471805599453)
FIRST_TURN = gl.constexpr(8)  # named barriers: the compiler takes the lowest for itself


@gluon.jit
def turn(ACT: gl.constexpr, GROUP: gl.constexpr):
    """ACT "sync": wait for the turn of GROUP. ACT "arrive": give it. 256 threads: the two groups that meet."""
    asm: gl.constexpr = f"bar.{ACT} {FIRST_TURN + GROUP}, 256; mov.b32 $0, 0;"
    gl.inline_asm_elementwise(asm, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def advance(slot, phase, STAGES: gl.constexpr):
    """The next place in the ring; the phase flips once round."""
    last = slot == STAGES - 1
    return gl.where(last, 0, slot + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def work(index, counts, N: gl.constexpr, HAS_LENS: gl.constexpr):
    """(batch, head, tile of queries, keys, tiles of keys) of a piece of work; a row without keys gets one masked tile."""
    q_tiles, heads, kv_len, kv_lens = counts
    batch = index // q_tiles // heads
    keys = kv_len
    if HAS_LENS:
        keys = gl.minimum(gl.load(kv_lens + batch), kv_len)
    return batch, index // q_tiles % heads, index % q_tiles, keys, gl.maximum(gl.cdiv(keys, N), 1)


@gluon.jit
def walk(batch, head, q_tile, keys, steps, lists, BLOCKS: gl.constexpr):
    """(keys that count, tiles of keys to visit, where their numbers stand): the first `steps`, or those of a list, of which
    the last one is visited first. An empty list visits one tile, of which no key counts."""
    counts, indices, stride_b, stride_h, k_tiles = lists
    numbers = indices
    if BLOCKS:
        at = batch.to(gl.int64) * stride_b + head * stride_h + q_tile
        count = gl.load(counts + at)
        numbers += at * k_tiles
        steps = gl.maximum(count, 1)
        keys = gl.where(count == 0, 0, keys)
    return keys, steps, numbers


@gluon.jit
def number_of(numbers, left, BLOCKS: gl.constexpr):
    """The number of the tile after which `left` are left to visit."""
    if BLOCKS:
        left = gl.load(numbers + left)
    return left


@gluon.jit
def tile(smem, slot):
    """The tile in one place, as a matrix."""
    return smem.index(slot).reshape([smem.shape[3], smem.shape[4]])


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """COUNT barriers that are complete after ARRIVALS each."""
    made = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(made.index(i), count=ARRIVALS)
    return made


@gluon.jit
def tiles(desc, COUNT: gl.constexpr):
    """Room for COUNT tiles."""
    return gl.allocate_shared_memory(desc.dtype, [COUNT] + desc.block_shape, desc.layout)
