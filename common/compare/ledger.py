"""The ledger of a folder of runs: what was measured, noted when it was measured, so that a later edit shows.

`ledger.jsonl` has a line for each fit, test, baseline and preparation that ended well, with digests of what it left; a
result that was there before the ledger is noted as `found`. Each line holds the digest of the line before it, so that a
line that is changed or taken out breaks the chain.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common.compare.prepared import adapter_digest

LEDGER = "ledger.jsonl"
_LATER = ("test", "adapter")  # what a run has only some time after its fit
_PARTS = ("val", "data", "test", "predictions", "adapter")
_START = hashlib.sha256(b"").hexdigest()


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line.

    Attributes:
        event: `fit`, `test` or `baseline`; `prepare` and `export` for what methods start from; `found` for a result
            that was there before.
        run: The run folder, seen from the folder of runs.
        digests: sha256 of the parts of the run's record: `val`, `data`, once it was tested `test`, `predictions`, and
            of a preparation's exported adapter `adapter`.
        time: When it was noted, UTC.
    """

    event: str
    run: str
    digests: Mapping[str, str]
    time: str


class Ledger:
    """The ledger of one folder of runs; one process at a time writes it.

    Args:
        folder: The folder of runs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / LEDGER
        self.entries, self.broken = _read(self.path)

    def note(self, event: str, run: Path) -> None:
        """Add a line about a run folder that holds a result."""
        entry = Entry(
            event=event,
            run=run.relative_to(self.folder).as_posix(),
            digests=digests_of(run),
            time=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        lines = _lines(self.path)
        previous = _digest(lines[-1]) if lines else _START
        record = {"event": entry.event, "run": entry.run, **entry.digests, "time": entry.time, "previous": previous}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            file.write(b"".join((json.dumps(record).encode(), b"\n")))
            file.flush()
            os.fsync(file.fileno())
        self.entries.append(entry)

    def of(self, run: Path) -> list[Entry]:
        """Return the lines about a run folder, the oldest first."""
        name = run.relative_to(self.folder).as_posix()
        return [entry for entry in self.entries if entry.run == name]

    def adopt(self, runs: Sequence[Path]) -> None:
        """Note the results that are there and have no line, or none since they were tested or exported."""
        for run in runs:
            found = digests_of(run)
            noted = {key for entry in self.of(run) for key in entry.digests}
            if found and (not noted or any(key in found and key not in noted for key in _LATER)):
                self.note("found", run)


def digests_of(run: Path) -> dict[str, str]:
    """Take the digests of what a run folder holds; none where it holds no readable result."""
    try:
        record = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
        parts = {key: record[key] for key in ("val", "data", "test") if record.get(key) is not None}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # what cannot be read is no result; whoever needs it says so
    found = {key: _digest(json.dumps(value, sort_keys=True).encode()) for key, value in parts.items()}
    predictions = run / "predictions.jsonl"
    if "test" in found and predictions.is_file():
        found["predictions"] = _digest(predictions.read_bytes())
    adapter = adapter_digest(run)
    return found | ({"adapter": adapter} if found and adapter else {})


def _read(path: Path) -> tuple[list[Entry], bool]:
    """Read the entries, and whether the chain is broken."""
    entries: list[Entry] = []
    previous, broken = _START, False
    for line in _lines(path):
        record = _parsed(line)
        broken = broken or record is None or record.get("previous") != previous
        previous = _digest(line)
        if record is not None:
            digests = {key: record[key] for key in _PARTS if key in record}
            told = {key: str(record.get(key, "")) for key in ("event", "run", "time")}
            entries.append(Entry(**told, digests=digests))
    return entries, broken


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _lines(path: Path) -> list[bytes]:
    """Read the whole lines; what a killed process left of a line is cut off."""
    if not path.is_file():
        return []
    *lines, rest = path.read_bytes().split(b"\n")
    if rest:
        path.write_bytes(b"".join(line + b"\n" for line in lines))
    return lines


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
