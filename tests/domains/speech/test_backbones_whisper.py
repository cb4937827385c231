"""Whisper: parity with transformers at full and at short context, decoding, its languages, and how one is loaded."""

from __future__ import annotations

import dataclasses
import json
import warnings

import pytest
import torch
from torch import nn
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

from common.errors import GraftError
from domains.speech.backbones import SpecAugment, build, decode, encode, generate
from domains.speech.backbones._decoding import looped
from domains.speech.backbones._mel import log_mel
from tests.domains.speech.nets import POSITIONS, SECONDS, noise, tiny_whisper


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Compute in one thread; toy tensors are too small to share out."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_whisper(tmp_path_factory.mktemp("nets") / "english", layers=(3, 1), dropout=0.5)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    return tiny_whisper(tmp_path_factory.mktemp("nets") / "many", languages=("en", "es", "yue"))


@pytest.fixture
def built(folder):
    return build(folder)


def reference_mel(audio, lengths, seconds=SECONDS, bands=80):
    extractor = WhisperFeatureExtractor(feature_size=bands, chunk_length=int(seconds))
    rows = [row[:length].numpy() for row, length in zip(audio, lengths, strict=True)]
    return extractor(rows, sampling_rate=16_000, return_tensors="pt").input_features


def run(built, *args, **kwargs):
    with torch.no_grad():
        return encode(built, built.model, *args, **kwargs)


# ---- the spectrogram


@pytest.mark.parametrize("bands", [80, 128])
@pytest.mark.parametrize("lengths", [(16_000, 9_111), (32_000, 31_999), (160, 1)])
def test_the_spectrogram_is_the_one_of_transformers(bands, lengths):
    audio, lengths = noise(lengths)
    expected = reference_mel(audio, lengths, bands=bands)
    found = log_mel(audio, 2 * POSITIONS, bands, 2 * POSITIONS)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("length", [200, 320, 9_111, 31_800])
def test_a_shorter_spectrogram_is_the_beginning_of_the_whole(length):
    audio, lengths = noise((length,))
    frames = 2 * -(-length // 320)
    found = log_mel(audio, frames, 80, 2 * POSITIONS)
    torch.testing.assert_close(found, reference_mel(audio, lengths)[..., :frames], atol=1e-4, rtol=0)


# ---- the encoder


def test_at_full_context_features_are_those_of_transformers(built):
    audio, lengths = noise()
    features, mask = run(built, audio, lengths, full_context=True)
    with torch.no_grad():
        expected = built.model.model.encoder(reference_mel(audio, lengths), output_hidden_states=True)
    torch.testing.assert_close(features, expected.last_hidden_state, atol=1e-4, rtol=1e-4)
    assert mask.sum(dim=1).tolist() == [50, 29, 13]
    states, _ = run(built, audio, lengths, full_context=True, all_layers=True)
    assert states.shape == (3, built.layers + 1, POSITIONS, built.width)
    torch.testing.assert_close(states[:, 0], expected.hidden_states[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(states[:, 1], expected.hidden_states[1], atol=1e-4, rtol=1e-4)
    assert torch.equal(states[:, -1], features)


def test_at_short_context_features_are_those_of_a_whisper_with_fewer_positions(built, folder):
    audio, lengths = noise()
    features, mask = run(built, audio, lengths)
    assert features.shape == (3, 50, built.width)
    assert mask.sum(dim=1).tolist() == [50, 29, 13]
    whole = WhisperForConditionalGeneration.from_pretrained(folder).eval()
    config = dataclasses.replace(whole.config, max_source_positions=50)
    state = {
        name: tensor[:50] if name == "model.encoder.embed_positions.weight" else tensor
        for name, tensor in whole.state_dict().items()
    }
    cut = WhisperForConditionalGeneration(config).eval()
    cut.load_state_dict(state)
    with torch.no_grad():
        mel = reference_mel(audio, lengths)[..., :100]
        torch.testing.assert_close(features, cut.model.encoder(mel).last_hidden_state, atol=1e-4, rtol=1e-4)


def test_blocks_are_never_skipped_and_drop_out_is_on_in_training_alone(built):
    called = []
    for block in built.model.model.encoder.layers:
        block.register_forward_hook(lambda _, inputs, __: called.append(len(inputs[0])))
    built.model.train()
    first, second = (run(built, *noise())[0] for _ in range(2))
    assert sum(called) == 2 * built.layers * 3  # clips
    assert not torch.allclose(first, second)
    built.model.eval()
    assert torch.equal(run(built, *noise())[0], run(built, *noise())[0])


def test_without_gradients_a_processor_hears_one_context_at_a_time_and_the_same(built):
    audio, lengths = noise()  # the longest has half of the context's 100 features
    heard = []
    built.model.model.encoder.layers[0].register_forward_hook(lambda _, inputs, __: heard.append(inputs[0].shape[:2]))
    for full, pieces in ((False, [(2, 50), (1, 50)]), (True, [(1, POSITIONS)] * 3)):
        alone, _ = run(built, audio, lengths, full_context=full)
        assert heard == pieces
        heard.clear()
        together, _ = encode(built, built.model, audio, lengths, full_context=full)
        assert heard == [(3, pieces[0][1])]
        heard.clear()
        torch.testing.assert_close(alone, together.detach(), atol=1e-5, rtol=1e-5)


def test_spec_augment_hides_within_the_utterance_and_follows_the_seed(built):
    audio, lengths = noise()
    masks = SpecAugment(time_masks=3, time_share=0.5, band_masks=2, band_share=0.5)
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(run(built, audio, lengths, spec_augment=masks)[0])
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.allclose(drawn[0], drawn[2])
    nothing = SpecAugment(time_masks=0, band_masks=0)
    assert torch.equal(run(built, audio, lengths, spec_augment=nothing)[0], run(built, audio, lengths)[0])


def test_audio_beyond_the_context_and_no_audio_are_refused(built):
    assert run(built, *noise((32_000,)))[0].shape[1] == POSITIONS
    with pytest.raises(GraftError, match=r"lasts 2\.00 s, and .* hears at most 2 s\. Cut the audio"):
        run(built, *noise((32_001,)))
    with pytest.raises(GraftError, match="lasts 0 samples at 16000 Hz, too short"):
        run(built, torch.zeros(1, 400), torch.tensor([0]))


def test_dead_samples_behind_the_longest_utterance_change_nothing(built):
    audio, lengths = noise()
    longer = nn.functional.pad(audio, (0, 40_000))
    assert torch.equal(run(built, longer, lengths)[0], run(built, audio, lengths)[0])


def test_a_network_in_half_precision_runs(folder):
    built = build(folder)
    exact = run(built, *noise())[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = run(built, *noise())[0]
    built.model.to(torch.bfloat16)
    half = run(built, *noise())[0]
    assert half.dtype == torch.bfloat16
    for found in (mixed, half):
        assert (found.float() - exact).norm() / exact.norm() < 0.05
    assert len(generate(built, built.model, half, max_tokens=4)) == 3


# ---- the decoder


def test_teacher_forcing_gives_the_logits_of_transformers(built):
    audio, lengths = noise()
    ids = torch.tensor([[*built.tokens.start(), *built.tokens.encode(text)] for text in ("one", "two", "six")])
    with torch.no_grad():
        features, _ = encode(built, built.model, audio, lengths, full_context=True)
        found = decode(built, built.model, features, ids)
        expected = built.model(reference_mel(audio, lengths), decoder_input_ids=ids).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("timestamps", [False, True])
def test_texts_are_those_of_whispers_own_generate(built, beams, timestamps):
    """Up to where the loop guard steps in, which transformers has not."""
    audio, lengths = noise()
    features, _ = run(built, audio, lengths, full_context=True)
    found = generate(built, built.model, features, beams=beams, timestamps=timestamps, max_tokens=9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = built.model.generate(
            reference_mel(audio, lengths), num_beams=beams, return_timestamps=timestamps, max_new_tokens=9
        )
    eos = built.tokens.eos
    rows = [row if eos not in row else row[: row.index(eos)] for row in _behind_start(expected.tolist(), built.tokens)]
    if timestamps:  # transformers keeps no words behind the last time
        found = [ids[: len(row)] for ids, row in zip(found, rows, strict=True)]
    assert found == rows
    assert any(found)


def _behind_start(rows, tokens):
    """transformers drops the start or keeps it, by its version and mode."""
    start = {*tokens.start(), *tokens.start(timestamps=True)}
    for row in rows:
        while row and row[0] in start:
            row.pop(0)
    return rows


def test_a_text_does_not_depend_on_the_others_of_its_batch(built):
    audio, lengths = noise()
    features, _ = run(built, audio, lengths, full_context=True)
    together = generate(built, built.model, features, max_tokens=20)
    assert [generate(built, built.model, features[i : i + 1], max_tokens=20)[0] for i in range(3)] == together


def test_generation_stops_at_its_limits(built):
    features, _ = run(built, *noise())
    assert all(len(ids) <= 5 for ids in generate(built, built.model, features, max_tokens=5))
    room = 64 - len(built.tokens.start())
    for options in ({"max_tokens": room + 1}, {"max_tokens": 0}, {"beams": 0}):
        with pytest.raises(GraftError, match=rf"at least 1\) and max_tokens \d+ \(1 to {room}\)"):
            generate(built, built.model, features, **options)
    with pytest.raises(GraftError, match=r"A text has 65 ids with its start.*positions for 64"):
        decode(built, built.model, features, torch.zeros(3, 65, dtype=torch.long))


# ---- the loop guard

PHRASES = [
    ([7] * 12, 11),
    ([7] * 11, 0),
    ([1, *[4, 5] * 6], 10),
    ([4, 5] * 5, 0),
    ([9, 9, *[1, 2, 3] * 4], 9),
    ([1, 2, 3, 4] * 3, 8),
    ([5, 6, 7, 8, 9] * 3, 10),
    ([*range(32)] * 3, 64),
    ([*range(33)] * 3, 0),
    ([*range(40)], 0),
    ([], 0),
]


@pytest.mark.parametrize(("ids", "repeats"), PHRASES)
def test_a_loop_is_a_phrase_three_times_and_twelve_ids(ids, repeats):
    assert looped(ids) == repeats


@pytest.mark.parametrize("beams", [1, 2])
def test_a_looping_decoder_is_stopped_and_one_phrase_kept(built, beams):
    """A decoder whose output layer wants one letter, whatever it reads."""
    letter = built.tokens.encode("a")[-1]
    output = nn.Linear(built.width, built.tokens.size)
    nn.init.zeros_(output.weight)
    nn.init.zeros_(output.bias)
    output.bias.data[letter] = 9.0
    built.model.proj_out = output
    steps = []
    built.model.model.decoder.register_forward_hook(lambda *_: steps.append(1))
    found = generate(built, built.model, run(built, *noise())[0], beams=beams)
    assert found == [[letter]] * 3
    assert len(steps) <= 14 * beams


# ---- languages and files


def test_a_whisper_of_many_languages_is_told_one(many):
    built = build(many)
    tokens = built.tokens
    start = tokens.start("es")
    assert [tokens._tokenizer.id_to_token(index) for index in start] == [
        "<|startoftranscript|>", "<|es|>", "<|transcribe|>", "<|notimestamps|>"
    ]  # fmt: skip
    assert tokens.start("yue", timestamps=True) == (start[0], start[1] + 1, start[2])
    features, _ = run(built, *noise())
    with pytest.raises(GraftError, match=r"knows many languages. State the data's language"):
        generate(built, built.model, features)
    with pytest.raises(GraftError, match="Unknown language of Whisper 'esp'"):
        generate(built, built.model, features, language="esp")
    assert len(generate(built, built.model, features, language="es", max_tokens=4)) == 3


def test_an_english_whisper_needs_no_language(built):
    assert built.tokens.start() == built.tokens.start("es")
    assert len(built.tokens.start()) == 2


def test_the_encoder_alone_computes_the_same(built, folder):
    alone = build(folder, encoder_only=True)
    assert (alone.kind, alone.tokens, alone.context) == ("encoder", None, SECONDS)
    assert torch.equal(run(alone, *noise())[0], run(built, *noise())[0])
    assert not any("decoder" in name for name, _ in alone.model.named_modules())
    cut = build(folder, encoder_only=True, layers=1)
    assert (cut.layers, len(cut.model.layers)) == (1, 1)
    with pytest.raises(GraftError, match="has no decoder here"):
        generate(alone, alone.model, run(alone, *noise())[0])


def test_what_cannot_be_built_is_refused(folder, tmp_path):
    with pytest.raises(GraftError, match=r"layers=1: the decoder of .* reads what its whole encoder writes"):
        build(folder, layers=1)
    with pytest.raises(GraftError, match=r"layers=4: .* has 3 blocks; give 1 to 3"):
        build(folder, encoder_only=True, layers=4)
    with pytest.raises(GraftError, match=r"Unknown speech backbone 'whisper-tiny'.*whisper-tiny-en"):
        build("whisper-tiny")
    with pytest.raises(GraftError, match="brings its own weights"):
        build(folder, weights="x.bin")
    with pytest.raises(GraftError, match="'weights' is x and pretrained is false"):
        build(folder, weights="x", pretrained=False)
    with pytest.raises(GraftError, match="could not be had or read"):
        build(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(GraftError, match=r"Unknown kind of network in .* 'bert'"):
        build(str(tmp_path))


def test_random_weights_are_others_and_the_rest_is_the_same(folder, built):
    torch.manual_seed(3)
    fresh = build(folder, pretrained=False)
    assert fresh.tokens.start() == built.tokens.start()
    assert not torch.equal(run(fresh, *noise())[0], run(built, *noise())[0])
    assert generate(fresh, fresh.model, run(fresh, *noise())[0], max_tokens=4)
