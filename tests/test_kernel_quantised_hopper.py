"""The Hopper kernel on quantised operands: what it refuses, what the assembler makes of it, and on a GPU, the emulation."""

import contextlib
import functools
import io
import math
import re
import subprocess

import aot
import pytest
import torch
from quantised_operands import HARD, make_hard
from test_kernel_sdpa import call

from videoattn.kernels import quantised_reference as emulated
from videoattn.kernels.operands import KEYS
from videoattn.policy import EXACT, Dense
from videoattn.testing import make_qkv

triton = pytest.importorskip("triton")
hopper = pytest.importorskip("videoattn.kernels.quantised_hopper")
quantise = pytest.importorskip("videoattn.kernels.quantise").quantise

FP16, BF16 = torch.float16, torch.bfloat16
PVS = ("fp8", "16bit")
HEAD_DIMS = (64, 128)
BACKENDS = {backend.pv: backend for backend in hopper.BACKENDS}
SHARED_MEMORY = 227 * 1024  # of one block on sm_90
EPS = torch.finfo(torch.float32).eps


# ---------------------------------------------------------------- refusals


@pytest.fixture
def card(monkeypatch):
    def pretend(*capability):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    pretend(9, 0)
    return pretend


def test_two_backends_of_our_own_with_one_decision_each(card):
    assert [backend.name for backend in hopper.BACKENDS] == ["triton_hopper_int8_fp8", "triton_hopper_int8_16bit"]
    asked = call(device=torch.device("cuda"), head_dim=128, dtype=BF16)
    for pv, backend in BACKENDS.items():
        assert backend.own and backend.computes(Dense(f"int8_qk_{pv}_pv"))
        assert backend.refuses(asked, backend.decision) is None
        assert backend.refuses(asked, EXACT) == f"computes int8_qk_{pv}_pv attention only, asked for exact"


@pytest.mark.parametrize("pv", PVS)
@pytest.mark.parametrize(
    ("facts", "why"),
    [
        ({"head_dim": 64}, None),
        ({"layout": "BHND", "has_kv_len": True, "kv_heads": 1, "dtype": FP16}, None),
        ({"device": torch.device("cpu")}, "no GPU"),
        ({"head_dim": 80}, "takes head_dim 64 and 128, got 80"),
        ({"head_dim": 256}, "takes head_dim 64 and 128, got 256"),
        ({"dtype": torch.float32}, "takes fp16 and bf16, got torch.float32"),
        ({"mask": "additive"}, "takes no mask"),
        ({"causal": True}, "takes no causal attention"),
        ({"q_len": 0}, "takes no empty tensors"),
    ],
    ids=str,
)
def test_calls(card, pv, facts, why):
    asked = call(**{"device": torch.device("cuda"), "dtype": BF16, "head_dim": 128} | facts)
    assert BACKENDS[pv].refuses(asked, BACKENDS[pv].decision) == why


@pytest.mark.parametrize("capability", [(8, 9), (10, 0), (12, 0)], ids=str)
def test_other_cards(card, capability):
    card(*capability)
    for backend in hopper.BACKENDS:
        asked = call(device=torch.device("cuda"), head_dim=128, dtype=BF16)
        assert backend.refuses(asked, backend.decision) == "needs compute capability 9.0"


@pytest.mark.parametrize(
    ("pv", "head_dim", "tile"),
    [("fp8", 128, (192, 128, 16)), ("fp8", 64, (192, 128, 16)), ("16bit", 128, (128, 128, 12)), ("16bit", 64, (192, 128, 16))],
)  # fmt: skip
def test_the_tile_that_the_profiler_counts_with(pv, head_dim, tile):
    assert BACKENDS[pv].tile(call(device=torch.device("cuda"), head_dim=head_dim)) == tile


# ---------------------------------------------------------------- what the assembler makes of it

FORMS = [
    (pv, head_dim, form) for pv in PVS for head_dim in HEAD_DIMS for form in (
        (False, False, True, "all"),
        (True, True, True, "all"),
        (False, False, True, "lists"),
    ) if (pv, head_dim, form[3]) != ("16bit", 64, "lists")  # each is there with another
]  # fmt: skip
FORMS += [(pv, 128, (True, False, True, "all")) for pv in PVS]
FORMS += [("fp8", 128, (True, True, True, "lists")), ("fp8", 128, (False, False, True, "gaps"))]  # the most registers
FORMS += [("fp8", head_dim, (True, "rounded", True, "lists")) for head_dim in HEAD_DIMS]


@pytest.fixture(scope="module")
def assembled():
    """(pv, head_dim, (kv_len, lse or its way, flag, blocks)) -> what `assemble` gives, with the Triton that the configs were tuned with."""
    return dict(zip(FORMS, aot.elsewhere(assemble, FORMS), strict=True))


def config_of(form):
    """Blocks with gaps are square."""
    return hopper.config(form[1], form[0], 128 if form[2][3] == "gaps" else None)


def assemble(given):
    """(shared memory in bytes, what the assembler says, machine code) of a form built for sm_90."""
    import tempfile
    from pathlib import Path

    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    pv, d, form = given
    options = config_of(given).options
    compile_options = {name: options.pop(name) for name in ("num_warps", "maxnreg")}
    constants = {"HAS_LENS": form[0], "HAS_LSE": bool(form[1]), "ADD": form[1] is True, "HAS_FLAG": form[2]} | options
    constants |= {"BLOCKS": form[3] != "all", "LIVE": form[3] == "gaps"}
    tiles = {
        "q_desc": ("i8", 64, d, 8),
        "k_desc": ("i8", KEYS, d, 8),
        "v_desc": ("fp8e4nv", d, KEYS, 8) if pv == "fp8" else ("bf16", KEYS, d, 16),
        "o_desc": ("bf16", 64, d, 16),
    }
    signature = {
        name: f"tensordesc<{dtype}[1, 1, {rows}, {width}],{hopper.tile_layout(width, bits)!r}>"
        for name, (dtype, rows, width, bits) in tiles.items()
    }
    signature |= dict.fromkeys(("q_scale", "k_scale", "v_scale", "lse", "lse_shift"), "*fp32")
    signature |= dict.fromkeys(("kv_lens", "list_counts", "list_indices", "live", "flag"), "*i32")
    signature |= {name: "i32" for name in hopper.forward.arg_names if name not in signature | constants}
    signature |= dict.fromkeys(constants, "constexpr")
    signature = {name: signature[name] for name in hopper.forward.arg_names}
    source = GluonASTSource(hopper.forward, signature, constants)

    tools, log = triton.knobs.nvidia, io.StringIO()
    tools.dump_ptxas_log = True
    with contextlib.redirect_stdout(log):
        kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=compile_options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        command = [tools.cuobjdump.path, "--dump-sass", cubin]
        code = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return kernel.metadata.shared, log.getvalue(), code


def loops_over_keys(code):
    """The instructions of each loop that multiplies and has no other such loop in it.

    A loop ends in a branch that is taken or not; what waits for a barrier stands behind the kernel, and jumps back always.
    """
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", code)
    at = {int(address, 16): place for place, (address, _) in enumerate(lines)}
    loops = []
    for place, (address, what) in enumerate(lines):
        target = re.match(r"@\S+ BRA\b.*\b0x([0-9a-f]+)", what)
        if target and int(target[1], 16) < int(address, 16):
            first = at[int(target[1], 16)]
            body = [what for _, what in lines[first : place + 1]]
            if any("GMMA" in what for what in body):
                loops.append((first, place, body))
    return [
        body
        for first, last, body in loops
        if not any((a, b) != (first, last) and first <= a and b <= last for a, b, _ in loops)
    ]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_it_fits_and_the_loop_over_the_keys_does_not_spill(form, assembled):
    shared, said, code = assembled[form]
    groups = config_of(form).GROUPS
    assert shared <= SHARED_MEMORY
    assert "wgmma" not in said, "products are serialised: " + said
    bodies = [body for body in loops_over_keys(code) if sum("MUFU.EX2" in what for what in body) >= KEYS // 2]
    assert len(bodies) == groups  # each has its own
    for body in bodies:
        text = "\n".join(body)
        assert not re.search(r"\b(LDL|STL)\b", text)
        assert not re.search(r"\bI2F", text), "scores are converted"
        assert text.count("IGMMA") == form[1] // 32
        # p v; and the sums of p, but for a log-sum-exp
        values = form[1] // 64 * KEYS // 32 if form[0] == "fp8" else KEYS // 16
        sums = 0 if form[2][1] is True else KEYS // (32 if form[0] == "fp8" else 16)
        assert len(re.findall(r"\b[QH]GMMA", text)) == values + sums
    assert int(re.search(r"(\d+) bytes spill stores", said)[1]) <= 256  # once a piece of work


@pytest.mark.parametrize("form", [form for form in FORMS if form[0] == "16bit"], ids=str)
def test_the_tensor_cores_run_while_exponentials_are_computed(form, assembled):
    """Between the waits for the scores and for acc in the loop lie the tile's exponentials."""
    code = assembled[form][2]
    steps = re.findall(r"\b(GMMA|MUFU\.EX2|WARPGROUP\.DEPBAR\.LE gsb0, 0x[0-2])\b", code.replace("HGMMA", " GMMA"))
    text = "".join({"G": "H", "M": "E"}.get(step[0], step[-1]) for step in steps)
    overlapped = re.findall(rf"{1 if form[2][1] else 2}(E+)0", text)
    groups = config_of(form).GROUPS
    assert len(overlapped) >= groups and all(len(run) >= KEYS // 2 for run in overlapped), text


# ---------------------------------------------------------------- on the GPU

gpu = pytest.mark.gpu


def lengths(*values):
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def check(q, k, v, pv, *, lse=False, scale=None, kv_len=None):
    """The kernel's answer is the emulation's but for what is rounded in fp32 and in sums of the tensor cores.

    In units of log2 a score comes to 2^x by four roundings, from numbers no greater than twice the greatest score and the
    offset of 9; 1.5 * 2^23 times the scale, which is taken off, and the difference of that and the maximum are each off by
    three quarters of a scale; 2^x itself is good to 2^-22. With p off by no more than that, what p is rounded to lies
    between what 2^-e p and 2^e p are rounded to, as rounding is monotone, and so does a sum of that. Tensor cores
    keep 14 bits of a sum of e4m3 products, of which 32 are one step.
    """
    d, dtype = q.shape[3], q.dtype
    x = emulated.quantise(q, k, v, pv=pv, scale=scale, kv_len=kv_len, return_lse=lse)
    flag = torch.zeros(1, dtype=torch.int32, device="cuda")
    out, got = hopper.attend_quantised(x, head_dim=d, dtype=dtype, kv_len=kv_len, return_lse=lse, flag=flag)
    assert out.shape == q.shape and out.dtype == dtype and out.is_contiguous()
    assert (got is not None) == lse and flag.item() == 0

    emulate = functools.partial(emulated.attend_quantised, head_dim=d, dtype=dtype, kv_len=kv_len, backwards=True)
    exact, exact_lse = emulate(x, rounded_sum=not lse)
    step = (x.q_scale.double().amax() * x.k_scale.double().amax()).item()
    greatest = ((x.q_scale.double() * x.q.double().abs().sum(-1)).amax() * 127 * x.k_scale.double().amax()).item()
    off = (4 * greatest + 18) * EPS + 1.5 * step + 2.0**-21
    tiles = -(-k.shape[1] // KEYS)
    relative = 2.0**off - 1
    plus = x._replace(v=x.v.float().abs().to(x.v.dtype))
    ones = x._replace(v=torch.ones_like(x.v, dtype=torch.float32).to(x.v.dtype))
    if pv == "fp8":
        ones = ones._replace(v_scale=torch.ones_like(x.v_scale))
    most, least = (emulate(plus, nudge=2.0 ** (sign * off))[0] for sign in (1, -1))
    average = most
    spread = most - least
    if not lse:  # both over the sum of rounded p, which is off by as much
        high, low = (emulate(ones, nudge=2.0 ** (sign * off))[0].clamp_min(1e-30) for sign in (1, -1))
        average, spread = most / low, (most - least) / low + most * (high - low) / low.square()
    units = 2 * (k.shape[1] + 8) * EPS + (4 + tiles) * relative + (2 * KEYS / 32 * 2.0**-13 if pv == "fp8" else 0.0)
    bound = spread + units * average + exact.abs() * torch.finfo(dtype).eps / 2 + torch.finfo(dtype).tiny
    blind = exact_lse == -torch.inf
    bound[blind.transpose(1, 2)] = 0.0
    excess = (out.double() - exact).abs() - bound
    assert (excess <= 0).all(), f"off by {excess.amax():.2e} more than it may be"

    if lse:
        assert got.shape == (q.shape[0], q.shape[2], q.shape[1]) and got.dtype == torch.float32
        assert torch.equal(got == -torch.inf, blind)
        shift = x.lse_shift.abs().double() + exact_lse.abs()
        allowed = off + (k.shape[1] + tiles + 8) * EPS + 2 * shift * EPS
        assert ((got - exact_lse).abs() <= allowed)[~blind].all()
    return out


@gpu
@pytest.mark.parametrize("pv", PVS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_a_log_sum_exp_of_rounded_weights(head_dim, pv, poisoned):
    """The output is the one without a log-sum-exp, which is off by the weights' rounding."""
    q, k, v = make_qkv(2, 300, 777, 4, head_dim, kv_heads=2, dtype=BF16, device="cuda")
    x = quantise(q, k, v, pv=pv, return_lse=True)
    sizes = {"head_dim": head_dim, "dtype": BF16}
    out, lse = hopper.attend_quantised(x, **sizes, return_lse=True, rounded_sums=True)
    assert torch.equal(out, hopper.attend_quantised(x, **sizes)[0])
    _, exact = hopper.attend_quantised(x, **sizes, return_lse=True)
    assert (lse - exact).abs().max() <= math.log1p(2.0**-4 if pv == "fp8" else 2.0**-8)


@gpu
@pytest.mark.parametrize("lse", [False, True], ids=["out", "lse"])
@pytest.mark.parametrize("pv", PVS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize(
    # B, Nq, Nk, H, Hkv
    ("shape", "dtype", "layout"),
    [
        ((1, 1, 1, 1, 1), FP16, "BNHD"),
        ((2, 63, 63, 2, 2), BF16, "fused"),
        ((1, 193, 129, 3, 1), FP16, "BHND"),
        ((2, 300, 77, 4, 2), BF16, "fused"),
        ((1, 77, 3000, 6, 2), BF16, "BNHD"),
        ((3, 1000, 1000, 2, 1), FP16, "fused"),
        ((2, 700, 520, 60, 60), BF16, "BNHD"),  # more work than processors
    ],
    ids=str,
)
def test_it_is_the_algorithm(shape, dtype, layout, head_dim, pv, lse, poisoned):
    batch, nq, nk, heads, kv_heads = shape
    options = {"kv_heads": kv_heads, "dtype": dtype, "layout": layout, "device": "cuda"}
    check(*make_qkv(batch, nq, nk, heads, head_dim, **options), pv, lse=lse, scale=0.1)


@gpu
@pytest.mark.parametrize("lse", [False, True], ids=["out", "lse"])
@pytest.mark.parametrize("pv", PVS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("kv_len", [(0, 1, 256, 520), (0, 0, 0, 0), (999, 519, 128, 127)], ids=str)
def test_prefix_lengths(kv_len, head_dim, pv, lse, poisoned):
    """A length beyond the keys counts as all of them."""
    q, k, v = make_qkv(4, 300, 520, 3, head_dim, dtype=BF16, device="cuda")
    out = check(q, k, v, pv, lse=lse, kv_len=lengths(*kv_len))
    assert all((out[row] == 0).all() for row, n in enumerate(kv_len) if n == 0)


@gpu
@pytest.mark.parametrize("lse", [False, True], ids=["out", "lse"])
@pytest.mark.parametrize("pv", PVS)
@pytest.mark.parametrize("name", HARD)
def test_numbers_that_are_hard_to_round(name, pv, lse, poisoned):
    q, k, v = make_qkv(1, 200, 300, 2, 64, dtype=BF16, device="cuda")
    make_hard(name, q, k, v)
    check(q, k, v, pv, lse=lse)


@gpu
@pytest.mark.parametrize("lse", [False, True], ids=["out", "lse"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("pv", PVS)
def test_the_flag_tells_of_what_is_not_finite(pv, head_dim, name, value, lse):
    qkv = dict(zip("qkv", make_qkv(3, 200, 300, 2, head_dim, dtype=FP16, device="cuda"), strict=True))
    flag = torch.zeros(1, dtype=torch.int32, device="cuda")
    BACKENDS[pv].attend(**qkv, flag=flag, return_lse=lse)
    assert flag.item() == 0
    qkv[name][1, 2, 1, 39] = value
    out, _ = BACKENDS[pv].attend(**qkv, flag=flag, return_lse=lse)
    assert flag.item() == 1
    rows = {"q": out[1, 2, 1], "k": out[1, :, 1], "v": out[1, :, 1, 39]}[name]
    assert not rows.isfinite().any() and (~out.isfinite()).sum() == rows.numel()


@gpu
@pytest.mark.parametrize("pv", PVS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_the_same_bits_every_time(head_dim, pv, poisoned):
    q, k, v = make_qkv(3, 700, 700, 60, head_dim, dtype=BF16, device="cuda")
    first, _ = BACKENDS[pv].attend(q, k, v)
    assert all(torch.equal(BACKENDS[pv].attend(q, k, v)[0], first) for _ in range(20))


@gpu
@pytest.mark.parametrize("layout", ["BNHD", "BHND"])
@pytest.mark.parametrize("pv", PVS)
def test_a_plan(pv, layout, poisoned):
    q, k, v = make_qkv(2, 200, 300, 4, 64, kv_heads=2, dtype=FP16, device="cuda")
    facts = {"batch": 2, "q_len": 200, "kv_len": 300, "heads": 4, "kv_heads": 2, "head_dim": 64, "device": q.device}
    flag = torch.zeros(1, dtype=torch.int32, device="cuda")
    backend = BACKENDS[pv]
    run = backend.plan(call(layout=layout, has_kv_len=True, dtype=FP16, **facts), backend.decision, flag)
    kv_len = lengths(300, 111)

    def swapped(x):
        return x.transpose(1, 2) if layout == "BHND" else x

    out = swapped(run(*map(swapped, (q, k, v)), None, kv_len, 0.2))
    wanted, _ = backend.attend(q, k, v, scale=0.2, kv_len=kv_len)
    assert torch.equal(out, wanted) and out.is_contiguous() and flag.item() == 0
    assert not torch.equal(out, backend.attend(q, k, v, kv_len=kv_len)[0])


@gpu
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("family", ["wan", "ltx", "hunyuan dual", "hunyuan single", "cogvideox"])
@pytest.mark.parametrize("pv", PVS)
def test_streams_in_one_pass_err_as_much_as_the_prologue_in_torch(pv, family, head_dim, poisoned):
    from projection_cases import make, streams

    from videoattn.kernels import reference

    case = make(family, head_dim=head_dim, heads=4, tokens=300)
    q, k, v = case.prologue(case.heads, *streams(case, fresh=True))
    facts = {"batch": 2, "q_len": q.shape[1], "kv_len": k.shape[1], "heads": 4, "kv_heads": 4, "head_dim": head_dim}
    asked = call(**facts, dtype=q.dtype, device=q.device)
    backend = BACKENDS[pv]
    flag = torch.zeros(1, dtype=torch.int32, device="cuda")
    out = backend.plan_streams(asked, backend.decision, case.prologue, flag)(streams(case, fresh=True), None)
    by_torch = backend.plan(asked, backend.decision)(q, k, v, None, None, None)
    exact, _ = reference.attend(q, k, v)
    norm = torch.linalg.vector_norm
    assert norm(out - exact) <= 1.1 * norm(by_torch - exact) and flag.item() == 0
