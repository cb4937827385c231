"""The two labelled brains of Debian's mricron-data, human and macaque, with their regions merged into the same classes.

Sources of the tables: the names of the AAL regions in the package's `aal.nii.txt` (Tzourio-Mazoyer et al. 2002), and
the published table of the INIA19 NeuroMaps regions (Rohlfing et al. 2012). They were merged by name and not checked by
an anatomist. The two label sets do not agree everywhere: AAL's cortical regions reach into the white matter, those of
NeuroMaps follow the cortex.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from common import artifacts
from domains.medical.data._geometry import (
    antialias_sigmas,
    respaced,
    sample_linear,
    smooth,
    spacing_of,
    voxel_points,
)

ROW = "brain-atlases"
_ROOT = "usr/share/mricron/templates/"

CLASSES = (
    "background",
    "cortex",
    "hippocampus_amygdala",
    "caudate",
    "lentiform",
    "thalamus",
    "cerebellum",
    "other",
)
OTHER = CLASSES.index("other")

# AAL's 116 regions as ranges; a left region has an odd number, its right twin the even number behind it.
AAL_COARSE: Mapping[str, str] = {
    "cortex": "1-36 43-70 79-90",
    "hippocampus_amygdala": "37-42",
    "caudate": "71-72",
    "lentiform": "73-76",
    "thalamus": "77-78",
    "cerebellum": "91-116",
}
# Left regions; the right twin is 1000 higher. Every other number, and the brain without a number, is "other".
INIA19_COARSE: Mapping[str, str] = {
    "cortex": (
        "1 3-10 37 45 54 58 65 70 111 147 153 167 180 196 212-217 219-220 223 243 251 313 342 389 393 431 455 474 508 "
        "512"
    ),
    "hippocampus_amygdala": (
        "63 69 86 90-91 166 189 191-192 205 211 385 447-448 450-453 456-459 461-467 470-471 480 482 484 493 496 498 521"
    ),
    "caudate": "82",
    "lentiform": "98 162 171 489-490",
    "thalamus": ("92 95-96 101 117 122-123 130 135-137 152 165 177-178 186 222 273 285 287-288 321-328 492 497 499"),
    "cerebellum": "224-231 233-238 240-242 244-250 252-253 294-296 309 410-411 517",
}


@dataclass(frozen=True, kw_only=True)
class Atlas:
    """One labelled brain.

    Attributes:
        image: Member of the archive: the T1-weighted image, zero outside the brain.
        label: Member of the archive: the numbered regions, on the same grid.
        coarse: Class to numbers of its regions, as ranges.
        twin: What the number of a right region is higher by, where the table lists left regions only; else 0.
        spacing: Sides of the voxels that it is resampled to, in mm.
    """

    image: str
    label: str
    coarse: Mapping[str, str]
    twin: int
    spacing: float


ATLASES: Mapping[str, Atlas] = {
    "colin": Atlas(image=f"{_ROOT}ch2bet.nii.gz", label=f"{_ROOT}aal.nii.gz", coarse=AAL_COARSE, twin=0, spacing=2.0),
    "colin-1mm": Atlas(
        image=f"{_ROOT}ch2bet.nii.gz", label=f"{_ROOT}aal.nii.gz", coarse=AAL_COARSE, twin=0, spacing=1.0
    ),
    "macaque": Atlas(
        image=f"{_ROOT}inia19-t1-brain.nii.gz",
        label=f"{_ROOT}inia19-NeuroMaps.nii.gz",
        coarse=INIA19_COARSE,
        twin=1000,
        spacing=0.85,
    ),
}


def numbers_of(ranges: str) -> set[int]:
    """Read "1 3-5" as {1, 3, 4, 5}."""
    found: set[int] = set()
    for part in ranges.split():
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found


def coarse_labels(regions: np.ndarray, brain: np.ndarray, atlas: Atlas) -> np.ndarray:
    """Merge numbered regions into the classes of `CLASSES`.

    Args:
        regions: (D, H, W) region numbers.
        brain: (D, H, W) bool; outside it everything is background.
        atlas: Whose table to use.

    Returns:
        uint8 (D, H, W).
    """
    table = np.full(int(regions.max()) + 1, OTHER, dtype=np.uint8)
    for name, ranges in atlas.coarse.items():
        for number in numbers_of(ranges):
            for twin in {number, number + atlas.twin}:
                if twin < len(table):
                    table[twin] = CLASSES.index(name)
    return np.where(brain, table[regions], 0).astype(np.uint8)


def atlas_files(name: str) -> tuple[Path, Path]:
    """Return image and label map of a brain, built once: RAS, resampled, cut to the brain and a margin of 2 voxels.

    The image (`image.nii.gz`, float32) keeps its own intensities and is zero outside the brain; the label map
    (`label.nii.gz`, uint8) has the classes of `CLASSES`. Each voxel gets the class that fills most of it.

    Args:
        name: A key of `ATLASES`.

    Raises:
        GraftError: The archive is not in the cache and cannot be fetched.
    """
    key = f"atlas-{name}-2-{artifacts.row(ROW).sha256[:12]}"
    folder = artifacts.prepared(key, lambda scratch: _build(ATLASES[name], scratch))
    return folder / "image.nii.gz", folder / "label.nii.gz"


HEAD = "mni152"  # its catalog row
_HEAD_IMAGE = "nilearn/datasets/data/mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"


def head_file() -> Path:
    """Return the T1 image of the average head of the catalog, which has no labels, as a file of the cache.

    Raises:
        GraftError: The archive is not in the cache and cannot be fetched.
    """

    def build(folder: Path) -> None:
        (folder / f"{HEAD}.nii.gz").write_bytes(artifacts.read_member(HEAD, _HEAD_IMAGE))

    return artifacts.prepared(f"{HEAD}-1-{artifacts.row(HEAD).sha256[:12]}", build) / f"{HEAD}.nii.gz"


def _build(atlas: Atlas, folder: Path) -> None:
    image = _member(atlas.image)
    regions = np.asanyarray(_member(atlas.label).dataobj).astype(np.int64)
    # Both are stored in RAS order already; a changed archive would have another digest.
    pixels = np.asanyarray(image.dataobj).astype(np.float32)
    label = coarse_labels(regions, pixels > 0, atlas)
    fine, coarse = spacing_of(image.affine), (atlas.spacing,) * 3
    shape, affine = respaced(pixels.shape, image.affine, coarse)
    points = voxel_points(shape, np.linalg.inv(image.affine) @ affine)
    sigmas = antialias_sigmas(fine, coarse)

    def sampled(volume: np.ndarray) -> np.ndarray:
        whole = torch.from_numpy(volume.astype(np.float64))[None]
        # Rounded, so that a voxel that two classes share equally gets the same one on every machine.
        return sample_linear(smooth(whole, sigmas), points)[0].numpy().round(6)

    shares = np.stack([sampled(label == number) for number in range(len(CLASSES))])
    merged = shares.argmax(axis=0).astype(np.uint8)
    brain = merged > 0
    # Divided by the brain's share, the brain's rim keeps its intensity instead of fading into the zeros outside.
    rim = sampled(pixels) / np.maximum(sampled(pixels > 0), 0.5)
    resampled = np.where(brain, rim, 0).astype(np.float32)
    box = tuple(
        slice(max(int(found.min()) - 2, 0), int(found.max()) + 3)
        for found in (np.flatnonzero(m) for m in _profiles(brain))
    )
    corner = affine.copy()
    corner[:3, 3] += affine[:3, :3] @ np.array([part.start for part in box])
    nib.save(nib.Nifti1Image(resampled[box], corner), folder / "image.nii.gz")
    nib.save(nib.Nifti1Image(merged[box], corner), folder / "label.nii.gz")


def _profiles(mask: np.ndarray) -> list[np.ndarray]:
    """Tell for each axis which of its planes contain something."""
    return [mask.any(axis=tuple(other for other in range(mask.ndim) if other != axis)) for axis in range(mask.ndim)]


def _member(name: str) -> nib.Nifti1Image:
    import gzip

    return nib.Nifti1Image.from_bytes(gzip.decompress(artifacts.read_member(ROW, name)))
