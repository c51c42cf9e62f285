"""Triton's interpreter computes with 16-bit and 8-bit floats as the hardware does: import it before kernels are tested.

On its own it drops the bits that bf16 has no place for and carries wrongly into e4m3, where cards round to the nearest and
stop at 448; and up to Triton 3.7 its `dot` multiplies bf16 as the integers that it keeps them in.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def _bf16_product(multiply):
    def widened(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    return lambda self, a, b, *args: multiply(self, widened(a), widened(b), *args)


def _rounded(cast):
    def to_nearest(self, src, dst_type, *args):
        kinds = {tl.bfloat16: torch.bfloat16, tl.float8e4nv: torch.float8_e4m3fn}
        kind = kinds.get(dst_type.scalar)
        if kind is None or src.dtype.scalar != tl.float32:
            return cast(self, src, dst_type, *args)
        x = torch.from_numpy(np.ascontiguousarray(src.data))
        x = (x.clamp(-448, 448) if kind == torch.float8_e4m3fn else x).to(kind)
        bits = x.view(torch.uint8 if x.itemsize == 1 else torch.uint16).numpy()
        return TensorHandle(bits, dst_type.scalar)

    return to_nearest


InterpreterBuilder.create_dot = _bf16_product(InterpreterBuilder.create_dot)
InterpreterBuilder.cast_impl = _rounded(InterpreterBuilder.cast_impl)
InterpreterBuilder.create_fp_to_fp = _rounded(InterpreterBuilder.create_fp_to_fp)
