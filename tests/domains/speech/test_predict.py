"""Prediction on the user's own audio: windows cut at silence, tables, subtitles, and audio that cannot be used."""

from __future__ import annotations

import csv
import itertools
import json

import pytest
import soundfile
import torch

from common.errors import GraftError
from common.methods import BitFit, LoRA
from domains.speech._audio import RATE
from domains.speech._subtitles import Segment, srt, vtt
from domains.speech._windows import OVERLAP, Piece, is_silent, pieces_of
from domains.speech.predict import predict, recognise, timed, window_of
from domains.speech.tasks import CTCRecognition, Seq2SeqRecognition
from domains.speech.utterance import UtteranceClassification
from tests.domains.speech.toy import WORDS, beeps, task_of

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture
def speller(spelling, texts):
    """A recogniser of letters."""
    return task_of(CTCRecognition, spelling, BitFit(), texts, vocabulary="characters")


@pytest.fixture
def sound(tmp_path):
    """A folder with two clips in it, and something that is none."""
    place = tmp_path / "sound" / "deep"
    place.mkdir(parents=True)
    soundfile.write(place.parent / "b.wav", beeps("low mid"), RATE)
    soundfile.write(place / "a.flac", beeps("high low mid"), RATE)
    (place / "notes.txt").write_text("no sound")
    return place.parent


# ---- windows


def test_long_audio_is_cut_in_its_pauses_and_nothing_is_lost():
    speech = torch.rand(round(9.3 * RATE)) + 0.1
    for second in (2.6, 5.0, 7.4):  # pauses of 0.3 s
        speech[round(second * RATE) : round((second + 0.3) * RATE)] = 0.0
    pieces = pieces_of(speech, RATE, 3.0)
    assert [pieces[0].start, pieces[-1].end] == [0, len(speech)]
    assert all(one.end == two.start for one, two in itertools.pairwise(pieces))
    assert all(0 < piece.end - piece.start <= 3 * RATE for piece in pieces)
    cuts = [piece.end / RATE for piece in pieces[:-1]]
    assert all(second < cut < second + 0.3 for second, cut in zip((2.6, 5.0, 7.4), cuts, strict=True))


def test_speech_without_a_pause_is_cut_within_the_last_part_of_a_window():
    pieces = pieces_of(torch.ones(10 * RATE), RATE, 3.0)
    assert all((1 - OVERLAP) * 3 * RATE <= piece.end - piece.start <= 3 * RATE for piece in pieces[:-1])
    assert pieces_of(torch.ones(3 * RATE), RATE, 3.0) == [Piece(0, 3 * RATE)]
    assert [is_silent(torch.zeros(5)), is_silent(torch.full((5,), 0.01))] == [True, False]


def test_a_window_is_what_the_task_was_trained_with(whisper, wave, texts):
    short, full = (task_of(Seq2SeqRecognition, whisper, BitFit(), texts, context=name) for name in ("audio", "full"))
    assert (window_of(short), window_of(full)) == (2.0, 2.0)  # the whole context of this Whisper
    assert window_of(task_of(CTCRecognition, wave, BitFit(), texts)) == 30.0


def test_pieces_are_heard_one_by_one_and_put_together(whisper, texts):
    task = task_of(Seq2SeqRecognition, whisper, LoRA(on=["all"], rank=2), texts, max_tokens=4)
    audio = torch.from_numpy(beeps(" ".join(["low", "mid", "high"] * 6)))
    audio[RATE : 3 * RATE] = 0.0
    heard = []
    task.write = lambda given, beams=1: [heard.append(len(row)) or f"text {len(heard)}" for row in given[0]]
    segments = recognise(task, audio)
    pieces = pieces_of(audio, RATE, 2.0)
    loud = [piece for piece in pieces if not is_silent(audio[piece.start : piece.end])]
    assert len(segments) == len(heard) == len(loud)
    for segment, piece in zip(segments, loud, strict=True):
        assert (segment.start, segment.end) == (piece.start / RATE, pytest.approx(piece.end / RATE))
    assert [segment.text for segment in segments] == [f"text {number}" for number in range(1, len(loud) + 1)]


def test_times_that_the_decoder_wrote_bound_the_segments(whisper, texts):
    tokens = task_of(Seq2SeqRecognition, whisper, BitFit(), texts).tokens
    at = lambda seconds: tokens.no_timestamps + 1 + round(seconds / 0.02)  # noqa: E731
    ids = [at(0.0), *tokens.encode("a"), at(0.4), at(0.6), *tokens.encode("b"), at(1.9), *tokens.encode("c")]
    assert timed(ids, tokens, 1.5) == [Segment(0.0, 0.4, "a"), Segment(0.6, 1.5, "b"), Segment(1.5, 1.5, "c")]


# ---- subtitles


def test_subtitles_have_their_formats_clocks_and_signs():
    segments = [Segment(0, 1.2344, "one\n\ntwo"), Segment(2, 3, " "), Segment(3661.5, 3662, "a < b & c")]
    assert srt(segments) == (
        "1\n00:00:00,000 --> 00:00:01,234\none two\n\n2\n01:01:01,500 --> 01:01:02,000\na < b & c\n\n"
    )
    assert vtt(segments) == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:01.234\none two\n\n01:01:01.500 --> 01:01:02.000\na &lt; b &amp; c\n\n"
    )


# ---- files


def test_every_format_says_the_same(speller, sound, tmp_path):
    table, rows, place = tmp_path / "new" / "t.csv", tmp_path / "t.jsonl", tmp_path / "out"
    assert predict(speller, [sound], table) == f"{table}: 2 files"
    predict(speller, [sound], rows)
    predict(speller, [sound], place)
    with table.open(newline="") as file:
        listed = list(csv.DictReader(file))
    parsed = [json.loads(line) for line in rows.read_text().splitlines()]
    assert rows.read_text() == (place / "predictions.jsonl").read_text()
    assert [row["path"] for row in listed] == [row["path"] for row in parsed]
    assert [(row["text"], float(row["seconds"])) for row in listed] == [(row["text"], row["seconds"]) for row in parsed]
    for row in parsed:
        (segment,) = row["segments"]
        assert (segment["start"], segment["end"], segment["text"]) == (0, row["seconds"], row["text"])
    assert {path.name for path in place.iterdir()} == {"predictions.jsonl", "a.srt", "a.vtt", "b.srt", "b.vtt"}
    predict(speller, [sound / "b.wav"], tmp_path / "one.vtt")
    assert (tmp_path / "one.vtt").read_text() == (place / "b.vtt").read_text()


def test_classes_have_a_column_each(wave, classes, sound, tmp_path):
    task = task_of(UtteranceClassification, wave, BitFit(), classes)
    predict(task, [sound], tmp_path / "t.csv")
    with (tmp_path / "t.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        shares = {name: float(row[name]) for name in WORDS}
        assert sum(shares.values()) == pytest.approx(1, abs=1e-5)
        assert float(row["probability"]) == max(shares.values()) == shares[row["prediction"]]


def test_audio_that_cannot_be_used_stops_or_is_counted(speller, sound, tmp_path):
    (sound / "broken.wav").write_bytes(b"RIFF, but not really")
    soundfile.write(sound / "silent.wav", torch.zeros(RATE).numpy(), RATE)
    soundfile.write(sound / "tiny.wav", beeps("low")[:50], RATE)
    with pytest.raises(GraftError, match=r"broken\.wav.* --skip-bad"):
        predict(speller, [sound], tmp_path / "t.csv")
    assert not (tmp_path / "t.csv").exists()
    said = predict(speller, [sound], tmp_path / "t.csv", skip_bad=True)
    assert said == f"{tmp_path / 't.csv'}: 2 files, 3 unusable ones left out"


def test_outputs_that_cannot_hold_it_are_refused_at_once(speller, wave, classes, sound, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(GraftError, match=r"No audio in .*Give files or folders with .*\.wav"):
        predict(speller, [empty])
    with pytest.raises(GraftError, match="There is no file or folder"):
        predict(speller, [tmp_path / "nowhere"])
    with pytest.raises(GraftError, match=r"the subtitles of one file, and 2 are given"):
        predict(speller, [sound], tmp_path / "t.srt")
    with pytest.raises(GraftError, match=r"ends in \.csv, \.jsonl, \.srt, \.vtt, or a folder"):
        predict(speller, [sound], tmp_path / "t.xml")
    with pytest.raises(GraftError, match=r"classes are written as \.csv or \.jsonl"):
        predict(task_of(UtteranceClassification, wave, BitFit(), classes), [sound], tmp_path / "t.vtt")
