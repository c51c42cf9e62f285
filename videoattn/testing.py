"""What tests, benchmarks and examples share: offline tokenizers, inputs of attention, and the bound on its error.

Shape letters: B batch, N tokens, Nq queries, Nk keys, H heads, Hkv key/value heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, get_args

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TokenizerKind = Literal["t5", "clip", "llama", "gemma", "qwen"]
Layout = Literal["BNHD", "BHND", "fused"]

# kind -> (special tokens before the bytes, special tokens after them, template of a sequence, roles of the tokens).
# T5, Gemma and Llama keep the ids of their special tokens low; CLIP's end token must have the highest id, because
# CLIP's text model pools where the id is greatest.
_TOKENIZERS: dict[str, tuple[list[str], list[str], str, dict[str, str]]] = {
    "t5": (["<pad>", "</s>", "<unk>"], [], "$A </s>", {"pad": "<pad>", "eos": "</s>", "unk": "<unk>"}),
    "clip": (
        [],
        ["<|startoftext|>", "<|endoftext|>"],
        "<|startoftext|> $A <|endoftext|>",
        {"bos": "<|startoftext|>", "eos": "<|endoftext|>", "pad": "<|endoftext|>", "unk": "<|endoftext|>"},
    ),
    "llama": (
        ["<pad>", "<s>", "</s>", "<unk>"],
        [],
        "<s> $A",
        {"pad": "<pad>", "bos": "<s>", "eos": "</s>", "unk": "<unk>"},
    ),
    "gemma": (
        ["<pad>", "<eos>", "<bos>", "<unk>"],
        [],
        "<bos> $A",
        {"pad": "<pad>", "eos": "<eos>", "bos": "<bos>", "unk": "<unk>"},
    ),
    "qwen": (
        [],
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        "$A",
        {"pad": "<|endoftext|>", "eos": "<|im_end|>", "unk": "<|endoftext|>"},
    ),
}

_QWEN_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(kind: TokenizerKind) -> PreTrainedTokenizerFast:
    """A tokenizer of one family made without a single file: byte-level BPE with no merges, one token a byte.

    The vocabulary is the 256 bytes and the family's special tokens (fewer than 270 ids, so that it fits any text
    encoder, tiny or real-size); padding, start, end and Qwen's chat template are as in the family.

    Raises:
        ValueError: ``kind`` is none of the families.
    """
    if kind not in _TOKENIZERS:
        raise ValueError(f"byte_tokenizer: wanted kind in {get_args(TokenizerKind)}, got {kind!r}")
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    before, after, template, roles = _TOKENIZERS[kind]
    symbols = [*before, *sorted(pre_tokenizers.ByteLevel.alphabet()), *after]
    vocab = {symbol: index for index, symbol in enumerate(symbols)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(symbol, normalized=False) for symbol in (*before, *after)])
    specials = [(symbol, vocab[symbol]) for symbol in (*before, *after) if symbol in template.split()]
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=specials)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        padding_side="right",
        model_max_length=77 if kind == "clip" else 4096,
        chat_template=_QWEN_CHAT_TEMPLATE if kind == "qwen" else None,
        **{f"{role}_token": symbol for role, symbol in roles.items()},
    )


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """Within it, uninitialised memory (``torch.empty`` and its kin) holds NaN, or the greatest integer.

    A kernel that leaves a part of its output unwritten cannot pass by luck. This is PyTorch's own deterministic
    fill; operations that have no deterministic form only warn.
    """
    was_enabled = torch.are_deterministic_algorithms_enabled()
    was_warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    was_filling = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_enabled, warn_only=was_warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = was_filling


def make_qkv(
    batch: int,
    q_len: int,
    kv_len: int,
    heads: int,
    head_dim: int,
    *,
    kv_heads: int | None = None,
    dtype: torch.dtype = torch.float32,
    layout: Layout = "BNHD",
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normal q [B, Nq, H, D], k and v [B, Nk, Hkv, D], the same numbers for every layout and device.

    ``layout`` says how they lie in memory: "BNHD" contiguous; "BHND" head-major, as after ``transpose(1, 2)``;
    "fused" slices of one projection (q, k, v of one buffer where Nq == Nk, else q alone and k, v of one buffer).

    Raises:
        ValueError: unknown ``layout``, or ``heads`` is no multiple of ``kv_heads``.
    """
    kv_heads = heads if kv_heads is None else kv_heads
    if layout not in get_args(Layout):
        raise ValueError(f"make_qkv: wanted layout in {get_args(Layout)}, got {layout!r}")
    if heads % kv_heads:
        raise ValueError(f"make_qkv: wanted heads a multiple of kv_heads, got heads={heads}, kv_heads={kv_heads}")
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(batch, tokens, count, head_dim, generator=generator).to(device, dtype)
        for tokens, count in ((q_len, heads), (kv_len, kv_heads), (kv_len, kv_heads))
    )
    if layout == "BHND":
        return tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    if layout == "fused":
        if q_len == kv_len:
            return torch.cat([q, k, v], dim=2).split([heads, kv_heads, kv_heads], dim=2)
        # A projection twice as wide, of which q is one half: its rows are not contiguous either.
        q = torch.cat([q, torch.zeros_like(q)], dim=2)[:, :, :heads]
        return q, *torch.cat([k, v], dim=2).split([kv_heads, kv_heads], dim=2)
    return q, k, v


HardKind = Literal["normal", "outlier channels", "common k offset", "heavy tails", "biased channels"]


def make_hard_qkv(
    kind: HardKind,
    batch: int,
    tokens: int,
    heads: int,
    head_dim: int,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v [B, N, H, D] as quantisation meets them in video models, the same numbers on every device.

    normal            no structure
    outlier channels  three channels of q and k, and one of v, ten times the others
    common k offset   every key has the same large vector added, of eight times the keys' spread
    heavy tails       Student's t with 4 degrees of freedom in place of normal
    biased channels   every channel of q and k has a bias that all tokens share, four and three times the spread of the
                      tokens: as strong as it takes for INT4 without smoothing to have the cosine of SageAttention 2's
                      table on CogVideoX, 80 %

    Raises:
        ValueError: unknown ``kind``.
    """
    if kind not in get_args(HardKind):
        raise ValueError(f"make_hard_qkv: wanted kind in {get_args(HardKind)}, got {kind!r}")
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, tokens, heads, head_dim, generator=generator) for _ in "qkv")
    if kind == "outlier channels":
        for x, channels in ((q, (3, 17, 30)), (k, (3, 17, 30)), (v, (9,))):
            x[..., list(channels)] *= 10.0
    elif kind == "common k offset":
        k += 8.0 * torch.randn(batch, 1, heads, head_dim, generator=generator)
    elif kind == "heavy tails":
        for x in (q, k, v):
            squares = torch.randn(4, *x.shape, generator=generator).square_().mean(0)
            x /= squares.sqrt_()
    elif kind == "biased channels":
        q *= 0.5
        for x, bias in ((q, 2.0), (k, 3.0)):
            x += bias * torch.randn(batch, 1, heads, head_dim, generator=generator)
    return tuple(x.to(device, dtype) for x in (q, k, v))


def plain_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    kv_len: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """softmax(q k^T scale + mask) v [B, Nq, H, D], every intermediate rounded to the inputs' dtype.

    Arguments as for ``videoattn.kernels.reference.attend``; rows without a visible key give 0.
    """
    groups = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)))
    scores = (q @ k.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if kv_len is not None:
        beyond = torch.arange(k.shape[2], device=k.device) >= kv_len.to(k.device)[:, None, None, None]
        scores = scores.masked_fill(beyond, float("-inf"))
    if causal:
        beyond = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(beyond, float("-inf"))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask.to(q.dtype)
    blind = (scores == float("-inf")).all(-1, keepdim=True)
    weights = scores.softmax(-1).masked_fill(blind, 0.0)
    return (weights @ v).transpose(1, 2)


def assert_close_to_oracle(
    out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    kv_len: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    causal: bool = False,
    factor: float = 2.0,
) -> None:
    """Assert that ``out`` [B, Nq, H, D] is as close to exact attention as its dtype lets a kernel be: see ``excess``.

    Raises:
        AssertionError: wrong shape or dtype, a non-finite value, or an error beyond the bound.
    """
    from videoattn.kernels.reference import attend

    options = {"scale": scale, "kv_len": kv_len, "mask": mask, "causal": causal}
    exact, _ = attend(q, k, v, **options)
    wrong = excess(out, exact, plain_attention(q, k, v, **options), factor=factor)
    if wrong is not None:
        raise AssertionError(f"{wrong}; {k.shape[1]} keys, out of shape {tuple(out.shape)}")


def excess(out: torch.Tensor, exact: torch.Tensor, plain: torch.Tensor, *, factor: float = 2.0) -> str | None:
    """What is wrong with ``out``, where low precision alone does not explain its distance from ``exact``; else None.

    The bound is derived, not tuned: ``factor`` times the error of ``plain``, which plain attention in the inputs' dtype
    gives, plus half a unit in the last place of that dtype. It holds for the greatest error and for the root of the
    squared sum, so that neither one bad element nor a small bias everywhere can pass.
    """
    if out.shape != plain.shape or out.dtype != plain.dtype:
        return f"wanted {plain.dtype} of shape {tuple(plain.shape)}, got {out.dtype} of shape {tuple(out.shape)}"
    error, plain_error = (x.double() - exact for x in (out, plain))
    half_ulp = exact.abs() * (torch.finfo(out.dtype).eps / 2)
    for name, size in (("greatest error", lambda x: x.abs().amax()), ("error's L2 norm", torch.linalg.vector_norm)):
        got, expected, rounding = (float(size(x)) if x.numel() else 0.0 for x in (error, plain_error, half_ulp))
        bound = factor * expected + rounding
        if not got <= bound:  # also true of NaN
            return (
                f"{name} {got:.3e} > bound {bound:.3e} = {factor:g} x {expected:.3e} (plain {plain.dtype}) "
                f"+ {rounding:.3e} (one rounding)"
            )
    return None
