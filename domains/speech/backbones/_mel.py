"""Whisper's log-mel spectrogram (Radford et al. 2022, arXiv 2212.04356, section 2.2), in torch on any device."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional

RATE = 16_000
WINDOW = 400  # samples, 25 ms
STRIDE = 160  # samples, 10 ms
_FLOOR = 1e-10
_RANGE = 8.0  # powers of ten below the loudest value of an utterance, where all below is one


def log_mel(audio: Tensor, frames: int, bands: int, context: int) -> Tensor:
    """Compute the spectrogram that Whisper reads.

    It is the beginning of what transformers' `WhisperFeatureExtractor` computes of the same audio with zeros up to the
    whole context.

    Args:
        audio: (B, T) in [-1, 1] at 16 kHz, zeros behind the end.
        frames: Frames of 10 ms to return; the audio ends before them.
        bands: Mel bands M, 80 or 128.
        context: Frames of the whole context.

    Returns:
        (B, M, frames), float32.
    """
    with torch.autocast(audio.device.type, enabled=False):
        # Zeros for the windows that reach beyond the last frame, as the zeros of the whole context would be.
        samples = min(frames * STRIDE + WINDOW, context * STRIDE)
        padded = functional.pad(audio.float(), (0, samples - audio.shape[1]))
        window = torch.hann_window(WINDOW, device=audio.device)
        spectrum = torch.stft(padded, WINDOW, STRIDE, window=window, return_complex=True)[..., :frames]
        power = spectrum.real.square() + spectrum.imag.square()  # (B, WINDOW // 2 + 1, frames)
        bank = _filters(bands).to(audio.device)
        levels = (bank @ power).clamp(min=_FLOOR).log10()
        loudest = levels.amax(dim=(1, 2), keepdim=True)
        return (levels.maximum(loudest - _RANGE) + 4.0) / 4.0


@functools.cache
@torch.inference_mode(False)  # a validation may be the first to ask, and training goes through it backwards
def _filters(bands: int) -> Tensor:
    """Return Slaney's mel filters (bands, WINDOW // 2 + 1)."""
    from transformers.audio_utils import mel_filter_bank

    bank = mel_filter_bank(
        num_frequency_bins=WINDOW // 2 + 1,
        num_mel_filters=bands,
        min_frequency=0.0,
        max_frequency=RATE / 2,
        sampling_rate=RATE,
        norm="slaney",
        mel_scale="slaney",
    )
    return torch.from_numpy(bank.T).float().contiguous()
