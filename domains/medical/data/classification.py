"""Sets whose images have one label each: a CSV file of the user's own, or a MedMNIST file."""

from __future__ import annotations

import csv
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.errors import GraftError, suggest, unknown
from common.splits import SPLITS, Split
from domains.medical.data._dataset import Loaded
from domains.medical.data._own import Entry, Listing, OwnVolumes, content_of
from domains.medical.data._records import SPLIT_NAMES, Case
from domains.medical.data.base import Contents, VolumeData


class VolumeCSV(OwnVolumes):
    """Your own volumes or images with one class each, listed in a CSV file.

    Its columns are `path`, `label` and, if you have them, `split` and `subject`. A path is a NIfTI file, a picture, or
    a DICOM file or series folder. Every image is scaled to fit into `patch_size` and padded with zeros; colours become
    grey. A missing `val` or `test` split is cut out of `train`; without the column all are cut by a hash of the
    subject, or of the image's content where there is none.

    Args:
        csv: The file, UTF-8.
        root: Folder from which relative paths start; None takes the file's folder.
        **kwargs: See `OwnVolumes`; `patch_size` is the size of all images.

    Raises:
        GraftError: An argument is out of range.
    """

    _classification = True
    _eval_batch = True

    def __init__(self, csv: str, root: str | None = None, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(**kwargs)
        self.csv = Path(csv).expanduser()
        self.root = self.csv.parent if root is None else Path(root).expanduser()

    def _name(self) -> str:
        return f"VolumeCSV:{self.csv.name}"

    def _size(self) -> list[int]:
        return [*self.patch_size]

    def _list(self) -> Listing:
        entries: list[Entry] = []
        for line, row in _rows(self.csv):
            path, label = (row["path"] or "").strip(), (row["label"] or "").strip()
            if not path or not label:
                missing = "label" if path else "path"
                raise GraftError(f"{self.csv}, line {line}: the {missing} is missing; fill it in or delete the line.")
            given = (row.get("split") or "").strip().lower()
            if "split" in row and given not in SPLIT_NAMES:
                raise GraftError(f"{self.csv}, line {line}: {unknown('split', given, SPLITS)}")
            subject = (row.get("subject") or "").strip()
            case = Case(path, (self.root / path,), target=label)
            entries.append(Entry(case=case, split=SPLIT_NAMES.get(given), subject=subject))
        names = tuple(sorted({entry.case.target for entry in entries}))
        if len(names) < 2:
            raise GraftError(f"{self.csv} needs at least 2 classes to tell apart and has {len(names)}: add another.")
        return Listing(entries=entries, class_names=names, channels=1)


class MedMNIST(VolumeData):
    """One set of MedMNIST (Yang et al. 2023) from its file, 2D or 3D, with the official splits.

    Args:
        file: The file, such as `pneumoniamnist.npz` or `organmnist3d.npz`.
        classes: Names of the classes; None numbers them.
        **kwargs: See `VolumeData`.

    Raises:
        GraftError: An argument is out of range.
    """

    _eval_batch = True

    def __init__(self, file: str, classes: Sequence[str] | None = None, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(**kwargs)
        self.file, self.classes = Path(file).expanduser(), classes
        self._arrays: dict[str, np.ndarray] = {}

    def _name(self) -> str:
        return f"MedMNIST:{self.file.stem}"

    def _read(self) -> Contents:
        self._arrays = arrays = _read_npz(self.file)
        sample = arrays["train_images"].shape[1:]
        colour = len(sample) == 3 and sample[-1] == 3
        sides = sample[:-1] if colour else sample
        count = 1 + max(int(arrays[f"{split}_labels"].max(initial=0)) for split in SPLITS)
        names = tuple(self.classes or map(str, range(count)))
        if len(names) < count:
            raise GraftError(f"classes names {len(names)} classes; '{self.file}' has {count}: name them all.")
        splits: dict[Split, list[Case]] = {
            split: [
                Case(f"{split}/{number}", (), target=names[int(label)])
                for number, label in enumerate(arrays[f"{split}_labels"].reshape(-1))
            ]
            for split in SPLITS
        }
        return Contents(
            splits=splits,
            class_names=names,
            channels=3 if colour else 1,
            spacing=(1.0,) * len(sides),
            patch_size=tuple(sides),
            preprocessing={
                "spatial_dims": len(sides),
                "channels": 3 if colour else 1,
                "spacing": None,
                "size": [*sides],
                "intensity": "window",
                "window": [0, 255],
                "crop_foreground": False,
            },
            digest=[(self._name(), content_of([self.file]))],
        )

    def _load(self, split: Split, index: int) -> Loaded:
        pixels = torch.from_numpy(self._arrays[f"{split}_images"][index]).float() / 255
        image = pixels.movedim(-1, 0) if self.facts.channels == 3 else pixels[None]
        label = int(self._arrays[f"{split}_labels"].reshape(-1)[index])
        return Loaded(image.contiguous(), torch.tensor(label), np.eye(4))


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise GraftError(f"There is no file '{path}': give a MedMNIST file, such as pneumoniamnist.npz.")
    wanted = [f"{split}_{kind}" for split in SPLITS for kind in ("images", "labels")]
    try:
        with np.load(path, allow_pickle=False) as found:
            missing = [name for name in wanted if name not in found.files]
            arrays = {name: found[name] for name in wanted if name in found.files}
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise GraftError(f"Cannot read '{path}' as a MedMNIST file: {error}. Download it again.") from error
    if missing:
        raise GraftError(f"'{path}' has no {', '.join(missing)}: it is no MedMNIST file.")
    for split in SPLITS:
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        if (
            images.dtype != np.uint8
            or images.ndim not in (3, 4)
            or images.shape[1:] != arrays["train_images"].shape[1:]
        ):
            raise GraftError(
                f"'{path}': {split}_images is {images.dtype} {images.shape}, not uint8 images of one size."
            )
        if labels.shape not in ((len(images),), (len(images), 1)) or labels.dtype.kind not in "iu":
            raise GraftError(
                f"'{path}': {split}_labels has the shape {labels.shape}; one class number an image is due (sets with "
                "several labels an image cannot be used)."
            )
    return arrays


def _rows(path: Path) -> list[tuple[int, Mapping[str, str | None]]]:
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
