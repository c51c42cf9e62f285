"""The device code of `flash_hopper`: a loading warp and two or three computing warp groups, in Gluon.

The tiles of keys, all or those of a list, are taken from the last to the first: only the last needs a mask, and it is met
before the loop; but for lists with LIVE, of blocks that may be filled in part anywhere. Programs are persistent, heads
outermost, so that the keys of one head stay in L2. Letters as in flash_hopper.py.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from videoattn.kernels.hopper_device import LN2, M, advance, barriers, number_of, tile, tiles, turn, walk, work


@gluon.jit
def _load_tile(descs, batch, head, row, smem, full, empty, slot, phase, D1: gl.constexpr):
    """One tile from memory into its place in the ring, as soon as that is empty; `full` tells when it has come."""
    mbarrier.wait(empty.index(slot), phase)
    if D1:
        mbarrier.expect(full.index(slot), descs[0].block_type.nbytes + descs[1].block_type.nbytes)
        tma.async_copy_global_to_shared(descs[0], [batch, head, row, 0], full.index(slot), smem[0].index(slot))
        tma.async_copy_global_to_shared(
            descs[1], [batch, head, row, descs[0].block_shape[3]], full.index(slot), smem[1].index(slot)
        )
    else:
        mbarrier.expect(full.index(slot), descs[0].block_type.nbytes)
        tma.async_copy_global_to_shared(descs[0], [batch, head, row, 0], full.index(slot), smem[0].index(slot))


@gluon.jit
def _load(task, HAS_LENS: gl.constexpr, BLOCKS: gl.constexpr, D1: gl.constexpr, K_AHEAD: gl.constexpr):
    """The loader: tiles of q, k and v from memory into shared memory, as places fall empty."""
    q_descs, k_descs, v_descs, smem, full, empty, counts, lists, kv_group, pieces = task
    q_smem, k_smem, v_smem, _o_smem = smem
    q_full, k_full, v_full = full
    q_empty, k_empty, v_empty = empty
    GROUPS: gl.constexpr = q_smem[0].shape[0]
    STAGES: gl.constexpr = k_smem[0].shape[0]
    N: gl.constexpr = k_smem[0].shape[3]

    slot = 0
    phase = 1  # of a new barrier the phase before the first counts as complete: every place is empty
    q_phase = 1
    # Not in the loop over the pieces: two variables of an inner loop that start as the same value are taken for one.
    v_slot = slot
    v_phase = phase
    for index in range(gl.program_id(0), pieces, gl.num_programs(0)):
        batch, head, q_tile, keys, steps = work(index, counts, N, HAS_LENS)
        keys, steps, numbers = walk(batch, head, q_tile, keys, steps, lists, BLOCKS)
        kv_head = head // kv_group
        for group in gl.static_range(GROUPS):
            row = (q_tile * GROUPS + group) * M
            _load_tile(q_descs, batch, head, row, q_smem, q_full, q_empty, group, q_phase, D1)
        q_phase ^= 1
        v_row = 0
        for step in range(steps):
            row = number_of(numbers, steps - 1 - step, BLOCKS) * N
            _load_tile(k_descs, batch, kv_head, row, k_smem, k_full, k_empty, slot, phase, D1)
            if K_AHEAD:
                if step > 0:
                    _load_tile(v_descs, batch, kv_head, v_row, v_smem, v_full, v_empty, v_slot, v_phase, D1)
                v_slot = slot
                v_phase = phase
                v_row = row
            else:
                _load_tile(v_descs, batch, kv_head, row, v_smem, v_full, v_empty, slot, phase, D1)
            slot, phase = advance(slot, phase, STAGES)
        if K_AHEAD:
            _load_tile(v_descs, batch, kv_head, v_row, v_smem, v_full, v_empty, v_slot, v_phase, D1)


@gluon.jit
def _mask(s, keys):
    """s [M, N] with -inf from column `keys` on. Compared in eights, or 32 column numbers would stay in registers."""
    eights = s.reshape([s.shape[0], s.shape[1] // 8, 8])
    first = gl.arange(0, s.shape[1] // 8, gl.SliceLayout(0, gl.SliceLayout(2, eights.type.layout))) * 8
    within = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, eights.type.layout)))
    kept = gl.where(within[None, None, :] < (keys - first)[None, :, None], eights, float("-inf"))
    return gl.convert_layout(kept.reshape(s.shape), s.type.layout)


@gluon.jit
def _lane_sums(p):
    """Row sums of p [M, N] as far as one thread can add them, [M, 4]: the four meet once, after the loop."""
    return gl.sum(gl.sum(p.reshape([p.shape[0], p.shape[1] // 8, 4, 2]), 3), 1)


@gluon.jit
def _scale_rows(x, factor):
    return x * gl.convert_layout(factor, gl.SliceLayout(1, x.type.layout))[:, None]


@gluon.jit
def _scores(q_smem, k_smem, GROUP: gl.constexpr, slot, fresh, D1: gl.constexpr):
    """q k^T of one tile, started."""
    k0 = tile(k_smem[0], slot).permute((1, 0))
    s = hopper.warpgroup_mma(tile(q_smem[0], GROUP), k0, fresh, use_acc=False, is_async=True)
    if D1:
        k1 = tile(k_smem[1], slot).permute((1, 0))
        s = hopper.warpgroup_mma(tile(q_smem[1], GROUP), k1, s, is_async=True)
    return s


@gluon.jit
def _add_values(p16, v_smem, slot, acc):
    """acc + p v of one part of one tile, started."""
    layout: gl.constexpr = gl.DotOperandLayout(0, acc.type.layout, 2)
    return hopper.warpgroup_mma(gl.convert_layout(p16, layout), tile(v_smem, slot), acc, is_async=True)


@gluon.jit
def _store_part(o_desc, o_smem, at, x, flag, HAS_FLAG: gl.constexpr, GROUP: gl.constexpr):
    """Start the way of one part of the output to memory."""
    if HAS_FLAG:
        finite = gl.min((gl.abs(x.to(gl.float32)) < float("inf")).to(gl.int32), 1)  # NaN fails every comparison
        zeros = gl.full([M], 0, gl.int32, gl.SliceLayout(1, x.type.layout))
        gl.store(flag + zeros, 1 - finite, mask=finite == 0)
    tile(o_smem, GROUP).store(x)
    hopper.fence_async_shared()
    tma.async_copy_shared_to_global(o_desc, at, o_smem.index(GROUP))


@gluon.jit
def _attend(
    task, HAS_LENS: gl.constexpr, BLOCKS: gl.constexpr, LIVE: gl.constexpr, HAS_FLAG: gl.constexpr, D1: gl.constexpr,
    TURNS: gl.constexpr, O_IN_Q: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """One warp group: attention of the GROUP-th M queries of every piece of work."""
    o_descs, smem, full, empty, counts, lists, live, q_tiles, pieces, q_len, qk_scale, lse, flag = task
    q_smem, k_smem, v_smem, o_smem = smem
    q_full, k_full, v_full = full
    q_empty, k_empty, v_empty = empty
    dtype: gl.constexpr = q_smem[0].dtype
    GROUPS: gl.constexpr = q_smem[0].shape[0]
    STAGES: gl.constexpr = k_smem[0].shape[0]
    N: gl.constexpr = k_smem[0].shape[3]
    D0: gl.constexpr = k_smem[0].shape[4]
    NEXT: gl.constexpr = (GROUP + 1) % GROUPS
    VALUES_IN_FLIGHT: gl.constexpr = 2 if D1 else 1
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    acc0_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D0, 16])
    acc1_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D1, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, acc0_layout, 2)

    fresh = gl.zeros([M, N], gl.float32, s_layout)
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
        mbarrier.wait(q_full.index(GROUP), q_phase)
        q_phase ^= 1

        mbarrier.wait(k_full.index(slot), phase)
        if TURNS:
            turn("sync", GROUP)
        s = _scores(q_smem, k_smem, GROUP, slot, fresh, D1)
        if TURNS:
            turn("arrive", NEXT)
        s = hopper.warpgroup_mma_wait(0, [s])
        mbarrier.arrive(k_empty.index(slot))
        s = _mask(s, left)
        m = gl.maximum(gl.max(s, 1), -1e30)  # finite also where no key is left
        p = gl.exp2(s * qk_scale - (m * qk_scale)[:, None])
        l = _lane_sums(p)
        p16 = gl.convert_layout(p.to(dtype), p_layout)
        acc0 = gl.zeros([M, D0], gl.float32, acc0_layout)
        if D1:
            acc1 = gl.zeros([M, D1], gl.float32, acc1_layout)
        mbarrier.wait(v_full.index(slot), phase)

        for step in range(1, steps):
            if LIVE:
                left = gl.load(live + number_of(numbers, steps - 1 - step, BLOCKS))
            next_slot, next_phase = advance(slot, phase, STAGES)
            mbarrier.wait(k_full.index(next_slot), next_phase)
            if TURNS:
                turn("sync", GROUP)
            s = _scores(q_smem, k_smem, GROUP, next_slot, fresh, D1)
            acc0 = _add_values(p16, v_smem[0], slot, acc0)
            if D1:
                acc1 = _add_values(p16, v_smem[1], slot, acc1)
            if TURNS:
                turn("arrive", NEXT)
            s = hopper.warpgroup_mma_wait(VALUES_IN_FLIGHT, [s])
            mbarrier.arrive(k_empty.index(next_slot))
            if LIVE:
                s = _mask(s, left)
            new_m = gl.maximum(m, gl.max(s, 1))
            shrink = gl.exp2((m - new_m) * qk_scale)
            p = gl.exp2(s * qk_scale - (new_m * qk_scale)[:, None])
            l = _scale_rows(l, shrink) + _lane_sums(p)
            m = new_m
            # Before the wait for acc, and not where v is used: it ends a block of instructions, which the assembler
            # would else reorder so that the exponentials start after acc is complete.
            mbarrier.wait(v_full.index(next_slot), next_phase)
            if D1:
                acc0, acc1, _p = hopper.warpgroup_mma_wait(0, [acc0, acc1, p16])
                acc1 = _scale_rows(acc1, shrink)
            else:
                acc0, _p = hopper.warpgroup_mma_wait(0, [acc0, p16])
            mbarrier.arrive(v_empty.index(slot))
            acc0 = _scale_rows(acc0, shrink)
            p16 = gl.convert_layout(p.to(dtype), p_layout)
            slot = next_slot
            phase = next_phase

        if not O_IN_Q:
            mbarrier.arrive(q_empty.index(GROUP))
        acc0 = _add_values(p16, v_smem[0], slot, acc0)
        if D1:
            acc1 = _add_values(p16, v_smem[1], slot, acc1)
            acc0, acc1, _p = hopper.warpgroup_mma_wait(0, [acc0, acc1, p16])
        else:
            acc0, _p = hopper.warpgroup_mma_wait(0, [acc0, p16])
        mbarrier.arrive(v_empty.index(slot))
        slot, phase = advance(slot, phase, STAGES)

        row = (q_tile * GROUPS + GROUP) * M
        total = gl.convert_layout(gl.sum(l, 1), gl.SliceLayout(1, s_layout))
        rows = row + gl.arange(0, M, gl.SliceLayout(1, s_layout))
        lse_rows = lse + (index // q_tiles).to(gl.int64) * q_len + rows
        gl.store(lse_rows, (m * qk_scale + gl.log2(total)) * LN2, mask=rows < q_len)
        inverse = 1.0 / gl.where(total == 0.0, 1.0, total)
        tma.store_wait(0)
        x0 = _scale_rows(acc0, inverse).to(dtype)
        _store_part(o_descs[0], o_smem[0], [batch, head, row, 0], x0, flag, HAS_FLAG, GROUP)
        if D1:
            x1 = _scale_rows(acc1, inverse).to(dtype)
            _store_part(o_descs[1], o_smem[1], [batch, head, row, D0], x1, flag, HAS_FLAG, GROUP)
        if O_IN_Q:
            tma.store_wait(0)
            mbarrier.arrive(q_empty.index(GROUP))
    tma.store_wait(0)


@gluon.jit(
    do_not_specialize=["q_len", "kv_len", "heads", "kv_group", "q_tiles", "pieces", "list_sb", "list_sh", "k_tiles"],
    do_not_specialize_on_alignment=["lse", "kv_lens", "list_counts", "list_indices", "live", "flag"],
)
def forward(
    q0_desc, k0_desc, v0_desc, o0_desc,
    q1_desc, k1_desc, v1_desc, o1_desc,  # None where D1 is 0
    lse, kv_lens, list_counts, list_indices, live, flag, qk_scale,
    q_len, kv_len, heads, kv_group, q_tiles, pieces, list_sb, list_sh, k_tiles,
    HAS_LENS: gl.constexpr, BLOCKS: gl.constexpr, LIVE: gl.constexpr, HAS_FLAG: gl.constexpr,
    D0: gl.constexpr, D1: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr,
    TURNS: gl.constexpr, K_AHEAD: gl.constexpr, O_IN_Q: gl.constexpr,
    REGISTERS: gl.constexpr, LOADER_REGISTERS: gl.constexpr,
):  # fmt: skip
    if D1:
        descs = ((q0_desc, q1_desc), (k0_desc, k1_desc), (v0_desc, v1_desc), (o0_desc, o1_desc))
        q_smem = (tiles(q0_desc, GROUPS), tiles(q1_desc, GROUPS))
        k_smem = (tiles(k0_desc, STAGES), tiles(k1_desc, STAGES))
        v_smem = (tiles(v0_desc, STAGES), tiles(v1_desc, STAGES))
        if O_IN_Q:
            o_smem = q_smem
        else:
            o_smem = (tiles(o0_desc, GROUPS), tiles(o1_desc, GROUPS))
    else:
        descs = ((q0_desc,), (k0_desc,), (v0_desc,), (o0_desc,))
        q_smem = (tiles(q0_desc, GROUPS),)
        k_smem = (tiles(k0_desc, STAGES),)
        v_smem = (tiles(v0_desc, STAGES),)
        if O_IN_Q:
            o_smem = q_smem
        else:
            o_smem = (tiles(o0_desc, GROUPS),)
    smem = (q_smem, k_smem, v_smem, o_smem)
    full = (barriers(GROUPS, 1), barriers(STAGES, 1), barriers(STAGES, 1))
    empty = (barriers(GROUPS, 1), barriers(STAGES, GROUPS), barriers(STAGES, GROUPS))
    counts = (q_tiles, heads, kv_len, kv_lens)
    lists = (list_counts, list_indices, list_sb, list_sh, k_tiles)
    load = (descs[0], descs[1], descs[2], smem, full, empty, counts, lists, kv_group, pieces)
    attend = (descs[3], smem, full, empty, counts, lists, live, q_tiles, pieces, q_len, qk_scale, lse, flag)
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_attend, (attend, HAS_LENS, BLOCKS, LIVE, HAS_FLAG, D1, TURNS, O_IN_Q, 0)),
                (_attend, (attend, HAS_LENS, BLOCKS, LIVE, HAS_FLAG, D1, TURNS, O_IN_Q, 1)),
                (_load, (load, HAS_LENS, BLOCKS, D1, K_AHEAD)),
            ],
            [4, 1],
            [REGISTERS, LOADER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (_attend, (attend, HAS_LENS, BLOCKS, LIVE, HAS_FLAG, D1, TURNS, O_IN_Q, 0)),
                (_attend, (attend, HAS_LENS, BLOCKS, LIVE, HAS_FLAG, D1, TURNS, O_IN_Q, 1)),
                (_attend, (attend, HAS_LENS, BLOCKS, LIVE, HAS_FLAG, D1, TURNS, O_IN_Q, 2)),
                (_load, (load, HAS_LENS, BLOCKS, D1, K_AHEAD)),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, LOADER_REGISTERS],
        )
