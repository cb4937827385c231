"""The Asterisk voice: labels of a recogniser with their confidence, and splits by phrase."""

from __future__ import annotations

import io
import itertools

import av
import numpy as np
import pytest
import torch

from common.artifacts import Member
from common.errors import GraftError
from common.splits import stable_hash
from domains.speech.backbones import build
from domains.speech.backbones._mel import log_mel
from domains.speech.data.voices import AsteriskVoice, Limits, _labels, _prompts
from domains.speech.data.voices import asterisk as asterisk_module
from domains.speech.data.voices._labels import PseudoLabel, labeller
from domains.speech.data.voices.asterisk import phrase_sides
from tests.domains.speech.sounds import nothing, syllables

RATE = 16_000
FRACTIONS = {"test": 0.3, "val": 0.2}
NOUNS = (
    "apple pear plum fig grape lemon lime melon peach quince cherry mango kiwi papaya guava banana date olive".split()
)


def g722(audio):
    """Encode float32 (T,) at 16 kHz."""
    file = io.BytesIO()
    with av.open(file, "w", format="g722") as container:
        stream = container.add_stream("g722", rate=RATE)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray((audio.numpy()[None] * 32767).astype(np.int16), format="s16", layout="mono")
        frame.rate = RATE
        for packet in (*stream.encode(frame), *stream.encode(None)):
            container.mux(packet)
    return file.getvalue()


@pytest.fixture
def package(monkeypatch):
    """Put recordings into the package's place and label them by a table; return how often labels were made."""
    made = []

    def put(sounds, labels):
        members = [Member(f"{_prompts.ROOT}{name}.g722", g722(audio), None) for name, audio in sounds.items()]
        monkeypatch.setattr(_prompts.artifacts, "fetch", lambda name: name)
        monkeypatch.setattr(_prompts.artifacts, "iter_members", lambda path, prefix: iter(members))
        monkeypatch.setattr(_prompts, "PROMPT_PARTS", 1)
        answers = iter(labels)

        def make():
            made.append(1)
            return lambda audio: next(answers)

        monkeypatch.setattr(asterisk_module, "prompts", lambda **given: _prompts.prompts(make, **given))
        return made

    return put


# ---- labels


def test_a_confidence_is_the_mean_log_probability_of_what_was_written(whisper):
    built = build(whisper)
    audio = syllables()
    found = labeller(built)(audio)
    ids = built.tokens.encode(found.text)
    features = log_mel(audio[None], 200, 80, 200)
    start = list(built.tokens.start())
    with torch.no_grad():
        logits = built.model(input_features=features, decoder_input_ids=torch.tensor([[*start, *ids]])).logits
        wanted = torch.tensor([*ids, built.tokens.eos])
        loss = torch.nn.functional.cross_entropy(logits[0, len(start) - 1 :], wanted)
        confidence = _labels._confidence(built, built.model.model.encoder(features).last_hidden_state, ids)
    assert confidence == pytest.approx(-float(loss), abs=1e-4)
    assert not found.agreed  # a network with random weights is sure of nothing
    assert found.confidence < -0.6


@pytest.mark.parametrize(
    ("confidence", "other", "agreed", "calls"),
    [(-0.05, "no", True, 1), (-0.3, "Hello there", True, 2), (-0.3, "Hello they're", False, 2), (-0.9, "", False, 1)],
)
def test_a_second_search_is_asked_where_the_first_is_in_doubt(monkeypatch, whisper, confidence, other, agreed, calls):
    built, made = build(whisper), []

    def generate(built, model, features, *, beams=1, max_tokens=None):
        made.append(beams)
        return [built.tokens.encode("hello there." if beams == 1 else other)]

    monkeypatch.setattr(_labels, "generate", generate)
    monkeypatch.setattr(_labels, "_confidence", lambda *given: confidence)
    found = labeller(built)(syllables())
    assert (found.text, found.agreed, len(made)) == ("hello there.", agreed, calls)


# ---- splits


def test_like_phrases_stand_on_one_side_whatever_their_order():
    texts = [f"Please press {noun} for the main menu of this office now." for noun in NOUNS]
    assert len(set(phrase_sides(texts, FRACTIONS))) == 1  # ten words of twelve are in both of any two
    texts = [f"The {noun} {NOUNS[n - 1]} {NOUNS[n - 2]} said so." for n, noun in enumerate(NOUNS)]
    texts += [text.upper() for text in texts]
    sides = phrase_sides(texts, FRACTIONS)
    assert sides[: len(NOUNS)] == sides[len(NOUNS) :]
    assert set(sides) == {"train", "val", "test"}
    assert phrase_sides(texts[::-1], FRACTIONS)[::-1] == sides


def test_short_texts_train():
    texts = [f"{noun} {NOUNS[n - 1]}." for n, noun in enumerate(NOUNS)]
    assert set(phrase_sides(texts, FRACTIONS)) == {"train"}


# ---- the set


def test_texts_are_known_or_pseudo_labels_and_doubtful_ones_are_left_out(package):
    phrases = [f"the {noun} {NOUNS[n - 1]} {NOUNS[n - 2]} now" for n, noun in enumerate(NOUNS)]
    sounds = {"digits/1": syllables(), "silence/1": nothing(0.5)}
    sounds |= {f"p{n:02}": syllables(100.0 + n) for n in range(21)}
    labels = [PseudoLabel(text=f"{p}.", confidence=-0.1 - 0.01 * n, agreed=True) for n, p in enumerate(phrases)]
    labels += [
        PseudoLabel(text="The kiwi sings at night.", confidence=-0.2, agreed=False),
        PseudoLabel(text="The plum sings at night.", confidence=-0.5, agreed=True),
        PseudoLabel(text="...", confidence=-0.1, agreed=True),
    ]
    made = package(sounds, labels)
    options = {"limits": Limits(minutes=0.01), "test_fraction": 0.3, "val_fraction": 0.2}
    data = AsteriskVoice(**options)
    data.setup()
    facts = data.facts
    assert facts.pseudo_labelled
    assert sum(facts.pseudo.values()) == 18
    assert sum(facts.counts.values()) == 19
    assert sorted(facts.left_out.values()) == [1, 1, 1, 1]
    assert facts.left_out["silence"] == 1
    (word,) = [record for record in data.records("train") if not record.pseudo]
    assert (word.id, word.text, word.confidence) == ("digits/1", "one", 0.0)
    assert min(r.confidence for s in ("train", "val", "test") for r in data.records(s)) == pytest.approx(-0.27)
    stricter = AsteriskVoice(**options, min_confidence=-0.2, words=False)
    stricter.setup()
    assert sum(stricter.facts.counts.values()) == 11
    assert stricter.facts.left_out["single words"] == 1
    assert len(made) == 1  # labels are made once


def test_an_interrupted_labelling_goes_on_where_it_was(package, monkeypatch):
    sounds = {f"p{n}": syllables(100.0 + n) for n in range(6)}
    good = [PseudoLabel(text=f"Number {n}.", confidence=-0.1, agreed=True) for n in range(6)]
    package(sounds, good[:4])
    monkeypatch.setattr(_prompts, "PROMPT_PARTS", 3)
    sizes = [sum(stable_hash(name, "part") % 3 == part for name in sounds) for part in range(3)]
    assert sizes[0] + sizes[1] <= 4  # so two parts are done when labels run out
    with pytest.raises(StopIteration):
        asterisk_module.prompts()
    package(sounds, good[: sizes[2]])
    monkeypatch.setattr(_prompts, "PROMPT_PARTS", 3)
    found, silent = asterisk_module.prompts()
    assert [prompt.id for prompt in found] == sorted(sounds)
    assert silent == 0


def test_a_first_look_labels_few_parts_and_leaves_the_sides_of_clips_alone(package, monkeypatch):
    phrases = [f"{noun} {other} {noun}s {other}s" for noun, other in itertools.pairwise(NOUNS)]
    phrases += [f"{phrase[::-1]} now" for phrase in phrases]
    sounds = {f"p{n:02}": syllables(100.0 + n) for n in range(len(phrases))}
    text_of = dict(zip(sorted(sounds), phrases, strict=True))
    order = sorted(sounds, key=lambda name: (stable_hash(name, "part") % 2, name))
    made = package(sounds, [PseudoLabel(text=text_of[name], confidence=-0.1, agreed=True) for name in order])
    monkeypatch.setattr(_prompts, "PROMPT_PARTS", 2)
    few, all_of_them = ({}, {})
    for parts, found in ((1, few), (2, all_of_them)):
        data = AsteriskVoice(parts=parts, limits=Limits(minutes=0.01), test_fraction=0.3, val_fraction=0.3)
        data.setup()
        found |= {record.id: side for side in ("train", "val", "test") for record in data.records(side)}
    assert set(few) == {name for name in sounds if stable_hash(name, "part") % 2 == 0}
    assert set(all_of_them) == set(sounds)
    assert few.items() <= all_of_them.items()
    assert len(made) == 2  # the second set made what was missing


def test_arguments_out_of_range_are_refused():
    for parts in (0, 17):
        with pytest.raises(GraftError, match=f"parts is {parts}; give a whole number from 1 to 16"):
            AsteriskVoice(parts=parts)
    for wrong in ({"min_confidence": 0.5}, {"test_fraction": 0.9, "val_fraction": 0.2}, {"val_fraction": 0.0}):
        with pytest.raises(GraftError, match="Mend the one out of range"):
            AsteriskVoice(**wrong)
