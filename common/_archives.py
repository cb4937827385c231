"""Members of a wheel, a zip file or a Debian package, read one after the other without unpacking to disk."""

from __future__ import annotations

import posixpath
import stat
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

from common.errors import GraftError

if TYPE_CHECKING:
    import tarfile

_AR_MAGIC = b"!<arch>\n"
_AR_HEADER = 60


@dataclass(frozen=True)
class Member:
    """One file or link of an archive.

    Attributes:
        name: Path inside the archive, with forward slashes and without a leading `./`.
        data: The file's bytes; None for a link.
        link: For a link, the name inside the archive that it points at (which may not exist); None for a file.
    """

    name: str
    data: bytes | None
    link: str | None


def iter_members(path: Path, prefix: str = "") -> Iterator[Member]:
    """Read the files and links of an archive in the order in which they are stored.

    A Debian package is decompressed once, front to back, so ask for all that is needed in one pass.

    Args:
        path: A wheel or other zip file, or a Debian package; told apart by content, not by name.
        prefix: Only members whose name starts with this are read.

    Yields:
        The members, folders left out, one in memory at a time.

    Raises:
        GraftError: The file is no such archive, is damaged, or holds a name that leaves the archive.
    """
    path = Path(path)
    with path.open("rb") as file:
        if file.read(len(_AR_MAGIC)) == _AR_MAGIC:
            file.seek(0)
            yield from _deb_members(file, path, prefix)
            return
        if not zipfile.is_zipfile(file):
            raise GraftError(
                f"{path} is neither a wheel or zip file nor a Debian package, or is cut off: fetch it again."
            )
        yield from _zip_members(file, path, prefix)


def _zip_members(file: BinaryIO, path: Path, prefix: str) -> Iterator[Member]:
    try:
        with zipfile.ZipFile(file) as archive:
            for info in archive.infolist():
                name = _clean_name(info.filename, path)
                if info.is_dir() or not name.startswith(prefix):
                    continue
                data = archive.read(info)
                if stat.S_ISLNK(info.external_attr >> 16):
                    yield Member(name, None, _symlink_target(name, data.decode("utf-8", "surrogateescape")))
                else:
                    yield Member(name, data, None)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        raise _damaged(path, error) from error


def _deb_members(file: BinaryIO, path: Path, prefix: str) -> Iterator[Member]:
    import lzma
    import tarfile
    import zlib

    from debian.arfile import ArError, ArFile

    try:
        parts = ArFile(fileobj=file).getmembers()
        end = len(_AR_MAGIC) + sum(_AR_HEADER + part.size + part.size % 2 for part in parts)
        # The last part may lack its padding byte.
        if path.stat().st_size < end - 1:
            raise EOFError(f"{end} bytes announced, {path.stat().st_size} there")
        data_part = next((part for part in parts if part.name.startswith("data.tar")), None)
        if data_part is None:
            raise GraftError(f"{path} is no Debian package: it has no data.tar part.")
        if data_part.name.endswith(".zst"):
            raise GraftError(f"{path}: {data_part.name} cannot be read; xz, gz, bz2 and plain tar can.")
        # "r|*" never seeks back, so the xz stream is decompressed once and not once per member.
        with tarfile.open(fileobj=cast("BinaryIO", data_part), mode="r|*") as archive:
            yield from _tar_members(archive, path, prefix)
    except (ArError, tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError, ValueError) as error:
        raise _damaged(path, error) from error


def _tar_members(archive: tarfile.TarFile, path: Path, prefix: str) -> Iterator[Member]:
    for info in archive:
        name = _clean_name(info.name, path)
        if not name.startswith(prefix):
            continue
        if info.issym():
            yield Member(name, None, _symlink_target(name, info.linkname))
        elif info.islnk():
            yield Member(name, None, posixpath.normpath(info.linkname))
        elif info.isreg():
            content = archive.extractfile(info)
            if content is not None:
                yield Member(name, content.read(), None)


def _clean_name(name: str, path: Path) -> str:
    """Normalise a member's name and refuse one that would land outside a folder it is unpacked into."""
    clean = posixpath.normpath(name)
    if clean.startswith(("/", "..")):
        raise GraftError(f"{path} holds the member '{name}', which leaves the archive: do not use this file.")
    return clean


def _symlink_target(name: str, target: str) -> str:
    """Turn a symbolic link's target, relative to its folder or absolute, into a name inside the archive."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(name), target)).lstrip("/")


def _damaged(path: Path, error: Exception) -> GraftError:
    return GraftError(f"{path} is damaged or cut off ({error}): fetch it again.")
