"""VITS (arXiv 2106.06103) as transformers lays it out, made trainable: no weight norm, nothing drawn from NumPy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from common.errors import GraftError


class ResidualBlock2(nn.Module):
    """HiFi-GAN's second kind of residual block (arXiv 2010.05646), which transformers has not.

    y = x + conv_i(leaky_relu(x)) for each dilation i in turn.

    Args:
        channels: Channels of input and output, (B, channels, T).
        kernel: Width of each convolution.
        dilations: Dilation of each convolution.
        slope: Negative slope of the leaky ReLU.
    """

    def __init__(self, channels: int, kernel: int, dilations: Sequence[int], slope: float) -> None:
        super().__init__()
        self.slope = slope
        self.convs = nn.ModuleList(
            nn.Conv1d(channels, channels, kernel, dilation=dilation, padding=(kernel - 1) * dilation // 2)
            for dilation in dilations
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, channels, T)."""
        for conv in self.convs:
            x = x + conv(functional.leaky_relu(x, self.slope))
        return x


def build_vits(config: Any, *, second_kind: bool) -> nn.Module:  # noqa: ANN401
    """Build a `VitsModel` with random weights, ready for `trainable`.

    Args:
        config: A `VitsConfig`.
        second_kind: Whether the decoder's residual blocks are of HiFi-GAN's second kind.
    """
    from transformers import VitsModel

    model: Any = VitsModel(config)
    if second_kind:
        blocks, channels = [], config.upsample_initial_channel
        for _ in config.upsample_rates:
            channels //= 2
            for kernel, dilations in zip(config.resblock_kernel_sizes, config.resblock_dilation_sizes, strict=True):
                blocks.append(ResidualBlock2(channels, kernel, dilations, config.leaky_relu_slope))
        model.decoder.resblocks = nn.ModuleList(blocks)
    return model


def trainable(model: Any, *, posterior: bool) -> nn.Module:  # noqa: ANN401
    """Take out of a `VitsModel` what cannot be adapted: weight norms, random layer drop, layers that nothing calls.

    The stochastic duration predictor's variational posterior (`post_*`) and the flow that its inverse leaves out serve
    only the likelihood of a pretraining; they become identities, as does a posterior encoder that is not wanted.

    Args:
        model: The model; it is changed in place.
        posterior: Whether to keep the posterior encoder.

    Raises:
        GraftError: A voice of several speakers.
    """
    if model.config.num_speakers > 1:
        raise GraftError(
            f"This VITS has {model.config.num_speakers} speakers; only voices of one can be adapted. Take such a voice."
        )
    for module in model.modules():
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight")
    model.text_encoder.encoder.layerdrop = 0.0  # drawn from NumPy's state, which no resume restores
    predictor = model.duration_predictor
    if model.config.use_stochastic_duration_prediction:
        for name in [name for name, _ in predictor.named_children() if name.startswith("post_")]:
            setattr(predictor, name, nn.Identity())
        predictor.flows[1] = nn.Identity()
    if not posterior:
        model.posterior_encoder = nn.Identity()
    return model


def log_durations(model: Any, hidden: Tensor, mask: Tensor, noise: Tensor | None) -> Tensor:  # noqa: ANN401
    """Predict how long each symbol lasts.

    Args:
        model: The network out of PEFT's wrapper.
        hidden: What the text encoder makes of the symbols, (B, H, L); its gradient stops here, as in VITS.
        mask: (B, 1, L), 1 at symbols.
        noise: (B, 2, L), what a stochastic predictor starts from; None for its mode, all zeros.

    Returns:
        (B, L), natural logarithm of frames.
    """
    predictor = model.duration_predictor
    if not model.config.use_stochastic_duration_prediction:
        return predictor(hidden, mask)[:, 0]
    given = predictor.conv_dds(predictor.conv_pre(hidden.detach()), mask)
    given = predictor.conv_proj(given) * mask
    if noise is None:
        noise = hidden.new_zeros(hidden.shape[0], 2, hidden.shape[2])
    latents = noise
    affine, _, *flows = predictor.flows
    for flow in (*reversed(flows), affine):
        latents, _ = flow(latents.flip(1), mask, global_conditioning=given, reverse=True)
    return latents[:, 0]


def expand(values: Tensor, durations: Tensor) -> Tensor:
    """Repeat each symbol's column as many times as it has frames.

    Args:
        values: (B, C, L).
        durations: Whole frames of each symbol, (B, L); 0 behind the end.

    Returns:
        (B, C, F), F the most frames of a row; zeros behind the end of a shorter one.
    """
    ends = durations.long().cumsum(1)  # (B, L)
    frames = torch.arange(int(ends[:, -1].max()), device=values.device)
    place = torch.searchsorted(ends, frames.expand(len(values), -1).contiguous(), right=True)  # (B, F)
    inside = frames < ends[:, -1:]
    place = place.clamp(max=values.shape[2] - 1)
    return values.gather(2, place[:, None].expand(-1, values.shape[1], -1)) * inside[:, None]
