"""At what scale a network writes mel bands, pitch and energy, measured on its own sound."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.errors import GraftError
from domains.speech._pitch import HOP, LEAST_VOICED, pitch
from domains.speech.voices._mel_voice import MelFront

LEAST_MEL = 0.7
"""Least median R2 of the bands: below it the analysis is not the one that the network learned from."""
LEAST_CURVE = 0.5
"""Least R2 of pitch and of energy: below it labels would be more noise than signal."""
_VOICED_SHARE = 0.5  # of a symbol's frames, for its pitch to be measured


class Spoken(NamedTuple):
    """What a network says of itself.

    Attributes:
        mel: Its spectrogram (F, bands).
        durations: Frames of each symbol, int64 (L,), which sum up to F.
        pitch: Of each symbol, (L,), at the network's own scale.
        energy: The same, (L,).
    """

    mel: Tensor
    durations: Tensor
    pitch: Tensor
    energy: Tensor


@dataclass(frozen=True)
class Line:
    """A line for each of C columns, `slope x + shift`.

    Attributes:
        slope: (C,).
        shift: (C,).
        fit: Share of the variance that the line explains (R2), (C,); 0 where it does not rise or nothing varies.
    """

    slope: Tensor
    shift: Tensor
    fit: Tensor

    def __call__(self, found: Tensor) -> Tensor:
        """Return what the network would write for what was found, (..., C) float32."""
        return (self.slope * found.double() + self.shift).float()


def fit_line(found: Tensor, wanted: Tensor) -> Line:
    """Fit a line for each column by least squares.

    Args:
        found: (N, C), N at least 2.
        wanted: (N, C).
    """
    found, wanted = found.double(), wanted.double()
    x, y = found - found.mean(0), wanted - wanted.mean(0)
    spread, both = x.square().sum(0), (x * y).sum(0)
    slope = torch.where(spread > 0, both / spread.clamp(min=1e-300), 0.0)
    explained = both * slope / y.square().sum(0).clamp(min=1e-300)
    return Line(slope, wanted.mean(0) - slope * found.mean(0), torch.where(slope > 0, explained, 0.0))


@dataclass(frozen=True)
class Scales:
    """From what is analysed to what a network writes.

    Attributes:
        mel: From log-mel bands.
        pitch: From the mean log F0 of a symbol; None where it could not be measured.
        energy: From the mean norm of a symbol's frames; None where it could not be measured.
        figures: R2 of each, and which could not be measured.
    """

    mel: Line
    pitch: Line | None
    energy: Line | None
    figures: dict[str, Any]


def measure_scales(name: str, spoken: Sequence[tuple[Spoken, Tensor]], front: MelFront, rate: int) -> Scales:
    """Measure a network's scales by what it says of itself and how that sounds.

    Frames are compared with frames, and pitch and energy symbol by symbol as they are averaged in training (FastPitch,
    arXiv 2006.06873): log F0 where half of a symbol's frames or more are voiced, and the norm of the magnitudes.

    Args:
        name: The voice's name, for messages.
        spoken: What it wrote of each line, and the sound of that (T,), T at least F hops.
        front: How sounds are analysed.
        rate: Sampling rate, Hz.

    Raises:
        GraftError: The bands do not follow lines.
    """
    bands, curves = [], {"pitch": [], "energy": []}
    for own, audio in spoken:
        frames = len(own.mel)
        magnitudes = front.magnitudes(audio)[:frames]
        bands.append((front.bands(magnitudes), own.mel))
        energy = symbol_means(magnitudes.norm(dim=1), own.durations)
        curves["energy"].append((energy, own.energy))
        track = pitch_track(audio, rate, front.hop, frames)
        if track is not None:
            logs, voiced = (symbol_means(part, own.durations) for part in track)
            logs[~(voiced >= _VOICED_SHARE)] = torch.nan
            curves["pitch"].append((logs, own.pitch))
    mel = fit_line(*(torch.cat(side) for side in zip(*bands, strict=True)))
    median, least = float(mel.fit.median()), float(mel.fit.min())
    if median < LEAST_MEL:
        raise GraftError(
            f"At what scale '{name}' writes its frames could not be measured on its own sound: lines from analysed "
            f"bands to its own explain {median:.2f} of the variance in the median band, {least:.2f} in the worst one "
            f"(R2; the median needs {LEAST_MEL}). Check that network and vocoder belong together."
        )
    lines = {part: _curve(pairs) for part, pairs in curves.items()}
    figures: dict[str, Any] = {"mel_r2": median, "mel_r2_least": least}
    figures |= {f"{part}_r2": 0.0 if line is None else float(line.fit) for part, line in lines.items()}
    known = {part: line for part, line in lines.items() if line is not None and float(line.fit) >= LEAST_CURVE}
    figures["kept"] = [part for part in lines if part not in known]
    return Scales(mel, known.get("pitch"), known.get("energy"), figures)


def _curve(pairs: list[tuple[Tensor, Tensor]]) -> Line | None:
    """Fit a line to symbols' values, nan where there are none; None with hardly any."""
    if not pairs:
        return None
    found, wanted = (torch.cat(side) for side in zip(*pairs, strict=True))
    known = ~torch.isnan(found)
    return fit_line(found[known, None], wanted[known, None]) if int(known.sum()) >= LEAST_VOICED else None


def symbol_means(track: Tensor, durations: Tensor) -> Tensor:
    """Return the mean of a track (F,) over the frames of each symbol, (L,); nan for a symbol without frames."""
    owner = torch.repeat_interleave(torch.arange(len(durations)), durations)
    sums = torch.zeros(len(durations), dtype=torch.float64).index_add(0, owner, track.double())
    return sums / durations.where(durations > 0, torch.nan)


def pitch_track(audio: Tensor, rate: int, hop: int, frames: int) -> tuple[Tensor, Tensor] | None:
    """Track the pitch of a sound at the frames of a spectrogram.

    Args:
        audio: (T,).
        rate: Samples per second.
        hop: Samples of a frame; frame f is centred on sample f hop.
        frames: How many there are.

    Returns:
        Natural logarithm of F0 in Hz, drawn straight across what is unvoiced, and whether a frame is voiced (1 or 0),
        both (frames,); None where hardly anything is voiced.
    """
    found: NDArray[np.float64] = pitch(audio, rate)
    voiced = found > 0
    if int(voiced.sum()) < LEAST_VOICED:
        return None
    places = np.arange(frames) * hop / rate / HOP
    logs = np.interp(places, np.flatnonzero(voiced), np.log(found[voiced]))
    nearest = np.minimum(np.round(places).astype(np.int64), len(found) - 1)
    return torch.from_numpy(logs), torch.from_numpy(voiced[nearest].astype(np.float64))
