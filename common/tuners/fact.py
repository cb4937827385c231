"""One factorised tensor for the changes of all layers' weights, as a PEFT tuner (FacT, arXiv 2212.03145).

The weights, read as matrices, are cut into tiles of one size; all tiles share their outer factors, which the first
adapted layer holds, and each layer holds the inner factors of its own tiles.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from common.tuners._base import ExchangedLayer, OwnConfig, OwnTuner, by_output, like
from common.tuners.weight_lora import matrix_shape

FACT = "FACT"


@dataclass
class FactConfig(OwnConfig):
    """Configuration of the tuner.

    Args:
        r: Rank of the factors; no tile may be thinner.
        tile_rows: Rows of a tile; the last tile of a layer is cut to fit.
        tile_columns: Its columns.
        form: `tt`: a tile's change is s U S V' with S (r, r) of its own; `tk`: S is a combination, of the tile's own r
            weights, of r matrices that all tiles share.
        scale: The factor s.
    """

    own_type: ClassVar[str] = FACT

    r: int = 16
    tile_rows: int = 0
    tile_columns: int = 0
    form: Literal["tt", "tk"] = "tt"
    scale: float = 1.0


class FactLayer(ExchangedLayer):
    """y = f(x; W + s D), D the tiles U S_t V', cut to the weight's size.

    U (tile rows, r), V (tile columns, r) and the core C (r, r, r) of `tk` are drawn at random and lie in one layer; the
    inner factors, S (tiles, r, r) or p (tiles, r) with S_t = sum_k p_tk C_k, are zero at the start.
    """

    adapter_layer_names: tuple[str, ...] = ("fact_inner", "fact_left", "fact_right", "fact_core")
    other_param_names: tuple[str, ...] = ("scaling", "owner")

    def build(self) -> None:
        """Make the containers."""
        super().build()
        self.fact_inner, self.fact_left, self.fact_right, self.fact_core = (nn.ParameterDict() for _ in range(4))
        self.scaling: dict[str, float] = {}
        self.owner: dict[str, tuple[FactLayer]] = {}  # in a tuple, so that it is no submodule

    def start(self, adapter_name: str, config: FactConfig, key: str) -> None:
        """Add the inner factors of the layer's own tiles."""
        weight = self.base_parameter("weight").detach()
        rows, columns = matrix_shape(self.get_base_layer())
        if not 1 <= config.r <= min(config.tile_rows, config.tile_columns):
            raise ValueError(f"Rank {config.r} does not fit tiles of {config.tile_rows} x {config.tile_columns}.")
        tiles = math.ceil(rows / config.tile_rows) * math.ceil(columns / config.tile_columns)
        inner = (tiles, config.r, config.r) if config.form == "tt" else (tiles, config.r)
        self.scaling[adapter_name] = config.scale
        self.fact_inner[adapter_name] = nn.Parameter(torch.zeros(inner, **like(weight)))

    def share(self, adapter_name: str, config: FactConfig, owner: FactLayer) -> None:
        """Take the outer factors from the layer that holds them, or draw them where it is this one."""
        self.owner[adapter_name] = (owner,)
        if owner is not self:
            return
        place = like(self.base_parameter("weight"))
        shapes = {"left": (config.tile_rows, config.r), "right": (config.tile_columns, config.r)}
        if config.form == "tk":
            shapes["core"] = (config.r,) * 3
        for name, shape in shapes.items():
            drawn = torch.randn(shape) / math.sqrt(config.r)
            getattr(self, f"fact_{name}")[adapter_name] = nn.Parameter(drawn.to(**place))

    def exchanged(self, adapter_name: str) -> dict[str, Tensor]:
        """Compute the changed weight."""
        base, owner, inner = self.get_base_layer(), self.owner[adapter_name][0], self.fact_inner[adapter_name]
        left, right = owner.fact_left[adapter_name].to(inner), owner.fact_right[adapter_name].to(inner)
        if adapter_name in owner.fact_core:
            core = owner.fact_core[adapter_name].to(inner)
            inner = (inner @ core.flatten(1)).view(-1, *core.shape[1:])
        rows = by_output(base, self.base_parameter("weight").to(inner.dtype))
        matrix = rows.flatten(1)
        down = math.ceil(matrix.shape[0] / len(left))
        # No `@` of a matrix and a batch: which kernel, and so which rounding, that takes depends on `requires_grad`.
        tiles = torch.bmm(left.expand(len(inner), -1, -1), inner)
        tiles = torch.bmm(tiles, right.T.expand(len(inner), -1, -1))
        tiles = tiles.unflatten(0, (down, -1))  # (down, across, tile rows, tile columns)
        change = tiles.transpose(1, 2).flatten(2).flatten(0, 1)[: matrix.shape[0], : matrix.shape[1]]
        weight = torch.add(matrix, change, alpha=self.scaling[adapter_name])
        return {"weight": by_output(base, weight.view(rows.shape))}


class FactModel(OwnTuner):
    """The tuner that PEFT builds from a `FactConfig`."""

    prefix: str = "fact_"
    tuner_layer_cls = FactLayer

    def join(self, layer: FactLayer, adapter_name: str, config: FactConfig, key: str) -> None:
        """Let the first layer hold the outer factors for all."""
        owner = self.__dict__.setdefault("_owners", {}).setdefault(adapter_name, layer)
        layer.share(adapter_name, config, owner)
        layer.set_adapter(layer.active_adapters, inference_mode=config.inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter from all layers."""
        super().delete_adapter(adapter_name)
        self.__dict__.get("_owners", {}).pop(adapter_name, None)
