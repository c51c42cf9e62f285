"""The Hopper kernel: what it refuses, what the assembler makes of it without a GPU, and on one, the oracle."""

import multiprocessing
import os
import re
import subprocess
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from unittest import mock

import pytest
import torch
from test_kernel_sdpa import call

from videoattn.kernels import reference
from videoattn.testing import assert_close_to_oracle, make_qkv

triton = pytest.importorskip("triton")
flash_hopper = pytest.importorskip("videoattn.kernels.flash_hopper")
Config = flash_hopper.Config

SHARED_MEMORY = 227 * 1024  # of one block on sm_90
HEAD_DIMS = (64, 80, 96, 128, 144, 160, 192, 256)  # each has a form of its own


def half(*shape, offset=0):
    """fp16 [*shape] from `offset` elements behind an aligned address on."""
    return torch.zeros(offset + torch.Size(shape).numel(), dtype=torch.float16)[offset:].view(shape)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "x",
    [
        half(1, 64, 2, 68)[..., :64],
        half(1, 64, 2, 64, offset=1),
        half(1, 64, 64, 2).transpose(2, 3),
        half(1, 64, 1, 64).expand(1, 64, 2, 64),
    ],
    ids=["row", "base", "transposed", "expanded"],
)
def test_strides_that_tma_cannot_take_are_copied(x):
    copy = flash_hopper.readable(x)
    assert copy.is_contiguous() and copy.data_ptr() != x.data_ptr()
    assert flash_hopper.readable(copy) is copy


@pytest.mark.parametrize(
    "x",
    [half(1, 64, 2, 64), half(1, 2, 64, 64).transpose(1, 2), half(2, 64, 6, 40)[:, :, 2:4], half(1, 1, 1, 72)],
    ids=["BNHD", "BHND", "fused", "one"],
)
def test_strides_that_tma_takes(x):
    assert flash_hopper.readable(x) is x


@pytest.mark.parametrize(
    ("facts", "why"),
    [
        ({}, None),
        ({"head_dim": 80, "dtype": torch.bfloat16, "has_kv_len": True, "kv_heads": 1}, None),
        ({"device": torch.device("cpu")}, "no GPU"),
        ({"dtype": torch.float32}, "fp16 and bf16"),
        ({"head_dim": 256}, None),
        ({"head_dim": 264}, "head_dim"),
        ({"head_dim": 60}, "head_dim"),
        ({"mask": "bool"}, "no mask"),
        ({"causal": True}, "causal"),
        ({"kv_len": 0}, "empty"),
    ],
    ids=str,
)
def test_calls(monkeypatch, facts, why):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    refusal = flash_hopper.refuses(call(**{"device": torch.device("cuda")} | facts))
    assert refusal is None if why is None else why in refusal


def test_other_cards(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert "compute capability 9.0" in flash_hopper.refuses(call(device=torch.device("cuda")))


@pytest.mark.parametrize("wrong", [{"N": 96}, {"STAGES": 1}, {"GROUPS": 4}, {"D0": 96}, {"D0": 64, "D1": 64}], ids=str)
def test_configs_that_do_not_exist(wrong):
    with pytest.raises(ValueError, match="Config: wanted"):
        Config(**wrong)


@pytest.mark.parametrize("head_dim", range(16, 257, 8))
def test_every_head_is_covered(head_dim):
    built = flash_hopper.config(head_dim)
    assert head_dim <= built.D0 + built.D1


# ---------------------------------------------------------------- what the assembler makes of it


@pytest.fixture(scope="module")
def compiler():
    """A process in which Triton is no interpreter."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        with mock.patch.dict(os.environ):
            os.environ.pop("TRITON_INTERPRET", None)
            pool.submit(os.getpid).result()  # starts it
        yield pool


@pytest.fixture(
    scope="module",
    params=[*((head_dim, "all") for head_dim in HEAD_DIMS), (64, "lists"), (128, "lists"), (128, "gaps")],
    ids=str,
)
def assembled(request, compiler, tmp_path_factory):
    """What `assemble` gives."""
    return compiler.submit(assemble, request.param, tmp_path_factory.mktemp("kernel")).result()


def assemble(form, folder):
    """(the form, shared memory in bytes, what the assembler says, machine code) of a kernel built for sm_90."""
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    head_dim, blocks = form
    built = flash_hopper.config(head_dim)
    signature, constants = {}, {}
    for place, width in enumerate((built.D0, built.D1)):
        for name, rows in {"q": 64, "k": built.N, "v": built.N, "o": 64}.items():
            if width:
                layout = flash_hopper.tile_layout(width)
                signature[f"{name}{place}_desc"] = f"tensordesc<bf16[1, 1, {rows}, {width}],{layout!r}>"
            else:
                constants[f"{name}{place}_desc"] = None
    signature |= {"lse": "*fp32", "qk_scale": "fp32"}
    signature |= dict.fromkeys(("kv_lens", "list_counts", "list_indices", "live", "flag"), "*i32")
    registers = built.registers
    options = {"num_warps": 4, "maxnreg": registers.pop("maxnreg")}
    constants |= {"HAS_LENS": True, "BLOCKS": blocks != "all", "LIVE": blocks == "gaps", "HAS_FLAG": True}
    constants |= {**asdict(built), **registers}
    constants["LOADER_REGISTERS"] = flash_hopper.LOADER_REGISTERS
    signature |= {name: "i32" for name in flash_hopper.forward.arg_names if name not in signature | constants}
    signature |= dict.fromkeys(constants, "constexpr")
    signature = {name: signature[name] for name in flash_hopper.forward.arg_names}
    source = GluonASTSource(flash_hopper.forward, signature, constants)
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)

    ptx, cubin = (folder / name for name in ("kernel.ptx", "kernel.cubin"))
    ptx.write_text(kernel.asm["ptx"])
    tools = triton.knobs.nvidia
    said = subprocess.run(
        [tools.ptxas.path, "-v", "--gpu-name=sm_90a", ptx, "-o", cubin], check=True, capture_output=True, text=True
    ).stderr
    code = subprocess.run(
        [tools.cuobjdump.path, "--dump-sass", cubin], check=True, capture_output=True, text=True
    ).stdout
    return built, kernel.metadata.shared, said, code


def test_it_fits_and_nothing_spills(assembled):
    _, shared, said, code = assembled
    assert shared <= SHARED_MEMORY
    assert " 0 bytes spill stores, 0 bytes spill loads" in said
    assert "USETMAXREG" in code


def test_the_tensor_cores_run_while_exponentials_are_computed(assembled):
    """No product is serialised, and between the waits for S and for acc in the loop lie the tile's exponentials."""
    built, _, said, code = assembled
    assert "wgmma" not in said, said
    steps = re.findall(r"\b(HGMMA|MUFU\.EX2|WARPGROUP\.DEPBAR\.LE gsb0, 0x[0-2])\b", code)
    text = "".join({"H": "H", "M": "E"}.get(step[0], step[-1]) for step in steps)
    values_in_flight = 2 if built.D1 else 1
    overlapped = re.findall(rf"{values_in_flight}(E+)0", text)
    assert len(overlapped) >= 2 and all(len(run) >= built.N // 2 for run in overlapped), text


# ---------------------------------------------------------------- on the GPU

gpu = pytest.mark.gpu


def check(q, k, v, **options):
    out, lse = flash_hopper.attend(q, k, v, return_lse=True, **options)
    assert_close_to_oracle(out, q, k, v, **options)
    assert out.is_contiguous()
    exact = reference.attend(q, k, v, **options)[1]
    torch.testing.assert_close(lse.double(), exact, rtol=2e-4, atol=2e-4)  # equal infinities count as close


@gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [16, 40, 64, 72, 96, 128, 144, 160, 192, 208, 256])
@pytest.mark.parametrize(
    "lengths", [(1, 1), (63, 63), (129, 129), (193, 257), (1000, 1000), (300, 77), (77, 3000)], ids=str
)
def test_it_equals_the_oracle(lengths, head_dim, dtype, poisoned):
    check(*make_qkv(2, *lengths, 3, head_dim, dtype=dtype, device="cuda"))


@gpu
@pytest.mark.parametrize("head_dim", [64, 80, 128, 160, 256])
@pytest.mark.parametrize("kv_len", [(0, 1, 256, 520), (0, 0, 0, 0), (520, 519, 128, 127)], ids=str)
def test_prefix_lengths(kv_len, head_dim, poisoned):
    q, k, v = make_qkv(4, 300, 520, 3, head_dim, dtype=torch.bfloat16, device="cuda")
    check(q, k, v, kv_len=torch.tensor(kv_len, dtype=torch.int32, device="cuda"))


@gpu
@pytest.mark.parametrize("layout", ["BNHD", "BHND", "fused"])
@pytest.mark.parametrize("lengths", [(321, 321), (321, 200)], ids=str)
def test_layouts_and_shared_heads(lengths, layout, poisoned):
    check(*make_qkv(2, *lengths, 6, 64, kv_heads=2, dtype=torch.bfloat16, layout=layout, device="cuda"), scale=0.5)


@gpu
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_more_work_than_processors_gives_the_same_bits_every_time(head_dim, poisoned):
    q, k, v = make_qkv(3, 700, 700, 60, head_dim, dtype=torch.bfloat16, device="cuda")
    check(q, k, v)
    first, _ = flash_hopper.attend(q, k, v)
    assert all(torch.equal(flash_hopper.attend(q, k, v)[0], first) for _ in range(20))


@gpu
def test_the_flag_tells_of_what_is_not_finite():
    q, k, v = make_qkv(1, 300, 300, 2, 64, dtype=torch.bfloat16, device="cuda")
    flag = torch.zeros(1, dtype=torch.int32, device="cuda")
    flash_hopper.attend(q, k, v, flag=flag)
    assert flag.item() == 0
    v[0, 7, 1, 5] = float("inf")
    flash_hopper.attend(q, k, v, flag=flag)
    assert flag.item() == 1
