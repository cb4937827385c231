"""Methods on single entries and biases of linear layers that PEFT offers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from common.errors import GraftError
from common.methods.reparameterised._layers import OnLinear, Shape, in_unit

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn

    from common.roles import RoleMap


@dataclass(frozen=True, kw_only=True)
class SuperTuning(OnLinear):
    """Train the weight's entries of the greatest magnitude (Super-Tuning; arXiv 2607.09287).

    W + D with D zero but for trained entries at the places where |W| is greatest, zero at the start. Trainable
    parameters: floor((1 - sparsity) in out) for each layer. Needs no data to choose the entries; changes no more of the
    weight than it trains. Linear layers only; merges to the bit.

    Args:
        sparsity: Share of the entries that stay frozen.
        greatest: Train the greatest entries; False trains the smallest.
    """

    taxonomy: ClassVar[str] = "selective"
    summary: ClassVar[str] = "train the weight's greatest entries"
    source: ClassVar[str] = "arXiv 2607.09287"

    sparsity: float = 0.99
    greatest: bool = True

    def check(self) -> None:
        """See the base class."""
        in_unit("SuperTuning", sparsity=self.sparsity)

    def configure(self, target: str, shapes: Mapping[str, Shape]) -> tuple[PeftConfig, tuple[str, ...]]:
        """See the base class."""
        from peft import SupertuningConfig

        for name, (rows, columns) in shapes.items():
            if int(rows * columns * (1 - self.sparsity)) < 1:
                raise GraftError(
                    f"SuperTuning with sparsity {self.sparsity} leaves nothing to train of '{name}', which has "
                    f"{rows * columns} weights. Lower the sparsity, or choose other roles with 'on'."
                )
        config = SupertuningConfig(sparsity=self.sparsity, select_top=self.greatest, target_modules=target)
        return config, ()


@dataclass(frozen=True, kw_only=True)
class BEFT(OnLinear):
    """Bias-efficient fine-tuning of chosen projections (BEFT; arXiv 2509.15974).

    b + e for the biases of the chosen linear layers, e = 0 at the start. The paper trains the bias of the value
    projection alone; Graft's roles know `attention_qkv` (a fused layer has the three in one). Trainable parameters: out
    for each layer; layers of a role that have no bias are passed over. The smallest of the bias methods; merges to the
    bit.

    Args:
        on: Roles of linear layers that have a bias.
        target_modules: Exact module names instead of roles, such as the value projections alone.
    """

    taxonomy: ClassVar[str] = "selective"
    summary: ClassVar[str] = "train chosen layers' biases"
    source: ClassVar[str] = "arXiv 2509.15974"

    on: list[str] = field(default_factory=lambda: ["attention_qkv"])

    def select(self, model: nn.Module, roles: RoleMap | None) -> dict[str, str]:
        """Return the chosen layers that have a bias.

        Raises:
            GraftError: None has one, or one that was named has none.
        """
        chosen = super().select(model, roles)
        having = {
            name: role for name, role in chosen.items() if model.get_submodule(name)._parameters.get("bias") is not None
        }
        without = [name for name in chosen if name not in having]
        if without and (not having or self.target_modules is not None):
            raise GraftError(f"BEFT trains biases, and '{without[0]}' has none. Choose other roles with 'on'.")
        return having

    def configure(self, target: str, shapes: Mapping[str, Shape]) -> tuple[PeftConfig, tuple[str, ...]]:
        """See the base class."""
        from peft import BeftConfig

        return BeftConfig(target_modules=target), ()
