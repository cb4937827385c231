"""What a voice is, and how it speaks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from common.task import Backbone
from domains.speech.backbones._backbone import bare
from domains.speech.voices._symbols import Symbols
from domains.speech.voices._vits import expand, log_durations

MOST_FRAMES = 200
"""Most frames of one symbol (2.3 s at 256 samples of 22,050 Hz): a duration beyond is a predictor gone wild."""


@dataclass(frozen=True, kw_only=True)
class Voice(Backbone):
    """A VITS and what is known of it.

    Attributes:
        symbols: How it reads.
        language: Language that it speaks, as a code such as `en`.
        rate: Sampling rate, Hz.
        hop: Samples of a frame.
        bins: Frequencies of the linear spectrogram that a posterior encoder reads; its transform is 2 (bins - 1) wide.
        latents: Channels of the latents.
        noise: Deviation of the latents that a synthesis draws, as a share of the prior's.
        duration_noise: The same for durations.
        posterior: Whether it has a posterior encoder that was trained.
    """

    symbols: Symbols
    language: str
    rate: int
    hop: int
    bins: int
    latents: int
    noise: float
    duration_noise: float
    posterior: bool


class Prior(NamedTuple):
    """What the text encoder makes of symbols.

    Attributes:
        hidden: (B, H, L).
        mean: (B, C, L), of the prior over latents.
        log_scale: (B, C, L), natural logarithm of its deviation.
        mask: (B, 1, L), 1 at symbols.
    """

    hidden: Tensor
    mean: Tensor
    log_scale: Tensor
    mask: Tensor


def read(model: nn.Module, ids: Tensor, lengths: Tensor) -> Prior:
    """Run the text encoder.

    Args:
        model: The voice's network, bare or with adapters.
        ids: (B, L), any id behind the end.
        lengths: (B,), symbols.
    """
    net: Any = bare(model)
    inside = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]  # (B, L)
    mask = inside.to(net.text_encoder.embed_tokens.weight.dtype)
    found = net.text_encoder(input_ids=ids, padding_mask=mask[:, :, None], attention_mask=inside.long())
    hidden, mean, scale = found.last_hidden_state, found.prior_means, found.prior_log_variances
    # The last is the logarithm of a deviation, whatever transformers calls it.
    return Prior(*(part.float().transpose(1, 2) for part in (hidden, mean, scale)), mask[:, None])


def frames_of(logs: Tensor, mask: Tensor, pace: float | Tensor = 1.0) -> Tensor:
    """Return whole frames (B, L) of logarithmic durations (B, L), 0 behind the end.

    Args:
        logs: Natural logarithm of frames.
        mask: (B, 1, L).
        pace: Factor of all durations; above 1 is slower.
    """
    return torch.ceil(logs.exp() * mask[:, 0] * pace).clamp(max=MOST_FRAMES)


def synthesize(
    voice: Voice,
    model: nn.Module,
    ids: Tensor,
    *,
    durations: Tensor | None = None,
    noise: float | None = None,
    duration_noise: float | None = None,
    pace: float | Tensor = 1.0,
    seed: int = 0,
) -> Tensor:
    """Speak one line.

    The prior of each symbol is repeated for its frames, latents are drawn from it, the inverse flow turns them into
    those of speech, and the decoder into a waveform (VITS, arXiv 2106.06103, section 2).

    Args:
        voice: What `build_voice` returned.
        model: Its network, bare or with adapters, in eval mode.
        ids: (L,), of `voice.symbols.encode`.
        durations: Whole frames of each symbol, (L,), instead of predicted ones.
        noise: Share of the prior's deviation that is drawn; None takes the voice's own, 0 its mean.
        duration_noise: The same for durations.
        pace: Factor of predicted durations; above 1 is slower.
        seed: Seed of both draws; on one machine the same seed speaks the same samples.

    Returns:
        (T,) float32 in [-1, 1] at `voice.rate`, T the frames times `voice.hop`.
    """
    net: Any = bare(model)
    noise = voice.noise if noise is None else noise
    duration_noise = voice.duration_noise if duration_noise is None else duration_noise
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        lengths = torch.tensor([len(ids)], device=ids.device)
        prior = read(model, ids[None], lengths)
        if durations is None:
            start = torch.randn(1, 2, len(ids), generator=generator).to(prior.hidden) * duration_noise
            frames = frames_of(log_durations(net, prior.hidden, prior.mask, start), prior.mask, pace)
        else:
            frames = durations[None].to(prior.hidden)

        def draw(scale: Tensor) -> Tensor:
            return torch.randn(scale.shape, generator=generator).to(scale) * scale * noise

        return speak(net, prior, frames, draw)[1]


def speak(net: Any, prior: Prior, frames: Tensor, draw: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    """Return the latents (C, F) and the waveform (F * hop,) of a line whose durations are known.

    Args:
        net: The network out of PEFT's wrapper.
        prior: What `read` made of the line.
        frames: Whole frames of each symbol, (1, L).
        draw: Told the prior's deviations (1, C, F), gives what is added to its means.
    """
    mean, scale = expand(prior.mean, frames), expand(prior.log_scale, frames).exp()
    latents = net.flow(mean + draw(scale), mean.new_ones(1, 1, mean.shape[2]), reverse=True)
    return latents[0], net.decoder(latents)[0, 0].float()
