"""Published corpora in the layouts that they are downloaded in, with their own splits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.errors import GraftError
from common.splits import SPLITS
from domains.speech.data._own import OwnSpeech, Row, row_of
from domains.speech.data._reading import Table, lines_of, read_table, read_text

_EMPTY = "without a transcript"


class LibriSpeech(OwnSpeech):
    """LibriSpeech (Panayotov et al. 2015) or a corpus in its layout: `ROOT/PART/SPEAKER/CHAPTER/*.trans.txt` and FLAC.

    Args:
        root: The folder that holds the parts.
        train: Part to train on.
        val: Part to validate on.
        test: Part to test on.
        language: Language code of all clips.
        **kwargs: See `OwnSpeech`.

    Raises:
        GraftError: An argument is out of range.
    """

    def __init__(
        self,
        root: str,
        train: str = "train-clean-100",
        val: str = "dev-clean",
        test: str = "test-clean",
        language: str = "en",
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(language=language, **kwargs)
        self.root = Path(root).expanduser()
        self.parts = dict(zip(SPLITS, (train, val, test), strict=True))

    def _list(self) -> tuple[Sequence[Row], Mapping[str, int]]:
        rows: list[Row] = []
        for side, part in self.parts.items():
            tables = sorted((self.root / part).glob("*/*/*.trans.txt"))
            if not tables:
                raise GraftError(
                    f"There is no SPEAKER/CHAPTER/*.trans.txt in {self.root / part}: correct root or {side}."
                )
            for table in tables:
                for number, line in enumerate(lines_of(read_text(table)), start=1):
                    name, _, text = line.strip().partition(" ")
                    path = table.parent.relative_to(self.root) / f"{name}.flac"
                    values = {"id": name, "path": str(path), "text": text, "split": side, "speaker": name.split("-")[0]}
                    rows.append(row_of(f"{table}, line {number}", values, self.root, "text"))
        return rows, {}


class CommonVoice(OwnSpeech):
    """One language of Mozilla's Common Voice (Ardila et al. 2020): `train.tsv`, `dev.tsv`, `test.tsv` and `clips/`.

    Args:
        root: The folder of the language.
        language: Language code of all clips.
        **kwargs: See `OwnSpeech`.

    Raises:
        GraftError: An argument is out of range.
    """

    def __init__(self, root: str, language: str, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(language=language, **kwargs)
        self.root = Path(root).expanduser()

    def _name(self) -> str:
        return f"CommonVoice:{self.language}"

    def _list(self) -> tuple[Sequence[Row], Mapping[str, int]]:
        listed: list[tuple[str, dict[str, str]]] = []
        for side, file in (("train", "train.tsv"), ("val", "dev.tsv"), ("test", "test.tsv")):
            for where, row in read_table(self.root / file, ("client_id", "path", "sentence"), quoted=False):
                values = {"id": row["path"], "path": f"clips/{row['path']}", "text": row["sentence"]}
                listed.append((where, {**values, "split": side, "speaker": row["client_id"]}))
        return _with_text(listed, self.root)


class FLEURS(OwnSpeech):
    """One language of FLEURS (Conneau et al. 2022): `train.tsv`, `dev.tsv`, `test.tsv` and `audio/train/` and so on.

    Several speakers read each sentence; their names are not in the files.

    Args:
        root: The folder of the language.
        language: Language code of all clips.
        **kwargs: See `OwnSpeech`.

    Raises:
        GraftError: An argument is out of range.
    """

    def __init__(self, root: str, language: str, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(language=language, **kwargs)
        self.root = Path(root).expanduser()

    def _name(self) -> str:
        return f"FLEURS:{self.language}"

    def _list(self) -> tuple[Sequence[Row], Mapping[str, int]]:
        listed: list[tuple[str, dict[str, str]]] = []
        for side, part in (("train", "train"), ("val", "dev"), ("test", "test")):
            table = self.root / f"{part}.tsv"
            for number, line in enumerate(lines_of(read_text(table)), start=1):
                # No header: number of the sentence, file, the sentence as written, the sentence in lower case, ...
                cells = [cell.strip() for cell in line.split("\t")]
                if len(cells) < 4:
                    raise GraftError(
                        f"{table}, line {number} has {len(cells)} columns; FLEURS has 7: download it again."
                    )
                path = f"audio/{part}/{cells[1]}"
                values = {"id": f"{part}/{cells[1]}", "path": path, "text": cells[2], "split": side}
                listed.append((f"{table}, line {number}", values))
        return _with_text(listed, self.root)


def _with_text(listed: Table, root: Path) -> tuple[Sequence[Row], Mapping[str, int]]:
    """Leave out the clips without a sentence, which published corpora have a few of."""
    rows = [row_of(where, values, root, "text") for where, values in listed if values["text"]]
    return rows, {_EMPTY: len(listed) - len(rows)}
