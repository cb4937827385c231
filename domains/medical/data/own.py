"""The user's own segmentation sets: a Decathlon-style list of volumes, or folders of images and masks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.errors import GraftError
from common.splits import Split
from domains.medical.data._own import Entry, Listing, OwnVolumes
from domains.medical.data._reading import PICTURES, picture_channels
from domains.medical.data._records import IGNORE, SPLIT_NAMES, Case
from domains.medical.data.prepare import read_labels


class DecathlonData(OwnVolumes):
    """Your own volumes (or 2D images), listed in a JSON file in the style of the Medical Segmentation Decathlon.

    The file has `labels` (`{"0": "background", "1": "liver"}`, or the other way round), `training`, and if you have
    them `validation` and `test`: lists of `{"image": PATH, "label": PATH}`. `image` may be a list of files, one for
    each channel, or the folder of a DICOM series; one 4D file holds all channels where `modality` names as many. An
    entry may have a `subject`; subjects never stand in two splits. Where entries of `training` have a `fold`, those of
    fold `fold` validate. Test entries without a label (as the Decathlon has them) are left out. Paths start at the
    file's folder.

    Args:
        datalist: The JSON file.
        fold: The fold that validates, where entries have folds.
        **kwargs: See `OwnVolumes`.

    Raises:
        GraftError: An argument is out of range.
    """

    def __init__(self, datalist: str, fold: int = 0, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(**kwargs)
        self.datalist, self.fold = Path(datalist).expanduser(), fold

    def _name(self) -> str:
        return f"DecathlonData:{self.datalist.name}"

    def _list(self) -> Listing:
        content = _read_json(self.datalist)
        entries: list[Entry] = []
        for key, rows in content.items():
            split = SPLIT_NAMES.get(key.lower())
            if split is None:
                continue
            if not isinstance(rows, list):
                raise GraftError(f"{self.datalist}: '{key}' has to be a list of images and labels.")
            found = (self._entry(row, split, f"{key}[{number}]") for number, row in enumerate(rows))
            entries += [entry for entry in found if entry is not None]
        if not any(entry.split == "train" for entry in entries):
            raise GraftError(
                f'{self.datalist} lists no training cases: give `training`, a list of {{"image": PATH, "label": PATH}}.'
            )
        files = {len(entry.case.image) for entry in entries}
        if len(files) > 1:
            raise GraftError(f"{self.datalist}: images have {sorted(files)} files: give every image all its channels.")
        named = content.get("modality") or content.get("channel_names") or ("image",)
        each = files.pop()
        return Listing(
            entries=entries,
            class_names=_class_names(content.get("labels"), self.datalist),
            channels=each if each > 1 else len(named),
        )

    def _entry(self, row: Any, split: Split, where: str) -> Entry | None:  # noqa: ANN401
        """Read one entry; None for a test case that nobody labelled."""
        if isinstance(row, str):
            row = {"image": row}
        if not isinstance(row, Mapping) or not row.get("image"):
            raise GraftError(f'{self.datalist}, {where}: it has to be {{"image": PATH, "label": PATH}}.')
        if not row.get("label"):
            if split == "test":
                return None
            raise GraftError(f"{self.datalist}, {where} has no label: add its label map, or delete the entry.")
        images = row["image"] if isinstance(row["image"], list) else [row["image"]]
        if split == "train" and str(row.get("fold")) == str(self.fold):
            split = "val"
        root, subject = self.datalist.parent, row.get("subject")
        case = Case(Path(images[0]).as_posix(), tuple(root / image for image in images), root / row["label"])
        return Entry(case=case, split=split, subject="" if subject is None else str(subject))


class ImageMaskFolder(OwnVolumes):
    """Your own 2D images and masks: `ROOT/images/NAME.png` and `ROOT/masks/NAME.png` with equal names (png, tif, ...).

    A mask holds one class number a pixel: 0 is the background and 255 is "not labelled". Masks of 0 and 255 alone, as
    drawing programs save them, are taken as background and one class. Splits are cut by a hash of the images' content,
    or of the subjects.

    Args:
        root: The folder.
        classes: Names of the classes from 1 on; None numbers them.
        subject_end: Text that ends the subject's name at the start of a file's, such as "_" in "anna_03.png"; None
            takes every image for a subject of its own.
        **kwargs: See `OwnVolumes`, but for `spatial_dims`, which is 2.

    Raises:
        GraftError: An argument is out of range.
    """

    def __init__(
        self,
        root: str,
        classes: Sequence[str] | None = None,
        subject_end: str | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(spatial_dims=2, **kwargs)
        self.root, self.subject_end = Path(root).expanduser(), subject_end
        self.classes = None if classes is None else tuple(classes)
        self._binary = False

    def _name(self) -> str:
        return f"ImageMaskFolder:{self.root.name}"

    def _list(self) -> Listing:
        images, masks = _by_stem(self.root / "images"), _by_stem(self.root / "masks")
        _refuse_lone(images, masks, "image", "mask")
        _refuse_lone(masks, images, "mask", "image")
        values: set[int] = set()
        for mask in masks.values():
            try:
                values |= {*np.unique(read_labels(mask)[0]).tolist()}
            except GraftError:
                # Named, or left out and counted, when the cases are read.
                continue
        self._binary = values == {0, IGNORE}
        highest = 1 if self._binary else max(values - {IGNORE}, default=0)
        names = self.classes or tuple(f"class_{number}" for number in range(1, highest + 1))
        end = self.subject_end
        entries = [
            Entry(case=Case(stem, (path,), masks[stem]), subject=stem.partition(end)[0] if end else "")
            for stem, path in images.items()
        ]
        channels = max(picture_channels(path) for path in images.values())
        return Listing(entries=entries, class_names=("background", *names), channels=channels)

    def _relabelled(self, label: Tensor) -> Tensor:
        return torch.where(label == IGNORE, 1, label) if self._binary else label


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise GraftError(f"There is no file '{path}': give the JSON file that lists your images and labels.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise GraftError(f"Cannot read '{path}' as JSON: {error}. Correct it.") from error
    if not isinstance(content, dict):
        raise GraftError(f"'{path}' has to hold an object with the keys `labels` and `training`.")
    return content


def _class_names(labels: object, path: Path) -> tuple[str, ...]:
    """Read `{"0": NAME}` or `{NAME: 0}` into names in the order of their numbers."""
    wrong = GraftError(
        f'{path}: `labels` is {labels}; give {{"0": "background", "1": NAME, ...}} with numbers from 0 without holes.'
    )
    if not isinstance(labels, Mapping) or not labels:
        raise wrong
    turned = {str(value): key for key, value in labels.items()}
    numbered = labels if all(str(key).isdigit() for key in labels) else turned
    if sorted(numbered, key=str) != sorted(map(str, range(len(labels)))) or len(labels) < 2:
        raise wrong
    return tuple(str(numbered[str(number)]) for number in range(len(labels)))


def _by_stem(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise GraftError(f"There is no folder '{folder}': give a folder with images/ and masks/ in it.")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in PICTURES or path.name.startswith("."):
            continue
        if path.stem in found:
            raise GraftError(f"'{found[path.stem].name}' and '{path.name}' in '{folder}' have one name: rename one.")
        found[path.stem] = path
    if not found:
        raise GraftError(f"There are no images in '{folder}': put some there ({', '.join(PICTURES)}).")
    return found


def _refuse_lone(found: Mapping[str, Path], others: Mapping[str, Path], kind: str, missing: str) -> None:
    alone = sorted({*found} - {*others})
    if alone:
        raise GraftError(
            f"The {kind} '{found[alone[0]]}' has no {missing} of the same name: add it, or delete this one."
        )
