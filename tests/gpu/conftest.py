"""The tests that want a GPU. `SLM_EXP_GPU_TESTS=cpu pytest -m gpu` rehearses on the CPU those that can run there."""

from __future__ import annotations

import os

import pytest
import torch

REHEARSAL = os.environ.get("SLM_EXP_GPU_TESTS") == "cpu"


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu" if REHEARSAL else "cuda")


@pytest.fixture
def two(device: torch.device) -> list[torch.device]:
    """Two devices of a machine; a rehearsal has one in the place of both."""
    if REHEARSAL:
        return [device, device]
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    return [torch.device("cuda", i) for i in range(2)]


@pytest.fixture
def cuda() -> torch.device:
    """For what has no meaning on a CPU."""
    if REHEARSAL:
        pytest.skip("a rehearsal on the CPU: this one wants a GPU")
    return torch.device("cuda")
