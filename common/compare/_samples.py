"""Pictures from the test split: what each method said about them, right or wrong, or what it made of them."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.compare.results import Run

if TYPE_CHECKING:
    from PIL import Image

_PIXELS = 144  # shown at 96 to 144: enough to see, small enough to mail
_PICTURES = 4  # in each group
_EXAMPLES = 3  # that are shown as each method's own picture
_WIDTH, _BYTES = 900, 200_000  # of a method's own picture: legible, and light enough for a dozen of them
_SOUNDS = {".mp3": "audio/mpeg", ".wav": "audio/wav", ".ogg": "audio/ogg"}
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


@dataclass(frozen=True, kw_only=True)
class View:
    """What one method made of a test example.

    Attributes:
        method: The method, or "recording" for what it was to be.
        picture: Its own picture, as a data URI.
        score: Its primary metric in words; "" if unknown.
        sound: Its own sound, as a data URI; "" if it made none.
    """

    method: str
    picture: str
    score: str
    sound: str = ""


@dataclass(frozen=True, kw_only=True)
class Example:
    """A test example and how the methods pictured it."""

    name: str
    views: tuple[View, ...]


def sample_groups(runs: Sequence[Run]) -> list[Group]:
    """Pick pictures that all runs predicted: all methods right, some right, none right.

    Which ones are shown is decided by a hash of their ids: neither by hand nor by the methods.

    Args:
        runs: One tested run for each method.

    Returns:
        The groups that have pictures; none where the runs left no predictions or the examples are no pictures.
    """
    answers = _answers(runs, "label", "prediction", "probability")
    shared = _shared(answers)
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


def pictured_examples(runs: Sequence[Run]) -> list[Example]:
    """Pick examples that the methods pictured themselves (`picture` in predictions.jsonl), by a hash of their ids.

    Beside its picture stands a method's `sound`, and behind all of them what it was to be: `reference_picture` and
    `reference_sound`, of the first method that has them.

    Args:
        runs: One tested run for each method.

    Returns:
        A few examples with the pictures of all methods that have one; none where no method has.
    """
    primary = {run.trial.method: (run.trial.folder, run.metrics.primary if run.metrics else "") for run in runs}
    answers = _answers(runs, "picture")
    examples: list[Example] = []
    for key in _shared(answers)[:_ATTEMPTS]:
        views: list[View] = []
        wanted: View | None = None
        for method, lines in answers.items():
            folder, metric = primary[method]
            value = lines[key].get(metric)
            known = isinstance(value, int | float) and not isinstance(value, bool)
            score = f"{metric.replace('_', ' ')} {value:.3f}" if known else ""
            view = _view(method, folder, lines[key], score)
            views += [view] if view else []
            wanted = wanted or _view("recording", folder, lines[key], "", "reference_")
        views += [wanted] if views and wanted else []
        if views:
            examples.append(Example(name=key, views=tuple(views)))
        if len(examples) == _EXAMPLES:
            break
    return examples


def _view(method: str, folder: Path, line: Mapping[str, Any], score: str, prefix: str = "") -> View | None:
    """Read the picture and the sound that a line names; None where there is no picture."""
    named = line.get(f"{prefix}picture")
    picture = _legible(folder / str(named)) if named else None
    if picture is None:
        return None
    sound = line.get(f"{prefix}sound")
    return View(method=method, picture=picture, score=score, sound=_playable(folder / str(sound)) if sound else "")


def _playable(path: Path) -> str:
    """Turn a sound into a data URI; "" where the file is missing, too heavy, or of a kind that browsers do not play."""
    kind = _SOUNDS.get(path.suffix)
    if kind is None or not path.is_file() or path.stat().st_size > _BYTES:
        return ""
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _answers(runs: Sequence[Run], *needed: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Read what each method left of each test example, where it left what is needed."""
    answers: dict[str, dict[str, dict[str, Any]]] = {}
    for run in runs:
        rows = _predictions(run.trial.folder / "predictions.jsonl")
        fit = {key: row for key, row in rows.items() if all(row.get(name) is not None for name in needed)}
        if fit:
            answers[run.trial.method] = fit
    return answers


def _shared(answers: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the ids that all methods have, in the order of their hashes."""
    if not answers:
        return []
    first, *rest = answers.values()
    return sorted((key for key in first if all(key in rows for rows in rest)), key=_shuffled)


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
    """Shrink a picture to a data URI; None where the file is no picture."""
    page = _open(Path(path)) if path else None
    if page is None:
        return None
    page.thumbnail((_PIXELS, _PIXELS))
    return _data_uri(page, quality=82)


def _legible(path: Path) -> str | None:
    """Turn a method's own picture into a data URI, as large and as sharp as `_BYTES` allow; None where it is none."""
    page = _open(path)
    if page is None:
        return None
    width, quality = min(_WIDTH, page.width), 88
    while True:
        height = max(1, round(page.height * width / page.width))
        picture = _data_uri(page.resize((width, height)), quality=quality)
        if len(picture) < _BYTES:
            return picture
        width, quality = (width, quality - 18) if quality > 60 else (max(1, width * 3 // 4), 88)


def _open(path: Path) -> Image.Image | None:
    """Read a picture, transparent parts on white."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            picture = image.convert("RGBA")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError):
        # Speech and proteins have no picture, and a cache may have moved: the report is complete without.
        return None
    page = Image.new("RGB", picture.size, "white")
    page.paste(picture, mask=picture)
    return page


def _data_uri(page: Image.Image, quality: int) -> str:
    buffer = io.BytesIO()
    page.save(buffer, "JPEG", quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
