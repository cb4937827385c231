"""Who seems to speak: the GE2E speaker embedding, and the long-term spectrum as a second, independent measure."""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from common import artifacts
from common.errors import GraftError
from domains.speech._audio import RATE, resample
from domains.speech._levels import speech_threshold
from domains.speech.voice_metrics._cepstra import mel_power

ROW = "resemblyzer-ge2e"
_MEMBER = "resemblyzer/pretrained.pt"
_BANDS, _WINDOW, _HOP = 40, 400, 160  # mel bands; samples
_PART, _STEP = 160, 77  # frames that the network reads at a time, and from one such part to the next
_COVERED = 0.75  # of the last part, which is left out otherwise
_LEVEL = -30.0  # dBFS that quieter audio is raised to


class SpeakerEncoder(nn.Module):
    """The speaker embedding of Wan et al. (GE2E, arXiv 1710.10467) with the weights of `resemblyzer-ge2e`.

    Three LSTM layers of 256 units read 1.6 s of 40 mel bands (power, no logarithm); the last state passes a linear
    layer and a ReLU and is brought to length one. Longer audio is read in parts that overlap by half, whose embeddings
    are averaged. Embeddings are not negative, so cosines are between 0 and 1. Measured on clips of one to four
    seconds, with the centroid of the others of one voice: .94 a studio voice, .83 and .84 two volunteers; between
    voices .37 to .62. Read a figure beside `speaker_levels`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(_BANDS, 256, 3, batch_first=True)
        self.linear = nn.Linear(256, 256)

    def forward(self, mels: Tensor) -> Tensor:
        """Map mel spectrograms (B, F, 40) to embeddings (B, 256) of length one."""
        _, (hidden, _) = self.lstm(mels)
        return nn.functional.normalize(torch.relu(self.linear(hidden[-1])), dim=1)

    @torch.inference_mode()
    def embed(self, audio: Tensor, rate: int) -> Tensor:
        """Embed a clip.

        Args:
            audio: float32 (T,).
            rate: Samples per second.

        Returns:
            (256,) of length one.
        """
        samples = _loud_enough(resample(audio.detach().cpu().float(), rate, RATE))
        starts = part_starts(len(samples))
        samples = nn.functional.pad(samples, (0, max(0, (starts[-1] + _PART) * _HOP - len(samples))))
        mels = _mel(samples)
        parts = torch.stack([mels[start : start + _PART] for start in starts])
        return nn.functional.normalize(self(parts).mean(dim=0), dim=0)


@functools.cache
def speaker_encoder() -> SpeakerEncoder:
    """Load the speaker embedding from the catalog, once.

    Raises:
        GraftError: It is not in the cache and cannot be fetched, or is damaged.
    """
    whole = torch.load(io.BytesIO(artifacts.read_member(ROW, _MEMBER)), map_location="cpu", weights_only=True)
    model = SpeakerEncoder()
    wanted = model.state_dict()
    missing = sorted(set(wanted) - set(whole["model_state"]))
    if missing:
        raise GraftError(f"'{ROW}' lacks {', '.join(missing)}: fetch it again.")
    model.load_state_dict({name: whole["model_state"][name] for name in wanted})
    return model.eval()


def part_starts(samples: int) -> list[int]:
    """Return the first frames of the parts of a clip that are embedded; the last part may reach beyond its end."""
    frames = math.ceil((samples + 1) / _HOP)
    starts = list(range(0, max(1, frames - _PART + _STEP + 1), _STEP))
    covered = (samples - starts[-1] * _HOP) / (_PART * _HOP)
    return starts[:-1] if covered < _COVERED and len(starts) > 1 else starts


def _mel(audio: Tensor) -> Tensor:
    """Return the power in 40 mel bands, (F, 40), as librosa has it: centred windows, zeros outside the audio."""
    spectrum = torch.stft(
        audio, _WINDOW, _HOP, window=torch.hann_window(_WINDOW), pad_mode="constant", return_complex=True
    )
    return (_bank() @ spectrum.abs().square()).T


@functools.cache
def _bank() -> Tensor:
    """Return Slaney's mel bands, (40, 201)."""
    from torchaudio.functional import melscale_fbanks

    return melscale_fbanks(_WINDOW // 2 + 1, 0.0, RATE / 2, _BANDS, RATE, norm="slaney", mel_scale="slaney").T


def _loud_enough(audio: Tensor) -> Tensor:
    power = float(audio.square().mean())
    return audio * max(1.0, math.sqrt(10 ** (_LEVEL / 10) / power)) if power > 0 else audio


# ---- levels --------------------------------------------------------------------------------------------------------


def centroid(embeddings: Sequence[Tensor]) -> Tensor:
    """Return the mean of embeddings (D,), brought to length one."""
    return nn.functional.normalize(torch.stack(list(embeddings)).mean(dim=0), dim=0)


def similarities(embeddings: Sequence[Tensor], target: Sequence[Tensor]) -> list[float]:
    """Return the cosine of each embedding with the centroid of a speaker's embeddings."""
    centre = centroid(target)
    return [float(one @ centre) for one in embeddings]


def speaker_levels(target: Sequence[Tensor], others: Mapping[str, Sequence[Tensor]], rate: int) -> dict[str, float]:
    """Measure what a speaker similarity can reach and what it starts from, on real clips.

    Args:
        target: Clips (T,) of the target speaker, at least two.
        others: Clips (T,) of other speakers, by name.
        rate: Samples per second of all.

    Returns:
        `same`: mean cosine of each target clip with the centroid of all others of them. `other: NAME`: mean cosine of
        the clips of another speaker with the target's centroid.

    Raises:
        GraftError: Fewer than two clips of the target.
    """
    if len(target) < 2:
        raise GraftError(f"{len(target)} clip of the target speaker; at least 2 are needed to compare them.")
    encoder = speaker_encoder()
    own = [encoder.embed(clip, rate) for clip in target]
    same = [similarities([one], own[:place] + own[place + 1 :])[0] for place, one in enumerate(own)]
    levels = {"same": float(np.mean(same))}
    for name, clips in others.items():
        levels[f"other: {name}"] = float(np.mean(similarities([encoder.embed(clip, rate) for clip in clips], own)))
    return levels


# ---- the second measure --------------------------------------------------------------------------------------------


def long_term_spectrum(clips: Sequence[Tensor], rate: int) -> NDArray[np.float64]:
    """Return the mean power of speech in 40 mel bands up to 7 kHz, in dB around its own mean: (40,).

    The long-term average spectrum (LTAS) is what voice and channel colour everything with, whatever is said.

    Args:
        clips: Clips (T,), float32.
        rate: Samples per second.
    """
    total: Any = 0.0
    for clip in clips:
        power = mel_power(clip, rate)
        levels = 10.0 * np.log10(np.maximum(power.sum(axis=1), 1e-12))
        speech = power[levels >= speech_threshold(levels)]
        # Every clip counts as long as it is, and as loud as any other.
        total = total + speech.sum(axis=0) / max(float(speech.sum(axis=1).mean()), 1e-20)
    decibels = 10.0 * np.log10(np.maximum(total, 1e-12))
    return decibels - decibels.mean()


def spectrum_distance(generated: Sequence[Tensor], reference: Sequence[Tensor], rate: int) -> float:
    """Return the root mean square difference of two long-term spectra, dB.

    It uses no network, so it is independent of a speaker embedding that training looked at; 0 for one voice in one
    channel and much speech. Texts should be the same or many.

    Args:
        generated: Clips (T,) of the one voice.
        reference: Clips (T,) of the other.
        rate: Samples per second of both.
    """
    gap = long_term_spectrum(generated, rate) - long_term_spectrum(reference, rate)
    return float(np.sqrt((gap**2).mean()))
