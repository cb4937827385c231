"""Additive methods: small new modules beside frozen ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from common.methods._base import OnModules, Plan, exact, require_types

if TYPE_CHECKING:
    from torch import nn

    from common.roles import RoleMap


@dataclass(frozen=True, kw_only=True)
class IA3(OnModules):
    """Infused adapter by inhibiting and amplifying inner activations (Liu et al. 2022, arXiv 2205.05638).

    Each adapted layer's output is scaled, y = l * (W x + b) with l = 1 at the start; the second layer of a feed-forward
    network (role `ffn_out`) is scaled at its input instead, as in the paper. Trainable parameters: one number for each
    output (input) channel. Very few parameters; wants a higher learning rate than LoRA.
    """

    taxonomy: ClassVar[str] = "additive"
    summary: ClassVar[str] = "scale activations by learned vectors"
    source: ClassVar[str] = "arXiv 2205.05638"

    def plan(self, model: nn.Module, roles: RoleMap | None) -> Plan:
        """Take Linear and Conv layers; see the base class."""
        from peft import IA3Config

        targets = self.select(model, roles)
        require_types("IA3", model, targets, ("Linear", "Conv2d", "Conv3d"))
        inputs = [name for name, role in targets.items() if role == "ffn_out"]
        config = IA3Config(target_modules=exact(list(targets)), feedforward_modules=exact(inputs) if inputs else [])
        return Plan(peft_config=config, targets=targets)
