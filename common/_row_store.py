"""Rows of bytes on disk, found by the digest of what they were computed from; any number of processes may share them.

A store is one folder, named by the SHA-256 of its key. `key.json` spells the key out; each process that adds rows
appends to a segment file of its own, so that none ever waits for another. A record carries a checksum: what a kill or a
bad disk left behind is never served. No row is ever changed or replaced.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import struct
import tempfile
import time
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader, FileIO
from pathlib import Path

from common.artifacts import cache_dir
from common.errors import GraftError

KEY = "key.json"
IDENTITY = 20  # bytes of a row's identity
_HEAD = struct.Struct(f"<4s{IDENTITY}sIQI")  # magic, identity, bytes of the description, bytes of the row, CRC-32
_MAGIC = b"GFR1"
_SUFFIX = ".rows"
_DEFAULT_GB = 20.0
_SPARE = 1_000_000_000  # bytes of the disk that are left to others
_FRESH = 300.0  # seconds since its last use in which a store counts as in use
_REMEASURE = 256_000_000  # bytes written by this process between two looks at what all have written


def root() -> Path:
    """Return the folder of all stores."""
    return cache_dir() / "frozen"


def limit_bytes() -> int:
    """Return how many bytes all stores may take: `$GRAFT_FROZEN_GB`, or else 20 GB.

    Raises:
        GraftError: The variable holds no number above 0.
    """
    given = os.environ.get("GRAFT_FROZEN_GB", "") or str(_DEFAULT_GB)
    try:
        wanted = float(given)
    except ValueError:
        wanted = 0.0
    if not 0 < wanted < float("inf"):
        raise GraftError(f"GRAFT_FROZEN_GB is '{given}'; give the gigabytes that frozen features may take, above 0.")
    return int(wanted * 1e9)


def digest_of(key: Mapping[str, str]) -> str:
    """Return the SHA-256 of a key, whatever the order of its entries."""
    return hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A store on disk, as `graft cache` lists it.

    Attributes:
        folder: Its folder.
        key: Its key; empty where it cannot be read.
        size: Its bytes.
        used: Seconds since the epoch of its last use.
    """

    folder: Path
    key: Mapping[str, str]
    size: int
    used: float


def stores() -> list[Stored]:
    """Return all stores, the one used last first."""
    found = []
    for folder in root().glob("*"):
        key = folder / KEY
        try:
            size = sum(file.stat().st_size for file in folder.iterdir())
            used = key.stat().st_mtime if key.exists() else folder.stat().st_mtime
        except OSError:  # gone meanwhile
            continue
        found.append(Stored(folder=folder, key=_read_key(key) or {}, size=size, used=used))
    return sorted(found, key=lambda stored: -stored.used)


def remove(folder: Path) -> None:
    """Remove a store. It loses its name at once, so that nobody opens half of it; who has it open may read on."""
    gone = folder.with_name(f".gone-{secrets.token_hex(8)}")
    try:
        folder.rename(gone)
        shutil.rmtree(gone)
    except FileNotFoundError:
        return  # another process was faster
    except OSError as error:
        raise GraftError(f"{folder} could not be removed: {error.strerror}. Change its permissions.") from error


def _read_key(path: Path) -> dict[str, str] | None:
    """Read a store's key; None where there is none, or nothing that is one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a record lies."""

    segment: str
    offset: int
    description: int
    body: int
    checksum: int


class RowStore:
    """The rows of one key.

    Args:
        key: All that the rows depend on besides what identifies each: plain texts.

    Raises:
        GraftError: The folder of this key holds another key, or rows without one.
    """

    def __init__(self, key: Mapping[str, str]) -> None:
        self._open: dict[str, BufferedReader] = {}
        self._own: FileIO | None = None
        self.key = dict(key)
        self.folder = root() / digest_of(key)
        self.damaged = 0
        self._places: dict[bytes, _Place] = {}
        self._read_to: dict[str, int] = {}
        self._full = ""  # why no more rows are added
        self._room, self._written, self._touched = 0, _REMEASURE, 0.0
        self._limit = limit_bytes()
        self._claim()
        self.refresh()

    # ---- the folder

    def _claim(self) -> None:
        """Make the folder with its key, or check that the one there is this key's."""
        path = self.folder / KEY
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not path.exists() and not any(self.folder.glob(f"*{_SUFFIX}")):
                with tempfile.NamedTemporaryFile("w", dir=self.folder, delete=False, encoding="utf-8") as file:
                    json.dump(self.key, file, indent=1, sort_keys=True)
                Path(file.name).chmod(0o644)
                Path(file.name).replace(path)
        except OSError as error:
            self._stop(f"{self.folder} cannot be written ({error.strerror})")
        if not self.folder.is_dir():
            return
        if _read_key(path) != self.key:
            raise GraftError(
                f"{self.folder} is not the cache of these frozen features: its {KEY} is missing or says something "
                f"else. Remove it with `graft cache --clear {self.folder.name[:12]}`."
            )
        self._touch()

    def _touch(self) -> None:
        """Note that the store is in use, at most once a minute."""
        now = time.time()
        if now - self._touched > 60 and not self._full:
            self._touched = now
            try:
                os.utime(self.folder / KEY)
            except OSError as error:
                self._stop(f"{self.folder} is gone or cannot be written ({error.strerror})")

    def _stop(self, reason: str) -> None:
        """Add no more rows. They are right without a store, only slower, so this ends no run."""
        if not self._full:
            warnings.warn(f"Frozen features are computed anew from here on: {reason}.", stacklevel=2)
        self._full = reason

    def close(self) -> None:
        """Close all files."""
        for file in (*self._open.values(), *([self._own] if self._own else [])):
            file.close()
        self._open.clear()
        self._own = None

    def __del__(self) -> None:
        self.close()

    # ---- reading

    def refresh(self) -> None:
        """Take note of the rows that other processes have added."""
        for path in sorted(self.folder.glob(f"*{_SUFFIX}")):
            try:
                self._scan(path)
            except OSError:  # evicted meanwhile, or not ours to read: its rows are computed again
                continue

    def _scan(self, path: Path) -> None:
        """Read the heads of the records that stand behind what was read before; stop at one that is not whole."""
        end, offset = path.stat().st_size, self._read_to.get(path.name, 0)
        if offset >= end:
            return
        file = self._file(path)
        while offset + _HEAD.size <= end:
            file.seek(offset)
            head = file.read(_HEAD.size)
            if len(head) < _HEAD.size:
                break
            magic, identity, description, body, checksum = _HEAD.unpack(head)
            start = offset + _HEAD.size
            if magic != _MAGIC or start + description + body > end:
                break
            self._places.setdefault(identity, _Place(path.name, start, description, body, checksum))
            offset = start + description + body
        self._read_to[path.name] = offset

    def _file(self, path: Path) -> BufferedReader:
        if path.name not in self._open:
            self._open[path.name] = path.open("rb")
        return self._open[path.name]

    def __contains__(self, identity: bytes) -> bool:
        return identity in self._places

    def __len__(self) -> int:
        return len(self._places)

    def get(self, identity: bytes) -> tuple[str, memoryview] | None:
        """Return a row's description and bytes (writable, the caller's own); None where there is none.

        A row that no longer has its checksum is none.
        """
        place = self._places.get(identity)
        if place is None:
            return None
        size = place.description + place.body
        data = bytearray(size)
        try:
            file = self._file(self.folder / place.segment)
            file.seek(place.offset)
            got = file.readinto(data)
        except OSError:  # evicted before it was opened, or a bad block: the row is computed again
            got = 0
        if got != size or _checksum(identity, data) != place.checksum:
            self.damaged += 1
            del self._places[identity]
            return None
        self._touch()
        return data[: place.description].decode(), memoryview(data)[place.description :]

    # ---- writing

    def put(self, identity: bytes, description: str, body: bytes | memoryview) -> None:
        """Add a row, unless there is one or no room.

        Args:
            identity: Digest of what it was computed from, 20 bytes.
            description: What its bytes mean.
            body: The bytes.
        """
        if len(identity) != IDENTITY:
            raise ValueError(f"an identity has {IDENTITY} bytes, this one has {len(identity)}")
        self._touch()
        if identity in self._places or self._full:
            return
        data = description.encode() + bytes(body)
        self._make_room(_HEAD.size + len(data))
        if self._full:
            return
        checksum = _checksum(identity, data)
        described = len(description.encode())
        head = _HEAD.pack(_MAGIC, identity, described, len(data) - described, checksum)
        try:
            file = self._segment()
            start = file.seek(0, os.SEEK_END)
            try:
                _write_all(file, head + data)
            except OSError:
                file.truncate(start)
                raise
        except OSError as error:
            self._stop(f"{self.folder} could not be written ({error.strerror})")
            return
        name = Path(str(file.name)).name
        self._places[identity] = _Place(name, start + _HEAD.size, described, len(data) - described, checksum)
        self._read_to[name] = start + len(head) + len(data)

    def _segment(self) -> FileIO:
        """Return this process's own file; unbuffered, so that a killed process loses no whole record."""
        if self._own is None:
            name = f"{time.time_ns():020d}-{os.getpid()}-{secrets.token_hex(4)}{_SUFFIX}"
            self._own = (self.folder / name).open("xb", buffering=0)
            self._file(self.folder / name)  # to be read on, should the store be removed
        return self._own

    def _make_room(self, size: int) -> None:
        """See to it that a record fits: remove stores that nobody uses, oldest first; else add no more."""
        self._written += size
        self._room -= size
        if self._written < _REMEASURE and self._room >= 0:
            return
        self._written = size
        found = stores()
        try:
            free = shutil.disk_usage(self.folder).free - _SPARE
        except OSError as error:
            self._stop(f"{self.folder} is gone ({error.strerror})")
            return
        room = min(self._limit - sum(stored.size for stored in found), free) - size
        idle = [s for s in found if s.folder != self.folder and time.time() - s.used > _FRESH]
        while room < 0 and idle:
            oldest = idle.pop()
            remove(oldest.folder)
            room += oldest.size
        self._room = room
        if room < 0:
            self._stop(
                f"the frozen cache has reached its limit of {self._limit / 1e9:g} GB, or the disk is nearly full; "
                "raise GRAFT_FROZEN_GB, free space, or see `graft cache`"
            )


def _checksum(identity: bytes, data: bytes | bytearray) -> int:
    return zlib.crc32(data, zlib.crc32(identity))


def _write_all(file: FileIO, data: bytes) -> None:
    """Write all of it: an unbuffered file may take a part only."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]
