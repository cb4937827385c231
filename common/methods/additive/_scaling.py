"""Learned scales, and shifts, of what frozen layers compute."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from common.methods._base import CONVOLUTIONS, OnModules, Plan, exact, listed, require_types

if TYPE_CHECKING:
    from torch import nn

    from common.roles import RoleMap

_NORMS = (
    "LayerNorm",
    "GroupNorm",
    "RMSNorm",
    *(f"{kind}Norm{dims}d" for kind in ("Batch", "Instance") for dims in (1, 2, 3)),
)


@dataclass(frozen=True, kw_only=True)
class IA3(OnModules):
    """Infused adapter by inhibiting and amplifying inner activations (Liu et al. 2022, arXiv 2205.05638).

    Each adapted layer's output is scaled, y = l * (W x + b) with l = 1 at the start; the second layer of a feed-forward
    network (role `ffn_out`) is scaled at its input instead, as in the paper. Trainable parameters: one number for each
    output (input) channel. Very few parameters; wants a higher learning rate than LoRA. PEFT's own tuner does it, and
    where a target is one that it lacks (Conv1d, transposed convolutions), Graft's does it for all targets.
    """

    taxonomy: ClassVar[str] = "additive"
    summary: ClassVar[str] = "scale activations by learned vectors"
    source: ClassVar[str] = "arXiv 2205.05638"

    def plan(self, model: nn.Module, roles: RoleMap | None) -> Plan:
        """Take Linear and convolution layers; see the base class."""
        from peft import IA3Config
        from torch import nn as torch_nn

        from common.tuners import ScaleShiftConfig

        targets = self.select(model, roles)
        require_types("IA3", model, targets, ("Linear", *CONVOLUTIONS))
        inputs = [name for name, role in targets.items() if role == "ffn_out"]
        known = (torch_nn.Linear, torch_nn.Conv2d, torch_nn.Conv3d)
        lacking = [name for name in targets if not isinstance(model.get_submodule(name), known)]
        if lacking:
            config = ScaleShiftConfig(
                target_modules=exact(list(targets)), shift=False, inputs=exact(inputs) if inputs else None
            )
            note = f"IA3 runs in Graft's own tuner, since PEFT's cannot do {len(lacking)} of {len(targets)} layers: "
            shown = listed([f"{name} ({type(model.get_submodule(name)).__name__})" for name in lacking])
            return Plan(peft_config=config, targets=targets, notes=(f"{note}{shown}.",))
        config = IA3Config(target_modules=exact(list(targets)), feedforward_modules=exact(inputs) if inputs else [])
        return Plan(peft_config=config, targets=targets, notes=("IA3 runs in PEFT's own tuner.",))


@dataclass(frozen=True, kw_only=True)
class SSF(OnModules):
    """Scaling and shifting features (Lian et al. 2022, arXiv 2210.08823).

    Each adapted layer's output is scaled and shifted by channel, y = g * f(x) + h with g = 1 and h = 0 at the start
    (the paper draws both near these). A layer without a bias is scaled only, so that the change merges into the layer's
    own parameters. Trainable parameters: two numbers for each output channel of a layer that has a bias, one where it
    has none. For convolutional networks and shifts of intensity or contrast; more parameters than IA3, many fewer than
    LoRA.

    Args:
        on: Roles or groups of roles; the default takes all weights and the norms.
        target_modules: Exact module names instead of roles.
    """

    taxonomy: ClassVar[str] = "additive"
    summary: ClassVar[str] = "scale and shift each layer's output"
    source: ClassVar[str] = "arXiv 2210.08823"

    on: list[str] = field(default_factory=lambda: ["all", "norm"])

    def plan(self, model: nn.Module, roles: RoleMap | None) -> Plan:
        """Take Linear and convolution layers and norms; see the base class."""
        from common.tuners import ScaleShiftConfig

        targets = self.select(model, roles)
        require_types("SSF", model, targets, ("Linear", *CONVOLUTIONS, *_NORMS))
        return Plan(peft_config=ScaleShiftConfig(target_modules=exact(list(targets))), targets=targets)
