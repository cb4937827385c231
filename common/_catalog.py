"""The rows of `data/*.yaml`: what a row holds, and the check that each one is whole."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from common import _sources
from common.errors import GraftError, suggest

Kind = Literal["checkpoint", "dataset"]

_FILES: Mapping[str, Kind] = {"checkpoints.yaml": "checkpoint", "datasets.yaml": "dataset"}
_NAME = re.compile(r"[a-z0-9][a-z0-9.-]*")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One dataset or checkpoint of the catalog.

    Attributes:
        name: The name that recipes use.
        kind: `"checkpoint"` or `"dataset"`; it follows from the file that the row stands in.
        domains: The domains that use it.
        summary: What it is, in a line or two.
        source: Where the file comes from, in one of the forms of `common._sources.FORMS`.
        filename: The file's name in the cache.
        sha256: Digest of the whole file, 64 hex digits.
        size: Bytes of the file.
        members: The members that are read, each with its sha256, or "" where the whole file's digest is enough;
            empty where any member may be read.
        licence: Licence of the content, as far as its source states one.
        citation: Whom to credit.
        split: For a dataset, how train, validation and test sets are made; "" for a checkpoint.
        backbone: For a checkpoint, the library architecture it loads into, for example
            `timm:vit_small_patch14_dinov2`; "" for a dataset.
    """

    name: str
    kind: Kind
    domains: tuple[str, ...]
    summary: str
    source: str
    filename: str
    sha256: str
    size: int
    members: Mapping[str, str] = field(default_factory=dict)
    licence: str
    citation: str
    split: str = ""
    backbone: str = ""


@functools.cache
def read_catalog(folder: Path) -> Mapping[str, Row]:
    """Read and check the catalog files of a folder.

    Raises:
        GraftError: A file is missing, or rows are malformed; every problem of every row is named.
    """
    rows: dict[str, Row] = {}
    files: dict[str, str] = {}
    problems: list[str] = []
    for filename, kind in _FILES.items():
        for name, given in _read_file(folder / filename, problems).items():
            where = f"{filename}, {name}"
            faults = _faults(kind, name, given)
            problems += [f"{where}: {fault}" for fault in faults]
            if faults:
                continue
            if name in rows:
                problems.append(f"{where}: the name is taken by a {rows[name].kind}")
            # Two rows may share an archive, never a file name for different files.
            if files.setdefault(given["filename"], given["sha256"]) != given["sha256"]:
                problems.append(f"{where}: another row has the filename '{given['filename']}' with a different sha256")
            rows[name] = _row(kind, name, given, folder)
    if problems:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise GraftError(f"The catalog in {folder} has {count}: {'; '.join(problems)}.")
    return MappingProxyType(rows)


def _read_file(path: Path, problems: list[str]) -> Mapping[str, Any]:
    # Imported late: PyYAML is not needed by whoever only imports the row type.
    from common._yaml import load_yaml

    if not path.is_file():
        raise GraftError(f"There is no catalog file {path}: run Graft from a clone of its repository.")
    try:
        content = load_yaml(path)
    except GraftError as error:
        problems.append(str(error).rstrip("."))
        return {}
    if not isinstance(content, dict | None):
        problems.append(f"{path.name}: it has to map names to rows")
        return {}
    return {str(name): given for name, given in (content or {}).items()}


def _row(kind: Kind, name: str, given: Mapping[str, Any], folder: Path) -> Row:
    source = given["source"]
    if source.startswith("file:"):
        # A relative path is meant from the catalog's folder; an absolute one stays as it is.
        source = f"file:{folder / source.removeprefix('file:')}"
    whole: dict[str, Any] = {
        **given,
        "source": source,
        "domains": tuple(given["domains"]),
        "members": MappingProxyType(dict(given.get("members") or {})),
    }
    return Row(name=name, kind=kind, **whole)


def _faults(kind: Kind, name: str, given: object) -> list[str]:
    """List what is wrong with one row, each fault with what would be right."""
    if not isinstance(given, dict):
        return ["it has to be a mapping of fields"]
    faults = []
    if not _NAME.fullmatch(name):
        faults.append("a name has lower-case letters, digits, '-' and '.' only")
    texts = {"summary", "source", "filename", "sha256", "licence", "citation"}
    texts.add("split" if kind == "dataset" else "backbone")
    allowed = {entry.name for entry in fields(Row)} - {"name", "kind", "split", "backbone"} | texts
    faults += [f"unknown field '{key}'.{suggest(str(key), allowed)[:-1]}" for key in given if key not in allowed]
    missing = [key for key in sorted(texts) if not (isinstance(given.get(key), str) and given[key].strip())]
    faults += [f"'{key}' has to be a text, and not empty" for key in missing]
    checks: dict[str, tuple[bool, str]] = {
        "domains": (_is_names(given.get("domains")), "a list of one or more domain names"),
        "size": (type(given.get("size")) is int and given["size"] > 0, "a number of bytes above 0"),
        "members": (_is_members(given.get("members")), 'a mapping of member names to a sha256 or ""'),
    }
    present = {key: given[key] for key in texts if key not in missing}
    if "source" in present:
        checks["source"] = (_sources.match(given["source"]) is not None, " or ".join(_sources.FORMS))
    if "sha256" in present:
        checks["sha256"] = (_DIGEST.fullmatch(given["sha256"]) is not None, "64 lower-case hex digits")
    if "filename" in present:
        plain = Path(given["filename"]).name == given["filename"] and not given["filename"].startswith(".")
        checks["filename"] = (plain, "a plain file name without folders")
    return faults + [
        f"'{key}' is {given.get(key)!r} and has to be {want}" for key, (ok, want) in checks.items() if not ok
    ]


def _is_names(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(name, str) and name for name in value)


def _is_members(value: object) -> bool:
    if value is None:
        return True
    return isinstance(value, dict) and all(
        isinstance(name, str) and isinstance(digest, str) and (not digest or _DIGEST.fullmatch(digest))
        for name, digest in value.items()
    )
