"""What the tests of the core share: one thread, since toy tensors are too small to share out."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Compute in one thread; threads that wait for each other cost more than they save on toy sizes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
