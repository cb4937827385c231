"""The sets out of installed packages: rules on made-up archives, figures on the real ones."""

from __future__ import annotations

import io

import pytest
import soundfile

from common.artifacts import Member
from common.errors import GraftError
from domains.speech.data import AsteriskWords, LibriVoxClips, StampSpeech, prompts, stamps
from tests.domains.speech.data.conftest import tone

ROOT = "usr/share/tuxpaint/stamps/"


def ogg(pitch: float, seconds: float = 1.0) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, tone(pitch, seconds, 44_100), 44_100, format="OGG")
    return file.getvalue()


def stamp(name: str, english: str, spanish: str, sound: bytes) -> list[Member]:
    text = f"{english}\nde.utf8=Nein.\nes.utf8={spanish}\n".encode()
    return [Member(f"{ROOT}{name}.txt", text, None), Member(f"{ROOT}{name}_desc_es.ogg", sound, None)]


@pytest.fixture
def archive(monkeypatch):
    members: list[Member] = []
    monkeypatch.setattr(stamps.artifacts, "fetch", lambda name: name)
    monkeypatch.setattr(stamps.artifacts, "iter_members", lambda path, prefix: iter(members))
    return members


def test_stamps_are_cleaned_and_counted(archive):
    shared = ogg(300)
    for name, english, spanish, sound in (
        ("animals/frog", "A frog.", "Una rana.", shared),
        ("animals/frog-1", "A frog.", "Una rana.", shared),
        ("animals/toad", "A toad.", "Una  RANA", ogg(310)),
        ("money/euro", "A euro.", "1 €.", ogg(320)),
        ("chess/rook", "A rook.", "La torre " * 20, ogg(330)),
        ("food/none", "Nothing.", "", ogg(340)),
        ("food/a", "An apple.", "Una manzana.", ogg(350)),
        ("food/b", "A pear.", "Una pera.", ogg(360)),
        ("odd/c", "Odd.", "Uno.", ogg(370)),
        ("odd/d", "Even.", "Dos.", ogg(370)),
    ):
        archive += stamp(name, english, spanish, sound)
    archive.append(Member(f"{ROOT}alone_desc_es.ogg", ogg(380), None))
    left_out: dict[str, int] = {}
    takes = {take.id: take for take in stamps._takes("es", left_out)}
    assert sorted(takes) == ["animals/frog", "animals/toad", "food/a", "food/b"]
    assert left_out == {
        "copies of a recording": 1,
        "one recording with different texts": 2,
        "text with digits or signs": 1,
        "text with more than 25 characters a second": 1,
        "without a transcript": 2,
    }
    assert takes["animals/frog"].group == takes["animals/toad"].group != takes["food/a"].group
    assert len(takes["food/a"].audio) == 16_000


def test_folds_test_every_group_once_and_never_validate_on_it():
    groups = [f"group {n}" for n in range(1000)]
    sides = [[stamps.side_of(group, fold) for fold in range(5)] for group in groups]
    assert all(row.count("test") == 1 for row in sides)
    shares = [sum(row[0] == side for row in sides) / 1000 for side in ("train", "val", "test")]
    assert shares == pytest.approx([0.7, 0.1, 0.2], abs=0.04)


def test_a_language_or_fold_that_is_not_there():
    with pytest.raises(GraftError, match="Unknown language of the stamps 'sp'"):
        StampSpeech("sp")
    with pytest.raises(GraftError, match="fold is 5; 0 to 4"):
        StampSpeech("es", fold=5)
    with pytest.raises(GraftError, match=r"Unknown part of the prompts 'number'\. Did you mean 'numbers'"):
        AsteriskWords(parts=("number",))


def test_words_of_the_prompts():
    assert prompts.PARTS["numbers"]["digits/17"] == "seventeen"
    assert prompts.PARTS["numbers"]["digits/90"] == "ninety"
    assert prompts.PARTS["dates"]["digits/mon-11"] == "december"
    assert prompts.PARTS["phonetic"]["phonetic/x_p"] == "x-ray"
    assert {part: len(words) for part, words in prompts.PARTS.items()} == {
        "numbers": 33,
        "dates": 22,
        "letters": 26,
        "phonetic": 26,
    }


@pytest.mark.artifacts
@pytest.mark.parametrize(("language", "least", "median"), [("es", 650, 1.25), ("ru", 700, 1.14), ("el", 430, 1.31)])
def test_the_real_stamps(language, least, median):
    tested = []
    for fold in range(5):
        data = StampSpeech(language, fold=fold)
        data.prepare_data()
        data.setup()
        said = [{record.text for record in data.records(split)} for split in ("train", "val", "test")]
        assert sum(map(len, said)) == len(set.union(*said))
        tested += [record.id for record in data.records("test")]
    assert sum(data.facts.counts.values()) >= least
    assert sorted(tested) == sorted(r.id for split in ("train", "val", "test") for r in data.records(split))
    seconds = sorted(r.seconds for r in data.records("train"))
    assert seconds[len(seconds) // 2] == pytest.approx(median, abs=0.1)
    assert data.facts.short
    letters = set("".join(data.facts.characters))
    assert letters & set({"es": "ñáé", "ru": "жщы", "el": "ωψς"}[language])
    batch = next(iter(data.test_dataloader()))
    assert batch.audio.abs().amax(dim=1).min() > 0.01


@pytest.mark.artifacts
def test_the_real_prompts():
    clips, words = LibriVoxClips(), AsteriskWords()
    for data, count in ((clips, 5), (words, 55)):
        data.prepare_data()
        data.setup()
        assert data.facts.counts == {"train": 0, "val": 0, "test": count}
        assert sum(len(batch.text) for batch in data.test_dataloader()) == count
        with pytest.raises(GraftError, match="for testing only"):
            data.train_dataloader()
    assert clips.facts.transcripts["words"] == 71
