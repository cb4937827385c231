"""Baselines of speech against what they are by definition."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from common.errors import GraftError
from common.methods import LoRA
from domains.speech._text import normalize
from domains.speech.backbones import build, encode, generate
from domains.speech.baselines import majority_class, mel_statistics_probe, zero_shot
from domains.speech.data._confound import fit_probe, mel_statistics
from domains.speech.metrics import texts_of
from domains.speech.tasks import CTCRecognition, Seq2SeqRecognition
from domains.speech.utterance import UtteranceClassification

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
LORA = LoRA(on=["all"], rank=2)


def task_for(cls, backbone, data, **options):
    made = cls(backbone, LORA, **options)
    made.facts = data.facts
    return made


def test_zero_shot_is_the_bare_recogniser_at_its_whole_context(whisper, texts):
    made = task_for(Seq2SeqRecognition, whisper, texts, max_tokens=6)
    predictor = zero_shot(made, texts)
    built = build(whisper)
    for batch in texts.test_dataloader():
        features, _ = encode(built, built.model, batch.audio, batch.lengths, full_context=True)
        said = [built.tokens.decode(ids) for ids in generate(built, built.model, features, max_tokens=6)]
        assert texts_of(predictor(batch)) == [normalize(text, "lower") for text in said]


def test_zero_shot_needs_an_output_layer_that_was_trained(wave, spelling, texts, classes):
    assert zero_shot(task_for(CTCRecognition, spelling, texts), texts)(next(iter(texts.test_dataloader()))).ndim == 2
    with pytest.raises(GraftError, match="brings none for CTC"):
        zero_shot(task_for(CTCRecognition, wave, texts), texts)
    with pytest.raises(GraftError, match="needs a task that recognises"):
        zero_shot(task_for(UtteranceClassification, wave, classes), classes)


def test_the_majority_is_counted_in_training(wave, classes):
    made = task_for(UtteranceClassification, wave, classes)
    batch = next(iter(classes.test_dataloader()))
    counts = Counter(record.label for record in classes.records("train"))
    shares = torch.tensor([counts[name] / 12 for name in classes.names])
    torch.testing.assert_close(majority_class(made, classes)(batch).softmax(dim=1), shares.expand(len(batch.audio), -1))


def test_the_probe_is_the_data_cards(wave, classes):
    made = task_for(UtteranceClassification, wave, classes)
    predictor = mel_statistics_probe(made, classes)
    clips = [
        (batch.audio[row, :length], batch.target[row])
        for batch in classes.train_dataloader()
        for row, length in enumerate(batch.lengths.tolist())
    ]
    probe = fit_probe(torch.stack([mel_statistics(audio) for audio, _ in clips]), torch.stack([y for _, y in clips]), 3)
    hits = total = 0
    for batch in classes.test_dataloader():
        found = predictor(batch)
        single = probe(torch.stack([mel_statistics(a[:n]) for a, n in zip(batch.audio, batch.lengths, strict=True)]))
        torch.testing.assert_close(found, single.float(), atol=1e-3, rtol=1e-3)
        hits, total = hits + int((found.argmax(dim=1) == batch.target).sum()), total + len(batch.target)
    assert hits / total == pytest.approx(classes.facts.confound["mel_statistics"], abs=1e-4)


def test_baselines_of_classes_need_classes(whisper, texts):
    for make in (majority_class, mel_statistics_probe):
        with pytest.raises(GraftError, match="needs classes"):
            make(task_for(Seq2SeqRecognition, whisper, texts), texts)
