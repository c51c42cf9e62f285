"""Every test starts from the same state of the random generators and must leave the process as it found it."""

import os
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

if not torch.cuda.is_available():
    # Triton's kernels then run on the CPU, in its interpreter. Triton looks when it is imported; torch's FLOP counter,
    # and so videoattn, imports it.
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU (make test-gpu)")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def clean_process():
    """Fixed seeds and one thread before; afterwards, nothing process-wide may have changed."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny tensors: a second thread only costs, and sums keep one order
    before = _process_state()
    yield
    torch.set_num_threads(threads)
    after = _process_state()
    torch.set_grad_enabled(before["grad enabled"])
    torch.set_default_dtype(before["default dtype"])
    changed = [name for name in before if before[name] is not after[name]]
    assert not changed, f"the test left these changed: {changed}"


def _process_state() -> dict[str, object]:
    return {
        "grad enabled": torch.is_grad_enabled(),
        "default dtype": torch.get_default_dtype(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "F.scaled_dot_product_attention": F.scaled_dot_product_attention,
        "torch.empty": torch.empty,
    }


@pytest.fixture
def poisoned():
    """Uninitialised memory holds NaN during the test."""
    from videoattn.testing import poisoned_empty

    with poisoned_empty():
        yield
