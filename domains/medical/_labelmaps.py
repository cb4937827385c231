"""Label maps as results: their file names, writing them, cleaning them, the names of their scores."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from common.checkpoint import write_atomically


def plain_names(names: Sequence[str]) -> list[str]:
    """Turn names into what a file or a metric can be called, each another: spaces and signs become `_`."""
    found: list[str] = []
    for name in names:
        plain = re.sub(r"[^\w+-]+", "_", name).strip("_") or "_"
        others = (f"{plain}_{number}" for number in itertools.count(2))
        found.append(plain if plain not in found else next(other for other in others if other not in found))
    return found


def dice_keys(class_names: Sequence[str]) -> list[str]:
    """Return the metric's name for each foreground class: `dice_<class>`."""
    return [f"dice_{name}" for name in plain_names(class_names[1:])]


def write_nifti(path: Path, labels: NDArray[Any], affine: NDArray[Any]) -> None:
    """Write a label map (D, H, W) or (H, W) as compressed NIfTI, atomically.

    Raises:
        GraftError: It cannot be written; nothing half-written is left.
    """
    import gzip

    volume = labels[..., None] if labels.ndim == 2 else labels
    image = nib.Nifti1Image(volume.astype(np.uint8), affine)
    packed = gzip.compress(image.to_bytes(), compresslevel=6, mtime=0)  # no time stamp: equal maps, equal files
    write_atomically(path, lambda file: file.write(packed))


def largest_components(outputs: Tensor) -> Tensor:
    """Give all but the largest connected part (over faces) of each foreground class to the background.

    There the logits of the background and of the class that won are exchanged.

    Args:
        outputs: Logits (B, K, *spatial).

    Returns:
        (B, K, *spatial).
    """
    changed = outputs.clone()
    for case, labels in enumerate(outputs.argmax(dim=1).cpu().numpy()):
        for number in np.unique(labels[labels > 0]):
            parts, count = ndimage.label(labels == number)
            if count < 2:
                continue
            sizes = np.bincount(parts.ravel())
            sizes[0] = 0
            small = torch.from_numpy((parts > 0) & (parts != sizes.argmax())).to(outputs.device)
            changed[case, 0][small], changed[case, int(number)][small] = (
                outputs[case, int(number)][small],
                outputs[case, 0][small],
            )
    return changed
