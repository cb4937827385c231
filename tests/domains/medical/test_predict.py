"""Prediction on the user's own files: label maps on their own grids, pictures, and files that cannot be used."""

from __future__ import annotations

import csv
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import GraftError
from common.methods import LinearProbe
from domains.medical.data._records import VolumeBatch
from domains.medical.data.prepare import prepare
from domains.medical.predict import predict
from domains.medical.tasks import VolumeClassification
from tests.domains.medical.conftest import PREPROCESSING, Presence, balls, data_of, task_of


@pytest.fixture
def task():
    return task_of(LinearProbe(), data_of())


@pytest.fixture
def folder(nifti, tmp_path):
    """Three volumes in two levels of folders, and files that are none."""
    nifti("mine/a.nii.gz", seed=1)
    nifti("mine/deep/a.nii", seed=2, codes="LIP")
    nifti("mine/deep/b.nii.gz", (11, 9, 13), seed=3)
    (tmp_path / "mine" / "notes.txt").write_text("no image")
    Image.new("L", (4, 4)).save(tmp_path / "mine" / "scan.png")
    return tmp_path / "mine"


def expected(task, path):
    """The label map, by hand, on the prepared grid."""
    image, _, _ = prepare(path, task.facts.preprocessing)
    none = torch.zeros(1, dtype=torch.long)
    with torch.no_grad():
        return task.infer(VolumeBatch(image[None], none, none)).argmax(1)[0].numpy()


@pytest.mark.artifacts
def test_the_average_head_of_the_catalog_goes_by_its_name(task, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(task, "infer", lambda batch: torch.zeros(1, 3, *batch.image.shape[2:]))
    assert predict(task, [Path("mni152")], tmp_path / "out") == f"{tmp_path / 'out'}: 1 label map"
    assert nib.load(tmp_path / "out" / "mni152.nii.gz").shape == (197, 233, 189)


def test_each_volume_gets_a_label_map_on_its_own_grid_and_a_picture(task, folder, tmp_path):
    out = tmp_path / "new" / "out"
    assert predict(task, [folder], out) == f"{out}: 3 label maps"
    assert sorted(path.name for path in out.iterdir()) == [
        *("a.nii.gz", "a.png", "deep_a.nii.gz", "deep_a.png", "deep_b.nii.gz", "deep_b.png")
    ]
    for name, source in (("a", "a.nii.gz"), ("deep_a", "deep/a.nii"), ("deep_b", "deep/b.nii.gz")):
        given, found = nib.load(folder / source), nib.load(out / f"{name}.nii.gz")
        assert found.shape == given.shape
        np.testing.assert_allclose(found.affine, given.affine, atol=1e-5)
        assert found.get_data_dtype() == np.uint8
        assert np.array_equal(nib.as_closest_canonical(found).get_fdata(), expected(task, folder / source))
        assert Image.open(out / f"{name}.png").format == "PNG"


def test_a_volume_of_another_spacing_comes_back_on_its_own_grid(task, nifti, tmp_path):
    task.facts = type(task.facts)(
        **{**vars(task.facts), "preprocessing": {**task.facts.preprocessing, "spacing": [3.0, 1.5, 1.5]}}
    )
    path = nifti("fine.nii.gz", (20, 22, 18))
    predict(task, [path], tmp_path / "out")
    assert nib.load(tmp_path / "out" / "fine.nii.gz").shape == (20, 22, 18)


def test_pictures_get_pictures(tmp_path):
    task = task_of(LinearProbe(), data_of(2))
    image, _ = balls((20, 14), 0)
    path = tmp_path / "in" / "skin.lesion.png"
    path.parent.mkdir()
    Image.fromarray((255 * image[0].numpy()).astype(np.uint8)).save(path)
    out = tmp_path / "out"
    assert predict(task, [path.parent], out) == f"{out}: 1 label map"
    assert sorted(file.name for file in out.iterdir()) == ["skin_lesion.png", "skin_lesion_labels.png"]
    found = np.asarray(Image.open(out / "skin_lesion_labels.png"))
    assert np.array_equal(found, expected(task, path))


def test_an_unreadable_volume_stops_or_is_counted(task, folder, tmp_path):
    (folder / "b.nii.gz").write_bytes((folder / "a.nii.gz").read_bytes()[:200])
    out = tmp_path / "out"
    with pytest.raises(GraftError, match=r"b\.nii\.gz.* holds the 1 label maps so far\. Or add --skip-bad"):
        predict(task, [folder], out)
    assert sorted(path.name for path in out.iterdir()) == ["a.nii.gz", "a.png"]
    assert predict(task, [folder], out, skip_bad=True) == f"{out}: 3 label maps, 1 unreadable ones left out"
    assert len(list(out.iterdir())) == 6


def test_inputs_are_never_written_over(task, folder):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for out in (folder, folder.parent):
        with pytest.raises(GraftError, match=r"lies where predictions are written .* Choose another --out"):
            predict(task, [folder], out)
    with pytest.raises(GraftError, match=r"a\.nii\.gz is an image to read and would be written over"):
        predict(task, [folder / "a.nii.gz"], folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_an_earlier_prediction_is_not_searched(task, folder):
    out = folder / "out"
    for _ in range(2):
        assert predict(task, [folder], out) == f"{out}: 3 label maps"


def test_missing_files_and_empty_folders_are_refused(task, folder, tmp_path):
    with pytest.raises(GraftError, match=r"There is no file or folder '.*nowhere'"):
        predict(task, [tmp_path / "nowhere"], tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(GraftError, match=r"No image in .*empty\. Give files or folders with \.nii"):
        predict(task, [tmp_path / "empty"], tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(GraftError, match="is a file; give the folder"):
        predict(task, [folder], tmp_path / "file")


def series(folder, values, number=1):
    """Write a DICOM series of axial slices."""
    import pydicom
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    folder.mkdir(parents=True)
    uid = f"1.2.3.{number}"
    for index, plane in enumerate(values):
        meta = FileMetaDataset()
        meta.TransferSyntaxUID, meta.MediaStorageSOPInstanceUID = ExplicitVRLittleEndian, generate_uid()
        meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
        item = FileDataset(str(folder / f"{index}"), {}, file_meta=meta, preamble=b"\0" * 128)
        item.SOPClassUID, item.SOPInstanceUID, item.SeriesInstanceUID = (
            meta.MediaStorageSOPClassUID,
            generate_uid(),
            uid,
        )
        item.ImageOrientationPatient, item.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [0, 0, 1.5 * index]
        item.PixelSpacing, item.SliceThickness = [1.0, 2.0], 1.5
        item.Rows, item.Columns = plane.shape
        item.SamplesPerPixel, item.PhotometricInterpretation = 1, "MONOCHROME2"
        item.BitsAllocated, item.BitsStored, item.HighBit, item.PixelRepresentation = 16, 16, 15, 0
        item.PixelData = plane.astype(np.uint16).tobytes()
        item.save_as(folder / f"{index}.dcm", enforce_file_format=True)


def test_a_dicom_series_is_one_volume(task, tmp_path):
    image, _ = balls((14, 12, 10), 0)
    values = np.round(1000 * np.moveaxis(image[0].numpy(), 2, 0))
    series(tmp_path / "patients" / "p1" / "t1", values)
    series(tmp_path / "patients" / "p2", values, number=2)
    out = tmp_path / "out"
    assert predict(task, [tmp_path / "patients"], out) == f"{out}: 2 label maps"
    assert {path.name for path in out.glob("*.nii.gz")} == {"p1_t1.nii.gz", "p2.nii.gz"}
    assert predict(task, [tmp_path / "patients" / "p2"], tmp_path / "one").endswith("1 label map")
    assert (tmp_path / "one" / "p2.nii.gz").is_file()
    found = nib.load(out / "p2.nii.gz")
    assert sorted(found.shape) == [10, 12, 14]
    upright = nib.as_closest_canonical(found)
    assert upright.header.get_zooms() == (2.0, 1.0, 1.5)
    assert np.array_equal(upright.get_fdata(), expected(task, tmp_path / "patients" / "p2"))


def test_classes_go_into_a_csv(nifti, tmp_path):
    data = Presence()
    data.setup()
    task = task_of(LinearProbe(), data, VolumeClassification)
    paths = [nifti(f"{n}.nii.gz", seed=n) for n in range(2)]
    (tmp_path / "bad.nii.gz").write_bytes(b"junk")
    out = tmp_path / "out.csv"
    summary = predict(task, [*paths, tmp_path / "bad.nii.gz"], out, skip_bad=True)
    assert summary == f"{out}: 2 images, 1 unreadable ones left out"
    header, *rows = csv.reader(out.open(newline=""))
    assert header == ["path", "prediction", "probability", "balls", "noise"]
    for path, row in zip(paths, rows, strict=True):
        image, _, _ = prepare(path, {"spatial_dims": 3, "channels": 1, **PREPROCESSING})
        none = torch.zeros(1, dtype=torch.long)
        with torch.no_grad():
            probabilities = task(VolumeBatch(image[None], none, none)).softmax(-1)[0].tolist()
        assert row[0] == str(path)
        assert [float(value) for value in row[3:]] == pytest.approx(probabilities, abs=2e-6)
        assert row[1] == data.names[int(np.argmax(probabilities))]
    with pytest.raises(GraftError, match="is a folder; give the name of the CSV"):
        predict(task, paths, tmp_path)
