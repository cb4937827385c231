"""What the user's own sets share: checks of every clip, and splits by speaker and by text."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import GraftError, unknown
from common.splits import SPLITS, Split
from domains.speech._audio import Header, fingerprint, read_header
from domains.speech._text import normalize
from domains.speech.data._records import SPLIT_NAMES, Contents, Kind, Record
from domains.speech.data._splits import part_texts, split_by_group
from domains.speech.data.base import SpeechData


@dataclass(frozen=True, kw_only=True)
class Row:
    """One clip as the user states it.

    Attributes:
        where: Where it stands, for messages ("FILE, line 3").
        record: What was read; its audio not checked yet.
        split: The split it was given; None if none.
        rate: The rate that it is said to have, in Hz; None if nothing is said.
        problem: What is wrong with what is stated; "" if nothing is.
    """

    where: str
    record: Record
    split: Split | None = None
    rate: int | None = None
    problem: str = ""


class OwnSpeech(SpeechData):
    """The user's own clips. Subclasses list them (`_list`).

    Every file's header is read at the start; files that cannot be used are named in a warning, counted in
    `facts.skipped` and left out, and more than `max_bad` of them stop the run. Splits that are not given are cut by a
    hash: by speaker where speakers are stated, else by text (classes: by recording). No transcript stands in two
    splits: clips that would break this are left out and counted, under given splits those of the training side.

    Args:
        language: Language code of all clips ("en", "es"); a multilingual recogniser needs it.
        val_fraction: Share cut for validation where no such split is given.
        test_fraction: Share cut for the test where no such split is given.
        **kwargs: See `SpeechData`.

    Raises:
        GraftError: An argument is out of range.
    """

    def __init__(
        self,
        language: str = "",
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(**kwargs)
        if not (min(val_fraction, test_fraction) > 0 and val_fraction + test_fraction < 1):
            raise GraftError(
                f"{type(self).__name__}: val_fraction is {val_fraction} and test_fraction is {test_fraction}; both are "
                "above 0, and their sum below 1."
            )
        self.language, self.val_fraction, self.test_fraction = language, val_fraction, test_fraction

    # ---- what a subclass provides

    def _kind(self) -> Kind:
        return "text"

    def _list(self) -> tuple[Sequence[Row], Mapping[str, int]]:
        """List all clips, and what was left out already."""
        raise NotImplementedError

    # ---- from rows to splits

    def _read(self) -> Contents:
        kind = self._kind()
        listed, dropped = self._list()
        _refuse_faults(listed)
        rows = self._audible(listed)
        records = [row.record for row in rows]
        given = any(row.split for row in rows)
        sides = self._complete(records, [row.split for row in rows], kind)
        left_out = Counter(dropped)
        kept: list[Split | None] = [*sides]
        if kind == "text":
            kept = part_texts(
                sides, [_spoken(record) for record in records], None if given else self._fractions(SPLITS)
            )
            left_out["text stands in another split"] = kept.count(None)
            if kept.count(None):
                warnings.warn(
                    f"{self._name()}: left out {kept.count(None)} of {len(kept)} clips whose text stands in another "
                    "split too.",
                    stacklevel=2,
                )
        splits: dict[Split, list[Record]] = {side: [] for side in SPLITS}
        for record, side in sorted(zip(records, kept, strict=True), key=lambda pair: pair[0].id):
            if side is not None:
                splits[side].append(record)
        for side in set(sides):
            if not splits[side]:
                raise GraftError(
                    f"{self._name()}: every text of the {side} split stands in another split as well, and no "
                    "transcript may: give it texts of its own."
                )
        names = sorted({record.label for record in records}) if kind == "classes" else []
        return Contents(
            kind=kind,
            splits=splits,
            language=self.language,
            class_names=tuple(names),
            skipped=len(listed) - len(rows),
            left_out=left_out,
        )

    def _audible(self, rows: Sequence[Row]) -> list[Row]:
        """Read the headers; leave out, or refuse, what cannot be used."""
        headers: dict[str, tuple[Header, str] | GraftError] = {}
        kept: list[Row] = []
        bad: list[str] = []
        for row in rows:
            path = row.record.path
            if path not in headers:
                headers[path] = _header(Path(path))
            try:
                kept.append(_measured(row, headers[path]))
            except GraftError as error:
                bad.append(f"{row.where}: {error}")
        if len(bad) > self.max_bad * len(rows):
            raise GraftError(
                f"{self._name()}: {len(bad)} of {len(rows)} clips cannot be used, more than max_bad {self.max_bad:g} "
                f"allows. The first: {bad[0]}"
            )
        for number, reason in enumerate(bad, start=1):
            warnings.warn(f"{self._name()}: clip {number} that is left out: {reason}", stacklevel=2)
        return kept

    def _complete(self, records: Sequence[Record], given: Sequence[Split | None], kind: Kind) -> list[Split]:
        """Cut the splits that were not given: all of them, or val and test out of train."""
        if not any(given):
            return self._cut(records, kind, SPLITS)
        sides: list[Split] = [side or "train" for side in given]
        missing = [split for split in SPLITS if split not in sides]
        if "train" in missing:
            raise GraftError(f"{self._name()} has no clips in its train split: add some.")
        if missing:
            train = [position for position, side in enumerate(sides) if side == "train"]
            parts = self._cut([records[position] for position in train], kind, ("train", *missing))
            for position, side in zip(train, parts, strict=True):
                sides[position] = side
        return sides

    def _cut(self, records: Sequence[Record], kind: Kind, parts: Sequence[Split]) -> list[Split]:
        known = any(record.speaker for record in records)
        groups = [
            f"speaker {r.speaker}" if r.speaker else f"text {_spoken(r)}" if kind == "text" else f"clip {r.content}"
            for r in records
        ]
        strata = ["" if known or kind == "text" else record.label for record in records]
        return split_by_group(groups, strata, self._fractions(parts))

    def _fractions(self, parts: Sequence[Split]) -> Mapping[Split, float]:
        asked: dict[Split, float] = {"val": self.val_fraction, "test": self.test_fraction}
        asked = {part: share for part, share in asked.items() if part in parts}
        return {"train": 1 - sum(asked.values()), **asked}


def row_of(where: str, values: Mapping[str, str], folder: Path, kind: Kind) -> Row:
    """Read one line of a table; what is wrong with it is kept as its problem.

    Args:
        where: Where it stands.
        values: `path`, and `text` or `label`; if there, `id`, `speaker`, `start`, `end` (seconds), `split`, `rate`.
        folder: Where relative paths start.
        kind: Whether `text` or `label` is needed.
    """
    split = SPLIT_NAMES.get(values.get("split", "").lower())
    numbers: dict[str, float | None] = {}
    problem = ""
    for name in ("start", "end", "rate"):
        numbers[name], fault = _number(name, values.get(name, ""))
        problem = problem or fault
    if not split and values.get("split"):
        problem = str(unknown("split", values["split"], SPLITS))
    if not values["path"]:
        problem = "the path is empty; fill it in or delete the line."
    if kind == "text" and not values["text"]:
        problem = "the text is empty; write what is said or delete the line."
    if kind == "classes" and not values["label"]:
        problem = "the label is empty; fill it in or delete the line."
    stated = numbers["start"] is not None or numbers["end"] is not None
    stretch = f"#{values.get('start', '')}-{values.get('end', '')}" if stated else ""
    record = Record(
        id=values.get("id") or f"{values['path']}{stretch}",
        path=str(folder / Path(values["path"]).expanduser()),
        text=values.get("text", "") if kind == "text" else "",
        label=values.get("label", "") if kind == "classes" else "",
        speaker=values.get("speaker", ""),
        start=numbers["start"],
        end=numbers["end"],
    )
    rate = None if numbers["rate"] is None else round(numbers["rate"])
    return Row(where=where, record=record, split=split, rate=rate, problem=problem)


def _number(name: str, text: str) -> tuple[float | None, str]:
    """Read a number, None for an empty text; and say what is wrong with it."""
    if not text:
        return None, ""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    fine = math.isfinite(value) and value >= 0
    return (value, "") if fine else (None, f"{name} is '{text}'; it has to be a number of at least 0.")


def _refuse_faults(rows: Sequence[Row]) -> None:
    seen: dict[str, str] = {}
    bad: list[str] = []
    for row in rows:
        name = row.record.id
        if row.problem:
            bad.append(f"{row.where}: {row.problem}")
        elif name in seen:
            bad.append(
                f"{row.where}: the clip '{name}' stands in {seen[name].rsplit(', ', 1)[-1]} already; list every clip "
                "once, or give each an id of its own."
            )
        seen.setdefault(name, row.where)
    if bad:
        more = f" ({len(bad) - 1} more lines cannot be used either.)" if bad[1:] else ""
        raise GraftError(f"{bad[0]}{more}")


def _header(path: Path) -> tuple[Header, str] | GraftError:
    try:
        return read_header(path), fingerprint(path)
    except GraftError as error:
        return error


def _measured(row: Row, found: tuple[Header, str] | GraftError) -> Row:
    """Write a clip's length and fingerprint into its record.

    Raises:
        GraftError: The file cannot be read, has another rate than stated, or does not hold the stretch.
    """
    if isinstance(found, GraftError):
        raise found
    header, content = found
    record = row.record
    if row.rate is not None and row.rate != header.rate:
        raise GraftError(
            f"{record.path} is declared as {row.rate} Hz and its header says {header.rate} Hz: correct the one that is "
            "wrong."
        )
    start = record.start or 0.0
    end = header.seconds if record.end is None else record.end
    if not start < end <= header.seconds + 0.01:
        raise GraftError(
            f"{record.path} lasts {header.seconds:.2f} s; the stretch from {start:g} to {end:g} s is not in it: "
            "correct start and end."
        )
    seconds = round(min(end, header.seconds) - start, 4)
    return dataclasses.replace(row, record=dataclasses.replace(record, seconds=seconds, content=content))


def _spoken(record: Record) -> str:
    """What is said, the same for texts that differ in capitals and signs alone."""
    return normalize(record.text, "lower") or record.text
