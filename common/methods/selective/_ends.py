"""The two ends of the scale: train everything, or nothing of the backbone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from common.methods._base import MethodSpec, Plan

if TYPE_CHECKING:
    from torch import nn

    from common.roles import RoleMap


@dataclass(frozen=True, kw_only=True)
class FullFineTune(MethodSpec):
    """Train every parameter of the backbone: the reference that PEFT is measured against.

    Normalisation statistics train too. The shared artifact is a whole model, so `graft export` writes all weights.
    """

    taxonomy: ClassVar[str] = "baseline"
    summary: ClassVar[str] = "train every parameter"

    def plan(self, model: nn.Module, roles: RoleMap | None) -> Plan:
        """Train all; see the base class."""
        targets = dict(roles.role_of) if roles else {}
        return Plan(peft_config=None, targets=targets, mode="full")


@dataclass(frozen=True, kw_only=True)
class LinearProbe(MethodSpec):
    """Train the head alone on the frozen backbone's features.

    The backbone stays in eval mode and outside the autograd graph, so a step costs one forward pass.
    """

    taxonomy: ClassVar[str] = "baseline"
    summary: ClassVar[str] = "train the head alone"

    def plan(self, model: nn.Module, roles: RoleMap | None) -> Plan:
        """Train nothing of the backbone; see the base class."""
        return Plan(peft_config=None, targets={}, mode="frozen")
