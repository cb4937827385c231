"""Trained keys and values that self-attention attends to, as a PEFT tuner (arXiv 2101.00190, 2303.16199).

The attention module runs as it is; where it calls torch's `scaled_dot_product_attention`, the keys and values are
added. So projections, rotary positions, masks, caches and drop-out are the module's own.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from common.errors import GraftError
from common.tuners._base import OwnConfig, OwnLayer, OwnTuner, like
from common.tuners._gate import TokenGate, seen_tokens
from common.tuners._shared import Passage

PREFIX = "PREFIX"

_START = 0.02  # standard deviation with which keys and values start


@dataclass
class PrefixConfig(OwnConfig):
    """Configuration of the tuner.

    Args:
        length: Number of keys and values.
        widths: Channels of all heads together, by the full name of the module.
        gate: Attend to them apart and add the result scaled by the tanh of a trained number that starts at zero.
        token_widths: Channels of the tokens that a module reads, by its full name, where a gate of each example's own
            scales keys and values (see `TokenGate`).
        mask: Name of the module's argument with its mask of the keys, by which such a gate knows padding; None where
            there is none.
    """

    own_type: ClassVar[str] = PREFIX

    length: int = 10
    widths: dict[str, int] = field(default_factory=dict)
    gate: bool = False
    token_widths: dict[str, int] = field(default_factory=dict)
    mask: str | None = None


class PrefixLayer(OwnLayer):
    """softmax(Q [P_K, K]^T s + [0, M]) [P_V, V] in place of softmax(Q K^T s + M) V, with P_K, P_V (length, channels).

    Q, K, V, the scale s and the mask or bias M are what the module hands to torch's attention. With a gate g it is
    softmax(Q K^T s + M) V + tanh(g) softmax(Q P_K^T s) P_V.

    With a gate of the tokens, each example attends to c P_K and c P_V, c one number of what the module reads, its first
    argument. `passage` holds which of the tokens are no padding, for other gates in the block.
    """

    adapter_layer_names: tuple[str, ...] = ("kvprefix_keys", "kvprefix_values", "kvprefix_gate", "kvprefix_input_gate")
    other_param_names: tuple[str, ...] = ("mask",)

    def build(self) -> None:
        """Make the containers."""
        self.kvprefix_keys, self.kvprefix_values = nn.ParameterDict(), nn.ParameterDict()
        self.kvprefix_gate, self.kvprefix_input_gate = nn.ParameterDict(), nn.ModuleDict()
        self.mask: dict[str, str | None] = {}
        self.passage = Passage()
        self._arguments = tuple(inspect.signature(self.get_base_layer().forward).parameters)

    def start(self, adapter_name: str, config: PrefixConfig, key: str) -> None:
        """Add keys and values, drawn near zero, and the gate at zero."""
        weight = next(self.get_base_layer().parameters())
        kind = like(weight)
        for part in (self.kvprefix_keys, self.kvprefix_values):
            part[adapter_name] = nn.Parameter(
                torch.empty(config.length, config.widths[key], **kind).normal_(std=_START)
            )
        if config.gate:
            self.kvprefix_gate[adapter_name] = nn.Parameter(torch.zeros(1, **kind))
        if config.token_widths:
            self.kvprefix_input_gate[adapter_name] = TokenGate(config.token_widths[key], 1, weight)
        self.mask[adapter_name] = config.mask

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Run the attention with the active adapter; arguments and results are the module's own."""
        adapter = self.in_use()
        return self.base_layer(*args, **kwargs) if adapter is None else self.adapted(adapter, *args, **kwargs)

    def keys_values(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """Return keys and values, (length, channels) each."""
        return self.kvprefix_keys[adapter_name], self.kvprefix_values[adapter_name]

    def adapted(self, adapter_name: str, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Run the attention with further keys and values."""
        gate = self.kvprefix_gate[adapter_name] if adapter_name in self.kvprefix_gate else None
        share = self._share(adapter_name, *args, **kwargs) if adapter_name in self.kvprefix_input_gate else None
        with _Attending(*self.keys_values(adapter_name), gate, share) as attending:
            out = self.base_layer(*args, **kwargs)
        if attending.calls != 1:
            raise GraftError(
                f"{type(self.get_base_layer()).__name__} calls torch's scaled_dot_product_attention "
                f"{attending.calls} times, and keys and values can be added where it is called once. Build the network "
                "with the attention 'sdpa', or choose another method."
            )
        return out

    def _share(self, adapter_name: str, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
        """Return by how much each example's keys and values are scaled, (B,), and leave which tokens are no padding."""
        given = dict(zip(self._arguments, args, strict=False)) | kwargs
        tokens: Tensor = given[self._arguments[0]]
        mask = self.mask[adapter_name]
        seen = seen_tokens(tokens, None if mask is None else given.get(mask))
        self.passage.leave(seen)
        return self.kvprefix_input_gate[adapter_name](tokens, seen).flatten()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        """Refuse: a key is no change of a weight."""
        raise NotImplementedError(
            "its keys and values stand beside the network's own and are no change of their weights; use the adapter as "
            "it is"
        )

    def unmerge(self) -> None:
        """Do nothing: it is never merged."""


class _Attending(TorchFunctionMode):
    """Adds keys and values (length, channels) to each call of torch's attention, and counts the calls.

    With `share` (B,) each example gets that share of them.
    """

    def __init__(self, keys: Tensor, values: Tensor, gate: Tensor | None, share: Tensor | None) -> None:
        super().__init__()
        self.keys, self.values, self.gate, self.share = keys, values, gate, share
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        return self._attend(*args, **(kwargs or {}))

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **how: Any,  # noqa: ANN401
    ) -> Tensor:
        """Attend; the arguments are torch's, query (B, H, Q, D), key and value (B, H, K, D)."""
        keys, values = (_heads(own, to) for own, to in ((self.keys, key), (self.values, value)))
        if self.share is not None:
            share = self.share.to(key.dtype).view(-1, *(1,) * (key.ndim - 1))
            keys, values = share * keys, share * values
        attend = functional.scaled_dot_product_attention
        if self.gate is not None:
            base = attend(query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, **how)
            return base + self.gate.tanh().to(base.dtype) * attend(query, keys, values, dropout_p=dropout_p, **how)
        if is_causal:
            attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=key.device).tril()
        if attn_mask is not None:
            seen = 0.0 if attn_mask.is_floating_point() else 1
            attn_mask = functional.pad(attn_mask, (len(self.keys), 0), value=seen)
        keys, values = torch.cat((keys, key), dim=-2), torch.cat((values, value), dim=-2)
        return attend(query, keys, values, attn_mask=attn_mask, dropout_p=dropout_p, **how)


def _heads(own: Tensor, to: Tensor) -> Tensor:
    """Bring (length, channels) into the shape (B, H, length, D) of keys or values (B, H, K, D), or without the H."""
    batch, *heads, _, size = to.shape
    own = own.to(to.dtype).view(len(own), *heads, size).movedim(0, -2)
    return own.expand(batch, *own.shape)


class PrefixModel(OwnTuner):
    """The tuner that PEFT builds from a `PrefixConfig`."""

    prefix: str = "kvprefix_"
    tuner_layer_cls = PrefixLayer
