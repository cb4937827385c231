"""Run an exported adapter on the user's own files: label maps with pictures, or a CSV of classes."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor

from common.checkpoint import write_atomically
from common.errors import GraftError
from domains.medical._labelmaps import plain_names, write_nifti
from domains.medical._task import MedicalTask
from domains.medical.data._atlases import HEAD, head_file
from domains.medical.data._reading import NIFTI, PICTURES, is_dicom
from domains.medical.data._records import VolumeBatch
from domains.medical.data.prepare import prepare, restore
from domains.medical.pictures import picture_of
from domains.medical.tasks import VolumeClassification

_SUFFIXES = (".nii.gz", ".png", "_labels.png")  # of what is written


def predict(task: MedicalTask, files: Sequence[Path], out: Path | None = None, *, skip_bad: bool = False) -> str:
    """Segment or classify images.

    Args:
        task: The loaded adapter, in eval mode.
        files: NIfTI files, pictures, DICOM files or folders of a series; other folders are searched for them. `mni152`,
            where there is no such file, is the average head of the catalog.
        out: Segmentation: the folder to write into (by default `predictions`), for each image `NAME.nii.gz`, the label
            map with the image's own shape and affine, and `NAME.png`, which shows it; a picture's label map is
            `NAME_labels.png`, class numbers on its own pixels. Classification: the CSV to write (by default
            `predictions.csv`): path, prediction, probability, and one probability column a class. What is there
            already is replaced.
        skip_bad: Count and leave out images that cannot be read, instead of stopping at the first.

    Returns:
        A summary in one line.

    Raises:
        GraftError: No image, one that cannot be read, or an output that cannot be written. Label maps that are written
            by then stay; no file is left half-written.
    """
    classify = isinstance(task, VolumeClassification)
    out = out or Path("predictions.csv" if classify else "predictions")
    found = dict(_images(files, task.facts.spatial_dims, out.resolve()))
    if not found:
        kinds = ", ".join((*NIFTI, ".dcm", *PICTURES))
        raise GraftError(f"No image in {', '.join(map(str, files))}. Give files or folders with {kinds}.")
    task.to("cuda" if torch.cuda.is_available() else "cpu")
    return (_classify if classify else _segment)(task, found, out, skip_bad=skip_bad)


def _segment(task: MedicalTask, found: dict[Path, str], out: Path, *, skip_bad: bool) -> str:
    if out.is_file():
        raise GraftError(f"{out} is a file; give the folder to write label maps into with --out.")
    done = 0
    names = dict(zip(found, plain_names(list(found.values())), strict=True))
    given = {path.resolve() for path in found}
    for target in (out.resolve() / f"{name}{suffix}" for name in names.values() for suffix in _SUFFIXES):
        if target in given:
            raise GraftError(f"{target} is an image to read and would be written over. Choose another --out.")
    for path, name in _tracked(names):
        read = _read(task, path, skip_bad=skip_bad, kept=f"{out} holds the {done} label maps so far. " if done else "")
        if read is None:
            continue
        image, affine, meta = read
        with torch.inference_mode():
            labels = task.keep(task.infer(_batch(task, image)))[0].cpu().numpy()
        whole = restore(labels, meta)
        values = np.asarray(whole.dataobj)
        if path.suffix.lower() in PICTURES:
            _write_png(out / f"{name}_labels.png", values[..., 0])
        else:
            write_nifti(out / f"{name}.nii.gz", values, whole.affine)
        case = {"image": image, "affine": affine, "path": path}
        drawn = picture_of(case, task.facts.class_names, labels, title=name)
        write_atomically(out / f"{name}.png", lambda file, drawn=drawn: file.write(drawn))
        done += 1
    return f"{out}: {done} label map{'s' if done != 1 else ''}" + _left_out(len(found) - done)


def _classify(task: MedicalTask, found: dict[Path, str], out: Path, *, skip_bad: bool) -> str:
    if out.is_dir():
        raise GraftError(f"{out} is a folder; give the name of the CSV to write with --out.")
    names = task.facts.class_names
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "prediction", "probability", *names])
    done = 0
    for path, _ in _tracked(found):
        read = _read(task, path, skip_bad=skip_bad)
        if read is None:
            continue
        with torch.inference_mode():
            row = task.infer(_batch(task, read[0])).float().softmax(dim=-1)[0].cpu()
        best = int(row.argmax())
        writer.writerow([path, names[best], f"{row[best]:.6f}", *(f"{p:.6f}" for p in row.tolist())])
        done += 1
    write_atomically(out, lambda file: file.write(text.getvalue().encode()))
    return f"{out}: {done} images" + _left_out(len(found) - done)


def _left_out(count: int) -> str:
    return f", {count} unreadable ones left out" if count else ""


def _tracked(items: dict[Path, str]) -> Iterator[tuple[Path, str]]:
    quiet = not sys.stderr.isatty()
    console = Console(stderr=True)
    yield from track(items.items(), "predicting", len(items), console=console, transient=True, disable=quiet)


def _images(files: Sequence[Path], dims: int, out: Path) -> Iterator[tuple[Path, str]]:
    """Yield each image to read and what to call it: its name, below the folder that was given.

    Folders are not searched in `out`, where an earlier prediction may lie.
    """
    for given in files:
        if str(given) == HEAD and dims == 3 and not given.exists():
            yield head_file(), HEAD
            continue
        if not given.exists():
            raise GraftError(f"There is no file or folder '{given}'.")
        if given.is_file():
            yield given, _stem(given.name)
            continue
        if out in (given.resolve(), *given.resolve().parents):
            raise GraftError(f"The folder {given} lies where predictions are written ({out}). Choose another --out.")
        for folder in sorted(path for path in (given, *given.rglob("*")) if path.is_dir()):
            if out in (folder.resolve(), *folder.resolve().parents):
                continue
            entries = sorted(path for path in folder.iterdir() if path.is_file())
            slices = [path for path in entries if is_dicom(path)]
            below = folder.relative_to(given)
            if slices and dims == 3:  # of images, each slice is one
                yield folder, str(below) if below.parts else given.resolve().name
            wanted = (*NIFTI, *PICTURES) if dims == 2 else NIFTI
            images = {path for path in entries if path.name.lower().endswith(wanted)} | set(slices if dims == 2 else ())
            for path in sorted(images):
                yield path, str(below / _stem(path.name))


def _stem(name: str) -> str:
    suffix = next((suffix for suffix in (".nii.gz", ".nii", ".dcm", *PICTURES) if name.lower().endswith(suffix)), "")
    return name[: len(name) - len(suffix)]


def _read(
    task: MedicalTask, path: Path, *, skip_bad: bool, kept: str = ""
) -> tuple[Tensor, np.ndarray, dict[str, Any]] | None:
    try:
        return prepare(path, task.facts.preprocessing)
    except GraftError as error:
        if skip_bad:
            return None
        raise GraftError(f"{error} {kept}Or add --skip-bad to leave out what cannot be read.") from error


def _batch(task: MedicalTask, image: Tensor) -> VolumeBatch:
    none = torch.zeros(1, dtype=torch.long, device=task.device)
    return VolumeBatch(image[None].to(task.device), none, none)


def _write_png(path: Path, labels: np.ndarray) -> None:
    buffer = io.BytesIO()
    Image.fromarray(labels.astype(np.uint8)).save(buffer, "PNG")
    write_atomically(path, lambda file: file.write(buffer.getvalue()))
