"""What the voice sets are made of: recordings of one speaker, batches and facts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from common.splits import Split
from domains.speech.data._records import Record
from domains.speech.data.voices._quality import Quality


class VoiceBatch(NamedTuple):
    """A batch of recordings, padded at the end to the longest.

    Attributes:
        audio: float32 (B, T) in [-1, 1] at `VoiceFacts.rate`, zeros behind the end.
        lengths: int64 (B,), samples of each recording.
        text: B texts as they are written, with capitals and signs; phonemes are the task's matter.
        index: int64 (B,), positions in `VoiceData.records(split)`.
    """

    audio: Tensor
    lengths: Tensor
    text: tuple[str, ...]
    index: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class VoiceRecord:
    """One recording, ready for use.

    Attributes:
        id: Its name inside the dataset, the same on every machine.
        path: The cleaned recording at `VoiceFacts.rate`: FLAC, one channel.
        text: What is said.
        seconds: Length of the cleaned recording.
        content: Fingerprint of the recording that it was made from.
        pseudo: Whether a recogniser wrote the text.
        confidence: Mean log-probability of a text that a recogniser wrote; 0 for others.
    """

    id: str
    path: str
    text: str
    seconds: float
    content: str
    pseudo: bool = False
    confidence: float = 0.0


@dataclass(frozen=True, kw_only=True)
class VoiceFacts:
    """What a task, a report or a reader has to know about a voice.

    Attributes:
        rate: Samples per second of a batch, in Hz.
        language: Language code ("en", "ru").
        speaker: Who speaks.
        name: Name of the set.
        digest: sha256 over the sorted (id, split, text, fingerprint) of all records in use, and how they are cleaned.
        counts: Number of recordings in `train`, `val` and `test`.
        minutes: Minutes of speech in `train`, `val` and `test`, after silence was cut.
        max_seconds: Longest recording in use.
        pseudo_labelled: Whether any text was written by a recogniser; then every word error rate on this set measures
            agreement with that recogniser, not with what was said.
        pseudo: Number of such texts in `train`, `val` and `test`.
        left_out: What was left out and why, in words, with counts.
        f0_median: Median fundamental frequency of the training recordings, Hz; nan where nothing is voiced.
        quality: Clipping, noise and bandwidth of the recordings as they came.
        faults: What the set falls short of, where it is used nevertheless (`check: warn`).
    """

    rate: int
    language: str
    speaker: str
    name: str
    digest: str
    counts: Mapping[str, int]
    minutes: Mapping[str, float] = field(default_factory=dict)
    max_seconds: float = 0.0
    pseudo_labelled: bool = False
    pseudo: Mapping[str, int] = field(default_factory=dict)
    left_out: Mapping[str, int] = field(default_factory=dict)
    f0_median: float = float("nan")
    quality: Quality | None = None
    faults: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class VoiceSource:
    """What a set found, before it is cleaned.

    Attributes:
        splits: The recordings of each split; no transcript stands in two.
        language: See `VoiceFacts`.
        speaker: See `VoiceFacts`.
        pseudo: For each recording whose text a recogniser wrote, by id, its confidence.
        left_out: See `VoiceFacts`.
    """

    splits: Mapping[Split, Sequence[Record]]
    language: str
    speaker: str
    pseudo: Mapping[str, float] = field(default_factory=dict)
    left_out: Mapping[str, int] = field(default_factory=dict)


def digest_of(splits: Mapping[Split, Sequence[VoiceRecord]], cleaning: str) -> str:
    """Hash all records, their splits and how they are cleaned to a sha256 that does not depend on their order."""
    rows = sorted((r.id, split, r.text, r.content) for split, records in splits.items() for r in records)
    return hashlib.sha256("".join("\t".join(row) + "\n" for row in [*rows, (cleaning,)]).encode()).hexdigest()
