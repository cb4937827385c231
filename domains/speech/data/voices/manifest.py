"""The user's own recordings of one speaker."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from common.errors import GraftError, suggest
from domains.speech.data._own import Row
from domains.speech.data.own import Manifest
from domains.speech.data.voices._records import VoiceSource
from domains.speech.data.voices.base import VoiceData


class VoiceManifest(VoiceData):
    """Your own recordings of one speaker, in a table (CSV, TSV, JSON lines) with the columns `path` and `text`.

    Further columns are those of `Manifest`, `speaker` and `split` among them. Splits that are not given are cut by
    text: no transcript stands in two.

    Args:
        path: The table, UTF-8.
        language: Language code of all recordings ("en").
        speaker: Whose recordings are taken, where the table has several speakers.
        val_fraction: Share cut for validation where no such split is given.
        test_fraction: Share cut for the test where no such split is given.
        **kwargs: See `VoiceData`.

    Raises:
        GraftError: An argument is out of range.
    """

    def __init__(
        self,
        path: str,
        language: str = "",
        speaker: str = "",
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(**kwargs)
        self.table = _OneSpeaker(
            speaker,
            path=path,
            language=language,
            val_fraction=val_fraction,
            test_fraction=test_fraction,
            max_bad=self.max_bad,
            channel=self.cleaning.channel,
        )

    def _name(self) -> str:
        return f"VoiceManifest:{self.table.path.stem}"

    def _read(self) -> VoiceSource:
        found = self.table._read()
        left_out = Counter(found.left_out) + Counter({"unreadable or silent": found.skipped})
        return VoiceSource(splits=found.splits, language=found.language, speaker=self.table.voice, left_out=left_out)


class _OneSpeaker(Manifest):
    """A table's recordings of one speaker, who is no reason to keep texts together."""

    def __init__(self, speaker: str, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(**kwargs)
        self.speaker, self.voice = speaker, speaker

    def _name(self) -> str:
        return f"VoiceManifest:{self.path.stem}"

    def _list(self) -> tuple[Sequence[Row], Mapping[str, int]]:
        rows, left_out = super()._list()
        speakers = sorted({row.record.speaker for row in rows} - {""})
        if not self.speaker and len(speakers) > 1:
            some = ", ".join(speakers[:6]) + (" ..." if len(speakers) > 6 else "")
            raise GraftError(
                f"{self.path} has {len(speakers)} speakers ({some}), and a voice is one: name it with 'speaker'."
            )
        if self.speaker and self.speaker not in speakers:
            raise GraftError(f"{self.path} has no speaker '{self.speaker}'.{suggest(self.speaker, speakers)}")
        kept = [row for row in rows if not self.speaker or row.record.speaker == self.speaker]
        self.voice = self.speaker or (speakers[0] if speakers else self.path.stem)
        bare = [dataclasses.replace(row, record=dataclasses.replace(row.record, speaker="")) for row in kept]
        return bare, {**left_out, "other speakers": len(rows) - len(kept)}
