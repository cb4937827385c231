"""Prompts in encoders of speech and in Whisper's decoder, against the same networks run by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from common.attach import attach, probe
from common.methods import PrefixTuning, UniPELT, VPTDeep, VPTShallow
from domains.speech.backbones import build, decode, encode, generate
from domains.speech.backbones._families import TORCHAUDIO
from tests.domains.speech.nets import noise, tiny_wave, tiny_whisper

LENGTH = 3
AUDIO = noise((6400, 4000))
WAVES = ("wav2vec2", "hubert", "wavlm")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Each tiny network, saved once."""
    root = tmp_path_factory.mktemp("nets")
    return {kind: tiny_wave(root / kind, kind) for kind in WAVES} | {"whisper": tiny_whisper(root / "whisper")}


def attached(folders, key, spec, **options):
    built = build(folders[key], **options)
    result = attach(built.model, spec, built.family)
    for name, parameter in result.model.named_parameters():
        if any(part in name for part in ("kvprefix_", "gatelora_", "badapter_")):  # those that matter
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
    result.train(False)
    return built, result


def prompts_of(model):
    return [p.detach() for name, p in model.named_parameters() if "tprompt_" in name]


@pytest.mark.parametrize("spec", [VPTShallow(length=LENGTH), VPTDeep(length=LENGTH)], ids=["shallow", "deep"])
@torch.no_grad()
def test_prompts_join_whispers_encoder_behind_its_positions(folders, spec):
    built, result = attached(folders, "whisper", spec, encoder_only=True)
    bare = build(folders["whisper"], encoder_only=True)
    states, _ = encode(bare, bare.model, *AUDIO, all_layers=True)
    hidden, prompts = states[:, 0], prompts_of(result.model)
    rows = prompts[0].expand(2, -1, -1)
    inputs = [hidden]
    for place, block in enumerate(bare.model.layers):
        rows = prompts[place].expand(2, -1, -1) if len(prompts) > 1 else rows
        out = block(torch.cat((rows, hidden), dim=1), None)
        rows, hidden = out[:, :LENGTH], out[:, LENGTH:]
        inputs.append(hidden)
    expected = torch.stack([*inputs[:-1], bare.model.layer_norm(hidden)], dim=1)
    found, _ = encode(built, result.model, *AUDIO, all_layers=True)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    last, _ = encode(built, result.model, *AUDIO)
    assert torch.equal(last, found[:, -1])


def test_prompts_of_a_recogniser_stand_in_its_encoder_alone(folders):
    _, result = attached(folders, "whisper", VPTDeep(length=LENGTH))
    assert list(result.plan.targets) == ["model.encoder.layers.0", "model.encoder.layers.1"]


SPECS = {
    "VPTShallow": VPTShallow(length=LENGTH),
    "VPTDeep": VPTDeep(length=LENGTH),
    "PrefixTuning": PrefixTuning(length=LENGTH),
    "PrefixTuning-gate": PrefixTuning(length=LENGTH, gate=True),
    "UniPELT": UniPELT(length=LENGTH, rank=2, width=4),
}


@pytest.mark.parametrize("spec", list(SPECS.values()), ids=list(SPECS))
@pytest.mark.parametrize("key", WAVES)
@torch.no_grad()
def test_an_utterance_in_a_padded_batch_has_the_features_that_it_has_alone(folders, key, spec):
    if key == "wavlm" and isinstance(spec, (VPTShallow, VPTDeep)):
        pytest.skip("refused")
    built, result = attached(folders, key, spec)
    together, mask = encode(built, result.model, *AUDIO)
    for row, length in enumerate(AUDIO[1].tolist()):
        alone, _ = encode(built, result.model, AUDIO[0][row : row + 1, :length], AUDIO[1][row : row + 1])
        torch.testing.assert_close(together[row, mask[row]], alone[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("key", ["whisper", "wav2vec2"])
@pytest.mark.parametrize("spec", list(SPECS.values()), ids=list(SPECS))
def test_gradients_are_the_same_with_checkpointing(folders, key, spec):
    gradients = []
    for recompute in (False, True):
        built, result = attached(folders, key, spec)
        if recompute:
            built.model.gradient_checkpointing_enable()
        for module in built.model.modules():  # what drops out is drawn anew in a recomputation
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        result.train(True)
        torch.manual_seed(0)
        features, _ = encode(built, result.model, *AUDIO)
        if key == "whisper":
            features = decode(built, result.model, features, torch.tensor([built.tokens.start()] * 2))
        features.square().mean().backward()
        gradients.append([p.grad for p in result.model.parameters() if p.requires_grad])
    for plain, recomputed in zip(*gradients, strict=True):
        assert plain.any()
        torch.testing.assert_close(recomputed, plain)


@pytest.mark.parametrize("gate", [False, True])
@torch.no_grad()
def test_a_decoder_with_a_prefix_writes_with_its_cache_what_it_scores_highest_without(folders, gate):
    built, result = attached(folders, "whisper", PrefixTuning(length=LENGTH, gate=gate, blocks="decoder"))
    assert list(result.plan.targets) == [f"model.decoder.layers.{place}.self_attn" for place in (0, 1)]
    features, _ = encode(built, result.model, *AUDIO)
    written = generate(built, result.model, features, max_tokens=8)
    start = list(built.tokens.start())
    settings = built.model.generation_config
    for row, ids in enumerate(written):
        assert ids
        logits = decode(built, result.model, features[row : row + 1], torch.tensor([[*start, *ids]]))[0]
        scores = logits[len(start) - 1 : -1]
        scores[:, settings.suppress_tokens] = float("-inf")
        scores[0, settings.begin_suppress_tokens] = float("-inf")
        assert scores.argmax(dim=1).tolist() == ids
    plain = build(folders["whisper"])
    assert written != generate(plain, plain.model, features, max_tokens=8)


@torch.no_grad()
def test_the_prefix_of_a_wavlm_has_no_distance(folders):
    built, _ = attached(folders, "wavlm", PrefixTuning(length=LENGTH, blocks="first:1"))
    layer = built.model.encoder.layers[0].attention
    attention = layer.base_layer
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    bias = torch.randn(2 * 4, 5, 5, generator=torch.Generator().manual_seed(1))
    q, k, v = (
        part(x).unflatten(2, (4, 4)).transpose(1, 2) for part in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    gates = attention.gru_rel_pos_linear(x.unflatten(2, (4, 4)).transpose(1, 2)).unflatten(3, (2, 4)).sum(4).sigmoid()
    gate = gates[..., :1] * (gates[..., 1:] * attention.gru_rel_pos_const - 1.0) + 2.0
    keys, values = (
        part["default"].unflatten(1, (4, 4)).transpose(0, 1).expand(2, -1, -1, -1)
        for part in (layer.kvprefix_keys, layer.kvprefix_values)
    )
    own = q @ k.transpose(2, 3) / 2 + gate * bias.view(2, 4, 5, 5)
    weights = torch.cat((q @ keys.transpose(2, 3) / 2, own), dim=3).softmax(3)
    expected = attention.out_proj((weights @ torch.cat((values, v), dim=2)).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x, position_bias=bias)[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("spec", list(SPECS.values()), ids=list(SPECS))
def test_a_network_of_torchaudio_takes_prompts(spec):
    from torchaudio.models import wav2vec2_model

    torch.manual_seed(0)
    model = wav2vec2_model(
        extractor_mode="layer_norm",
        extractor_conv_layer_config=[(8, 10, 5), (8, 4, 4), (8, 4, 4)],
        extractor_conv_bias=True,
        encoder_embed_dim=16,
        encoder_projection_dropout=0.0,
        encoder_pos_conv_kernel=8,
        encoder_pos_conv_groups=2,
        encoder_num_layers=2,
        encoder_num_heads=4,
        encoder_attention_dropout=0.0,
        encoder_ff_interm_features=24,
        encoder_ff_interm_dropout=0.0,
        encoder_dropout=0.0,
        encoder_layer_norm_first=True,
        encoder_layer_drop=0.0,
        aux_num_out=None,
    )
    result = attach(model.eval(), spec, TORCHAUDIO)
    transformer = model.encoder.transformer
    x = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))
    apart = torch.zeros(2, 1, 6, 6)
    apart[1, ..., 4:] = -1e4
    probe(result, lambda: transformer(x, attention_mask=apart))
    result.train(False)
    blocks = transformer.layers
    with torch.no_grad():
        rows = x, x[1:, :4]
        for block in blocks:
            rows = block(rows[0], apart)[0], block(rows[1])[0]
    torch.testing.assert_close(rows[0][1:, :4], rows[1], atol=1e-5, rtol=1e-5)
