"""Fundamental frequency by autocorrelation and the best path through its candidates (Boersma 1993)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from domains.speech._audio import RATE, resample

HOP = 0.01
"""Seconds from one frame to the next."""
FLOOR, CEILING = 60.0, 500.0
"""Lowest and highest frequency that is looked for, in Hz: what voices of adults have."""
LEAST_VOICED = 5
"""Fewest voiced frames that a median or an error of pitch is taken over."""

# The constants of the paper, section 3, with the costs of a path as Praat later set them.
_PERIODS = 3.0  # of the floor in a window
_VOICING, _SILENCE = 0.45, 0.03
_OCTAVE, _JUMP, _CHANGE = 0.01, 0.35, 0.14
_CANDIDATES = 8


def pitch(audio: Tensor, rate: int, *, floor: float = FLOOR, ceiling: float = CEILING) -> NDArray[np.float64]:
    """Track the fundamental frequency of speech.

    Each frame of three periods of the floor is weighted by a Hann window; its autocorrelation, divided by that of the
    window, r(tau) = r_audio(tau) / r_window(tau), has maxima at the periods that the frame may have. Of these, and of
    the possibility of having none, the path with the highest sum of strengths less costs of jumps is taken.

    Source: Boersma, Accurate short-term analysis of the fundamental frequency, IFA Proceedings 17, 1993.

    Args:
        audio: float32 (T,).
        rate: Samples per second.
        floor: Lowest frequency, in Hz.
        ceiling: Highest frequency, in Hz.

    Returns:
        (F,) Hz, 0 where a frame is not voiced; frame f is centred at f * `HOP` seconds, and F = T // (rate * HOP) + 1.
    """
    samples = resample(audio.detach().cpu().float(), rate, RATE).double().numpy()
    frames = len(audio) // round(HOP * rate) + 1
    if not np.any(samples):
        return np.zeros(frames)
    found, peaks = _windows(samples, frames, round(_PERIODS / floor * RATE))
    lags, values = _maxima(found, math.floor(RATE / ceiling), math.ceil(RATE / floor))
    loud = peaks / max(float(np.abs(samples - samples.mean()).max()), 1e-12)
    hertz = RATE / lags
    strength = np.where(np.isfinite(values), values - _OCTAVE * np.log2(floor / hertz), -np.inf)
    silent = _VOICING + np.maximum(0.0, 2.0 - loud / (_SILENCE / (1.0 + _VOICING)))
    return _best_path(np.column_stack([np.zeros(frames), hertz]), np.column_stack([silent, strength]))


def median_pitch(tracks: Sequence[NDArray[np.float64]]) -> float:
    """Return the median of the voiced frames of pitch tracks, Hz; nan where there are hardly any."""
    together = np.concatenate([np.zeros(0), *(track[track > 0] for track in tracks)])
    return float(np.median(together)) if len(together) >= LEAST_VOICED else float("nan")


def _windows(samples: NDArray[Any], frames: int, width: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the normalised autocorrelation of each frame (F, width // 2) and its peak (F,)."""
    hop = round(HOP * RATE)
    padded = np.pad(samples, (width // 2, width // 2 + frames * hop))
    cut = np.lib.stride_tricks.sliding_window_view(padded, width)[: frames * hop : hop]
    cut = cut - cut.mean(axis=1, keepdims=True)
    middle = np.abs(cut[:, width // 3 : width - width // 3]).max(axis=1)
    window = np.hanning(width + 2)[1:-1]
    size = 1 << math.ceil(math.log2(1.5 * width))
    power = np.abs(np.fft.rfft(cut * window, size)) ** 2
    own = np.fft.irfft(power)[:, : width // 2]
    of_window = np.fft.irfft(np.abs(np.fft.rfft(window, size)) ** 2)[: width // 2]
    return own / np.maximum(own[:, :1], 1e-20) / (of_window / of_window[0]), middle


def _maxima(found: NDArray[Any], least: int, most: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return lags in samples and heights of the highest maxima of each frame, both (F, `_CANDIDATES`)."""
    inner = found[:, least : most + 2]
    left, middle, right = inner[:, :-2], inner[:, 1:-1], inner[:, 2:]
    height = np.where((middle > left) & (middle >= right) & (middle > 0.5 * _VOICING), middle, -np.inf)
    chosen = np.argsort(-height, axis=1)[:, :_CANDIDATES]
    left, middle, right, height = (np.take_along_axis(part, chosen, axis=1) for part in (left, middle, right, height))
    curve = np.minimum(left - 2 * middle + right, -1e-12)
    shift = np.clip(0.5 * (left - right) / curve, -0.5, 0.5)
    top = height - 0.25 * (left - right) * shift
    # Beyond 1 only by the division by the window: such a lag is as much too sure as it is above 1.
    return least + 1 + chosen + shift, np.where(top > 1, 1 / np.maximum(top, 1), top)


def _best_path(hertz: NDArray[Any], strength: NDArray[Any]) -> NDArray[np.float64]:
    """Choose a candidate a frame, both (F, K) with the unvoiced one first: (F,)."""
    octaves = np.log2(np.maximum(hertz, 1.0))
    voiced = hertz[0] > 0
    total, back = strength[0], np.zeros(strength.shape, dtype=np.int64)
    costs = np.where(voiced[:, None] == voiced[None, :], 0.0, _CHANGE)
    both = voiced[:, None] & voiced[None, :]
    for frame in range(1, len(hertz)):
        jumps = _JUMP * np.abs(octaves[frame - 1][:, None] - octaves[frame][None, :])
        reached = total[:, None] - costs - np.where(both, jumps, 0.0)
        back[frame] = reached.argmax(axis=0)
        total = reached.max(axis=0) + strength[frame]
    path = np.zeros(len(hertz), dtype=np.int64)
    path[-1] = int(total.argmax())
    for frame in range(len(hertz) - 1, 0, -1):
        path[frame - 1] = back[frame, path[frame]]
    return np.take_along_axis(hertz, path[:, None], axis=1)[:, 0]
