"""The device code of `quantised_hopper`: int8 scores, exponentials in base 2, e4m3 or 16-bit values, in Gluon.

A loading warp and two or three computing warp groups, as in flash_hopper_device.py. The tiles of keys, all or those of a
list, are taken from the last to the first: only the last needs a mask, and it is met before the loop; but for lists with
LIVE, of blocks that may be filled in part anywhere. Letters as in quantised_hopper.py.

A thread of a quad owns columns 2t and 2t + 1 of every 8 of the scores, t = 0..3: "quads" are [M, N / 8, 4, 2], and a tile
has one scale for each t.

What the compiler must be kept from is said where it would happen. Registers are short: of 160 a thread with three groups,
an accumulator, scores and packed weights take 144. So a scale of keys is read while its scores are computed, not ahead.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from videoattn.kernels import operands
from videoattn.kernels.hopper_device import LN2, M, advance, barriers, number_of, tile, tiles, turn, walk, work

N = gl.constexpr(operands.KEYS)  # keys of a tile: one block of scales
OFFSET = gl.constexpr(operands.OFFSET)
BIAS = gl.constexpr(12582912.0)  # 1.5 * 2^23: the bits of BIAS + n are those of BIAS plus n, for whole n below 2^22
BIAS_BITS = gl.constexpr(0x4B400000)
BLIND_BITS = gl.constexpr(-0x800000)  # -inf
ONES_E4M3 = gl.constexpr(0x38)


# ---------------------------------------------------------------- arithmetic of one tile


@gluon.jit
def _quads(x):
    """x [M, N] as [M, N / 8, 4, 2]."""
    return x.reshape([x.shape[0], x.shape[1] // 8, 4, 2])


@gluon.jit
def _seen(x, kept):
    """Which of the quads x lie among the first `kept` keys."""
    layout: gl.constexpr = x.type.layout
    eighth = gl.arange(0, x.shape[1], gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, layout))))
    pair = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, layout))))
    one = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, layout))))
    return 2 * pair[None, None, :, None] + one[None, None, None, :] < kept - 8 * eighth[None, :, None, None]


@gluon.jit
def _softmax(s, m, l, q_scale, k_scale, kept, MASKED: gl.constexpr, SHIFT: gl.constexpr, ADD: gl.constexpr):
    """(p [M, N], new m, factor of what was summed before, l) of biased integer scores s; if ADD, p is added to l."""
    x = _quads(s)
    if MASKED:
        seen = _seen(x, kept)
        x = gl.where(seen, x, BLIND_BITS)
    # What one thread holds in one chain, of which the assembler makes threes; floats above 0 have the order of their bits.
    top = gl.convert_layout(gl.max(gl.max(x, 1), 2), l.type.layout, assert_trivial=True)
    top = (top.to(gl.float32, bitcast=True) - BIAS) * k_scale[None, :]
    new_m = gl.maximum(m, gl.max(top, 1) * q_scale)  # q_scale last: the product of the scales alone may be 0
    shrink = gl.exp2(m - new_m)
    scale = q_scale[:, None] * k_scale[None, :]
    lift = (SHIFT - new_m)[:, None] - BIAS * scale  # off by no more than the scores' last unit or two
    x = gl.fma(x.to(gl.float32, bitcast=True), scale[:, None, :, None], lift[:, None, :, None])
    if MASKED:
        x = gl.where(seen, x, float("-inf"))  # again, since -inf * scale is NaN where that is 0
    p = gl.exp2(x)
    if ADD:
        l = l * shrink[:, None] + gl.sum(gl.sum(p, 3), 1)
    return gl.convert_layout(p.reshape(s.shape), s.type.layout), new_m, shrink, l


@gluon.jit
def _packed(p, dtype: gl.constexpr, acc_layout: gl.constexpr):
    """p [M, N] rounded: 16-bit as it stands, or four e4m3 numbers in each of int32 [M, N / 4]: an 8-bit variable of a loop
    takes a register, and a wait for products does not compile with one.

    A thread of a quad owns columns {2t, 2t + 1, 8 + 2t, 9 + 2t} of 16; here they are renamed {4t ... 4t + 3}, what it must
    own of the left operand of a product. The tokens of v lie in that order.
    """
    if dtype.primitive_bitwidth == 16:
        return gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, acc_layout, 2), assert_trivial=True)
    else:
        fours = p.reshape([M, N // 16, 2, 4, 2]).permute((0, 1, 3, 2, 4)).reshape([M, N // 4, 2, 2])
        even, odd = gl.split(fours)
        p0, p2 = gl.split(even)
        p1, p3 = gl.split(odd)
        return gl.inline_asm_elementwise(
            "{.reg .b16 lo, hi; cvt.rn.satfinite.e4m3x2.f32 lo, $2, $1; cvt.rn.satfinite.e4m3x2.f32 hi, $4, $3; "
            "mov.b32 $0, {lo, hi};}",
            "=r,f,f,f,f", [p0, p1, p2, p3], dtype=gl.int32, is_pure=True, pack=1,
        )  # fmt: skip


@gluon.jit
def _operand(packed, acc_layout: gl.constexpr):
    """What `_packed` gives as the left operand of a product."""
    if packed.dtype.primitive_bitwidth == 16:
        return packed
    else:
        twice = gl.join(packed, packed)
        fours = gl.join(twice, twice).reshape([packed.shape[0], packed.shape[1] * 4])
        fours = gl.convert_layout(fours, gl.DotOperandLayout(0, acc_layout, 4), assert_trivial=True)
        return gl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r,r,r,r", [fours], dtype=gl.float8e4nv, is_pure=True, pack=4
        )


@gluon.jit
def _scores(q_tile, k_tile, start):
    """q k^T on top of `start`, started."""
    return hopper.warpgroup_mma(q_tile, k_tile.permute((1, 0)), start, is_async=True)


@gluon.jit
def _row_sums(packed, ones):
    """Sums of the rows of rounded p by the tensor cores, as a product with ones [8, N]; started."""
    BITS: gl.constexpr = 32 if packed.dtype.primitive_bitwidth == 32 else 16
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, BITS])
    nothing = gl.zeros([M, 8], gl.float32, layout)
    return hopper.warpgroup_mma(_operand(packed, layout), ones.permute((1, 0)), nothing, use_acc=False, is_async=True)


@gluon.jit
def _each(sums, like):
    """Of the eight equal columns of `_row_sums`, one for every thread of a quad."""
    one, _same = gl.split(sums.reshape([M, 4, 2]))
    return gl.convert_layout(one, like.type.layout, assert_trivial=True)


@gluon.jit
def _over_columns(rows, like):
    """A number a row, for every column of `like`."""
    return gl.convert_layout(rows, gl.SliceLayout(1, like.type.layout))[:, None]


@gluon.jit
def _part(p, v_tile, START: gl.constexpr, COLUMNS: gl.constexpr):
    """p v of some columns, in an accumulator of its own, started."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 32])
    nothing = gl.zeros([M, COLUMNS], gl.float32, layout)
    v_part = v_tile.slice(START, COLUMNS, 0).permute((1, 0))
    return hopper.warpgroup_mma(p, v_part, nothing, use_acc=False, is_async=True)


@gluon.jit
def _add_part(acc, shrink, part):
    """acc * shrink + part, in registers: the tensor cores keep 14 bits of a sum of e4m3 products."""
    return acc * _over_columns(shrink, acc) + gl.convert_layout(part, acc.type.layout, assert_trivial=True)


@gluon.jit
def _add_e4m3(acc, l, shrink, packed, v_tile, ones, full, phase, ADD: gl.constexpr):
    """acc * shrink + p v, done, as soon as `full` tells that v is there; and l * shrink + sum p unless ADD, when it was
    added already. 64 columns at a time, for want of registers."""
    COLUMNS: gl.constexpr = 64
    PARTS: gl.constexpr = acc.shape[1] // COLUMNS
    p = _operand(packed, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 32]))
    if PARTS == 1:
        acc0 = acc
    else:
        acc0, acc1 = gl.split(acc.reshape([M, 2, COLUMNS]).permute((0, 2, 1)))
    mbarrier.wait(full, phase)
    if ADD:
        part = hopper.warpgroup_mma_wait(0, [_part(p, v_tile, 0, COLUMNS)])
    else:
        sums = _row_sums(packed, ones)
        part, sums = hopper.warpgroup_mma_wait(0, [_part(p, v_tile, 0, COLUMNS), sums])
        l = l * shrink[:, None] + _each(sums, l)
    acc0 = _add_part(acc0, shrink, part)
    if PARTS == 1:
        return acc0, l
    else:
        mbarrier.wait(full, phase)  # passed above: a block that ends here keeps the second half behind the first sum
        part = hopper.warpgroup_mma_wait(0, [_part(p, v_tile, COLUMNS, COLUMNS)])
        both = gl.join(acc0, _add_part(acc1, shrink, part)).permute((0, 2, 1)).reshape(acc.shape)
        return gl.convert_layout(both, acc.type.layout, assert_trivial=True), l


@gluon.jit
def _ones(dtype: gl.constexpr):
    """A tile of ones [8, N] of v's type."""
    BITS: gl.constexpr = dtype.primitive_bitwidth
    layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=BITS, rank=2)
    threads: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [1, 4], [1, 0])
    made = gl.allocate_shared_memory(dtype, [8, N], layout)
    if BITS == 8:
        made._reinterpret(gl.int8, [8, N], layout).store(gl.full([8, N], ONES_E4M3, gl.int8, threads))
    else:
        made.store(gl.full([8, N], 1.0, gl.float32, threads).to(dtype))
    hopper.fence_async_shared()
    return made


@gluon.jit
def _raise_flag(x, flag):
    """Store 1 where an element of x (fp32) is not finite: zero times either is NaN. A maximum would pass over NaN, and
    among integers or in 16 bits the same takes registers that the loop over the tiles then spills."""
    bad = (gl.sum(gl.sum(_quads(x * 0.0), 3), 1) != 0.0).to(gl.int32)
    gl.store(flag + 0 * bad, bad, mask=bad != 0)


# ---------------------------------------------------------------- a loading warp, two or three computing groups


@gluon.jit
def _load_tile(desc, at, smem, full, empty, slot, phase):
    """One tile from memory into its place in the ring, as soon as that is empty; `full` tells when it has come."""
    mbarrier.wait(empty.index(slot), phase)
    mbarrier.expect(full.index(slot), desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, at, full.index(slot), smem.index(slot))


@gluon.jit
def _load_values(desc, batch, head, row, smem, full, empty, slot, phase):
    if desc.dtype.primitive_bitwidth == 8:
        _load_tile(desc, [batch, head, 0, row], smem, full, empty, slot, phase)
    else:
        _load_tile(desc, [batch, head, row, 0], smem, full, empty, slot, phase)


@gluon.jit
def _load(task, HAS_LENS: gl.constexpr, BLOCKS: gl.constexpr):
    """The loader: tiles of q, k and v from memory into shared memory, as places fall empty; k one tile ahead of v."""
    q_desc, k_desc, v_desc, smem, full, empty, counts, lists, kv_group, pieces = task
    q_smem, k_smem, v_smem, _o_smem = smem
    q_full, k_full, v_full = full
    q_empty, k_empty, v_empty = empty
    GROUPS: gl.constexpr = q_smem.shape[0]
    STAGES: gl.constexpr = k_smem.shape[0]

    slot = 0
    phase = 1  # of a new barrier the phase before the first counts as complete: every place is empty
    q_phase = 1
    # Not in the loop over the pieces: two variables of an inner loop that start as the same value are taken for one.
    v_slot = slot
    v_phase = phase
    for index in range(gl.program_id(0), pieces, gl.num_programs(0)):
        batch, head, q_tile, keys, steps = work(index, counts, N, HAS_LENS)
        keys, steps, numbers = walk(batch, head, q_tile, keys, steps, lists, BLOCKS)
        v_row = 0
        kv_head = head // kv_group
        for group in gl.static_range(GROUPS):
            row = (q_tile * GROUPS + group) * M
            _load_tile(q_desc, [batch, head, row, 0], q_smem, q_full, q_empty, group, q_phase)
        q_phase ^= 1
        for step in range(steps):
            row = number_of(numbers, steps - 1 - step, BLOCKS) * N
            _load_tile(k_desc, [batch, kv_head, row, 0], k_smem, k_full, k_empty, slot, phase)
            if step > 0:
                _load_values(v_desc, batch, kv_head, v_row, v_smem, v_full, v_empty, v_slot, v_phase)
            v_slot = slot
            v_phase = phase
            v_row = row
            slot, phase = advance(slot, phase, STAGES)
        _load_values(v_desc, batch, kv_head, v_row, v_smem, v_full, v_empty, v_slot, v_phase)


@gluon.jit
def _attend(
    task, HAS_LENS: gl.constexpr, BLOCKS: gl.constexpr, LIVE: gl.constexpr, HAS_LSE: gl.constexpr, HAS_FLAG: gl.constexpr,
    ADD: gl.constexpr, TURNS: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """One warp group: attention of the GROUP-th M queries of every piece of work. ADD: weights are summed as they are, by
    the threads; else as they are rounded, by the tensor cores."""
    o_desc, smem, full, empty, counts, lists, live, pieces, q_len, kv_group, scales, ones, lse, lse_shift, flag = task
    q_smem, k_smem, v_smem, o_smem = smem
    q_full, k_full, v_full = full
    q_empty, k_empty, v_empty = empty
    q_scales, k_scales, v_scales, blocks = scales
    q_tiles, heads, _kv_len, _kv_lens = counts
    GROUPS: gl.constexpr = q_smem.shape[0]
    STAGES: gl.constexpr = k_smem.shape[0]
    D: gl.constexpr = k_smem.shape[4]
    V: gl.constexpr = v_smem.dtype
    V8: gl.constexpr = V.primitive_bitwidth == 8
    SHIFT: gl.constexpr = OFFSET if V8 else 0.0
    NEXT: gl.constexpr = (GROUP + 1) % GROUPS
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 32])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 32 if V8 else 16])
    # The layout of an expression is no constant until it has a name.
    quads_layout: gl.constexpr = gl.zeros([M, N], gl.float32, s_layout).reshape([M, N // 8, 4, 2]).type.layout
    own_layout: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, quads_layout))
    row_layout: gl.constexpr = gl.SliceLayout(1, own_layout)

    start = gl.full([M, N], BIAS_BITS, gl.int32, s_layout)
    slot = 0
    phase = 0
    q_phase = 0
    if TURNS and GROUP == GROUPS - 1:
        turn("arrive", 0)
    for index in range(gl.program_id(0), pieces, gl.num_programs(0)):
        batch, head, q_tile, keys, steps = work(index, counts, N, HAS_LENS)
        keys, steps, numbers = walk(batch, head, q_tile, keys, steps, lists, BLOCKS)
        number = number_of(numbers, steps - 1, BLOCKS)
        left = keys - number * N
        if LIVE:
            left = gl.minimum(left, gl.load(live + number))
        row = (q_tile * GROUPS + GROUP) * M
        q_rows = (index // q_tiles).to(gl.int64) * q_len
        kv_head = batch * (heads // kv_group) + head // kv_group
        k_first = k_scales + kv_head.to(gl.int64) * blocks * 4 + gl.arange(0, 4, gl.SliceLayout(0, own_layout))
        k_at = k_first + number * 4
        rows = row + gl.arange(0, M, row_layout)
        q_scale = gl.load(q_scales + q_rows + rows, mask=rows < q_len, other=1.0)
        k_scale = gl.load(k_at)
        mbarrier.wait(q_full.index(GROUP), q_phase)
        q_phase ^= 1
        m = gl.full([M], -1e30, gl.float32, row_layout)  # finite also where no key is left
        l = gl.zeros([M, 4], gl.float32, own_layout)
        acc = gl.zeros([M, D], gl.float32, acc_layout)

        mbarrier.wait(k_full.index(slot), phase)
        if TURNS:
            turn("sync", GROUP)
        s = _scores(tile(q_smem, GROUP), tile(k_smem, slot), start)
        if TURNS:
            turn("arrive", NEXT)
        s = hopper.warpgroup_mma_wait(0, [s])
        mbarrier.arrive(k_empty.index(slot))
        p, m, shrink, l = _softmax(s, m, l, q_scale, k_scale, left, True, SHIFT, ADD)
        packed = _packed(p, V, acc_layout)
        if not V8:
            mbarrier.wait(v_full.index(slot), phase)

        for step in range(1, steps):
            next_slot, next_phase = advance(slot, phase, STAGES)
            if BLOCKS:
                number = number_of(numbers, steps - 1 - step, BLOCKS)
                k_at = k_first + number * 4
                if LIVE:
                    left = gl.load(live + number)
            else:
                k_at -= 4
            if V8:
                acc, l = _add_e4m3(acc, l, shrink, packed, tile(v_smem, slot), ones, v_full.index(slot), phase, ADD)
                mbarrier.arrive(v_empty.index(slot))
                mbarrier.wait(k_full.index(next_slot), next_phase)
                s = _scores(tile(q_smem, GROUP), tile(k_smem, next_slot), start)
                k_scale = gl.load(k_at)
                s = hopper.warpgroup_mma_wait(0, [s])
                mbarrier.arrive(k_empty.index(next_slot))
                p, m, shrink, l = _softmax(s, m, l, q_scale, k_scale, left, LIVE, SHIFT, ADD)
                packed = _packed(p, V, acc_layout)
            else:
                mbarrier.wait(k_full.index(next_slot), next_phase)
                if TURNS:
                    turn("sync", GROUP)
                s = _scores(tile(q_smem, GROUP), tile(k_smem, next_slot), start)
                k_scale = gl.load(k_at)
                acc = hopper.warpgroup_mma(packed, tile(v_smem, slot), acc, is_async=True)
                if not ADD:
                    sums = _row_sums(packed, ones)
                if TURNS:
                    turn("arrive", NEXT)
                s = hopper.warpgroup_mma_wait(1 if ADD else 2, [s])
                mbarrier.arrive(k_empty.index(next_slot))
                p, m, shrink, l = _softmax(s, m, l, q_scale, k_scale, left, LIVE, SHIFT, ADD)
                # Before the wait for acc, and not where v is used: it ends a block of instructions, which the assembler
                # would else reorder so that the exponentials start after acc is complete.
                mbarrier.wait(v_full.index(next_slot), next_phase)
                if ADD:
                    acc = hopper.warpgroup_mma_wait(0, [acc])
                else:
                    acc, sums = hopper.warpgroup_mma_wait(0, [acc, sums])
                    l = (l + _each(sums, l)) * shrink[:, None]
                mbarrier.arrive(v_empty.index(slot))
                acc *= _over_columns(shrink, acc)
                # Behind the wait: products in flight read the registers of the last one, and would be serialised.
                packed = _packed(p, V, acc_layout)
            slot = next_slot
            phase = next_phase

        mbarrier.arrive(q_empty.index(GROUP))
        if V8:
            acc, l = _add_e4m3(acc, l, shrink, packed, tile(v_smem, slot), ones, v_full.index(slot), phase, ADD)
        else:
            acc = hopper.warpgroup_mma(packed, tile(v_smem, slot), acc, is_async=True)
            if ADD:
                acc = hopper.warpgroup_mma_wait(0, [acc])
            else:
                acc, sums = hopper.warpgroup_mma_wait(0, [acc, _row_sums(packed, ones)])
                l += _each(sums, l)
        mbarrier.arrive(v_empty.index(slot))
        slot, phase = advance(slot, phase, STAGES)

        total = gl.sum(l, 1) if ADD else gl.max(l, 1)  # of equal numbers
        if HAS_LSE:
            shift = gl.load(lse_shift + q_rows + rows, mask=rows < q_len, other=0.0)
            gl.store(lse + q_rows + rows, (m + gl.log2(total) - SHIFT) * LN2 + shift, mask=rows < q_len)
        x = acc * _over_columns(1.0 / gl.where(total == 0.0, 1.0, total), acc)
        if V8:
            x *= gl.load(v_scales + kv_head * D + gl.arange(0, D, gl.SliceLayout(0, acc_layout)))[None, :]
        if HAS_FLAG:
            _raise_flag(x, flag)
        tma.store_wait(0)
        tile(o_smem, GROUP).store(x.to(o_desc.dtype))
        hopper.fence_async_shared()
        tma.async_copy_shared_to_global(o_desc, [batch, head, row, 0], o_smem.index(GROUP))
    tma.store_wait(0)


@gluon.jit(
    do_not_specialize=[
        "q_len", "kv_len", "heads", "kv_group", "q_tiles", "pieces", "blocks", "list_sb", "list_sh", "k_tiles",
    ],
    do_not_specialize_on_alignment=[
        "q_scale", "k_scale", "v_scale", "lse", "lse_shift", "kv_lens", "list_counts", "list_indices", "live", "flag",
    ],
)  # fmt: skip
def forward(
    q_desc, k_desc, v_desc, o_desc, q_scale, k_scale, v_scale, lse, lse_shift, kv_lens,
    list_counts, list_indices, live, flag,
    q_len, kv_len, heads, kv_group, q_tiles, pieces, blocks, list_sb, list_sh, k_tiles,
    HAS_LENS: gl.constexpr, BLOCKS: gl.constexpr, LIVE: gl.constexpr, HAS_LSE: gl.constexpr, HAS_FLAG: gl.constexpr,
    ADD: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr, TURNS: gl.constexpr,
    REGISTERS: gl.constexpr, LOADER_REGISTERS: gl.constexpr,
):  # fmt: skip
    smem = (tiles(q_desc, GROUPS), tiles(k_desc, STAGES), tiles(v_desc, STAGES), tiles(o_desc, GROUPS))
    full = (barriers(GROUPS, 1), barriers(STAGES, 1), barriers(STAGES, 1))
    empty = (barriers(GROUPS, 1), barriers(STAGES, GROUPS), barriers(STAGES, GROUPS))
    if ADD:
        ones = smem[3]  # not used: p is added as it was before it is rounded
    else:
        ones = _ones(v_desc.dtype)
    counts = (q_tiles, heads, kv_len, kv_lens)
    scales = (q_scale, k_scale, v_scale, blocks)
    lists = (list_counts, list_indices, list_sb, list_sh, k_tiles)
    load = (q_desc, k_desc, v_desc, smem, full, empty, counts, lists, kv_group, pieces)
    attend = (
        o_desc, smem, full, empty, counts, lists, live, pieces, q_len, kv_group, scales, ones, lse, lse_shift, flag,
    )  # fmt: skip
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_attend, (attend, HAS_LENS, BLOCKS, LIVE, HAS_LSE, HAS_FLAG, ADD, TURNS, 0)),
                (_attend, (attend, HAS_LENS, BLOCKS, LIVE, HAS_LSE, HAS_FLAG, ADD, TURNS, 1)),
                (_load, (load, HAS_LENS, BLOCKS)),
            ],
            [4, 1],
            [REGISTERS, LOADER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (_attend, (attend, HAS_LENS, BLOCKS, LIVE, HAS_LSE, HAS_FLAG, ADD, TURNS, 0)),
                (_attend, (attend, HAS_LENS, BLOCKS, LIVE, HAS_LSE, HAS_FLAG, ADD, TURNS, 1)),
                (_attend, (attend, HAS_LENS, BLOCKS, LIVE, HAS_LSE, HAS_FLAG, ADD, TURNS, 2)),
                (_load, (load, HAS_LENS, BLOCKS)),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, LOADER_REGISTERS],
        )
