"""Voices: Piper's files by a writer of their own, the real one against ONNX Runtime, and folders of transformers."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import VitsModel, VitsTokenizer

from common import artifacts
from common.errors import GraftError
from domains.speech.voices import _starters, build_voice, expand, frames_of, log_durations, read, synthesize
from domains.speech.voices._onnx import onnx_state
from tests.domains.speech.voices.nets import SECOND, piper_file, piper_net, toy_folder, toy_piper

IDS = torch.tensor([1, 0, 20, 0, 22, 0, 9, 0, 31, 0, 2])


def test_a_piper_file_comes_back_under_the_names_of_transformers():
    model = piper_net()
    found = onnx_state(piper_file(model), "file")
    expected = model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, msg=name)


def test_a_starter_is_built_of_its_package(monkeypatch):
    model = toy_piper(monkeypatch)
    voice = build_voice("toy")
    assert (voice.rate, voice.hop, voice.latents, voice.bins, voice.language) == (8000, 16, 8, 17, "en")
    assert (voice.noise, voice.duration_noise) == (0.667, 0.8)
    torch.testing.assert_close(
        synthesize(voice, voice.model, IDS, seed=3), synthesize(voice, model, IDS, seed=3), atol=1e-6, rtol=1e-5
    )
    fresh = build_voice("toy", pretrained=False, posterior=True).model.state_dict()
    assert {name for name in fresh if not name.startswith("posterior_encoder.")} == set(model.state_dict())
    assert len(fresh) > len(model.state_dict())


def test_damaged_files_and_other_networks_are_refused(monkeypatch, tmp_path):
    model = toy_piper(monkeypatch)
    data = piper_file(model)
    (tmp_path / "half.onnx").write_bytes(data[: len(data) // 2])
    (tmp_path / "empty.onnx").write_bytes(b"")
    deeper = {**SECOND, "num_hidden_layers": 3}
    monkeypatch.setattr("tests.domains.speech.voices.nets.SECOND", deeper)
    (tmp_path / "deep.onnx").write_bytes(piper_file(piper_net()))
    for name, named in (
        ("half", "half.onnx is no"),
        ("empty", "no text encoder 'enc_p'"),
        ("deep", "does not fit 'toy': .* tensors differ, such as text_encoder.encoder.layers.2"),
        ("none", "no weights file"),
    ):
        with pytest.raises(GraftError, match=named):
            build_voice("toy", weights=str(tmp_path / f"{name}.onnx"))


@pytest.mark.parametrize(
    ("name", "options", "named"),
    [
        ("piper-joe-medum", {}, "Did you mean 'piper-joe-medium'"),
        ("piper-joe-medium", {"pretrained": False, "weights": "x"}, "Leave one of them out"),
        ("some/where", {"weights": "x"}, "brings its own weights"),
    ],
)
def test_wrong_names_are_answered(name, options, named):
    with pytest.raises(GraftError, match=named):
        build_voice(name, **options)


# ---- a folder of transformers


def test_a_folder_speaks_as_transformers_does(tmp_path):
    folder = toy_folder(tmp_path / "voice")
    voice = build_voice(folder)
    reference = VitsModel.from_pretrained(folder).eval()
    reference.noise_scale = reference.noise_scale_duration = 0.0
    for text in ("a cab, or two", "Bad!"):
        spelled = voice.symbols.spell(text)
        ids = voice.symbols.encode(spelled)
        tokens = VitsTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids
        assert tokens.tolist() == [ids]
        with torch.no_grad():
            expected = reference(tokens).waveform[0]
        found = synthesize(voice, voice.model, torch.tensor(ids), noise=0.0, duration_noise=0.0)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_nothing_random_or_dead_is_left_in_a_voice(tmp_path):
    voice = build_voice(toy_folder(tmp_path / "voice"), posterior=True)
    names = set(voice.model.state_dict())
    assert not any("parametrizations" in name or ".post_" in name or "flows.1.conv_dds" in name for name in names)
    assert any(name.startswith("posterior_encoder.") for name in names)
    assert voice.model.text_encoder.encoder.layerdrop == 0.0
    assert not any(name.startswith("posterior") for name in build_voice(voice.name).model.state_dict())


def test_a_plain_duration_predictor_is_taken_too(tmp_path):
    folder = toy_folder(tmp_path / "voice", use_stochastic_duration_prediction=False)
    voice, reference = build_voice(folder), VitsModel.from_pretrained(folder).eval()
    reference.noise_scale = 0.0
    ids = torch.tensor(voice.symbols.encode("abc"))
    with torch.no_grad():
        expected = reference(ids[None]).waveform[0]
    torch.testing.assert_close(synthesize(voice, voice.model, ids, noise=0.0), expected, atol=1e-5, rtol=1e-4)


def test_voices_that_cannot_be_adapted_are_refused(tmp_path):
    many = toy_folder(tmp_path / "many", num_speakers=3, speaker_embedding_size=4)
    with pytest.raises(GraftError, match="has 3 speakers"):
        build_voice(many)
    roman = toy_folder(tmp_path / "roman")
    settings = json.loads((tmp_path / "roman" / "tokenizer_config.json").read_text())
    (tmp_path / "roman" / "tokenizer_config.json").write_text(json.dumps({**settings, "is_uroman": True}))
    with pytest.raises(GraftError, match="reads romanised text"):
        build_voice(roman)


# ---- speaking


def test_a_batch_reads_each_line_as_alone(monkeypatch):
    toy_piper(monkeypatch)
    voice = build_voice("toy")
    short = IDS[:7]
    ids = torch.stack([IDS, torch.cat([short, torch.full((4,), 5)])])
    with torch.no_grad():
        both = read(voice.model, ids, torch.tensor([11, 7]))
        alone = read(voice.model, short[None], torch.tensor([7]))
        for ours, theirs in zip(both[:3], alone[:3], strict=True):
            torch.testing.assert_close(ours[1:, :, :7], theirs, atol=1e-5, rtol=1e-4)
        logs = [log_durations(voice.model, part.hidden, part.mask, None) for part in (both, alone)]
    torch.testing.assert_close(logs[0][1:, :7], logs[1], atol=1e-5, rtol=1e-4)
    frames = frames_of(logs[0], both.mask)
    assert (frames[1, 7:] == 0).all()
    assert (frames[:, :7] >= 1).all()


def test_columns_are_repeated():
    values = torch.arange(6.0).reshape(2, 1, 3)
    found = expand(values, torch.tensor([[1, 0, 2], [2, 2, 1]]))
    assert found.tolist() == [[[0, 2, 2, 0, 0]], [[3, 3, 4, 4, 5]]]


def test_durations_noise_pace_and_seed_do_what_they_say(monkeypatch):
    toy_piper(monkeypatch)
    voice = build_voice("toy")
    given = torch.full((11,), 2)
    assert len(synthesize(voice, voice.model, IDS, durations=given)) == 22 * 16
    one, again, other = (synthesize(voice, voice.model, IDS, durations=given, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.allclose(one, other, atol=1e-4)
    still = [synthesize(voice, voice.model, IDS, durations=given, noise=0.0, seed=seed) for seed in (1, 2)]
    assert torch.equal(*still)
    slow, fast = (synthesize(voice, voice.model, IDS, pace=pace) for pace in (3.0, 1.0))
    assert 1.5 < len(slow) / len(fast) <= 3.0
    assert float(one.abs().max()) <= 1.0


# ---- the real voice


def test_every_starter_has_a_row():
    for name, starter in _starters.STARTERS.items():
        row = artifacts.row(name)
        assert list(row.domains) == ["speech"]
        assert set(row.members) == {starter.model, f"{starter.model}.json"}


@pytest.mark.artifacts
def test_the_starter_speaks_as_its_onnx_graph_does():
    runtime = pytest.importorskip("onnxruntime")
    voice = build_voice("piper-joe-medium")
    session = runtime.InferenceSession(artifacts.read_member(voice.name, _starters.STARTERS[voice.name].model))
    for text in ("Yes.", "Please hold, while I try."):
        ids = voice.symbols.encode(voice.symbols.spell(text))
        given = {
            "input": np.array([ids]),
            "input_lengths": np.array([len(ids)]),
            "scales": np.array([0, 1, 0], dtype=np.float32),
        }
        expected = session.run(None, given)[0].reshape(-1)
        found = synthesize(voice, voice.model, torch.tensor(ids), noise=0.0, duration_noise=0.0)
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-4)
