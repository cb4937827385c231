"""Recordings cleaned once and kept in the cache, with what was measured of each."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from common import artifacts
from common.errors import GraftError
from domains.speech._audio import Channel, fingerprint, read_audio, read_header, resample
from domains.speech._levels import cleaned, speech_level
from domains.speech.data._prepared import progress_bar
from domains.speech.data._records import Record
from domains.speech.data.voices._quality import Quality, quality_of

_INDEX = "clips.json"
_QUIETEST = -50.0  # dBFS of speech; raised from below, it is mostly noise
_VERSION = "1"  # of the rules by which recordings are cleaned and measured


@dataclass(frozen=True, kw_only=True)
class Cleaning:
    """How recordings are made ready.

    Attributes:
        rate: Samples per second to reach, Hz.
        level: Level of speech to reach, dBFS.
        margin: Seconds of silence to keep at either end.
        channel: Which channel is taken; see `read_audio`.
    """

    rate: int
    level: float
    margin: float
    channel: Channel

    def __str__(self) -> str:
        """Everything that a cleaned recording depends on, as a text."""
        return f"{_VERSION} {self.rate} {self.level:g} {self.margin:g} {self.channel}"


@dataclass(frozen=True, kw_only=True)
class Ready:
    """A cleaned recording.

    Attributes:
        path: FLAC, one channel.
        samples: Its length.
        quality: Of the recording as it came.
        samples_before: Samples of the recording as it came, at its own rate.
    """

    path: str
    samples: int
    quality: Quality
    samples_before: int


def ready(records: Sequence[Record], cleaning: Cleaning) -> tuple[dict[str, Ready], dict[str, str]]:
    """Return the cleaned recordings by id, cleaning them at the first call; and why others cannot be used, by id.

    Args:
        records: The recordings; their ids differ.
        cleaning: How they are made ready.

    Raises:
        GraftError: The cache cannot be written, or the prepared folder is damaged.
    """
    known = [(r.id, r.content or fingerprint(Path(r.path)), f"{r.start}-{r.end}") for r in records]
    rows = "".join("\t".join(row) + "\n" for row in [*sorted(known), (str(cleaning),)])
    key = f"voice-{hashlib.sha256(rows.encode()).hexdigest()[:24]}"
    folder = artifacts.prepared(key, lambda scratch: _build(scratch, records, cleaning))
    try:
        whole = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        found = {name: _loaded(row, folder) for name, row in whole["ready"].items()}
        return found, whole["unusable"]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise GraftError(f"The prepared folder {folder} is damaged ({error}): delete it and run again.") from error


def _loaded(row: dict[str, object], folder: Path) -> Ready:
    quality = row.pop("quality")
    return Ready(**{**row, "path": str(folder / str(row["path"])), "quality": Quality(**quality)})  # ty: ignore


def _build(folder: Path, records: Sequence[Record], cleaning: Cleaning) -> None:
    import soundfile

    found: dict[str, Ready] = {}
    unusable: dict[str, str] = {}
    with progress_bar() as bar:
        for number, record in enumerate(bar.track(records, description="Cleaning the recordings")):
            try:
                audio, rate = _audible(record, cleaning)
            except GraftError as error:
                unusable[record.id] = str(error)
                continue
            even = cleaned(resample(audio, rate, cleaning.rate), cleaning.rate, cleaning.level, cleaning.margin)
            path = folder / f"{number // 1000}" / f"{number:06d}.flac"
            path.parent.mkdir(exist_ok=True)
            soundfile.write(path, even.numpy(), cleaning.rate, subtype="PCM_16")
            found[record.id] = Ready(
                path=path.relative_to(folder).as_posix(),
                samples=len(even),
                quality=quality_of(audio, rate),
                samples_before=len(audio),
            )
    whole = {"ready": {name: dataclasses.asdict(one) for name, one in found.items()}, "unusable": unusable}
    (folder / _INDEX).write_text(json.dumps(whole, ensure_ascii=False, indent=0), encoding="utf-8")


def _audible(record: Record, cleaning: Cleaning) -> tuple[Tensor, int]:
    """Read a recording at its own rate, which is returned with it.

    Raises:
        GraftError: It cannot be read, or is nearly silent.
    """
    path = Path(record.path)
    rate = read_header(path).rate
    audio = read_audio(path, rate, channel=cleaning.channel, start=record.start, end=record.end)
    level = speech_level(audio, rate)
    if level < _QUIETEST:
        raise GraftError(
            f"{path} is nearly silent (speech at {level:.0f} dBFS, at least {_QUIETEST:g}): record it louder."
        )
    return audio, rate
