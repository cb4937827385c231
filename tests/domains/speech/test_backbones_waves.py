"""wav2vec2, HuBERT and WavLM: parity with transformers and torchaudio, masks, vocabularies, and how they are loaded."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch import nn
from torchaudio import pipelines
from transformers import AutoModel, AutoModelForCTC, WavLMModel

from common.attach import attach, probe
from common.errors import GraftError
from common.methods import LoRA
from common.roles import resolve
from domains.speech.backbones import SpecAugment, build, encode
from domains.speech.backbones._waves import _normalised
from domains.speech.backbones._wavlm import CalledAttention
from tests.domains.speech.nets import WAVES, noise, tiny_wave


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Compute in one thread; toy tensors are too small to share out."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("nets")
    plain = {(kind, norm): tiny_wave(root / f"{kind}-{norm}", kind, norm=norm) for kind in WAVES for norm in NORMS}
    return plain | {(kind, "ctc"): tiny_wave(root / f"{kind}-ctc", kind, ctc=True) for kind in WAVES}


NORMS = ("layer", "group")


def run(built, *args, **kwargs):
    with torch.no_grad():
        return encode(built, built.model, *args, **kwargs)


def inside(audio, lengths):
    return torch.arange(audio.shape[1]) < lengths.unsqueeze(1)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", WAVES)
def test_features_are_those_of_transformers(folders, kind, norm):
    built, audio_lengths = build(folders[kind, norm]), noise()
    audio, lengths = audio_lengths
    reference = AutoModel.from_pretrained(folders[kind, norm]).eval()
    values = _normalised(audio, lengths, 1e-7)
    attention = {"attention_mask": inside(audio, lengths).long()} if norm == "layer" else {}
    with torch.no_grad():
        expected = reference(values, output_hidden_states=True, **attention)
    features, mask = run(built, audio, lengths)
    torch.testing.assert_close(features[mask], expected.last_hidden_state[mask], atol=1e-5, rtol=1e-5)
    assert mask.sum(dim=1).tolist() == reference._get_feat_extract_output_lengths(lengths).tolist()
    states, _ = run(built, audio, lengths, all_layers=True)
    assert states.shape == (3, built.layers + 1, *features.shape[1:])
    torch.testing.assert_close(states[:, 1][mask], expected.hidden_states[1][mask], atol=1e-5, rtol=1e-5)
    assert torch.equal(states[:, -1], features)


@pytest.mark.parametrize("kind", WAVES)
def test_with_a_mask_padding_and_company_change_nothing(folders, kind):
    built = build(folders[kind, "layer"])
    audio, lengths = noise()
    features, mask = run(built, audio, lengths)
    for row, length in enumerate(lengths.tolist()):
        alone, _ = run(built, audio[row : row + 1, :length], lengths[row : row + 1])
        torch.testing.assert_close(alone[0], features[row][mask[row]], atol=1e-4, rtol=1e-4)


def test_utterances_are_normalised_by_themselves():
    audio, lengths = noise((500, 300))
    audio = (audio * 3 + 0.5) * inside(audio, lengths)
    found = _normalised(audio, lengths, 1e-7)
    for row, length in enumerate(lengths.tolist()):
        own = audio[row, :length]
        expected = (own - own.mean()) / (own.var(unbiased=False) + 1e-7).sqrt()
        torch.testing.assert_close(found[row, :length], expected)
        assert not found[row, length:].any()


@pytest.mark.parametrize("kind", WAVES)
def test_the_output_layer_and_vocabulary_are_the_checkpoints(folders, kind):
    built = build(folders[kind, "ctc"])
    assert built.kind == "ctc"
    reference = AutoModelForCTC.from_pretrained(folders[kind, "ctc"]).eval()
    audio, lengths = noise((8_000,))
    with torch.no_grad():
        expected = reference(_normalised(audio, lengths, 1e-7)).logits
        found = built.ctc_head(run(built, audio, lengths)[0])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    tokens = built.tokens
    assert (tokens.size, tokens.pad, tokens.characters) == (9, 0, " ABC'")
    assert tokens.encode("ab c?") == [5, 6, 4, 7]
    assert tokens.decode([1, 5, 4, 0, 7]) == "A C"
    assert tokens.unwritable("abxñ") == {"x", "ñ"}
    alone = build(folders[kind, "ctc"], encoder_only=True)
    assert (alone.kind, alone.tokens, alone.ctc_head) == ("encoder", None, None)


@pytest.mark.parametrize("kind", WAVES)
def test_nothing_is_masked_or_skipped_in_training_unless_asked(folders, kind):
    built = build(folders[kind, "layer"])
    for module in built.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.0
    audio, lengths = noise()
    expected, mask = run(built, audio, lengths)
    built.model.train()
    torch.testing.assert_close(run(built, audio, lengths)[0][mask], expected[mask], atol=1e-5, rtol=1e-5)
    torch.manual_seed(0)
    hidden = run(built, audio, lengths, spec_augment=SpecAugment(time_share=0.5))[0]
    assert not torch.allclose(hidden[mask], expected[mask], atol=1e-2)


def test_hidden_time_is_the_checkpoints_own_vector_and_hidden_channels_are_zero(folders):
    built = build(folders["wav2vec2", "layer"])
    seen = []
    built.model.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    audio, lengths = noise((16_000,))
    for masks in (SpecAugment(time_masks=0, band_masks=0), SpecAugment(band_masks=0, time_share=0.5)):
        torch.manual_seed(1)
        run(built, audio, lengths, spec_augment=masks)
    plain, hidden = seen[0][0], seen[1][0]
    changed = (plain != hidden).any(dim=1)
    assert 0 < changed.sum() < len(changed)
    assert torch.equal(hidden[changed], built.model.masked_spec_embed.expand(int(changed.sum()), -1))
    torch.manual_seed(1)
    run(built, audio, lengths, spec_augment=SpecAugment(time_masks=0, band_share=0.5))
    zero = (seen[2][0] == 0).all(dim=0)
    assert 0 < zero.sum() < len(zero)
    assert torch.equal(seen[2][0][:, ~zero], plain[:, ~zero])


def test_frozen_convolutions_keep_no_graph(folders):
    built = build(folders["wav2vec2", "layer"])
    attached = attach(built.model, LoRA(rank=2, on=["attention"]), built.family)
    attached.train(True)
    seen = []
    built.model.feature_extractor.register_forward_hook(lambda *args: seen.append(args[2].requires_grad))
    features, _ = encode(built, attached.model, *noise())
    assert features.requires_grad
    assert seen == [False]


# ---- WavLM's attention


def test_called_projections_compute_what_transformers_attention_does(folders):
    plain = WavLMModel.from_pretrained(folders["wavlm", "layer"]).eval()
    built = build(folders["wavlm", "layer"])
    ours, theirs = built.model.encoder.layers[0].attention, plain.encoder.layers[0].attention
    assert isinstance(ours, CalledAttention)
    assert type(theirs) is not CalledAttention
    assert list(ours.state_dict()) == list(theirs.state_dict())
    hidden = torch.randn(2, 7, 16)
    for mask in (None, torch.tensor([[1] * 7, [1] * 4 + [0] * 3]).bool()):
        with torch.no_grad():
            found, _, bias = ours(hidden, attention_mask=mask)
            expected, _, expected_bias = theirs(hidden, attention_mask=mask)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(bias, expected_bias)


def test_the_probe_would_have_refused_transformers_attention(folders):
    built = build(folders["wavlm", "layer"])
    plain = WavLMModel.from_pretrained(folders["wavlm", "layer"])
    attached = attach(plain, LoRA(rank=2, on=["attention"]), built.family)
    with pytest.raises(GraftError, match="8 of 8 adapters are dead"):
        probe(attached, lambda: encode(built, attached.model, *noise((4_000,)))[0])


# ---- torchaudio


@pytest.fixture
def bundles(monkeypatch):
    """Bundles of torchaudio at toy size, under names of real ones."""
    small = {
        "extractor_conv_layer_config": [(8, 10, 5), (8, 4, 4), (8, 4, 4)],
        "encoder_embed_dim": 16,
        "encoder_pos_conv_kernel": 8,
        "encoder_pos_conv_groups": 2,
        "encoder_num_layers": 2,
        "encoder_num_heads": 4,
        "encoder_ff_interm_features": 24,
        "encoder_layer_drop": 0.9,
    }
    made = {}
    for name in ("WAV2VEC2_BASE", "WAV2VEC2_ASR_BASE_960H", "WAV2VEC2_ASR_LARGE_LV60K_960H", "WAVLM_BASE"):
        bundle = getattr(pipelines, name)
        made[name] = dataclasses.replace(bundle, _params=bundle._params | small)
        monkeypatch.setattr(pipelines, name, made[name])
    return made


@pytest.mark.parametrize(
    "name", ["WAV2VEC2_BASE", "WAV2VEC2_ASR_BASE_960H", "WAV2VEC2_ASR_LARGE_LV60K_960H", "WAVLM_BASE"]
)
def test_a_bundle_computes_what_torchaudio_does(bundles, name, tmp_path):
    from torchaudio.pipelines._wav2vec2 import utils

    bundle = bundles[name]
    torch.manual_seed(0)
    whole = utils._get_model(bundle._model_type, bundle._params).eval()
    torch.save(whole.state_dict(), tmp_path / "weights.pth")
    built = build(f"torchaudio:{name}", weights=str(tmp_path / "weights.pth"))
    audio, lengths = noise((8_000, 8_000))
    values = torch.nn.functional.layer_norm(audio, audio.shape[1:]) if bundle._normalize_waveform else audio
    with torch.no_grad():
        # torchaudio's WavLM takes no lengths; here all are the same.
        expected, _ = whole(values, None if name == "WAVLM_BASE" else lengths)
        features, mask = run(built, audio, lengths)
        found = features if built.ctc_head is None else built.ctc_head(features)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert mask.all()
    assert (built.kind == "ctc") == ("ASR" in name)
    if built.tokens is not None:
        assert built.tokens.encode("a cat") == [bundle.get_labels().index(letter) for letter in "A|CAT"]
    states, _ = run(built, audio, lengths, all_layers=True)
    assert states.shape == (2, 3, *features.shape[1:])
    called = []
    for layer in built.model.encoder.transformer.layers:
        layer.register_forward_hook(lambda *_: called.append(1))
    built.model.train()
    run(built, audio, lengths)
    assert len(called) == 2


@pytest.mark.parametrize("name", ["WAV2VEC2_BASE", "WAVLM_BASE"])
def test_adapters_in_the_attention_of_a_bundle_are_alive(bundles, name):
    built = build(f"torchaudio:{name}", pretrained=False)
    counts = resolve(built.model, built.family).count()
    assert (counts["attention_qkv"], counts["attention_out"], counts["ffn_in"]) == (6, 2, 2)
    attached = attach(built.model, LoRA(rank=2, on=["attention"]), built.family)
    probe(attached, lambda: encode(built, attached.model, *noise((4_000,)))[0])


def test_bundles_that_cannot_be_had_are_refused(bundles, tmp_path):
    with pytest.raises(GraftError, match=r"Unknown bundle of torchaudio 'WAV2VEC2_BAS'.*WAV2VEC2_BASE"):
        build("torchaudio:WAV2VEC2_BAS")
    (tmp_path / "x.pth").write_bytes(b"no")
    for weights in ("x.pth", "none.pth"):
        with pytest.raises(GraftError, match="could not be had or read"):
            build("torchaudio:WAV2VEC2_BASE", weights=str(tmp_path / weights))
    torch.save({"a": torch.ones(1)}, tmp_path / "y.pth")
    with pytest.raises(GraftError, match="do not fit 'torchaudio:WAV2VEC2_BASE'"):
        build("torchaudio:WAV2VEC2_BASE", weights=str(tmp_path / "y.pth"))


# ---- what does not fit


def test_audio_too_short_for_a_feature_is_refused(folders):
    built = build(folders["hubert", "layer"])
    assert built.context is None
    assert run(built, *noise((100_000,)))[0].shape[1] == 1249
    with pytest.raises(GraftError, match="lasts 9 samples at 16000 Hz, too short"):
        run(built, *noise((4_000, 9)))


def test_a_cut_network_has_no_output_layer_of_its_own(folders):
    built = build(folders["wavlm", "ctc"], layers=1)
    assert (built.kind, built.layers, built.ctc_head, built.tokens) == ("encoder", 1, None, None)
    assert run(built, *noise())[0].shape[2] == 16
    with pytest.raises(GraftError, match="has 2 blocks; give 1 to 2"):
        build(folders["wavlm", "ctc"], layers=0)


def test_checkpoints_with_unknown_parts_are_refused(folders, tmp_path):
    config = json.loads(open(f"{folders['wav2vec2', 'ctc']}/config.json").read())
    (tmp_path / "config.json").write_text(json.dumps(config | {"add_adapter": True}))
    with pytest.raises(GraftError, match=r"shortens its features .*add_adapter"):
        build(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(GraftError, match="could not be had or read"):
        build(str(tmp_path))


def test_a_checkpoint_that_lacks_weights_is_refused(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "holed"
    tiny_wave(folder, "hubert")
    state = load_file(folder / "model.safetensors")
    del state["encoder.layers.1.feed_forward.output_dense.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(GraftError, match=r"lacks 1 of its weights, such as encoder\.layers\.1\.feed_forward"):
        build(str(folder))
