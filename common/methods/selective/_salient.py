"""Train a small map of the channels that the training data excites most."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from common.errors import GraftError
from common.methods._base import CONVOLUTIONS, Calibration, OnModules, Plan, exact, listed, require_types

if TYPE_CHECKING:
    from torch import Tensor, nn

    from common.roles import RoleMap


@dataclass(frozen=True, kw_only=True)
class SCT(OnModules):
    """Salient channel tuning (Zhao et al. 2023, arXiv 2309.08513).

    y[S] = z[S] + s (M z[S] + b), z = W x + c: the k most salient output channels S of a layer are mapped onto
    themselves by M of shape (k, k) and b of length k, zero at the start; the other channels stay. Salient are the
    channels with the largest mean square over some training batches, before the first step (the paper sums over
    classes; here each example counts once). A layer without a bias has no b, one in groups is refused. Trainable
    parameters: k^2 + k for each adapted layer with a bias, k^2 without; k above a layer's outputs is lowered to them.
    For vision transformers with little data per task; linear, so it merges without a trace.

    Args:
        on: Roles of the layers whose outputs are mapped: those that end attention and feed-forward network.
        target_modules: Exact module names instead of roles.
        channels: k; the paper's is 96 of 768.
        scale: The factor s.
        batches: Training batches that are looked at.
    """

    taxonomy: ClassVar[str] = "selective"
    summary: ClassVar[str] = "map the most salient channels"
    source: ClassVar[str] = "arXiv 2309.08513"

    on: list[str] = field(default_factory=lambda: ["attention_out", "ffn_out"])
    channels: int = 96
    scale: float = 1.0
    batches: int = 8

    @property
    def calibration(self) -> Calibration:
        """Look at the mean square of each output channel."""
        return Calibration(of="output_energy", batches=self.batches)

    def plan(self, model: nn.Module, roles: RoleMap | None) -> Plan:
        """Take Linear and convolution layers; see the base class."""
        from common.tuners import SalientConfig, matrix_shape

        wrong = {name: getattr(self, name) for name in ("channels", "batches") if getattr(self, name) < 1}
        if wrong:
            given = " and ".join(f"{name} is {value}" for name, value in wrong.items())
            raise GraftError(f"SCT {given}; give whole numbers of at least 1.")
        targets = self.select(model, roles)
        require_types("SCT", model, targets, ("Linear", *CONVOLUTIONS))
        grouped = [name for name in targets if getattr(model.get_submodule(name), "groups", 1) > 1]
        if grouped:
            raise GraftError(
                f"SCT cannot act on {listed([repr(name) for name in grouped], most=1)}: a convolution in groups cannot "
                "mix its channels in its own weights. Choose other roles with 'on', or another method."
            )
        outputs = {name: matrix_shape(model.get_submodule(name))[0] for name in targets}
        lowered = [f"{name} ({size})" for name, size in outputs.items() if size < self.channels]
        config = SalientConfig(target_modules=exact(list(targets)), channels=self.channels, scale=self.scale)
        seen = (
            f"Which channels are mapped is decided by {self.batches} training batches before the first step; until "
            "then, and where there are no data, they are chosen at random."
        )
        note = f"{self.channels} channels are lowered to the outputs of {len(lowered)} layers: {listed(lowered)}."
        notes = (seen, note) if lowered else (seen,)
        return Plan(peft_config=config, targets=targets, looks=((self, tuple(targets)),), notes=notes)

    def calibrate(self, layers: Mapping[str, Any], seen: Mapping[str, Tensor]) -> None:
        """Choose the channels; see the base class."""
        for name, layer in layers.items():
            layer.choose(layer.active_adapters[0], seen[name])
