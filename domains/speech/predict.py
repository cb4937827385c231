"""Run an exported adapter on the user's audio: texts as a table, JSON lines or subtitles, or a table of classes."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from common.checkpoint import write_atomically
from common.errors import GraftError
from domains.speech._audio import AV_SUFFIXES, SUFFIXES, read_audio
from domains.speech._recognition import Recognition
from domains.speech._subtitles import WRITERS, Segment
from domains.speech._task import SpeechTask
from domains.speech._windows import is_silent, padded, pieces_of
from domains.speech.backbones import WhisperTokens
from domains.speech.data._records import SpeechBatch
from domains.speech.speak import FOLDER, Speaks, speak
from domains.speech.tasks import Seq2SeqRecognition
from domains.speech.utterance import UtteranceClassification

_TABLES = (".csv", ".jsonl")
_PIECES = 8  # stretches that go through the network at once
_WINDOW = 30.0  # seconds of a stretch for an encoder that takes audio of any length
_LEAST = 2.0  # seconds: shorter windows than this would cut most sentences


@dataclass(frozen=True, slots=True)
class Heard:
    """What was said in a file.

    Attributes:
        path: The file.
        seconds: How long it is.
        segments: What was said when, in order.
    """

    path: Path
    seconds: float
    segments: tuple[Segment, ...]

    @property
    def text(self) -> str:
        """The whole text."""
        return " ".join(segment.text for segment in self.segments if segment.text)


def predict(
    task: SpeechTask | Speaks, files: Sequence[Path], out: Path | None = None, *, skip_bad: bool = False
) -> str:
    """Recognise or classify audio, or read texts aloud with a voice; for these see `speak`.

    Audio longer than the task reads at a time is cut where it is quietest; see `pieces_of`.

    Args:
        task: The loaded adapter, in eval mode.
        files: Audio files, or folders that are searched for them.
        out: What to write, by its ending. Recognition: `.csv` (path, seconds, text), `.jsonl` (the same with segments
            and their times), `.srt` or `.vtt` (subtitles of a single file), or a folder, which gets
            `predictions.jsonl` and for each file subtitles of both kinds. Classification: `.csv` or `.jsonl` (path,
            prediction, probability, and one probability a class). None is `predictions.csv`.
        skip_bad: Count and leave out audio that cannot be used, instead of stopping at the first.

    Returns:
        A summary in one line.

    Raises:
        GraftError: No audio, some that cannot be used, or an output that cannot be written.
    """
    if isinstance(task, Speaks):
        return speak(task, files, out or FOLDER, skip_bad=skip_bad)
    out = Path("predictions.csv") if out is None else out
    found = list(_audio_files(files))
    if not found:
        kinds = ", ".join(sorted(SUFFIXES | AV_SUFFIXES))
        raise GraftError(f"No audio in {', '.join(map(str, files))}. Give files or folders with {kinds}.")
    classify = isinstance(task, UtteranceClassification)
    _check_out(out, len(found), classify=classify)
    task.to("cuda" if torch.cuda.is_available() else "cpu")
    done: list[Any] = []
    for path in _tracked(found):
        try:
            audio = read_audio(path, task.facts.rate)
            done.append(_classified(task, path, audio) if classify else _heard(task, path, audio))
        except GraftError as error:
            if not skip_bad:
                raise GraftError(f"{error} Or add --skip-bad to leave out what cannot be used.") from error
    if classify:
        _write_table(out, done)
    else:
        _write(out, done)
    left = len(found) - len(done)
    many = "file" if len(done) == 1 else "files"
    return f"{out}: {len(done)} {many}" + (f", {left} unusable ones left out" if left else "")


# ---- what was said -------------------------------------------------------------------------------------------------


def _heard(task: SpeechTask, path: Path, audio: Tensor) -> Heard:
    if not isinstance(task, Recognition):
        raise GraftError(f"{type(task).__name__} predicts nothing. Take an adapter of recognition or classification.")
    return Heard(path, len(audio) / task.facts.rate, tuple(recognise(task, audio)))


def recognise(task: Recognition, audio: Tensor) -> list[Segment]:
    """Recognise audio of any length.

    Args:
        task: A task in eval mode.
        audio: float32 (T,) at the data's rate.

    Returns:
        What was said in each stretch that was read at a time, or, where the task writes times, between these.
    """
    rate = task.facts.rate
    pieces = pieces_of(audio, rate, window_of(task))
    heard: dict[int, list[Segment]] = {place: [] for place in range(len(pieces))}
    loud = [place for place, piece in enumerate(pieces) if not is_silent(audio[piece.start : piece.end])]
    for first in range(0, len(loud), _PIECES):
        chosen = loud[first : first + _PIECES]
        batch = _batch(task, [audio[pieces[place].start : pieces[place].end] for place in chosen])
        lengths = [(pieces[place].end - pieces[place].start) / rate for place in chosen]
        with torch.inference_mode():
            found = _segments(task, batch, lengths)
        for place, segments in zip(chosen, found, strict=True):
            offset = pieces[place].start / rate
            heard[place] = [Segment(offset + one.start, offset + one.end, one.text) for one in segments]
    return [segment for place in sorted(heard) for segment in heard[place]]


def window_of(task: SpeechTask) -> float:
    """Return the seconds that a task reads at a time: what it was trained with."""
    context = task._built.context
    if context is None:
        return _WINDOW
    return context if task.full_context() else min(context, max(_LEAST, task.facts.max_seconds))


def _segments(task: Recognition, batch: SpeechBatch, lengths: Sequence[float]) -> list[list[Segment]]:
    """Return the segments of each stretch, with times from its beginning."""
    heard, beams = task.hear(batch), task.settings.get("beams", 1)
    if isinstance(task, Seq2SeqRecognition) and task.settings["timestamps"]:
        found, tokens = task.ids_of(heard, beams=beams), task.tokens
        if isinstance(tokens, WhisperTokens):
            return [timed(ids, tokens, length) for ids, length in zip(found, lengths, strict=True)]
    texts = task.write(heard, beams=beams)
    return [[Segment(0.0, length, text.strip())] for text, length in zip(texts, lengths, strict=True)]


def timed(ids: Sequence[int], tokens: WhisperTokens, length: float) -> list[Segment]:
    """Read the times that a decoder wrote.

    Args:
        ids: Ids of text and times.
        tokens: The decoder's tokens.
        length: Seconds of the stretch; no time lies behind it, and a text whose end was not written ends there.
    """
    found = [(min(start, length), end if end > start else length, text) for start, end, text in tokens.segments(ids)]
    return [Segment(start, min(end, length), text) for start, end, text in found]


# ---- classes -------------------------------------------------------------------------------------------------------


def _classified(task: SpeechTask, path: Path, audio: Tensor) -> dict[str, Any]:
    context, seconds = task._built.context, len(audio) / task.facts.rate
    if context is not None and seconds > context:
        raise GraftError(f"{path} has {seconds:.1f} s, and '{task.backbone_name}' reads at most {context:g} s. Cut it.")
    with torch.inference_mode():
        shares = task.infer(_batch(task, [audio])).float().softmax(dim=-1)[0].tolist()
    names = task.facts.class_names
    best = shares.index(max(shares))
    row = {"path": str(path), "prediction": names[best], "probability": round(shares[best], 6)}
    return row | {name: round(share, 6) for name, share in zip(names, shares, strict=True)}


# ---- files ---------------------------------------------------------------------------------------------------------


def _check_out(out: Path, count: int, *, classify: bool) -> None:
    """Refuse an output that cannot hold what is asked for, before anything is computed."""
    suffix = out.suffix.lower()
    if classify and suffix not in _TABLES:
        raise GraftError(f"--out is {out}: classes are written as .csv or .jsonl. Give such a file.")
    if suffix not in ("", *_TABLES, *WRITERS):
        allowed = ", ".join((*_TABLES, *WRITERS))
        raise GraftError(f"--out is {out}: a file that ends in {allowed}, or a folder is allowed. Name such a one.")
    if suffix in WRITERS and count != 1:
        raise GraftError(f"--out is {out}, the subtitles of one file, and {count} are given. Name a folder instead.")
    if suffix and out.is_dir():
        raise GraftError(f"{out} is a folder; give the name of the file to write with --out.")
    if not suffix and out.is_file():
        raise GraftError(f"{out} is a file; give the folder to write into, or a name that ends in .csv, with --out.")


def _write(out: Path, done: Sequence[Heard]) -> None:
    suffix = out.suffix.lower()
    if suffix in WRITERS:
        _store(out, WRITERS[suffix](segment for one in done for segment in one.segments))
        return
    rows = [{"path": str(one.path), "seconds": round(one.seconds, 3), "text": one.text} for one in done]
    if suffix == ".csv":
        _write_table(out, rows, ("path", "seconds", "text"))
        return
    for row, one in zip(rows, done, strict=True):
        row["segments"] = [asdict(Segment(round(s.start, 3), round(s.end, 3), s.text)) for s in one.segments]
    _write_table(out if suffix else out / "predictions.jsonl", rows)
    if not suffix:
        for name, one in zip(_names([one.path for one in done]), done, strict=True):
            for ending, writer in WRITERS.items():
                _store(out / f"{name}{ending}", writer(one.segments))


def _write_table(out: Path, rows: Sequence[dict[str, Any]], header: Sequence[str] = ()) -> None:
    if out.suffix.lower() == ".jsonl":
        _store(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        return
    text = io.StringIO()
    writer = csv.DictWriter(text, header or list(rows[0] if rows else ()), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    _store(out, text.getvalue())


def _store(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode()))


def _names(paths: Sequence[Path]) -> list[str]:
    """Name each file's subtitles: by its stem, with the ending where two files share a stem, then with a number."""
    names: list[str] = []
    stems = [path.stem for path in paths]
    for path in paths:
        name = path.stem if stems.count(path.stem) == 1 else path.name
        number = 1
        while name in names:
            number += 1
            name = f"{path.name}-{number}"
        names.append(name)
    return names


def _audio_files(files: Sequence[Path]) -> Iterator[Path]:
    for given in files:
        if given.is_dir():
            wanted = SUFFIXES | AV_SUFFIXES
            yield from sorted(path for path in given.rglob("*") if path.suffix.lower() in wanted and path.is_file())
        elif given.exists():
            yield given
        else:
            raise GraftError(f"There is no file or folder '{given}'.")


def _batch(task: SpeechTask, clips: list[Tensor]) -> SpeechBatch:
    audio, lengths = padded(clips)
    none = torch.zeros(len(clips), 0, dtype=torch.long)
    parts = (tensor.to(task.device) for tensor in (none, torch.arange(len(clips))))
    return SpeechBatch(audio.to(task.device), lengths.to(task.device), ("",) * len(clips), *parts)


def _tracked(paths: Sequence[Path]) -> Iterator[Path]:
    quiet, console = not sys.stderr.isatty(), Console(stderr=True)
    yield from track(paths, "predicting", len(paths), console=console, transient=True, disable=quiet)
