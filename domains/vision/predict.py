"""Run an exported adapter on the user's images and write a CSV."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from common.checkpoint import write_atomically
from common.errors import GraftError
from domains.vision.data import ImageBatch, read_image
from domains.vision.data._images import SUFFIXES
from domains.vision.data._transforms import centre
from domains.vision.tasks import ImageClassification

_BATCH = 32


def predict(
    task: ImageClassification, files: Sequence[Path], out: Path = Path("predictions.csv"), *, skip_bad: bool = False
) -> str:
    """Classify images.

    Args:
        task: The loaded adapter, in eval mode.
        files: Image files, or folders that are searched for images.
        out: The CSV to write: path, prediction, probability, and one probability column a class.
        skip_bad: Count and leave out images that cannot be read, instead of stopping at the first.

    Returns:
        A summary in one line.

    Raises:
        GraftError: No image, one that cannot be read, or a CSV that cannot be written; nothing half-written is left.
    """
    if out.is_dir():
        raise GraftError(f"{out} is a folder; give the name of the CSV to write with --out.")
    paths = list(_images(files))
    if not paths:
        raise GraftError(f"No image in {', '.join(map(str, files))}. Give files or folders with {', '.join(SUFFIXES)}.")
    names = task.facts.class_names
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "prediction", "probability", *names])
    skipped = 0
    starts = range(0, len(paths), _BATCH)
    quiet = not sys.stderr.isatty()
    for start in track(starts, "predicting", console=Console(stderr=True), transient=True, disable=quiet):
        read = [(path, _read(task, path, skip_bad=skip_bad)) for path in paths[start : start + _BATCH]]
        good = [(path, image) for path, image in read if image is not None]
        skipped += len(read) - len(good)
        if not good:
            continue
        for (path, _), row in zip(good, _probabilities(task, [image for _, image in good]), strict=True):
            best = int(row.argmax())
            writer.writerow([path, names[best], f"{row[best]:.6f}", *(f"{p:.6f}" for p in row.tolist())])
    write_atomically(out, lambda file: file.write(text.getvalue().encode()))
    return f"{out}: {len(paths) - skipped} images" + (f", {skipped} unreadable ones left out" if skipped else "")


def _images(files: Sequence[Path]) -> Iterator[Path]:
    for path in files:
        if path.is_dir():
            yield from sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        elif path.exists():
            yield path
        else:
            raise GraftError(f"There is no file or folder '{path}'.")


def _read(task: ImageClassification, path: Path, *, skip_bad: bool) -> Tensor | None:
    size = task.facts.image_size
    try:
        return centre(size)(read_image(path, size, task.facts.fit))
    except GraftError as error:
        if skip_bad:
            return None
        raise GraftError(f"{str(error).split(' Replace the file')[0]} Replace the file, or add --skip-bad.") from error


def _probabilities(task: ImageClassification, images: Sequence[Tensor]) -> Tensor:
    """Return class probabilities (B, K) of uint8 images (3, H, W)."""
    index = torch.arange(len(images))
    with torch.inference_mode():
        return task(ImageBatch(torch.stack(list(images)), torch.zeros_like(index), index)).softmax(dim=-1)
