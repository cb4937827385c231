"""Figures of generated speech as torchmetrics, so that voices are evaluated and recorded as any other task is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from domains.speech.voice_metrics import Part, score_rows, spectrum_distance, summary

FIGURES: dict[Part, tuple[str, ...]] = {
    "acoustics": (
        "mcd",
        "f0_rmse",
        "voicing_error",
        "duration_error",
        "f0_median",
        "f0_median_reference",
        "f0_gap",
        "duration_ratio",
    ),
    "words": ("wer",),
    "speaker": ("speaker_similarity", "spectrum_distance"),
}
"""What each part of `score_rows` comes to, by the names of `summary`."""


def packed(waves: Sequence[Tensor], texts: Sequence[str]) -> Tensor:
    """Put waveforms (T_i,) and their texts into one float tensor, (B, 2 + U + T), as evaluation hands on tensors.

    A row is the number of samples, the number of code points, the code points, zeros up to U, the samples, zeros.
    """
    longest, written = max(map(len, waves), default=0), max(map(len, texts), default=0)
    found = torch.zeros(len(waves), 2 + written + longest)
    for row, wave, text in zip(found, waves, texts, strict=True):
        row[0], row[1] = len(wave), len(text)
        row[2 : 2 + len(text)] = torch.tensor([float(ord(letter)) for letter in text])
        row[2 + written : 2 + written + len(wave)] = wave.detach().cpu()
    return found


def unpacked(rows: Tensor) -> tuple[list[Tensor], list[str]]:
    """Return the waveforms and texts of what `packed` made."""
    rows = rows.detach().cpu()
    written = int(rows[:, 1].max()) if len(rows) else 0
    waves = [row[2 + written : 2 + written + int(row[0])] for row in rows]
    return waves, ["".join(chr(int(code)) for code in row[2 : 2 + int(row[1])]) for row in rows]


class Collected:
    """Utterances, their recordings and texts, shared by the figures of a collection."""

    def __init__(self, rate: int, parts: Sequence[Part], language: str) -> None:
        self.rate, self.parts, self.language = rate, tuple(parts), language
        self.generated: list[Tensor] = []
        self.reference: list[Tensor] = []
        self.texts: list[str] = []
        self.rows: list[dict[str, Any]] = []
        self._last: tuple[Tensor, Tensor] | None = None
        self._figures: dict[str, float] = {}

    def add(self, output: Tensor, target: Tensor) -> None:
        """Take a batch in; a second figure that brings the same one adds nothing."""
        if self._last is not None and self._last[0] is output and self._last[1] is target:
            return
        self._last, self._figures = (output, target), {}
        self.generated += unpacked(output)[0]
        waves, texts = unpacked(target)
        self.reference += waves
        self.texts += texts

    def figures(self) -> dict[str, float]:
        """Return all figures, computed once; the rows behind them stay in `rows`."""
        if not self._figures and self.texts:
            options = {"parts": self.parts, "language": self.language}
            self.rows = score_rows(self.generated, self.reference, self.texts, self.rate, **options)
            self._figures = summary(self.rows)
            if "speaker" in self.parts:
                distance = spectrum_distance(self.generated, self.reference, self.rate)
                self._figures["spectrum_distance"] = distance
        return self._figures

    def clear(self) -> None:
        """Forget the utterances; `rows` stay until others are measured."""
        self.generated, self.reference, self.texts, self._figures, self._last = [], [], [], {}, None


class Figure(Metric):
    """One figure of all utterances together.

    Args:
        name: Its name in `FIGURES`.
        collected: Where the utterances are kept.
    """

    full_state_update = False

    def __init__(self, name: str, collected: Collected) -> None:
        super().__init__()
        self.name, self.collected = name, collected

    def update(self, output: Tensor, target: Tensor) -> None:
        """Take a batch of `packed` utterances and recordings in."""
        self.collected.add(output, target)

    def compute(self) -> Tensor:
        """Return the figure, nan where nothing was measured."""
        return torch.tensor(self.collected.figures().get(self.name, float("nan")))

    def reset(self) -> None:
        """Forget all utterances."""
        super().reset()
        self.collected.clear()


def voice_figures(rate: int, parts: Sequence[Part], language: str) -> MetricCollection:
    """Build the figures of some parts over one shared list of utterances."""
    collected = Collected(rate, parts, language)
    names = [name for part in parts for name in FIGURES[part]]
    found: dict[str, Metric | MetricCollection] = {name: Figure(name, collected) for name in names}
    return MetricCollection(found, compute_groups=False)
