"""Recordings made ready for synthesis: silence at both ends cut, one loudness."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

WINDOW, HOP = 0.025, 0.01
"""Seconds over which a level is taken, and from one level to the next."""

QUIETEST = -100.0
"""Level of digital silence, dBFS."""

_PEAK = 0.95  # that no gain goes beyond
_NEAR, _FAR, _ABOVE = 15.0, 40.0, 6.0  # dB: see `speech_threshold`
_NOISE = 5  # percent of the frames that are taken to be pauses


def frame_levels(audio: Tensor, rate: int) -> NDArray[np.float64]:
    """Return the level of each window of `WINDOW` seconds, every `HOP` seconds: (F,) dBFS, at least `QUIETEST`.

    Args:
        audio: float32 (T,).
        rate: Samples per second.
    """
    width, hop = round(WINDOW * rate), round(HOP * rate)
    samples = torch.nn.functional.pad(audio.detach().cpu().double(), (0, max(0, width - len(audio))))
    power = samples.unfold(0, width, hop).square().mean(dim=1).numpy()
    return 10.0 * np.log10(np.maximum(power, 10 ** (QUIETEST / 10)))


def noise_level(levels: NDArray[np.float64]) -> float:
    """Return the level of the pauses, dBFS: what 5 % of the frames stay below. Without pauses, that of soft speech."""
    return float(np.percentile(levels, _NOISE))


def speech_threshold(levels: NDArray[np.float64]) -> float:
    """Return the level above which a frame is speech, dBFS.

    6 dB above the pauses, and no nearer than 15 and no farther than 40 dB to the loudest frame.
    """
    loudest = float(levels.max())
    return min(max(noise_level(levels) + _ABOVE, loudest - _FAR), loudest - _NEAR)


def speech_bounds(audio: Tensor, rate: int, margin: float = 0.0) -> tuple[int, int]:
    """Return where speech begins and ends, in samples.

    Args:
        audio: float32 (T,).
        rate: Samples per second.
        margin: Seconds of silence to keep at either end, as far as there are so many.
    """
    levels = frame_levels(audio, rate)
    loud = np.flatnonzero(levels > speech_threshold(levels))
    if not len(loud):
        return 0, len(audio)
    hop, width, keep = round(HOP * rate), round(WINDOW * rate), round(margin * rate)
    # The loud part of the first window may be its end, and of the last its beginning.
    first, last = int(loud[0]) * hop, int(loud[-1]) * hop + width
    return max(0, first - keep), min(len(audio), last + keep)


def speech_level(audio: Tensor, rate: int) -> float:
    """Return the mean level of speech, pauses left out, in dBFS (as ITU-T P.56 means it, with a simpler threshold)."""
    levels = frame_levels(audio, rate)
    loud = levels[levels > speech_threshold(levels)]
    return float(10.0 * np.log10((10 ** (loud / 10)).mean())) if len(loud) else QUIETEST


def cleaned(audio: Tensor, rate: int, level: float, margin: float) -> Tensor:
    """Cut the silence at both ends and bring speech to a level.

    Args:
        audio: float32 (T,) in [-1, 1].
        rate: Samples per second.
        level: Level of speech to reach, dBFS; not where the peak would go beyond 0.95.
        margin: Seconds of silence to keep at either end.
    """
    start, end = speech_bounds(audio, rate, margin)
    kept = audio[start:end]
    gain = 10.0 ** ((level - speech_level(kept, rate)) / 20.0)
    return kept * min(gain, _PEAK / max(float(kept.abs().max()), 1e-6))
