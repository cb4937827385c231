"""The user's own proteins: tables and FASTA files, with a label for each protein, residue or pair, or with none."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from common.errors import GraftError, suggest, unknown
from common.splits import Split
from domains.protein.data._own import OwnProteins, Row, cut_by_hash, split_named
from domains.protein.data._reading import clean, read_fasta, read_table
from domains.protein.data._records import Kind, Record
from domains.protein.data.base import UNLABELLED_RESIDUE

LabelKind = Literal["classes", "labels", "value"]
LABEL_KINDS: tuple[LabelKind, ...] = ("classes", "labels", "value")


class ProteinCSV(OwnProteins):
    """Your own proteins in a table with the columns `sequence` and `label`, and optionally `id`, `split` and `group`.

    The split is train, val or test; a missing `val` or `test` is cut out of `train`, and without the column all are cut
    by similarity. Rows with the same `group` (a protein family, a patient, a parent sequence) stay on one side.

    Args:
        csv: The table: UTF-8, commas or tabs, plain or gzipped.
        kind: What a label is: "classes" (the name of one class), "labels" (names with ";" between them, or none), or
            "value" (a number).
        **kwargs: See `OwnProteins`.

    Raises:
        GraftError: An argument is out of range.
    """

    def __init__(self, csv: str, kind: LabelKind = "classes", **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(**kwargs)
        self.csv, self.kind = Path(csv).expanduser(), _checked(kind)

    def _name(self) -> str:
        return f"{type(self).__name__}:{_stem(self.csv)}"

    def _kind(self) -> Kind:
        return self.kind

    def _list(self) -> Sequence[Row]:
        rows = read_table(self.csv, ("sequence", "label"))
        return _unique([_row(where, row, clean(row["sequence"]), self.kind) for where, row in rows])


class ProteinFASTA(OwnProteins):
    """Your own proteins in a FASTA file, and a table of their labels with the columns `id` and `label`.

    An entry's id is the first word of its header. The table may have the columns `split` and `group`, as in
    `ProteinCSV`. Every entry needs a label, and every label an entry.

    Args:
        fasta: The FASTA file, plain or gzipped.
        labels: The table: UTF-8, commas or tabs, plain or gzipped.
        kind: What a label is; see `ProteinCSV`.
        **kwargs: See `OwnProteins`.

    Raises:
        GraftError: An argument is out of range.
    """

    def __init__(self, fasta: str, labels: str, kind: LabelKind = "classes", **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(**kwargs)
        self.fasta, self.labels = Path(fasta).expanduser(), Path(labels).expanduser()
        self.kind = _checked(kind)

    def _name(self) -> str:
        return f"ProteinFASTA:{_stem(self.fasta)}"

    def _kind(self) -> Kind:
        return self.kind

    def _list(self) -> Sequence[Row]:
        entries = {entry.id: entry for entry in read_fasta(self.fasta)}
        rows: list[Row] = []
        for where, row in read_table(self.labels, ("id", "label")):
            entry = entries.get(row["id"])
            made = _row(where, row, entry.sequence if entry else "", self.kind)
            if entry is None:
                hint = suggest(row["id"], list(entries)[:1000]).split(" Allowed:")[0]
                problem = f"there is no entry '{row['id']}' in {self.fasta}.{hint} Correct the id or delete the line."
                made = Row(where=where, record=made.record, problem=problem)
            rows.append(made)
        _unique(rows)
        labelled = {row.record.id for row in rows}
        for name, entry in entries.items():
            if name not in labelled:
                where = f"{self.fasta}, line {entry.line}"
                problem = f"'{name}' has no label in {self.labels}; add a line for it."
                rows.append(Row(where=where, record=Record(name, entry.sequence), problem=problem))
        return rows


class ResidueCSV(OwnProteins):
    """Your own proteins with a label for each residue (secondary structure, disorder, binding sites).

    The table has the columns `sequence` and `labels`, two texts of equal length: one letter a residue, "." where there
    is no label. Optional columns are those of `ProteinCSV`.

    Args:
        csv: The table: UTF-8, commas or tabs, plain or gzipped.
        **kwargs: See `OwnProteins`.

    Raises:
        GraftError: An argument is out of range.
    """

    def __init__(self, csv: str, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(**kwargs)
        self.csv = Path(csv).expanduser()

    def _name(self) -> str:
        return f"ResidueCSV:{_stem(self.csv)}"

    def _kind(self) -> Kind:
        return "residues"

    def _list(self) -> Sequence[Row]:
        made = []
        for where, row in read_table(self.csv, ("sequence", "labels")):
            sequence, label = clean(row["sequence"]), row["labels"]
            if row["sequence"].endswith("*") and len(label) == len(sequence) + 1:
                label = label[:-1]
            made.append(_row(where, {**row, "label": label}, sequence, "residues"))
        return _unique(made)


class PairCSV(OwnProteins):
    """Pairs of your own proteins (do they interact?) in a table with the columns `a`, `b` (sequences) and `label`.

    The order within a pair says nothing. Without a column `split`, proteins are split by similarity and only pairs with
    both partners on one side are used, so no protein of a test pair, nor one like it, was seen in training; the others
    are counted in `facts.left_out`. Validation and test then hold about the square of their share of the pairs.

    Args:
        csv: The table: UTF-8, commas or tabs, plain or gzipped; optional columns are `id` and `split`.
        val_fraction: Share of the proteins cut for validation where no such split is given.
        test_fraction: Share of the proteins cut for the test where no such split is given.
        **kwargs: See `OwnProteins`.

    Raises:
        GraftError: An argument is out of range.
    """

    def __init__(
        self,
        csv: str,
        val_fraction: float = 0.2,
        test_fraction: float = 0.3,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(val_fraction=val_fraction, test_fraction=test_fraction, **kwargs)
        self.csv = Path(csv).expanduser()

    def _name(self) -> str:
        return f"PairCSV:{_stem(self.csv)}"

    def _kind(self) -> Kind:
        return "pairs"

    def _list(self) -> Sequence[Row]:
        made = []
        for where, row in read_table(self.csv, ("a", "b", "label")):
            second = clean(row["b"])
            missing = "" if second else "the partner b is empty; fill it in or delete the line."
            made.append(_row(where, row, clean(row["a"]), "pairs", second, missing))
        return _unique(made)

    def _cut(self, records: Sequence[Record], kind: Kind, parts: Sequence[Split]) -> Sequence[Split | None]:
        proteins = sorted({sequence for record in records for sequence in (record.sequence, record.second)})
        listed = [Record(sequence, sequence) for sequence in proteins]
        side = dict(zip(proteins, super()._cut(listed, "unlabelled", parts), strict=True))
        return [side[r.sequence] if side[r.sequence] == side[r.second] else None for r in records]


class FLIP(ProteinCSV):
    """A split file of the FLIP benchmark (Dallago et al. 2021) or one in its layout.

    Columns: `sequence`, `target`, `set` (train or test) and `validation` (True within the train set, or empty). The
    benchmark's splits are used as they are, copies excepted. Where no row is marked for validation, a tenth of train
    is, by a hash of the sequence.

    Args:
        csv: The split file, plain or gzipped.
        kind: What a target is: "value" or "classes".
        **kwargs: See `OwnProteins`.

    Raises:
        GraftError: An argument is out of range.
    """

    def __init__(self, csv: str, kind: LabelKind = "value", **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(csv, kind, **kwargs)

    def _list(self) -> Sequence[Row]:
        made = []
        for where, row in read_table(self.csv, ("sequence", "target", "set")):
            chosen = row["set"].lower()
            if chosen == "train" and row.get("validation", "").lower() in ("true", "1", "1.0"):
                chosen = "val"
            whole = {**row, "label": row["target"], "split": chosen}
            missing = "" if chosen else "the set is missing; write train or test, or delete the line."
            made.append(_row(where, whole, clean(row["sequence"]), self.kind, problem=missing))
        return _unique(made)

    def _cut(self, records: Sequence[Record], kind: Kind, parts: Sequence[Split]) -> Sequence[Split | None]:
        return cut_by_hash(records, {part: 0.9 if part == "train" else 0.1 / (len(parts) - 1) for part in parts})


class Unlabelled(OwnProteins):
    """Proteins without labels in a FASTA file, to adapt a language model to (masked or next residues).

    Args:
        fasta: The FASTA file, plain or gzipped.
        **kwargs: See `OwnProteins`.

    Raises:
        GraftError: An argument is out of range.
    """

    def __init__(self, fasta: str, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(**kwargs)
        self.fasta = Path(fasta).expanduser()

    def _name(self) -> str:
        return f"Unlabelled:{_stem(self.fasta)}"

    def _kind(self) -> Kind:
        return "unlabelled"

    def _list(self) -> Sequence[Row]:
        return [
            Row(where=f"{self.fasta}, line {entry.line} ('{entry.id}')", record=Record(entry.id, entry.sequence))
            for entry in read_fasta(self.fasta)
        ]


def _row(where: str, row: Mapping[str, str], sequence: str, kind: Kind, second: str = "", problem: str = "") -> Row:
    """Read one line of a table; what is wrong with it is kept as its problem."""
    split, wrong_split = split_named(row.get("split", ""))
    # Without ids a row is named after its line, which is where a user would look for it.
    name = row.get("id", "") or where.rsplit(", ", 1)[-1]
    record = Record(name, sequence, row["label"], second, row.get("group", ""))
    problem = problem or wrong_split or _label_problem(row["label"], sequence, kind)
    return Row(where=where, record=record, split=split, problem=problem)


def _label_problem(label: str, sequence: str, kind: Kind) -> str:
    if not label and kind != "labels":
        return "the label is missing; fill it in or delete the line."
    if kind == "value":
        try:
            finite = math.isfinite(float(label))
        except ValueError:
            finite = False
        return "" if finite else f"the label '{label}' is no number; correct it, or set kind: classes."
    if kind == "residues" and len(label) != len(sequence):
        return (
            f"there are {len(label)} labels for {len(sequence)} residues; write one letter a residue, "
            f"'{UNLABELLED_RESIDUE}' where there is no label."
        )
    return ""


def _unique(rows: Sequence[Row]) -> Sequence[Row]:
    """Refuse an id that stands twice."""
    seen: dict[str, str] = {}
    for row in rows:
        name = row.record.id
        if name in seen:
            raise GraftError(
                f"{row.where}: the id '{name}' stands in {seen[name].rsplit(', ', 1)[-1]} already; give every protein "
                "an id of its own."
            )
        seen[name] = row.where
    return rows


def _checked(kind: LabelKind) -> LabelKind:
    if kind not in LABEL_KINDS:
        raise unknown("kind of label", kind, LABEL_KINDS)
    return kind


def _stem(path: Path) -> str:
    return path.name.split(".")[0]
