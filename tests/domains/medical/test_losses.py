"""Segmentation losses: MONAI's values where everything is labelled, and nothing at all from unlabelled voxels."""

from __future__ import annotations

import pytest
import torch
from monai.losses import DiceCELoss, DiceLoss, FocalLoss, TverskyLoss
from torch.nn import functional as F

from common.errors import GraftError
from domains.medical.losses import SegmentationLoss, balanced_weights, given_weights

IGNORE = 255
KINDS = ("dice_ce", "dice_focal", "tversky", "ce")


def case(shape=(2, 5, 4, 6), classes=3, unlabelled=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape[0], classes, *shape[1:], generator=generator)
    labels = torch.randint(0, classes, shape, generator=generator)
    labels[torch.rand(shape, generator=generator) < unlabelled] = IGNORE
    return logits, labels


def dice(**options):
    return DiceLoss(include_background=False, to_onehot_y=True, softmax=True, batch=True, **options)


REFERENCES = {
    "ce": lambda logits, labels: F.cross_entropy(logits, labels[:, 0]),
    "dice_ce": DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, batch=True),
    "tversky": TverskyLoss(include_background=False, to_onehot_y=True, softmax=True, batch=True, alpha=0.3, beta=0.7),
    # MONAI's softmax focal loss is a mean over classes too, of which all but one are zero.
    "dice_focal": lambda logits, labels: (
        dice()(logits, labels)
        + logits.shape[1] * FocalLoss(to_onehot_y=True, use_softmax=True, gamma=2.0)(logits, labels)
    ),
}


@pytest.mark.parametrize("shape", [(2, 7, 5), (2, 5, 4, 6)], ids=["2D", "3D"])
@pytest.mark.parametrize("kind", KINDS)
def test_without_unlabelled_voxels_it_is_monais(kind, shape):
    logits, labels = case(shape)
    logits.requires_grad_()
    expected = REFERENCES[kind](logits, labels[:, None])
    (wanted,) = torch.autograd.grad(expected, logits)
    found = SegmentationLoss(kind, IGNORE)(logits, labels)
    (got,) = torch.autograd.grad(found, logits)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(got, wanted, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_unlabelled_voxels_change_nothing(kind):
    logits, labels = case(unlabelled=0.6)
    loss = SegmentationLoss(kind, IGNORE)
    other = torch.where((labels == IGNORE)[:, None], torch.full_like(logits, float("nan")), logits).requires_grad_()
    logits.requires_grad_()
    first, second = loss(logits, labels), loss(other, labels)
    assert torch.equal(first, second)
    (gradient,), (same,) = torch.autograd.grad(first, logits), torch.autograd.grad(second, other)
    assert torch.equal(gradient, same)
    unlabelled = (labels == IGNORE)[:, None].expand_as(gradient)
    assert not gradient[unlabelled].any()
    assert gradient[~unlabelled].any()


@pytest.mark.parametrize("kind", KINDS)
def test_the_labelled_part_alone_has_the_same_loss(kind):
    logits, labels = case((1, 6, 5), unlabelled=0.5)
    labelled = labels != IGNORE
    alone = logits.movedim(1, -1)[labelled].T[None, :, :, None]  # the labelled voxels as an image of their own
    loss = SegmentationLoss(kind, IGNORE)
    torch.testing.assert_close(loss(logits, labels), loss(alone, labels[labelled][None, :, None]))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_labelled_costs_nothing(kind):
    logits, labels = case(unlabelled=1.1)
    logits.requires_grad_()
    loss = SegmentationLoss(kind, IGNORE)(logits, labels)
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


def test_weights_act_on_the_voxelwise_term_alone():
    logits, labels = case(unlabelled=0.3)
    weights = torch.tensor([0.5, 2.0, 0.0])
    expected = F.cross_entropy(logits, labels, weight=weights, ignore_index=IGNORE)
    torch.testing.assert_close(SegmentationLoss("ce", IGNORE, weights)(logits, labels), expected)
    plain = SegmentationLoss("dice_ce", IGNORE)(logits, labels) - SegmentationLoss("ce", IGNORE)(logits, labels)
    weighted = SegmentationLoss("dice_ce", IGNORE, weights)(logits, labels)
    torch.testing.assert_close(weighted, expected + plain)
    probability = logits.softmax(1).movedim(1, -1)[labels != IGNORE]
    target = labels[labels != IGNORE]
    p = probability[range(len(target)), target]
    focal = (weights[target] * (1 - p) ** 2 * -p.log()).sum() / weights[target].sum()
    torch.testing.assert_close(SegmentationLoss("dice_focal", IGNORE, weights)(logits, labels), focal + plain)


def test_low_precision_is_summed_in_single():
    logits, labels = case((2, 40, 40, 10))
    loss = SegmentationLoss("dice_ce", IGNORE)
    assert loss(logits.bfloat16(), labels).dtype == torch.float32
    torch.testing.assert_close(loss(logits.bfloat16(), labels), loss(logits.bfloat16().float(), labels))


def test_balanced_weights_are_inverse_frequencies():
    labels = [
        torch.tensor([[0, 0, 0], [0, 1, IGNORE]]),
        torch.tensor([[0, 0, 1], [3, IGNORE, IGNORE]], dtype=torch.uint8),
    ]
    found = balanced_weights(labels, 5, IGNORE)
    torch.testing.assert_close(found, torch.tensor([9 / (3 * 6), 9 / (3 * 2), 1.0, 9 / (3 * 1), 1.0]))
    torch.testing.assert_close(balanced_weights([], 2, IGNORE), torch.ones(2))


def test_wrong_names_and_weights_are_refused():
    with pytest.raises(GraftError, match=r"Unknown loss 'dicece'\. Did you mean 'dice_ce'\?"):
        SegmentationLoss("dicece", IGNORE)
    assert given_weights([1, 2], ("background", "liver")).tolist() == [1, 2]
    for wrong in ([1.0], [1.0, -1.0], [0.0, 0.0], [], [float("nan"), 1.0], [float("inf"), 1.0]):
        with pytest.raises(GraftError, match=r"for each of the 2 classes \(background, liver\)"):
            given_weights(wrong, ("background", "liver"))


def test_the_state_of_a_run_does_not_hold_the_weights():
    assert not SegmentationLoss("ce", IGNORE, torch.ones(2)).state_dict()


@pytest.mark.parametrize("kind", ["dice_ce", "tversky"])
def test_a_class_that_no_label_shows_is_left_to_the_voxelwise_term(kind):
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 6, 6, requires_grad=True)
    labels = torch.randint(0, 3, (2, 6, 6))  # never class 3
    SegmentationLoss(kind, IGNORE)(logits, labels).backward()
    alone = logits.detach().clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(alone, labels) if kind == "dice_ce" else 0.0
    probabilities = alone.softmax(dim=1)
    weights = (0.5, 0.5) if kind == "dice_ce" else (0.3, 0.7)
    for number in (1, 2):
        p, y = probabilities[:, number], (labels == number).float()
        hit, outside, missed = (p * y).sum(), (p * (1 - y)).sum(), ((1 - p) * y).sum()
        loss = loss + (1 - hit / (hit + weights[0] * outside + weights[1] * missed)) / 2
    loss.backward()
    torch.testing.assert_close(logits.grad, alone.grad, rtol=1e-3, atol=1e-6)
