"""The tools that other tests lean on: they accept what is right and reject what is wrong."""

import pytest
import torch

from videoattn.kernels.reference import attend
from videoattn.testing import assert_close_to_oracle, byte_tokenizer, make_qkv, plain_attention, poisoned_empty

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("kind", ["t5", "clip", "llama", "gemma", "qwen"])
def test_byte_tokenizer_round_trips_any_text(kind):
    tokenizer = byte_tokenizer(kind)
    text = "Zwei rote Würfel, 雪 & 🎬"
    batch = tokenizer([text, "short"], padding=True, return_tensors="pt")
    assert tokenizer.decode(batch.input_ids[0], skip_special_tokens=True) == text
    assert batch.input_ids.max() < len(tokenizer) < 270
    assert batch.attention_mask[1].tolist() == sorted(batch.attention_mask[1].tolist(), reverse=True)
    assert (batch.input_ids[1][batch.attention_mask[1] == 0] == tokenizer.pad_token_id).all()


def test_byte_tokenizer_frames_a_sequence_as_its_family_does():
    assert byte_tokenizer("t5")("a").input_ids[-1] == 1
    start, *_, end = byte_tokenizer("clip")("a").input_ids
    assert (start, end) == (256, 257)
    assert byte_tokenizer("gemma")("a").input_ids[0] == 2
    with pytest.raises(ValueError, match="got 'bert'"):
        byte_tokenizer("bert")


def test_poisoned_empty_fills_and_restores():
    with poisoned_empty():
        assert torch.empty(4).isnan().all()
        assert torch.empty_like(torch.ones(4, dtype=torch.bfloat16)).isnan().all()
        assert torch.ones(1).new_empty(4).isnan().all()
        assert (torch.empty(4, dtype=torch.int32) == torch.iinfo(torch.int32).max).all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_make_qkv_gives_the_same_numbers_in_every_layout():
    reference = make_qkv(2, 6, 9, 4, 8, kv_heads=2)
    assert [tuple(x.shape) for x in reference] == [(2, 6, 4, 8), (2, 9, 2, 8), (2, 9, 2, 8)]
    for layout in ("BHND", "fused"):
        made = make_qkv(2, 6, 9, 4, 8, kv_heads=2, layout=layout)
        for x, y in zip(reference, made, strict=True):
            assert torch.equal(x, y)
            assert not y.is_contiguous()
    q, _, v = make_qkv(2, 6, 6, 4, 8, layout="fused")
    assert q.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
    with pytest.raises(ValueError, match="layout"):
        make_qkv(1, 1, 1, 1, 1, layout="NHBD")
    with pytest.raises(ValueError, match="kv_heads=3"):
        make_qkv(1, 1, 1, 4, 1, kv_heads=3)


def options(name, batch, q_len, kv_len):
    lengths = torch.tensor([kv_len, 1] if batch == 2 else [kv_len - 2], dtype=torch.int32)
    allowed = torch.rand(batch, 1, q_len, kv_len, generator=torch.Generator().manual_seed(3)) < 0.5
    allowed[0, 0, 0] = name == "additive mask"  # else a row without a key
    return {
        "none": {},
        "scale": {"scale": 0.3},
        "kv_len": {"kv_len": lengths},
        "bool mask": {"mask": allowed},
        "additive mask": {"mask": torch.where(allowed, 0.0, -10000.0)},
        "causal": {"causal": True},
    }[name]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["none", "scale", "kv_len", "bool mask", "additive mask", "causal"])
def test_oracle_accepts_plain_attention_and_rejects_small_faults(dtype, name):
    q, k, v = make_qkv(2, 17, 23, 4, 16, kv_heads=2, dtype=dtype)
    kwargs = options(name, 2, 17, 23)
    good = plain_attention(q, k, v, **kwargs)
    assert_close_to_oracle(good, q, k, v, **kwargs)
    assert_close_to_oracle(attend(q, k, v, **kwargs)[0].to(dtype), q, k, v, **kwargs)
    assert_close_to_oracle(good, q, k, v, **kwargs, factor=1.0)

    bad = good.clone()
    bad[1, 16, 3, 15] += 64 * torch.finfo(dtype).eps  # one element
    with pytest.raises(AssertionError, match="greatest error"):
        assert_close_to_oracle(bad, q, k, v, **kwargs)
    bad = good * (1 + 8 * torch.finfo(dtype).eps)  # a bias everywhere
    with pytest.raises(AssertionError, match="error"):
        assert_close_to_oracle(bad, q, k, v, **kwargs)
    bad = good.clone()
    bad[0, 1, 0, 0] = float("nan")
    with pytest.raises(AssertionError, match="nan"):
        assert_close_to_oracle(bad, q, k, v, **kwargs)


def test_oracle_rejects_wrong_dtype_shape_and_forgotten_arguments():
    q, k, v = make_qkv(1, 8, 8, 2, 16, dtype=torch.bfloat16)
    out = plain_attention(q, k, v)
    with pytest.raises(AssertionError, match="torch.bfloat16"):
        assert_close_to_oracle(out.float(), q, k, v)
    with pytest.raises(AssertionError, match="shape"):
        assert_close_to_oracle(out[:, :7], q, k, v)
    with pytest.raises(AssertionError, match="error"):
        assert_close_to_oracle(out, q, k, v, scale=0.26)
    with pytest.raises(AssertionError, match="error"):
        assert_close_to_oracle(out, q, k, v, kv_len=torch.tensor([7]))


def test_one_key_needs_no_more_than_a_copy():
    q, k, v = make_qkv(2, 5, 1, 2, 8, dtype=torch.float16)
    assert_close_to_oracle(v.expand(2, 5, 2, 8), q, k, v)
