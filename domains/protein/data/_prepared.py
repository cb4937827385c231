"""Sets made from a catalog row: read and split once, then kept in the cache as one file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from common import artifacts
from common.splits import Split
from domains.protein.data._records import Contents, Kind, Record
from domains.protein.data._splitting import contents, data_card, merge_copies, similarity_split

FRACTIONS: Mapping[Split, float] = {"train": 0.5, "val": 0.15, "test": 0.35}

Listing = tuple[Sequence[Record], Mapping[str, int]]
"""Labelled records, copies included, and what was left out, in words, with counts."""


def read_set(
    key: str,
    row: str,
    read: Callable[[], Listing],
    class_names: Sequence[str] = (),
    fractions: Mapping[Split, float] = FRACTIONS,
    stated: Callable[[Record], Split] | None = None,
) -> Contents:
    """Return a set, splitting it at the first call: by similarity, or as its authors published it.

    Args:
        key: Name of the set in the cache; another one for other rules.
        row: Its catalog row.
        read: Lists its records.
        class_names: The classes, in the order of their labels; none for a set without labels.
        fractions: Share of each split.
        stated: The split that was published for a record; None splits by similarity.

    Raises:
        GraftError: The row's file is not in the cache and cannot be fetched.
    """
    kind: Kind = "classes" if class_names else "unlabelled"
    folder = artifacts.prepared(
        f"{key}-{artifacts.row(row).sha256[:12]}", lambda scratch: _build(scratch, read, kind, fractions, stated)
    )
    whole = json.loads((folder / "set.json").read_text(encoding="utf-8"))
    records = [Record(name, sequence, label) for name, sequence, label, _ in whole["records"]]
    sides: list[Split] = [side for *_, side in whole["records"]]
    return contents(records, sides, kind, class_names, whole["left_out"], whole["leak"])


def _build(
    folder: Path,
    read: Callable[[], Listing],
    kind: Kind,
    fractions: Mapping[Split, float],
    stated: Callable[[Record], Split] | None,
) -> None:
    listed, dropped = read()
    given = [stated(record) if stated else None for record in listed]
    records, kept, left_out = merge_copies(listed, given, kind)
    if stated:
        sides, name = [side or "train" for side in kept], "published"
    else:
        sides, name = similarity_split(records, kind, fractions), "similarity"
    whole = {
        "records": [(r.id, r.sequence, r.label, side) for r, side in zip(records, sides, strict=True)],
        "left_out": {**dropped, **left_out},
        "leak": data_card(records, sides, kind, name),
    }
    (folder / "set.json").write_text(json.dumps(whole), encoding="utf-8")
