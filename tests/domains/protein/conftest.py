"""Proteins that can be learned in seconds, two networks of some hundred parameters, and both as a task."""

from __future__ import annotations

import random
from typing import Any

import pytest

from common.splits import SPLITS
from domains import DOMAINS as BUILTIN
from domains import protein
from domains.protein import backbones
from domains.protein._alphabet import STANDARD
from domains.protein.backbones._unirep import Size
from domains.protein.data._records import Contents, Kind, Record
from domains.protein.data.base import ProteinData
from domains.protein.starters import Starter
from domains.protein.tasks import SequenceClassification

DOMAINS = {**BUILTIN, "protein": protein.DOMAIN}
ESM, UNIREP = "esm2-tiny", "unirep-tiny"
COUNTS = {"train": 24, "val": 10, "test": 10}
NAMES: dict[str, tuple[str, ...]] = {
    "classes": ("watery", "oily", "charged"),
    "pairs": ("apart", "bound"),
    "labels": ("oily", "charged"),
    "residues": ("H", "E", "C"),
    "value": (),
    "unlabelled": (),
}
_LETTERS = {"watery": "STNQ", "oily": "AVLIF", "charged": "KRDE"}


def protein_of(kind: str, draw: random.Random) -> str:
    """A sequence of 5 to 12 residues, most of them of one kind."""
    return "".join(draw.choice(_LETTERS[kind] if draw.random() < 0.7 else STANDARD) for _ in range(draw.randint(5, 12)))


class Toy(ProteinData):
    """Proteins of three kinds of residues, and every kind of target that follows from them.

    Args:
        kind: What the targets are.
        names: Names of the classes; the first ones of `NAMES` by default.
        **options: See `ProteinData`.
    """

    def __init__(self, kind: Kind = "classes", names: tuple[str, ...] | None = None, **options: Any) -> None:
        super().__init__(**{"tokens_per_batch": 40} | options)
        self.kind, self.class_names = kind, NAMES[kind] if names is None else names

    def _read(self) -> Contents:
        splits = {split: [self._record(split, number) for number in range(COUNTS[split])] for split in SPLITS}
        return Contents(kind=self.kind, splits=splits, class_names=self.class_names)

    def _record(self, split: str, number: int) -> Record:
        draw = random.Random(f"{split} {number}")
        kinds = list(_LETTERS)[: len(self.class_names) if self.kind == "classes" else None]
        kind = kinds[number % len(kinds)]
        sequence = protein_of(kind, draw)
        shares = {
            name: sum(letter in letters for letter in sequence) / len(sequence) for name, letters in _LETTERS.items()
        }
        second = protein_of(list(_LETTERS)[draw.randrange(3)], draw) if self.kind == "pairs" else ""
        label = {
            "classes": kind,
            "pairs": self.class_names[number % 2] if self.kind == "pairs" else "",
            "labels": ";".join(name for name in ("oily", "charged") if shares[name] > 0.3),
            "value": str(round(40 + 30 * shares["oily"], 3)),
            "residues": "".join(
                "H" if a in "AVLIF" else "E" if a in "KRDE" else "." if a == "G" else "C" for a in sequence
            ),
            "unlabelled": "",
        }[self.kind]
        return Record(f"{split}-{number}", sequence, label, second)


@pytest.fixture
def tiny(monkeypatch):
    """Put the two tiny networks among the starters; both have random weights."""
    starters = {ESM: Starter(name=ESM, layers=2, width=16, heads=2)}
    monkeypatch.setattr(backbones, "STARTERS", {**backbones.STARTERS, **starters})
    monkeypatch.setattr(backbones, "SIZES", {**backbones.SIZES, UNIREP: Size(width=12, layers=2)})


def data_of(kind: Kind = "classes", **options: Any) -> Toy:
    """The datamodule, set up."""
    made = Toy(kind, **options)
    made.setup()
    return made


def task_of(peft: Any, data: ProteinData, cls: type = SequenceClassification, **options: Any) -> Any:
    """A task as a fit would build it, without a trainer."""
    made = cls(peft=peft, **{"backbone": ESM, "pretrained": False, "seed": 1} | options)
    made.facts = data.facts
    made.assemble()
    return made.eval()
