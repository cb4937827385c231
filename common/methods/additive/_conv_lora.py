"""LoRA that sees the neighbourhood of a patch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from common.errors import GraftError
from common.methods._base import OnModules, Plan, exact, require_types
from common.methods.additive._parallel import grids_of

if TYPE_CHECKING:
    from torch import nn

    from common.roles import RoleMap


@dataclass(frozen=True, kw_only=True)
class ConvLoRA(OnModules):
    """LoRA with convolutions at several scales in its bottleneck (Conv-LoRA; Zhong et al. 2024, arXiv 2401.17868).

    y = W x + s * B sum_i g_i E_i(A x): A of shape (r, C), B of shape (O, r), B = 0 at the start; the r channels of the
    patches form a map, which expert E_i, i = 1 ... n, enlarges i times, convolves with a kernel of 3 and makes small
    again, each the identity at the start; g = softmax(G mean(A x) + c), G of shape (n, r), weighs the experts for each
    image. The paper draws one expert for each image with noise and a loss that balances them; here all take part by
    their weights, so that no loss is needed and every expert learns in every step. A class or register token goes past
    the experts. Trainable parameters for each layer with a grid of a axes: r C + O r + n (3^a r^2 + r) + r n + n.
    Defaults of the paper: r = 3, n = 8, at the queries, keys and values. For dense tasks on a plain ViT, which lacks
    local priors. Refused where tokens lie in no grid, as those of proteins and speech, and in attention in windows.
    The convolutions make it no change of a weight, so it cannot be merged.

    Args:
        on: Roles of linear layers.
        target_modules: Exact module names instead of roles.
        rank: Rank r.
        experts: Number n of scales.
        scale: The factor s.
    """

    taxonomy: ClassVar[str] = "additive"
    summary: ClassVar[str] = "LoRA with convolutions over the patches in its bottleneck"
    source: ClassVar[str] = "arXiv 2401.17868"

    on: list[str] = field(default_factory=lambda: ["attention_qkv"])
    rank: int = 3
    experts: int = 8
    scale: float = 1.0

    def plan(self, model: nn.Module, roles: RoleMap | None) -> Plan:
        """Take Linear layers whose tokens lie in a grid; see the base class."""
        from common.tuners import ConvLoraConfig

        for name in ("rank", "experts"):
            if getattr(self, name) < 1:
                raise GraftError(f"ConvLoRA {name} is {getattr(self, name)}; give a whole number of at least 1.")
        targets = self.select(model, roles)
        require_types("ConvLoRA", model, targets, ("Linear",))
        config = ConvLoraConfig(
            target_modules=exact(list(targets)),
            r=self.rank,
            scale=self.scale,
            experts=self.experts,
            grids=grids_of("ConvLoRA", {name: name for name in targets}, roles),
        )
        return Plan(peft_config=config, targets=targets)
