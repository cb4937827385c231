"""Weights of classes in a cross-entropy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from common.errors import GraftError

ClassWeights = Literal["none", "balanced"]


def balanced_weights(counts: Mapping[str, int], names: Sequence[str]) -> Tensor:
    """Weigh classes by their inverse frequency: N / (K n_k), (K,).

    Args:
        counts: Training examples of each class, n_k; N in all.
        names: The K classes, in the order of their labels.

    Raises:
        GraftError: A class without a training example.
    """
    missing = [name for name in names if not counts.get(name)]
    if missing:
        raise GraftError(
            f"class_weights is 'balanced', and training has no example of {', '.join(missing)}. Add some, leave the "
            "class out, or set class_weights to 'none'."
        )
    found = torch.tensor([float(counts[name]) for name in names])
    return found.sum() / (len(names) * found)
