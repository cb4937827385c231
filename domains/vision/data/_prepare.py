"""Turning drawings out of an archive into a small image set on disk: cleaned, free of duplicates, split.

The result is a folder of PNG files with an `index.csv` (path, label, group, split) and a `counts.json` of what was left
out.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import imagehash
import numpy as np
from PIL import Image, ImageChops, ImageOps

from common.errors import GraftError
from common.splits import SPLITS, Split, stable_hash
from domains.vision.data._images import on_white, progress_bar
from domains.vision.data._records import Contents, Record
from domains.vision.data._splits import assign_splits, near_duplicates

INDEX = "index.csv"
COUNTS = "counts.json"
COLUMNS = ("path", "label", "group", "split")

# Perceptual hashes of 16 x 16 bits, 40 of the 256 apart at most: seen on pairs of drawings, below 30 they are copies,
# recoloured or slightly redrawn; at 30 to 40 variants of one drawing; above 50 mostly different drawings.
_HASH_SIDE = 16
_HASH_DISTANCE = 40

# A drawing of more pixels takes gigabytes to decode; there are a few of up to 623 million.
_MAX_PIXELS = 20_000_000
_MARGIN = 0.04


@dataclass(frozen=True)
class Drawing:
    """An image in an archive.

    Attributes:
        name: Its name in the set.
        label: Its class.
        data: The bytes of the file.
    """

    name: str
    label: str
    data: bytes


@dataclass
class _Clean:
    name: str
    label: str
    image: Image.Image
    content: str


def tidy(data: bytes, side: int) -> Image.Image | Literal["too large", "blank"]:
    """Show a drawing whole: on white, without its empty border, squared with white, at most `side` pixels wide."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            opened = Image.open(io.BytesIO(data))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        return "too large"
    if opened.width * opened.height > _MAX_PIXELS:
        return "too large"
    image = on_white(opened)
    box = _drawn(image)
    if box is None:
        return "blank"
    image = image.crop(box)
    longest = max(image.size)
    image = ImageOps.pad(image, (longest, longest), color="white")
    image = ImageOps.expand(image, border=max(1, round(_MARGIN * longest)), fill="white")
    if image.width > side:
        image = image.resize((side, side), Image.Resampling.LANCZOS)
    return image


def build_set(
    folder: Path,
    drawings: Iterable[Drawing],
    *,
    fractions: Mapping[str, float],
    title: str,
    side: int = 256,
    cap: int | None = None,
) -> None:
    """Clean, deduplicate, group, cap, split and write.

    Args:
        folder: An empty folder.
        drawings: Where the set comes from.
        fractions: Share of each split.
        title: What the progress bar says.
        side: Largest side of an image, in pixels.
        cap: At most this many images of a class, chosen by a hash.
    """
    left_out: dict[str, int] = defaultdict(int)
    clean = _cleaned(drawings, title, side, left_out)
    clean = _unique(clean, left_out)
    hashes, mirrored = (np.stack([_bits(item.image, mirror=m) for item in clean]) for m in (False, True))
    first = near_duplicates(hashes, mirrored, _HASH_DISTANCE)
    groups = {item.content: clean[position].content[:16] for item, position in zip(clean, first, strict=True)}
    if cap is not None:
        clean = _capped(clean, cap, left_out)
    sides = assign_splits([item.label for item in clean], [groups[item.content] for item in clean], fractions)
    rows = []
    for item, split in zip(clean, sides, strict=True):
        path = folder / item.label / f"{item.name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        item.image.save(path)
        rows.append((path.relative_to(folder).as_posix(), item.label, groups[item.content], split))
    write_index(folder, rows, left_out)


def write_index(folder: Path, rows: Iterable[Sequence[str]], left_out: Mapping[str, int]) -> None:
    """Write `index.csv` and `counts.json` of a prepared folder; rows are (path, label, group, split)."""
    with (folder / INDEX).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(sorted(rows))
    (folder / COUNTS).write_text(json.dumps(dict(left_out), indent=1), encoding="utf-8")


def read_index(folder: Path, class_names: Sequence[str]) -> Contents:
    """Read a prepared folder.

    Raises:
        GraftError: The folder is incomplete.
    """
    splits: dict[Split, list[Record]] = {split: [] for split in SPLITS}
    try:
        with (folder / INDEX).open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                splits[row["split"]].append(Record(row["path"], folder / row["path"], row["label"]))
        left_out = json.loads((folder / COUNTS).read_text(encoding="utf-8"))
    except (OSError, KeyError, ValueError) as error:
        raise GraftError(f"The prepared folder {folder} is damaged ({error}): delete it and run again.") from error
    return Contents(splits=splits, class_names=tuple(class_names), left_out=left_out)


def _cleaned(drawings: Iterable[Drawing], title: str, side: int, left_out: dict[str, int]) -> list[_Clean]:
    clean: list[_Clean] = []
    with progress_bar() as bar:
        for drawing in bar.track(list(drawings), description=title):
            image = tidy(drawing.data, side)
            if isinstance(image, str):
                left_out[image] += 1
                continue
            content = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()
            clean.append(_Clean(drawing.name, drawing.label, image, content))
    return clean


def _unique(clean: Sequence[_Clean], left_out: dict[str, int]) -> list[_Clean]:
    """Keep one of each content, by name, and none of a content that stands in two classes."""
    labels: dict[str, set[str]] = defaultdict(set)
    for item in clean:
        labels[item.content].add(item.label)
    kept: dict[str, _Clean] = {}
    for item in sorted(clean, key=lambda item: (item.label, item.name)):
        if len(labels[item.content]) > 1:
            left_out["in two classes"] += 1
        elif item.content in kept:
            left_out["exact duplicates"] += 1
        else:
            kept[item.content] = item
    return list(kept.values())


def _capped(clean: Sequence[_Clean], cap: int, left_out: dict[str, int]) -> list[_Clean]:
    ranks: dict[str, list[str]] = defaultdict(list)
    for item in sorted(clean, key=lambda item: (stable_hash(item.content, "cap"), item.content)):
        ranks[item.label].append(item.content)
    kept = {content for contents in ranks.values() for content in contents[:cap]}
    left_out["over the cap of a class"] += len(clean) - len(kept)
    return [item for item in clean if item.content in kept]


def _drawn(image: Image.Image) -> tuple[int, int, int, int] | None:
    """Find the box of what is not white; None where all is (nearly) white."""
    distance = ImageChops.difference(image, Image.new("RGB", image.size, "white")).convert("L")
    return distance.point(lambda value: 255 if value > 8 else 0).getbbox()


def _bits(image: Image.Image, *, mirror: bool) -> np.ndarray:
    shown = ImageOps.mirror(image) if mirror else image
    return np.asarray(imagehash.phash(shown, hash_size=_HASH_SIDE).hash, dtype=bool).ravel()
