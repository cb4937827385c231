"""Bottlenecks beside a whole sub-layer of a block, as a PEFT tuner.

Parallel adapters (arXiv 2110.04366), AdaptFormer (arXiv 2205.13535) and Convpass (arXiv 2207.07039). An attention or a
feed-forward network is rarely a module of its own whose input and output are its only ones, so the tuner wraps two
layers: the one that reads the sub-layer's input, which passes it on unseen, and the one that puts out its result, where
the bottleneck stands.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from peft import PeftConfig
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from common.tuners._base import OwnConfig, OwnTuner, UnmergedLayer, like
from common.tuners._shared import (
    ACTIVATIONS,
    Passage,
    centre_identity,
    check_activation,
    join_grid,
    pointwise,
    split_grid,
    zero,
)

PARALLEL_ADAPTER = "PARALLEL_ADAPTER"


@dataclass
class ParallelConfig(OwnConfig):
    """Configuration of the tuner.

    Args:
        pairs: Name of the layer that puts out a sub-layer's result to the name of the one that reads its input.
        width: Width of the bottleneck.
        scale: The factor s of what it adds.
        activation: Its nonlinearity.
        grids: With a convolution over the tokens' grid: name of the layer that puts out to [prefix tokens, positions
            along each axis ...]; zeros where the tokens keep these axes, as a convolution's do.
    """

    own_type: ClassVar[str] = PARALLEL_ADAPTER

    pairs: dict[str, str] = field(default_factory=dict)
    width: int = 64
    scale: float = 1.0
    activation: Literal["gelu", "relu"] = "relu"
    grids: dict[str, list[int]] | None = None


class PairedLayer(UnmergedLayer):
    """One of the two layers at whose ends a bottleneck stands."""


class InputTap(PairedLayer):
    """The layer that reads the sub-layer's input; it computes as ever, and leaves the input in `passage`."""

    adapter_layer_names: tuple[str, ...] = ("padapter_tap",)

    def build(self) -> None:
        """Make the containers."""
        self.padapter_tap = nn.ModuleDict()
        self.passage = Passage()

    def start(self, adapter_name: str, config: ParallelConfig, key: str) -> None:
        """Note that this adapter reads here."""
        self.padapter_tap[adapter_name] = nn.Identity()

    def adapted(self, adapter_name: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
        """Leave the input and compute the layer."""
        self.passage.leave(x)
        return self.base_layer(x, *args, **kwargs)


class ParallelLayer(PairedLayer):
    """y = f(x) + s * up(act(down(x))): f the sub-layer that ends in this layer, x its input.

    Between `down` and `up` there may be a convolution over the grid of tokens and a second activation; prefix tokens
    are images of one position to it.
    """

    adapter_layer_names: tuple[str, ...] = ("padapter_down", "padapter_conv", "padapter_up")
    other_param_names: tuple[str, ...] = ("scaling", "activation", "passages", "grids")

    def build(self) -> None:
        """Make the containers."""
        self.padapter_down, self.padapter_conv, self.padapter_up = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        self.scaling: dict[str, float] = {}
        self.activation: dict[str, str] = {}
        self.passages: dict[str, Passage] = {}
        self.grids: dict[str, list[int]] = {}

    def start(self, adapter_name: str, config: ParallelConfig, key: str) -> None:
        """Wait for `connect`, which knows the other layer."""

    def connect(self, adapter_name: str, config: ParallelConfig, key: str, tap: nn.Module) -> None:
        """Add the bottleneck from the other layer's input to this one's output."""
        base: Any = self.get_base_layer()
        if not isinstance(tap, InputTap):
            raise TypeError(f"'{config.pairs[key]}' ends another sub-layer, so it cannot pass its input on to '{key}'.")
        reads: Any = tap.get_base_layer()
        if not parallel_fits(reads, base):
            raise TypeError(
                f"'{config.pairs[key]}' ({type(reads).__name__}) and '{key}' ({type(base).__name__}) are no two linear "
                "layers and no two convolutions of kernel and stride 1, so a bottleneck cannot lead from one's input "
                "to the other's output."
            )
        check_activation(config.activation)
        inputs, outputs = reads.weight.shape[1], base.weight.shape[0]
        self.padapter_down[adapter_name] = pointwise(reads, inputs, config.width)
        if config.grids is not None:
            self.grids[adapter_name] = config.grids[key]
            self.padapter_conv[adapter_name] = _convolution(base, config.width, len(config.grids[key]) - 1)
        up = pointwise(base, config.width, outputs)
        zero(up)
        self.padapter_up[adapter_name] = up
        self.scaling[adapter_name], self.activation[adapter_name] = config.scale, config.activation
        self.passages[adapter_name] = tap.passage
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def adapted(self, adapter_name: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
        """Add the bottleneck's output to the layer's."""
        result = self.base_layer(x, *args, **kwargs)
        read = self.passages[adapter_name].take()
        if read is None:
            raise RuntimeError("A parallel adapter's sub-layer ran without the layer that reads its input.")
        act = ACTIVATIONS[self.activation[adapter_name]]
        down, up = self.padapter_down[adapter_name], self.padapter_up[adapter_name]
        narrow = act(down(self._cast_input_dtype(read, down.get_parameter("weight").dtype)))
        if adapter_name in self.grids:
            narrow = act(self._over_grid(adapter_name, narrow))
        added = self.scaling[adapter_name] * up(narrow)
        if added.shape != result.shape:
            raise ValueError(
                f"A sub-layer reads {tuple(read.shape)} and puts out {tuple(result.shape)}; a parallel adapter needs "
                "the same positions on both sides."
            )
        return result + added.to(result.dtype)

    def _over_grid(self, adapter_name: str, narrow: Tensor) -> Tensor:
        """Run the convolution over the tokens (B, N, w), (B, *grid, w) or, of a convolution, (B, w, *grid)."""
        conv, grid = self.padapter_conv[adapter_name], self.grids[adapter_name]
        if isinstance(self.get_base_layer(), _ConvNd):
            return conv(narrow)
        first, maps = split_grid(narrow, grid)
        if first.shape[1]:
            alone = conv(first.flatten(0, 1)[(..., *(None,) * (len(grid) - 1))])  # (B * prefix, w, 1, ...)
            first = alone.flatten(1).view_as(first)
        return join_grid(first, conv(maps), grid)


def parallel_fits(reads: nn.Module, base: nn.Module) -> bool:
    """Whether a map at each position can lead from the first layer's input to the second's output."""
    if isinstance(reads, nn.Linear) and isinstance(base, nn.Linear):
        return True
    both = (reads, base)
    return all(isinstance(m, _ConvNd) and not m.transposed for m in both) and all(
        {*m.kernel_size, *m.stride, m.groups} == {1} for m in both if isinstance(m, _ConvNd)
    )


def _convolution(base: nn.Linear | _ConvNd, width: int, axes: int) -> nn.Module:
    """Return a convolution over the grid that starts as the identity, as in the paper."""
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
    conv = kind(width, width, 3, padding=1, **like(base.weight))
    zero(conv)
    centre_identity(conv.weight, axes)
    return conv


class ParallelModel(OwnTuner):
    """The tuner that PEFT builds from a `ParallelConfig`."""

    prefix: str = "padapter_"
    tuner_layer_cls = PairedLayer

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        config: Any = peft_config
        puts_out = current_key in config.pairs
        if isinstance(target, PairedLayer):
            layer = target
            layer.update_layer(adapter_name, config, current_key)
        else:
            layer = (ParallelLayer if puts_out else InputTap)(target, adapter_name, config, current_key)
            self._replace_module(parent, target_name, layer, target)
        if puts_out:
            if not isinstance(layer, ParallelLayer):
                raise TypeError(f"'{current_key}' ends one sub-layer and begins another; a layer can do one of them.")
            layer.connect(adapter_name, config, current_key, self._tap(adapter_name, config, config.pairs[current_key]))
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)

    def _tap(self, adapter_name: str, config: ParallelConfig, key: str) -> nn.Module:
        """Return the layer that reads a sub-layer's input; a model may define it behind the one that puts out."""
        layer = self.model.get_submodule(key)
        if not isinstance(layer, PairedLayer):
            parent, _, name = key.rpartition(".")
            tap = InputTap(layer, adapter_name, config, key)
            self._replace_module(self.model.get_submodule(parent), name, tap, layer)
            return tap
        if isinstance(layer, InputTap) and adapter_name not in layer.padapter_tap:
            layer.update_layer(adapter_name, config, key)
        return layer
