"""What a voice is adapted by: VITS' own objective (arXiv 2106.06103), its own converted speech, warped recordings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from domains.speech.backbones._backbone import bare
from domains.speech.voices._alignment import align, frame_likelihoods
from domains.speech.voices._lessons import Lesson
from domains.speech.voices._posterior import Posterior
from domains.speech.voices._spectrum import magnitudes, mel_distance, stft_distance
from domains.speech.voices._vits import expand, log_durations
from domains.speech.voices._voice import Prior, Voice, read


class Lines(NamedTuple):
    """Texts as ids.

    Attributes:
        ids: int64 (B, L), 0 behind the end.
        lengths: int64 (B,), symbols.
    """

    ids: Tensor
    lengths: Tensor


class Windows(NamedTuple):
    """Short pieces of speech, made and wanted, each float32 (B, W * hop)."""

    made: Tensor
    wanted: Tensor


class Terms(NamedTuple):
    """The parts of the objective.

    Attributes:
        windows: What the decoder made of latents, beside the recording.
        likelihood: The divergence of the posterior from the prior, in nats a frame; None on routes without a posterior.
        symbols: Mean squared error of the logarithmic durations at the predictor's mode; None where they stay.
        total: Logarithm of predicted over recorded frames of each line, (B,), at drawn durations, without gradient.
    """

    windows: Windows
    likelihood: Tensor | None
    symbols: Tensor | None
    total: Tensor


def posterior_terms(
    voice: Voice, model: nn.Module, posterior: Posterior, lines: Lines, audio: Tensor, lengths: Tensor, window: int
) -> Terms:
    """Compute VITS' objective on recordings.

    Latents z are drawn from the posterior of the recording. The flow carries them to f(z), whose likelihood under the
    text's prior decides which frames belong to which symbol; the divergence
    log s_p - log s_q - 1/2 + (f(z) - m_p)^2 / (2 s_p^2), summed over the channels, trains text encoder and flow. The
    decoder turns a random window of z back into the recording.

    Args:
        voice: The voice.
        model: Its network with adapters.
        posterior: Its posterior encoder.
        lines: What is said, B lines.
        audio: (B, T) at `voice.rate`, zeros behind the end.
        lengths: (B,), samples; each line has at least as many frames as symbols.
        window: Frames of a window.
    """
    net: Any = bare(model)
    frames = lengths // voice.hop
    spectrum = magnitudes(audio[:, : int(frames.max()) * voice.hop], 2 * (voice.bins - 1), voice.hop)
    mask = _mask(frames, spectrum.shape[2]).to(spectrum)
    mean_q, scale_q = (part.float() for part in posterior(spectrum, mask))
    latents = (mean_q + torch.randn_like(mean_q) * scale_q.exp()) * mask
    prior = read(model, lines.ids, lines.lengths)
    carried = net.flow(latents, mask).float()
    with torch.no_grad():
        durations = align(frame_likelihoods(carried, prior.mean, prior.log_scale), lines.lengths, frames)
    mean, scale = expand(prior.mean, durations), expand(prior.log_scale, durations)
    gap = scale - scale_q - 0.5 + 0.5 * (carried - mean).square() * (-2 * scale).exp()
    likelihood = (gap * mask).sum() / mask.sum()
    return Terms(
        windows=_windows(voice, net, latents, audio, frames, window),
        likelihood=likelihood,
        **_durations(voice, net, prior, durations),
    )


def warped_terms(voice: Voice, model: nn.Module, lines: Lines, audio: Tensor, durations: Tensor, window: int) -> Terms:
    """Compute the plain objective: latents come from the text alone, spread by durations that are known.

    Args:
        voice: The voice.
        model: Its network with adapters.
        lines: What is said, B lines.
        audio: (B, T) at `voice.rate`.
        durations: Frames of each symbol, int64 (B, L), 0 behind the end; they sum up to no more than the recording has.
        window: Frames of a window.
    """
    net: Any = bare(model)
    prior = read(model, lines.ids, lines.lengths)
    frames = durations.sum(1)
    mean, scale = expand(prior.mean, durations), expand(prior.log_scale, durations).exp()
    mask = _mask(frames, mean.shape[2]).to(mean)
    latents = net.flow((mean + voice.noise * scale * torch.randn_like(mean)) * mask, mask, reverse=True)
    return Terms(
        windows=_windows(voice, net, latents, audio, frames, window),
        likelihood=None,
        **_durations(voice, net, prior, durations),
    )


def taught_terms(
    voice: Voice, model: nn.Module, lines: Lines, lessons: Sequence[Lesson], frames: Tensor, window: int
) -> Terms:
    """Compute the objective on the voice's own lines, spoken with the draws of their lessons and compared with them.

    Durations are those that the voice had; only its pace follows the recordings.

    Args:
        voice: The voice.
        model: Its network with adapters.
        lines: What is said, B lines.
        lessons: The lesson of each line.
        frames: Frames of the recording of each line, (B,).
        window: Frames of a window.
    """
    net: Any = bare(model)
    prior = read(model, lines.ids, lines.lengths)
    durations = nn.utils.rnn.pad_sequence([lesson.durations for lesson in lessons], batch_first=True).to(frames.device)
    said = durations.sum(1)
    drawn = nn.utils.rnn.pad_sequence([lesson.drawn.T for lesson in lessons], batch_first=True).transpose(1, 2)
    mean, scale = expand(prior.mean, durations), expand(prior.log_scale, durations).exp()
    mask = _mask(said, mean.shape[2]).to(mean)
    latents = net.flow((mean + voice.noise * scale * drawn.to(mean)) * mask, mask, reverse=True)
    audio = nn.utils.rnn.pad_sequence([lesson.audio for lesson in lessons], batch_first=True).to(mean)
    return Terms(
        windows=_windows(voice, net, latents, audio, said, window),
        likelihood=None,
        symbols=None,
        total=_total(voice, net, prior, frames),
    )


def reconstruction(voice: Voice, windows: Windows, mel: float, stft: float) -> Tensor:
    """Return the weighted sum of mel distance and multi-resolution STFT distance of windows."""
    loss = mel * mel_distance(windows.made, windows.wanted, voice.rate, voice.hop)
    return loss + stft * stft_distance(windows.made, windows.wanted) if stft else loss


def everything(voice: Voice, model: nn.Module, lines: Lines) -> Tensor:
    """Run every part of a voice on seeded latents, and return all that comes out, (B, N).

    Nothing in it is drawn at random: it is what an adapter is proved alive and certified with.
    """
    net: Any = bare(model)
    prior = read(model, lines.ids, lines.lengths)
    generator = torch.Generator().manual_seed(0)
    batch, _, symbols = prior.hidden.shape
    start = torch.randn(batch, 2, symbols, generator=generator).to(prior.hidden)
    logs = log_durations(net, prior.hidden, prior.mask, start) * prior.mask[:, 0]
    spread = expand(prior.mean + 0.1 * prior.log_scale, 2 * prior.mask[:, 0].long())
    mask = _mask(2 * lines.lengths, spread.shape[2]).to(spread)
    latents = net.flow(spread, mask, reverse=True)
    return torch.cat([logs, net.decoder(latents).flatten(1)], dim=1)


def _durations(voice: Voice, net: Any, prior: Prior, durations: Tensor) -> dict[str, Tensor]:  # noqa: ANN401
    """Compare predicted durations with the aligned ones."""
    inside = durations > 0
    wanted = durations.clamp(min=1).to(prior.hidden).log()
    mode = log_durations(net, prior.hidden, prior.mask, None)
    symbols = functional.mse_loss(mode[inside], wanted[inside])
    return {"symbols": symbols, "total": _total(voice, net, prior, durations.sum(1))}


@torch.no_grad()
def _total(voice: Voice, net: Any, prior: Prior, frames: Tensor) -> Tensor:  # noqa: ANN401
    """Return the logarithm of predicted over recorded frames (B,)."""
    start = voice.duration_noise * torch.randn_like(prior.hidden[:, :2])
    drawn = log_durations(net, prior.hidden, prior.mask, start).exp() * prior.mask[:, 0]
    # A synthesis rounds each symbol up, by half a frame on average.
    predicted = drawn.sum(1) + 0.5 * prior.mask[:, 0].sum(1)
    return (predicted / frames).log()


def _windows(voice: Voice, net: Any, latents: Tensor, audio: Tensor, frames: Tensor, window: int) -> Windows:  # noqa: ANN401
    """Decode a random window of each line, as long as the shortest line allows."""
    window = min(window, int(frames.min()))
    starts = (torch.rand(len(frames), device=frames.device) * (frames - window + 1)).long().clamp(max=frames - window)
    within = torch.arange(window, device=frames.device)
    columns = (starts[:, None] + within)[:, None].expand(-1, latents.shape[1], -1)
    made = net.decoder(latents.gather(2, columns))[:, 0]
    samples = torch.arange(window * voice.hop, device=audio.device)
    wanted = audio.gather(1, starts[:, None] * voice.hop + samples)
    return Windows(made.float(), wanted.float())


def _mask(frames: Tensor, longest: int) -> Tensor:
    return (torch.arange(longest, device=frames.device) < frames[:, None])[:, None]
