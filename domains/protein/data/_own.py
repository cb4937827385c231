"""What the user's own sets share: checks of every protein, copies, and splits that keep similar ones together."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from common.errors import GraftError, unknown
from common.splits import SPLITS, Split, stable_hash
from domains.protein.data._reading import fault, warn_of_dna
from domains.protein.data._records import SPLIT_NAMES, Contents, Kind, Record
from domains.protein.data._similarity import CLUSTERS, split_by_cluster
from domains.protein.data._splitting import contents, data_card, merge_copies, similarity_split
from domains.protein.data.base import ProteinData, labels_of

Grouping = Literal["kmers", "mmseqs2", "none"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One protein as the user states it.

    Attributes:
        where: Where it stands, for messages ("FILE, line 3").
        record: What was read; not checked yet.
        split: The split it was given; None if none.
        problem: What is wrong besides the sequence; "" if nothing is.
    """

    where: str
    record: Record
    split: Split | None = None
    problem: str = ""


class OwnProteins(ProteinData):
    """The user's own proteins. Subclasses list them (`_list`).

    Every sequence is checked at the start. Copies are merged and sequences with contradictory labels dropped, with a
    warning and counted in `facts.left_out`. Splits that are not given are cut so that neither similar proteins nor a
    stated group stand in two of them, by a hash: they depend on no seed, name or order.

    Args:
        clusters: How similar proteins are found: "kmers" (shared 3-mers up to a median length of 60, else 6-mers),
            "mmseqs2" (the program has to be installed), or "none" (every sequence by itself, for variants of one
            protein).
        val_fraction: Share cut for validation where no such split is given.
        test_fraction: Share cut for the test where no such split is given.
        skip_bad: Leave proteins that cannot be used out and count them, rather than stop at the first.
        **kwargs: See `ProteinData`.

    Raises:
        GraftError: An argument is out of range.
    """

    def __init__(
        self,
        clusters: Grouping = "kmers",
        val_fraction: float = 0.15,
        test_fraction: float = 0.15,
        skip_bad: bool = False,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(**kwargs)
        if clusters not in (*CLUSTERS, "none"):
            raise unknown("way to find similar proteins", clusters, (*CLUSTERS, "none"))
        if not (min(val_fraction, test_fraction) > 0 and val_fraction + test_fraction < 1):
            raise GraftError(
                f"{type(self).__name__}: val_fraction is {val_fraction} and test_fraction is {test_fraction}; both are "
                "above 0, and their sum below 1."
            )
        self.clusters, self.skip_bad = clusters, skip_bad
        self.val_fraction, self.test_fraction = val_fraction, test_fraction

    # ---- what a subclass provides

    def _kind(self) -> Kind:
        raise NotImplementedError

    def _list(self) -> Sequence[Row]:
        """List all proteins."""
        raise NotImplementedError

    # ---- from rows to splits

    def _read(self) -> Contents:
        kind = self._kind()
        rows, skipped = self._usable(self._list())
        records = [row.record for row in rows]
        warn_of_dna([r.sequence for r in records] + [r.second for r in records if r.second], self._name())
        records, sides, left_out = merge_copies(records, [row.split for row in rows], kind)
        if left_out:
            named = ", ".join(f"{count} {why}" for why, count in left_out.items())
            warnings.warn(f"{self._name()}: merged or left out: {named}.", stacklevel=2)
        splits = self._complete(records, sides, kind)
        chosen = [(record, side) for record, side in zip(records, splits, strict=True) if side is not None]
        if len(chosen) < len(records):
            left_out["pairs across splits"] = len(records) - len(chosen)
        records, splits = [record for record, _ in chosen], [side for _, side in chosen]
        stated = any(sides)
        if stated and kind == "pairs":
            self._warn_of_seen(records, splits)
        how = "given" if stated else "random" if self.clusters == "none" else "similarity"
        leak = data_card(records, splits, kind, how) if {"train", "test"} <= set(splits) else {}
        names = sorted({name for record in records for name in labels_of(record.label, kind)} - {""})
        return contents(
            records,
            splits,
            kind,
            () if kind in ("value", "unlabelled") else names,
            left_out,
            leak,
            skipped,
        )

    def _warn_of_seen(self, records: Sequence[Record], sides: Sequence[Split]) -> None:
        seen = {p for r, side in zip(records, sides, strict=True) if side == "train" for p in (r.sequence, r.second)}
        tests = [r for r, side in zip(records, sides, strict=True) if side == "test"]
        known = sum(r.sequence in seen or r.second in seen for r in tests)
        if known:
            warnings.warn(
                f"{self._name()}: {known} of {len(tests)} test pairs hold a protein that training shows, so the score "
                "says little about new proteins.",
                stacklevel=2,
            )

    def _usable(self, rows: Sequence[Row]) -> tuple[list[Row], int]:
        """Leave out, or refuse, what cannot be used."""
        problems = [row.problem or _fault(row.record) for row in rows]
        bad = [f"{row.where}: {problem}" for row, problem in zip(rows, problems, strict=True) if problem]
        if bad and not self.skip_bad:
            more = f" ({len(bad) - 1} more cannot be used either; skip_bad: true leaves all out.)" if bad[1:] else ""
            raise GraftError(f"{bad[0]}{more}")
        return [row for row, problem in zip(rows, problems, strict=True) if not problem], len(bad)

    def _complete(self, records: Sequence[Record], given: Sequence[Split | None], kind: Kind) -> Sequence[Split | None]:
        """Cut the splits that were not given: all of them, or val and test out of train."""
        if not any(given):
            return self._cut(records, kind, SPLITS)
        sides: list[Split | None] = [side or "train" for side in given]
        missing = [split for split in SPLITS if split not in sides]
        if "train" in missing:
            raise GraftError(f"{self._name()} has no proteins in its train split: add some.")
        if missing:
            train = [position for position, side in enumerate(sides) if side == "train"]
            parts = self._cut([records[position] for position in train], kind, ("train", *missing))
            for position, side in zip(train, parts, strict=True):
                sides[position] = side
        return sides

    def _cut(self, records: Sequence[Record], kind: Kind, parts: Sequence[Split]) -> Sequence[Split | None]:
        clusters = None if self.clusters == "none" else self.clusters
        return similarity_split(records, kind, self._fractions(parts), clusters)

    def _fractions(self, parts: Sequence[Split]) -> Mapping[Split, float]:
        asked: dict[Split, float] = {"val": self.val_fraction, "test": self.test_fraction}
        asked = {part: share for part, share in asked.items() if part in parts}
        return {"train": 1 - sum(asked.values()), **asked}


def split_named(text: str) -> tuple[Split | None, str]:
    """Read the name of a split.

    Returns:
        The split, None for an empty text; and what is wrong with it, "" if nothing is.
    """
    split = SPLIT_NAMES.get(text.lower())
    return split, "" if split or not text else str(unknown("split", text, SPLITS))


def cut_by_hash(records: Sequence[Record], fractions: Mapping[Split, float]) -> list[Split]:
    """Choose splits by a hash of the sequence, whatever is similar."""
    names = [f"{stable_hash(record.sequence):016x}" for record in records]
    return split_by_cluster(names, [""] * len(records), fractions)


def _fault(record: Record) -> str:
    found = fault(record.sequence)
    return found or (fault(record.second) if record.second else "")
