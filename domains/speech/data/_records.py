"""What the speech sets are made of: records, batches and facts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from torch import Tensor

from common.splits import Split

SPLIT_NAMES: Mapping[str, Split] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}

Kind = Literal["text", "classes"]

Long = Literal["refuse", "leave_out"]
LONG: tuple[Long, ...] = ("refuse", "leave_out")

SHORT_SECONDS = 20.0
"""A set whose clips all stay below this is short: nothing near Whisper's 30 seconds is in it."""


class SpeechBatch(NamedTuple):
    """A batch of audio, padded at the end to the longest clip.

    Attributes:
        audio: float32 (B, T) in [-1, 1] at `SpeechFacts.rate`, zeros behind the end.
        lengths: int64 (B,), samples of each clip.
        text: B transcripts, normalised by `SpeechFacts.normalizer`; "" for classes.
        target: Classes: int64 (B,), positions in `SpeechFacts.class_names`. Text: int64 (B, 0).
        index: int64 (B,), positions in `SpeechData.records(split)`.
    """

    audio: Tensor
    lengths: Tensor
    text: tuple[str, ...]
    target: Tensor
    index: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One clip.

    Attributes:
        id: Its name inside the dataset, the same on every machine.
        path: The audio file.
        text: Its transcript, normalised once the set is open; "" for classes.
        label: Its class; "" for transcripts.
        speaker: Who speaks; "" where that is not known.
        seconds: How long it is.
        start: Where it begins in the file, in seconds; None for the file's beginning.
        end: Where it ends in the file, in seconds; None for the file's end.
        content: Fingerprint of the audio, so that a changed file is another set; see `_audio.fingerprint`.
    """

    id: str
    path: str
    text: str = ""
    label: str = ""
    speaker: str = ""
    seconds: float = 0.0
    start: float | None = None
    end: float | None = None
    content: str = ""


@dataclass(frozen=True, kw_only=True)
class SpeechFacts:
    """What a task, a report or a reader has to know about a set.

    Attributes:
        kind: "text" for transcripts, "classes" for one class a clip.
        rate: Samples per second of a batch, in Hz.
        language: Language code ("en", "es"); "" where it is not known or there are several.
        normalizer: How texts are normalised; see `domains.speech._text`.
        class_names: Names of the classes; a label is a position in this tuple. Empty for transcripts.
        max_seconds: Longest clip that a batch may hold, slowing down by `speed` included.
        short: Whether `max_seconds` is below `SHORT_SECONDS`, so that a short context pays.
        name: Name of the set.
        digest: sha256 over the sorted (id, split, text, label, stretch, fingerprint of the audio) of all records in
            use: equal digests, equal data and split.
        counts: Number of records in `train`, `val` and `test`.
        seconds: Seconds of audio in `train`, `val` and `test`.
        skipped: Unreadable clips that were left out when the set was opened; those met later are named in warnings.
        left_out: What else was left out and why, in words, with counts.
        confound: The data card of classes. Accuracy on the test split of a linear probe that sees the mean and the
            deviation of each mel band alone (`mel_statistics`), and of the largest training class (`majority`). Where
            the probe is good, voice, room or channel give the class away. Empty for transcripts.
        transcripts: Of all splits: number of `words`, `distinct` texts, texts with a digit (`digits`), and the most
            characters of a text (`longest`). Empty for classes.
        characters: Characters of the normalised training texts, sorted.
        speakers: Speakers known in each split; 0 where none are stated.
    """

    kind: Kind
    rate: int
    language: str
    normalizer: str
    class_names: tuple[str, ...]
    max_seconds: float
    short: bool
    name: str
    digest: str
    counts: Mapping[str, int]
    seconds: Mapping[str, float] = field(default_factory=dict)
    skipped: int = 0
    left_out: Mapping[str, int] = field(default_factory=dict)
    confound: Mapping[str, float] = field(default_factory=dict)
    transcripts: Mapping[str, int] = field(default_factory=dict)
    characters: tuple[str, ...] = ()
    speakers: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a set found; see `SpeechFacts` for the fields."""

    kind: Kind
    splits: Mapping[Split, Sequence[Record]]
    language: str = ""
    class_names: tuple[str, ...] = ()
    skipped: int = 0
    left_out: Mapping[str, int] = field(default_factory=dict)


def digest_of(splits: Mapping[Split, Sequence[Record]]) -> str:
    """Hash all records and their splits to a sha256 that does not depend on their order."""
    rows = sorted(
        (r.id, split, r.text, r.label, f"{r.start}-{r.end}", r.content)
        for split, records in splits.items()
        for r in records
    )
    return hashlib.sha256("".join("\t".join(row) + "\n" for row in rows).encode()).hexdigest()
