"""The starter sets: from the labelled human brain to a macaque's with a few labelled slices."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from common.errors import unknown
from common.splits import SPLITS, Split
from domains.medical.data._atlases import CLASSES, atlas_files
from domains.medical.data._augment import Deformation, pose_points, random_contrast, rotation
from domains.medical.data._dataset import Loaded, Painter, sampled
from domains.medical.data._geometry import sample_linear, sample_nearest, spacing_of
from domains.medical.data._records import IGNORE, Case
from domains.medical.data._slices import choose_slices
from domains.medical.data._synthesis import TISSUES, draw_image, tissue_regions
from domains.medical.data.base import Contents, VolumeData, checked_patch
from domains.medical.data.prepare import prepare, read_labels

Synthesis = Literal["real", "labels", "both"]


@dataclass(frozen=True, eq=False)
class Brain:
    """A labelled brain in memory.

    Attributes:
        image: float32 (1, D, H, W), in [0, 1], zero outside the brain.
        label: uint8 (D, H, W), positions in `CLASSES`.
        affine: (4, 4), voxels to RAS in mm: axis 0 runs to the right, 1 to the front (coronal slices), 2 upwards.
        preprocessing: What `prepare` made the image with.
    """

    image: Tensor
    label: Tensor
    affine: np.ndarray
    preprocessing: dict[str, Any]

    @property
    def spacing(self) -> tuple[float, ...]:
        """Sides of a voxel, in mm."""
        return tuple(round(side, 4) for side in spacing_of(self.affine))


def load_brain(name: str) -> Brain:
    """Load a brain of `ATLASES`, preprocessed.

    Raises:
        GraftError: The archive is not in the cache and cannot be fetched.
    """
    image_file, label_file = atlas_files(name)
    label, affine = read_labels(label_file)
    preprocessing: dict[str, Any] = {
        "spatial_dims": 3,
        "channels": 1,
        "spacing": [round(side, 4) for side in spacing_of(affine)],
        "intensity": "percentiles",
        "crop_foreground": False,
    }
    image, affine, _ = prepare(image_file, preprocessing)
    return Brain(image, torch.from_numpy(label.astype(np.uint8)), affine, {**preprocessing, "crop_foreground": True})


def _digest(label: Tensor) -> str:
    return hashlib.sha256(label.numpy().tobytes()).hexdigest()


class HumanToMacaque(VolumeData):
    """The target of the transfer: INIA19's macaque brain at 0.85 mm (76 x 95 x 69), of which a few slices are labelled.

    Seven coarse classes and the background, the same as in `ColinCoarse`. Train, validation and test share one volume
    and differ in the coronal slices that are labelled in it (see `slices`); every other voxel is `IGNORE`. Validation:
    4 fixed slices. Train: `labelled` slices, evenly spread, never next to a validation slice. Test: all slices with
    brain at least 2 away from every train and validation slice (with `labelled` = 4 about 70). INIA19 is an average of
    19 animals, so it is smoother than a scan of one, and it is nearly mirror-symmetric: left and right never serve as
    train and test here.

    Args:
        labelled: How many coronal slices train.
        draw: Which slices: another number, other slices; None takes `seed`.
        patch_size: Sides of a training patch: right, front, up.
        **kwargs: See `VolumeData`.

    Raises:
        GraftError: An argument is out of range.
    """

    axis: ClassVar[int] = 1
    _deformation = Deformation(degrees=10.0, scale=0.1, bend=1.0)

    def __init__(
        self,
        labelled: int = 4,
        draw: int | None = None,
        patch_size: Sequence[int] = (64, 32, 64),
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(**kwargs)
        self.labelled, self.draw = labelled, draw
        self.patch_size = checked_patch(type(self).__name__, patch_size, 3)
        self._slices: dict[str, tuple[int, ...]] = {}
        self._brain: Brain | None = None

    def prepare_data(self) -> None:
        """Fetch the atlas and resample it, once."""
        atlas_files("macaque")

    def slices(self, split: str) -> tuple[int, ...]:
        """Return the coronal slices that are labelled in a split: positions along `axis`, ascending.

        Raises:
            GraftError: There is no such split.
        """
        _ = self.facts
        if split not in self._slices:
            raise unknown("split", split, SPLITS)
        return self._slices[split]

    def _read(self) -> Contents:
        brain = load_brain("macaque")
        found = torch.nonzero((brain.label > 0).any(dim=2).any(dim=0))[:, 0].tolist()
        slices = choose_slices(found, self.labelled, self.seed if self.draw is None else self.draw)
        self._brain, self._slices = brain, {**slices}
        rows = [(_digest(brain.label), split, str(number)) for split in SPLITS for number in slices[split]]
        return Contents(
            splits={split: (Case("macaque", ()),) for split in SPLITS},
            class_names=CLASSES,
            channels=1,
            spacing=brain.spacing,
            patch_size=self.patch_size,
            preprocessing=brain.preprocessing,
            counts={"labelled_slices": self.labelled},
            digest=rows,
        )

    def _load(self, split: Split, index: int) -> Loaded:
        brain = self._brain
        if brain is None:
            raise RuntimeError("Call setup() first.")
        label = torch.full_like(brain.label, IGNORE)
        for number in self._slices[split]:
            label[:, number] = brain.label[:, number]
        return Loaded(brain.image, label, brain.affine)


# Fixed poses: degrees about the three axes, and scales along them.
_POSES: dict[Split, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "val": ((6.0, -5.0, 8.0), (1.05, 0.95, 1.0)),
    "test": ((-8.0, 6.0, -5.0), (0.94, 1.04, 1.06)),
}


def white_cortex_to_other(image: Tensor, label: Tensor) -> Tensor:
    """Return the labels with the brightest tissue of the class "cortex" counted as "other".

    Args:
        image: float32 (D, H, W), T1-weighted.
        label: uint8 (D, H, W), positions in `CLASSES`.
    """
    cortex = CLASSES.index("cortex")
    white = tissue_regions(image, label) == 1 + (cortex - 1) * TISSUES + TISSUES - 1
    return torch.where(white, CLASSES.index("other"), label).to(label.dtype)


class ColinCoarse(VolumeData):
    """The source of the transfer: one human brain (Colin27) at 2 mm (76 x 94 x 80), AAL merged into 7 classes.

    For pretraining. Validation and test are the *same* brain in two other fixed poses: they measure how well it was
    fitted, not how well a net generalises.

    Args:
        patch_size: Sides of a training patch: right, front, up.
        synthesis: Where training images come from: "real" takes the T1-weighted image; "labels" draws each image from
            the label map split into tissues, with random contrast, noise, blur and bias field (SynthSeg, arXiv
            2107.09559); "both" draws half of them.
        contrast: Send the real image through a random intensity curve, which may turn dark into bright.
        grey_cortex: Count the white matter within AAL's cortical regions as "other". AAL draws gyri, and the macaque's
            atlas draws grey matter alone; without this the two cortices are not the same class.
        **kwargs: See `VolumeData`.

    Raises:
        GraftError: An argument is out of range.
    """

    _deformation = Deformation(degrees=20.0, scale=0.25, bend=3.0)

    def __init__(
        self,
        patch_size: Sequence[int] = (64, 64, 64),
        synthesis: Synthesis = "real",
        contrast: bool = False,
        grey_cortex: bool = False,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(**kwargs)
        if synthesis not in ("real", "labels", "both"):
            raise unknown("synthesis", synthesis, ("real", "labels", "both"))
        self.patch_size = checked_patch(type(self).__name__, patch_size, 3)
        self.synthesis, self.contrast, self.grey_cortex = synthesis, contrast, grey_cortex
        self._brain: Brain | None = None
        self._regions: Tensor | None = None

    def prepare_data(self) -> None:
        """Fetch the atlas and resample it, once."""
        atlas_files("colin")

    def _read(self) -> Contents:
        brain = load_brain("colin")
        if self.grey_cortex:
            brain = replace(brain, label=white_cortex_to_other(brain.image[0], brain.label))
        self._brain = brain
        if self.synthesis != "real":
            self._regions = tissue_regions(brain.image[0], brain.label)
        return Contents(
            splits={split: (Case(f"colin-{split}", ()),) for split in SPLITS},
            class_names=CLASSES,
            channels=1,
            spacing=brain.spacing,
            patch_size=self.patch_size,
            preprocessing=brain.preprocessing,
            digest=[(_digest(brain.label), split, str(_POSES.get(split))) for split in SPLITS],
        )

    def _load(self, split: Split, index: int) -> Loaded:
        brain = self._brain
        if brain is None:
            raise RuntimeError("Call setup() first.")
        if split == "train":
            return Loaded(brain.image, brain.label, brain.affine)
        degrees, scales = _POSES[split]
        matrix = rotation(np.radians(degrees).tolist()) * torch.tensor(scales)
        shape = brain.label.shape
        points = pose_points(shape, [(side - 1) / 2 for side in shape], matrix, brain.spacing)
        return Loaded(sample_linear(brain.image, points), sample_nearest(brain.label, points, outside=0), brain.affine)

    def _painter(self) -> Painter | None:
        regions = self._regions
        if regions is None:
            return None
        always = self.synthesis == "labels"

        def paint(case: Loaded, points: Tensor) -> Tensor:
            if always or float(torch.rand(())) < 0.5:
                return draw_image(sample_nearest(regions, points, outside=0), len(CLASSES) - 1)
            return sampled(case, points)

        return paint

    def _finisher(self) -> Callable[[Tensor], Tensor] | None:
        usual = super()._finisher()
        if not self.contrast:
            return usual

        def finish(image: Tensor) -> Tensor:
            image = random_contrast(image)
            return image if usual is None else usual(image)

        return finish
