"""AdaLoRA: a budget of ranks that moves to the layers that need them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from common.errors import GraftError
from common.methods.reparameterised._layers import OnLinear, Shape, at_least, in_unit

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class AdaLoRA(OnLinear):
    """Adaptive budget allocation (Zhang et al. 2023, arXiv 2303.10512).

    W + s B diag(e) A with A of shape (start_rank, in), B of shape (out, start_rank), e = 0 at the start, and a penalty
    g (|A A' - I| + |B' B - I|), the mean over the layers, that keeps B diag(e) A near a singular value decomposition.
    While training, the triplets (column of B, entry of e, row of A) of all layers are ranked by how much the loss feels
    them, and the least are set to zero, down to `rank` a layer on average, along a cubic schedule. Trainable
    parameters: start_rank (in + out + 1) for each layer. s = alpha / start_rank. Where layers differ in what they need;
    linear layers only. Merges without a trace.

    PEFT's own tuner does it; schedule, ranking and penalty are Graft's, since PEFT's need the number of steps before
    there is a run and add the penalty to the loss of transformers' own models alone.

    Args:
        rank: Ranks a layer on average at the end.
        start_rank: Ranks of each layer at the start; the paper takes 1.5 times `rank`.
        alpha: Scale; None takes twice `start_rank`.
        dropout: Dropout on the adapter's input.
        warmup: Share of the steps before the first ranking.
        final: Share of the steps behind the last one.
        every: Steps from one ranking to the next.
        penalty_weight: Weight g of the penalty; the paper takes 0.1 to 0.5.
    """

    taxonomy: ClassVar[str] = "reparameterised"
    summary: ClassVar[str] = "low-rank changes, ranks moved to where they count"
    source: ClassVar[str] = "arXiv 2303.10512"

    rank: int = 8
    start_rank: int = 12
    alpha: float | None = None
    dropout: float = 0.0
    warmup: float = 0.1
    final: float = 0.3
    every: int = 1
    penalty_weight: float = 0.5

    def check(self) -> None:
        """See the base class."""
        at_least(1, "AdaLoRA", rank=self.rank, start_rank=self.start_rank, every=self.every)
        in_unit("AdaLoRA", dropout=self.dropout, warmup=self.warmup, final=self.final)
        if self.rank > self.start_rank:
            raise GraftError(
                f"AdaLoRA starts at rank {self.start_rank} and goes down to {self.rank}; raise 'start_rank'."
            )
        if self.warmup + self.final >= 1:
            raise GraftError(
                f"AdaLoRA warmup {self.warmup} and final {self.final} leave no step to rank in; lower one of them."
            )
        if self.penalty_weight < 0:
            raise GraftError(f"AdaLoRA penalty_weight is {self.penalty_weight}; give 0 or more.")

    def configure(self, target: str, shapes: Mapping[str, Shape]) -> tuple[PeftConfig, tuple[str, ...]]:
        """See the base class."""
        from peft import AdaLoraConfig

        # PEFT scales by the rank at the start too. Its schedule is not used; it asks for some number of steps.
        alpha: Any = self.alpha if self.alpha is not None else 2 * self.start_rank
        config = AdaLoraConfig(
            init_r=self.start_rank,
            target_r=self.rank,
            lora_alpha=alpha,
            lora_dropout=self.dropout,
            total_step=1,
            target_modules=target,
        )
        return config, ()

    @property
    def alone(self) -> str:
        """See the base class."""
        return "its ranks follow a schedule of their own"

    def penalty(self, model: nn.Module) -> Tensor | None:
        """Return how far the factors are from orthogonal ones."""
        from common.tuners.rank_budget import orthogonality

        return self.penalty_weight * orthogonality(model) if self.penalty_weight else None

    def after_step(self, model: nn.Module, memory: dict[str, Tensor], step: int, steps: int) -> None:
        """Rank the triplets and set the least to zero, by the schedule."""
        from common.tuners.rank_budget import observe, prune, triplets

        first, last = round(self.warmup * steps), steps - round(self.final * steps)
        if step <= last:
            observe(model, memory)
            if step <= first or (step % self.every and step != last):
                return
            left = ((last - step) / (last - first)) ** 3
            every, wanted = triplets(model, self.start_rank), triplets(model, self.rank)
            prune(model, memory, keep=wanted + int((every - wanted) * left))
        else:
            prune(model, memory, keep=None)
