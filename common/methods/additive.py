"""Additive methods: small new modules beside and behind frozen ones, and learned scales of what they compute."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from common.errors import GraftError
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
