"""The device code of `quantised_hopper`: int8 scores, exponentials in base 2, e4m3 or 16-bit values, in Gluon.

Two kernels share the arithmetic. `forward`: a loading warp and two or three computing warp groups, persistent, heads
outermost, as in flash_hopper_device.py, whose comments on the compiler hold here too. `forward_small`: one group of four
warps that loads for itself, several programs a processor. Tiles of keys are taken from the last to the first: only the last
needs a mask, and it is met before the loop. Letters as in quantised_hopper.py.

A thread of a quad owns columns 2t and 2t + 1 of every 8 of the scores: k_scale has one number for it.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from videoattn.kernels.flash_hopper_device import _advance, _barriers, _tile, _tiles, _turn, _work

M = gl.constexpr(64)
LN2 = gl.constexpr(0.6931471805599453)
KEYS_A_SCALE = gl.constexpr(128)
BIAS = gl.constexpr(12582912.0)  # 1.5 * 2^23: the bits of BIAS + n are those of BIAS plus n, for whole n below 2^22
BIAS_BITS = gl.constexpr(0x4B400000)




@gluon.constexpr_function
def _skipping(count):
    """PTX: `count` numbers times their factors, where a factor of rows r or r + 8 is not 1 in any thread of the warp."""
    products = " ".join(f"mul.f32 ${i}, ${i}, ${2 * count + i};" for i in range(count))
    return (
        f"{{ .reg .pred a, b; setp.neu.f32 a, ${2 * count}, 0f3F800000; setp.neu.or.f32 b, ${2 * count + 2}, "
        f"0f3F800000, a; vote.sync.any.pred b, b, 0xffffffff; @!b bra DONE; {products} DONE: }}"
    )


@gluon.constexpr_function
def _constraints(count):
    return ",".join(["=f"] * count + [str(i) for i in range(count)] + ["f"] * count)


# ---------------------------------------------------------------- arithmetic of one tile


@gluon.jit
def _float(s, START: gl.constexpr):
    """Integer scores s as floats on top of BIAS."""
    if not START:
        s = s + BIAS_BITS
    return s.to(gl.float32, bitcast=True)


@gluon.jit
def _quads(x):
    """x [M, N] as [M, N / 8, 4, 2]."""
    return x.reshape([x.shape[0], x.shape[1] // 8, 4, 2])


@gluon.jit
def _seen(x, kept):
    """Which of the quads x lie among the first `kept` keys."""
    eighth = gl.arange(0, x.shape[1], gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, x.type.layout))))
    pair = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, x.type.layout))))
    one = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, x.type.layout))))
    return 2 * pair[None, None, :, None] + one[None, None, None, :] < kept - 8 * eighth[None, :, None, None]


@gluon.jit
def _top(s, k_scale, kept, MASKED: gl.constexpr, START: gl.constexpr, MAXI: gl.constexpr):
    """Greatest score [M, 4] of every thread of a quad, times k_scale."""
    if MAXI and not MASKED and START:
        x = _quads(s)
        top = gl.max(gl.max(x, 1), 2).to(gl.float32, bitcast=True)  # the assembler makes threes of one long chain
        top = gl.convert_layout(top, gl.SliceLayout(1, gl.SliceLayout(3, x.type.layout)), assert_trivial=True)
    else:
        x = _quads(_float(s, START))
        if MASKED:
            x = gl.where(_seen(x, kept), x, float("-inf"))
        top = gl.max(gl.max(x, 3), 1)
    return (top - BIAS) * k_scale[None, :]


@gluon.jit
def _exp2_by_polynomial(x):
    """2^x to 0.2 %, and no less than 2^-100: the whole part goes into the exponent's bits, the rest is in [-1/2, 1/2]."""
    x = gl.maximum(x, -100.0)
    whole = x + BIAS
    rest = x - (whole - BIAS)
    p = 1.0004431589771068 + rest * (0.703448408569828 + rest * 0.23842913594485232)
    bits = p.to(gl.int32, bitcast=True) + (whole.to(gl.int32, bitcast=True) << 23)
    return bits.to(gl.float32, bitcast=True)


@gluon.jit
def _weights(
    s, m, q_scale, k_scale, kept, OFFSET: gl.constexpr, MASKED: gl.constexpr, START: gl.constexpr, POLY: gl.constexpr = 0
):
    """p = 2^(s - m + OFFSET) as quads."""
    scale = q_scale[:, None] * k_scale[None, :]
    lift = (OFFSET - m)[:, None] - BIAS * scale  # rounds BIAS * scale by no more than half a unit of s
    x = _quads(_float(s, START))
    x = gl.fma(x, scale[:, None, :, None], lift[:, None, :, None])
    if MASKED:
        x = gl.where(_seen(x, kept), x, float("-inf"))
    if POLY and not MASKED:
        eighth = gl.arange(0, x.shape[1], gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, x.type.layout))))
        return gl.where(eighth[None, :, None, None] % 8 < POLY, _exp2_by_polynomial(x), gl.exp2(x))
    return gl.exp2(x)


@gluon.jit
def _lane_sums(p):
    return gl.sum(gl.sum(p, 3), 1)


@gluon.jit
def _softmax(
    s, m, l, q_scale, k_scale, kept,
    OFFSET: gl.constexpr, MASKED: gl.constexpr, START: gl.constexpr, MAXI: gl.constexpr, SUM: gl.constexpr,
    POLY: gl.constexpr,
):  # fmt: skip
    """(p [M, N], new m, factor of what was summed before, new l) of integer scores s [M, N]."""
    top = _top(s, k_scale, kept, MASKED, START, MAXI)
    new_m = gl.maximum(m, gl.max(top, 1) * q_scale)  # q_scale last: the product of the scales alone may be 0
    shrink = gl.exp2(m - new_m)
    p = _weights(s, new_m, q_scale, k_scale, kept, OFFSET, MASKED, START, POLY)
    if SUM == "add":
        l = l * shrink[:, None] + _lane_sums(p)
    return gl.convert_layout(p.reshape(s.shape), s.type.layout), new_m, shrink, l


@gluon.jit
def _packed(p, dtype: gl.constexpr, acc_layout: gl.constexpr, FIXED: gl.constexpr = False):
    """p [M, N] rounded: 16-bit as it stands, or four e4m3 numbers in each of int32 [M, N / 4], since 8-bit variables of a
    loop get a register each.

    A thread of a quad owns columns {2t, 2t + 1, 8 + 2t, 9 + 2t} of 16; here they are renamed {4t ... 4t + 3}, what it must
    own of the left operand of a product. The tokens of v lie in that order.
    """
    if dtype.primitive_bitwidth == 16:
        return gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, acc_layout, 2), assert_trivial=True)
    else:
        rows: gl.constexpr = p.shape[0]
        columns: gl.constexpr = p.shape[1]
        fours = p.reshape([rows, columns // 16, 2, 4, 2]).permute((0, 1, 3, 2, 4)).reshape([rows, columns // 4, 2, 2])
        even, odd = gl.split(fours)
        p0, p2 = gl.split(even)
        p1, p3 = gl.split(odd)
        return gl.inline_asm_elementwise(
            "{.reg .b16 lo, hi; cvt.rn.satfinite.e4m3x2.f32 lo, $2, $1; cvt.rn.satfinite.e4m3x2.f32 hi, $4, $3; "
            "mov.b32 $0, {lo, hi};}",
            "=r,f,f,f,f", [p0, p1, p2, p3], dtype=gl.int32, is_pure=not FIXED, pack=1,
        )  # fmt: skip


@gluon.jit
def _operand(packed, acc_layout: gl.constexpr):
    """What `_packed` gives as the left operand of a product."""
    if packed.dtype.primitive_bitwidth == 16:
        return packed
    else:
        columns: gl.constexpr = packed.shape[1] * 4
        twice = gl.join(packed, packed)
        fours = gl.join(twice, twice).reshape([packed.shape[0], columns])
        fours = gl.convert_layout(fours, gl.DotOperandLayout(0, acc_layout, 4), assert_trivial=True)
        return gl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r,r,r,r", [fours], dtype=gl.float8e4nv, is_pure=True, pack=4
        )


@gluon.jit
def _scores(q_tile, k_tile, start, START: gl.constexpr):
    """q k^T, started; on top of `start` where that holds the bias."""
    return hopper.warpgroup_mma(q_tile, k_tile.permute((1, 0)), start, use_acc=START, is_async=True)


@gluon.jit
def _values(p, v_tile, acc, FRESH: gl.constexpr):
    """p v where FRESH, else acc + p v, started."""
    if p.dtype.primitive_bitwidth == 8:
        v_tile = v_tile.permute((1, 0))
    return hopper.warpgroup_mma(p, v_tile, acc, use_acc=not FRESH, is_async=True)


@gluon.jit
def _values_on(p, v_tile, acc, kept):
    """p v, on top of acc where `kept`, started; 8-bit."""
    return hopper.warpgroup_mma(p, v_tile.permute((1, 0)), acc, use_acc=kept, is_async=True)


@gluon.jit
def _flush(kept_acc, acc, fade):
    """kept_acc * fade + acc, kept; every thread has its own numbers there."""
    layout: gl.constexpr = acc.type.layout
    kept_acc.store(kept_acc.load(layout) * _over_columns(fade, acc) + acc)


@gluon.jit
def _ones_times(packed, ones, sums, FRESH: gl.constexpr):
    """Sums of p's rows by the tensor cores, started."""
    bits: gl.constexpr = 32 if packed.dtype.primitive_bitwidth == 32 else 16
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [packed.shape[0] // 16, 1], [16, 8, bits])
    return hopper.warpgroup_mma(
        _operand(packed, layout), ones.permute((1, 0)), sums, use_acc=not FRESH, is_async=True
    )


@gluon.jit
def _over_columns(rows, like):
    """A number a row, for every column of `like`."""
    return gl.convert_layout(rows, gl.SliceLayout(1, like.type.layout))[:, None]


@gluon.jit
def _rescaled(acc, shrink, SKIP: gl.constexpr):
    """acc * shrink; with SKIP a warp passes over it where no row of its own has a new maximum."""
    rows = _over_columns(shrink, acc)
    if SKIP:
        COUNT: gl.constexpr = acc.shape[1] // 2  # registers of a thread: rows r and r + 8, by turns of two
        TEXT: gl.constexpr = _skipping(COUNT)
        CONSTRAINTS: gl.constexpr = _constraints(COUNT)
        rows = rows.broadcast_to(acc.shape)
        return gl.inline_asm_elementwise(TEXT, CONSTRAINTS, [acc, rows], dtype=gl.float32, is_pure=True, pack=COUNT)
    else:
        return acc * rows


@gluon.jit
def _add_tile(acc, l, shrink, packed, v_tile, ones, full, phase, PARTS: gl.constexpr, SUM: gl.constexpr):
    """acc * shrink + p v, done, and l likewise; with PARTS 2 one half of the columns after the other, for want of registers."""
    V8: gl.constexpr = packed.dtype.primitive_bitwidth == 32
    rows: gl.constexpr = acc.shape[0]
    width: gl.constexpr = acc.shape[1] // PARTS
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [rows // 16, 1], [16, width, 32 if V8 else 16])
    nothing = gl.zeros([rows, width], gl.float32, layout)
    if SUM == "mma":
        l_layout: gl.constexpr = l.type.layout
        sums = _ones_times(packed, ones, gl.zeros([rows, 8], gl.float32, l_layout), True)
    if PARTS == 1:
        partial = _values(_operand(packed, layout), v_tile, nothing, True)
        if SUM == "mma":
            partial, sums = hopper.warpgroup_mma_wait(0, [partial, sums])
            l = l * _over_columns(shrink, l) + sums
        else:
            partial = hopper.warpgroup_mma_wait(0, [partial])
        return acc * _over_columns(shrink, acc) + partial, l
    else:
        acc0, acc1 = gl.split(acc.reshape([rows, 2, width]).permute((0, 2, 1)))
        p = _operand(packed, layout)
        partial = _values(p, v_tile.slice(0, width, 0 if V8 else 1), nothing, True)
        if SUM == "mma":
            partial, sums = hopper.warpgroup_mma_wait(0, [partial, sums])
            l = l * _over_columns(shrink, l) + sums
        else:
            partial = hopper.warpgroup_mma_wait(0, [partial])
        partial = gl.convert_layout(partial, acc0.type.layout, assert_trivial=True)
        acc0 = acc0 * _over_columns(shrink, acc0) + partial
        mbarrier.wait(full, phase)  # passed long ago; the end of a block keeps the second half behind the first sum
        partial = _values(p, v_tile.slice(width, width, 0 if V8 else 1), nothing, True)
        partial = gl.convert_layout(hopper.warpgroup_mma_wait(0, [partial]), acc0.type.layout, assert_trivial=True)
        acc1 = acc1 * _over_columns(shrink, acc1) + partial
        both = gl.join(acc0, acc1).permute((0, 2, 1)).reshape(acc.shape)
        return gl.convert_layout(both, acc.type.layout, assert_trivial=True), l


@gluon.jit
def _scales_of_keys(k_scales, step, steps, blocks, N: gl.constexpr, layout: gl.constexpr):
    """The four scales of the tile met at `step`, or of the first keys behind the last step."""
    block = gl.minimum(gl.maximum(steps - 1 - step, 0) * N // KEYS_A_SCALE, blocks - 1)
    return gl.load(k_scales + block * 4 + gl.arange(0, 4, layout))


@gluon.jit
def _finish(acc, m, l, v_scales, lse, lse_shift, row, q_len, dtype: gl.constexpr, OFFSET: gl.constexpr,
            HAS_LSE: gl.constexpr, V8: gl.constexpr, SUM: gl.constexpr):  # fmt: skip
    """The output [M, D] of one piece of work; its log-sum-exp is stored."""
    if SUM == "mma":
        total = gl.convert_layout(gl.max(l, 1), m.type.layout)
    else:
        total = gl.sum(l, 1)
    if HAS_LSE:
        rows = row + gl.arange(0, acc.shape[0], total.type.layout)
        shift = gl.load(lse_shift + rows, mask=rows < q_len, other=0.0)
        gl.store(lse + rows, (m + gl.log2(total) - OFFSET) * LN2 + shift, mask=rows < q_len)
    inverse = 1.0 / gl.where(total == 0.0, 1.0, total)
    out = acc * _over_columns(inverse, acc)
    if V8:
        out *= gl.load(v_scales + gl.arange(0, acc.shape[1], gl.SliceLayout(0, acc.type.layout)))[None, :]
    return out.to(dtype)


@gluon.jit
def _raise_flag(out, flag):
    finite = gl.min((gl.abs(out.to(gl.float32)) < float("inf")).to(gl.int32), 1)  # NaN fails every comparison
    zeros = gl.full([out.shape[0]], 0, gl.int32, gl.SliceLayout(1, out.type.layout))
    gl.store(flag + zeros, 1 - finite, mask=finite == 0)


@gluon.jit
def _ones(desc, N: gl.constexpr):
    """A tile of ones [8, N] of v's type, whose product with p is the sums of its rows."""
    bits: gl.constexpr = desc.dtype.primitive_bitwidth
    layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=bits, rank=2)
    tile = gl.allocate_shared_memory(desc.dtype, [8, N], layout)
    threads: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [1, gl.num_warps()], [1, 0])
    if bits == 8:
        as_bits = tile._reinterpret(gl.int8, [8, N], layout)
        as_bits.store(gl.full([8, N], 0x38, gl.int8, threads))
    else:
        tile.store(gl.full([8, N], 1.0, gl.float32, threads).to(desc.dtype))
    hopper.fence_async_shared()
    return tile


# ---------------------------------------------------------------- a loading warp, two or three computing groups


@gluon.jit
def _load_tile(desc, at, smem, full, empty, slot, phase):
    """One tile from memory into its place in the ring, as soon as that is empty; `full` tells when it has come."""
    mbarrier.wait(empty.index(slot), phase)
    mbarrier.expect(full.index(slot), desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, at, full.index(slot), smem.index(slot))


@gluon.jit
def _load_values(desc, batch, head, row, smem, full, empty, slot, phase, V8: gl.constexpr):
    if V8:
        _load_tile(desc, [batch, head, 0, row], smem, full, empty, slot, phase)
    else:
        _load_tile(desc, [batch, head, row, 0], smem, full, empty, slot, phase)


@gluon.jit
def _load(task, HAS_LENS: gl.constexpr, N: gl.constexpr, V8: gl.constexpr, PAIR: gl.constexpr):
    """The loader: tiles of q, k and v from memory into shared memory, as places fall empty."""
    q_desc, k_desc, v_desc, smem, full, empty, counts, kv_group, pieces = task
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
        batch, head, q_tile, _keys, steps = _work(index, counts, N, HAS_LENS)
        if PAIR:
            steps = (steps + 1) // 2 * 2
        kv_head = head // kv_group
        for group in gl.static_range(GROUPS):
            row = (q_tile * GROUPS + group) * M
            _load_tile(q_desc, [batch, head, row, 0], q_smem, q_full, q_empty, group, q_phase)
        q_phase ^= 1
        for step in range(steps):
            row = (steps - 1 - step) * N
            _load_tile(k_desc, [batch, kv_head, row, 0], k_smem, k_full, k_empty, slot, phase)
            if step > 0:
                _load_values(v_desc, batch, kv_head, row + N, v_smem, v_full, v_empty, v_slot, v_phase, V8)
            v_slot = slot
            v_phase = phase
            slot, phase = _advance(slot, phase, STAGES)
        _load_values(v_desc, batch, kv_head, 0, v_smem, v_full, v_empty, v_slot, v_phase, V8)


@gluon.jit
def _attend(
    task, HAS_LENS: gl.constexpr, HAS_LSE: gl.constexpr, HAS_FLAG: gl.constexpr, OFFSET: gl.constexpr,
    SCHEDULE: gl.constexpr, PARTS: gl.constexpr, TURNS: gl.constexpr, START: gl.constexpr, MAXI: gl.constexpr,
    SUM: gl.constexpr, POLY: gl.constexpr, SKIP: gl.constexpr, FLUSH: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """One warp group: attention of the GROUP-th M queries of every piece of work."""
    o_desc, smem, full, empty, counts, q_tiles, pieces, q_len, kv_group, scales, ones, lse, lse_shift, flag = task
    q_smem, k_smem, v_smem, o_smem = smem
    q_full, k_full, v_full = full
    q_empty, k_empty, v_empty = empty
    q_scale_ptr, k_scale_ptr, v_scale_ptr, blocks = scales
    _q_tiles, heads, _kv_len, _kv_lens = counts
    GROUPS: gl.constexpr = q_smem.shape[0]
    STAGES: gl.constexpr = k_smem.shape[0]
    N: gl.constexpr = k_smem.shape[3]
    D: gl.constexpr = k_smem.shape[4]
    V: gl.constexpr = v_smem.dtype
    V8: gl.constexpr = V.primitive_bitwidth == 8
    PAIR: gl.constexpr = SCHEDULE == "pair"
    NEXT: gl.constexpr = (GROUP + 1) % GROUPS
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 32])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 32 if V8 else 16])
    ones_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 32 if V8 else 16])
    quads: gl.constexpr = gl.zeros([M, N], gl.float32, s_layout).reshape([M, N // 8, 4, 2]).type.layout
    sums_layout: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, quads))
    row_layout: gl.constexpr = gl.SliceLayout(1, sums_layout)
    k_layout: gl.constexpr = gl.SliceLayout(0, sums_layout)

    start = gl.full([M, N], BIAS_BITS if START else 0, gl.int32, s_layout)
    nothing = gl.zeros([M, D], gl.float32, acc_layout)
    slot = 0
    phase = 0
    q_phase = 0
    if TURNS and GROUP == GROUPS - 1:
        _turn("arrive", 0)
    for index in range(gl.program_id(0), pieces, gl.num_programs(0)):
        batch, head, q_tile, keys, steps = _work(index, counts, N, HAS_LENS)
        if PAIR:
            steps = (steps + 1) // 2 * 2
        row = (q_tile * GROUPS + GROUP) * M
        q_rows = (index // q_tiles).to(gl.int64) * q_len
        kv_head = (batch * (heads // kv_group) + head // kv_group).to(gl.int64)
        k_scales = k_scale_ptr + kv_head * blocks * 4
        rows = row + gl.arange(0, M, row_layout)
        q_scale = gl.load(q_scale_ptr + q_rows + rows, mask=rows < q_len, other=1.0)
        k_scale = _scales_of_keys(k_scales, 0, steps, blocks, N, k_layout)
        mbarrier.wait(q_full.index(GROUP), q_phase)
        q_phase ^= 1
        m = gl.full([M], -1e30, gl.float32, row_layout)  # finite also where no key is left
        if SUM == "mma":
            l = gl.zeros([M, 8], gl.float32, ones_layout)
        else:
            l = gl.zeros([M, 4], gl.float32, sums_layout)
        acc = gl.zeros([M, D], gl.float32, acc_layout)
        if FLUSH:
            tma.store_wait(0)
            gl.thread_barrier()
            places: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
            kept_acc = o_smem._reinterpret(gl.float32, [GROUPS, M, D], places).index(GROUP)
            kept_acc.store(acc)
            kept_m = m
        kept = keys - (steps - 1) * N

        mbarrier.wait(k_full.index(slot), phase)
        if TURNS:
            _turn("sync", GROUP)
        s = _scores(_tile(q_smem, GROUP), _tile(k_smem, slot), start, START)
        if PAIR:
            slot_b, phase_b = _advance(slot, phase, STAGES)
            k_scale_b = _scales_of_keys(k_scales, 1, steps, blocks, N, k_layout)
            mbarrier.wait(k_full.index(slot_b), phase_b)
            s_b = _scores(_tile(q_smem, GROUP), _tile(k_smem, slot_b), start, START)
            if TURNS:
                _turn("arrive", NEXT)
            s = hopper.warpgroup_mma_wait(1, [s])
            top = _top(s, k_scale, kept, True, START, False)
            s_b = hopper.warpgroup_mma_wait(0, [s_b])
            mbarrier.arrive(k_empty.index(slot))
            mbarrier.arrive(k_empty.index(slot_b))
            top = gl.maximum(top, _top(s_b, k_scale_b, kept + N, True, START, False))
            m = gl.maximum(m, gl.max(top, 1) * q_scale)
            shrink = gl.full([M], 0.0, gl.float32, row_layout)
            p = _weights(s, m, q_scale, k_scale, kept, OFFSET, True, START)
            if SUM == "add":
                l = _lane_sums(p)
            p8 = _packed(_flat(p, s), V, acc_layout)
            # The mask of b goes into its scores, as bits of -inf, so that the loop needs none.
            blind: gl.constexpr = -8388608 if START else -8388608 - BIAS_BITS
            s_b = _flat(gl.where(_seen(_quads(s_b), kept + N), _quads(s_b), blind), s)
            k_scale = _scales_of_keys(k_scales, 2, steps, blocks, N, k_layout)
            mbarrier.wait(v_full.index(slot), phase)

            for step in range(2, steps, 2):
                if FLUSH:
                    partial = _values_on(_operand(p8, acc_layout), _tile(v_smem, slot), acc, (step - 2) % FLUSH != 0)
                else:
                    partial = _values(_operand(p8, acc_layout), _tile(v_smem, slot), nothing if V8 else acc, V8)
                if SUM == "mma":
                    sums = gl.zeros([M, 8], gl.float32, ones_layout)
                    sums = _ones_times(p8, ones, sums, True)
                p_b = _weights(s_b, m, q_scale, k_scale_b, 0, OFFSET, False, START, POLY)
                if SUM == "add":
                    l += _lane_sums(p_b)
                k_scale_b = _scales_of_keys(k_scales, step + 1, steps, blocks, N, k_layout)
                mbarrier.wait(v_full.index(slot_b), phase_b)
                p8 = _packed(_flat(p_b, s), V, acc_layout)
                if SUM == "mma":
                    partial, sums = hopper.warpgroup_mma_wait(0, [partial, sums])
                else:
                    partial = hopper.warpgroup_mma_wait(0, [partial])
                mbarrier.arrive(v_empty.index(slot))
                next_a, next_phase_a = _advance(slot_b, phase_b, STAGES)
                next_b, next_phase_b = _advance(next_a, next_phase_a, STAGES)
                mbarrier.wait(k_full.index(next_a), next_phase_a)
                if TURNS:
                    _turn("sync", GROUP)
                partial = _values(_operand(p8, acc_layout), _tile(v_smem, slot_b), partial, False)
                if SUM == "mma":
                    sums = _ones_times(p8, ones, sums, False)
                s = _scores(_tile(q_smem, GROUP), _tile(k_smem, next_a), start, START)
                if SUM == "mma":
                    partial, sums = hopper.warpgroup_mma_wait(1, [partial, sums])
                    l = l * _over_columns(shrink, l) + sums
                else:
                    partial = hopper.warpgroup_mma_wait(1, [partial])
                mbarrier.arrive(v_empty.index(slot_b))
                if V8 and not FLUSH:
                    acc = acc * _over_columns(shrink, acc) + partial
                else:
                    acc = partial
                if FLUSH:
                    if step % FLUSH == 0:
                        _flush(kept_acc, acc, gl.exp2(kept_m - m))
                        kept_m = m
                mbarrier.wait(k_full.index(next_b), next_phase_b)
                s_b = _scores(_tile(q_smem, GROUP), _tile(k_smem, next_b), start, START)
                if TURNS:
                    _turn("arrive", NEXT)
                s = hopper.warpgroup_mma_wait(1, [s])
                mbarrier.arrive(k_empty.index(next_a))
                top = _top(s, k_scale, 0, False, START, MAXI)
                s_b = hopper.warpgroup_mma_wait(0, [s_b])
                mbarrier.arrive(k_empty.index(next_b))
                top = gl.maximum(top, _top(s_b, k_scale_b, 0, False, START, MAXI))
                new_m = gl.maximum(m, gl.max(top, 1) * q_scale)
                shrink = gl.exp2(m - new_m)
                m = new_m
                p = _weights(s, m, q_scale, k_scale, 0, OFFSET, False, START, POLY)
                if SUM == "add":
                    l = l * shrink[:, None] + _lane_sums(p)
                p8 = _packed(_flat(p, s), V, acc_layout)
                if not V8 or FLUSH:
                    acc = _rescaled(acc, shrink, SKIP)
                k_scale = _scales_of_keys(k_scales, step + 2, steps, blocks, N, k_layout)
                slot = next_a
                phase = next_phase_a
                slot_b = next_b
                phase_b = next_phase_b
                mbarrier.wait(v_full.index(slot), phase)

            mbarrier.arrive(q_empty.index(GROUP))
            if FLUSH:
                fade = gl.exp2(kept_m - m)
                acc *= ((steps - 2) % FLUSH != 0).to(gl.float32)
                acc += kept_acc.load(acc_layout) * _over_columns(fade, acc)
            one = gl.full([M], 1.0, gl.float32, row_layout)
            if not V8 or FLUSH:
                if SUM == "mma":
                    l = l * _over_columns(shrink, l)
                shrink = one
            acc, l = _add_tile(acc, l, shrink, p8, _tile(v_smem, slot), ones, v_full.index(slot), phase, PARTS, SUM)
            mbarrier.arrive(v_empty.index(slot))
            p_b = _weights(s_b, m, q_scale, k_scale_b, 0, OFFSET, False, START, POLY)
            p8 = _packed(_flat(p_b, s), V, acc_layout)
            if SUM == "add":
                l += _lane_sums(p_b)
            mbarrier.wait(v_full.index(slot_b), phase_b)
            acc, l = _add_tile(acc, l, one, p8, _tile(v_smem, slot_b), ones, v_full.index(slot_b), phase_b, PARTS, SUM)
            mbarrier.arrive(v_empty.index(slot_b))
            slot, phase = _advance(slot_b, phase_b, STAGES)
        else:
            if TURNS:
                _turn("arrive", NEXT)
            s = hopper.warpgroup_mma_wait(0, [s])
            mbarrier.arrive(k_empty.index(slot))
            p, m, shrink, l = _softmax(s, m, l, q_scale, k_scale, kept, OFFSET, True, START, MAXI, SUM, POLY)
            p8 = _packed(p, V, acc_layout)
            k_scale = _scales_of_keys(k_scales, 1, steps, blocks, N, k_layout)
            mbarrier.wait(v_full.index(slot), phase)

            for step in range(1, steps):
                next_slot, next_phase = _advance(slot, phase, STAGES)
                next_k_scale = _scales_of_keys(k_scales, step + 1, steps, blocks, N, k_layout)
                if SCHEDULE == "ahead":
                    mbarrier.wait(k_full.index(next_slot), next_phase)
                    if TURNS:
                        _turn("sync", GROUP)
                    s = _scores(_tile(q_smem, GROUP), _tile(k_smem, next_slot), start, START)
                    if FLUSH:
                        partial = _values_on(_operand(p8, acc_layout), _tile(v_smem, slot), acc, (step - 1) % FLUSH != 0)
                    else:
                        partial = _values(_operand(p8, acc_layout), _tile(v_smem, slot), nothing if V8 else acc, V8)
                    if SUM == "mma":
                        sums = gl.zeros([M, 8], gl.float32, ones_layout) if V8 else l
                        sums = _ones_times(p8, ones, sums, V8)
                    if TURNS:
                        _turn("arrive", NEXT)
                    s = hopper.warpgroup_mma_wait(2 if SUM == "mma" else 1, [s])
                    mbarrier.arrive(k_empty.index(next_slot))
                    old_l = l
                    old_m = m
                    p, m, next_shrink, l = _softmax(s, m, l, q_scale, k_scale, 0, OFFSET, False, START, MAXI, SUM, POLY)
                    # Before the wait for partial, and not where v is used: it ends a block of instructions, which the
                    # assembler would else reorder so that the exponentials start after partial is complete.
                    mbarrier.wait(v_full.index(next_slot), next_phase)
                    if SUM == "mma":
                        partial, sums = hopper.warpgroup_mma_wait(0, [partial, sums])
                        if V8:
                            l = old_l * _over_columns(shrink, l) + sums
                        else:
                            l = sums * _over_columns(next_shrink, l)
                    else:
                        partial = hopper.warpgroup_mma_wait(0, [partial])
                    mbarrier.arrive(v_empty.index(slot))
                    if FLUSH:
                        acc = partial
                        if step % FLUSH == 0:
                            _flush(kept_acc, acc, gl.exp2(kept_m - old_m))
                            kept_m = old_m
                        acc = _rescaled(acc, next_shrink, SKIP)
                    elif V8:
                        acc = acc * _over_columns(shrink, acc) + partial
                    else:
                        acc = _rescaled(partial, next_shrink, SKIP)
                    p8 = _packed(p, V, acc_layout)
                    shrink = next_shrink
                else:
                    if FLUSH:
                        acc = _values_on(_operand(p8, acc_layout), _tile(v_smem, slot), acc, (step - 1) % FLUSH != 0)
                        if SUM == "mma":
                            sums = _ones_times(p8, ones, gl.zeros([M, 8], gl.float32, ones_layout), True)
                            acc, sums = hopper.warpgroup_mma_wait(0, [acc, sums])
                            l = l * _over_columns(shrink, l) + sums
                        else:
                            acc = hopper.warpgroup_mma_wait(0, [acc])
                        if step % FLUSH == 0:
                            _flush(kept_acc, acc, gl.exp2(kept_m - m))
                            kept_m = m
                    elif V8:
                        acc, l = _add_tile(
                            acc, l, shrink, p8, _tile(v_smem, slot), ones, v_full.index(slot), phase, PARTS, SUM
                        )
                    else:
                        acc = _values(_operand(p8, acc_layout), _tile(v_smem, slot), acc, False)
                        if SUM == "mma":
                            l = _ones_times(p8, ones, l, False)
                            acc, l = hopper.warpgroup_mma_wait(0, [acc, l])
                        else:
                            acc = hopper.warpgroup_mma_wait(0, [acc])
                    mbarrier.arrive(v_empty.index(slot))
                    mbarrier.wait(k_full.index(next_slot), next_phase)
                    if TURNS:
                        _turn("sync", GROUP)
                    s = _scores(_tile(q_smem, GROUP), _tile(k_smem, next_slot), start, START)
                    if TURNS:
                        _turn("arrive", NEXT)
                    s = hopper.warpgroup_mma_wait(0, [s])
                    mbarrier.arrive(k_empty.index(next_slot))
                    p, m, shrink, l = _softmax(s, m, l, q_scale, k_scale, 0, OFFSET, False, START, MAXI, SUM, POLY)
                    if not V8 or FLUSH:
                        acc = _rescaled(acc, shrink, SKIP)
                        if SUM == "mma" and not V8:
                            l = l * _over_columns(shrink, l)
                    p8 = _packed(p, V, acc_layout)
                    mbarrier.wait(v_full.index(next_slot), next_phase)
                k_scale = next_k_scale
                slot = next_slot
                phase = next_phase

            mbarrier.arrive(q_empty.index(GROUP))
            if FLUSH:
                acc = _values_on(_operand(p8, acc_layout), _tile(v_smem, slot), acc, (steps - 1) % FLUSH != 0)
                if SUM == "mma":
                    sums = _ones_times(p8, ones, gl.zeros([M, 8], gl.float32, ones_layout), True)
                    acc, sums = hopper.warpgroup_mma_wait(0, [acc, sums])
                    l = l * _over_columns(shrink, l) + sums
                else:
                    acc = hopper.warpgroup_mma_wait(0, [acc])
                acc += kept_acc.load(acc_layout) * _over_columns(gl.exp2(kept_m - m), acc)
            else:
                if not V8:
                    shrink = gl.full([M], 1.0, gl.float32, row_layout)
                acc, l = _add_tile(acc, l, shrink, p8, _tile(v_smem, slot), ones, v_full.index(slot), phase, PARTS, SUM)
            mbarrier.arrive(v_empty.index(slot))
            slot, phase = _advance(slot, phase, STAGES)

        v_scales = v_scale_ptr + kv_head * D
        out = _finish(
            acc, m, l, v_scales, lse + q_rows, lse_shift + q_rows, row, q_len, o_desc.dtype, OFFSET, HAS_LSE, V8, SUM
        )
        if HAS_FLAG:
            _raise_flag(out, flag)
        if FLUSH:
            gl.thread_barrier()
            _tile(o_smem, 2 * GROUP).store(out)
            hopper.fence_async_shared()
            tma.async_copy_shared_to_global(o_desc, [batch, head, row, 0], o_smem.index(2 * GROUP))
        else:
            tma.store_wait(0)
            _tile(o_smem, GROUP).store(out)
            hopper.fence_async_shared()
            tma.async_copy_shared_to_global(o_desc, [batch, head, row, 0], o_smem.index(GROUP))
    tma.store_wait(0)


@gluon.jit
def _flat(p, s):
    return gl.convert_layout(p.reshape(s.shape), s.type.layout)


@gluon.jit(
    do_not_specialize=["q_len", "kv_len", "heads", "kv_group", "q_tiles", "pieces", "blocks"],
    do_not_specialize_on_alignment=["q_scale", "k_scale", "v_scale", "lse", "lse_shift", "kv_lens", "flag"],
)
def forward(
    q_desc, k_desc, v_desc, o_desc, q_scale, k_scale, v_scale, lse, lse_shift, kv_lens, flag,
    q_len, kv_len, heads, kv_group, q_tiles, pieces, blocks,
    HAS_LENS: gl.constexpr, HAS_LSE: gl.constexpr, HAS_FLAG: gl.constexpr, OFFSET: gl.constexpr,
    N: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr, SCHEDULE: gl.constexpr, PARTS: gl.constexpr,
    TURNS: gl.constexpr, START: gl.constexpr, MAXI: gl.constexpr, SUM: gl.constexpr, POLY: gl.constexpr,
    SKIP: gl.constexpr, FLUSH: gl.constexpr, REGISTERS: gl.constexpr, LOADER_REGISTERS: gl.constexpr,
):  # fmt: skip
    V8: gl.constexpr = v_desc.dtype.primitive_bitwidth == 8
    if FLUSH:
        o_smem = _tiles(o_desc, 2 * GROUPS)  # each two are as large as an accumulator
    else:
        o_smem = _tiles(o_desc, GROUPS)
    smem = (_tiles(q_desc, GROUPS), _tiles(k_desc, STAGES), _tiles(v_desc, STAGES), o_smem)
    full = (_barriers(GROUPS, 1), _barriers(STAGES, 1), _barriers(STAGES, 1))
    empty = (_barriers(GROUPS, 1), _barriers(STAGES, GROUPS), _barriers(STAGES, GROUPS))
    if SUM == "mma":
        ones = _ones(v_desc, N)
    else:
        ones = smem[3]
    counts = (q_tiles, heads, kv_len, kv_lens)
    scales = (q_scale, k_scale, v_scale, blocks)
    load = (q_desc, k_desc, v_desc, smem, full, empty, counts, kv_group, pieces)
    attend = (
        o_desc, smem, full, empty, counts, q_tiles, pieces, q_len, kv_group, scales, ones, lse, lse_shift, flag,
    )  # fmt: skip
    gl.static_assert(GROUPS == 2 or GROUPS == 3)
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_attend, (attend, HAS_LENS, HAS_LSE, HAS_FLAG, OFFSET, SCHEDULE, PARTS, TURNS, START, MAXI, SUM, POLY, SKIP, FLUSH, 0)),
                (_attend, (attend, HAS_LENS, HAS_LSE, HAS_FLAG, OFFSET, SCHEDULE, PARTS, TURNS, START, MAXI, SUM, POLY, SKIP, FLUSH, 1)),
                (_load, (load, HAS_LENS, N, V8, SCHEDULE == "pair")),
            ],
            [4, 1],
            [REGISTERS, LOADER_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_attend, (attend, HAS_LENS, HAS_LSE, HAS_FLAG, OFFSET, SCHEDULE, PARTS, TURNS, START, MAXI, SUM, POLY, SKIP, FLUSH, 0)),
                (_attend, (attend, HAS_LENS, HAS_LSE, HAS_FLAG, OFFSET, SCHEDULE, PARTS, TURNS, START, MAXI, SUM, POLY, SKIP, FLUSH, 1)),
                (_attend, (attend, HAS_LENS, HAS_LSE, HAS_FLAG, OFFSET, SCHEDULE, PARTS, TURNS, START, MAXI, SUM, POLY, SKIP, FLUSH, 2)),
                (_load, (load, HAS_LENS, N, V8, SCHEDULE == "pair")),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, LOADER_REGISTERS],
        )  # fmt: skip


# ---------------------------------------------------------------- one group of four warps that loads for itself


@gluon.jit
def _load_both(k_desc, v_desc, batch, kv_head, row, k_smem, v_smem, full, slot, pred, V8: gl.constexpr):
    mbarrier.expect(full.index(slot), k_desc.block_type.nbytes + v_desc.block_type.nbytes, pred=pred)
    tma.async_copy_global_to_shared(k_desc, [batch, kv_head, row, 0], full.index(slot), k_smem.index(slot), pred=pred)
    if V8:
        tma.async_copy_global_to_shared(
            v_desc, [batch, kv_head, 0, row], full.index(slot), v_smem.index(slot), pred=pred
        )
    else:
        tma.async_copy_global_to_shared(
            v_desc, [batch, kv_head, row, 0], full.index(slot), v_smem.index(slot), pred=pred
        )


@gluon.jit(
    do_not_specialize=["q_len", "kv_len", "heads", "kv_group", "q_tiles", "pieces", "blocks"],
    do_not_specialize_on_alignment=["q_scale", "k_scale", "v_scale", "lse", "lse_shift", "kv_lens", "flag"],
)
def forward_small(
    q_desc, k_desc, v_desc, o_desc, q_scale, k_scale, v_scale, lse, lse_shift, kv_lens, flag,
    q_len, kv_len, heads, kv_group, q_tiles, pieces, blocks,
    HAS_LENS: gl.constexpr, HAS_LSE: gl.constexpr, HAS_FLAG: gl.constexpr, OFFSET: gl.constexpr,
    N: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr,
    START: gl.constexpr, MAXI: gl.constexpr, SUM: gl.constexpr, POLY: gl.constexpr,
    SKIP: gl.constexpr,
):  # fmt: skip
    V: gl.constexpr = v_desc.dtype
    V8: gl.constexpr = V.primitive_bitwidth == 8
    WARPS: gl.constexpr = gl.num_warps()
    M: gl.constexpr = 16 * WARPS
    D: gl.constexpr = k_desc.block_shape[3]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, N, 32])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, D, 32 if V8 else 16])
    quads: gl.constexpr = gl.zeros([M, N], gl.float32, s_layout).reshape([M, N // 8, 4, 2]).type.layout
    sums_layout: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, quads))
    row_layout: gl.constexpr = gl.SliceLayout(1, sums_layout)
    k_layout: gl.constexpr = gl.SliceLayout(0, sums_layout)
    ones_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, 8, 32 if V8 else 16])
    q_smem = _tiles(q_desc, 1)
    k_smem = _tiles(k_desc, STAGES)
    v_smem = _tiles(v_desc, STAGES)
    q_full = _barriers(1, 1)
    full = _barriers(STAGES, 1)
    if SUM == "mma":
        ones = _ones(v_desc, N)
    else:
        ones = q_smem
    hopper.fence_async_shared()

    index = gl.program_id(0)
    batch, head, q_tile, keys, steps = _work(index, (q_tiles, heads, kv_len, kv_lens), N, HAS_LENS)
    kv_head = head // kv_group
    row = q_tile * M
    mbarrier.expect(q_full.index(0), q_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(q_desc, [batch, head, row, 0], q_full.index(0), q_smem.index(0))
    for ahead in gl.static_range(STAGES - 1):
        _load_both(
            k_desc, v_desc, batch, kv_head, (steps - 1 - ahead) * N, k_smem, v_smem, full, ahead, ahead < steps, V8
        )

    q_rows = (index // q_tiles).to(gl.int64) * q_len
    kv_row = (batch * (heads // kv_group) + kv_head).to(gl.int64)
    k_scales = k_scale + kv_row * blocks * 4
    rows = row + gl.arange(0, M, row_layout)
    scale_q = gl.load(q_scale + q_rows + rows, mask=rows < q_len, other=1.0)
    scale_k = _scales_of_keys(k_scales, 0, steps, blocks, N, k_layout)
    start = gl.full([M, N], BIAS_BITS if START else 0, gl.int32, s_layout)
    m = gl.full([M], -1e30, gl.float32, row_layout)  # finite also where no key is left
    if SUM == "mma":
        l = gl.zeros([M, 8], gl.float32, ones_layout)
    else:
        l = gl.zeros([M, 4], gl.float32, sums_layout)
    acc = gl.zeros([M, D], gl.float32, acc_layout)
    kept = keys - (steps - 1) * N
    slot = 0
    phase = 0
    mbarrier.wait(q_full.index(0), 0)

    mbarrier.wait(full.index(0), 0)
    last_slot: gl.constexpr = STAGES - 1
    _load_both(
        k_desc, v_desc, batch, kv_head, (steps - STAGES) * N, k_smem, v_smem, full, last_slot, last_slot < steps, V8
    )
    s = _scores(_tile(q_smem, 0), _tile(k_smem, 0), start, START)
    s = hopper.warpgroup_mma_wait(0, [s])
    p, m, shrink, l = _softmax(s, m, l, scale_q, scale_k, kept, OFFSET, True, START, MAXI, SUM, POLY)
    p8 = _packed(p, V, acc_layout)
    acc, l = _add_tile(acc, l, shrink, p8, _tile(v_smem, 0), ones, full.index(0), 0, PARTS, SUM)
    scale_k = _scales_of_keys(k_scales, 1, steps, blocks, N, k_layout)
    for step in range(1, steps):
        before = slot
        slot, phase = _advance(slot, phase, STAGES)
        next_scale_k = _scales_of_keys(k_scales, step + 1, steps, blocks, N, k_layout)
        mbarrier.wait(full.index(slot), phase)
        gl.thread_barrier()  # every warp is done with the place that is filled now
        later = step + STAGES - 1
        _load_both(
            k_desc, v_desc, batch, kv_head, (steps - 1 - later) * N, k_smem, v_smem, full, before, later < steps, V8
        )
        s = _scores(_tile(q_smem, 0), _tile(k_smem, slot), start, START)
        s = hopper.warpgroup_mma_wait(0, [s])
        p, m, shrink, l = _softmax(s, m, l, scale_q, scale_k, 0, OFFSET, False, START, MAXI, SUM, POLY)
        if V8:
            p8 = _packed(p, V, acc_layout)
            acc, l = _add_tile(acc, l, shrink, p8, _tile(v_smem, slot), ones, full.index(slot), phase, PARTS, SUM)
        else:
            acc = _rescaled(acc, shrink, SKIP)
            p8 = _packed(p, V, acc_layout)
            acc = _values(_operand(p8, acc_layout), _tile(v_smem, slot), acc, False)
            if SUM == "mma":
                l = _ones_times(p8, ones, l * _over_columns(shrink, l), False)
                acc, l = hopper.warpgroup_mma_wait(0, [acc, l])
            else:
                acc = hopper.warpgroup_mma_wait(0, [acc])
        scale_k = next_scale_k

    out = _finish(
        acc, m, l, v_scale + kv_row * D, lse + q_rows, lse_shift + q_rows, row, q_len, o_desc.dtype, OFFSET, HAS_LSE, V8, SUM
    )
    if HAS_FLAG:
        _raise_flag(out, flag)
    # The output takes the place of k and v, which nothing reads any more.
    gl.thread_barrier()
    o_smem = k_smem._reinterpret(o_desc.dtype, [1] + o_desc.block_shape, o_desc.layout)
    _tile(o_smem, 0).store(out)
    hopper.fence_async_shared()
    tma.async_copy_shared_to_global(o_desc, [batch, head, row, 0], o_smem.index(0))
    tma.store_wait(0)
