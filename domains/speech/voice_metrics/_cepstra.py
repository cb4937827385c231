"""Mel-cepstra, and the distortion between two voices that say the same."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from domains.speech._audio import RATE, resample
from domains.speech._pitch import HOP

ORDER = 13
"""Mel-cepstra that are compared; the 0th, the loudness, is not."""
TOP = 7_000.0
"""Highest frequency that is compared, in Hz: where wideband telephone codecs end."""

_BANDS, _WINDOW, _FFT = 40, 400, 1024
_RANGE = 1e-8  # of the loudest band's power: 80 dB


def mel_power(audio: Tensor, rate: int) -> NDArray[np.float64]:
    """Return the power in mel bands up to `TOP`, (F, 40), in windows of 25 ms every `HOP`; frame f is at f * `HOP` s.

    Args:
        audio: float32 (T,).
        rate: Samples per second.
    """
    hop = round(HOP * RATE)
    samples = resample(audio.detach().cpu().float(), rate, RATE)
    frames = len(audio) // round(HOP * rate) + 1
    padded = torch.nn.functional.pad(samples, (_FFT // 2, _FFT // 2 + hop))
    window = torch.hann_window(_WINDOW)
    spectrum = torch.stft(padded, _FFT, hop, _WINDOW, window, center=False, return_complex=True)
    return (_bank() @ spectrum.abs().square())[:, :frames].double().T.numpy()


@functools.cache
def _bank() -> Tensor:
    """Return the mel bands, (40, 513), each of sum one, so that white noise has one power in all of them."""
    from torchaudio.functional import melscale_fbanks

    bank = melscale_fbanks(_FFT // 2 + 1, 0.0, TOP, _BANDS, RATE).T
    return bank / bank.sum(dim=1, keepdim=True)


def mel_cepstra(audio: Tensor, rate: int) -> NDArray[np.float64]:
    """Return the mel-cepstra 0 to 13 of speech, (F, 14).

    With L_k the natural logarithm of the amplitude in band k of K: c_0 = mean L_k and
    c_m = 2/K sum_k L_k cos(pi m (k + 1/2) / K), so that L_k is c_0 + sum_m c_m cos(pi m (k + 1/2) / K), smoothed.

    Args:
        audio: float32 (T,).
        rate: Samples per second.
    """
    power = mel_power(audio, rate)
    levels = 0.5 * np.log(np.maximum(power, max(_RANGE * power.max(initial=0.0), 1e-12)))
    cepstra = 2.0 * levels @ _cosines()
    cepstra[:, 0] /= 2.0
    return cepstra


@functools.cache
def _cosines() -> NDArray[np.float64]:
    places = (np.arange(_BANDS) + 0.5)[:, None] * np.arange(ORDER + 1)
    return np.cos(math.pi * places / _BANDS) / _BANDS


def frame_distortion(one: NDArray[Any], other: NDArray[Any]) -> NDArray[np.float64]:
    """Return the distortion between each frame of two, (N, M) dB, out of mel-cepstra (N, 14) and (M, 14).

    d = 10 / ln 10 * sqrt(2 sum_{m=1}^{13} (c_m - c'_m)^2): the root mean square over the mel bands of the difference
    of the smoothed spectra in dB, the difference in loudness left out. Source: Kubichek, Mel-cepstral distance measure
    for objective speech quality assessment, IEEE Pacific Rim Conference 1993.
    """
    left, right = one[:, 1:], other[:, 1:]
    squares = (left**2).sum(axis=1)[:, None] + (right**2).sum(axis=1)[None, :] - 2 * left @ right.T
    return 10.0 / math.log(10.0) * np.sqrt(2.0 * np.maximum(squares, 0.0))
