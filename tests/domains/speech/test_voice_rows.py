"""Rows of predictions for generated speech."""

from __future__ import annotations

import soundfile
from PIL import Image

from domains.speech.data.voices import VoiceRecord
from domains.speech.voice_rows import voice_rows
from tests.domains.speech.sounds import buzz

RATE = 22_050


def test_every_utterance_has_a_row_and_some_can_be_heard(tmp_path):
    count = 4
    records = [
        VoiceRecord(id=f"p/{n}", path=f"{n}.flac", text=f"Line {n}.", seconds=0.5, content="", pseudo=n == 1)
        for n in range(count)
    ]
    generated, reference = [[buzz(hertz, 0.5, RATE)] * count for hertz in (200.0, 100.0)]
    scores = [{"mcd": 1 / 3, "hypothesis": "line nine", "errors": 1} for _ in records]
    scores[2] = {"mcd": 0.0}
    rows = voice_rows(records, generated, reference, RATE, scores, tmp_path, shown=3)
    assert [row["id"] for row in rows] == [record.id for record in records]
    assert rows[0]["mcd"] == 0.333333
    assert [row["pseudo_label"] for row in rows] == [False, True, False, False]
    heard = [row for row in rows if "sound" in row]
    assert len(heard) == 3
    again = voice_rows(records[::-1], generated, reference, RATE, scores[::-1], tmp_path, shown=3)
    assert {row["id"] for row in again if "sound" in row} == {row["id"] for row in heard}
    names = [row[name] for row in heard for name in ("sound", "reference_sound", "picture", "reference_picture")]
    assert len(set(names)) == len(names)
    for row in heard:
        for name in ("sound", "reference_sound"):
            assert soundfile.info(tmp_path / row[name]).samplerate == RATE
        for name in ("picture", "reference_picture"):
            with Image.open(tmp_path / row[name]) as page:
                assert page.width > 500
