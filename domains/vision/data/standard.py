"""Standard benchmarks, for those who are online or have them on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torchvision import datasets

from common import artifacts
from common.errors import GraftError, unknown
from common.splits import SPLITS, Split
from domains.vision.data._images import progress_bar
from domains.vision.data._prepare import read_index, write_index
from domains.vision.data._records import Contents, Record
from domains.vision.data._splits import assign_splits
from domains.vision.data.base import ImageData


class Cifar100(ImageData):
    """CIFAR-100 (Krizhevsky 2009), downloaded by torchvision: 100 classes of 32 x 32 pixel photographs.

    Validation is a tenth of the official 50,000 training images, cut class by class by a hash; the test split is the
    official one (10,000).
    """

    def prepare_data(self) -> None:
        """Download the set and write its images as files, once."""
        self._folder()

    def _folder(self) -> Path:
        return artifacts.prepared("cifar100-1", _build_cifar100)

    def _read(self) -> Contents:
        folder = self._folder()
        names = sorted(path.name for path in folder.iterdir() if path.is_dir())
        return read_index(folder, names)


class Flowers102(ImageData):
    """Oxford Flowers 102 (Nilsback & Zisserman 2008), downloaded by torchvision, with its official splits.

    10 images per class for training and for validation; 6,149 for the test.
    """

    def prepare_data(self) -> None:
        """Download the set, once."""
        _torchvision("Flowers102", lambda root: datasets.Flowers102(root, split="train", download=True))

    def _read(self) -> Contents:
        splits: dict[Split, list[Record]] = {}
        names = tuple(datasets.Flowers102.classes)
        for split in SPLITS:
            found = _torchvision("Flowers102", lambda root, s=split: datasets.Flowers102(root, split=s, download=True))
            pairs = zip(found._image_files, found._labels, strict=True)
            splits[split] = [Record(path.name, path, names[label]) for path, label in pairs]
        return Contents(splits=splits, class_names=names)


class VTAB1k(ImageData):
    """One task of VTAB-1k (Zhai et al., arXiv 1910.04867) in its usual folder layout.

    `ROOT/TASK/train800.txt`, `val200.txt`, `train800val200.txt` and `test.txt`, with lines such as
    `images/train800val200/000000.jpg 12`. As usual for this benchmark, images are resized to a square without keeping
    their aspect ratio and are not augmented: in several tasks position or orientation is the label.

    Args:
        root: The folder that holds a folder for each task.
        task: The task's folder.
        final: Train on all 1,000 images, for the last run after everything was chosen on `val200`. The validation
            figures of such a run say nothing: its validation images are among its training images.
        augment: Augment the training images; only where neither position nor orientation is the label.
        **kwargs: See `ImageData`.
    """

    _fit = "squash"
    _every_class_trains = False

    def __init__(
        self,
        root: str,
        task: str,
        final: bool = False,
        augment: bool = False,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(augment=augment, **kwargs)
        self.root, self.task, self.final = Path(root).expanduser(), task, final

    def _name(self) -> str:
        return f"VTAB1k:{self.task}"

    def _read(self) -> Contents:
        if not self.root.is_dir():
            raise GraftError(f"There is no folder '{self.root}': give the folder that holds the VTAB-1k tasks.")
        folder = self.root / self.task
        if not folder.is_dir():
            raise unknown("VTAB-1k task", self.task, [path.name for path in self.root.iterdir() if path.is_dir()])
        files = {
            "train": "train800val200.txt" if self.final else "train800.txt",
            "val": "val200.txt",
            "test": "test.txt",
        }
        listed = {split: _vtab_list(folder, files[split]) for split in SPLITS}
        highest = max((label for rows in listed.values() for _, label in rows), default=-1)
        splits = {s: [Record(name, folder / name, str(label)) for name, label in rows] for s, rows in listed.items()}
        return Contents(splits=splits, class_names=tuple(str(number) for number in range(highest + 1)))


def _vtab_list(folder: Path, name: str) -> list[tuple[str, int]]:
    path = folder / name
    if not path.is_file():
        raise GraftError(f"There is no file '{path}': a VTAB-1k task needs train800.txt, val200.txt and test.txt.")
    rows: list[tuple[str, int]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        image, _, label = line.strip().rpartition(" ")
        if not image or not label.isdigit():
            raise GraftError(
                f"{path}, line {number}: '{line.strip()}' is not an image's path, a space and a class number."
            )
        rows.append((image, int(label)))
    return rows


def _torchvision(name: str, load: Callable[[Path], Any]) -> Any:  # noqa: ANN401
    """Load a torchvision dataset from the cache, downloading it first where needed."""
    root = artifacts.cache_dir() / "torchvision"
    root.mkdir(parents=True, exist_ok=True)
    try:
        return load(root)
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise GraftError(
            f"{name} is not in {root} and cannot be downloaded: {reason}. Connect to the internet and run again, or "
            f"copy the files that torchvision expects for {name} there."
        ) from error


def _build_cifar100(folder: Path) -> None:
    rows: list[tuple[str, str, str, str]] = []
    for train in (True, False):
        part = _torchvision("CIFAR-100", lambda root, t=train: datasets.CIFAR100(root, train=t, download=True))
        paths = _write_images(folder, part, "train" if train else "test")
        labels = [part.classes[target] for target in part.targets]
        sides = assign_splits(labels, paths, {"train": 0.9, "val": 0.1}) if train else ["test"] * len(paths)
        rows += zip(paths, labels, paths, sides, strict=True)
    write_index(folder, rows, {})


def _write_images(folder: Path, part: datasets.CIFAR100, name: str) -> list[str]:
    paths: list[str] = []
    with progress_bar() as bar:
        pairs: Sequence[tuple[np.ndarray, int]] = list(zip(part.data, part.targets, strict=True))
        for number, (pixels, target) in enumerate(bar.track(pairs, description=f"Writing CIFAR-100 {name}")):
            path = folder / part.classes[target] / f"{name}_{number:05d}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(pixels).save(path)
            paths.append(path.relative_to(folder).as_posix())
    return paths
