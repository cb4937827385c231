"""Heads of image tasks: pool the tokens, then classify."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from common.errors import GraftError, unknown

Pooling = Literal["auto", "cls", "mean", "cls_mean", "attention"]
HeadKind = Literal["linear", "mlp"]


class AttentionPool(nn.Module):
    """One learned query attends over all tokens (as in Lee et al. 2019, arXiv 1810.00825, with a single seed)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(width))
        self.key = nn.Linear(width, width, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Pool (B, N, C) to (B, C)."""
        scores = self.key(tokens) @ self.query / tokens.shape[-1] ** 0.5  # (B, N)
        return (scores.softmax(dim=-1).unsqueeze(-1) * tokens).sum(dim=1)


class PooledHead(nn.Module):
    """Pool tokens to one vector and map it to class logits.

    Args:
        width: Channels C of the tokens.
        prefix_tokens: Tokens before the patch tokens; the first is the class token.
        classes: Number of classes K.
        pooling: `cls`, `mean` of the patch tokens, both side by side, or learned `attention`; `auto` is `cls` where
            there is a class token, else `mean`.
        kind: `linear`, or `mlp` with one hidden layer.
        hidden: Width of the hidden layer.
    """

    def __init__(
        self,
        width: int,
        prefix_tokens: int,
        classes: int,
        *,
        pooling: Pooling = "auto",
        kind: HeadKind = "linear",
        hidden: int = 256,
    ) -> None:
        super().__init__()
        if pooling == "auto":
            pooling = "cls" if prefix_tokens else "mean"
        if pooling in ("cls", "cls_mean") and not prefix_tokens:
            raise GraftError(f"pooling '{pooling}' needs a class token, which this backbone has not. Use 'mean'.")
        self.pooling, self.prefix_tokens = pooling, prefix_tokens
        self.attention = AttentionPool(width) if pooling == "attention" else None
        inner = 2 * width if pooling == "cls_mean" else width
        if kind == "linear":
            self.classifier: nn.Module = nn.Linear(inner, classes)
        elif kind == "mlp":
            self.classifier = nn.Sequential(nn.Linear(inner, hidden), nn.GELU(), nn.Linear(hidden, classes))
        else:
            raise unknown("head", kind, ("linear", "mlp"))

    def pool(self, tokens: Tensor) -> Tensor:
        """Pool (B, N, C) to (B, C), or (B, 2C) for `cls_mean`."""
        if self.attention is not None:
            return self.attention(tokens)
        if self.pooling == "cls":
            return tokens[:, 0]
        mean = tokens[:, self.prefix_tokens :].mean(dim=1)
        return mean if self.pooling == "mean" else torch.cat((tokens[:, 0], mean), dim=-1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (B, N, C) to logits (B, K)."""
        return self.classifier(self.pool(tokens))
