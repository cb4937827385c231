"""Bottleneck adapters behind linear layers and convolutions, as a PEFT tuner (arXiv 1902.00751, 2005.00247)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from common.tuners._base import OwnConfig, OwnTuner, UnmergedLayer
from common.tuners._gate import TokenGate
from common.tuners._shared import ACTIVATIONS, Passage, check_activation, pointwise, zero

BOTTLENECK = "BOTTLENECK_ADAPTER"


@dataclass
class BottleneckConfig(OwnConfig):
    """Configuration of the tuner.

    Args:
        width: Width of the bottleneck; a layer with fewer outputs takes their number.
        scale: The factor s of what the bottleneck adds.
        activation: Its nonlinearity.
        input_gate: Scale what each example's bottleneck adds by a gate of its own (see `TokenGate`), behind linear
            layers alone.
    """

    own_type: ClassVar[str] = BOTTLENECK

    width: int = 64
    scale: float = 1.0
    activation: Literal["gelu", "relu"] = "gelu"
    input_gate: bool = False


class BottleneckLayer(UnmergedLayer):
    """y = h + s * up(act(down(h))) with h = f(x): f is any linear layer or convolution, transposed ones too.

    `down` and `up` see one position at a time, whatever the kernel of f, and both have biases; `up` starts at zero.
    With a gate it is y = h + g(h) s * up(act(down(h))), g one number an example; `passages` may say which tokens are
    padding.
    """

    where: ClassVar[str] = "behind"
    adapter_layer_names: tuple[str, ...] = ("badapter_down", "badapter_up", "badapter_gate")
    other_param_names: tuple[str, ...] = ("scaling", "activation", "passages")

    def build(self) -> None:
        """Make the containers."""
        self.badapter_down, self.badapter_up, self.badapter_gate = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        self.scaling: dict[str, float] = {}
        self.activation: dict[str, str] = {}
        self.passages: dict[str, Passage] = {}

    def start(self, adapter_name: str, config: BottleneckConfig, key: str) -> None:
        """Add the bottleneck."""
        base = self.get_base_layer()
        if not isinstance(base, (nn.Linear, _ConvNd)):
            raise TypeError(f"'{key}' ({type(base).__name__}) is no linear layer and no convolution.")
        check_activation(config.activation)
        outputs = base.out_features if isinstance(base, nn.Linear) else base.out_channels
        width = min(config.width, outputs)
        up = pointwise(base, width, outputs)
        zero(up)
        self.badapter_down[adapter_name], self.badapter_up[adapter_name] = pointwise(base, outputs, width), up
        self.scaling[adapter_name], self.activation[adapter_name] = config.scale, config.activation
        if config.input_gate:
            if not isinstance(base, nn.Linear):
                raise TypeError(
                    f"'{key}' ({type(base).__name__}) is no linear layer; a gate averages over tokens, which others "
                    "have not."
                )
            self.badapter_gate[adapter_name] = TokenGate(outputs, 1, base.weight)

    def adapted(self, adapter_name: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
        """Add the bottleneck's output to the layer's."""
        result = self.base_layer(x, *args, **kwargs)
        down, up = self.badapter_down[adapter_name], self.badapter_up[adapter_name]
        hidden = self._cast_input_dtype(result, down.get_parameter("weight").dtype)
        added = self.scaling[adapter_name] * up(ACTIVATIONS[self.activation[adapter_name]](down(hidden)))
        if adapter_name in self.badapter_gate:
            added = self.badapter_gate[adapter_name](hidden, self._seen(adapter_name)) * added
        return result + added.to(result.dtype)

    def _seen(self, adapter_name: str) -> Tensor | None:
        """Return which tokens are no padding, where the attention before this layer knows; None where nothing does."""
        if adapter_name not in self.passages:
            return None
        seen = self.passages[adapter_name].take()
        if seen is None:
            raise RuntimeError("A gated bottleneck ran without the attention of its block before it.")
        return seen


class BottleneckModel(OwnTuner):
    """The tuner that PEFT builds from a `BottleneckConfig`."""

    prefix: str = "badapter_"
    tuner_layer_cls = BottleneckLayer
