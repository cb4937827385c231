"""WavLM's attention with its projections called as modules.

transformers' hands the bare weights of the projections to torch's fused function, past any adapter on them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from transformers.models.wavlm.modeling_wavlm import WavLMAttention


class CalledAttention(WavLMAttention):
    """`WavLMAttention` under the same names and of the same result, whose four projections are called as modules.

    With drop-out on, each head drops its own weights, as there.
    """

    def torch_multi_head_self_attention(
        self, hidden_states: Tensor, attention_mask: Tensor | None, gated_position_bias: Tensor
    ) -> tuple[Tensor, None]:
        """Attend from all features to all that are no padding.

        Args:
            hidden_states: (B, F, C).
            attention_mask: (B, F), 1 or True at speech; None where all is.
            gated_position_bias: (B * heads, F, F), added to the scores.

        Returns:
            (B, F, C), and no attention weights.
        """
        batch, frames, _ = hidden_states.shape
        shape = (batch, frames, self.num_heads, self.head_dim)
        layers: list[Any] = [self.q_proj, self.k_proj, self.v_proj]
        query, key, value = (layer(hidden_states).view(shape).transpose(1, 2) for layer in layers)  # (B, H, F, D)
        bias = gated_position_bias.view(batch, self.num_heads, frames, frames).to(query.dtype)
        if attention_mask is not None:
            bias = bias.masked_fill(attention_mask.ne(1)[:, None, None, :], float("-inf"))
        dropout = self.dropout if self.training else 0.0
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout)
        return self.out_proj(mixed.transpose(1, 2).reshape(batch, frames, self.embed_dim)), None


def call_projections(model: nn.Module) -> None:
    """Exchange the attention of every block; weights and names stay."""
    for module in model.modules():
        if type(module) is WavLMAttention:
            module.__class__ = CalledAttention
