"""Gates that an example's own tokens open and close (UniPELT, arXiv 2110.07577)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.tuners._base import like

_START = 0.02  # standard deviation with which a gate's weights start


class TokenGate(nn.Module):
    """g = mean over an example's tokens h of sigmoid(W h + b): numbers in (0, 1), near one half at the start.

    Args:
        inputs: Channels of the tokens.
        gates: How many numbers are computed.
        weight: A weight of the frozen layer, which says type and device.
    """

    def __init__(self, inputs: int, gates: int, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(gates, inputs, **like(weight)).normal_(std=_START))
        self.bias = nn.Parameter(torch.zeros(gates, **like(weight)))

    def forward(self, tokens: Tensor, seen: Tensor | None = None) -> Tensor:
        """Compute the gates of each example.

        Args:
            tokens: (B, ..., inputs).
            seen: (B, ...), False at padding, which does not count; None counts all.

        Returns:
            (B, 1, ..., gates), in single precision at least.
        """
        single = torch.promote_types(tokens.dtype, torch.float32)
        opened = functional.linear(tokens.to(self.weight.dtype), self.weight, self.bias).to(single).sigmoid()
        if seen is not None and seen.shape != tokens.shape[:-1]:
            raise ValueError(f"A gate reads tokens {tuple(tokens.shape)}, and its mask is of {tuple(seen.shape)}.")
        batch, count = len(tokens), math.prod(tokens.shape[1:-1])
        rows = opened.reshape(batch, count, -1)
        if seen is None:
            gates = rows.mean(1)
        else:
            counted = seen.reshape(batch, count, 1)
            gates = (rows * counted).sum(1) / counted.sum(1).clamp_min(1)
        return gates.view(batch, *(1,) * (tokens.ndim - 2), -1)


def seen_tokens(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Return which tokens (B, T, C) are no padding, (B, T).

    Args:
        tokens: What an attention reads.
        mask: Its mask of the keys, (B, T) or (B or 1, ..., T or 1, T): True, or 0 in a mask that is added to the
            scores, where a token is seen. A token that no other sees is padding. None: there is no padding.
    """
    if mask is None:
        return tokens.new_ones(tokens.shape[:-1], dtype=torch.bool)
    seen = mask == 0 if mask.is_floating_point() else mask.bool()
    while seen.ndim > 2:
        seen = seen.any(dim=1)
    return seen.expand(tokens.shape[:-1])
