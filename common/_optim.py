"""The optimizer's settings: AdamW, its rates and their schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from common.errors import GraftError


@dataclass(frozen=True, kw_only=True)
class OptimSpec:
    """AdamW (arXiv 1711.05101) with warm-up and cosine decay.

    Args:
        lr: Peak learning rate of the backbone's trained parameters (adapters, biases, whole layers).
        head_lr: Peak learning rate of the head; None takes `lr`.
        weight_decay: Decoupled weight decay; vectors (biases, norms, scales) are never decayed.
        warmup: Share of all steps over which the rate rises from zero.
        schedule: `cosine` to zero after the warm-up, or `constant`.
        layer_decay: Factor by which the rate falls per block from the output to the input (arXiv 2003.10555); 1 is off.
    """

    lr: float = 1e-3
    head_lr: float | None = None
    weight_decay: float = 0.01
    warmup: float = 0.1
    schedule: Literal["cosine", "constant"] = "cosine"
    layer_decay: float = 1.0

    def check(self) -> None:
        """Raise one `GraftError` that names every value out of range."""
        rates = {"lr": self.lr, "head_lr": self.head_lr}
        problems = [f"{name} is {rate}" for name, rate in rates.items() if rate is not None and rate <= 0]
        problems += [f"weight_decay is {self.weight_decay}"] if self.weight_decay < 0 else []
        problems += [f"warmup is {self.warmup} (a share in [0, 1))"] if not 0 <= self.warmup < 1 else []
        problems += [f"layer_decay is {self.layer_decay} (in (0, 1])"] if not 0 < self.layer_decay <= 1 else []
        if problems:
            raise GraftError(f"optim: {'; '.join(problems)}; rates must be above 0. Mend the recipe's 'optim'.")

    def factor(self, step: int, total: int) -> float:
        """Return the schedule's factor at an optimizer step, 0-based, out of `total`."""
        warm = round(self.warmup * total)
        if step < warm:
            return (step + 1) / (warm + 1)
        if self.schedule == "constant":
            return 1.0
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, (step - warm) / max(1, total - warm))))
