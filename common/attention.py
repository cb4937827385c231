"""torch's `nn.MultiheadAttention` as modules that an adapter can act on.

`nn.MultiheadAttention` keeps the projections of queries, keys and values in one bare weight and hands it, with that of
`out_proj`, to a function: whatever is attached to a layer inside is never called. `open_attention` exchanges it for an
`OpenAttention` of the same result, whose four projections are linear layers.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.errors import GraftError


class OpenAttention(nn.Module):
    """Multi-head attention (Vaswani et al., 2017, arXiv 1706.03762) with the arguments and result of torch's.

    Attributes:
        q_proj, k_proj, v_proj, out_proj: The projections, `nn.Linear`.
        embed_dim, num_heads, head_dim, dropout, batch_first: As in `nn.MultiheadAttention`.
    """

    # torch's transformer layers ask for these before they run a kernel of their own, past every module; so they do not.
    in_proj_bias = None
    _qkv_same_embed_dim = False

    def __init__(self, torch_attention: nn.MultiheadAttention) -> None:
        """Take over the weights of one.

        Raises:
            GraftError: It adds keys and values of its own (`add_bias_kv`, `add_zero_attn`).
        """
        super().__init__()
        source = torch_attention
        if source.bias_k is not None or source.add_zero_attn:
            raise GraftError(
                "An nn.MultiheadAttention with add_bias_kv or add_zero_attn cannot be opened for adapters. "
                "Build the network without them, or choose layers outside its attention."
            )
        self.embed_dim, self.num_heads, self.head_dim = source.embed_dim, source.num_heads, source.head_dim
        self.dropout, self.batch_first = source.dropout, source.batch_first
        if source.in_proj_weight is not None:
            weights = source.in_proj_weight.chunk(3)
        else:
            weights = [cast(Tensor, w) for w in (source.q_proj_weight, source.k_proj_weight, source.v_proj_weight)]
        biases = [None] * 3 if source.in_proj_bias is None else source.in_proj_bias.chunk(3)
        self.q_proj, self.k_proj, self.v_proj = (
            _linear(weight, bias) for weight, bias in zip(weights, biases, strict=True)
        )
        self.out_proj = _linear(source.out_proj.weight, source.out_proj.bias)
        self.train(source.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from queries to keys.

        Args:
            query: (T, B, C), (B, T, C) with `batch_first`, or (T, C).
            key: (S, B, K), (B, S, K) or (S, K).
            value: As `key`, of its own width.
            key_padding_mask: (B, S) or (S), True where a key is padding; numbers are added to the scores.
            need_weights: Also return the attention weights.
            attn_mask: (T, S) or (B * heads, T, S), True where a query must not see a key; numbers are added.
            average_attn_weights: Return the mean of the heads' weights, not each.
            is_causal: A hint that `attn_mask` is causal; the mask is what counts, as in torch.

        Returns:
            As `query`; and the weights (B, T, S) or (B, heads, T, S), without B where there is none, or None.

        Raises:
            ValueError: `is_causal` without a mask.
        """
        if is_causal and attn_mask is None:
            raise ValueError("is_causal is a hint about attn_mask: give the mask too")
        single = query.dim() == 2
        swap = not single and not self.batch_first
        sides = [x[None] if single else x.transpose(0, 1) if swap else x for x in (query, key, value)]
        batch, steps, _ = sides[0].shape
        layers = (self.q_proj, self.k_proj, self.v_proj)
        heads = [
            layer(x).view(batch, -1, self.num_heads, self.head_dim).transpose(1, 2)  # (B, H, T or S, D)
            for layer, x in zip(layers, sides, strict=True)
        ]
        mask = self._mask(attn_mask, key_padding_mask, batch, heads[0])
        drop = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = heads[0] @ heads[1].transpose(-1, -2) / math.sqrt(self.head_dim)
            weights = functional.dropout((scores if mask is None else scores + mask).softmax(-1), drop)
            mixed = weights @ heads[2]
        else:
            mixed = functional.scaled_dot_product_attention(*heads, attn_mask=mask, dropout_p=drop)
        out = self.out_proj(mixed.transpose(1, 2).reshape(batch, steps, self.embed_dim))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if single:
            return out[0], None if weights is None else weights[0]
        return out.transpose(0, 1) if swap else out, weights

    def _mask(self, attn: Tensor | None, padding: Tensor | None, batch: int, like: Tensor) -> Tensor | None:
        """Join both masks into what is added to the scores, (B or 1, H or 1, T or 1, S)."""
        parts = []
        if attn is not None:
            attn = _added(attn, like)
            parts.append(attn[None, None] if attn.dim() == 2 else attn.view(batch, self.num_heads, *attn.shape[1:]))
        if padding is not None:
            parts.append(_added(padding, like).view(batch, 1, 1, -1))
        return sum(parts[1:], parts[0]) if parts else None


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    with torch.no_grad():
        layer = nn.Linear(
            weight.shape[1], weight.shape[0], bias=bias is not None, device=weight.device, dtype=weight.dtype
        )
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer.requires_grad_(weight.requires_grad)


def _added(mask: Tensor, like: Tensor) -> Tensor:
    """Return a mask as numbers to add to scores."""
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill(mask, -math.inf)


def open_attention(model: nn.Module) -> list[str]:
    """Exchange every `nn.MultiheadAttention` in a model, in place; what it computes stays.

    The names of the weights change (`in_proj_weight` becomes `q_proj.weight` and so on), so load a checkpoint first.

    Returns:
        The names of the modules that were exchanged.

    Raises:
        GraftError: One of them cannot be opened (see `OpenAttention`); then none is.
    """
    found = {name: module for name, module in model.named_modules() if type(module) is nn.MultiheadAttention}
    opened = {name: OpenAttention(module) for name, module in found.items()}
    for name, module in opened.items():
        model.set_submodule(name, module)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and opened:
            module.use_nested_tensor = False  # it would take `in_proj_weight` for its own kernel
    return list(opened)
