"""Pictures from the test split with what each method said about them, right and wrong."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.compare.results import Run

_PIXELS = 144  # shown at 96 to 144: enough to see, small enough to mail
_PICTURES = 4  # in each group
_ATTEMPTS = 40  # examples of speech or proteins are no pictures: do not try them all


@dataclass(frozen=True, kw_only=True)
class Guess:
    """What one method said about a picture."""

    method: str
    prediction: str
    probability: float
    right: bool


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A picture, as a data URI, with its true label and what the methods said."""

    name: str
    label: str
    picture: str
    guesses: tuple[Guess, ...]


@dataclass(frozen=True, kw_only=True)
class Group:
    """Pictures that went alike: the heading, how many of the test split belong here, and a few of them."""

    title: str
    count: int
    samples: tuple[Sample, ...]


def sample_groups(runs: Sequence[Run]) -> list[Group]:
    """Pick pictures that all runs predicted: all methods right, some right, none right.

    Which ones are shown is decided by a hash of their ids: neither by hand nor by the methods.

    Args:
        runs: One tested run for each method.

    Returns:
        The groups that have pictures; none where the runs left no predictions or the examples are no pictures.
    """
    answers = {run.trial.method: _predictions(run.trial.folder / "predictions.jsonl") for run in runs}
    answers = {method: lines for method, lines in answers.items() if lines}
    if not answers:
        return []
    first, *rest = answers.values()
    shared = sorted((key for key in first if all(key in lines for lines in rest)), key=_shuffled)
    right = {key: sum(lines[key]["prediction"] == lines[key]["label"] for lines in answers.values()) for key in shared}
    parts = {
        "Every method right": [key for key in shared if right[key] == len(answers)],
        "Some methods right": [key for key in shared if 0 < right[key] < len(answers)],
        "No method right": [key for key in shared if right[key] == 0],
    }
    groups = [
        Group(title=title, count=len(keys), samples=tuple(_samples(keys, answers))) for title, keys in parts.items()
    ]
    return [group for group in groups if group.samples]


def _predictions(path: Path) -> dict[str, dict[str, Any]]:
    if not path.exists():
        return {}
    lines = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    return {line["id"]: line for line in lines}


def _shuffled(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _samples(keys: Sequence[str], answers: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[Sample]:
    samples: list[Sample] = []
    for key in keys[:_ATTEMPTS]:
        if len(samples) == _PICTURES:
            break
        lines = {method: own[key] for method, own in answers.items()}
        first = next(iter(lines.values()))
        picture = _thumbnail(first.get("path"))
        if picture is None:
            continue
        guesses = tuple(
            Guess(
                method=method,
                prediction=str(line["prediction"]),
                probability=float(line["probability"]),
                right=line["prediction"] == line["label"],
            )
            for method, line in lines.items()
        )
        samples.append(Sample(name=key, label=str(first["label"]), picture=picture, guesses=guesses))
    return samples


def _thumbnail(path: str | None) -> str | None:
    """Shrink a picture to a data URI, transparent parts on white; None where the file is no picture."""
    from PIL import Image, UnidentifiedImageError

    if not path:
        return None
    try:
        with Image.open(path) as image:
            small = image.convert("RGBA")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError):
        # Speech and proteins have no picture, and a cache may have moved: the report is complete without.
        return None
    small.thumbnail((_PIXELS, _PIXELS))
    page = Image.new("RGB", small.size, "white")
    page.paste(small, mask=small)
    buffer = io.BytesIO()
    page.save(buffer, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
