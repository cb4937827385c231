"""The user's own voice: cleaned, split by text, cached; one clear error for each fault."""

from __future__ import annotations

import warnings

import pytest
import soundfile
import torch

from common.errors import GraftError
from domains.speech._levels import speech_level
from domains.speech.data.voices import Limits, VoiceManifest, _ready, base
from tests.domains.speech.sounds import hiss, nothing, syllables

RATE = 16_000
WORDS = ["red", "green", "blue", "black", "white", "pink", "brown", "grey", "gold", "lime", "teal", "plum"]
EASY = {"limits": Limits(minutes=0.05), "language": "en"}


@pytest.fixture
def voice(tmp_path):
    """Write a table of recordings and return its path."""

    def write(
        change=lambda audio, place: audio,
        texts=lambda word: f"The {word} one.",
        rate=RATE,
        columns=(),
        extra=lambda n: (),
    ):
        lines = [",".join(("path", "text", *columns))]
        for place, word in enumerate(WORDS):
            audio = torch.cat([nothing(0.3), syllables(120.0 + 2 * place, rate=RATE), nothing(0.4)])
            audio = change(audio + hiss(len(audio) / RATE, level=-70.0, seed=place), place)
            soundfile.write(tmp_path / f"{word}.wav", audio.numpy(), rate)
            lines.append(",".join((f"{word}.wav", texts(word), *extra(place))))
        (tmp_path / "voice.csv").write_text("\n".join(lines) + "\n")
        return str(tmp_path / "voice.csv")

    return write


def opened(path, **options):
    data = VoiceManifest(path, **{**EASY, **options})
    data.prepare_data()  # reads the table a first time
    data.setup()
    return data


def records(data):
    return [record for split in ("train", "val", "test") for record in data.records(split)]


def test_recordings_are_trimmed_resampled_and_of_one_loudness(voice):
    data = opened(voice(lambda audio, place: audio * 0.05 * (1 + place)), level=-25.0, margin=0.05)
    for record in records(data):
        audio = data.load(record)
        assert speech_level(audio, 22_050) == pytest.approx(-25.0, abs=0.3)
        assert record.seconds == pytest.approx(len(audio) / 22_050, abs=1e-4)
        assert record.seconds == pytest.approx(1.1 + 0.1, abs=0.06)  # of 1.8
    facts = data.facts
    assert (facts.rate, facts.language, facts.speaker, facts.pseudo_labelled) == (22_050, "en", "voice", False)
    assert sum(facts.minutes.values()) * 60 == pytest.approx(sum(r.seconds for r in records(data)), abs=0.1)
    assert 120 <= facts.f0_median <= 142
    assert facts.quality.snr > 30
    assert facts.quality.clipped == 0


def test_no_transcript_stands_in_two_splits(voice):
    data = opened(voice(texts=lambda word: f"The {WORDS[WORDS.index(word) // 2 * 2]} one."))
    parts = [{record.text for record in data.records(split)} for split in ("train", "val", "test")]
    assert all(parts)
    assert len(set.union(*parts)) == sum(map(len, parts))


def test_batches_are_padded_with_silence_and_say_which_recordings_they_hold(voice):
    data = opened(voice(), batch_size=5)
    seen = []
    for batch in data.train_dataloader():
        assert batch.audio.dtype == torch.float32
        for row, (length, place) in enumerate(zip(batch.lengths.tolist(), batch.index.tolist(), strict=True)):
            record = data.records("train")[place]
            torch.testing.assert_close(batch.audio[row, :length], data.load(record))
            assert not batch.audio[row, length:].any()
            assert batch.text[row] == record.text
            seen.append(place)
    assert sorted(seen) == list(range(data.facts.counts["train"]))
    assert sum(len(batch.text) for batch in data.test_dataloader()) == data.facts.counts["test"]
    budget = opened(data.table.path, seconds_per_batch=16.0)
    assert all(batch.audio.numel() <= 16.0 * 22_050 * 1.13 for batch in budget.train_dataloader())


def test_recordings_are_cleaned_once_and_again_where_one_changed(voice, monkeypatch):
    path = voice()
    first = opened(path).facts
    calls = []
    monkeypatch.setattr(_ready, "cleaned", lambda *given: calls.append(1))
    assert opened(path).facts == first
    assert not calls
    monkeypatch.undo()
    assert opened(path, level=-30.0).facts.digest != first.digest
    assert opened(voice(lambda audio, place: audio * 0.9)).facts.digest != first.digest
    assert opened(voice(texts=lambda word: f"A {word} one.")).facts.digest != first.digest


def test_minutes_choose_fewer_training_recordings_and_leave_the_test(voice):
    path = voice()
    whole, few, others = (opened(path, minutes=m, minutes_draw=d) for m, d in ((None, 0), (0.06, 0), (0.06, 1)))
    assert 3 <= few.facts.counts["train"] < whole.facts.counts["train"]
    assert few.records("test") == whole.records("test")
    assert {r.id for r in few.records("train")} != {r.id for r in others.records("train")}
    with pytest.raises(GraftError, match="minutes is 3"):
        opened(path, minutes=3.0)


def test_one_of_several_speakers_is_chosen_by_name(voice):
    path = voice(columns=("speaker",), extra=lambda n: (("ann", "bob")[n % 2],))
    data = opened(path, speaker="ann")
    assert (data.facts.speaker, sum(data.facts.counts.values())) == ("ann", 6)
    assert data.facts.left_out["other speakers"] == 6
    with pytest.raises(GraftError, match=r"2 speakers \(ann, bob\)"):
        opened(path)
    with pytest.raises(GraftError, match="Did you mean 'bob'"):
        opened(path, speaker="bobb")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda audio, place: (8 * audio).clamp(-1, 1), "of the samples clipped"),
        (lambda audio, place: audio + hiss(len(audio) / RATE, level=-20.0, seed=place), "dB above the noise"),
    ],
)
def test_a_hopeless_set_is_refused_with_its_figures_and_used_on_demand(voice, change, words):
    path = voice(change)
    with pytest.raises(GraftError, match=f"no voice can be learnt of this: .*{words}.*check: warn"):
        opened(path)
    with pytest.warns(UserWarning, match=words):
        data = opened(path, check="warn")
    assert words in data.facts.faults[0]


def test_too_few_minutes_are_refused(voice):
    with pytest.raises(GraftError, match=r"0\.[0-9] minutes of training speech \(at least 1\): record more"):
        opened(voice(), limits=Limits())


def test_texts_of_other_recordings_are_refused(voice):
    path = voice(texts=lambda word: f"The {word} one is a text that is very much longer than what is said in it.")
    with pytest.raises(GraftError, match="texts of 12 of 12 recordings do not fit their lengths"):
        opened(path)


def test_a_recording_of_another_rate_than_stated_is_refused(voice):
    path = voice(columns=("rate",), extra=lambda n: ("44100",))
    with pytest.raises(GraftError, match="declared as 44100 Hz and its header says 16000 Hz"):
        opened(path)


def test_a_rate_that_the_file_states_wrongly_shows_in_the_lengths(voice):
    with pytest.raises(GraftError, match="do not fit their lengths"):
        opened(voice(rate=48_000, texts=lambda word: f"The {word} one is here."), min_seconds=0.1)


def test_a_silent_recording_is_named_and_left_out(voice):
    path = voice(lambda audio, place: audio * (place != 4))
    with pytest.warns(UserWarning, match=r"left out, 'white\.wav': .*silent"):
        data = opened(path)
    assert data.facts.left_out["unreadable or silent"] == 1
    assert sum(data.facts.counts.values()) == 11
    with pytest.raises(GraftError, match=r"12 of 12 recordings cannot be used.*nearly silent \(speech at -6\d dBFS"):
        opened(voice(lambda audio, place: 0.002 * audio))


def test_lengths_outside_the_limits_are_counted(voice):
    path = voice(lambda audio, place: torch.cat([audio] * (1 + 3 * (place == 0))))
    data = opened(path, max_seconds=4.0, seconds_per_batch=8.0)
    assert data.facts.left_out == {"longer than 4 s": 1}
    assert data.facts.max_seconds < 4


def test_all_arguments_out_of_range_are_named_at_once():
    with pytest.raises(GraftError) as caught:
        VoiceManifest("x.csv", rate=100, level=3.0, margin=2.0, minutes=0.0, max_bad=1.0, batch_size=0, num_workers=-1)
    for name in ("rate", "level", "margin", "minutes", "max_bad", "batch_size", "num_workers"):
        assert f"{name} is" in str(caught.value)
    with pytest.raises(GraftError, match="Did you mean 'warn'"):
        VoiceManifest("x.csv", check="warm")  # type: ignore[arg-type]


def test_a_good_set_warns_of_nothing(voice):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert opened(voice()).facts.left_out == {}


def test_recordings_of_different_lengths_are_stacked():
    one = base.VoiceBatch(torch.ones(3), torch.tensor(3), ("a",), torch.tensor(7))
    two = base.VoiceBatch(torch.ones(5), torch.tensor(5), ("b",), torch.tensor(2))
    batch = base.collate([one, two])
    assert batch.audio.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert (batch.lengths.tolist(), batch.text, batch.index.tolist()) == ([3, 5], ("a", "b"), [7, 2])
