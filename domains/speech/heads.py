"""Heads of speech tasks: CTC for each feature, and classes of whole utterances."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from common.errors import GraftError, unknown

Pooling = Literal["mean", "attention"]


class CTCHead(nn.Module):
    """Logits of a CTC vocabulary for each feature (Graves et al. 2006, doi 10.1145/1143844.1143891).

    Args:
        width: Channels C of the features.
        vocab: Number V of ids, the blank included.
    """

    def __init__(self, width: int, vocab: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(width, vocab)

    def forward(self, features: Tensor) -> Tensor:
        """Map features (B, F, C) to logits (B, F, V); those at padding mean nothing."""
        return self.classifier(features)


class LayerSum(nn.Module):
    """A learned weighted mean over layers (PEFT-SER; Feng and Narayanan 2023, arXiv 2306.05350).

    The weights are the softmax of one number a layer, all equal at the start.

    Args:
        layers: Number of layers, with what goes into the first block.
    """

    def __init__(self, layers: int) -> None:
        super().__init__()
        if layers < 1:
            raise GraftError(f"layers is {layers}; give what `encode` returns with all_layers, built.layers + 1.")
        self.scores = nn.Parameter(torch.zeros(layers))

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, layers, F, C) to (B, F, C)."""
        if features.ndim != 4 or features.shape[1] != len(self.scores):
            raise GraftError(
                f"The head weighs {len(self.scores)} layers and was given features of shape {tuple(features.shape)}. "
                "Call `encode` with all_layers=True, and build the head with layers=built.layers + 1."
            )
        return torch.einsum("l,blfc->bfc", self.scores.softmax(dim=0).to(features.dtype), features)


class UtteranceHead(nn.Module):
    """Logits of classes for whole utterances: pooled, through one hidden layer, classified.

    Args:
        width: Channels C of the features.
        classes: Number K of classes.
        pooling: `mean` over the speech; or `attention`, a mean whose weights are the softmax of a linear score.
        hidden: Width of the hidden layer; 0 for none.
        layers: Number of layers to weigh, `built.layers + 1`, if the features are of all layers; None if of the last.
    """

    def __init__(
        self, width: int, classes: int, *, pooling: Pooling = "mean", hidden: int = 256, layers: int | None = None
    ) -> None:
        super().__init__()
        if pooling not in get_args(Pooling):
            raise unknown("pooling", pooling, get_args(Pooling))
        if hidden < 0:
            raise GraftError(f"hidden is {hidden}; give the width of the head's hidden layer, or 0 for none.")
        self.layer_sum = None if layers is None else LayerSum(layers)
        self.score = nn.Linear(width, 1) if pooling == "attention" else None
        inner = [nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, classes)]
        self.classifier = nn.Sequential(*inner) if hidden else nn.Linear(width, classes)

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        """Classify a batch.

        Args:
            features: (B, F, C), or (B, layers, F, C) with `layers`.
            mask: (B, F) bool, True at speech, of which each utterance has at least one.

        Returns:
            (B, K).
        """
        if self.layer_sum is not None:
            features = self.layer_sum(features)
        return self.classifier(self._pool(features, mask))

    def _pool(self, features: Tensor, mask: Tensor) -> Tensor:
        """Return the weighted mean (B, C) of features (B, F, C) over speech."""
        scores = mask.new_zeros(mask.shape, dtype=features.dtype)
        if self.score is not None:
            scores = self.score(features).squeeze(2)
        weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=1).to(features.dtype)
        return torch.einsum("bf,bfc->bc", weights, features.masked_fill(~mask.unsqueeze(2), 0.0))
