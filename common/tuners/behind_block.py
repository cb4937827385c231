"""Edits of the hidden state behind whole blocks, as PEFT tuners.

Adapter+ (arXiv 2406.06820) and representation fine-tuning (ReFT, arXiv 2404.03592) act on what a block hands to the
next one, behind its last skip connection, so the tuner wraps the block. A block may put out the hidden state (..., C)
alone, or first in a tuple.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.errors import GraftError
from common.tuners._base import Like, OwnConfig, OwnTuner, UnmergedLayer
from common.tuners._shared import zero

POST_ADAPTER = "POST_ADAPTER"
REFT = "REFT"


@dataclass
class BlockConfig(OwnConfig):
    """What the configurations of these tuners share.

    Args:
        channels: Name of the block to the channels C of its hidden state.
        width: Width of the bottleneck, or rank of the edited subspace.
    """

    channels: dict[str, int] = field(default_factory=dict)
    width: int = 8


class BlockLayer(UnmergedLayer):
    """A block whose hidden state is changed; a subclass computes the change in `change`."""

    where: ClassVar[str] = "behind"

    def change(self, adapter_name: str, hidden: Tensor) -> Tensor:
        """Compute what to add to the hidden state (..., C), in the adapter's own precision."""
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  (blocks of any library)
        """Run the block with the active adapter; inputs and outputs are the block's own."""
        acting = self.in_use()
        return self.base_layer(*args, **kwargs) if acting is None else self.adapted(acting, *args, **kwargs)

    def adapted(self, adapter_name: str, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Change the hidden state in the block's output."""
        output = self.base_layer(*args, **kwargs)
        hidden = hidden_state(output)
        changed = hidden + self.change(adapter_name, hidden.to(self.dtype_of(adapter_name))).to(hidden.dtype)
        return with_hidden_state(output, changed)

    def dtype_of(self, adapter_name: str) -> torch.dtype:
        """Return the type in which an adapter computes."""
        containers = (getattr(self, name) for name in self.adapter_layer_names)
        held = next(container[adapter_name] for container in containers if adapter_name in container)
        return held.dtype if isinstance(held, Tensor) else next(held.parameters()).dtype

    def like_block(self) -> Like:
        """Return device and type of an adapter of this block."""
        first = next(self.get_base_layer().parameters())
        return {"dtype": torch.promote_types(first.dtype, torch.float32), "device": first.device}


def hidden_state(output: Any) -> Tensor:  # noqa: ANN401
    """Return the hidden state that a block put out, alone or first in a tuple or list."""
    hidden = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(hidden, Tensor):
        raise TypeError(f"A block puts out {type(output).__name__}, not a tensor or a tuple that begins with one.")
    return hidden


def with_hidden_state(output: Any, hidden: Tensor) -> Any:  # noqa: ANN401
    """Return a block's output with another hidden state in it."""
    if isinstance(output, Tensor):
        return hidden
    return (hidden, *output[1:]) if isinstance(output, tuple) else [hidden, *output[1:]]


@dataclass
class PostAdapterConfig(BlockConfig):
    """Configuration of Adapter+."""

    own_type: ClassVar[str] = POST_ADAPTER


class PostAdapterLayer(BlockLayer):
    """h + g * up(gelu(down(h))): h the block's hidden state, g one number a channel, one at the start; `up` is zero."""

    adapter_layer_names: tuple[str, ...] = ("postadapter_down", "postadapter_up", "postadapter_scale")

    def build(self) -> None:
        """Make the containers."""
        self.postadapter_down, self.postadapter_up = nn.ModuleDict(), nn.ModuleDict()
        self.postadapter_scale = nn.ParameterDict()

    def start(self, adapter_name: str, config: PostAdapterConfig, key: str) -> None:
        """Add the bottleneck."""
        channels, options = config.channels[key], self.like_block()
        down, up = nn.Linear(channels, config.width, **options), nn.Linear(config.width, channels, **options)
        zero(down)
        nn.init.trunc_normal_(down.weight, std=0.01, a=-0.02, b=0.02)
        zero(up)
        self.postadapter_down[adapter_name], self.postadapter_up[adapter_name] = down, up
        self.postadapter_scale[adapter_name] = nn.Parameter(torch.ones(channels, **options))

    def change(self, adapter_name: str, hidden: Tensor) -> Tensor:
        """Compute the bottleneck's output, scaled by channel."""
        narrow = functional.gelu(self.postadapter_down[adapter_name](hidden))
        return self.postadapter_scale[adapter_name] * self.postadapter_up[adapter_name](narrow)


class PostAdapterModel(OwnTuner):
    """The tuner that PEFT builds from a `PostAdapterConfig`."""

    prefix: str = "postadapter_"
    tuner_layer_cls = PostAdapterLayer


@dataclass
class ReftConfig(BlockConfig):
    """Configuration of representation fine-tuning.

    Args:
        kind: `loreft` edits in an orthonormal subspace, `noreft` in any, `direft` adds without taking away.
        first: Edit the first tokens only, so many; None edits all.
    """

    own_type: ClassVar[str] = REFT

    kind: Literal["loreft", "noreft", "direft"] = "loreft"
    first: int | None = None


class ReftLayer(BlockLayer):
    """h + R^T (W h + b - R h), or h + R^T (W h + b) with `direft`; R and W (r, C), of each token h.

    With `loreft` R is the orthonormal factor of a free (C, r) matrix whose triangular one has a positive diagonal. At
    the start W is R, or 0 with `direft`, and b is 0, so that nothing changes.
    """

    adapter_layer_names: tuple[str, ...] = ("reft_subspace", "reft_source", "reft_bias")
    other_param_names: tuple[str, ...] = ("kind", "first")

    def build(self) -> None:
        """Make the containers."""
        self.reft_subspace, self.reft_source = nn.ParameterDict(), nn.ParameterDict()
        self.reft_bias = nn.ParameterDict()
        self.kind: dict[str, str] = {}
        self.first: dict[str, int | None] = {}

    def start(self, adapter_name: str, config: ReftConfig, key: str) -> None:
        """Add the subspace and what it is to hold."""
        channels, options = config.channels[key], self.like_block()
        if config.kind not in ("loreft", "noreft", "direft"):
            raise ValueError(f"The kind is '{config.kind}'; give loreft, noreft or direft.")
        self.kind[adapter_name], self.first[adapter_name] = config.kind, config.first
        free = torch.empty(channels, config.width, **options)
        nn.init.orthogonal_(free)
        self.reft_subspace[adapter_name] = nn.Parameter(free)
        with torch.no_grad():
            basis = self.basis(adapter_name)
        source = torch.zeros_like(basis) if config.kind == "direft" else basis.clone()
        self.reft_source[adapter_name] = nn.Parameter(source)
        self.reft_bias[adapter_name] = nn.Parameter(torch.zeros(config.width, **options))

    def basis(self, adapter_name: str) -> Tensor:
        """Return R, (r, C)."""
        free = self.reft_subspace[adapter_name]
        if self.kind[adapter_name] != "loreft":
            return free.mT
        with torch.autocast(free.device.type, enabled=False):
            factors = torch.linalg.qr(free)
            # A library may choose a column's sign; a positive diagonal leaves it no choice, so that an adapter reloads.
            signs = torch.where(factors.R.diagonal() < 0, -1.0, 1.0).to(free.dtype)
            return (factors.Q * signs).mT

    def change(self, adapter_name: str, hidden: Tensor) -> Tensor:
        """Compute the edit; tokens that stay get zero."""
        basis = self.basis(adapter_name)
        source = self.reft_source[adapter_name]
        source = source if self.kind[adapter_name] == "direft" else source - basis
        first = self.first[adapter_name]
        if first is not None and hidden.ndim != 3:
            raise GraftError(
                f"'first: {first}' counts tokens of a sequence (B, N, C), and this backbone's blocks hand on "
                f"{tuple(hidden.shape)}. Leave 'first' out."
            )
        edited = hidden if first is None else hidden[:, :first]
        change = functional.linear(functional.linear(edited, source, self.reft_bias[adapter_name]), basis.mT)
        if first is None:
            return change
        return functional.pad(change, (0, 0, 0, hidden.shape[1] - change.shape[1]))


class ReftModel(OwnTuner):
    """The tuner that PEFT builds from a `ReftConfig`."""

    prefix: str = "reft_"
    tuner_layer_cls = ReftLayer
