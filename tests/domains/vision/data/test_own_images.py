from __future__ import annotations

import shutil
from collections import Counter

import pytest

from common.errors import GraftError
from domains.vision.data import ImageCSV, ImageFolder


def folder_data(root, **options):
    data = ImageFolder(str(root), **{"image_size": 16, **options})
    data.setup()
    return data


def csv_data(path, **options):
    data = ImageCSV(str(path), **{"image_size": 16, **options})
    data.setup()
    return data


def refusal(make, *args, **options):
    with pytest.raises(GraftError) as caught:
        make(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def ids(data, split):
    return {record.id for record in data.records(split)}


@pytest.fixture
def split_folder(tmp_path, draw):
    root = tmp_path / "mine"
    for start, split in enumerate(("train", "val", "test")):
        for offset, label in enumerate(("a", "b")):
            for number in range(4):
                draw(root / split / label / f"{number}.png", seed=1000 * start + 100 * offset + number)
    return root


@pytest.fixture
def table(folder):
    """A CSV file beside the images of `folder`."""

    def write(rows, header="path,label", name="images.csv"):
        path = folder.parent / name
        path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
        return path

    return write


@pytest.fixture
def rows(folder):
    return [f"pets/{p.parent.name}/{p.name},{p.parent.name}" for p in sorted(folder.rglob("*.*"))]


# ---- a folder per class


def test_hashed_split_is_disjoint_complete_and_stable(folder):
    one, two = folder_data(folder), folder_data(folder, seed=7)
    parts = [ids(one, split) for split in ("train", "val", "test")]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 18
    assert parts == [ids(two, split) for split in ("train", "val", "test")]
    assert {r.label for r in one.records("val")} == {r.label for r in one.records("test")} == {"cat", "dog"}


def test_renaming_files_moves_none_to_another_side(folder):
    before = {r.path.read_bytes(): s for s in ("train", "val", "test") for r in folder_data(folder).records(s)}
    for path in list(folder.rglob("*.png")):
        path.rename(path.with_name(f"renamed-{path.name}"))
    data = folder_data(folder)
    assert {r.path.read_bytes(): s for s in ("train", "val", "test") for r in data.records(s)} == before


def test_copies_stay_together_in_a_hashed_split(folder):
    for number in range(6):
        shutil.copy(folder / "cat" / f"{number}.png", folder / "cat" / f"copy-{number}.png")
    data = folder_data(folder)
    sides = {r.id: s for s in ("train", "val", "test") for r in data.records(s)}
    assert all(sides[f"cat/{n}.png"] == sides[f"cat/copy-{n}.png"] for n in range(6))


def test_fractions(folder):
    data = folder_data(folder, val_fraction=0.3, test_fraction=0.3)
    assert Counter(r.label for r in data.records("test")) == {"cat": 3, "dog": 2}
    assert "below 1" in refusal(folder_data, folder, val_fraction=0.6, test_fraction=0.5)


def test_given_splits_are_kept(split_folder):
    data = folder_data(split_folder)
    assert ids(data, "val") == {f"val/{label}/{n}.png" for label in "ab" for n in range(4)}
    assert data.names == ("a", "b")


def test_a_missing_split_is_cut_out_of_train(split_folder):
    shutil.rmtree(split_folder / "val")
    data = folder_data(split_folder, val_fraction=0.25)
    assert data.facts.counts == {"train": 6, "val": 2, "test": 8}
    assert all(record.id.startswith("train/") for record in data.records("val"))


def test_other_names_of_the_validation_split(split_folder):
    (split_folder / "val").rename(split_folder / "validation")
    assert folder_data(split_folder).facts.counts["val"] == 8


def test_copies_across_given_splits_stay_in_train_only(split_folder):
    shutil.copy(split_folder / "train" / "a" / "0.png", split_folder / "test" / "a" / "leak.png")
    shutil.copy(split_folder / "val" / "b" / "0.png", split_folder / "test" / "b" / "leak.png")
    with pytest.warns(UserWarning, match="2 image file"):
        data = folder_data(split_folder)
    assert data.facts.left_out == {"copies across splits": 2}
    assert not any("leak" in name for name in ids(data, "test"))
    assert "train/a/0.png" in ids(data, "train")


def test_one_image_in_two_classes_is_refused(folder):
    shutil.copy(folder / "cat" / "0.png", folder / "dog" / "x.png")
    message = refusal(folder_data, folder)
    assert "cat/0.png" in message
    assert "dog/x.png" in message


def test_files_that_are_no_images_are_passed_over(folder):
    (folder / "cat" / "notes.txt").write_text("x")
    (folder / ".thumbnails").mkdir()
    (folder / "cat" / ".hidden.png").write_text("x")
    assert sum(folder_data(folder).facts.counts.values()) == 18


def test_empty_class_folder_is_named(folder):
    (folder / "emu").mkdir()
    assert str(folder / "emu") in refusal(folder_data, folder)


def test_no_images_at_all(tmp_path):
    assert "no images" in refusal(folder_data, tmp_path)


def test_images_outside_class_folders(folder):
    loose = folder / "cat"
    assert "put a folder for each class there" in refusal(folder_data, loose)


def test_no_such_folder(tmp_path):
    assert "no folder" in refusal(folder_data, tmp_path / "nowhere")


def test_class_too_small_to_split_is_named(folder, draw):
    for number in range(2):
        draw(folder / "emu" / f"{number}.png", seed=300 + number)
    assert "'emu' (2)" in refusal(folder_data, folder)


def test_one_class_is_too_few(folder):
    shutil.rmtree(folder / "dog")
    assert "at least 2 classes" in refusal(folder_data, folder)


def test_class_without_training_images_is_named(split_folder, draw):
    draw(split_folder / "test" / "c" / "0.png", seed=5000)
    assert "no training image of class 'c'" in refusal(folder_data, split_folder)


def test_split_folders_without_train(split_folder):
    shutil.rmtree(split_folder / "train")
    assert "train split" in refusal(folder_data, split_folder)


def test_damaged_image_is_named_or_skipped_and_counted(folder, truncate):
    truncate(folder / "cat" / "3.png")
    truncate(folder / "dog" / "5.jpg")
    message = refusal(folder_data, folder)
    assert "cat/3.png" in message
    assert "1 more" in message
    data = folder_data(folder, skip_bad=True)
    assert data.facts.skipped == 2
    assert sum(data.facts.counts.values()) == 16
    assert "cat/3.png" not in ids(data, "train") | ids(data, "val") | ids(data, "test")
    assert sum(len(batch.labels) for batch in data.train_dataloader()) == data.facts.counts["train"]


def test_failed_downloads_that_are_alike_are_damage_and_not_copies(folder):
    for path in ("cat/x.png", "cat/y.png", "dog/x.png"):
        (folder / path).write_text("404 not found")
    assert "Cannot read the image" in refusal(folder_data, folder)
    assert folder_data(folder, skip_bad=True).facts.skipped == 3


# ---- a CSV file


def test_csv_without_splits_equals_the_folder(folder, rows, table):
    data, reference = csv_data(table(rows)), folder_data(folder)
    for split in ("train", "val", "test"):
        assert {r.path for r in data.records(split)} == {r.path for r in reference.records(split)}
    assert data.facts.name == "ImageCSV:images"


def test_csv_with_splits_and_root(folder, rows, table):
    sides = ["train", "val", "test"]
    listed = [f"{row.removeprefix('pets/')},{sides[number % 3]}" for number, row in enumerate(rows)]
    data = csv_data(table(listed, "path,label,split"), root=str(folder))
    assert data.facts.counts == {"train": 6, "val": 6, "test": 6}
    assert ids(data, "train") == {row.split(",")[0] for row in listed[::3]}


def test_csv_with_byte_order_mark_and_spaces(rows, table):
    assert sum(csv_data(table(rows, "\ufeffpath, label")).facts.counts.values()) == 18


def test_csv_column_missing(rows, table):
    message = refusal(csv_data, table(rows, "path,lable"))
    assert "no column 'label'" in message
    assert "Did you mean 'lable'" in message


def test_csv_unknown_split(rows, table):
    message = refusal(csv_data, table([f"{row},tests" for row in rows], "path,label,split"))
    assert "line 2" in message
    assert "Did you mean 'test'" in message


@pytest.mark.parametrize(("line", "expected"), [("pets/cat/0.png,", "label is missing"), (",cat", "path is missing")])
def test_csv_cell_missing(table, line, expected):
    message = refusal(csv_data, table(["pets/cat/1.png,cat", line]))
    assert "line 3" in message
    assert expected in message


def test_csv_short_row(table):
    assert "label is missing" in refusal(csv_data, table(["pets/cat/1.png"]))


def test_csv_file_missing(rows, table):
    path = table([*rows, "pets/cat/nothing.png,cat"])
    message = refusal(csv_data, path)
    assert "line 20" in message
    assert "nothing.png" in message
    assert csv_data(path, skip_bad=True).facts.skipped == 1


def test_csv_path_twice(table):
    assert "line 2 already" in refusal(csv_data, table(["pets/cat/1.png,cat", "pets/cat/1.png,dog"]))


def test_csv_empty_or_absent(table, tmp_path):
    assert "lists no images" in refusal(csv_data, table([]))
    assert "Cannot read" in refusal(csv_data, tmp_path / "nowhere.csv")


def test_csv_damaged_image(folder, rows, table, truncate):
    truncate(folder / "dog" / "0.jpg")
    assert "0.jpg" in refusal(csv_data, table(rows))
    assert csv_data(table(rows), skip_bad=True).facts.skipped == 1


@pytest.mark.parametrize("mixed", [True, False])
def test_a_stated_group_is_kept_on_one_side_and_with_the_record(table, rows, mixed):
    """Groups of both classes, as sites are, and of one class each, as patients are."""
    groups = [f"{'' if mixed else row.split(',')[1]} {place % 9}" for place, row in enumerate(rows)]
    told = [f"{row},{group}" for row, group in zip(rows, groups, strict=True)]
    data = csv_data(table(told, "path,label,group"))
    sides = {split: {record.group for record in data.records(split)} for split in ("train", "val", "test")}
    assert all(sides.values())
    assert sorted(name for found in sides.values() for name in found) == sorted({group.strip() for group in groups})
    if not mixed:
        assert all({record.label for record in data.records(split)} == {"cat", "dog"} for split in sides)
    stated = [f"{line},{('train', 'val', 'test')[place % 3]}" for place, line in enumerate(told)]
    given = csv_data(table(stated, "path,label,group,split"))
    of = {row.split(",")[0]: group.strip() for row, group in zip(rows, groups, strict=True)}
    assert all(record.group == of[record.id] for record in given.records("test"))


def test_too_few_groups_are_refused(table, rows):
    told = [f"{row},site {place % 2}" for place, row in enumerate(rows)]
    assert "has 2 groups, too few for train, val, test: give a column split" in refusal(
        csv_data, table(told, "path,label,group")
    )
