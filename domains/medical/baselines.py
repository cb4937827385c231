"""Predictors that are not trained: what a method has to beat. Each makes a function of a batch.

Where some planes of a volume are labelled (`data.slices`, `data.axis`), labels can be carried from plane to plane
without a network; and a network that knows the data's classes already can be taken as it is.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

from common.errors import GraftError
from domains.medical.data._records import IGNORE, VolumeBatch
from domains.medical.heads import SegmentationHead
from domains.medical.tasks import Segmentation

Predictor = Callable[[VolumeBatch], Tensor]

_CERTAIN = 20.0  # a logit whose softmax is one, for labels that are taken over


def nearest_slice(task: Segmentation, data: Any) -> Predictor:  # noqa: ANN401
    """Give each plane the labels of the nearest training plane; of two equally near ones the lower's."""
    label, axis, planes = _training_planes("NearestSlice", data)
    classes = len(data.facts.class_names)
    distance = np.abs(np.arange(label.shape[axis])[:, None] - np.asarray(planes)[None])
    copied = label.index_select(axis, torch.as_tensor(planes)[distance.argmin(axis=1)])
    return _constant(_logits(copied, classes))


def signed_distance(task: Segmentation, data: Any) -> Predictor:  # noqa: ANN401
    """Interpolate each class's signed distance (mm, within the plane) between the training planes on both sides.

    The class with the largest one wins; beyond the outermost training planes the nearest one's labels stand. A class
    that only one of two planes shows shrinks away from it and ends halfway to the other.
    """
    label, axis, planes = _training_planes("SignedDistance", data)
    spacing = [mm for other, mm in enumerate(data.facts.spacing) if other != axis]
    classes = len(data.facts.class_names)
    # (planes, K, h, w)
    maps = np.stack([_signed_distances(label.select(axis, plane).numpy(), classes, spacing) for plane in planes])
    found = np.empty((label.shape[axis], *maps.shape[1:]), dtype=np.float32)
    found[: planes[0] + 1], found[planes[-1] :] = maps[0], maps[-1]
    for number, (low, high) in enumerate(itertools.pairwise(planes)):
        below, above = _ending_halfway(maps[number], maps[number + 1])
        for plane in range(low + 1, high):
            share = (plane - low) / (high - low)
            found[plane] = (1 - share) * below + share * above
        found[low], found[high] = maps[number], maps[number + 1]
    return _constant(torch.from_numpy(np.ascontiguousarray(np.moveaxis(found, 0, axis + 1))))


def zero_shot(task: Segmentation, data: Any) -> Predictor:  # noqa: ANN401
    """Take the network as it came, with its own output layer.

    Raises:
        GraftError: It has none for the data's classes.
    """
    task.assemble()
    if not (isinstance(task.head, SegmentationHead) and task.head.from_checkpoint):
        known = ", ".join(task._built.head_classes) or "none that it names"
        raise GraftError(
            f"ZeroShot needs a backbone whose own output layer knows the data's classes "
            f"({', '.join(data.facts.class_names)}); '{task.backbone_name}' knows {known}. Take another backbone, and "
            "leave head_init at 'auto'."
        )
    task.eval()

    def predict(batch: VolumeBatch) -> Tensor:
        with torch.no_grad():
            return task.infer(batch)

    return predict


def mirror_copy(task: Segmentation, data: Any) -> Predictor:  # noqa: ANN401
    """Give each slice of the right half of a brain the left half's labels at the same place.

    Slices of the left half itself (validation) get the labels of the nearest training slice.

    Raises:
        GraftError: The data has no halves.
    """
    if not hasattr(data, "opposite"):
        raise GraftError(f"MirrorCopy needs the data ColinHemisphere, not {type(data).__name__}. Leave it out.")
    trained = np.asarray(data.slices("train"))

    def labels(image: Tensor, index: int) -> Tensor:
        right = index < len(data.records("test")) and torch.equal(image, data.case("test", index)["image"])
        if right:
            return data.opposite(index)
        nearest = int(np.abs(trained - data.slices("val")[index]).argmin())
        return data.case("train", nearest)["label"]

    def predict(batch: VolumeBatch) -> Tensor:
        maps = [labels(image.cpu(), int(index)) for image, index in zip(batch.image, batch.index, strict=True)]
        return torch.stack([_logits(found, len(data.facts.class_names)) for found in maps])

    return predict


def _training_planes(name: str, data: Any) -> tuple[Tensor, int, list[int]]:  # noqa: ANN401
    """Return the training labels (D, H, W), the axis across the labelled planes, and these planes, ascending.

    Raises:
        GraftError: The data labels whole cases.
    """
    if not (hasattr(data, "slices") and hasattr(data, "axis")):
        raise GraftError(
            f"{name} needs one volume of which some planes are labelled, as HumanToMacaque; {type(data).__name__} has "
            "none. Leave it out."
        )
    return data.case("train", 0)["label"], data.axis, sorted(data.slices("train"))


def _signed_distances(labels: NDArray[Any], classes: int, spacing: list[float]) -> NDArray[Any]:
    """Return for each class and pixel of a plane (h, w) how far inside of it (or, negative, outside) it lies, in mm."""
    diagonal = float(np.linalg.norm(np.asarray(labels.shape) * np.asarray(spacing)))
    found = []
    for number in range(classes):
        mask = labels == number
        if mask.all() or not mask.any():
            found.append(np.full(labels.shape, diagonal if mask.any() else -diagonal))
            continue
        inside = ndimage.distance_transform_edt(mask, sampling=spacing)
        found.append(inside - ndimage.distance_transform_edt(~mask, sampling=spacing))
    return np.stack(found).astype(np.float32)


def _ending_halfway(one: NDArray[Any], other: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Let a class that only one of two planes (K, h, w) shows be below zero everywhere from halfway on."""
    deep, deep_other = (plane.max(axis=(1, 2), keepdims=True) for plane in (one, other))
    return (
        np.where((deep <= 0) & (deep_other > 0), other - 2 * deep_other, one),
        np.where((deep_other <= 0) & (deep > 0), one - 2 * deep, other),
    )


def _logits(labels: Tensor, classes: int) -> Tensor:
    """Turn a label map (*spatial) into logits (K, *spatial) without doubt; background where there is no label."""
    known = torch.where(labels == IGNORE, 0, labels).long()
    return _CERTAIN * functional.one_hot(known, classes).movedim(-1, 0).float()


def _constant(logits: Tensor) -> Predictor:
    """Predict the same for every case: all splits share one volume."""
    return lambda batch: logits.to(batch.image.device).expand(len(batch.image), *logits.shape)
