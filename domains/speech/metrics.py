"""Metrics of speech tasks: word and character error rates with their counts, and accuracy, recall and F1 of classes.

Texts pass through a trainer as tensors of Unicode code points, so that outputs of a batch are one tensor in every task,
and a metric needs no tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jiwer
import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

Unit = Literal["words", "characters"]
EditKind = Literal["substitutions", "deletions", "insertions", "reference"]

_END = -1  # behind the end of a text
_SIGNS = {"equal": "=", "substitute": "S", "delete": "D", "insert": "I"}


def codes_of(texts: Sequence[str]) -> Tensor:
    """Turn B texts into code points, int64 (B, longest), -1 behind the end. Exact in float32 too: below 2^24."""
    longest = max(map(len, texts), default=0)
    rows = [[*map(ord, text), *[_END] * (longest - len(text))] for text in texts]
    return torch.tensor(rows, dtype=torch.long).view(len(texts), longest)


def texts_of(codes: Tensor) -> list[str]:
    """Turn code points (B, L) of any type of number back into texts."""
    return ["".join(chr(code) for code in row if code >= 0) for row in codes.long().tolist()]


# ---- texts ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """How a hypothesis differs from its reference, by the fewest edits of words.

    Attributes:
        steps: (sign, reference word, hypothesis word), with signs = (right), S (another word), D (left out) and I
            (put in); the missing word is "".
    """

    steps: tuple[tuple[str, str, str], ...]

    @property
    def errors(self) -> int:
        """Number of edits."""
        return sum(sign != "=" for sign, *_ in self.steps)

    @property
    def words(self) -> int:
        """Number of reference words."""
        return sum(sign != "I" for sign, *_ in self.steps)

    @property
    def rate(self) -> float:
        """Word error rate; of an empty reference the number of words put in."""
        return self.errors / max(1, self.words)


def align(reference: str, hypothesis: str) -> Alignment:
    """Align two texts word by word."""
    found = jiwer.process_words(reference, hypothesis)
    words, said = found.references[0], found.hypotheses[0]
    steps: list[tuple[str, str, str]] = []
    for chunk in found.alignments[0]:
        left, right = words[chunk.ref_start_idx : chunk.ref_end_idx], said[chunk.hyp_start_idx : chunk.hyp_end_idx]
        for place in range(max(len(left), len(right))):
            one, other = (part[place] if place < len(part) else "" for part in (left, right))
            steps.append((_SIGNS[chunk.type], one, other))
    return Alignment(steps=tuple(steps))


class _Edits(Metric):
    """Counts of edits, summed over all texts and over the processes of a distributed run.

    Args:
        unit: What is compared: words or characters (spaces are characters).
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = False
    substitutions: Tensor
    deletions: Tensor
    insertions: Tensor
    reference: Tensor

    def __init__(self, unit: Unit = "words") -> None:
        super().__init__()
        self.unit: Unit = unit
        for name in ("substitutions", "deletions", "insertions", "reference"):
            self.add_state(name, default=torch.tensor(0), dist_reduce_fx="sum")

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Add a batch of texts, both as code points (B, L); see `codes_of`."""
        hypotheses, references = texts_of(outputs), texts_of(targets)
        if not references:
            return
        count = jiwer.process_words if self.unit == "words" else jiwer.process_characters
        found = count(references, hypotheses)
        self.substitutions += found.substitutions
        self.deletions += found.deletions
        self.insertions += found.insertions
        self.reference += found.hits + found.substitutions + found.deletions


class ErrorRate(_Edits):
    """(substitutions + deletions + insertions) / reference, over all texts together; above 1 where much is put in."""

    def compute(self) -> Tensor:
        """Return the rate as a share, nan without a reference."""
        return (self.substitutions + self.deletions + self.insertions).double().div(self.reference).float()


class EditCount(_Edits):
    """One of the counts behind an error rate.

    Args:
        kind: Which count.
        unit: See `ErrorRate`.
    """

    def __init__(self, kind: EditKind, unit: Unit = "words") -> None:
        super().__init__(unit)
        self.kind: EditKind = kind

    def compute(self) -> Tensor:
        """Return the count."""
        return getattr(self, self.kind).float()


def text_metrics(normalizer: str, suffix: str = "") -> MetricCollection:
    """Build word and character error rate, both as shares, and the counts of words behind the first.

    Args:
        normalizer: Name of the normaliser that both texts went through; it stands in the names of the rates.
        suffix: Added to all names.
    """
    kinds: tuple[EditKind, ...] = ("substitutions", "deletions", "insertions", "reference")
    words: dict[str, Any] = {f"wer_{normalizer}{suffix}": ErrorRate("words")}
    words |= {f"words_{kind}{suffix}": EditCount(kind) for kind in kinds}
    letters: dict[str, Any] = {f"cer_{normalizer}{suffix}": ErrorRate("characters")}
    return MetricCollection(words | letters, compute_groups=[list(words), list(letters)])


# ---- classes -------------------------------------------------------------------------------------------------------


class _Confusion(Metric):
    """Counts of (true class, predicted class).

    Args:
        classes: K.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    counts: Tensor

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.add_state("counts", default=torch.zeros(classes, classes, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Add logits (B, K) and classes (B,)."""
        pairs = targets.long() * self.classes + outputs.argmax(dim=1)
        self.counts += torch.bincount(pairs, minlength=self.classes**2).view(self.classes, self.classes)


class Accuracy(_Confusion):
    """Share of examples whose class is predicted."""

    def compute(self) -> Tensor:
        """Return the share."""
        return self.counts.diagonal().sum() / self.counts.sum()


class UnweightedRecall(_Confusion):
    """Unweighted average recall (UAR): the mean over the classes that occur of the share of each that is found."""

    def compute(self) -> Tensor:
        """Return the mean."""
        sizes = self.counts.sum(dim=1)
        return (self.counts.diagonal() / sizes)[sizes > 0].mean()


class MacroF1(_Confusion):
    """Mean F1 over the classes that occur or are predicted."""

    def compute(self) -> Tensor:
        """Return the mean."""
        both = self.counts.sum(dim=0) + self.counts.sum(dim=1)
        return (2 * self.counts.diagonal() / both)[both > 0].mean()


def class_metrics(classes: int) -> MetricCollection:
    """Build unweighted average recall, macro F1 and accuracy.

    Args:
        classes: K.
    """
    metrics: dict[str, Any] = {
        "uar": UnweightedRecall(classes),
        "macro_f1": MacroF1(classes),
        "accuracy": Accuracy(classes),
    }
    return MetricCollection(metrics, compute_groups=[list(metrics)])
