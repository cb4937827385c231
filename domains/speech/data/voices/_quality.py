"""Whether recordings are fit for a voice: clipping, noise, bandwidth, and minutes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from domains.speech._levels import frame_levels, noise_level

_FULL = 0.999  # of full scale
_FLAT = 1e-4  # of the peak: samples this near to it are one level
_RUN = 3  # samples in a row at the peak that no speech has
_BELOW, _BIN = 60.0, 50.0  # dB below the strongest band that still count as sound; most Hz of a band
_MOST_SNR = 80.0
_SPEECH = 20.0  # dB below the loudest frame that speech reaches down to


@dataclass(frozen=True, kw_only=True)
class Quality:
    """How good recordings are: of one clip, or the middle of a set.

    Attributes:
        clipped: Share of the samples that are cut off at the top: at full scale, or in flat runs at the clip's peak.
        snr: Level of speech over that of the pauses, dB, at most 80. An estimate from below: in a clip without pauses
            the softest speech is taken for one.
        bandwidth: Highest frequency with sound that is less than 60 dB below the strongest band, Hz.
    """

    clipped: float
    snr: float
    bandwidth: float


def quality_of(audio: Tensor, rate: int) -> Quality:
    """Measure a recording as it came, before silence is cut and loudness evened.

    Args:
        audio: float32 (T,) in [-1, 1].
        rate: Samples per second.
    """
    return Quality(clipped=_clipped(audio), snr=_snr(audio, rate), bandwidth=_bandwidth(audio, rate))


def middle_of(qualities: Sequence[Quality], samples: Sequence[int]) -> Quality:
    """Return the share of all samples that is clipped, and the medians of the rest.

    Args:
        qualities: Of each clip.
        samples: Its length.
    """
    clipped = sum(one.clipped * count for one, count in zip(qualities, samples, strict=True)) / max(1, sum(samples))
    snr, bandwidth = (float(np.median([getattr(one, name) for one in qualities])) for name in ("snr", "bandwidth"))
    return Quality(clipped=clipped, snr=snr, bandwidth=bandwidth)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a set has to reach so that a voice can be learnt of it.

    Args:
        minutes: Least minutes of speech for training.
        clipped: Largest share of clipped samples.
        snr: Least signal-to-noise ratio, dB.
        bandwidth: Least bandwidth, Hz.
    """

    minutes: float = 1.0
    clipped: float = 0.002
    snr: float = 15.0
    bandwidth: float = 3_000.0

    def faults(self, quality: Quality, minutes: float) -> list[str]:
        """Say in words what a set falls short of; none where it is fit."""
        found = []
        if minutes < self.minutes:
            found.append(f"{minutes:.1f} minutes of training speech (at least {self.minutes:g}): record more")
        if quality.clipped > self.clipped:
            found.append(
                f"{quality.clipped:.2%} of the samples clipped (at most {self.clipped:.2%}): record with less gain"
            )
        if quality.snr < self.snr:
            found.append(
                f"speech {quality.snr:.0f} dB above the noise (at least {self.snr:g}): record in a quieter room"
            )
        if quality.bandwidth < self.bandwidth:
            found.append(
                f"sound up to {quality.bandwidth:.0f} Hz (at least {self.bandwidth:.0f}): record at a higher rate"
            )
        return found


def _clipped(audio: Tensor) -> float:
    size = audio.detach().cpu().abs()
    peak = float(size.max())
    level = min(peak * (1 - _FLAT), _FULL)
    top = (size >= level).numpy()
    # Lengths of the runs of samples at the top.
    edges = np.flatnonzero(np.diff(np.concatenate([[0], top.astype(np.int8), [0]])))
    runs = edges[1::2] - edges[::2]
    return float(runs[runs >= _RUN].sum()) / len(audio)


def _snr(audio: Tensor, rate: int) -> float:
    levels = frame_levels(audio, rate)
    quiet, loudest = noise_level(levels), float(levels.max())
    # Not the threshold that trims: in much noise that one lies below it, so that nothing is cut.
    loud = levels[levels >= max(loudest - _SPEECH, 0.5 * (loudest + quiet))]
    speech, noise = float((10 ** (loud / 10)).mean()), 10 ** (quiet / 10)
    return float(np.clip(10 * np.log10(max(speech - noise, 1e-12) / noise), 0.0, _MOST_SNR))


def _bandwidth(audio: Tensor, rate: int) -> float:
    size = 1 << round(rate / _BIN).bit_length()
    samples = audio.detach().cpu().float()
    samples = torch.nn.functional.pad(samples, (0, max(0, size - len(samples))))
    spectrum = torch.stft(samples, size, size // 2, window=torch.hann_window(size), center=False, return_complex=True)
    power = spectrum.abs().square().mean(dim=1)[1:]  # without the constant
    loud = torch.nonzero(power > power.max() * 10 ** (-_BELOW / 10)).flatten()
    return float((int(loud[-1]) + 1) * rate / size)
