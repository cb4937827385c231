"""Read the lines of text files aloud with an exported voice: a WAV file for each."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from rich.console import Console
from rich.progress import track
from torch import Tensor

from common.checkpoint import write_atomically
from common.errors import GraftError

FOLDER = Path("speech")
INDEX = "speech.csv"
TEXTS = (".txt",)


@runtime_checkable
class Speaks(Protocol):
    """A task that can read a text aloud."""

    def say(self, text: str) -> tuple[Tensor, int]:
        """Return float32 (T,) in [-1, 1] and its samples per second.

        Raises:
            GraftError: The text cannot be pronounced.
        """
        ...


def speak(task: Speaks, files: Sequence[Path], out: Path = FOLDER, *, skip_bad: bool = False) -> str:
    """Read each line of text files aloud.

    Args:
        task: The loaded voice, in eval mode.
        files: Text files in UTF-8; each line that is not empty is one recording.
        out: The folder to write into: for each line `NAME-LINE.wav` (one channel, 16 bit), and `speech.csv` with path,
            seconds and text. For a single line it may be a file that ends in .wav.
        skip_bad: Count and leave out lines that cannot be pronounced, instead of stopping at the first.

    Returns:
        A summary in one line.

    Raises:
        GraftError: No text, a line that cannot be pronounced, or an output that cannot be written.
    """
    lines = [line for file in files for line in _lines(file)]
    if not lines:
        raise GraftError(f"No text in {', '.join(map(str, files))}. Write one sentence a line.")
    single = out.suffix.lower() == ".wav"
    if single and len(lines) != 1:
        raise GraftError(f"--out is {out}, one recording, and {len(lines)} lines are given. Name a folder instead.")
    if out.is_file() and not single:
        raise GraftError(f"{out} is a file; give the folder to write into with --out.")
    if single and out.is_dir():
        raise GraftError(f"{out} is a folder; give the name of the file to write with --out.")
    names = [out.name] if single else _names(lines)
    folder = out.parent if single else out
    rows: list[dict[str, str]] = []
    quiet, console = not sys.stderr.isatty(), Console(stderr=True)
    work = list(zip(lines, names, strict=True))
    for (file, number, text), name in track(work, "speaking", console=console, transient=True, disable=quiet):
        try:
            audio, rate = task.say(text)
        except GraftError as error:
            if not skip_bad:
                hint = "Or add --skip-bad to leave out what cannot be pronounced."
                raise GraftError(f"{file}, line {number}: {error} {hint}") from error
            continue
        write_wav(folder / name, audio, rate)
        rows.append({"path": name, "seconds": f"{len(audio) / rate:.3f}", "text": text})
    if not single:
        _write_index(folder / INDEX, rows)
    left = len(lines) - len(rows)
    many = "recording" if len(rows) == 1 else "recordings"
    return f"{out}: {len(rows)} {many}" + (f", {left} lines left out" if left else "")


def write_wav(path: Path, audio: Tensor, rate: int) -> None:
    """Write float32 (T,) as a WAV file of 16 bit; what lies outside [-1, 1] is cut off."""
    write_atomically(path, lambda file: file.write(encoded(audio, rate, "WAV")))


def encoded(audio: Tensor, rate: int, form: str) -> bytes:
    """Encode float32 (T,) as a sound file.

    Args:
        audio: One channel.
        rate: Samples per second.
        form: "WAV" (16 bit) or "MP3" (about a tenth of it).
    """
    import soundfile

    buffer = io.BytesIO()
    samples = audio.detach().cpu().float().clamp(-1.0, 1.0).numpy()
    soundfile.write(buffer, samples, rate, format=form, subtype="PCM_16" if form == "WAV" else None)
    return buffer.getvalue()


def _lines(file: Path) -> list[tuple[Path, int, str]]:
    """Return the lines of a text file that are not empty, with the file and their numbers from 1."""
    if not file.is_file():
        raise GraftError(f"There is no text file '{file}'.")
    if file.suffix.lower() not in TEXTS:
        raise GraftError(f"{file} is no text file; give {', '.join(TEXTS)} with one sentence a line.")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise GraftError(f"Cannot read {file} ({error}): give a text file in UTF-8.") from error
    return [(file, n, " ".join(line.split())) for n, line in enumerate(text.split("\n"), start=1) if line.strip()]


def _names(lines: Sequence[tuple[Path, int, str]]) -> list[str]:
    """Name each recording by its file and line; files of one stem are told apart by a number."""
    stems: dict[Path, str] = {}
    for file, *_ in lines:
        if file not in stems:
            used = sum(other.stem == file.stem for other in stems)
            stems[file] = file.stem + (f"-{used + 1}" if used else "")
    return [f"{stems[file]}-{number:03d}.wav" for file, number, _ in lines]


def _write_index(path: Path, rows: Sequence[dict[str, str]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, ("path", "seconds", "text"), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))
