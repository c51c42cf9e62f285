"""Exact attention for Hopper (sm_90) in Gluon: one warp loads, two or three warp groups compute, as FlashAttention 3 does.

out = softmax(scale q k^T) v by the online softmax of FlashAttention 2 (Dao, arXiv:2307.08691). The schedule is that of
FlashAttention 3 (Shah et al., arXiv:2407.08608, sections 3.1 and 3.2): a warp of its own copies tiles with TMA into a
ring of shared memory; every group of four warps owns 64 queries, runs S' = q k'^T of the next tile and acc += p v of this
one on the tensor cores, and computes p' = exp(S' - m') while acc += p v is still running; a turn passed round the groups
lets one issue its products while the others compute exponentials.

The tiles of keys are taken from the last to the first: only the last needs a mask, and it is met before the loop. Programs
are persistent, heads outermost, so that the keys of one head stay in L2. Token counts are run-time integers.

Letters: B batch, Nq/Nk queries and keys, H heads, Hkv key/value heads, D head_dim; M queries of a warp group, N keys of a
tile, P head_dim padded to 64 or 128 (TMA fills with zeros).

Refuses: other cards than sm_90, fp32, head_dim over 128, masks, causal; `attend` refuses strides that TMA cannot take.
"""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from videoattn.call import Call
from videoattn.kernels.triton_backend import TritonBackend, on_device_of, scale_log2

M = gl.constexpr(64)
LN2 = gl.constexpr(0.6931471805599453)
FIRST_TURN = gl.constexpr(8)  # named barriers: the compiler takes the lowest for itself
LOADER_REGISTERS = 24


@dataclass(frozen=True, kw_only=True)
class Config:
    """How the kernel is built.

    Args:
        N: keys of a tile. STAGES: tiles of k and of v in flight. GROUPS: computing warp groups, 2 or 3.
        TURNS: whether the groups issue their products in turn.
    """

    N: int = 128
    STAGES: int = 2
    GROUPS: int = 2
    TURNS: bool = True

    def __post_init__(self) -> None:
        if self.N not in (64, 128) or self.STAGES < 2 or self.GROUPS not in (2, 3):
            raise ValueError(f"Config: wanted N 64 or 128, STAGES from 2, GROUPS 2 or 3, got {self}")

    @property
    def registers(self) -> dict[str, int]:
        """65,536 registers over the warp groups: an even share at the launch, then the loader gives its own away."""
        return {2: {"maxnreg": 168, "REGISTERS": 240}, 3: {"maxnreg": 128, "REGISTERS": 160}}[self.GROUPS]


@functools.cache
def config(padded_dim: int) -> Config:
    return Config(GROUPS=3) if padded_dim == 64 else Config()


@gluon.jit
def _turn(ACT: gl.constexpr, GROUP: gl.constexpr):
    """ACT "sync": wait for the turn of GROUP. ACT "arrive": give it. 256 threads: the two groups that meet."""
    asm: gl.constexpr = f"bar.{ACT} {FIRST_TURN + GROUP}, 256; mov.b32 $0, 0;"
    gl.inline_asm_elementwise(asm, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _advance(slot, phase, STAGES: gl.constexpr):
    """The next place in the ring; the phase flips once round."""
    last = slot == STAGES - 1
    return gl.where(last, 0, slot + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def _work(index, counts, N: gl.constexpr, HAS_LENS: gl.constexpr):
    """(batch, head, tile of queries, keys, tiles of keys) of a piece of work; a row without keys gets one masked tile."""
    q_tiles, heads, kv_len, kv_lens = counts
    batch = index // q_tiles // heads
    keys = kv_len
    if HAS_LENS:
        keys = gl.minimum(gl.load(kv_lens + batch), kv_len)
    return batch, index // q_tiles % heads, index % q_tiles, keys, gl.maximum(gl.cdiv(keys, N), 1)


@gluon.jit
def _load_tile(desc, at, smem, full, empty, slot, phase):
    """One tile from memory into its place in the ring, as soon as that is empty; `full` tells when it has come."""
    mbarrier.wait(empty.index(slot), phase)
    mbarrier.expect(full.index(slot), desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, at, full.index(slot), smem.index(slot))


@gluon.jit
def _load(task, HAS_LENS: gl.constexpr):
    """The loader: tiles of q, k and v from memory into shared memory, as places fall empty."""
    q_desc, k_desc, v_desc, smem, full, empty, counts, kv_group, pieces = task
    q_smem, k_smem, v_smem, _o_smem = smem
    q_full, k_full, v_full = full
    q_empty, k_empty, v_empty = empty
    GROUPS: gl.constexpr = q_smem.shape[0]
    STAGES: gl.constexpr = k_smem.shape[0]
    N: gl.constexpr = k_smem.shape[3]

    slot = 0
    phase = 1  # of a new barrier the phase before the first counts as complete: every place is empty
    q_phase = 1
    v_slot = slot
    v_phase = phase
    for index in range(gl.program_id(0), pieces, gl.num_programs(0)):
        batch, head, q_tile, _keys, steps = _work(index, counts, N, HAS_LENS)
        kv_head = head // kv_group
        for group in gl.static_range(GROUPS):
            row = (q_tile * GROUPS + group) * M
            _load_tile(q_desc, [batch, head, row, 0], q_smem, q_full, q_empty, group, q_phase)
        q_phase ^= 1
        for step in range(steps):  # k runs one tile ahead of v, as its use does
            row = (steps - 1 - step) * N
            _load_tile(k_desc, [batch, kv_head, row, 0], k_smem, k_full, k_empty, slot, phase)
            if step > 0:
                _load_tile(v_desc, [batch, kv_head, row + N, 0], v_smem, v_full, v_empty, v_slot, v_phase)
            v_slot = slot
            v_phase = phase
            slot, phase = _advance(slot, phase, STAGES)
        _load_tile(v_desc, [batch, kv_head, 0, 0], v_smem, v_full, v_empty, v_slot, v_phase)


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
def _attend(task, HAS_LENS: gl.constexpr, HAS_FLAG: gl.constexpr, TURNS: gl.constexpr, GROUP: gl.constexpr):
    """One warp group: attention of the GROUP-th M queries of every piece of work."""
    o_desc, smem, full, empty, counts, q_tiles, pieces, q_len, qk_scale, lse, flag = task
    q_smem, k_smem, v_smem, o_smem = smem
    q_full, k_full, v_full = full
    q_empty, k_empty, v_empty = empty
    dtype: gl.constexpr = q_smem.dtype
    GROUPS: gl.constexpr = q_smem.shape[0]
    STAGES: gl.constexpr = k_smem.shape[0]
    N: gl.constexpr = k_smem.shape[3]
    P: gl.constexpr = k_smem.shape[4]
    NEXT: gl.constexpr = (GROUP + 1) % GROUPS
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, P, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)

    q = q_smem.index(GROUP).reshape([M, P])
    fresh = gl.zeros([M, N], gl.float32, s_layout)
    slot = 0
    phase = 0
    q_phase = 0
    if TURNS and GROUP == GROUPS - 1:
        _turn("arrive", 0)
    for index in range(gl.program_id(0), pieces, gl.num_programs(0)):
        batch, head, q_tile, keys, steps = _work(index, counts, N, HAS_LENS)
        mbarrier.wait(q_full.index(GROUP), q_phase)
        q_phase ^= 1

        mbarrier.wait(k_full.index(slot), phase)
        if TURNS:
            _turn("sync", GROUP)
        k = k_smem.index(slot).reshape([N, P]).permute((1, 0))
        s = hopper.warpgroup_mma(q, k, fresh, use_acc=False, is_async=True)
        if TURNS:
            _turn("arrive", NEXT)
        s = hopper.warpgroup_mma_wait(0, [s])
        mbarrier.arrive(k_empty.index(slot))
        s = _mask(s, keys - (steps - 1) * N)
        m = gl.maximum(gl.max(s, 1), -1e30)  # finite also where no key is left
        p = gl.exp2(s * qk_scale - (m * qk_scale)[:, None])
        l = _lane_sums(p)
        p16 = gl.convert_layout(p.to(dtype), p_layout)
        acc = gl.zeros([M, P], gl.float32, acc_layout)
        mbarrier.wait(v_full.index(slot), phase)

        for _ in range(1, steps):
            next_slot, next_phase = _advance(slot, phase, STAGES)
            mbarrier.wait(k_full.index(next_slot), next_phase)
            if TURNS:
                _turn("sync", GROUP)
            k = k_smem.index(next_slot).reshape([N, P]).permute((1, 0))
            s = hopper.warpgroup_mma(q, k, fresh, use_acc=False, is_async=True)
            acc = hopper.warpgroup_mma(p16, v_smem.index(slot).reshape([N, P]), acc, is_async=True)
            if TURNS:
                _turn("arrive", NEXT)
            s = hopper.warpgroup_mma_wait(1, [s])
            mbarrier.arrive(k_empty.index(next_slot))
            new_m = gl.maximum(m, gl.max(s, 1))
            shrink = gl.exp2((m - new_m) * qk_scale)
            p = gl.exp2(s * qk_scale - (new_m * qk_scale)[:, None])
            l = _scale_rows(l, shrink) + _lane_sums(p)
            m = new_m
            # Before the wait for acc, and not where v is used: it ends a block of instructions, which the assembler
            # would else reorder so that the exponentials start after acc is complete.
            mbarrier.wait(v_full.index(next_slot), next_phase)
            acc, _p = hopper.warpgroup_mma_wait(0, [acc, p16])
            mbarrier.arrive(v_empty.index(slot))
            acc = _scale_rows(acc, shrink)
            p16 = gl.convert_layout(p.to(dtype), p_layout)
            slot = next_slot
            phase = next_phase

        mbarrier.arrive(q_empty.index(GROUP))
        acc = hopper.warpgroup_mma(p16, v_smem.index(slot).reshape([N, P]), acc, is_async=True)
        acc, _p = hopper.warpgroup_mma_wait(0, [acc, p16])
        mbarrier.arrive(v_empty.index(slot))
        slot, phase = _advance(slot, phase, STAGES)

        row = (q_tile * GROUPS + GROUP) * M
        total = gl.convert_layout(gl.sum(l, 1), gl.SliceLayout(1, s_layout))
        rows = row + gl.arange(0, M, gl.SliceLayout(1, s_layout))
        lse_rows = lse + (index // q_tiles).to(gl.int64) * q_len + rows
        gl.store(lse_rows, (m * qk_scale + gl.log2(total)) * LN2, mask=rows < q_len)
        x = _scale_rows(acc, 1.0 / gl.where(total == 0.0, 1.0, total)).to(dtype)
        if HAS_FLAG:
            finite = gl.min((gl.abs(x.to(gl.float32)) < float("inf")).to(gl.int32), 1)  # NaN fails every comparison
            gl.store(flag + gl.full([M], 0, gl.int32, gl.SliceLayout(1, acc_layout)), 1 - finite, mask=finite == 0)
        tma.store_wait(0)
        o_smem.index(GROUP).reshape([M, P]).store(x)
        hopper.fence_async_shared()
        tma.async_copy_shared_to_global(o_desc, [batch, head, row, 0], o_smem.index(GROUP))
    tma.store_wait(0)


@gluon.jit
def _barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    return barriers


@gluon.jit(do_not_specialize=["q_len", "kv_len", "heads", "kv_group", "q_tiles", "pieces"])
def forward(
    q_desc, k_desc, v_desc, o_desc, lse, kv_lens, flag, qk_scale, q_len, kv_len, heads, kv_group, q_tiles, pieces,
    HAS_LENS: gl.constexpr, HAS_FLAG: gl.constexpr,
    N: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr, TURNS: gl.constexpr,
    REGISTERS: gl.constexpr, LOADER_REGISTERS: gl.constexpr,
):  # fmt: skip
    P: gl.constexpr = q_desc.block_shape[3]
    smem = (
        gl.allocate_shared_memory(q_desc.dtype, [GROUPS, 1, 1, M, P], q_desc.layout),
        gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, 1, N, P], k_desc.layout),
        gl.allocate_shared_memory(v_desc.dtype, [STAGES, 1, 1, N, P], v_desc.layout),
        gl.allocate_shared_memory(o_desc.dtype, [GROUPS, 1, 1, M, P], o_desc.layout),
    )
    full = (_barriers(GROUPS, 1), _barriers(STAGES, 1), _barriers(STAGES, 1))
    empty = (_barriers(GROUPS, 1), _barriers(STAGES, GROUPS), _barriers(STAGES, GROUPS))
    counts = (q_tiles, heads, kv_len, kv_lens)
    load = (q_desc, k_desc, v_desc, smem, full, empty, counts, kv_group, pieces)
    attend = (o_desc, smem, full, empty, counts, q_tiles, pieces, q_len, qk_scale, lse, flag)
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_attend, (attend, HAS_LENS, HAS_FLAG, TURNS, 0)),
                (_attend, (attend, HAS_LENS, HAS_FLAG, TURNS, 1)),
                (_load, (load, HAS_LENS)),
            ],
            [4, 1],
            [REGISTERS, LOADER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (_attend, (attend, HAS_LENS, HAS_FLAG, TURNS, 0)),
                (_attend, (attend, HAS_LENS, HAS_FLAG, TURNS, 1)),
                (_attend, (attend, HAS_LENS, HAS_FLAG, TURNS, 2)),
                (_load, (load, HAS_LENS)),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, LOADER_REGISTERS],
        )


def strides_refused(x: Tensor) -> str | None:
    """Why TMA cannot read or write x [B, N, H, D], or None: the base and every stride are multiples of 16 bytes."""
    if x.stride(-1) != 1:
        return f"the elements of a head must lie side by side, got strides {x.stride()}"
    strides = [stride for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    if x.data_ptr() % 16 or any(stride * x.element_size() % 16 or stride <= 0 for stride in strides):
        return f"base and strides must be multiples of 16 bytes, above 0, got strides {x.stride()} of {x.dtype}"
    return None


def _describe(x: Tensor, rows: int, padded_dim: int) -> TensorDescriptor:
    """Tiles [1, 1, rows, padded_dim] of x [B, N, H, D], read as [B, H, N, D] in whatever order it lies."""
    b, n, h, d = x.shape
    # A dimension of size 1 is never stepped over, but TMA checks its stride all the same.
    sb, sn, sh = (stride if size > 1 else d for size, stride in zip((b, n, h), x.stride()[:3], strict=True))
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    return TensorDescriptor(x, [b, h, n, d], [sb, sh, sn, 1], [1, 1, rows, padded_dim], layout)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    kv_len: Tensor | None = None,
    return_lse: bool = False,
    flag: Tensor | None = None,
    tuned: Config | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Exact attention.

    Args:
        q: [B, Nq, H, D], fp16 or bf16. k, v: [B, Nk, Hkv, D]; Hkv divides H.
        scale: factor on q k^T, not negative; 1 / sqrt(D) by default.
        kv_len: int32 [B] on q's device: row b attends to its first kv_len[b] keys.
        return_lse: whether to return the log-sum-exp too.
        flag: int32 [1], set to 1 where the output is not finite.
        tuned: how the kernel is built; by head_dim where None.

    Returns:
        out [B, Nq, H, D] contiguous, and lse [B, H, Nq] fp32 (natural logarithm) or None. A row without a key gives 0 and
        -inf.

    Raises:
        ValueError: strides that TMA cannot take; a scale below 0.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        why = strides_refused(x)
        if why is not None:
            raise ValueError(f"flash_hopper.attend: {name}: {why}")
    (b, nq, h, d), (_, nk, h_kv, _) = q.shape, k.shape
    padded_dim = 64 if d <= 64 else 128
    built = config(padded_dim) if tuned is None else tuned
    out = torch.empty((b, nq, h, d), dtype=q.dtype, device=q.device)
    lse = torch.empty((b, h, nq), dtype=torch.float32, device=q.device)
    q_tiles = -(-nq // (M.value * built.GROUPS))
    pieces = b * h * q_tiles
    with on_device_of(q):
        forward[(min(pieces, _processors(q.device)),)](
            _describe(q, M.value, padded_dim),
            _describe(k, built.N, padded_dim),
            _describe(v, built.N, padded_dim),
            _describe(out, M.value, padded_dim),
            lse,
            lse if kv_len is None else kv_len,
            lse if flag is None else flag,
            scale_log2(scale, d),
            nq, nk, h, h // h_kv, q_tiles, pieces,
            HAS_LENS=kv_len is not None, HAS_FLAG=flag is not None,
            **asdict(built), **built.registers, LOADER_REGISTERS=LOADER_REGISTERS,
            num_warps=4,
        )  # fmt: skip
    return out, lse if return_lse else None


def refuses(call: Call) -> str | None:
    """Why this kernel does not compute the call, or None."""
    if call.device.type != "cuda":
        return "no GPU"
    if torch.version.hip is not None or torch.cuda.get_device_capability(call.device) != (9, 0):
        return "needs compute capability 9.0"
    if call.dtype not in (torch.float16, torch.bfloat16):
        return f"takes fp16 and bf16, got {call.dtype}"
    if call.head_dim % 8 or not 16 <= call.head_dim <= 128:
        return f"takes head_dim 16 to 128 in steps of 8, got {call.head_dim}"
    if call.mask != "none":
        return "takes no mask"
    if call.causal:
        return "takes no causal attention"
    if not (call.batch and call.q_len and call.kv_len):
        return "takes no empty tensors"
    return None


BACKENDS = (TritonBackend("triton_hopper", attend, refuses),)
