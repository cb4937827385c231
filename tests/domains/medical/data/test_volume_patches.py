"""Training patches: pure functions of seed, epoch and index, cut where the labels are."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch

from common.loading import item_rng
from domains.medical.data._augment import (
    Deformation,
    pose_points,
    random_contrast,
    random_field,
    random_intensity,
    rotation,
)
from domains.medical.data._dataset import Loaded, Patches, Wholes, class_voxels
from domains.medical.data._geometry import sample_linear
from domains.medical.data._records import IGNORE

SHAPE = (24, 20, 18)


def case(seed=0, shape=SHAPE):
    generator = torch.Generator().manual_seed(seed)
    label = torch.zeros(shape, dtype=torch.uint8)
    label[3:9, 4:12] = 1
    label[20:23, 15:17, *[slice(5, 8)] * (len(shape) - 2)] = 2
    return Loaded(torch.rand(1, *shape, generator=generator) + 0.1, label, np.eye(4))


def patches(cases, size=(8, 8, 8), **options):
    return Patches(
        lambda index: cases[index],
        len(cases),
        **({"length": 12, "patch_size": size, "spacing": (1.0,) * len(size), "seed": 3} | options),
    )


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("options", [{}, {"deformation": Deformation(), "mirror": 0, "finish": random_intensity}])
def test_equal_seed_epoch_and_index_give_equal_patches(options):
    cases = [case(0), case(1)]
    one, other = patches(cases, **options), patches(cases, **options)
    torch.manual_seed(5)
    first = [one[index] for index in range(12)]
    torch.manual_seed(6)
    assert all(same(first[index], other[index]) for index in reversed(range(12)))
    other.set_epoch(1)
    assert not any(same(first[index], other[index]) for index in range(12))
    assert not any(
        same(a, b) for a, b in zip(first, (patches(cases, seed=4, **options)[n] for n in range(12)), strict=True)
    )
    assert [int(item.index) for item in first] == [0, 1] * 6


def test_a_patch_leaves_the_rng_alone():
    dataset = patches([case()], deformation=Deformation(), finish=random_intensity)
    before = torch.random.get_rng_state()
    dataset[0]
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_plain_patch_is_a_part_of_the_volume():
    one = case()
    for index in range(12):
        image, label, _ = patches([one])[index]
        hits = [
            (x, y, z)
            for x in range(SHAPE[0] - 7)
            for y in range(SHAPE[1] - 7)
            for z in range(SHAPE[2] - 7)
            if torch.allclose(one.image[0, x : x + 8, y : y + 8, z : z + 8], image[0], atol=1e-4)
        ]
        assert len(hits) == 1
        x, y, z = hits[0]
        assert torch.equal(one.label[x : x + 8, y : y + 8, z : z + 8].long(), label)


def test_every_class_is_met_though_one_is_rare():
    dataset = patches([case()], length=60)
    met = Counter(value for index in range(60) for value in torch.unique(dataset[index].label).tolist())
    assert met[2] > 15
    voxels = class_voxels(case().label)
    assert [len(found) for found in voxels] == [int((case().label == value).sum()) for value in range(3)]


def test_voxels_without_a_label_are_no_centres():
    one = case()
    sparse = torch.full_like(one.label, IGNORE)
    sparse[:, 10] = one.label[:, 10]
    found = class_voxels(sparse)
    assert len(found) == 2
    assert all((voxels[:, 1] == 10).all() for voxels in found)
    dataset = patches([Loaded(one.image, sparse, one.affine)], deformation=Deformation())
    for index in range(12):
        label = dataset[index].label
        assert 0 < int((label != IGNORE).sum()) < label.numel() / 2


def test_what_lies_outside_is_zero_without_a_label():
    dataset = patches([case()], size=(32, 8, 8))
    image, label, _ = dataset[0]
    assert int((label == IGNORE).sum()) == 8 * 8 * 8
    assert (image[0][label == IGNORE] < 1e-4).all()
    assert (image[0][label != IGNORE] > 0).all()


@pytest.mark.parametrize("dims", [2, 3])
def test_augmented_image_and_label_stay_together(dims):
    shape = SHAPE[:dims]
    one = case(shape=shape)
    painted = Loaded(one.label[None].float() * 40 + 10, one.label, one.affine)
    dataset = patches([painted], size=(12,) * dims, deformation=Deformation(bend=2.0), mirror=0)
    for index in range(12):
        image, label, _ = dataset[index]
        inside = label != IGNORE
        agree = ((image[0] - (label * 40 + 10)).abs() < 20.1)[inside].float().mean()
        assert agree > 0.93


def test_whole_cases_and_labels_of_whole_cases():
    one = case()
    wholes = Wholes(lambda index: one, 2)
    assert len(wholes) == 2
    image, label, index = wholes[1]
    assert image is one.image
    assert label.dtype == torch.int64
    assert int(index) == 1
    classified = Loaded(one.image, torch.tensor(1), one.affine)
    image, label, _ = patches([classified], size=SHAPE)[0]
    assert int(label) == 1
    assert torch.allclose(image, one.image, atol=1e-4)


def test_a_pose_by_formula():
    degrees, scale, spacing = 30.0, 1.2, (1.0, 2.0)
    points = pose_points((5, 7), (10.0, 20.0), rotation([math.radians(degrees)]) * scale, spacing)
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    for row in range(5):
        for column in range(7):
            x, y = (row - 2) * spacing[0] * scale, (column - 3) * spacing[1] * scale
            wanted = [10 + (cos * x - sin * y) / spacing[0], 20 + (sin * x + cos * y) / spacing[1]]
            assert points[row, column].tolist() == pytest.approx(wanted, abs=1e-4)
    turned = rotation([0.3, -0.2, 0.5])
    assert (turned @ turned.T).numpy() == pytest.approx(np.eye(3), abs=1e-6)
    assert float(torch.det(turned)) == pytest.approx(1)


def test_linear_sampling_reproduces_a_linear_image():
    axes = torch.meshgrid(*(torch.arange(side, dtype=torch.float32) for side in SHAPE), indexing="ij")
    image = (axes[0] + 2 * axes[1] - 3 * axes[2])[None]
    points = torch.rand(50, 1, 1, 3) * (torch.tensor(SHAPE) - 1)
    wanted = points @ torch.tensor([1.0, 2.0, -3.0])
    assert sample_linear(image, points)[0] == pytest.approx(wanted, abs=1e-3)


def test_intensities_change_inside_the_body_only():
    image = case().image.clone()
    image[:, :5] = 0
    for change in (random_intensity, random_contrast):
        with item_rng(0, 0, 0):
            first = change(image)
        with item_rng(0, 0, 1):
            second = change(image)
        assert not torch.allclose(first, second)
        assert (first[:, :5] == 0).all()
        assert first[:, 5:].std() > 0.02
        assert torch.isfinite(first).all()


def test_a_random_contrast_is_one_curve():
    image = torch.linspace(0.01, 1, 4096).reshape(1, 16, 16, 16)
    mapped = torch.cat([random_contrast(image).reshape(-1) for _ in range(20)]).reshape(20, -1)
    assert mapped.min() >= 0
    assert mapped.max() <= 1
    assert (mapped.diff(dim=1).abs() < 0.01).all()
    assert (mapped[:, 0] > mapped[:, -1]).any()
    assert (mapped.max(dim=1).values - mapped.min(dim=1).values > 0.5).all()


def test_a_random_field_is_smooth():
    field = random_field((32, 32, 16), 3)
    assert field.shape == (3, 32, 32, 16)
    assert field.diff(dim=1).abs().max() < 1
    assert field.std() > 0.2
