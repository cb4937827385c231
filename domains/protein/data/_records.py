"""What the protein sets are made of: records, batches and facts."""

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
    "test": "test",
    "testing": "test",
}

Kind = Literal["classes", "labels", "value", "residues", "pairs", "unlabelled"]
KINDS: tuple[Kind, ...] = ("classes", "labels", "value", "residues", "pairs", "unlabelled")

Long = Literal["truncate", "window", "refuse"]
LONG: tuple[Long, ...] = ("truncate", "window", "refuse")

IGNORE = -100
"""Label of a residue that has none: in no loss and in no metric."""


class ProteinBatch(NamedTuple):
    """A batch of proteins, padded at the end to the longest.

    Attributes:
        residues: int64 (B, L), positions in `ALPHABET`, `PAD` behind the end.
        mask: bool (B, L), True at residues.
        target: By `ProteinFacts.kind`. Classes and pairs: int64 (B,), positions in `class_names`. Labels: float32
            (B, K) of 0 and 1. Value: float32 (B,), not standardised. Residues: int64 (B, L) with `IGNORE`. Unlabelled:
            int64 (B, 0).
        index: int64 (B,), positions in `ProteinData.records(split)`.
        second: int64 (B, L2), residues of the partner in a pair with `PAD` behind the end; else (B, 0).
    """

    residues: Tensor
    mask: Tensor
    target: Tensor
    index: Tensor
    second: Tensor


@dataclass(frozen=True, slots=True)
class Record:
    """One protein, peptide or pair.

    Attributes:
        id: Its name inside the dataset, the same on every machine.
        sequence: Its residues, capital letters of `ALPHABET`.
        label: Class, or classes with ";" between them, or the value as text, or one letter a residue ("." for none).
        second: Residues of the partner; "" where there is none.
        group: What must not stand in two splits besides similar sequences, and what results are reported by; "" where
            nothing is stated.
    """

    id: str
    sequence: str
    label: str = ""
    second: str = ""
    group: str = ""


@dataclass(frozen=True, kw_only=True)
class ProteinFacts:
    """What a task, a report or a reader has to know about a set.

    Attributes:
        kind: What a target is; see `ProteinBatch.target`.
        class_names: Names of the classes; a label is a position in this tuple. Empty for values and without labels.
        max_length: Most residues of a protein in a batch.
        long: What happens to longer ones: "truncate" keeps their first `max_length` residues; "window" takes a random
            stretch in every epoch and the middle in evaluation (residue labels: all stretches, one after the other);
            "refuse" stops.
        name: Name of the set.
        digest: sha256 over the sorted (id, split, label, sequences) of all records in use: equal digests, equal data
            and split.
        counts: Number of records in `train`, `val` and `test`, and of those longer than `max_length` in `long`.
        mean: Mean of the training values; 0 for other kinds.
        std: Standard deviation of the training values; 1 for other kinds.
        skipped: Unusable records that `skip_bad` left out.
        left_out: What else was left out and why, in words, with counts.
        leak: The data card. Score of the nearest neighbour (by shared 3-mers) on the test records under a random split
            of the same sizes (`random`) and under the split in use (`similarity`, or `given` where the data names its
            splits): accuracy for classes, Spearman's correlation for values; empty for other kinds. A wide gap says how
            much a random split would flatter.
    """

    kind: Kind
    class_names: tuple[str, ...]
    max_length: int
    long: Long
    name: str
    digest: str
    counts: Mapping[str, int]
    mean: float = 0.0
    std: float = 1.0
    skipped: int = 0
    left_out: Mapping[str, int] = field(default_factory=dict)
    leak: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a set found; see `ProteinFacts` for the fields."""

    kind: Kind
    splits: Mapping[Split, Sequence[Record]]
    class_names: tuple[str, ...] = ()
    skipped: int = 0
    left_out: Mapping[str, int] = field(default_factory=dict)
    leak: Mapping[str, float] = field(default_factory=dict)


def digest_of(splits: Mapping[Split, Sequence[Record]]) -> str:
    """Hash all records and their splits to a sha256 that does not depend on their order."""
    rows = sorted((r.id, split, r.label, r.sequence, r.second) for split, records in splits.items() for r in records)
    return hashlib.sha256("".join("\t".join(row) + "\n" for row in rows).encode()).hexdigest()
