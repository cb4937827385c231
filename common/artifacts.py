"""The catalog of datasets and checkpoints, and the cache of their verified files.

A row of `data/*.yaml` says where a file comes from and what its sha256 is; `fetch` brings it into the cache. A file
takes its final name in the cache only after its sha256 was checked. No code of an artifact is ever imported or run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Generator, Mapping
from pathlib import Path

from common import _sources
from common._archives import Member, iter_members
from common._catalog import Row, read_catalog
from common._digest import file_digest
from common.errors import GraftError, unknown

__all__ = [
    "Member",
    "Row",
    "cache_dir",
    "catalog",
    "fetch",
    "is_cached",
    "iter_members",
    "prepared",
    "read_member",
    "row",
]

DATA_FOLDER = Path(__file__).resolve().parents[1] / "data"
_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

# What this process has hashed, for a cache in which no stamp can be written (a shared, read-only one).
_hashed_here: dict[Path, dict[str, object]] = {}


def catalog(folder: Path | None = None) -> Mapping[str, Row]:
    """Read all rows, by name.

    Args:
        folder: The folder of `checkpoints.yaml` and `datasets.yaml`; by default the repository's `data/`.

    Raises:
        GraftError: A file is missing, or rows are malformed; every problem of every row is named.
    """
    return read_catalog(Path(folder or DATA_FOLDER).resolve())


def row(name: str) -> Row:
    """Look up one row.

    Raises:
        GraftError: There is no row of that name.
    """
    rows = catalog()
    if name not in rows:
        raise unknown("dataset or checkpoint", name, rows)
    return rows[name]


def cache_dir() -> Path:
    """Return the cache folder: `$GRAFT_CACHE`, or else the platform's cache folder for "graft"."""
    chosen = os.environ.get("GRAFT_CACHE", "")
    if chosen:
        return Path(chosen).expanduser().absolute()
    import pooch

    return Path(pooch.os_cache("graft"))


def fetch(name: str, *, from_file: Path | None = None, recheck: bool = False) -> Path:
    """Return the cached, verified file of a row; download it first where needed.

    Args:
        name: The row's name.
        from_file: Bring in this local file instead of downloading; it must have the row's sha256.
        recheck: Hash a cached file again even if it has not been touched since it was last verified.

    Raises:
        GraftError: The file cannot be had, is not the expected one, or the cache cannot be written.
    """
    item = row(name)
    path = _archive_path(item)
    if from_file is None and _is_right(item, path, recheck=recheck):
        return path
    with _disk_errors(f"fetching '{name}'"), _lock(item.filename):
        if from_file is not None:
            _bring_in(item, Path(from_file).expanduser().absolute(), path)
        # Another process may have fetched it while this one waited for the lock.
        elif not _is_right(item, path, recheck=recheck):
            _download(item, path)
    return path


def is_cached(name: str) -> bool:
    """Tell whether a row's file is in the cache and right."""
    item = row(name)
    return _is_right(item, _archive_path(item))


def read_member(name: str, member: str) -> bytes:
    """Read one member of a row's file, fetching the file first where needed.

    Args:
        name: The row's name.
        member: The member's name inside the archive.

    Raises:
        GraftError: The row lists its members and not this one, the member is missing, or its sha256 is wrong.
    """
    item = row(name)
    if item.members and member not in item.members:
        raise unknown(f"member of '{name}'", member, item.members)
    path = fetch(name)
    data = next((found.data for found in iter_members(path, member) if found.name == member), None)
    if data is None:
        raise GraftError(f"{path} holds no file '{member}': correct the members of the row '{name}' in data/.")
    digest = item.members.get(member, "")
    if digest and hashlib.sha256(data).hexdigest() != digest:
        raise GraftError(f"The member '{member}' of {path} does not have the sha256 {digest} stated by its row.")
    return data


def prepared(key: str, build: Callable[[Path], None]) -> Path:
    """Return a folder of the cache that is built once, for what is slow to derive from an artifact.

    The folder takes its name only when `build` has returned; other processes wait for it meanwhile.

    Args:
        key: Name of the folder (letters, digits, `.`, `_`, `-`). It has to change with whatever the content depends on.
        build: Fills the empty folder that it is given. If it raises, nothing is kept and the error comes through.

    Returns:
        `cache_dir() / "prepared" / key`.

    Raises:
        GraftError: The cache cannot be written.
        ValueError: The key has other characters.
    """
    return prepared_parts({key: build})[0]


def prepared_parts(builds: Mapping[str, Callable[[Path], None]]) -> list[Path]:
    """Return folders of the cache, each built once; processes that want the same ones share the work.

    A process builds what no other one is building, in the order given, and waits for the rest at the end.

    Args:
        builds: For each folder's key what fills it; see `prepared`.

    Returns:
        The folders, in the order given.

    Raises:
        GraftError: The cache cannot be written.
        ValueError: A key has other characters.
    """
    for key in builds:
        if not _KEY.fullmatch(key):
            allowed = "only letters, digits, '.', '_' and '-' are allowed, a letter or digit first"
            raise ValueError(f"key '{key}': {allowed}")
    others = [key for key, build in builds.items() if not _prepare(key, build, wait=False)]
    for key in others:
        _prepare(key, builds[key], wait=True)
    return [_prepared_path(key) for key in builds]


def _prepared_path(key: str) -> Path:
    return cache_dir() / "prepared" / key


def _prepare(key: str, build: Callable[[Path], None], *, wait: bool) -> bool:
    """Build a folder where it is missing; False where another process is at it and it is not to be waited for."""
    final = _prepared_path(key)
    if final.is_dir():
        return True
    with _disk_errors(f"preparing '{key}'"), _lock(f"prepared-{key}", wait=wait) as mine:
        if mine and not final.is_dir():
            with _workspace(f"prepared-{key}") as scratch:
                build(scratch)
                final.parent.mkdir(parents=True, exist_ok=True)
                scratch.rename(final)
    return mine


def _archive_path(item: Row) -> Path:
    return cache_dir() / "archives" / item.filename


def _download(item: Row, path: Path) -> None:
    label = f"Fetching {item.name}"
    if path.exists():
        label = f"The cached file of {item.name} no longer has its sha256; fetching it again"
    with _workspace(item.filename) as scratch:
        try:
            with _sources.progress(label, scratch, item.size):
                got = _sources.retrieve(item.source, item.filename, item.sha256, scratch)
        except _sources.SourceError as error:
            raise _unobtainable(item, error) from error
        _keep(item, got, path)


def _bring_in(item: Row, given: Path, path: Path) -> None:
    """Copy the user's own file into the cache, if it is the file of the row."""
    wanted = f"the file of '{item.name}' ({item.filename}, {item.size} bytes, sha256 {item.sha256})"
    if not given.is_file():
        raise GraftError(f"There is no file {given}; give the path of {wanted}.")
    if given.stat().st_size != item.size:
        raise GraftError(f"{given} has {given.stat().st_size} bytes and is not {wanted}; the cache is unchanged.")
    with _workspace(item.filename) as scratch:
        try:
            got = _sources.retrieve(f"file:{given}", item.filename, item.sha256, scratch, tries=1)
        except _sources.SourceError as error:
            raise GraftError(f"{given} has another sha256 and is not {wanted}; the cache is unchanged.") from error
        _keep(item, got, path)


def _keep(item: Row, got: Path, path: Path) -> None:
    """Move a verified file to its final name, over an older one, in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    os.replace(got, path)
    _stamp(item, path)


def _unobtainable(item: Row, error: _sources.SourceError) -> GraftError:
    ways = [
        f"obtain the file {item.filename} elsewhere and run `graft fetch {item.name} --from {item.filename}`",
        f"set GRAFT_CACHE to a cache that has it (it is {cache_dir()} now)",
    ]
    if error.remedy:
        ways.insert(0, f"{error.remedy} and run `graft fetch {item.name}`")
    return GraftError(
        f"'{item.name}' ({item.size / 1e6:.0f} MB) is not in the cache and could not be fetched: {error}. "
        f"Either {'; or '.join(ways)}."
    )


# ---- verifying once


def _is_right(item: Row, path: Path, *, recheck: bool = False) -> bool:
    """Check a cached file by its sha256; by its stamp alone where it has not been touched since."""
    if not path.is_file():
        return False
    facts = _facts(item, path)
    if not recheck and facts in (_read_stamp(path), _hashed_here.get(path)):
        return True
    right = file_digest(path) == item.sha256
    if right:
        _stamp(item, path)
    return right


def _facts(item: Row, path: Path) -> dict[str, object]:
    status = path.stat()
    return {"sha256": item.sha256, "size": status.st_size, "mtime_ns": status.st_mtime_ns}


def _stamp_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.verified.json")


def _read_stamp(path: Path) -> object:
    try:
        return json.loads(_stamp_path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        # No stamp, or one cut short: the file is hashed again.
        return None


def _stamp(item: Row, path: Path) -> None:
    facts = _facts(item, path)
    _hashed_here[path] = facts
    # In a read-only cache every process hashes once for itself.
    with contextlib.suppress(OSError):
        _stamp_path(path).write_text(json.dumps(facts), encoding="utf-8")


# ---- the cache on disk


@contextlib.contextmanager
def _lock(name: str, *, wait: bool = True) -> Generator[bool]:
    """Let one process at a time work on a file or folder of the cache; False where it is another's, not waited for."""
    from filelock import FileLock, Timeout

    folder = cache_dir() / ".locks"
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / f"{name}.lock")
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


@contextlib.contextmanager
def _workspace(name: str) -> Generator[Path]:
    """Lend an empty folder on the cache's disk; the holder of the lock also clears what a killed process left in it."""
    scratch = cache_dir() / ".partial" / name
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def _disk_errors(doing: str) -> Generator[None]:
    """Word a refusal of the disk for the user."""
    try:
        yield
    except OSError as error:
        place = error.filename or cache_dir()
        if error.errno in _sources.FULL:
            raise GraftError(
                f"The disk is full ({place}) while {doing}: free some space, or set GRAFT_CACHE to a larger disk."
            ) from error
        if error.errno in _sources.DENIED:
            raise GraftError(
                f"No permission for {place} while {doing}: set GRAFT_CACHE to a folder that you may write."
            ) from error
        if isinstance(error, FileExistsError | NotADirectoryError):
            raise GraftError(
                f"{place} is a file where a folder is needed while {doing}: set GRAFT_CACHE to a folder."
            ) from error
        raise
