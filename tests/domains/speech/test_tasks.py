"""Recognition tasks: what a batch becomes, losses by formula, context, cached encodings, forgetting, and refusals."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.nn import functional as F

from common.errors import GraftError
from common.methods import BitFit, FullFineTune, LinearProbe, LoRA
from common.run import fit
from domains.speech import _task
from domains.speech.backbones import SpecAugment, build, decode, encode
from domains.speech.forgetting import forgetting
from domains.speech.metrics import texts_of
from domains.speech.tasks import CTCRecognition, Seq2SeqRecognition, collapsed, needed
from domains.speech.utterance import UtteranceClassification
from tests.domains.speech.toy import Beeps, data_of, task_of

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

LORA = LoRA(on=["all"], rank=2)
QUIET = {"accelerator": "cpu", "max_epochs": 1, "precision": "32-true"}


def batch_of(data):
    return next(iter(data.test_dataloader()))


@pytest.fixture
def contexts(monkeypatch):
    """How the encoder was called: whether at its whole context, and with what to hide."""
    seen = []

    def watched(*args, **options):
        seen.append(options)
        return encode(*args, **options)

    monkeypatch.setattr(_task, "encode", watched)
    return seen


# ---- with a decoder


def test_the_teacher_shows_the_text_and_asks_for_each_next_token(whisper, texts):
    made = task_of(Seq2SeqRecognition, whisper, LORA, texts)
    tokens = made.tokens
    read, wanted = made.teacher(["ab", "c"])
    start, (two, one) = list(tokens.start()), (tokens.encode("ab"), tokens.encode("c"))
    assert read.tolist() == [[*start, *two], [*start, *one, *[tokens.pad] * (len(two) - len(one))]]
    skipped = [-100] * (len(start) - 1)
    assert wanted.tolist() == [
        [*skipped, *two, tokens.eos],
        [*skipped, *one, tokens.eos, *[-100] * (len(two) - len(one))],
    ]


def test_the_loss_is_the_mean_over_the_tokens_of_the_texts(whisper, texts):
    made, batch = task_of(Seq2SeqRecognition, whisper, LORA, texts), batch_of(texts)
    built, total, count = made._built, 0.0, 0
    features, _ = encode(built, made.backbone, batch.audio, batch.lengths)
    start = list(made.tokens.start())
    for row, text in zip(features, batch.text, strict=True):
        ids = made.tokens.encode(text)
        logits = decode(built, made.backbone, row[None], torch.tensor([[*start, *ids]]))[0].log_softmax(dim=-1)
        for place, wanted in enumerate([*ids, made.tokens.eos], start=len(start) - 1):
            total, count = total - logits[place, wanted].item(), count + 1
    assert made.compute_loss(batch).item() == pytest.approx(total / count, abs=1e-4)


def test_a_multilingual_recogniser_is_told_the_datas_language(many, folder):
    data = data_of(folder)
    made, other = (task_of(Seq2SeqRecognition, many, LORA, data, language=name) for name in (None, "es"))
    assert (made.language, other.language) == ("en", "es")
    assert int(made.teacher(["a"])[0][0, 1]) != int(other.teacher(["a"])[0][0, 1])


@pytest.mark.parametrize(
    ("context", "short", "full"), [("auto", True, False), ("audio", True, False), ("full", True, True)]
)
def test_the_encoder_sees_as_much_as_asked(whisper, texts, contexts, context, short, full):
    made = task_of(Seq2SeqRecognition, whisper, LORA, texts, context=context, max_tokens=3)
    assert made.facts.short is short
    made.infer(batch_of(texts))
    assert [options["full_context"] for options in contexts] == [full]
    assert (made.full_metrics is None) is full


@pytest.mark.parametrize("asked", [True, False])
def test_a_test_hears_clips_again_at_the_whole_context_where_that_is_asked_for(whisper, texts, contexts, asked):
    made = task_of(Seq2SeqRecognition, whisper, LORA, texts, full_context_test=asked, max_tokens=3)
    made.test_step(batch_of(texts), 0)
    assert [options["full_context"] for options in contexts] == [False, True][: 1 + asked]
    assert (made.full_metrics is not None) is asked


def test_time_and_bands_are_hidden_in_training_alone(whisper, texts, contexts):
    made = task_of(Seq2SeqRecognition, whisper, LORA, texts, spec_augment=SpecAugment(time_masks=1))
    made.compute_loss(batch_of(texts))
    made.train()
    made.compute_loss(batch_of(texts))
    assert [options["spec_augment"] for options in contexts] == [None, SpecAugment(time_masks=1)]
    again = Seq2SeqRecognition(**made.settings, peft=LORA)  # as an export builds it, out of plain values
    assert again._spec_augment == SpecAugment(time_masks=1)


def test_a_cached_clip_is_what_is_computed_without_a_cache(whisper, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path))
    peft = LoRA(on=["attention@decoder"], rank=2)
    plain = task_of(Seq2SeqRecognition, whisper, peft, data_of(folder), cache_encoder=True)
    cached = Seq2SeqRecognition(whisper, peft, cache_encoder=True, max_tokens=3, seed=1)
    fit(cached, Beeps(str(folder)), tmp_path / "run", **{**QUIET, "limit_train_batches": 1})
    assert cached.frozen_rows is not None
    batch = batch_of(data_of(folder))
    first, again = cached.hear(batch), cached.hear(batch)
    assert torch.equal(first[0], again[0])
    expected = plain.hear(batch)
    torch.testing.assert_close(first[0], expected[0], atol=1e-5, rtol=1e-4)
    assert torch.equal(first[1], expected[1])
    assert first[1].sum(dim=1).tolist() == [-(-length // 320) for length in batch.lengths.tolist()]


def test_a_trained_encoder_is_not_cached(whisper, folder, tmp_path):
    made = Seq2SeqRecognition(whisper, LORA, cache_encoder=True)
    with pytest.raises(GraftError, match=r"'encoder' cannot be cached: it has adapters"):
        fit(made, Beeps(str(folder)), tmp_path / "run", **QUIET)
    with pytest.raises(GraftError, match="spec_augment changes the clips"):
        Seq2SeqRecognition(whisper, LORA, cache_encoder=True, spec_augment=SpecAugment())


def test_an_adapter_that_is_disabled_leaves_what_was_there(whisper, texts, folder):
    made = task_of(Seq2SeqRecognition, whisper, LORA, texts, max_tokens=6)
    with torch.no_grad():
        for name, parameter in made.backbone.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    found = forgetting(made, Beeps(str(folder)))
    assert found.restored is True
    assert set(found.before) == set(found.after) >= {"wer_lower", "words_reference"}
    whole = task_of(Seq2SeqRecognition, whisper, FullFineTune(), texts, max_tokens=6)
    assert forgetting(whole, Beeps(str(folder))).restored is None
    with pytest.raises(GraftError, match="has a new output layer"):
        forgetting(task_of(CTCRecognition, whisper, LORA, texts), Beeps(str(folder)))


# ---- CTC


@pytest.mark.parametrize("kind", ["whisper", "wave", "spelling"])
def test_ctcs_loss_is_the_mean_of_the_clips_losses_a_symbol(kind, texts, request):
    made, batch = task_of(CTCRecognition, request.getfixturevalue(kind), LORA, texts), batch_of(texts)
    losses = []
    for row, text in enumerate(batch.text):
        one = batch._replace(audio=batch.audio[row : row + 1], lengths=batch.lengths[row : row + 1])
        features, mask = made.hear(batch)
        shares = made.head(features[row : row + 1, : int(mask[row].sum())]).log_softmax(dim=-1).transpose(0, 1)
        ids = torch.tensor([made.tokens.encode(text)])
        sizes = torch.tensor([len(shares)]), torch.tensor([ids.shape[1]])
        losses.append(F.ctc_loss(shares, ids, *sizes, blank=made.tokens.pad, reduction="sum") / ids.shape[1])
        assert len(one.audio) == 1
    torch.testing.assert_close(made.compute_loss(batch), torch.stack(losses).mean(), atol=1e-4, rtol=1e-4)


def test_the_symbols_are_the_datas_or_the_checkpoints(wave, spelling, texts):
    fresh, own = (task_of(CTCRecognition, name, LORA, texts) for name in (wave, spelling))
    assert (fresh.from_checkpoint, own.from_checkpoint) == (False, True)
    assert fresh.tokens.characters == "".join(sorted(set("low mid high")))
    assert own.head is own._built.ctc_head
    assert not task_of(CTCRecognition, spelling, LORA, texts, vocabulary="characters").from_checkpoint
    with pytest.raises(GraftError, match="brings no CTC vocabulary of its own"):
        task_of(CTCRecognition, wave, LORA, texts, vocabulary="checkpoint")


def test_greedy_decoding_merges_repeats_and_leaves_blanks_out(wave, texts):
    made, batch = task_of(CTCRecognition, wave, LORA, texts), batch_of(texts)
    number = {letter: place for place, letter in enumerate(made.tokens.characters, start=1)}
    path = [number[sign] if sign in number else 0 for sign in "ll-oo-o--w wow"]
    logits = F.one_hot(torch.tensor([path]), made.tokens.size).float()
    made.head = torch.nn.Identity()
    mask = torch.ones(1, len(path), dtype=torch.bool)
    assert made.write((logits, mask)) == ["loow wow"]
    mask[0, 9:] = False
    assert made.write((logits, mask)) == ["loo"]
    assert collapsed([0, 0], 0) == []
    assert len(batch.text) > 1


def test_clips_too_short_for_their_text_are_counted_and_cost_nothing(wave, texts):
    made, batch = task_of(CTCRecognition, wave, LORA, texts), batch_of(texts)
    assert (needed([1, 2, 3]), needed([1, 1, 2]), needed([])) == (3, 4, 0)
    assert torch.isfinite(made.compute_loss(batch))
    assert made._short == 0
    long = batch._replace(text=("low " * 40, *batch.text[1:]))
    assert torch.isfinite(made.compute_loss(long))
    assert made._short == 1


# ---- classes


def test_utterances_are_pooled_over_their_own_length(wave, classes):
    made, batch = task_of(UtteranceClassification, wave, LORA, classes), batch_of(classes)
    padded = batch._replace(audio=F.pad(batch.audio, (0, 4000)))
    torch.testing.assert_close(made(padded), made(batch), atol=1e-5, rtol=1e-4)
    assert made(batch).shape == (len(batch.audio), 3)


# ---- refusals and warnings


def test_a_row_names_the_speaker_as_its_group(wave, classes):
    made = task_of(UtteranceClassification, wave, LORA, classes)
    with torch.no_grad():
        outputs = [made(batch) for batch in classes.test_dataloader()]
    rows = made.predictions(outputs, classes, None)
    assert [row["group"] for row in rows] == [record.speaker for record in classes.records("test")]


def test_texts_that_cannot_be_written_are_counted_and_shown(wave, spelling, folder, tmp_path):
    class Odd(Beeps):
        def _record(self, path, text):
            record = super()._record(path, text)
            return type(record)(**{**{key: getattr(record, key) for key in record.__slots__}, "text": text + " ж5"})

    made = CTCRecognition(spelling, LORA)
    with pytest.warns(UserWarning, match=r"21 of 21 transcripts have characters .*'ж' \(21\)"):
        fit(made, Odd(str(folder)), tmp_path / "run", **QUIET)
    described = made.describe_data(made.trainer.datamodule)
    assert described["unwritable"] == {"transcripts": 21, "characters": {"5": 21, "ж": 21}}


def test_what_cannot_be_trained_or_decoded_is_refused(whisper, wave, texts, classes, folder, tmp_path):
    with pytest.raises(GraftError, match="LinearProbe trains nothing in Seq2SeqRecognition"):
        fit(Seq2SeqRecognition(whisper, LinearProbe()), Beeps(str(folder)), tmp_path / "run", **QUIET)
    with pytest.raises(GraftError, match="no decoder that writes"):
        task_of(Seq2SeqRecognition, wave, LORA, texts)
    with pytest.raises(GraftError, match="needs data with a transcript for each clip, and this has a class"):
        task_of(CTCRecognition, wave, LORA, classes)
    with pytest.raises(GraftError, match="beams is 0; at least 1"):
        Seq2SeqRecognition(whisper, LORA, beams=0)
    with pytest.raises(GraftError, match=r"context 'ful'"):
        Seq2SeqRecognition(whisper, LORA, context="ful")
    long = Beeps(str(folder), speed=(0.5,))
    long.setup()
    object.__setattr__(long.facts, "max_seconds", 31.0)
    with pytest.raises(GraftError, match="reads at most 2 s at a time, and the data allows clips of 31 s"):
        task_of(Seq2SeqRecognition, whisper, BitFit(), long)


def test_a_transcript_longer_than_the_decoder_is_refused_by_name(whisper, folder, tmp_path):
    class Long(Beeps):
        def _record(self, path, text):
            record = super()._record(path, text)
            return type(record)(**{**{key: getattr(record, key) for key in record.__slots__}, "text": "a" * 70})

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(GraftError, match=r"'train-0' \(train\) has 73 tokens .* at most 64"):
            fit(Seq2SeqRecognition(whisper, LORA), Long(str(folder)), tmp_path / "run", **QUIET)


def test_outputs_are_normalised_texts(whisper, texts):
    made, batch = task_of(Seq2SeqRecognition, whisper, LORA, texts, max_tokens=4), batch_of(texts)
    made.write = lambda heard, beams=1: ["LOW,  mid!"] * len(batch.text)
    assert texts_of(made.infer(batch)) == ["low mid"] * len(batch.text)
    assert texts_of(made.targets(batch)) == list(batch.text)
    assert build(whisper).kind == "seq2seq"
