"""Segmentation metrics: MONAI's values on plain cases, and stated rules where a class or a label is missing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from monai.metrics import DiceMetric, compute_hausdorff_distance, compute_surface_dice
from scipy import ndimage
from torch.nn import functional as F
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassCalibrationError

from domains.medical.metrics import (
    ClassDice,
    Hausdorff95,
    MeanDice,
    SurfaceDice,
    VoxelCalibrationError,
    labelled_planes,
    surface_distances,
)

IGNORE = 255
SPACING = (1.0, 2.0, 0.5)


def blobs(shape, classes, seed):
    """A label map of smooth regions, every class among them."""
    noise = np.random.default_rng(seed).standard_normal((classes, *shape))
    return torch.as_tensor(np.stack([ndimage.gaussian_filter(n, 2.0) for n in noise]).argmax(0))


def logits_of(labels, classes):
    return F.one_hot(labels, classes).movedim(-1, 1).float()


def cases(shape=(16, 12, 20), classes=4, count=3):
    labels = torch.stack([blobs(shape, classes, seed) for seed in range(count)])
    found = torch.stack([blobs(shape, classes, seed + 100) for seed in range(count)])
    mixed = torch.where(torch.arange(shape[0]).view(-1, *[1] * (len(shape) - 1)) < shape[0] // 2, labels, found)
    return mixed, labels


def updated(metric, found, labels, classes=4):
    """A metric that saw the cases one at a time."""
    for a, b in zip(found, labels, strict=True):
        metric.update(logits_of(a[None], classes), b[None])
    return metric


def one_hot(labels, classes=4):
    return F.one_hot(labels, classes).movedim(-1, 1)


# ---- Dice ----------------------------------------------------------------------------------------------------------


def test_volumes_are_scored_as_monai_does():
    found, labels = cases()
    monai = DiceMetric(include_background=False, reduction="none")(one_hot(found), one_hot(labels))  # (cases, classes)
    assert float(updated(MeanDice(4, IGNORE, pooled=False), found, labels).compute()) == pytest.approx(
        float(monai.mean())
    )
    for number in (1, 2, 3):
        mine = updated(ClassDice(number, 4, IGNORE, pooled=False), found, labels).compute()
        assert float(mine) == pytest.approx(float(monai[:, number - 1].mean()))


def test_images_are_pooled_over_the_split():
    found, labels = cases((16, 12))
    metric = updated(MeanDice(4, IGNORE, pooled=True), found, labels)
    expected = [
        2 * ((found == k) & (labels == k)).sum() / ((found == k).sum() + (labels == k).sum()) for k in (1, 2, 3)
    ]
    assert float(metric.compute()) == pytest.approx(float(sum(expected) / 3))


@pytest.mark.parametrize("pooled", [False, True])
def test_a_class_counts_where_labels_or_predictions_show_it(pooled):
    labels = torch.tensor([[[0, 1, 1, 0, 0, 0]]])
    found = torch.tensor([[[0, 1, 0, 0, 2, 0]]])  # class 2 is made up, class 3 is nowhere
    metric = updated(MeanDice(4, IGNORE, pooled=pooled), found, labels)
    assert float(metric.compute()) == pytest.approx((2 / 3 + 0) / 2)
    assert metric.absent() == [2, 3]
    each = [float(updated(ClassDice(k, 4, IGNORE, pooled=pooled), found, labels).compute()) for k in (1, 2, 3)]
    assert each == [pytest.approx(2 / 3), 0.0, pytest.approx(math.nan, nan_ok=True)]


def test_a_class_is_averaged_over_the_cases_that_show_it():
    labels = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    found = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]])
    assert float(updated(MeanDice(4, IGNORE, pooled=False), found, labels).compute()) == pytest.approx((1 + 0) / 2)
    assert float(updated(MeanDice(4, IGNORE, pooled=True), found, labels).compute()) == pytest.approx(4 / 5)


def test_nothing_to_score_is_nan():
    labels = torch.full((1, 4, 4, 4), IGNORE)
    for metric in (
        MeanDice(2, IGNORE, pooled=False),
        MeanDice(2, IGNORE, pooled=True),
        Hausdorff95(2, IGNORE, (1, 1, 1), pooled=False),
        Hausdorff95(2, IGNORE, (1, 1, 1), pooled=True),
        SurfaceDice(2, IGNORE, (1, 1, 1), pooled=False),
        VoxelCalibrationError(IGNORE),
    ):
        assert updated(metric, torch.ones_like(labels) - 1, labels, 2).compute().isnan(), type(metric)


# ---- surfaces ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(16, 12, 20), (18, 15)], ids=["3D", "2D"])
def test_surfaces_are_measured_as_monai_does(shape):
    spacing = SPACING[: len(shape)]
    found, labels = cases(shape)
    options = {"spacing": spacing, "include_background": False}
    far = compute_hausdorff_distance(one_hot(found), one_hot(labels), percentile=95, **options)
    near = compute_surface_dice(one_hot(found), one_hot(labels), class_thresholds=[max(spacing)] * 3, **options)
    mine = updated(Hausdorff95(4, IGNORE, spacing, pooled=False), found, labels)
    torch.testing.assert_close(mine.by_class()[1:, 0].float(), far.mean(dim=0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(mine.by_class()[1:, 1].float(), near.mean(dim=0), atol=1e-4, rtol=1e-4)
    assert float(mine.compute()) == pytest.approx(float(far.mean()), abs=1e-4)
    other = updated(SurfaceDice(4, IGNORE, spacing, pooled=False), found, labels)
    assert float(other.compute()) == pytest.approx(float(near.mean()), abs=1e-4)


def test_surfaces_at_the_border_of_an_image_count():
    found, truth = np.zeros((6, 5), bool), np.zeros((6, 5), bool)
    found[:2], truth[:4] = True, True
    one, other = surface_distances(found, truth, (3.0, 1.0))
    # All of the thin slab is surface. Its lower row is 1, 2 and 1 mm from the thick one's sides, 3 mm from its top.
    assert sorted(one) == [0.0] * 7 + [1.0, 1.0, 2.0]
    masks = (torch.as_tensor(mask)[None, None] for mask in (found, truth))
    monai = compute_hausdorff_distance(*masks, include_background=True, spacing=(3.0, 1.0))
    assert max(one.max(), other.max()) == pytest.approx(float(monai))


def sparse(found, labels, planes, axis):
    """Labels on some planes of an axis alone."""
    kept = torch.full_like(labels, IGNORE)
    for plane in planes:
        kept.select(axis + 1, plane).copy_(labels.select(axis + 1, plane))
    return found, kept


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_volume_with_labelled_planes_is_measured_within_them(axis):
    planes = (3, 4, 9)
    found, labels = sparse(*cases(count=1), planes, axis)
    inner = [mm for other, mm in enumerate(SPACING) if other != axis]
    for number in (1, 2, 3):
        pairs = [(found[0].select(axis, p) == number, labels[0].select(axis, p) == number) for p in planes]
        parts = [surface_distances(a.numpy(), b.numpy(), inner) for a, b in pairs]
        ways = [np.concatenate([part[way] for part in parts]) for way in (0, 1)]
        expected = max(np.percentile(way, 95) for way in ways)
        share = np.mean(np.concatenate(ways) <= max(inner))
        mine = updated(Hausdorff95(4, IGNORE, SPACING, pooled=False), found, labels).by_class()[number]
        assert mine.tolist() == pytest.approx([expected, share])


def test_what_is_predicted_beside_the_labels_is_not_measured():
    found, labels = sparse(*cases(count=1), (5,), 1)
    other = torch.where(labels == IGNORE, 3, found)
    for metric in (
        MeanDice(4, IGNORE, pooled=False),
        Hausdorff95(4, IGNORE, SPACING, pooled=False),
        SurfaceDice(4, IGNORE, SPACING, pooled=False),
        VoxelCalibrationError(IGNORE),
    ):
        first = updated(metric.clone(), found, labels).compute()
        assert torch.equal(first, updated(metric.clone(), other, labels).compute())


@pytest.mark.parametrize(("shape", "planes"), [((6, 5, 4), None), ((6, 5, 4), (2,)), ((6, 5), None)])
def test_a_class_on_one_side_counts_with_the_diagonal(shape, planes):
    spacing = SPACING[: len(shape)]
    labels, found = torch.zeros(1, *shape, dtype=torch.long), torch.zeros(1, *shape, dtype=torch.long)
    labels[0, 2:4, 2:4] = 1
    if planes:
        found, labels = sparse(found, labels, planes, 0)
    sides = list(zip(shape, spacing, strict=True))[1 if planes else 0 :]
    diagonal = math.sqrt(sum((voxels * mm) ** 2 for voxels, mm in sides))
    for a, b in ((found, labels), (labels, found)):
        if planes and b is found:
            continue
        assert float(updated(Hausdorff95(2, IGNORE, spacing, pooled=False), a, b, 2).compute()) == pytest.approx(
            diagonal
        )
        assert float(updated(SurfaceDice(2, IGNORE, spacing, pooled=False), a, b, 2).compute()) == 0.0


def test_images_pool_their_surfaces():
    found, labels = cases((18, 15))
    spacing = SPACING[:2]
    ways = []
    for way in (0, 1):
        parts = [
            surface_distances((a == 2).numpy(), (b == 2).numpy(), spacing) for a, b in zip(found, labels, strict=True)
        ]
        ways.append(np.concatenate([part[way] for part in parts]))
    expected = [max(np.percentile(way, 95) for way in ways), np.mean(np.concatenate(ways) <= max(spacing))]
    mine = updated(Hausdorff95(4, IGNORE, spacing, pooled=True), found, labels)
    assert mine.by_class()[2].tolist() == pytest.approx(expected)
    assert float(mine.compute()) == pytest.approx(float(mine.by_class()[1:, 0].mean()))


def test_labelled_planes_are_found():
    labelled = np.zeros((4, 5, 6), bool)
    assert labelled_planes(labelled) is None
    labelled[:, 2] = labelled[:, 4] = True
    assert labelled_planes(labelled) == 1
    labelled[0, 0, 0] = True
    assert labelled_planes(labelled) is None
    assert labelled_planes(np.ones((2, 2, 2), bool)) is None


# ---- calibration ---------------------------------------------------------------------------------------------------


def test_calibration_is_torchmetrics_over_labelled_voxels():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(3, 4, 6, 7, 5, generator=generator)
    labels = torch.randint(0, 4, (3, 6, 7, 5), generator=generator)
    labels[:, 2] = IGNORE
    reference = MulticlassCalibrationError(4, n_bins=15, ignore_index=IGNORE)
    reference.update(logits, labels)
    metric = VoxelCalibrationError(IGNORE)
    for a, b in zip(logits, labels, strict=True):
        metric.update(a[None], b[None])
    assert float(metric.compute()) == pytest.approx(float(reference.compute()), abs=1e-6)


def test_certain_and_right_is_perfectly_calibrated():
    labels = torch.tensor([[[0, 1], [1, 0]]])
    metric = VoxelCalibrationError(IGNORE)
    metric.update(200 * logits_of(labels, 2), labels)
    assert float(metric.compute()) == 0.0


# ---- together ------------------------------------------------------------------------------------------------------


def test_a_shared_state_gives_what_each_metric_gives_alone():
    spacing = SPACING
    make = {
        "dice": lambda: MeanDice(4, IGNORE, pooled=False),
        "dice_one": lambda: ClassDice(1, 4, IGNORE, pooled=False),
        "hd95_mm": lambda: Hausdorff95(4, IGNORE, spacing, pooled=False),
        "surface_dice_mm": lambda: SurfaceDice(4, IGNORE, spacing, pooled=False),
    }
    groups = [["dice", "dice_one"], ["hd95_mm", "surface_dice_mm"]]
    together = MetricCollection({name: built() for name, built in make.items()}, compute_groups=groups).clone()
    for epoch in range(2):
        found, labels = cases(count=2 + epoch)
        for a, b in zip(found, labels, strict=True):
            together.update(logits_of(a[None], 4), b[None])
            members = dict(together.items())  # what is logged
        alone = {name: updated(built(), found, labels).compute() for name, built in make.items()}
        assert {name: float(metric.compute()) for name, metric in members.items()} == {
            name: float(value) for name, value in alone.items()
        }
        for metric in members.values():
            metric.reset()


def test_two_processes_sum_up():
    found, labels = cases(count=3)
    for make in (
        lambda: MeanDice(4, IGNORE, pooled=False),
        lambda: SurfaceDice(4, IGNORE, SPACING, pooled=False),
        lambda: Hausdorff95(4, IGNORE, SPACING, pooled=True),
        lambda: VoxelCalibrationError(IGNORE),
    ):
        first, second = updated(make(), found[:1], labels[:1]), updated(make(), found[1:], labels[1:])
        whole = updated(make(), found, labels).compute()
        for name, reduce in first._reductions.items():
            one, other = getattr(first, name), getattr(second, name)
            joined = [*one, *other] if isinstance(one, list) else torch.stack((one, other))
            setattr(first, name, reduce(joined) if len(joined) else [])
        assert float(first.compute()) == pytest.approx(float(whole))
