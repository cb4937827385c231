from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import GraftError
from domains.vision.data import read_image
from domains.vision.data._images import ImageStore
from domains.vision.data._transforms import RightAngles, centre, crop_and_flip, turn_and_flip


def save(path, image, **options):
    image.save(path, **options)
    return path


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_parts_become_white(tmp_path, mode):
    pixels = np.zeros((8, 8, 4), dtype=np.uint8)
    pixels[:, :4] = (0, 0, 0, 255)
    path = save(tmp_path / "x.png", Image.fromarray(pixels).convert(mode))
    image = read_image(path, 8)
    assert torch.equal(image[:, :, :4], torch.zeros(3, 8, 4, dtype=torch.uint8))
    assert torch.equal(image[:, :, 4:], torch.full((3, 8, 4), 255, dtype=torch.uint8))


def test_half_transparent_is_mixed_with_white(tmp_path):
    path = save(tmp_path / "x.png", Image.new("RGBA", (8, 8), (200, 0, 100, 128)))
    expected = [round(255 + (value - 255) * 128 / 255) for value in (200, 0, 100)]
    assert read_image(path, 8)[:, 0, 0].tolist() == pytest.approx(expected, abs=1)


def test_palette_with_transparency(tmp_path):
    image = Image.new("P", (8, 8), 1)
    image.putpalette([10, 20, 30, 200, 100, 50])
    path = save(tmp_path / "x.png", image, transparency=1)
    assert read_image(path, 8).unique().tolist() == [255]


def test_camera_rotation_is_undone(tmp_path):
    pixels = np.zeros((10, 20, 3), dtype=np.uint8)
    pixels[:, :10] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    path = save(tmp_path / "x.png", Image.fromarray(pixels), exif=exif)
    image = read_image(path, 10)
    assert image.shape == (3, 20, 10)
    assert image[:, :9].min() == 255
    assert image[:, 11:].max() == 0


def test_sixteen_bit_grey_is_scaled(tmp_path):
    path = save(tmp_path / "x.png", Image.fromarray(np.full((8, 8), 257 * 77, dtype=np.uint16)))
    assert read_image(path, 8).unique().tolist() == [77]


def test_floating_point_is_refused(tmp_path):
    path = save(tmp_path / "x.tif", Image.fromarray(np.zeros((8, 8), dtype=np.float32)))
    with pytest.raises(GraftError, match="floating-point"):
        read_image(path, 8)


@pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "bmp", "webp", "tif"])
def test_formats(tmp_path, draw, suffix):
    image = read_image(draw(tmp_path / f"x.{suffix}", seed=0, size=(60, 30)), 10)
    assert image.shape == (3, 10, 20)
    assert image.dtype == torch.uint8


def test_squash_makes_a_square(tmp_path, draw):
    assert read_image(draw(tmp_path / "x.png", seed=0, size=(60, 30)), 10, "squash").shape == (3, 10, 10)


def test_long_strips_are_bounded(tmp_path, draw):
    assert read_image(draw(tmp_path / "x.png", seed=0, size=(1, 2000)), 16).shape == (3, 64, 16)


@pytest.mark.parametrize("damage", ["truncated png", "truncated jpg", "text", "empty", "missing"])
def test_unreadable_files_are_named_in_one_line(tmp_path, draw, truncate, damage):
    path = tmp_path / ("x.jpg" if "jpg" in damage else "x.png")
    if "truncated" in damage:
        truncate(draw(path, seed=0, size=(200, 200)))
    elif damage != "missing":
        path.write_text("no image" if damage == "text" else "")
    with pytest.raises(GraftError, match=r"x\.(png|jpg)") as caught:
        read_image(path, 8)
    assert "\n" not in str(caught.value)
    assert "skip_bad" in str(caught.value)


def test_store_keeps_up_to_its_bytes_and_reads_the_rest(tmp_path, draw):
    paths = [draw(tmp_path / f"{n}.png", seed=n, size=(8, 8)) for n in range(4)]
    one = 3 * 8 * 8
    store = ImageStore(max_bytes=2 * one, fit="crop")
    assert store.fill([(path, 8) for path in paths], check_all=False) == {}
    assert store.bytes == 2 * one
    for path in paths:
        assert torch.equal(store.get(path, 8), read_image(path, 8))
    for path in paths[:2]:
        path.unlink()
        assert store.get(path, 8).shape == (3, 8, 8)


def test_store_checks_what_it_does_not_keep(tmp_path, draw):
    good, bad = draw(tmp_path / "a.png", seed=0), tmp_path / "b.png"
    bad.write_text("no image")
    assert list(ImageStore(max_bytes=0, fit="crop").fill([(good, 8), (bad, 8)], check_all=True)) == [bad]


def test_centre_takes_the_middle_square():
    image = torch.zeros(3, 10, 30, dtype=torch.uint8)
    image[:, :, 10:20] = 9
    assert torch.equal(centre(10)(image), torch.full((3, 10, 10), 9, dtype=torch.uint8))


def test_flip_off_never_mirrors():
    ramp = torch.arange(0, 200, 10, dtype=torch.uint8).expand(3, 20, 20)
    torch.manual_seed(0)
    for _ in range(20):
        row = crop_and_flip(16, flip=False)(ramp)[0, 8].int()
        assert (row.diff() >= 0).all()
    mirrored = [bool((crop_and_flip(16, flip=True)(ramp)[0, 8].int().diff() <= 0).all()) for _ in range(40)]
    assert 5 < sum(mirrored) < 35


def test_crop_keeps_at_least_half_of_the_area():
    # A horizontal and a vertical ramp tell how much of each side a crop shows.
    across = torch.arange(200, dtype=torch.uint8).expand(200, 200)
    image = torch.stack([across, across.T, across])
    torch.manual_seed(0)
    for _ in range(50):
        crop = crop_and_flip(64, flip=False)(image).int()
        width = (crop[0].max() - crop[0].min()).item()
        height = (crop[1].max() - crop[1].min()).item()
        assert width * height > 0.5 * 200 * 200 * 0.95


def test_right_angles_only_move_pixels():
    image = torch.arange(3 * 4 * 4, dtype=torch.uint8).reshape(3, 4, 4)
    torch.manual_seed(0)
    seen = {tuple(turn_and_flip(4, flip=True)(image).flatten().tolist()) for _ in range(100)}
    turned = [torch.rot90(image, k, (1, 2)) for k in range(4)]
    assert seen == {tuple(t.flatten().tolist()) for x in turned for t in (x, x.flip(-1))}
    assert RightAngles()(image).shape == image.shape
