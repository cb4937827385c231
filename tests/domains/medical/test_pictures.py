"""Pictures of label maps: which planes, which way round, and that every class is seen and named."""

from __future__ import annotations

import io

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from domains.medical import pictures
from domains.medical.data._records import IGNORE
from domains.medical.pictures import Scene, View, draw, picture_of, strip_of, telling_plane, views_of

NAMES = ("background", "liver", "spleen")
AFFINE = np.array([[2.0, 0, 0, -10], [0, 1.0, 0, 5], [0, 0, 3.0, 0], [0, 0, 0, 1]])


@pytest.fixture
def body():
    """Every voxel knows its place: R, A and S in one number."""
    right, front, up = np.meshgrid(np.arange(6), np.arange(7), np.arange(5), indexing="ij")
    return (100 * right + 10 * front + up).astype(np.float32)


def turned(array, affine, codes):
    """The same body, stored with other axes."""
    turn = nib.orientations.axcodes2ornt(tuple(codes))
    return (
        nib.orientations.apply_orientation(array, turn),
        affine @ nib.orientations.inv_ornt_aff(turn, array.shape),
    )


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR", "SLA"])
def test_planes_are_shown_as_radiologists_do_however_stored(body, codes):
    stored, affine = turned(body, AFFINE, codes)
    axial, coronal, sagittal = views_of(Scene(image=stored, affine=affine), 3)
    middle = (3, 3, 2)
    # The patient's right is on the left, front and head are up.
    assert np.array_equal(axial.image, body[::-1, ::-1, middle[2]].T)
    assert np.array_equal(coronal.image, body[::-1, middle[1], ::-1].T)
    assert np.array_equal(sagittal.image, body[middle[0], ::-1, ::-1].T)
    assert axial.image[0, 0] == body[5, 6, 2]  # right, front
    assert [view.letters for view in (axial, coronal, sagittal)] == ["RLAP", "RLSI", "APSI"]
    assert [view.sides for view in (axial, coronal, sagittal)] == [(1.0, 2.0), (3.0, 2.0), (3.0, 1.0)]
    assert [view.name for view in (axial, coronal, sagittal)] == [
        "axial, z = 6 mm",
        "coronal, y = 8 mm",
        "sagittal, x = -4 mm",
    ]


def test_the_plane_that_shows_most_classes_is_chosen():
    labels = np.zeros((4, 9, 9), int)
    labels[1, :, :] = 1  # a large plane of one class
    labels[2, 0:8, :] = 1
    labels[2, 8, 0] = 2  # a small class beside nearly as much
    labels[3] = IGNORE
    assert telling_plane(labels, 0, 3) == 2
    assert telling_plane(np.zeros((4, 9), int), 0, 3) == 2


def test_a_single_slice_is_shown_in_its_own_plane(body):
    (view,) = views_of(Scene(image=body[:, 2:3], affine=AFFINE), 3)
    assert view.letters == "RLSI"
    assert np.array_equal(view.image, body[::-1, 2, ::-1].T)


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR"])
def test_a_strip_shows_the_planes_that_were_asked_for(body, codes):
    stored, affine = turned(body, AFFINE, codes)
    axis = nib.aff2axcodes(affine).index(next(code for code in nib.aff2axcodes(affine) if code in "AP"))
    planes = [0, 1, 2, 5, 6]
    views = strip_of(Scene(image=stored, affine=affine), axis, planes, most=3)
    backwards = "P" in nib.aff2axcodes(affine)
    fronts = [6 - plane if backwards else plane for plane in (0, 2, 6)]
    for view, front in zip(views, fronts, strict=True):
        assert np.array_equal(view.image, body[::-1, front, ::-1].T)
        assert view.name == f"coronal, y = {5 + front} mm"
    assert len(strip_of(Scene(image=stored, affine=affine), axis, [3])) == 1


def test_reference_and_prediction_stand_beside_the_image():
    image = np.random.default_rng(0).random((20, 30))
    reference, prediction = np.zeros((20, 30), int), np.zeros((20, 30), int)
    reference[5:10, 5:10] = 1
    prediction[5:10, 15:25] = 2
    widths = [
        pixels(draw([View(name="", image=image, reference=a, prediction=b)], NAMES)).shape[1]
        for a, b in ((None, None), (reference, None), (reference, prediction))
    ]
    assert widths == sorted(widths)
    assert widths[2] > 1.3 * widths[1]
    page = pixels(draw([View(name="", image=image, reference=reference, prediction=prediction)], NAMES, title="x"))
    thirds = [
        page[: page.shape[0] // 2, part * page.shape[1] // 3 : (part + 1) * page.shape[1] // 3] for part in range(3)
    ]
    colourful = [int((np.ptp(third, axis=2) > 60).sum()) for third in thirds]
    assert colourful[0] == 0
    assert min(colourful[1:]) > 500


def test_equal_scenes_make_equal_files():
    view = View(name="", image=np.eye(9), reference=np.eye(9, dtype=int), prediction=None)
    assert draw([view], NAMES) == draw([view], NAMES)
    constant = View(name="", image=np.ones((9, 9)), reference=None, prediction=np.zeros((9, 9), int))
    assert draw([constant], NAMES).startswith(b"\x89PNG")


def test_the_legend_names_all_classes_or_of_very_many_the_seen_ones():
    labels = np.array([[0, 3], [IGNORE, 5]])
    view = View(name="", image=np.eye(2), reference=labels, prediction=None)
    names = [str(number) for number in range(40)]
    assert [name for name, _ in pictures._legend([view], names[:12])] == names[1:12]
    assert [name for name, _ in pictures._legend([view], names)] == ["3", "5"]
    both = View(name="", image=np.eye(2), reference=labels, prediction=labels)
    assert pictures._legend([both], names)[-1] == ("lines: reference", "#FFFFFF")
    assert len({*pictures._colours(20)}) == 20
    assert len(pictures._colours(200)) == 200


def test_black_and_white_are_set_by_the_tissue():
    image = np.zeros((40, 40))
    image[10:30, 10:30] = np.linspace(1, 2, 400).reshape(20, 20)
    image[0, 0] = 1000.0
    low, high = pictures._window([image])
    assert low == 0
    assert 1.9 < high < 2.1


def case_of(image, label, affine, path=None):
    return {"image": image, "label": label, "affine": affine, "path": path, "id": "x"}


def test_a_case_decides_what_is_shown_of_it(body, monkeypatch):
    seen = []
    monkeypatch.setattr(pictures, "draw", lambda views, names, **options: seen.append((views, options)) or b"")
    whole = np.ones(body.shape, int)
    picture_of(case_of(body[None], whole, AFFINE), NAMES, whole, title="t")
    sparse = np.full(body.shape, IGNORE)
    sparse[:, [1, 4]] = 1
    picture_of(case_of(body[None], sparse, AFFINE), NAMES, whole)
    flat = whole[..., 0]
    picture_of(case_of(body[None, ..., 0], flat, np.eye(4)), NAMES, flat)
    picture_of(case_of(body[None, ..., 0], flat, np.eye(4), "a/b.PNG"), NAMES, flat)
    picture_of(case_of(body[None, ..., 0], flat, AFFINE, "a/b.nii.gz"), NAMES, flat)
    picture_of({"image": np.stack([body[..., 0]] * 3), "affine": np.eye(4), "path": "a.png"}, NAMES, flat)
    picture_of(case_of(body[None, ..., 0], flat, AFFINE, "chest.dcm"), NAMES, flat)
    names = [[view.name.split(",")[0] for view in views] for views, _ in seen]
    assert names == [["axial", "coronal", "sagittal"], ["coronal", "coronal"], [""], [""], ["axial"], [""], [""]]
    assert [options["unit"] for _, options in seen] == ["mm", "mm", "mm", "px", "mm", "px", "mm"]
    assert seen[6][0][0].letters == ""
    assert np.array_equal(seen[6][0][0].image, body[..., 0])
    assert np.array_equal(seen[2][0][0].image, body[..., 0].T[::-1])  # second axis upwards
    assert np.array_equal(seen[3][0][0].image, body[..., 0])  # a picture is shown as it is
    np.testing.assert_allclose(seen[5][0][0].image, body[..., 0])
    assert seen[5][0][0].reference is None
