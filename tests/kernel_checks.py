"""What the tests of our Triton kernels share: where they run, and what an answer is held against.

Without a GPU they run in Triton's interpreter (conftest.py asks for it), with one on the GPU.
"""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import interpreter_rounding  # noqa: F401
import interpreter_speed  # noqa: F401
import torch

from videoattn.call import Mask
from videoattn.kernels import reference
from videoattn.policy import EXACT
from videoattn.runner import Runner
from videoattn.testing import Layout, assert_close_to_oracle, make_qkv

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


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


@dataclass(frozen=True, kw_only=True)
class Case:
    """A call of a backend by name.

    Args:
        layout: how q, k and v lie in memory, as in `make_qkv`.
        mask: [B, 1, Nq, Nk] with a row that sees no key.
        kv_lens: prefix lengths of the rows, None for all keys.
    """

    backend: str
    q_len: int
    kv_len: int
    batch: int = 2
    heads: int = 4
    kv_heads: int = 4
    head_dim: int = 64
    dtype: torch.dtype = torch.bfloat16
    layout: Layout = "BNHD"
    mask: Mask = "none"
    kv_lens: tuple[int, ...] | None = None
    causal: bool = False

    def __str__(self) -> str:
        sizes = (self.batch, self.q_len, self.kv_len, self.heads, self.kv_heads, self.head_dim)
        lengths = "" if self.kv_lens is None else f"lengths {self.kv_lens}"
        extras = ("" if self.mask == "none" else self.mask, lengths, "causal" if self.causal else "")
        return " ".join(filter(None, (self.backend, str(sizes), str(self.dtype)[6:], self.layout, *extras)))

    def inputs(self, seed: int = 0) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], dict[str, object]]:
        """(q, k, v) and the options of the call, those given alone."""
        sizes = (self.batch, self.q_len, self.kv_len, self.heads, self.head_dim)
        options = {"kv_heads": self.kv_heads, "dtype": self.dtype, "layout": self.layout, "seed": seed}
        qkv = make_qkv(*sizes, **options, device=DEVICE)
        given = {"causal": True} if self.causal else {}
        if self.kv_lens is not None:
            given["kv_len"] = torch.tensor(self.kv_lens, dtype=torch.int32, device=DEVICE)
        if self.mask != "none":
            generator = torch.Generator().manual_seed(seed)
            shape = (self.batch, 1, self.q_len, self.kv_len)
            keep = torch.rand(shape, generator=generator) < 0.6
            keep[0, 0, self.q_len // 2] = False
            added = torch.where(keep, 3 * torch.randn(shape, generator=generator), -torch.inf)
            given["mask"] = keep.to(DEVICE) if self.mask == "bool" else added.to(DEVICE, self.dtype)
        return qkv, given

    def check(self) -> None:
        """The backend's answer is the oracle's."""
        qkv, given = self.inputs()
        out = Runner("full", EXACT, self.backend)(*qkv, **given)
        assert_close_to_oracle(out, *qkv, **given)


def compile_ahead(cases: Iterable[Case]) -> None:
    """Run cases side by side, so that their kernels are there: compilers let go of Python's lock, and take a second each."""
    first, *rest = cases
    first.check()  # alone: it also builds what launches kernels
    with ThreadPoolExecutor(8) as executor:
        for _ in executor.map(Case.check, rest):
            pass
