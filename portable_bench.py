"""kernels/quantised.py on the GPU: is it right, and which tiles are fast. Run from the repository's root.

python portable_bench.py check            every head_dim with the shipped configs, odd sizes (about 60 s)
python portable_bench.py time [pv ...]    D=128 and D=64 with tile variants beside cuDNN (about 100 s)
python portable_bench.py dims             other head dims, parts as 64 + 16 or 64 + 32
"""

import sys
import time
from concurrent.futures import ThreadPoolExecutor

sys.path.insert(0, ".")
import torch
import torch.nn.functional as F
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel

import videoattn
from videoattn.kernels import quantised, quantised_reference, reference

START = time.time()
PVS = ("fp8", "16bit", "int8")
# Largest relative L2 distance from the emulation: one rounding to bf16 (0.0017) and, for e4m3, flips of its roundings and
# the tensor cores' 14-bit sums.
NEAR = {"fp8": 0.008, "16bit": 0.004, "int8": 0.003}


def make(b, h, nq, nk, d, h_kv=None, seed=0):
    torch.manual_seed(seed)
    h_kv = h_kv or h
    shapes = ((b, nq, h, d), (b, nk, h_kv, d), (b, nk, h_kv, d))
    return [torch.randn(*shape, device="cuda", dtype=torch.bfloat16) for shape in shapes]


def rel(x, y):
    return float((x.double() - y).norm() / y.norm())


def operands(q, k, v, pv, kv_len=None):
    return quantised_reference.quantise(q, k, v, pv=pv, kv_len=kv_len, return_lse=True)


def run(x, d, tuned=None, **options):
    return quantised.attend_quantised(x, head_dim=d, dtype=torch.bfloat16, return_lse=True, tuned=tuned, **options)


def attempt(function, *args, **kwargs):
    try:
        return function(*args, **kwargs)
    except (triton.CompilationError, triton.runtime.errors.OutOfResources, RuntimeError, AssertionError) as error:
        return error


def compiled(cases):
    """Run every (x, d, tuned, options) once, side by side."""
    with ThreadPoolExecutor(12) as pool:
        return list(pool.map(lambda case: attempt(run, case[0], case[1], case[2], **case[3]), cases))


def check():
    cases, names, facts = [], [], []
    for d in (16, 40, 64, 72, 80, 96, 112, 128, 160, 192, 256):
        for pv in PVS:
            for tma in (True, False) if d in (64, 80, 128) else (True,):
                q, k, v = make(2, 4, 333, 517, d, h_kv=2)
                kv_len = torch.tensor([517, 130], dtype=torch.int32, device="cuda")
                x = operands(q, k, v, pv, kv_len)
                flag = torch.zeros(1, dtype=torch.int32, device="cuda")
                tuned = {} if tma else {"TMA": False, "N": 64}
                cases.append((x, d, tuned, {"kv_len": kv_len, "flag": flag}))
                names.append(f"D {d} {pv} {tuned}")
                facts.append((q, k, v, kv_len))
    bad = 0
    for (x, d, tuned, options), name, (q, k, v, kv_len), got in zip(cases, names, facts, compiled(cases), strict=True):
        if isinstance(got, Exception):
            print(name, "FAILED", str(got)[-300:])
            bad += 1
            continue
        block = tuned.get("N") or quantised.config(d, name.split()[2], quantised._capability(x.q.device))["N"]
        emulated, lse = quantised_reference.attend_quantised(x, head_dim=d, dtype=q.dtype, kv_len=kv_len, block_n=block)
        exact, _ = reference.attend(q, k, v, kv_len=kv_len)
        error, from_lse = rel(got[0], emulated), float((got[1] - lse).abs().max())
        wrong = error > NEAR[name.split()[2]] or from_lse > 1e-4 or options["flag"].item()
        bad += bool(wrong)
        print(f"{name}: from emulation {error:.5f}, lse {from_lse:.1e}, from exact {rel(got[0], exact):.4f}",
              "WRONG" if wrong else "")  # fmt: skip
    print(bad, "wrong", f"{time.time() - START:.0f} s")


VARIANTS = {
    (128, "fp8"): [{}, {"maxnreg": 168}, {"MAGIC": True, "maxnreg": 168}, {"num_stages": 3}, {"N": 64},
                   {"M": 128, "num_warps": 8}, {"TMA": False}],
    (128, "16bit"): [{}, {"M": 128, "N": 64, "num_stages": 3}, {"M": 128, "num_warps": 8},
                     {"N": 64, "num_stages": 3}, {"TMA": False, "M": 128, "N": 64, "num_stages": 3}],
    (128, "int8"): [{}, {"maxnreg": 168}, {"MAGIC": True}, {"N": 64}],
    (64, "fp8"): [{}, {"maxnreg": 128}, {"MAGIC": True, "maxnreg": 128}, {"num_stages": 3}, {"num_stages": 4},
                  {"M": 128, "num_warps": 8}, {"TMA": False}],
    (64, "16bit"): [{}, {"maxnreg": 128}, {"num_stages": 3}, {"M": 128, "N": 64, "num_stages": 3},
                    {"M": 128, "num_warps": 8}],
    (64, "int8"): [{}, {"maxnreg": 128}, {"MAGIC": True}],
}  # fmt: skip


def measure(shape, pvs, variants):
    b, h, n, d = shape
    q, k, v = make(b, h, n, n, d)
    flops = 4 * b * h * n * n * d
    qt, kt, vt = (x.transpose(1, 2) for x in (q, k, v))

    def cudnn():
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(qt, kt, vt)

    first = attempt(cudnn)
    rows = torch.arange(64, device="cuda") + n // 128 * 64
    exact, _ = reference.attend(*(x[:1, :, :2] for x in (q[:, rows], k, v)))
    if not isinstance(first, Exception):
        ms = triton.testing.do_bench(cudnn, warmup=50, rep=300, return_mode="median")
        error = rel(first.transpose(1, 2)[:1, rows, :2], exact)
        print(f"{shape} cuDNN: {ms:.3f} ms, {flops / ms / 1e9:.0f} TF, error {error:.4f}", flush=True)
    sage, _ = quantised_reference.sage2(q[:1, rows, :2], k[:1, :, :2], v[:1, :, :2])
    print(f"{shape} SageAttention 2 emulated: error {rel(sage, exact):.4f}", flush=True)
    for pv in pvs:
        x = operands(q, k, v, pv)
        some = x._replace(q=x.q[:, :, rows], q_scale=x.q_scale[:, :, rows], lse_shift=x.lse_shift[:, :, rows])
        emulated = {}
        cases = [(x, d, tuned, {}) for tuned in variants(d, pv)]
        for (_, _, tuned, _), got in zip(cases, compiled(cases), strict=True):
            name = f"{shape} {pv} {tuned}"
            if isinstance(got, Exception):
                print(name, "FAILED", type(got).__name__, str(got)[-200:].replace("\n", " "), flush=True)
                continue
            block = tuned.get("N") or quantised.config(d, pv, quantised._capability(q.device))["N"]
            if block not in emulated:
                emulated[block] = quantised_reference.attend_quantised(some, head_dim=d, dtype=q.dtype, block_n=block)
            out, lse = emulated[block]
            error, from_lse = rel(got[0][:, rows], out), float((got[1][:, :, rows] - lse).abs().max())
            wrong = "" if error <= NEAR[pv] and from_lse <= 1e-4 else "WRONG"
            ms = triton.testing.do_bench(
                lambda x=x, d=d, tuned=tuned: quantised.attend_quantised(
                    x, head_dim=d, dtype=torch.bfloat16, tuned=tuned
                ),
                warmup=50, rep=300, return_mode="median",
            )  # fmt: skip
            print(
                f"{name}: {ms:.3f} ms, {flops / ms / 1e9:.0f} TF, from emulation {error:.5f}, lse {from_lse:.1e},"
                f" from exact {rel(got[0][:1, rows, :2], exact):.4f} {wrong} [{time.time() - START:.0f} s]",
                flush=True,
            )


def dims():
    def variants(d, pv):
        if pv == "16bit":
            return [{}, {"M": 128, "N": 64, "num_stages": 3}]
        halves = {40: (32, 16), 80: (64, 16), 160: (128, 32), 96: (64, 32)}[d]
        return [{}, {"D0": halves[0], "D1": halves[1]}, {"N": 64, "num_stages": 3}]

    for shape in ((32, 8, 4096, 40), (4, 8, 9216, 80), (1, 16, 16384, 96), (4, 8, 4096, 160)):
        measure(shape, ("fp8", "16bit"), variants)


def main():
    print(torch.cuda.get_device_name(), torch.__version__, triton.__version__, videoattn.__file__)
    what, *pvs = sys.argv[1:] or ["time"]
    if what == "check":
        check()
    elif what == "dims":
        dims()
    else:
        for shape in ((1, 12, 32760, 128), (2, 48, 17776, 64)):
            measure(shape, pvs or PVS, lambda d, pv: VARIANTS[d, pv])


if __name__ == "__main__":
    main()
