"""Prediction on the user's own files: the table it writes, and files it cannot use."""

from __future__ import annotations

import csv
import shutil

import pytest
import torch
from PIL import Image

from common.errors import GraftError
from common.methods import LoRA
from domains.vision import predict as module
from domains.vision.data import ImageBatch, ImageFacts, read_image
from domains.vision.predict import predict
from domains.vision.tasks import ImageClassification
from tests.domains.vision.conftest import CLASSES, SIZE


@pytest.fixture
def task():
    made = ImageClassification("test_vit", LoRA(on=["all"], rank=2), pretrained=False)
    made.facts = ImageFacts(image_size=SIZE, class_names=CLASSES, name="", digest="", counts={})
    made.assemble()
    return made.eval()


@pytest.fixture
def folder(tmp_path, pictures):
    """Seven images in two levels of folders, and files that are no images."""
    root = tmp_path / "mine"
    (root / "deep").mkdir(parents=True)
    for number in range(4):
        shutil.copy(pictures / "cat" / f"{number}.png", root / f"cat{number}.png")
    for number in range(3):
        Image.open(pictures / "dog" / f"{number}.png").save(root / "deep" / f"dog{number}.JPG")
    (root / "notes.txt").write_text("no image")
    (root / "folder.png").mkdir()
    return root


def table(path):
    with path.open(newline="") as file:
        return list(csv.reader(file))


def test_the_table_has_a_row_an_image_and_a_column_a_class(task, folder, tmp_path):
    out = tmp_path / "new" / "out.csv"
    assert predict(task, [folder], out) == f"{out}: 7 images"
    header, *rows = table(out)
    assert header == ["path", "prediction", "probability", *CLASSES]
    names = [*(f"cat{n}.png" for n in range(4)), *(f"deep/dog{n}.JPG" for n in range(3))]
    assert [row[0] for row in rows] == [str(folder / name) for name in names]
    for row in rows:
        probabilities = dict(zip(CLASSES, map(float, row[3:]), strict=True))
        assert sum(probabilities.values()) == pytest.approx(1.0, abs=1e-5)
        assert row[1] == max(probabilities, key=probabilities.__getitem__)
        assert float(row[2]) == probabilities[row[1]]


def test_probabilities_are_the_tasks_own_whatever_the_batch(task, folder, tmp_path, monkeypatch):
    predict(task, [folder], tmp_path / "one.csv")
    monkeypatch.setattr(module, "_BATCH", 3)
    predict(task, [folder], tmp_path / "two.csv")
    for row, other in zip(table(tmp_path / "one.csv")[1:], table(tmp_path / "two.csv")[1:], strict=True):
        assert row[:2] == other[:2]
        image = read_image(row[0], SIZE)
        batch = ImageBatch(image.unsqueeze(0), torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long))
        with torch.no_grad():
            expected = task(batch).softmax(dim=-1)[0].tolist()
        assert [float(value) for value in row[3:]] == pytest.approx(expected, abs=2e-6)
        assert [float(value) for value in other[3:]] == pytest.approx(expected, abs=2e-6)


def test_an_image_becomes_a_square_as_in_training(task, tmp_path):
    path = tmp_path / "wide.png"
    image = Image.new("RGB", (96, 32), "red")
    image.paste("blue", (0, 0, 32, 32))
    image.save(path)
    rows = {}
    for fit in ("crop", "squash"):
        task.facts = ImageFacts(image_size=SIZE, class_names=CLASSES, name="", digest="", counts={}, fit=fit)
        predict(task, [path], tmp_path / f"{fit}.csv")
        rows[fit] = table(tmp_path / f"{fit}.csv")[1]
    middle = tmp_path / "middle.png"
    image.crop((32, 0, 64, 32)).save(middle)
    predict(task, [middle], tmp_path / "middle.csv")
    assert rows["crop"][1:] == table(tmp_path / "middle.csv")[1][1:]
    assert rows["crop"][3:] != rows["squash"][3:]


def test_names_with_commas_and_quotes_survive(task, pictures, tmp_path):
    path = tmp_path / 'a, "b".png'
    shutil.copy(pictures / "cat" / "0.png", path)
    predict(task, [path], tmp_path / "out.csv")
    assert table(tmp_path / "out.csv")[1][0] == str(path)


def test_an_unreadable_image_stops_or_is_counted(task, folder, tmp_path):
    (folder / "bad.png").write_bytes(b"junk")
    out = tmp_path / "out.csv"
    with pytest.raises(GraftError, match=r"Cannot read the image '.*bad\.png'.* add --skip-bad") as caught:
        predict(task, [folder], out)
    assert str(caught.value).count("Replace the file") == 1
    assert not out.exists()
    assert predict(task, [folder], out, skip_bad=True) == f"{out}: 7 images, 1 unreadable ones left out"
    assert len(table(out)) == 8


def test_only_unreadable_images_leave_an_empty_table(task, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"junk")
    out = tmp_path / "out.csv"
    assert "0 images, 1 unreadable" in predict(task, [tmp_path / "bad.png"], out, skip_bad=True)
    assert len(table(out)) == 1


def test_missing_files_and_empty_folders_are_refused(task, tmp_path):
    with pytest.raises(GraftError, match=r"There is no file or folder '.*nowhere'"):
        predict(task, [tmp_path / "nowhere"], tmp_path / "out.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(GraftError, match=r"No image in .*empty\. Give files or folders with \.png"):
        predict(task, [tmp_path / "empty"], tmp_path / "out.csv")


def test_a_table_cannot_be_a_folder(task, folder):
    with pytest.raises(GraftError, match="is a folder; give the name of the CSV to write with --out"):
        predict(task, [folder], folder)
