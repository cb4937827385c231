"""Reparameterised methods that factorise the change of all layers at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from common.errors import GraftError
from common.methods._base import CONVOLUTIONS, OnModules, Plan, exact, require_types

if TYPE_CHECKING:
    from torch import nn

    from common.roles import RoleMap


@dataclass(frozen=True, kw_only=True)
class _FacT(OnModules):
    form: ClassVar[Literal["tt", "tk"]]

    rank: int = 16
    scale: float = 1.0

    def plan(self, model: nn.Module, roles: RoleMap | None) -> Plan:
        """Take Linear and convolution layers; see the base class."""
        from common.tuners import FactConfig, matrix_shape

        name = type(self).__name__
        if self.rank < 1:
            raise GraftError(f"{name} rank is {self.rank}; give a whole number of at least 1.")
        targets = self.select(model, roles)
        require_types(name, model, targets, ("Linear", *CONVOLUTIONS))
        sizes = {target: matrix_shape(model.get_submodule(target)) for target in targets}
        thinnest = min(sizes, key=lambda target: min(sizes[target]))
        if min(sizes[thinnest]) < self.rank:
            raise GraftError(
                f"{name} rank is {self.rank}, but all layers share tiles no larger than the smallest one, "
                f"'{thinnest}' ({sizes[thinnest][0]} x {sizes[thinnest][1]}). Lower the rank, or choose roles of like "
                "size with 'on'."
            )
        rows, columns = (min(size[axis] for size in sizes.values()) for axis in (0, 1))
        config = FactConfig(
            target_modules=exact(list(targets)),
            r=self.rank,
            tile_rows=rows,
            tile_columns=columns,
            form=self.form,
            scale=self.scale,
        )
        return Plan(peft_config=config, targets=targets)


@dataclass(frozen=True, kw_only=True)
class FacTTT(_FacT):
    """Factor tuning, tensor-train form (FacT-TT; Jie and Deng 2022, arXiv 2212.03145).

    The adapted weights, read as matrices, are cut into tiles of a x b (a, b the smallest number of rows and of columns
    among the adapted layers: d x d in a transformer; a layer's last tile is cut to fit), and tile t gets the change
    s U S_t V' with U (a, rank) and V (b, rank) shared by all tiles of all layers and S_t (rank, rank) of its own.
    Trainable parameters: (a + b) rank + tiles rank^2. The paper draws U and S and starts V at zero; here U and V are
    drawn and S starts at zero, so that each layer learns from the first step. For transformers, where one tile size
    fits all layers: far fewer parameters than LoRA of this rank. Merges without a trace.

    Args:
        rank: Rank of the factors; the paper's is 16.
        scale: The factor s; the paper tries 0.01 to 100.
    """

    taxonomy: ClassVar[str] = "reparameterised"
    summary: ClassVar[str] = "one tensor train for the changes of all layers"
    source: ClassVar[str] = "arXiv 2212.03145"

    form: ClassVar[Literal["tt", "tk"]] = "tt"


@dataclass(frozen=True, kw_only=True)
class FacTTK(_FacT):
    """Factor tuning, Tucker form (FacT-TK; Jie and Deng 2022, arXiv 2212.03145).

    As FacTTT, with S_t = sum_k p_tk C_k: a core C (rank, rank, rank) shared by all tiles and p_t of length rank of a
    tile's own, zero at the start. Trainable parameters: (a + b) rank + rank^3 + tiles rank. The smaller one of the two
    where there are many layers; merges without a trace.

    Args:
        rank: Rank of the factors; the paper's is 32.
        scale: The factor s; the paper tries 0.01 to 100.
    """

    taxonomy: ClassVar[str] = "reparameterised"
    summary: ClassVar[str] = "one Tucker tensor for the changes of all layers"
    source: ClassVar[str] = "arXiv 2212.03145"

    form: ClassVar[Literal["tt", "tk"]] = "tk"

    rank: int = 32
