"""Heads of protein tasks: pooled for whole proteins, at chosen positions, for each residue, and for pairs."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from common.errors import GraftError, unknown

Pooling = Literal["mean", "cls", "attention"]
HeadKind = Literal["linear", "mlp"]


class Pool(nn.Module):
    """One vector out of the features of a protein.

    Args:
        width: Channels C of the features.
        pooling: `mean` over the residues; `cls`, the feature of the start token, which has to stand first; `attention`,
            a mean whose weights are the softmax of a linear score of each residue.
    """

    def __init__(self, width: int, pooling: Pooling = "mean") -> None:
        super().__init__()
        if pooling not in get_args(Pooling):
            raise unknown("pooling", pooling, get_args(Pooling))
        self.pooling = pooling
        self.score = nn.Linear(width, 1) if pooling == "attention" else None

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        """Pool a batch.

        Args:
            features: (B, L, C), or (B, 1 + L, C) with the start token where `cls` is pooled by.
            mask: (B, L) bool, True at residues, of which each protein has at least one.

        Returns:
            (B, C).
        """
        if self.pooling == "cls":
            if features.shape[1] != mask.shape[1] + 1:
                raise GraftError(
                    "Pooling by 'cls' needs the features of the start token too. Call residue_features with "
                    "start=True, or set pooling to 'mean'."
                )
            return features[:, 0]
        if self.score is None:
            weights = mask.to(features.dtype)
            weights = weights / weights.sum(dim=1, keepdim=True)
        else:
            scores = self.score(features).squeeze(2)
            weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=1).to(features.dtype)
        return torch.einsum("bl,blc->bc", weights, features)


def _classifier(width: int, outputs: int, kind: HeadKind, hidden: int) -> nn.Module:
    """Build a linear layer, or two with a GELU between."""
    if kind not in get_args(HeadKind):
        raise unknown("head", kind, get_args(HeadKind))
    if kind == "linear":
        return nn.Linear(width, outputs)
    if hidden < 1:
        raise GraftError(f"hidden is {hidden}; give a width of at least 1 to the head's hidden layer.")
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, outputs))


class PooledProteinHead(nn.Module):
    """Outputs for whole proteins.

    Args:
        width: Channels C of the features.
        outputs: Number of outputs K.
        pooling: How residues become one vector; see `Pool`.
        kind: `linear` or `mlp`.
        hidden: Width of the MLP's hidden layer.
    """

    def __init__(
        self, width: int, outputs: int, *, pooling: Pooling = "mean", kind: HeadKind = "linear", hidden: int = 256
    ) -> None:
        super().__init__()
        self.pool = Pool(width, pooling)
        self.classifier = _classifier(width, outputs, kind, hidden)

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        """Map features (B, L, C) and mask (B, L) to outputs (B, K)."""
        return self.classifier(self.pool(features, mask))


class PositionHead(nn.Module):
    """Outputs at chosen positions, such as a site of modification or a mutated residue.

    Args:
        width: Channels C of the features.
        outputs: Number of outputs K.
        kind: `linear` or `mlp`.
        hidden: Width of the MLP's hidden layer.
    """

    def __init__(self, width: int, outputs: int, *, kind: HeadKind = "linear", hidden: int = 256) -> None:
        super().__init__()
        self.classifier = _classifier(width, outputs, kind, hidden)

    def forward(self, features: Tensor, positions: Tensor) -> Tensor:
        """Map features (B, L, C) and 0-based positions (B, P) to outputs (B, P, K)."""
        return self.classifier(features.take_along_dim(positions.unsqueeze(2), dim=1))


class ResidueHead(nn.Module):
    """Outputs for each residue.

    Args:
        width: Channels C of the features.
        outputs: Number of outputs K.
    """

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(width, outputs)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map features (B, L, C) to outputs (B, L, K); those at padding mean nothing, whatever the mask."""
        return self.classifier(features)


class PairHead(nn.Module):
    """Outputs for pairs of proteins, the same whichever of the two comes first.

    Both are pooled to vectors a and b, and a + b, |a - b| and a * b, which do not know the order, are classified.

    Args:
        width: Channels C of the features.
        outputs: Number of outputs K.
        pooling: How the residues of each protein become one vector; see `Pool`.
        kind: `linear` or `mlp`.
        hidden: Width of the MLP's hidden layer.
    """

    def __init__(
        self, width: int, outputs: int, *, pooling: Pooling = "mean", kind: HeadKind = "linear", hidden: int = 256
    ) -> None:
        super().__init__()
        self.pool = Pool(width, pooling)
        self.classifier = _classifier(3 * width, outputs, kind, hidden)

    def forward(self, first: Tensor, first_mask: Tensor, second: Tensor, second_mask: Tensor) -> Tensor:
        """Map features (B, L1, C) and (B, L2, C) with their masks (B, L1) and (B, L2) to outputs (B, K)."""
        a, b = self.pool(first, first_mask), self.pool(second, second_mask)
        return self.classifier(torch.cat((a + b, (a - b).abs(), a * b), dim=1))
