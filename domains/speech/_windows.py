"""Long audio in pieces that a network can read, cut where it is quietest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

OVERLAP = 0.3
"""Share of a window in whose end the cut is looked for; as much of a window is read twice at most."""

_PAUSE = 0.2  # seconds over which loudness is measured
_STEP = 0.02  # seconds between two places of a cut


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of audio: its first sample and the one behind its last."""

    start: int
    end: int


def pieces_of(audio: Tensor, rate: int, longest: float) -> list[Piece]:
    """Cut audio into stretches of at most so many seconds that follow each other without gap or overlap.

    Each cut lies at the quietest 0.2 s within the last 30 % of the longest stretch that would fit, so words stay whole
    wherever the speaker pauses; without a pause, a cut may go through a word.

    Args:
        audio: float32 (T,).
        rate: Samples per second.
        longest: Most seconds of a stretch.
    """
    most = max(1, int(longest * rate))
    pieces: list[Piece] = []
    start = 0
    while len(audio) - start > most:
        first = start + int(most * (1 - OVERLAP))
        cut = first + _quietest(audio[first : start + most], rate)
        pieces.append(Piece(start, cut))
        start = cut
    return [*pieces, Piece(start, len(audio))]


def _quietest(audio: Tensor, rate: int) -> int:
    """Return the middle of the quietest stretch of audio (T,); of equally quiet ones the last."""
    window, step = round(_PAUSE * rate), max(1, round(_STEP * rate))
    if len(audio) <= window:
        return max(1, len(audio))
    power = functional.avg_pool1d(audio.float().square()[None], window, stride=step)[0]
    last = int((power == power.min()).nonzero()[-1])
    return last * step + window // 2


def is_silent(audio: Tensor) -> bool:
    """Whether there is nothing to hear: a digital silence, for which a recogniser would make something up."""
    return not bool((audio.abs() >= 1e-4).any())


def padded(audio: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Batch stretches (T_i,): audio (B, T) with zeros behind the ends, and lengths (B,)."""
    lengths = torch.tensor([len(one) for one in audio])
    return torch.nn.utils.rnn.pad_sequence(audio, batch_first=True), lengths
