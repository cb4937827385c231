"""Lines of text read aloud: names, files, and one clear error for each fault."""

from __future__ import annotations

import csv
import io

import numpy as np
import pytest
import soundfile
import torch

from common.errors import GraftError
from domains.speech.predict import predict
from domains.speech.speak import encoded, speak
from tests.domains.speech.sounds import buzz

RATE = 22_050


class Parrot:
    """Hums for as many tenths of a second as a text has letters; digits it cannot pronounce."""

    def say(self, text):
        if text.isdigit():
            raise GraftError(f"'{text}' has no sound.")
        return 2.5 * buzz(120.0, len(text) / 10, RATE), RATE


@pytest.fixture
def text(tmp_path):
    def write(content, name="lines.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content, encoding="utf-8")
        return path

    return write


def test_each_line_becomes_a_recording(text, tmp_path):
    out = tmp_path / "out"
    files = [text("Good  day.\n\n Bye. \n"), text("Again.", "b/lines.txt")]
    assert predict(Parrot(), files, out) == f"{out}: 3 recordings"
    with (out / "speech.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == ["lines-001.wav", "lines-003.wav", "lines-2-001.wav"]
    assert [row["text"] for row in rows] == ["Good day.", "Bye.", "Again."]
    for row in rows:
        samples, rate = soundfile.read(out / row["path"], dtype="float32")
        info = soundfile.info(out / row["path"])
        assert (rate, info.channels, info.subtype) == (RATE, 1, "PCM_16")
        assert len(samples) / RATE == pytest.approx(float(row["seconds"]), abs=1e-3)
        wanted = Parrot().say(row["text"])[0].clamp(-1, 1).numpy()
        np.testing.assert_allclose(samples, wanted, atol=1e-4)  # cut off, not wrapped around


def test_a_single_line_may_name_its_file(text, tmp_path):
    out = tmp_path / "one.wav"
    assert speak(Parrot(), [text("Hello.")], out) == f"{out}: 1 recording"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lines.txt", "one.wav"]
    with pytest.raises(GraftError, match="2 lines are given"):
        speak(Parrot(), [text("a\nb")], out)
    (tmp_path / "dir.wav").mkdir()
    with pytest.raises(GraftError, match="is a folder"):
        speak(Parrot(), [text("a")], tmp_path / "dir.wav")


def test_a_line_that_cannot_be_said_is_named_or_left_out(text, tmp_path):
    path = text("Hello.\n\n12345\n")
    with pytest.raises(GraftError, match=r"lines\.txt, line 3: '12345' has no sound\. Or add --skip-bad"):
        speak(Parrot(), [path], tmp_path / "out")
    assert speak(Parrot(), [path], tmp_path / "out", skip_bad=True).endswith("1 recording, 1 lines left out")


@pytest.mark.parametrize(
    ("name", "content", "words"), [("a.txt", "\n \n", "No text"), ("a.wav", "x", "is no text file; give .txt")]
)
def test_files_without_text_are_refused(text, tmp_path, name, content, words):
    with pytest.raises(GraftError, match=words):
        speak(Parrot(), [text(content, name)], tmp_path / "out")


def test_what_is_missing_or_no_text_or_in_the_way_is_refused(text, tmp_path):
    with pytest.raises(GraftError, match="There is no text file"):
        speak(Parrot(), [tmp_path / "none.txt"], tmp_path / "out")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(GraftError, match="UTF-8"):
        speak(Parrot(), [tmp_path / "latin.txt"], tmp_path / "out")
    with pytest.raises(GraftError, match="is a file"):
        speak(Parrot(), [text("a")], text("b", "busy"))


def test_a_small_encoding_sounds_the_same():
    audio = buzz(150.0, 1.0, RATE)
    data = encoded(audio, RATE, "MP3")
    assert len(data) < len(encoded(audio, RATE, "WAV")) / 4
    samples, rate = soundfile.read(io.BytesIO(data), dtype="float32")
    assert rate == RATE
    spectra = [np.abs(torch.fft.rfft(torch.as_tensor(one[: RATE // 2])).numpy()) for one in (samples, audio.numpy())]
    assert np.corrcoef(*spectra)[0, 1] > 0.98
