"""The user's own images: a folder per class, or a CSV file of paths and labels."""

from __future__ import annotations

import csv
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common._digest import file_digest
from common.errors import GraftError, suggest, unknown
from common.splits import SPLITS, Split
from domains.vision.data._images import SUFFIXES, read_image
from domains.vision.data._records import Contents, Record
from domains.vision.data._splits import assign_splits, tied
from domains.vision.data.base import ImageData

_SPLIT_NAMES: dict[str, Split] = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


class _OwnImages(ImageData):
    """What both forms share: hashed splits where none are given, and the check for images on two sides."""

    _unchecked = True

    def __init__(self, val_fraction: float = 0.15, test_fraction: float = 0.15, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(**kwargs)
        if min(val_fraction, test_fraction) <= 0 or val_fraction + test_fraction >= 1:
            raise GraftError(
                f"val_fraction is {val_fraction} and test_fraction is {test_fraction}: "
                "both must be above 0, and their sum below 1."
            )
        self.val_fraction, self.test_fraction = val_fraction, test_fraction

    def _contents(
        self, records: Sequence[Record], given: Sequence[Split | None], class_names: Sequence[str]
    ) -> Contents:
        """Complete the splits.

        Args:
            records: All images.
            given: The split each was given; None for all of them where there are no splits.
            class_names: The classes, in the order of their labels.
        """
        contents = _contents_of(records)
        _refuse_two_classes(records, contents)
        left_out: dict[str, int] = {}
        if all(split is None for split in given):
            splits: list[Split | None] = [*self._hashed(records, contents, SPLITS)]
        else:
            splits = _without_leaks(given, contents, left_out)
            missing = [split for split in SPLITS if split not in splits]
            if "train" in missing:
                raise GraftError(f"{self._name()} has no images in its train split: add some.")
            train = [position for position, split in enumerate(splits) if split == "train"]
            if missing:
                parts = self._hashed([records[p] for p in train], [contents[p] for p in train], ("train", *missing))
                for position, part in zip(train, parts, strict=True):
                    splits[position] = part
        found: dict[Split, list[Record]] = {split: [] for split in SPLITS}
        for record, side in sorted(zip(records, splits, strict=True), key=lambda pair: pair[0].id):
            if side is not None:
                found[side].append(record)
        return Contents(splits=found, class_names=tuple(class_names), left_out=left_out)

    def _hashed(self, records: Sequence[Record], contents: Sequence[str], parts: Sequence[Split]) -> list[Split]:
        """Cut the missing splits out of images by a hash of their content; copies and stated groups stay together.

        Every class has its share on each side, except where groups hold images of several classes.
        """
        shares = {"val": self.val_fraction, "test": self.test_fraction}
        asked: dict[Split, float] = {part: shares[part] for part in parts if part != "train"}
        fractions: dict[str, float] = {"train": 1 - sum(asked.values()), **asked}
        together = tied(contents, [record.group for record in records])
        labels = [record.label for record in records]
        if len({*zip(together, labels, strict=True)}) > len(set(together)):
            labels = [""] * len(records)
            if len(set(together)) < len(parts):
                raise GraftError(
                    f"{self._name()} has {len(set(together))} groups, too few for {', '.join(parts)}: give a column "
                    "split, or finer groups."
                )
        sides = assign_splits(labels, together, fractions)
        return [_SPLIT_NAMES[side] for side in sides]


class ImageFolder(_OwnImages):
    """Your own images, a folder per class.

    Either `root/CLASS/...` (splits are cut by a hash of each file's content, so they do not depend on names, order or
    seed) or `root/{train,val,test}/CLASS/...`; a missing `val` or `test` is cut out of `train` in the same way. Files
    may lie at any depth below their class: png, jpg, jpeg, bmp, webp and tif. Every file is read once at the start, so
    that a damaged one is named before training begins. A file that stands in two splits is kept on the side nearest to
    `train` and counted in `facts.left_out`.

    Args:
        root: The folder.
        val_fraction: Share of the images cut for validation, where the folder names no such split.
        test_fraction: Share of the images cut for the test, where the folder names no such split.
        **kwargs: See `ImageData`.

    Raises:
        GraftError: A fraction is out of range.
    """

    def __init__(
        self,
        root: str,
        val_fraction: float = 0.15,
        test_fraction: float = 0.15,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(val_fraction=val_fraction, test_fraction=test_fraction, **kwargs)
        self.root = Path(root).expanduser()

    def _name(self) -> str:
        return f"ImageFolder:{self.root.name}"

    def _read(self) -> Contents:
        if not self.root.is_dir():
            raise GraftError(f"There is no folder '{self.root}': give the folder that holds a folder for each class.")
        below = _folders(self.root)
        if below and all(folder.name in _SPLIT_NAMES for folder in below):
            parts: list[tuple[Split | None, Path]] = [(_SPLIT_NAMES[folder.name], folder) for folder in below]
        else:
            parts = [(None, self.root)]
        records: list[Record] = []
        splits: list[Split | None] = []
        empty: list[str] = []
        for split, part in parts:
            for folder in _folders(part):
                files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and _visible(p, part))
                if not files:
                    empty.append(str(folder))
                records += [Record(p.relative_to(self.root).as_posix(), p, folder.name) for p in files]
                splits += [split] * len(files)
        if not records:
            raise GraftError(
                f"There are no images in class folders below '{self.root}': put a folder for each class there, with "
                f"{', '.join(SUFFIXES)} files in it."
            )
        if empty:
            raise GraftError(f"No images in the class folder {', '.join(empty)}: add some, or delete the folder.")
        return self._contents(records, splits, sorted({record.label for record in records}))


class ImageCSV(_OwnImages):
    """Your own images in a CSV file with the columns `path`, `label` and, if you have them, `split` and `group`.

    Paths are relative to `root`. The split is train, val or test; a missing `val` or `test` is cut out of `train`, and
    without the column all splits are cut by a hash of each file's content. Checks are those of `ImageFolder`.

    A `group` is what an image belongs to (a patient, a site, a camera): where splits are cut, its images stay on one
    side (so that the test split is of other groups than the training split), and comparisons report the group that
    fares worst on the test split.

    Args:
        csv: The CSV file (UTF-8, commas).
        root: Folder that the paths start from; by default the folder of the CSV file.
        val_fraction: Share of the images cut for validation, where the file names no such split.
        test_fraction: Share of the images cut for the test, where the file names no such split.
        **kwargs: See `ImageData`.

    Raises:
        GraftError: A fraction is out of range.
    """

    def __init__(
        self,
        csv: str,
        root: str | None = None,
        val_fraction: float = 0.15,
        test_fraction: float = 0.15,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(val_fraction=val_fraction, test_fraction=test_fraction, **kwargs)
        self.csv = Path(csv).expanduser()
        self.root = Path(root).expanduser() if root is not None else self.csv.parent

    def _name(self) -> str:
        return f"ImageCSV:{self.csv.stem}"

    def _read(self) -> Contents:
        rows = _rows(self.csv)
        if not rows:
            raise GraftError(f"{self.csv} lists no images: add a line for each.")
        records: list[Record] = []
        splits: list[Split | None] = []
        seen: dict[str, int] = {}
        absent: list[str] = []
        for line, row in rows:
            where = f"{self.csv}, line {line}"
            path, label = (row["path"] or "").strip(), (row["label"] or "").strip()
            if not path or not label:
                raise GraftError(
                    f"{where}: the {'label' if path else 'path'} is missing; fill it in or delete the line."
                )
            if path in seen:
                raise GraftError(f"{where}: '{path}' stands in line {seen[path]} already; delete one of the two.")
            seen[path] = line
            file = self.root / path
            if not file.is_file():
                absent.append(f"line {line} ('{file}')")
            records.append(Record(path, file, label, (row.get("group") or "").strip()))
            splits.append(_split_of(row, where))
        if absent and not self.skip_bad:
            more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
            raise GraftError(
                f"{self.csv} lists files that do not exist: {', '.join(absent[:3])}{more}. Correct the paths, give the "
                "folder they start from as `root`, or set skip_bad: true to leave them out."
            )
        return self._contents(records, splits, sorted({record.label for record in records}))


def _rows(path: Path) -> list[tuple[int, dict[str, str | None]]]:
    """Read a CSV file as (line number, row) and check its header."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = [name.strip() for name in reader.fieldnames or ()]
            reader.fieldnames = columns
            for needed in ("path", "label"):
                if needed not in columns:
                    hint = suggest(needed, columns).replace("Allowed:", "It has:")
                    raise GraftError(f"{path} has no column '{needed}'.{hint} Correct its first line.")
            return [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise GraftError(f"Cannot read {path} as a CSV file: {error}. Give a UTF-8 file with commas.") from error


def _split_of(row: Mapping[str, str | None], where: str) -> Split | None:
    if "split" not in row:
        return None
    given = (row["split"] or "").strip()
    if given.lower() not in _SPLIT_NAMES:
        raise GraftError(f"{where}: {unknown('split', given, SPLITS)}")
    return _SPLIT_NAMES[given.lower()]


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _visible(path: Path, root: Path) -> bool:
    return not any(part.startswith(".") for part in path.relative_to(root).parts)


def _contents_of(records: Sequence[Record]) -> list[str]:
    """Hash the files; one that cannot be read is no copy of anything (a download that failed often fails alike)."""
    contents = [_content_of(record.path) for record in records]
    counts = Counter(contents)
    damaged: set[str] = set()
    for content, count in counts.items():
        if count > 1:
            try:
                read_image(records[contents.index(content)].path, shorter=8)
            except GraftError:
                # Reported, or skipped and counted, when all images are read.
                damaged.add(content)
    return [record.id if content in damaged else content for record, content in zip(records, contents, strict=True)]


def _content_of(path: Path) -> str:
    try:
        return file_digest(path)
    except OSError:
        # As above: named or skipped when the images are read.
        return f"unreadable {path}"


def _refuse_two_classes(records: Sequence[Record], contents: Sequence[str]) -> None:
    first: dict[str, Record] = {}
    for record, content in zip(records, contents, strict=True):
        other = first.setdefault(content, record)
        if other.label != record.label:
            raise GraftError(
                f"The same image stands in two classes: '{other.id}' ({other.label}) and "
                f"'{record.id}' ({record.label}). Delete the wrong one."
            )


def _without_leaks(
    given: Sequence[Split | None], contents: Sequence[str], left_out: dict[str, int]
) -> list[Split | None]:
    """Take copies of an image out of all splits but the one nearest to training."""
    nearest: dict[str, Split] = {}
    for split in SPLITS:
        for side, content in zip(given, contents, strict=True):
            if side == split:
                nearest.setdefault(content, split)
    kept = [side if nearest.get(content) == side else None for side, content in zip(given, contents, strict=True)]
    leaks = sum(side is not None for side in given) - sum(side is not None for side in kept)
    if leaks:
        left_out["copies across splits"] = leaks
        warnings.warn(
            f"{leaks} image file(s) stand in more than one split; each is kept on the side nearest to train only.",
            stacklevel=2,
        )
    return kept
