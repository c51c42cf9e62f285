"""What the tests of our Triton kernels share: where they run, and what an answer is held against.

Without a GPU they run in Triton's interpreter (conftest.py asks for it), with one on the GPU.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from videoattn.kernels import reference
from videoattn.testing import assert_close_to_oracle

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _bf16_product(multiply):
    """The interpreter keeps bf16 as 16-bit integers, and up to Triton 3.7 its `dot` multiplies those integers."""

    def widened(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    return lambda self, a, b, *args: multiply(self, widened(a), widened(b), *args)


InterpreterBuilder.create_dot = _bf16_product(InterpreterBuilder.create_dot)


def check(attend, q, k, v, **options):
    """`attend` of q, k, v [B, N, H, D]: output and log-sum-exp are the oracle's, and the flag stays down."""
    flag = torch.zeros(1, dtype=torch.int32, device=q.device)
    out, lse = attend(q, k, v, return_lse=True, flag=flag, **options)
    assert_close_to_oracle(out, q, k, v, **options)
    assert_close_lse(lse, q, k, v, **options)
    assert out.is_contiguous()
    assert flag.item() == 0


def assert_close_lse(lse, q, k, v, **options):
    """Assert that lse [B, H, Nq] is the oracle's, as far as fp32 sums can tell.

    To first order, log sum exp is off by no more than its scores are, and by the relative error of the sum over keys: in
    units in the last place, D + 4 of the greatest sum of |q k| and 4 of the mask (a product each, the scaling, the
    subtraction), one a key and 8 more (exponentials, the logarithm), and one of the result.
    """
    _, exact = reference.attend(q, k, v, **options)
    assert (lse.shape, lse.dtype) == (exact.shape, torch.float32)
    scale, mask = options.get("scale"), options.get("mask")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    keys = k.repeat_interleave(q.shape[2] // k.shape[2], 2).transpose(1, 2)
    scores = scale * (q.transpose(1, 2).abs().double() @ keys.abs().double().transpose(-1, -2)).amax(-1)
    added = 0.0 if mask is None or mask.dtype == torch.bool else mask.double().abs().nan_to_num(posinf=0.0).amax()
    units = (q.shape[-1] + 4) * scores + 4 * added + k.shape[1] + 8 + exact.abs()
    bound = units * torch.finfo(torch.float32).eps
    blind = exact == -torch.inf
    assert torch.equal(lse == -torch.inf, blind)
    excess = (lse - exact).abs()[~blind] - bound[~blind]
    assert (excess <= 0).all(), f"lse is off by {excess.max():.2e} more than it may be"
