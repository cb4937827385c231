"""Changes of the weight that turn it: block rotations, butterflies, reflections, turns of a subspace or of pairs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from common.errors import GraftError
from common.methods.reparameterised._layers import (
    OnLinear,
    Shape,
    WeightChange,
    at_least,
    fitting,
    say_fitted,
)

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class OFT(WeightChange):
    """Orthogonal fine-tuning (Qiu et al. 2023, arXiv 2306.07280).

    W R with R of orthogonal blocks on the diagonal, each the Cayley transform (I + S)^-1 (I - S) of a skew-symmetric S,
    zero at the start: angles between the neurons stay as they were. Trainable parameters: in (block - 1) / 2 for each
    layer; a convolution's `in` is its inputs / groups times its kernel positions. A block that does not divide a
    layer's inputs is lowered to the next that does. Keeps what the model knows best; merges without a trace.

    It runs in Graft's own tuner: PEFT's takes inputs with four axes for images, on linear layers too, and fails.

    Args:
        block: Side of the blocks.
    """

    taxonomy: ClassVar[str] = "reparameterised"
    summary: ClassVar[str] = "rotate the weight's inputs in blocks"
    source: ClassVar[str] = "arXiv 2306.07280"

    block: int = 32

    def check(self) -> None:
        """See the base class."""
        at_least(2, "OFT", block=self.block)

    def misfit(self, shape: Shape) -> str:
        """See the base class."""
        return "inputs with four axes"

    def form(self) -> tuple[str, dict[str, Any]]:
        """See the base class."""
        return "block_rotation", {"block": self.block}


@dataclass(frozen=True, kw_only=True)
class BOFT(WeightChange):
    """Orthogonal fine-tuning by butterfly factors (Liu et al. 2023, arXiv 2311.06243).

    diag(s) W R1 ... Rm: each R of orthogonal blocks as in OFT, the i-th over pairs of half-blocks of inputs that lie
    2^(i - 1) half-blocks apart, so that few parameters mix distant inputs; R = I and s = 1 at the start. Trainable
    parameters for each layer: factors in (block - 1) / 2 + out; a convolution's `in` is its inputs / groups times its
    kernel positions. 2^(factors - 1) block must divide a layer's inputs; a block that does not fit is lowered to the
    next even one that does. Denser than OFT at the same parameters; merges without a trace.

    It runs in Graft's own tuner: PEFT's takes one factor, whatever was asked for, where its CUDA extension does not
    build, so that an adapter trained on one machine would not load on another.

    Args:
        block: Side of the blocks; even.
        factors: Butterfly factors m; 1 is OFT with scales.
    """

    taxonomy: ClassVar[str] = "reparameterised"
    summary: ClassVar[str] = "rotate the weight's inputs by butterflies"
    source: ClassVar[str] = "arXiv 2311.06243"

    block: int = 4
    factors: int = 2

    def check(self) -> None:
        """See the base class."""
        at_least(1, "BOFT", factors=self.factors)
        if self.block < 2 or self.block % 2:
            raise GraftError(f"BOFT block is {self.block}; give an even number of at least 2.")

    def check_shape(self, name: str, shape: Shape) -> None:
        """See the base class."""
        if shape[1] % 2**self.factors:
            raise GraftError(
                f"BOFT with {self.factors} factors needs inputs that {2**self.factors} divides, and '{name}' has "
                f"{shape[1]}. Lower 'factors', or choose other roles with 'on'."
            )

    def misfit(self, shape: Shape) -> str:
        """See the base class."""
        return "its factors depend on a CUDA extension"

    def form(self) -> tuple[str, dict[str, Any]]:
        """See the base class."""
        return "butterfly", {"block": self.block, "factors": self.factors}


@dataclass(frozen=True, kw_only=True)
class HRA(WeightChange):
    """Householder reflection adaptation (Yuan et al. 2024, arXiv 2405.17484).

    W H1 ... Hr with reflections H = I - 2 u u' / |u|^2, u of length in, drawn in equal pairs that cancel out at the
    start up to rounding: an orthogonal change that is also one of rank r. Trainable parameters: rank in for each layer;
    a convolution's `in` is its inputs / groups times its kernel positions. Between LoRA and OFT, with few parameters;
    merges without a trace.

    Args:
        rank: Number of reflections; even, since they start in pairs.
    """

    taxonomy: ClassVar[str] = "reparameterised"
    summary: ClassVar[str] = "reflect the weight's inputs"
    source: ClassVar[str] = "arXiv 2405.17484"

    rank: int = 8

    def check(self) -> None:
        """See the base class."""
        if self.rank < 2 or self.rank % 2:
            raise GraftError(f"HRA rank is {self.rank}; give an even number of at least 2: reflections start in pairs.")

    def engine(self, target: str) -> PeftConfig:
        """See the base class."""
        from peft import HRAConfig

        return HRAConfig(r=self.rank, target_modules=target)

    def form(self) -> tuple[str, dict[str, Any]]:
        """See the base class."""
        return "reflections", {"rank": self.rank}


@dataclass(frozen=True, kw_only=True)
class PSOFT(WeightChange):
    """Orthogonal fine-tuning in the principal subspace (PSOFT; ICLR 2026, OpenReview FSHrinMArK).

    W + B (diag(b) R diag(a) - I) A: B A the best approximation of W of this rank, frozen, R orthogonal by the Cayley
    transform, R = I and a = b = 1 at the start. Trainable parameters: rank (rank - 1) / 2 + 2 rank for each layer,
    whatever its size; a rank above a layer's own size is lowered to it. For a large rank at very few parameters, where
    the geometry of the strong directions should stay; merges without a trace.

    It runs in Graft's own tuner: PEFT's draws A and B anew from the weight's spectrum at each load, whose signs differ
    between libraries. Here the adapter file holds them, rank (in + out) numbers for each layer.

    Args:
        rank: Dimensions of the subspace.
    """

    taxonomy: ClassVar[str] = "reparameterised"
    summary: ClassVar[str] = "turn the weight's principal subspace"
    source: ClassVar[str] = "OpenReview FSHrinMArK"

    rank: int = 32

    def check(self) -> None:
        """See the base class."""
        at_least(1, "PSOFT", rank=self.rank)

    def misfit(self, shape: Shape) -> str:
        """See the base class."""
        return "its file would lack the subspace"

    def form(self) -> tuple[str, dict[str, Any]]:
        """See the base class."""
        return "subspace_rotation", {"rank": self.rank}


@dataclass(frozen=True, kw_only=True)
class RoAd(OnLinear):
    """2D rotary adaptation (Liao and Monz 2024, arXiv 2409.00119).

    Outputs are taken in pairs and each pair is turned and scaled, h -> a [cos t, -sin t; sin t, cos t] h, with t = 0
    and a = 1 at the start: `road_1` has one angle and one scale a pair, `road_2` one of each an output, `road_4` two.
    Trainable parameters: out, 2 out or 4 out for each layer. As cheap as IA3, and mixes channels; linear layers with an
    even number of outputs. Merges without a trace.

    Args:
        variant: How many angles and scales there are.
        group: Outputs within which pairs are formed, first half with second; a size that does not divide all layers'
            outputs is lowered to the next that does.
    """

    taxonomy: ClassVar[str] = "reparameterised"
    summary: ClassVar[str] = "turn and scale pairs of outputs"
    source: ClassVar[str] = "arXiv 2409.00119"

    variant: Literal["road_1", "road_2", "road_4"] = "road_1"
    group: int = 64

    def check(self) -> None:
        """See the base class."""
        at_least(2, "RoAd", group=self.group)

    def check_layers(self, layers: Mapping[str, nn.Module]) -> None:
        """See the base class."""
        odd = [name for name, layer in layers.items() if len(layer.get_parameter("weight")) % 2]
        if odd:
            raise GraftError(
                f"RoAd turns pairs of outputs, and '{odd[0]}' has an odd number of them. Choose other roles with 'on'."
            )

    def configure(self, target: str, shapes: Mapping[str, Shape]) -> tuple[PeftConfig, tuple[str, ...]]:
        """See the base class."""
        from peft import RoadConfig

        group = 2 * fitting(self.group // 2, (rows // 2 for rows, _ in shapes.values()))
        config = RoadConfig(variant=self.variant, group_size=group, target_modules=target)
        return config, say_fitted("Group size", self.group, group)
