"""Prefix lengths: read from masks, and kept on the host so that a generation synchronises once."""

import gc
import weakref

import pytest
import torch

from videoattn.lengths import host_lengths, key_mask, prefix_lengths


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32], ids=str)
def test_prefixes_are_found(dtype):
    keep = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]).to(dtype)
    lengths = prefix_lengths(keep)
    assert lengths.dtype == torch.int32
    assert lengths.tolist() == [2, 4, 0]


@pytest.mark.parametrize("row", [[0, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 1]])
def test_other_masks_are_not_taken_for_prefixes(row):
    assert prefix_lengths(torch.tensor([[1, 1, 0, 0], row])) is None


def test_a_batch_of_none():
    assert prefix_lengths(torch.zeros(0, 4)).tolist() == []


def test_lengths_cross_to_the_host_once(monkeypatch):
    kv_len = torch.tensor([2, 3], dtype=torch.int32)
    crossings = []
    to_list = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: crossings.append(1) or to_list(self))
    assert host_lengths(kv_len) == host_lengths(kv_len) == (2, 3)
    assert len(crossings) == 1
    assert host_lengths(torch.tensor([2, 4])) == (2, 4)


def test_a_key_mask_is_the_lengths_and_is_made_once():
    kv_len = torch.tensor([2, 0, 3], dtype=torch.int32)
    mask = key_mask(kv_len, 3)
    assert mask.shape == (3, 1, 1, 3) and mask.dtype == torch.bool
    assert mask[:, 0, 0].tolist() == [[True, True, False], [False, False, False], [True, True, True]]
    assert key_mask(kv_len, 3) is mask
    assert key_mask(kv_len, 5).shape == (3, 1, 1, 5)
    assert torch.equal(prefix_lengths(key_mask(kv_len, 5)[:, 0, 0]), kv_len)


def test_nothing_outlives_the_lengths():
    kv_len = torch.tensor([2, 3], dtype=torch.int32)
    host_lengths(kv_len)
    mask = weakref.ref(key_mask(kv_len, 4))
    del kv_len
    gc.collect()
    assert mask() is None
