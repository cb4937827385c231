"""WavLM's attention with its projections called as modules.

transformers' and torchaudio's compute with the bare weights of the projections, past any adapter on them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torchaudio.models.wav2vec2.wavlm_attention import WavLMSelfAttention
from transformers.models.wavlm.modeling_wavlm import WavLMAttention

from common.attention import open_attention


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


class OpenSelfAttention(WavLMSelfAttention):
    """torchaudio's `WavLMSelfAttention` of the same result, around an `OpenAttention`."""

    def forward(
        self,
        query: Tensor,
        key_padding_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from all features to all.

        Args:
            query: (B, F, C).
            key_padding_mask: None, as nothing in torchaudio's WavLM gives one.
            attention_mask: None.
            position_bias: (B * heads or B, heads, F, F) of the first block, or None there.

        Returns:
            (B, F, C), and the position bias for the next block.
        """
        batch, frames, _ = query.shape
        if self.rel_attn_embed is not None and position_bias is None:
            position_bias = self.compute_bias(frames, frames).expand(batch, -1, -1, -1)
        scores = None
        if position_bias is not None:
            scores = position_bias.reshape(batch, self.num_heads, frames, frames)
            if self.gru_rel_pos:
                heads = query.view(batch, frames, self.num_heads, self.head_dim).transpose(1, 2)
                gates = self.gru_rel_pos_linear(heads).view(batch, self.num_heads, frames, 2, 4).sum(-1).sigmoid()
                update, reset = gates.split(1, dim=-1)  # (B, heads, F, 1)
                scores = (update * (reset * self.gru_rel_pos_const - 1.0) + 2.0) * scores
            scores = scores.flatten(0, 1)
        mixed, _ = self.attention(query, query, query, need_weights=False, attn_mask=scores)
        return mixed, position_bias


def open_torchaudio(model: nn.Module) -> None:
    """Exchange the attention of every block of torchaudio's WavLM; its weights must be loaded before."""
    open_attention(model)
    for module in model.modules():
        if type(module) is WavLMSelfAttention:
            module.__class__ = OpenSelfAttention


def call_projections(model: nn.Module) -> None:
    """Exchange the attention of every block; weights and names stay."""
    for module in model.modules():
        if type(module) is WavLMAttention:
            module.__class__ = CalledAttention
