"""The user's own clips: a manifest, a Hugging Face audio folder, a table of labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.errors import GraftError
from domains.speech.data._own import OwnSpeech, Row, row_of
from domains.speech.data._reading import read_table
from domains.speech.data._records import SPLIT_NAMES, Kind

_TEXT_COLUMNS = ("transcription", "text", "sentence")


class Manifest(OwnSpeech):
    """Your own clips with transcripts, in a table (CSV, TSV, JSON lines) with the columns `path` and `text`.

    Further columns, all optional: `speaker`; `start` and `end` of the stretch in the file, in seconds; `split` (train,
    val or test; a missing `val` or `test` is cut out of `train`); `rate`, in Hz, to be held against the file's header;
    `id`. Relative paths start at the table's folder.

    Args:
        path: The table, UTF-8.
        **kwargs: See `OwnSpeech`.

    Raises:
        GraftError: An argument is out of range.
    """

    def __init__(self, path: str, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(**kwargs)
        self.path = Path(path).expanduser()

    def _name(self) -> str:
        return f"Manifest:{self.path.stem}"

    def _list(self) -> tuple[Sequence[Row], Mapping[str, int]]:
        rows = read_table(self.path, ("path", "text"))
        return [row_of(where, row, self.path.parent, "text") for where, row in rows], {}


class LabelledAudio(OwnSpeech):
    """Your own clips with one class each (a keyword, an emotion), in a table with the columns `path` and `label`.

    Further columns are those of `Manifest`. Without the column `split`, a stated speaker stands in one split only, so
    the score is one for new voices; without speakers, each class is cut by itself, and a voice may be on all sides.
    Read `facts.confound` beside the score: it says how much the class is given away by voice, room and channel.

    Args:
        path: The table, UTF-8.
        **kwargs: See `OwnSpeech`.

    Raises:
        GraftError: An argument is out of range.
    """

    def __init__(self, path: str, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(**kwargs)
        self.path = Path(path).expanduser()

    def _name(self) -> str:
        return f"LabelledAudio:{self.path.stem}"

    def _kind(self) -> Kind:
        return "classes"

    def _list(self) -> tuple[Sequence[Row], Mapping[str, int]]:
        rows = read_table(self.path, ("path", "label"))
        return [row_of(where, row, self.path.parent, "classes") for where, row in rows], {}


class AudioFolder(OwnSpeech):
    """Your own clips in the layout of Hugging Face's audio folder.

    A `metadata.csv` or `metadata.jsonl` with `file_name` and `transcription` (or `text`, `sentence`) stands in the
    root, or in each of its folders `train`, `validation` and `test`; names are relative to it. Splits are those
    folders; without them they are cut as `OwnSpeech` says. `speaker` or `speaker_id` is used where it is there.

    Args:
        root: The folder.
        **kwargs: See `OwnSpeech`.

    Raises:
        GraftError: An argument is out of range.
    """

    def __init__(self, root: str, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(**kwargs)
        self.root = Path(root).expanduser()

    def _name(self) -> str:
        return f"AudioFolder:{self.root.name}"

    def _list(self) -> tuple[Sequence[Row], Mapping[str, int]]:
        tables = [p for ending in ("csv", "jsonl") for p in sorted(self.root.rglob(f"metadata.{ending}"))]
        if not tables:
            raise GraftError(
                f"{self.root} holds no metadata.csv or metadata.jsonl: write one with the columns file_name and "
                "transcription, or use Manifest."
            )
        return [
            self._row(where, row, table) for table in tables for where, row in read_table(table, ("file_name",))
        ], {}

    def _row(self, where: str, row: Mapping[str, str], table: Path) -> Row:
        column = next((name for name in _TEXT_COLUMNS if name in row), None)
        if column is None:
            raise GraftError(f"{where} has none of the columns {', '.join(_TEXT_COLUMNS)}: add one.")
        file = table.parent / row["file_name"]
        inside = file.relative_to(self.root)
        side = inside.parts[0] if inside.parts[0].lower() in SPLIT_NAMES and len(inside.parts) > 1 else ""
        whole = {
            "path": str(inside) if row["file_name"] else "",
            "text": row[column],
            "split": side or row.get("split", ""),
            "speaker": row.get("speaker") or row.get("speaker_id", ""),
        }
        return row_of(where, whole, self.root, "text")
