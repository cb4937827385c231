"""How a generated utterance sounds beside the recording of the same text: spectra, pitch, voicing, duration."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from domains.speech._levels import speech_bounds
from domains.speech._pitch import LEAST_VOICED, median_pitch, pitch
from domains.speech.voice_metrics._cepstra import frame_distortion, mel_cepstra
from domains.speech.voice_metrics._dtw import warp


@dataclass(frozen=True, kw_only=True)
class Acoustics:
    """One utterance beside its recording; a figure is nan where too few frames are voiced.

    Attributes:
        mcd: Mel-cepstral distortion, dB, the mean along the warped path; see `frame_distortion`.
        f0_median: Median fundamental frequency of the generated one, Hz.
        f0_median_reference: The same of the recording, Hz.
        f0_rmse: Root mean square of the difference in pitch at frames of the path where both are voiced, cents.
        voicing_error: Share of the path's frames where one is voiced and the other is not.
        seconds: Length of the generated speech, silence at both ends left out.
        seconds_reference: The same of the recording.
        duration_error: abs(seconds - seconds_reference) / seconds_reference.
    """

    mcd: float
    f0_median: float
    f0_median_reference: float
    f0_rmse: float
    voicing_error: float
    seconds: float
    seconds_reference: float
    duration_error: float


def acoustics(generated: Tensor, reference: Tensor, rate: int) -> Acoustics:
    """Compare a generated utterance with the recording of the same text. Silence at both ends is left out first.

    Args:
        generated: float32 (T,).
        reference: float32 (T',).
        rate: Samples per second of both.
    """
    one, other = (_speech(audio, rate) for audio in (generated, reference))
    cost = frame_distortion(mel_cepstra(one, rate), mel_cepstra(other, rate))
    path = warp(cost)
    left, right = pitch(one, rate), pitch(other, rate)
    at_left, at_right = left[path[:, 0]], right[path[:, 1]]
    both = (at_left > 0) & (at_right > 0)
    cents = 1200.0 * np.log2(at_left[both] / at_right[both])
    seconds, wanted = len(one) / rate, len(other) / rate
    return Acoustics(
        mcd=float(cost[path[:, 0], path[:, 1]].mean()),
        f0_median=median_pitch([left]),
        f0_median_reference=median_pitch([right]),
        f0_rmse=float(np.sqrt((cents**2).mean())) if both.sum() >= LEAST_VOICED else float("nan"),
        voicing_error=float(((at_left > 0) != (at_right > 0)).mean()),
        seconds=seconds,
        seconds_reference=wanted,
        duration_error=abs(seconds - wanted) / wanted,
    )


def _speech(audio: Tensor, rate: int) -> Tensor:
    start, end = speech_bounds(audio, rate)
    return audio.detach().cpu().float()[start:end]
