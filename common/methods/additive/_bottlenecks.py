"""Bottlenecks at one layer: beside a convolution, or behind any layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from common.errors import GraftError
from common.methods._base import CONVOLUTIONS, OnModules, Plan, exact, listed, require_types

if TYPE_CHECKING:
    from torch import nn

    from common.roles import RoleMap


@dataclass(frozen=True, kw_only=True)
class ConvAdapter(OnModules):
    """Bottlenecks of convolutions beside the frozen ones (Conv-Adapter; Chen et al. 2022, arXiv 2208.07463).

    y = f(x) + a * U gelu(D x): f the frozen convolution; D of its own kernel, stride, padding and dilation (transposed
    where f is), from C inputs to w = max(1, C // reduction) channels in g = gcd(C, w) groups; U pointwise, zero at the
    start; a one number an output channel. Trainable parameters for each layer with O outputs: w C / g times the kernel
    positions, + O w + O. For convolutional networks, where the adapter should see a neighbourhood; with its
    nonlinearity it cannot be merged, so it costs time and memory in use too.

    Args:
        on: Roles of convolutions.
        target_modules: Exact module names instead of roles.
        reduction: By how much the bottleneck is narrower than the layer's input.
    """

    taxonomy: ClassVar[str] = "additive"
    summary: ClassVar[str] = "a convolutional bottleneck beside each convolution"
    source: ClassVar[str] = "arXiv 2208.07463"

    on: list[str] = field(default_factory=lambda: ["conv"])
    reduction: int = 4

    def plan(self, model: nn.Module, roles: RoleMap | None) -> Plan:
        """Take convolutions; see the base class."""
        from common.tuners import ConvAdapterConfig

        if self.reduction < 1:
            raise GraftError(f"ConvAdapter reduction is {self.reduction}; give a whole number of at least 1.")
        targets = self.select(model, roles)
        require_types("ConvAdapter", model, targets, CONVOLUTIONS)
        config = ConvAdapterConfig(target_modules=exact(list(targets)), reduction=self.reduction)
        return Plan(peft_config=config, targets=targets)


@dataclass(frozen=True, kw_only=True)
class _Bottleneck(OnModules):
    activation: ClassVar[Literal["gelu", "relu"]]
    sized_by: ClassVar[str] = "width"

    width: int = 64
    scale: float = 1.0

    def plan(self, model: nn.Module, roles: RoleMap | None) -> Plan:
        """Take Linear and convolution layers; see the base class."""
        from common.tuners import BottleneckConfig, matrix_shape

        name = type(self).__name__
        if self.width < 1:
            raise GraftError(f"{name} width is {self.width}; give a whole number of at least 1.")
        targets = self.select(model, roles)
        require_types(name, model, targets, ("Linear", *CONVOLUTIONS))
        outputs = {target: matrix_shape(model.get_submodule(target))[0] for target in targets}
        lowered = [f"{target} ({size})" for target, size in outputs.items() if size < self.width]
        note = f"Width {self.width} is lowered to the layer's outputs in {len(lowered)} layers: {listed(lowered)}."
        config = BottleneckConfig(
            target_modules=exact(list(targets)), width=self.width, scale=self.scale, activation=self.activation
        )
        return Plan(peft_config=config, targets=targets, notes=(note,) if lowered else ())


@dataclass(frozen=True, kw_only=True)
class Houlsby(_Bottleneck):
    """Bottleneck adapters behind attention and feed-forward network (Houlsby et al. 2019, arXiv 1902.00751).

    h + s * (U gelu(D h + b) + c), h the output (d channels) of a block's attention or feed-forward network before the
    skip connection adds to it: D of shape (w, d) and U of shape (d, w) with biases b and c, U = 0 and c = 0 at the
    start. On a convolution D and U act on its output channels at each position. Trainable parameters: 2 w d + w + d for
    each adapted layer; a width above a layer's own d is lowered to it. The paper trains the norms too; here they stay
    frozen. For transformers, as the nonlinear counterpart of LoRA; with its nonlinearity it cannot be merged, so it
    costs time and memory in use too.

    Args:
        on: Roles of the layers behind which an adapter stands.
        target_modules: Exact module names instead of roles.
        width: Width w of the bottleneck.
        scale: The factor s.
    """

    taxonomy: ClassVar[str] = "additive"
    summary: ClassVar[str] = "a bottleneck behind each attention and feed-forward network"
    source: ClassVar[str] = "arXiv 1902.00751"
    activation: ClassVar[Literal["gelu", "relu"]] = "gelu"

    on: list[str] = field(default_factory=lambda: ["attention_out", "ffn_out"])


@dataclass(frozen=True, kw_only=True)
class Pfeiffer(_Bottleneck):
    """Bottleneck adapters behind the feed-forward networks alone (Pfeiffer et al. 2020, arXiv 2005.00247).

    As `Houlsby`, with one adapter a block, h + s * (U relu(D h + b) + c), h the output (d channels) of the feed-forward
    network before the skip connection adds to it. Trainable parameters: 2 w d + w + d for each adapted layer; a width
    above a layer's own d is lowered to it. About half of Houlsby's parameters and time at the same width; cannot be
    merged either.

    Args:
        on: Roles of the layers behind which an adapter stands.
        target_modules: Exact module names instead of roles.
        width: Width w of the bottleneck; the paper's sixteenth of 768 channels is 48.
        scale: The factor s.
    """

    taxonomy: ClassVar[str] = "additive"
    summary: ClassVar[str] = "a bottleneck behind each feed-forward network"
    source: ClassVar[str] = "arXiv 2005.00247"
    activation: ClassVar[Literal["gelu", "relu"]] = "relu"

    on: list[str] = field(default_factory=lambda: ["ffn_out"])
    width: int = 48


@dataclass(frozen=True, kw_only=True)
class Compacter(OnModules):
    """Bottlenecks of Kronecker products with a shared factor (Mahabadi et al. 2021, arXiv 2106.04647).

    h + s * (U gelu(D h + b) + c) as in `Houlsby`, h the output (d channels) of a block's attention or feed-forward
    network before the skip connection adds to it, with D = sum_i A_i (x) (S_i T_i) over n Kronecker products and U
    likewise: the A_i, (n, n) each, are shared by D and U of all layers, S_i and T_i are a layer's own, of rank r:
    (w / n, r) and (r, d / n) for D, (d / n, r) and (r, w / n) for U. U's T_i and the biases are 0 at the start.
    Trainable parameters: 2 r (w + d) + w + d for each layer, n^3 once; at a width of 24 a sixteenth of Houlsby's.
    Defaults of the paper: n = 4, r = 1, w = 24 at d = 768. n is lowered to what divides all layers' outputs, w to a
    multiple of n within them. For few parameters at Houlsby's places; cannot be merged.

    Args:
        on: Roles of the layers behind which an adapter stands.
        target_modules: Exact module names instead of roles.
        width: Width w of the bottleneck.
        division: Number n of Kronecker products.
        rank: Rank r of a layer's own factors.
        scale: The factor s.
    """

    taxonomy: ClassVar[str] = "additive"
    summary: ClassVar[str] = "bottlenecks of Kronecker products that share a factor"
    source: ClassVar[str] = "arXiv 2106.04647"

    on: list[str] = field(default_factory=lambda: ["attention_out", "ffn_out"])
    width: int = 24
    division: int = 4
    rank: int = 1
    scale: float = 1.0

    def plan(self, model: nn.Module, roles: RoleMap | None) -> Plan:
        """Take Linear and convolution layers; see the base class."""
        from common.tuners import CompacterConfig, matrix_shape

        _at_least_one("Compacter", width=self.width, division=self.division, rank=self.rank)
        targets = self.select(model, roles)
        require_types("Compacter", model, targets, ("Linear", *CONVOLUTIONS))
        outputs = [matrix_shape(model.get_submodule(target))[0] for target in targets]
        division = next(n for n in range(self.division, 0, -1) if not any(size % n for size in (*outputs,)))
        width = max(division, min(self.width, *outputs) // division * division)
        notes = [f"Division {self.division} is lowered to {division}, which divides all layers' outputs."]
        notes = notes if division < self.division else []
        if width != self.width:
            notes.append(f"Width {self.width} is taken as {width}, a multiple of {division} within all outputs.")
        config = CompacterConfig(
            target_modules=exact(list(targets)), width=width, division=division, rank=self.rank, scale=self.scale
        )
        return Plan(peft_config=config, targets=targets, notes=tuple(notes))


@dataclass(frozen=True, kw_only=True)
class InvertibleAdapter(OnModules):
    """Invertible adapters behind embeddings (MAD-X; Pfeiffer et al. 2020, arXiv 2005.00052).

    With h = f(x) (d channels) the output of an embedding, cut into halves h1 and h2: o1 = h1 + F(h2), o2 = h2 + G(o1),
    F and G bottlenecks U relu(D . + b) + c of width a = d / 2 // reduction, U = 0 and c = 0 at the start. Such a
    coupling can be inverted, and the paper puts the inverse before a language model's output layer; here the output
    layer is a head of its own, and only the forward map is used. Trainable parameters for each layer, with halves of p
    and q channels: of F q a + a + a p + p with a = max(1, q // reduction), of G the same with p and q exchanged.
    Reduction 2 as in the paper. For another alphabet or other kinds of input, usually beside adapters in the
    blocks; on images behind the patch embedding (`on: [stem]`). Cannot be merged.

    Args:
        on: Roles of embeddings or stems.
        target_modules: Exact module names instead of roles.
        reduction: By how much F and G are narrower than half of the channels.
    """

    taxonomy: ClassVar[str] = "additive"
    summary: ClassVar[str] = "an invertible coupling behind the embedding"
    source: ClassVar[str] = "arXiv 2005.00052"

    on: list[str] = field(default_factory=lambda: ["embed"])
    reduction: int = 2

    def plan(self, model: nn.Module, roles: RoleMap | None) -> Plan:
        """Take Embedding, Linear and convolution layers; see the base class."""
        from common.tuners import InvertibleConfig, halves

        _at_least_one("InvertibleAdapter", reduction=self.reduction)
        targets = self.select(model, roles)
        require_types("InvertibleAdapter", model, targets, ("Embedding", "Linear", *CONVOLUTIONS))
        single = [target for target in targets if not halves(model.get_submodule(target))[0]]
        if single:
            raise GraftError(
                f"InvertibleAdapter halves a layer's outputs, and {listed(single)} has one. Choose other roles with "
                "'on', or another method."
            )
        config = InvertibleConfig(target_modules=exact(list(targets)), reduction=self.reduction)
        return Plan(peft_config=config, targets=targets)


@dataclass(frozen=True, kw_only=True)
class RepAdapter(OnModules):
    """Linear bottlenecks before a layer that fold into its weight (Luo et al. 2023, arXiv 2302.08106).

    y = W (x + s (U (D x + b) + c)) + bias, which is (W + s W U D) x + W s (U b + c) + bias: D of shape (w, C), U of
    shape (C, w) in g groups, U, b and c 0 at the start, C the layer's inputs. Before a convolution it acts at each
    position. b and c are left out where the layer has no bias to fold them into, and before convolutions that see more
    than one position. Trainable parameters for each layer: w C + C w / g, + w + C with b and c. Defaults of the paper:
    before attention and feed-forward network, w = 8, g = 2, s of 0.1 to 10; its dropout, which no weight can hold, is
    left out. g is lowered to what divides each layer's inputs. For a linear change at no cost in use: merges to the
    bit.

    Args:
        on: Roles of the layers before which an adapter stands.
        target_modules: Exact module names instead of roles.
        width: Width w of the bottleneck, a multiple of the groups.
        groups: Groups g of U.
        scale: The factor s.
    """

    taxonomy: ClassVar[str] = "reparameterised"
    summary: ClassVar[str] = "a linear bottleneck before each layer, folded into its weight"
    source: ClassVar[str] = "arXiv 2302.08106"

    on: list[str] = field(default_factory=lambda: ["attention_qkv", "ffn_in"])
    width: int = 8
    groups: int = 2
    scale: float = 1.0

    def plan(self, model: nn.Module, roles: RoleMap | None) -> Plan:
        """Take Linear layers and convolutions of one group; see the base class."""
        from common.tuners import RepAdapterConfig

        _at_least_one("RepAdapter", width=self.width, groups=self.groups)
        targets = self.select(model, roles)
        require_types("RepAdapter", model, targets, ("Linear", *CONVOLUTIONS))
        layers = {target: model.get_submodule(target) for target in targets}
        grouped = [f"'{target}'" for target, layer in layers.items() if getattr(layer, "groups", 1) != 1]
        if grouped:
            raise GraftError(
                f"RepAdapter mixes all inputs of a layer, which a convolution in groups has no weights for: "
                f"{listed(grouped)}. Choose other roles with 'on', or another method."
            )
        if self.width % self.groups:
            raise GraftError(f"RepAdapter width {self.width} is no multiple of groups {self.groups}; choose others.")
        inputs = [_inputs(layer) for layer in layers.values()]
        groups = next(g for g in range(self.groups, 0, -1) if not any(size % g for size in (*inputs, self.width)))
        note = f"Groups {self.groups} are lowered to {groups}, which divides all layers' inputs."
        config = RepAdapterConfig(
            target_modules=exact(list(targets)), width=self.width, groups=groups, scale=self.scale
        )
        return Plan(peft_config=config, targets=targets, notes=(note,) if groups < self.groups else ())


def _inputs(layer: nn.Module) -> int:
    return int(getattr(layer, "in_features", 0) or getattr(layer, "in_channels", 0))


def _at_least_one(method: str, **settings: int) -> None:
    for name, value in settings.items():
        if value < 1:
            raise GraftError(f"{method} {name} is {value}; give a whole number of at least 1.")
