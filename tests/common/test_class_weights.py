"""Weights of classes."""

from __future__ import annotations

import pytest
import torch

from common.class_weights import balanced_weights
from common.errors import GraftError


def test_balanced_weights_need_every_class():
    torch.testing.assert_close(balanced_weights({"a": 1, "b": 3}, ("a", "b")), torch.tensor([2.0, 2 / 3]))
    with pytest.raises(GraftError, match="training has no example of b"):
        balanced_weights({"a": 1}, ("a", "b"))
