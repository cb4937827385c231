"""Spectra of waveforms as VITS and HiFi-GAN compute them, all of them differentiable."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

_LOWEST = 1e-5  # of a mel band, as in HiFi-GAN
_RESOLUTIONS = ((512, 128), (1024, 256), (2048, 512))  # width of the transform and hop, samples


def magnitudes(audio: Tensor, width: int, hop: int) -> Tensor:
    """Return the linear magnitude spectrogram.

    Args:
        audio: (B, T), samples.
        width: Samples of the transform and of its Hann window.
        hop: Samples from one frame to the next.

    Returns:
        (B, width // 2 + 1, T // hop); frame f is centred on the middle of samples f * hop to (f + 1) * hop.
    """
    edge = (width - hop) // 2
    # A clip shorter than the edge has nothing to reflect.
    mode = "reflect" if audio.shape[1] > edge else "constant"
    padded = functional.pad(audio[:, None], (edge, edge), mode=mode)[:, 0]
    found = torch.stft(padded, width, hop, window=_window(width, audio.device), center=False, return_complex=True)
    return (found.real.square() + found.imag.square() + 1e-6).sqrt()


def log_mel(spectrum: Tensor, rate: int, bands: int = 80) -> Tensor:
    """Return natural logarithms of mel bands (B, bands, F) of a magnitude spectrogram (B, bins, F)."""
    filters = _mel_filters(spectrum.shape[1], bands, rate, spectrum.device)
    with torch.autocast(spectrum.device.type, enabled=False):  # half precision would round soft bands away
        return (filters @ spectrum.float()).clamp(min=_LOWEST).log()


def mel_distance(one: Tensor, two: Tensor, rate: int, hop: int) -> Tensor:
    """Return VITS' reconstruction loss: the mean absolute difference of log-mel bands of waveforms (B, T)."""
    bands = [log_mel(magnitudes(audio, 4 * hop, hop), rate) for audio in (one, two)]
    return functional.l1_loss(bands[0], bands[1])


def stft_distance(one: Tensor, two: Tensor, resolutions: Sequence[tuple[int, int]] = _RESOLUTIONS) -> Tensor:
    """Return the multi-resolution STFT loss of Parallel WaveGAN (arXiv 1910.11480).

    For each resolution the spectral convergence ||S - S'|| / ||S'|| and the mean absolute difference of log magnitudes,
    averaged over the resolutions.

    Args:
        one: Waveforms (B, T), what was made.
        two: Waveforms (B, T), what is wanted.
        resolutions: Width of the transform and hop of each, samples; those wider than the waveforms are left out.
    """
    parts = []
    for width, hop in [pair for pair in resolutions if pair[0] <= one.shape[1]] or resolutions[:1]:
        made, wanted = magnitudes(one, width, hop), magnitudes(two, width, hop)
        parts.append((made - wanted).norm() / wanted.norm().clamp(min=1e-6))
        parts.append(functional.l1_loss(made.log(), wanted.log()))
    return 2 * torch.stack(parts).mean()


# A validation may be the first to ask for these, and training goes through them backwards.
@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)
def _window(width: int, device: torch.device) -> Tensor:
    return torch.hann_window(width, device=device)


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)
def _mel_filters(bins: int, bands: int, rate: int, device: torch.device) -> Tensor:
    from torchaudio.functional import melscale_fbanks

    made = melscale_fbanks(bins, 0.0, rate / 2, bands, rate, norm="slaney", mel_scale="slaney")
    return made.T.contiguous().to(device)
