"""Label maps that can be learned in seconds: bright and dark balls in noise, as volumes, images or labelled slices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import Tensor

from common.domain import Domain
from common.loading import train_loader
from common.splits import SPLITS
from domains.medical.data._dataset import Loaded, Wholes
from domains.medical.data._records import IGNORE, Case
from domains.medical.data.base import Contents, VolumeData
from domains.medical.tasks import Segmentation

CLASSES = ("background", "bright", "dark ball")
NETS = {
    3: {"channels": (4, 8), "strides": (2,), "num_res_units": 1},
    2: {"channels": (4, 8, 8), "strides": (2, 2), "num_res_units": 1},
}
SPACING = (2.0, 1.0, 1.5)
PREPROCESSING = {"spacing": None, "intensity": "percentiles", "crop_foreground": False}
DOMAINS = {
    "medical": Domain(
        name="medical",
        summary="tests",
        tasks=dict.fromkeys(("Segmentation", "VolumeClassification"), "domains.medical.tasks"),
    )
}


def balls(shape: Sequence[int], seed: int) -> tuple[Tensor, Tensor]:
    """An image (1, *shape) of noise around 0.5 with a bright and a dark ball, and its label map."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"))
    label = np.zeros(shape, np.uint8)
    for number, place in ((1, 0.3), (2, 0.7)):
        centre = [side * place + rng.uniform(-1, 1) for side in shape]
        label[sum((axis - c) ** 2 for axis, c in zip(grid, centre, strict=True)) < (min(shape) / 4) ** 2] = number
    image = np.choose(label, (0.5, 0.9, 0.15)) + rng.normal(0, 0.05, shape)
    return torch.as_tensor(image.clip(0.01, 1), dtype=torch.float32)[None], torch.as_tensor(label)


class Balls(VolumeData):
    """Four training cases, two for validation and two for the test.

    Args:
        shape: Sides of a case.
        patch_size: Sides of a patch.
        **options: See `VolumeData`.
    """

    def __init__(
        self, shape: Sequence[int] = (14, 12, 10), patch_size: Sequence[int] = (8, 8, 8), **options: Any
    ) -> None:
        super().__init__(**{"batch_size": 2, "patches_per_epoch": 6, "augment": False} | options)
        self.shape, self.patch_size = tuple(shape), tuple(patch_size)

    def _read(self) -> Contents:
        dims = len(self.shape)
        counts = {"train": 4, "val": 2, "test": 2}
        return Contents(
            splits={split: [Case(f"{split}/{n} a", ()) for n in range(counts[split])] for split in SPLITS},
            class_names=CLASSES,
            channels=1,
            spacing=SPACING[:dims],
            patch_size=self.patch_size,
            preprocessing={"spatial_dims": dims, "channels": 1, **PREPROCESSING},
        )

    def _load(self, split: str, index: int) -> Loaded:
        image, label = balls(self.shape, 10 * SPLITS.index(split) + index)
        return Loaded(image, label, np.diag([*SPACING[: len(self.shape)], *[1.0] * (4 - len(self.shape))]))


class SlicedBalls(Balls):
    """One volume; train, validation and test are planes across its second axis."""

    axis = 1

    def slices(self, split: str) -> tuple[int, ...]:
        return {"train": (3, 8), "val": (5,), "test": (0, 1, 6, 10, 11)}[split]

    def _read(self) -> Contents:
        found = super()._read()
        return Contents(**{**vars(found), "splits": {split: [Case("balls", ())] for split in SPLITS}})

    def _load(self, split: str, index: int) -> Loaded:
        case = super()._load("train", 0)
        label = torch.full_like(case.label, IGNORE)
        for plane in self.slices(split):
            label.select(self.axis, plane).copy_(case.label.select(self.axis, plane))
        return Loaded(case.image, label, case.affine)


class Presence(Balls):
    """Classification: balls, or noise alone? (Not brightness, which an instance norm takes away.)"""

    def _read(self) -> Contents:
        found = super()._read()
        splits = {
            split: [Case(case.id, (), target=("balls", "noise")[n % 2]) for n, case in enumerate(cases)]
            for split, cases in found.splits.items()
        }
        return Contents(**{**vars(found), "splits": splits, "class_names": ("balls", "noise")})

    def _load(self, split: str, index: int) -> Loaded:
        case = super()._load(split, index)
        noise = torch.where(case.label[None] > 0, 0.5, case.image)
        return Loaded(noise if index % 2 else case.image, torch.tensor(index % 2), case.affine)

    def train_dataloader(self) -> Any:
        wholes = Wholes(lambda index: self._loaded("train", index), 4)
        return train_loader(wholes, self.batch_size, seed=self.seed)


def options(dims: int = 3, **changes: Any) -> dict[str, Any]:
    """Arguments of a toy task."""
    return {"backbone": "UNet", "net": NETS[dims], "pretrained": False, "seed": 1} | changes


def data_of(dims: int = 3, **changes: Any) -> Balls:
    """The datamodule of two or three axes, set up."""
    shapes = {2: {"shape": (14, 12), "patch_size": (8, 8)}, 3: {}}
    made = Balls(**{**shapes[dims], **changes})
    made.setup()
    return made


def task_of(peft: Any, data: VolumeData, cls: type = Segmentation, **changes: Any) -> Any:
    """A task as a fit would build it, without a trainer."""
    made = cls(peft=peft, **options(data.facts.spatial_dims, **changes))
    made.facts = data.facts
    made.assemble()
    return made.eval()


@pytest.fixture
def nifti(tmp_path):
    """Write an image of balls as NIfTI; return its path."""

    def write(name: str, shape: Sequence[int] = (14, 12, 10), seed: int = 0, codes: str = "RAS") -> Any:
        image, _ = balls(shape, seed)
        values = image[0].numpy()
        affine = np.diag([*SPACING, 1.0])
        affine[:3, 3] = (-5, 3, 7)
        if codes != "RAS":
            turn = nib.orientations.axcodes2ornt(tuple(codes))
            affine = affine @ nib.orientations.inv_ornt_aff(turn, values.shape)
            values = nib.orientations.apply_orientation(values, turn)
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(values, affine), path)
        return path

    return write
