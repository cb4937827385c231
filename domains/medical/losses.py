"""Segmentation losses over labelled voxels only, and class weights out of training labels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import GraftError, unknown

LossKind = Literal["dice_ce", "dice_focal", "tversky", "ce"]

_SMOOTH = 1e-5
_FOCUS = 2.0  # gamma of arXiv 1708.02002
_FALSE_POSITIVES, _FALSE_NEGATIVES = 0.3, 0.7  # arXiv 1706.05721


class SegmentationLoss(nn.Module):
    """A loss of (logits, labels) that sees labelled voxels alone.

    With p the softmax over classes, y the label, sums over all labelled voxels of the batch and w the class weights:

    - `ce`: sum(-w_y log p_y) / sum(w_y).
    - `dice_ce`: `ce` + mean over the foreground classes that the labels show of 1 - 2 sum(p y) / (sum(p) + sum(y))
      (arXiv 1606.04797).
    - `dice_focal`: the same with sum(-w_y (1 - p_y)^2 log p_y) / sum(w_y) (arXiv 1708.02002) in place of `ce`.
    - `tversky`: mean over the same classes of 1 - TP / (TP + 0.3 FP + 0.7 FN) (arXiv 1706.05721).

    A class that a batch's labels do not show has an overlap of 0 whatever the net says, and averaged in it has a
    gradient that grows without bound as its probability falls. Where a few slices are labelled that is most batches, so
    such classes are left to the voxelwise term (Tversky alone has none: there they wait for another batch).

    Dice and Tversky weigh classes alike by themselves, so the weights act on the voxelwise terms only. A batch without
    a labelled voxel has loss 0 and gradient 0.

    Args:
        kind: Which of them.
        ignore: The label of voxels without a label.
        weights: One weight per class, (K,); None weighs all alike.

    Raises:
        GraftError: There is no such loss.
    """

    weights: Tensor | None

    def __init__(self, kind: LossKind, ignore: int, weights: Tensor | None = None) -> None:
        super().__init__()
        if kind not in get_args(LossKind):
            raise unknown("loss", kind, get_args(LossKind))
        self.kind, self.ignore = kind, ignore
        self.register_buffer("weights", weights, persistent=False)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the scalar loss of logits (B, K, *spatial) and labels (B, *spatial)."""
        labelled = labels != self.ignore
        chosen = logits.movedim(1, -1)[labelled].float()  # (N, K); what is not labelled is not even read
        target = labels[labelled]  # (N,)
        if not len(target):
            return chosen.sum()
        if self.kind == "tversky":
            return _overlap_loss(chosen, target, _FALSE_POSITIVES, _FALSE_NEGATIVES)
        voxelwise = self._voxelwise(chosen, target)
        return voxelwise if self.kind == "ce" else voxelwise + _overlap_loss(chosen, target, 0.5, 0.5)

    def _voxelwise(self, logits: Tensor, target: Tensor) -> Tensor:
        loss = F.cross_entropy(logits, target, reduction="none")  # (N,)
        if self.kind == "dice_focal":
            loss = loss * (-torch.expm1(-loss)).pow(_FOCUS)  # 1 - p_y, with p_y = exp(-loss)
        if self.weights is None:
            return loss.mean()
        weights = self.weights[target]
        return (weights * loss).sum() / weights.sum().clamp_min(torch.finfo(loss.dtype).tiny)


def _overlap_loss(logits: Tensor, target: Tensor, false_positives: float, false_negatives: float) -> Tensor:
    """Return the mean Tversky loss over foreground classes in `target`; with one half twice it is the Dice loss.

    Args:
        logits: (N, K).
        target: (N,).
        false_positives: Weight of probability outside of the class.
        false_negatives: Weight of the class that the probability misses.
    """
    probabilities = logits.softmax(dim=1)
    inside = torch.zeros_like(probabilities).scatter_(1, target[:, None], 1.0)  # one-hot
    hit = (probabilities * inside).sum(dim=0)[1:]  # (K - 1,)
    outside = probabilities.sum(dim=0)[1:] - hit
    size = inside.sum(dim=0)[1:]
    missed = size - hit
    if false_positives == false_negatives == 0.5:  # smoothed as Dice is: the sum of both sizes, not half of it
        hit, outside, missed = 2 * hit, 2 * outside, 2 * missed
    score = (hit + _SMOOTH) / (hit + false_positives * outside + false_negatives * missed + _SMOOTH)
    shown = size > 0
    return ((1 - score) * shown).sum() / shown.sum().clamp_min(1)


def balanced_weights(labels: Iterable[Tensor], classes: int, ignore: int) -> Tensor:
    """Return weights inverse to the classes' frequencies: n / (C n_k), C the number of classes that have a voxel.

    This is scikit-learn's "balanced"; a voxel drawn at random has the expected weight 1. A class without a voxel gets
    the weight 1.

    Args:
        labels: Label maps of the training cases, with `ignore` where there is no label.
        classes: How many classes there are, K.
        ignore: The label of voxels without a label.

    Returns:
        float32 (K,).
    """
    counts = torch.zeros(classes, dtype=torch.float64)
    for label in labels:
        counts += torch.bincount(label[label != ignore].flatten().long(), minlength=classes)
    present = counts > 0
    weights = torch.ones_like(counts)
    weights[present] = counts.sum() / (present.sum() * counts[present])
    return weights.float()


def given_weights(weights: Sequence[float], class_names: Sequence[str]) -> Tensor:
    """Check class weights that a recipe gives.

    Returns:
        float32 (K,).

    Raises:
        GraftError: Not one weight a class, or not all at least 0 and one above.
    """
    fine = all(math.isfinite(weight) and weight >= 0 for weight in weights) and any(weights)
    if len(weights) != len(class_names) or not fine:
        raise GraftError(
            f"class_weights is {list(weights)}; give one number of at least 0 for each of the {len(class_names)} "
            f"classes ({', '.join(class_names)}), not all 0."
        )
    return torch.tensor(list(weights), dtype=torch.float32)
