"""Sets made from a catalog row: decoded and split once, then kept in the cache as FLAC files with an index."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from common import artifacts
from common.errors import GraftError
from domains.speech._audio import RATE, fingerprint
from domains.speech.data._records import Record

INDEX = "clips.json"


@dataclass(frozen=True)
class Take:
    """A clip on its way into a prepared set.

    Attributes:
        id: Its name in the set, a path without suffix.
        audio: float32 (T,) at 16 kHz.
        text: Its transcript.
        group: What must not stand in two splits; "" where nothing is stated.
    """

    id: str
    audio: Tensor
    text: str
    group: str = ""


@dataclass(frozen=True)
class Prepared:
    """A prepared set.

    Attributes:
        records: Its clips, in the order of their ids.
        groups: The group of each.
        left_out: What was left out and why, with counts.
    """

    records: Sequence[Record]
    groups: Sequence[str]
    left_out: Mapping[str, int]


Takes = Callable[[dict[str, int]], Iterable[Take]]
"""Lists the clips of a set and counts what it leaves out, in words."""


def prepared(key: str, row: str, takes: Takes) -> Prepared:
    """Return a prepared set, decoding it at the first call.

    Args:
        key: Name of the set in the cache; another one for other rules.
        row: Its catalog row.
        takes: Lists its clips.

    Raises:
        GraftError: The row's file is not in the cache and cannot be fetched, or the prepared folder is damaged.
    """
    folder = artifacts.prepared(f"{key}-{artifacts.row(row).sha256[:12]}", lambda scratch: _build(scratch, takes))
    try:
        whole = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        records = [Record(**{**given, "path": str(folder / given["path"])}) for given in whole["records"]]
        return Prepared(records, whole["groups"], whole["left_out"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise GraftError(f"The prepared folder {folder} is damaged ({error}): delete it and run again.") from error


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """Lend a bar that is seen on a terminal and silent elsewhere."""
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        yield bar


def _build(folder: Path, takes: Takes) -> None:
    import soundfile

    left_out: dict[str, int] = {}
    rows = []
    for take in takes(left_out):
        path = folder / f"{take.id}.flac"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, take.audio.numpy(), RATE, subtype="PCM_16")
        name = path.relative_to(folder).as_posix()
        seconds = len(take.audio) / RATE
        record = Record(id=take.id, path=name, text=take.text, seconds=seconds, content=fingerprint(path))
        rows.append((record, take.group))
    rows.sort(key=lambda row: row[0].id)
    whole = {
        "records": [dataclasses.asdict(record) for record, _ in rows],
        "groups": [group for _, group in rows],
        "left_out": left_out,
    }
    (folder / INDEX).write_text(json.dumps(whole, ensure_ascii=False, indent=0), encoding="utf-8")
