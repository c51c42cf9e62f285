"""Our Triton kernels compiled ahead of time for cards that are not here: do they fit, do they spill, what multiplies.

    python tests/aot.py              every head_dim, dtype and form of call, some hours
    python tests/aot.py --shipped    one call a kernel and head_dim

In processes of their own, because Triton must be there without its interpreter and in the version that the configs were
tuned with, which `make` puts beside the one that torch asks for. What is compiled is what a launch compiles, on tensors
without memory: types, alignments and constants are those that the launcher hands to Triton.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import multiprocessing
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar
from unittest import mock

X = TypeVar("X")
Y = TypeVar("Y")

WORKERS = 2
REGISTERS = 255
HEAD_DIMS = (4, 40, 64, 72, 80, 88, 96, 112, 128, 160, 256)
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""Compute capability -> shared memory of one block (CUDA C++ Programming Guide, table of technical specifications)."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One kernel, compiled for one kind of call on one card.

    Args:
        kernel: the module in kernels/.
        capability: 90 for 9.0.
        head_dim: of a GroupNorm, channels of a group.
        tokens: queries and keys of a row; the other kernels are made for any number.
        pv: how the quantised kernel multiplies p and v.
        family: whose projections a pass before attention takes, "" for finished q, k and v.
        blocks: places of a block of queries and of one of keys, of the block-sparse kernel and of lists.
        lists: whether the quantised kernel walks along lists. gaps: whether more of their blocks than the last may be
            filled in part.
        tuned: entries that replace those of the shipped config.
    """

    kernel: Literal[
        "temporal",
        "flash",
        "block_sparse",
        "remainder",
        "antidiagonal",
        "quantised",
        "prepare",
        "quantise",
        "group_norm",
    ]
    capability: int
    head_dim: int
    tokens: int = 4096
    dtype: Literal["fp16", "bf16", "fp32"] = "bf16"
    mask: Literal["none", "bool", "additive"] = "none"
    causal: bool = False
    kv_len: bool = False
    lse: bool = False
    pv: Literal["fp8", "16bit", "int8", ""] = ""
    family: Literal["wan", "cogvideox", "hunyuan", ""] = ""
    blocks: tuple[int, int] = (128, 128)
    lists: bool = False
    gaps: bool = False
    tuned: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        shape = f" x {self.tokens} tokens" if self.kernel == "temporal" else ""
        extras = [self.mask] * (self.mask != "none")
        extras += [x for x in ("causal", "kv_len", "gaps", "lse") if getattr(self, x)]
        if self.kernel == "block_sparse" or self.lists:
            extras.append("blocks {} x {}".format(*self.blocks))
        kernel = " ".join(filter(None, (self.kernel, self.family, self.pv)))
        return " ".join([f"{kernel} sm_{self.capability} head_dim {self.head_dim}{shape} {self.dtype}", *extras])


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What the assembler made of a case; of several kernels, the most that one has.

    Args:
        triton: the version that compiled it.
        registers: of a thread, spilled: bytes a thread stores to memory for want of them.
        shared: bytes of shared memory a block.
        products: instruction -> how often it stands in the code, of those that multiply matrices.
        serialized: whether the assembler made asynchronous products wait for each other.
    """

    triton: str
    registers: int
    spilled: int
    shared: int
    products: dict[str, int]
    serialized: bool

    def wrong(self, case: Case) -> list[str]:
        """What is wrong with it, in a few words each."""
        found = []
        if self.registers > REGISTERS:
            found.append(f"{self.registers} registers")
        if self.spilled:
            found.append(f"{self.spilled} bytes spilled")
        if self.shared > 1024 * SHARED_KIB[case.capability]:
            found.append(f"{self.shared / 1024:.0f} KiB of shared memory, the card has {SHARED_KIB[case.capability]}")
        if (
            case.kernel in ("flash", "block_sparse", "remainder", "antidiagonal", "quantised")
            and case.capability == 90
            and case.dtype != "fp32"
            and set(self.products) != {"wgmma"}
        ):
            found.append(f"products are {self.products}, not wgmma alone")
        if self.serialized:
            found.append("products wait for each other")
        return found


def quantised(head_dims: Iterable[int], forms: Iterable[dict[str, object]]) -> list[Case]:
    """Every way to multiply p and v on every card that has it."""
    return [
        Case(kernel="quantised", pv=pv, capability=capability, head_dim=head_dim, **form)
        for capability in SHARED_KIB
        for pv in ("fp8", "16bit", "int8")
        if pv != "fp8" or capability >= 89
        for head_dim in head_dims
        for form in forms
    ]


def block_sparse(head_dims: Iterable[int], forms: Iterable[dict[str, object]]) -> list[Case]:
    """For every card."""
    return [
        Case(kernel="block_sparse", capability=capability, head_dim=head_dim, **form)
        for capability in SHARED_KIB
        for head_dim in head_dims
        for form in forms
    ]


def remainder(head_dims: Iterable[int], pvs: Iterable[str]) -> list[Case]:
    """What adds the means of blocks that were left out, behind the exact kernel (pv "") and the quantised ones."""
    return [
        Case(kernel="remainder", capability=capability, head_dim=head_dim, pv=pv)
        for capability in SHARED_KIB
        for head_dim in head_dims
        for pv in pvs
        if pv != "fp8" or capability >= 89
    ]


def selection(head_dims: Iterable[int]) -> list[Case]:
    """What estimates which key blocks matter, for every card."""
    return [
        Case(kernel="antidiagonal", capability=capability, head_dim=head_dim)
        for capability in SHARED_KIB
        for head_dim in head_dims
    ]


def before() -> list[Case]:
    """The passes before attention, with what each family has of them, for every card."""
    return [
        Case(kernel=kernel, capability=capability, family=family, head_dim=head_dim, pv=pv)
        for capability in SHARED_KIB
        for family, head_dim in (("wan", 128), ("cogvideox", 64), ("hunyuan", 128), ("", 40), ("", 64), ("", 256))
        for kernel, pv in (("prepare", ""), ("quantise", "fp8" if capability >= 89 else "int8"))
        if family or kernel == "quantise"
    ]


def norms(dtypes: Iterable[str], eaches: Iterable[int]) -> list[Case]:
    """GroupNorms of images and of slices of a video, with SiLU, for every card."""
    return [
        Case(kernel="group_norm", capability=capability, head_dim=each, dtype=dtype)
        for capability in SHARED_KIB
        for dtype in dtypes
        for each in eaches
    ]


def shipped() -> list[Case]:
    """One call a kernel and head_dim, and two lengths of short rows where models have them, for every card."""
    return (
        quantised((40, 64, 80, 128, 160), [{}])
        + quantised((64, 128), [{"lists": True}, {"lists": True, "gaps": True, "blocks": (192, 128)}])
        + block_sparse((64, 128), [{}, {"blocks": (192, 128)}])
        + remainder((64, 128), ("", "fp8", "16bit"))
        + selection((64, 128, 256))
        + before()
        + norms(("fp16", "fp32"), (10,))
        + [
            Case(kernel=kernel, capability=capability, head_dim=head_dim, tokens=tokens)
            for capability in SHARED_KIB
            for head_dim in HEAD_DIMS
            for kernel, tokens in (("flash", 4096), ("temporal", 16), ("temporal", 32))
            if tokens != 32 or head_dim in (40, 64, 80, 160)
        ]
    )


def everything() -> list[Case]:
    """Every head_dim, dtype and form of call."""
    forms = [{}, {"mask": "bool"}, {"mask": "additive"}, {"causal": True}, {"kv_len": True}]
    sizes = [
        {"capability": capability, "dtype": dtype, "head_dim": head_dim, "lse": lse}
        for capability in SHARED_KIB
        for dtype in ("fp16", "bf16", "fp32")
        for head_dim in (4, *range(8, 257, 8))
        for lse in (False, True)
    ]
    dense = [Case(kernel="flash", **size, **form) for size in sizes for form in forms]
    short = [
        Case(kernel="temporal", tokens=tokens, kv_len=kv_len, **size)
        for size in sizes
        for tokens in (16, 32, 64, 128)
        for kv_len in (False, True)
        if tokens <= 32 or size["head_dim"] * (4 if size["dtype"] == "fp32" else 2) <= 256
    ]
    forms = [{"kv_len": kv_len, "lse": lse} for kv_len in (False, True) for lse in (False, True)]
    forms += [
        {"lists": True, "blocks": (block_q, 128), "gaps": gaps, **form}
        for block_q in (64, 128, 192)
        for gaps in (False, True)
        for form in forms
    ]
    blocks = [
        {"blocks": sizes, "dtype": dtype, "lse": True}
        for sizes in itertools.product((64, 128, 192), (64, 128))
        for dtype in ("fp16", "bf16", "fp32")
    ]
    return (
        dense
        + short
        + quantised(range(16, 257, 8), forms)
        + block_sparse(range(16, 257, 8), blocks)
        + selection(range(16, 257, 8))
        + norms(("fp16", "bf16", "fp32"), (1, 4, 10, 16, 40, 80))
    )


# ---------------------------------------------------------------- in a process that can compile


class Card:
    """Stands for Triton's driver: kernels are compiled for the card, and never loaded."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability  # what was compiled for one card is not taken for another

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)


class Compiling:
    """Stands for a kernel: compiles what a launch would launch."""

    def __init__(self, kernel, made: list) -> None:
        self.kernel = kernel
        self.made = made

    def __getitem__(self, grid):
        def launch(*args, **kwargs) -> None:
            self.made.append(self.kernel.warmup(*args, grid=grid, **kwargs))

        return launch


def compiled(case: Case) -> Figures:
    """Compile one case. Triton must not have been imported for its interpreter."""
    import torch
    import triton

    from videoattn.kernels import (
        antidiagonal,
        block_sparse,
        flash,
        group_norm,
        operands,
        prepare,
        quantise,
        quantised,
        temporal,
    )
    from videoattn.kernels import remainder as remainder_kernel
    from videoattn.selection.arrangement import Blocks
    from videoattn.selection.block_list import BlockList

    dtypes = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "int": torch.int32}
    dtypes |= {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "bool": torch.bool}

    def tensor(*shape: int, dtype: str = case.dtype):
        return torch.empty(*shape, dtype=dtypes[dtype], device="meta")

    n, d = case.tokens, case.head_dim
    options = {"return_lse": case.lse, "flag": tensor(1, dtype="int")}
    if case.kv_len:
        options["kv_len"] = tensor(2, dtype="int")
    if case.kernel == "flash":
        mask = {"none": None, "bool": tensor(n, n, dtype="bool"), "additive": tensor(n, n)}[case.mask]
        options |= {"mask": mask, "causal": case.causal}

    of_q, of_k = (-(-n // block) for block in case.blocks)
    lists = BlockList(
        counts=tensor(2, 8, of_q, dtype="int"),
        indices=tensor(2, 8, of_q, of_k, dtype="int"),
        keep=tensor(2, 8, of_q, of_k, dtype="bool"),
        live=tensor(of_k, dtype="int"),
        block_q=case.blocks[0],
        block_k=case.blocks[1],
        gaps=case.gaps,
    )

    log, made = io.StringIO(), []
    modules = {"flash": flash, "temporal": temporal, "quantised": quantised, "prepare": prepare, "quantise": quantise}
    modules |= {"block_sparse": block_sparse, "antidiagonal": antidiagonal, "remainder": remainder_kernel}
    modules["group_norm"] = group_norm
    module = modules[case.kernel]
    for plan in (x for module in modules.values() for name, x in vars(module).items() if name.endswith("_plan")):
        plan.cache_clear()  # which do not tell cards apart
    triton.runtime.driver.set_active(Card(case.capability))
    triton.knobs.nvidia.dump_ptxas_log = True
    with contextlib.ExitStack() as stack:
        names = {
            "prepare": ["_prepare"],
            "quantise": ["_statistics", "_operands"],
            "remainder": ["_means", "_quantised_means", "_add"],
            "antidiagonal": ["_regroup", "_tile_sums", "_masses"],
            "group_norm": ["_norm_moments", "_norm_merge", "_normalise"],
        }
        for name in names.get(case.kernel, ["_forward"]):
            stack.enter_context(mock.patch.object(module, name, Compiling(getattr(module, name), made)))
        if case.tuned:
            config = module.config
            stack.enter_context(mock.patch.object(module, "config", lambda *args: config(*args) | dict(case.tuned)))
        for of_card in (antidiagonal, block_sparse, flash, quantise, quantised, remainder_kernel):
            stack.enter_context(mock.patch.object(of_card, "capability_of", lambda device: case.capability))
        stack.enter_context(contextlib.redirect_stdout(log))
        if case.kernel == "quantised" or case.kernel == "remainder" and case.pv:
            w, blocks = -(-d // 16) * 16, -(-n // operands.KEYS)
            ints, row = tensor(2, 8, n, w, dtype="int8"), tensor(2, 8, n, dtype="fp32")
            v, v_scale = tensor(2, n, 8, d), None
            if case.pv != "16bit":
                v, v_scale = tensor(2, 8, w, blocks * operands.KEYS, dtype=case.pv), tensor(2, 8, d, dtype="fp32")
            x = operands.Quantised(ints, row, ints, tensor(2, 8, blocks, 4, dtype="fp32"), v, v_scale, row)
            options |= {"lists": lists} if case.lists else {}
            if case.kernel == "quantised":
                quantised.attend_quantised(x, head_dim=d, dtype=dtypes[case.dtype], **options)
            else:
                remainder_kernel.add_quantised(tensor(2, n, 8, d), row, x, lists, flag=tensor(1, dtype="int"))
        elif case.kernel == "block_sparse":
            block_sparse.attend(*(tensor(2, n, 8, d) for _ in range(3)), lists, **options)
        elif case.kernel == "remainder":
            out, *qkv = (tensor(2, n, 8, d) for _ in range(4))
            remainder_kernel.add(out, tensor(2, 8, n, dtype="fp32"), *qkv, lists, flag=tensor(1, dtype="int"))
        elif case.kernel == "antidiagonal":
            blocks = Blocks(size=128, live=tensor(n // 128, dtype="int"), video=0, boxes=tensor(0, 3, 2, dtype="int"))
            antidiagonal.block_mass(tensor(2, n, 8, d), tensor(2, n, 8, d), blocks, blocks, stride=16)
        elif case.kernel == "group_norm":
            norm = torch.nn.GroupNorm(32, 32 * d, device="meta", dtype=dtypes[case.dtype])
            image = tensor(2, 32 * d, 72, 128)
            for x in (image, image.to(memory_format=torch.channels_last)):
                group_norm.group_norm(x, norm, silu=True)
            video = tensor(2, 25, 32 * d, 9216).transpose(1, 2)
            for x in (video[..., :1152], video[..., 1152:2305]):
                of = group_norm.moments(x, 32, group_norm.moments(x, 32))
                group_norm.normalise(x, *group_norm.affine(of, norm.weight, norm.bias, 32 * d, norm.eps))
        elif case.family:
            prologue, streams = _projected(case, tensor)
            if case.kernel == "prepare":
                prepare.prepare(prologue, 8, *streams)
            else:
                quantise.quantise_streams(prologue, 8, *streams, pv=case.pv)
        elif case.kernel == "quantise":
            quantise.quantise(*(tensor(2, n, 8, d) for _ in range(3)), pv=case.pv)
        else:
            module.attend(*(tensor(2, n, 8, d) for _ in range(3)), **options)

    said, ptx = log.getvalue(), "".join(kernel.asm["ptx"] for kernel in made)
    instructions = {"wgmma": r"\bwgmma\.mma_async", "mma": r"\bmma\.sync", "tcgen05": r"\btcgen05\.mma\."}
    counts = {name: len(re.findall(pattern, ptx)) for name, pattern in instructions.items()}
    return Figures(
        triton=triton.__version__,
        registers=max(map(int, re.findall(r"Used (\d+) registers", said))),
        spilled=max(map(int, re.findall(r"(\d+) bytes spill stores", said))),
        shared=max(kernel.metadata.shared for kernel in made),
        products={name: count for name, count in counts.items() if count},
        serialized="wgmma" in said,
    )


def _projected(case: Case, tensor: Callable[..., X]):
    """A family's prologue and streams: what its processors hand over, made of `tensor`."""
    from diffusers.models.normalization import RMSNorm
    from torch import nn

    from videoattn.prologue import Prologue, Stream, rotate_pairs

    n, d = case.tokens, case.head_dim

    def stream(cls: type, width: int, rope=None, span: slice | None = None) -> Stream:
        norms = (cls(width, eps=1e-6).to("meta", tensor(1).dtype) for _ in "qk")
        return Stream(*(tensor(2, n, 8 * d) for _ in "qkv"), *norms, rope, span)

    if case.family == "wan":
        tables = tensor(1, n, 1, d, dtype="fp32")
        rope = tables[..., 0::2], tables[..., 1::2]
        prologue = Prologue(norm="across_heads", rotate=rotate_pairs, pairs="halves")
        return prologue, [stream(nn.RMSNorm, 8 * d, rope)]
    prologue = Prologue(norm="per_head", rotate=rotate_pairs, pairs="repeated")
    if case.family == "hunyuan":
        return prologue, [stream(RMSNorm, d, (tensor(n, d, dtype="fp32"),) * 2), stream(RMSNorm, d)]
    return prologue, [stream(nn.LayerNorm, d, (tensor(n - 226, d, dtype="fp32"),) * 2, slice(226, None))]


# ---------------------------------------------------------------- here


def elsewhere(function: Callable[[X], Y], arguments: Iterable[X]) -> Iterator[Y]:
    """`function` of each argument, in processes that can compile; both must be found by import."""
    from videoattn.kernels.triton_backend import TUNED_WITH

    with (
        tempfile.TemporaryDirectory() as cache,
        ProcessPoolExecutor(
            WORKERS,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_prepare,
            initargs=(str(Path(sys.prefix) / f"triton-{TUNED_WITH}"), cache),
        ) as executor,
    ):
        yield from executor.map(function, arguments)


def _prepare(tuned_with: str, cache: str) -> None:
    """Of a process that compiles, before it imports Triton; a folder that is not there is passed over."""
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_CACHE_DIR"] = cache
    sys.path.insert(0, tuned_with)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shipped", action="store_true", help="one call a kernel and head_dim")
    parser.add_argument("--only", default="", help="cases whose line begins so: 'flash sm_90'")
    args = parser.parse_args(argv)
    cases = [case for case in (shipped() if args.shipped else everything()) if str(case).startswith(args.only)]
    failed = 0
    for case, figures in zip(cases, elsewhere(compiled, cases), strict=True):
        wrong = figures.wrong(case)
        failed += bool(wrong)
        products = " ".join(f"{name} {count}" for name, count in figures.products.items())
        print(
            f"{case}: {figures.registers} registers, {figures.shared / 1024:.0f} KiB, {products}",
            *(f"WRONG: {what}" for what in wrong),
            flush=True,
        )
    print(f"{len(cases)} compiled, {failed} wrong")
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
