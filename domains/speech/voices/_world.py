"""Speech as pitch, envelope and noise, and back: the WORLD vocoder (Morise, Yokomori and Ozawa 2016)."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from domains.speech._pitch import FLOOR, HOP, pitch

STEP = 0.005
"""Seconds from one frame to the next."""
CEPSTRA = 32
"""Coefficients of an envelope, the first one of them its level."""


class Analysis(NamedTuple):
    """What was found in a clip of F frames.

    Attributes:
        pitch: Fundamental frequency in Hz, (F,), 0 where a frame is not voiced.
        envelope: Mel-cepstrum of the spectral envelope, (F, `CEPSTRA`).
    """

    pitch: NDArray[np.float64]
    envelope: NDArray[np.float64]


def analyse(audio: Tensor, rate: int) -> Analysis:
    """Find pitch and envelope of a clip.

    The pitch is that of `domains.speech._pitch`, since WORLD's own tracker takes the octave above a creaky voice; the
    envelope is CheapTrick's.

    Args:
        audio: float32 (T,).
        rate: Samples per second.
    """
    import pyworld

    world: Any = pyworld
    found, times = pitch(audio, rate), _times(audio, rate)
    hertz = found[np.minimum(np.round(times / HOP).astype(np.int64), len(found) - 1)]
    envelope = world.cheaptrick(_samples(audio), hertz, times, rate, f0_floor=FLOOR)
    return Analysis(hertz, world.code_spectral_envelope(envelope, rate, CEPSTRA))


def render(audio: Tensor, rate: int, found: Analysis, wanted: Analysis) -> Tensor:
    """Speak a clip again with another pitch and another envelope, frame by frame.

    What of it is noise and what is tone (its aperiodicity, by D4C) stays as it is, and so does its length.

    Args:
        audio: float32 (T,).
        rate: Samples per second.
        found: What `analyse` found in it.
        wanted: Another pitch and envelope of as many frames.

    Returns:
        (T,), float32, as loud as `audio`.
    """
    import pyworld

    world: Any = pyworld
    size = world.get_cheaptrick_fft_size(rate, FLOOR)
    noise = world.d4c(_samples(audio), found.pitch, _times(audio, rate), rate, fft_size=size)
    envelope = world.decode_spectral_envelope(np.ascontiguousarray(wanted.envelope), rate, size)
    made = torch.from_numpy(world.synthesize(wanted.pitch, envelope, noise, rate, STEP * 1000)).float()
    made = torch.nn.functional.pad(made, (0, max(0, len(audio) - len(made))))[: len(audio)]
    return made * (audio.square().mean() / made.square().mean().clamp(min=1e-12)).sqrt()


def _times(audio: Tensor, rate: int) -> NDArray[np.float64]:
    """Return the time of each frame in seconds."""
    return np.arange(int(len(audio) / rate / STEP) + 1) * STEP


def _samples(audio: Tensor) -> NDArray[np.float64]:
    return audio.detach().cpu().double().numpy()
