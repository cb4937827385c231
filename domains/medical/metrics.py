"""Segmentation metrics over labelled voxels: Dice, surface distances in millimetres, calibration.

A case is one item of an evaluation batch. Volumes are scored case by case and averaged, as MONAI's `DiceMetric` does.
Images (2D) are pooled over the split instead: one slice seldom shows every class, and the mean over slices of a class
that is not there says nothing.

The metrics of a family have the same state and are meant to share it as one compute group of a `MetricCollection`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import KDTree
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAUROC
from torchmetrics.utilities import dim_zero_cat

Mask = NDArray[np.bool_]

_WITHIN = 1.0 + 1e-6  # a distance that is the tolerance up to rounding is within it


def count_overlaps(prediction: Tensor, label: Tensor, classes: int, ignore: int) -> Tensor:
    """Count one case's voxels by class: in both, in the prediction, in the label; labelled voxels only.

    Args:
        prediction: Integer (*spatial).
        label: Integer (*spatial) with `ignore`.
        classes: K.
        ignore: The label of voxels without a label.

    Returns:
        int64 (K, 3).
    """
    labelled = label != ignore
    found, truth = prediction[labelled].long(), label[labelled].long()
    table = torch.bincount(truth * classes + found, minlength=classes**2).view(classes, classes)  # (label, prediction)
    return torch.stack((table.diagonal(), table.sum(dim=0), table.sum(dim=1)), dim=1)


def dice_scores(overlaps: Tensor) -> Tensor:
    """Return 2 |A and B| / (|A| + |B|) by class for overlaps (..., K, 3); nan where a class is in neither."""
    both, found, truth = overlaps.double().unbind(dim=-1)
    return 2 * both / (found + truth)


class _Overlaps(Metric):
    """What the Dice metrics share: sums over cases of Dice and of voxel counts, by class."""

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    counts: Tensor
    scores: Tensor
    cases: Tensor

    def __init__(self, classes: int, ignore: int, *, pooled: bool) -> None:
        super().__init__()
        self.classes, self.ignore, self.pooled = classes, ignore, pooled
        self.add_state("counts", torch.zeros(classes, 3, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("scores", torch.zeros(classes, dtype=torch.double), dist_reduce_fx="sum")
        self.add_state("cases", torch.zeros(classes, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, outputs: Tensor, labels: Tensor) -> None:
        """Add a batch: outputs (B, K, *spatial) and labels (B, *spatial)."""
        for found, label in zip(outputs.argmax(dim=1), labels, strict=True):
            overlaps = count_overlaps(found, label, self.classes, self.ignore)
            score = dice_scores(overlaps)
            self.counts += overlaps
            self.scores += score.nan_to_num(0.0)
            self.cases += ~score.isnan()

    def by_class(self) -> Tensor:
        """Return Dice by class, double (K,): pooled, or the mean over cases; nan for a class that never occurred."""
        return dice_scores(self.counts) if self.pooled else self.scores / self.cases


class MeanDice(_Overlaps):
    """Dice, averaged over the foreground classes that the labels or the predictions show.

    A class that is predicted and not there counts 0, in a case or in the whole split. A class in neither counts
    nowhere; `absent` tells which ones the labels lack.

    Args:
        classes: K, with the background.
        ignore: The label of voxels without a label.
        pooled: Sum over the split before dividing, rather than average the cases.
    """

    def compute(self) -> Tensor:
        """Return the mean."""
        return self.by_class()[1:].nanmean().float()

    def absent(self) -> list[int]:
        """Return the foreground classes that no label of the split shows."""
        return [number for number in range(1, self.classes) if not self.counts[number, 2]]


class ClassDice(_Overlaps):
    """Dice of one class; nan where neither labels nor predictions of the split show it.

    Args:
        number: The class.
        classes: K, with the background.
        ignore: The label of voxels without a label.
        pooled: Sum over the split before dividing, rather than average the cases.
    """

    def __init__(self, number: int, classes: int, ignore: int, *, pooled: bool) -> None:
        super().__init__(classes, ignore, pooled=pooled)
        self.number = number

    def compute(self) -> Tensor:
        """Return the class's Dice."""
        return self.by_class()[self.number].float()


# ---- surfaces ------------------------------------------------------------------------------------------------------


def labelled_planes(labelled: Mask) -> int | None:
    """Return the axis whose whole planes are what is labelled, where some are and some are not; else None."""
    if labelled.all() or not labelled.any():
        return None
    for axis in range(labelled.ndim):
        others = tuple(other for other in range(labelled.ndim) if other != axis)
        if (labelled.any(axis=others) == labelled.all(axis=others)).all():
            return axis
    return None


def surface_distances(found: Mask, truth: Mask, spacing: Sequence[float]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Measure how far the surfaces of two masks are apart.

    A mask's surface are its voxels with a face neighbour outside of it (or the array's border). A mask whose
    counterpart is empty is as far away as the array is long: its diagonal.

    Args:
        found: (*spatial).
        truth: (*spatial).
        spacing: mm per voxel along each axis.

    Returns:
        In mm: for each surface voxel of `found` the distance to the surface of `truth`, and the other way round.
    """
    if not (found.any() or truth.any()):
        return np.zeros(0), np.zeros(0)
    box = ndimage.find_objects((found | truth).astype(np.uint8))[0]
    edges = [
        np.argwhere(mask & ~ndimage.binary_erosion(mask)) * np.asarray(spacing) for mask in (found[box], truth[box])
    ]
    if not all(map(len, edges)):
        diagonal = float(np.linalg.norm(np.asarray(found.shape) * np.asarray(spacing)))
        return np.full(len(edges[0]), diagonal), np.full(len(edges[1]), diagonal)
    return KDTree(edges[1]).query(edges[0])[0], KDTree(edges[0]).query(edges[1])[0]


def case_distances(
    found: NDArray[Any], label: NDArray[Any], classes: int, ignore: int, spacing: Sequence[float]
) -> tuple[dict[int, tuple[NDArray[Any], NDArray[Any]]], float]:
    """Measure the `surface_distances` of each foreground class that a case shows.

    Of a volume with labels on some whole planes only, distances are taken within these planes and pooled over them,
    for nothing is known between them.

    Args:
        found: Predicted classes (*spatial).
        label: Classes (*spatial) with `ignore`.
        classes: K, with the background.
        ignore: The label of voxels without a label.
        spacing: mm per voxel along each axis.

    Returns:
        Distances by class, and one voxel in mm: its longest side, within the plane where planes were compared.
    """
    labelled = label != ignore
    axis = labelled_planes(labelled) if label.ndim == 3 else None
    found = np.where(labelled, found, 0)
    distances = {}
    for number in range(1, classes):
        a, b = found == number, label == number
        if axis is None:
            parts = [surface_distances(a, b, spacing)]
        else:
            shown = np.flatnonzero((a | b).any(axis=tuple(other for other in range(3) if other != axis)))
            inner = [mm for other, mm in enumerate(spacing) if other != axis]
            parts = [surface_distances(a.take(i, axis), b.take(i, axis), inner) for i in shown]
        if any(len(way) for part in parts for way in part):
            distances[number] = (np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts]))
    return distances, max(mm for other, mm in enumerate(spacing) if other != axis)


def surface_scores(to_truth: NDArray[Any], to_found: NDArray[Any], tolerance: float) -> tuple[float, float]:
    """Return the larger of both directions' 95th percentiles, and the share of distances within the tolerance."""
    far = max(float(np.percentile(way, 95)) for way in (to_truth, to_found) if len(way))
    near = np.count_nonzero(np.concatenate((to_truth, to_found)) <= tolerance * _WITHIN)
    return far, near / (len(to_truth) + len(to_found))


class _Surfaces(Metric):
    """What the surface metrics share: distances of both directions, of each case or of the whole split."""

    full_state_update = False
    is_differentiable = False
    scores: Tensor
    cases: Tensor
    pool: list[Tensor]

    def __init__(self, classes: int, ignore: int, spacing: Sequence[float], *, pooled: bool) -> None:
        super().__init__()
        self.classes, self.ignore, self.spacing, self.pooled = classes, ignore, tuple(spacing), pooled
        self.add_state("scores", torch.zeros(classes, 2, dtype=torch.double), dist_reduce_fx="sum")
        self.add_state("cases", torch.zeros(classes, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("pool", [], dist_reduce_fx="cat")  # rows of (mm, class, direction), where pooled

    def update(self, outputs: Tensor, labels: Tensor) -> None:
        """Add a batch: outputs (B, K, *spatial) and labels (B, *spatial)."""
        for found, label in zip(outputs.argmax(dim=1).cpu().numpy(), labels.cpu().numpy(), strict=True):
            distances, tolerance = case_distances(found, label, self.classes, self.ignore, self.spacing)
            for number, (to_truth, to_found) in distances.items():
                if self.pooled:
                    for way, mm in enumerate((to_truth, to_found)):
                        rows = np.column_stack((mm, np.full_like(mm, number), np.full_like(mm, way)))
                        self.pool.append(torch.as_tensor(rows, dtype=torch.float32, device=self.device))
                else:
                    scores = surface_scores(to_truth, to_found, tolerance)
                    self.scores[number] += torch.tensor(scores, dtype=torch.double, device=self.device)
                    self.cases[number] += 1

    def by_class(self) -> Tensor:
        """Return Hausdorff distance in mm and surface Dice by class, double (K, 2); nan for what never occurred."""
        if not self.pooled:
            return self.scores / self.cases[:, None]
        scores = torch.full_like(self.scores, torch.nan)
        pool = self.pool if isinstance(self.pool, Tensor) else torch.cat([torch.zeros(0, 3), *self.pool])
        rows = pool.cpu().double().numpy()
        for number in np.unique(rows[:, 1]):
            mine = rows[rows[:, 1] == number]
            both = (mine[mine[:, 2] == way, 0] for way in (0, 1))
            scores[int(number)] = torch.tensor(surface_scores(*both, max(self.spacing)))
        return scores


class Hausdorff95(_Surfaces):
    """The 95th percentile of the distances between surfaces, in mm; the mean over foreground classes.

    See `case_distances`. A class on one side only counts with the diagonal of what was compared (the volume or the
    plane), a class on neither side counts nowhere.

    Args:
        classes: K, with the background.
        ignore: The label of voxels without a label.
        spacing: mm per voxel along each spatial axis.
        pooled: Pool the distances of the split, rather than average the cases.
    """

    higher_is_better = False

    def compute(self) -> Tensor:
        """Return the mean over classes, in mm."""
        return self.by_class()[1:, 0].nanmean().float()


class SurfaceDice(_Surfaces):
    """The share of both surfaces that lies within one voxel of the other (arXiv 1809.04430); the mean over classes.

    One voxel is the longest side of one. Planes and missing classes are treated as
    in `Hausdorff95`.

    Args:
        classes: K, with the background.
        ignore: The label of voxels without a label.
        spacing: mm per voxel along each spatial axis.
        pooled: Pool the distances of the split, rather than average the cases.
    """

    higher_is_better = True

    def compute(self) -> Tensor:
        """Return the mean over classes."""
        return self.by_class()[1:, 1].nanmean().float()


# ---- calibration ---------------------------------------------------------------------------------------------------


class VoxelCalibrationError(Metric):
    """Expected calibration error over all labelled voxels (arXiv 1706.04599), in constant memory.

    Args:
        ignore: The label of voxels without a label.
        bins: Bins of equal width for the probability of the predicted class.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = False
    sums: Tensor

    def __init__(self, ignore: int, bins: int = 15) -> None:
        super().__init__()
        self.ignore, self.bins = ignore, bins
        self.add_state("sums", torch.zeros(3, bins, dtype=torch.double), dist_reduce_fx="sum")

    def update(self, outputs: Tensor, labels: Tensor) -> None:
        """Add a batch: outputs (B, K, *spatial) and labels (B, *spatial)."""
        labelled = labels != self.ignore
        confidence, found = outputs.movedim(1, -1)[labelled].float().softmax(dim=-1).max(dim=-1)  # (N,)
        right = found == labels[labelled]
        bins = (confidence * self.bins).ceil().long().clamp(1, self.bins) - 1  # (lower, upper]
        for row, values in enumerate((torch.ones_like(confidence), confidence, right)):
            self.sums[row].index_add_(0, bins, values.double())

    def compute(self) -> Tensor:
        """Return the mean gap between confidence and accuracy, weighed by the bins' voxels."""
        voxels, confidence, right = self.sums
        return ((confidence - right).abs().sum() / voxels.sum()).float()


# ---- classification ------------------------------------------------------------------------------------------------


class MacroAUROC(MulticlassAUROC):
    """Area under the ROC curve, one class against the rest, averaged over the classes that have both sides.

    Torchmetrics counts a class without a positive example as 0.

    Args:
        classes: K.
    """

    def __init__(self, classes: int) -> None:
        super().__init__(classes, average="none")

    def compute(self) -> Tensor:  # type: ignore[override]
        """Return the mean; nan where all examples are of one class."""
        labels = dim_zero_cat(self.target)
        counts = torch.bincount(labels, minlength=self.num_classes)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # it warns of the classes that are left out here
            scores = super().compute()
        return scores[(counts > 0) & (counts < len(labels))].mean()
