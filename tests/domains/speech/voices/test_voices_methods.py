"""Roles of a voice's modules, and every method on them."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import PeftModel
from torch import nn

from common.attach import attach, probe, tuner_layers
from common.errors import GraftError
from common.methods import METHODS, LoRA
from common.roles import resolve
from domains.speech.backbones._backbone import bare
from domains.speech.voices import build_voice, expand, log_durations, read
from tests.domains.speech.voices.nets import toy_folder, toy_piper
from tests.toy import SMALL

KINDS = ("piper", "hub")
IDS = torch.tensor([[1, 0, 20, 0, 22, 0, 2], [1, 0, 9, 0, 2, 0, 0]])
LENGTHS = torch.tensor([7, 5])
NOISE = torch.randn(2, 2, 7, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Compute in one thread; toy tensors are too small to share out."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny voice of transformers, saved once."""
    return toy_folder(tmp_path_factory.mktemp("voice") / "v")


@pytest.fixture
def voices(folder, monkeypatch):
    """Build a tiny voice anew, with a posterior encoder."""
    toy_piper(monkeypatch)
    names = {"piper": "toy", "hub": folder}

    def build(kind):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the Piper voice's posterior encoder is random
            return build_voice(names[kind], posterior=True)

    return build


def run(model):
    """Run all parts: text, durations, inverse flow, decoder, and the posterior encoder with its draw left out."""
    prior = read(model, IDS, LENGTHS)
    net = bare(model)
    logs = log_durations(net, prior.hidden, prior.mask, NOISE)
    latents = expand(prior.mean + prior.log_scale, torch.full((2, 7), 2) * prior.mask[:, 0].long())
    ones = latents.new_ones(2, 1, latents.shape[2])
    wave = net.decoder(net.flow(latents, ones, reverse=True))
    spectrum = torch.arange(2 * 17 * 6).reshape(2, 17, 6).sin()
    _, mean, scale = net.posterior_encoder(spectrum, torch.ones(2, 1, 6))
    return torch.cat([part.flatten(1) for part in (logs, wave, mean, scale)], dim=1)


# ---- roles

TEXT = {"attention_qkv": 6, "attention_out": 2, "ffn_in": 2, "ffn_out": 2, "embed": 1}
# text 1; two flows of 2 + 4; durations 2 + 3 flows of 2 + dilated and pointwise 3 + 3 of each; decoder: post, 2 ups and
# 4 blocks; posterior 1 + 4
CONV = 1 + 12 + (2 + 6) + 6 * 4 + (1 + 2) + 5
NORM = 4 + 4 * 6
ROLES = {
    "piper": {**TEXT, "stem": 2, "conv": CONV + 4 * 2, "norm": NORM},
    "hub": {**TEXT, "stem": 2, "conv": CONV + 4 * 4, "norm": NORM},
}


@pytest.mark.parametrize("kind", KINDS)
def test_roles_are_counted(voices, kind):
    voice = voices(kind)
    assert resolve(voice.model, voice.family).count() == ROLES[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_has_a_role_and_lies_in_a_part(voices, kind):
    voice = voices(kind)
    roles = resolve(voice.model, voice.family)
    kinds = (nn.Linear, nn.Conv1d, nn.ConvTranspose1d, nn.Embedding, nn.LayerNorm)
    layers = {name for name, module in voice.model.named_modules() if isinstance(module, kinds)}
    assert layers == set(roles.role_of)
    inside = [set(roles.select([f"{role}@{part}" for role in has])) for part, has in PARTS.items()]
    assert set.union(*inside) == layers
    assert sum(map(len, inside)) == len(layers)
    assert len(roles.select(["conv@decoder@last:1"])) == (2 if kind == "piper" else 4)


PARTS = {
    "text": ["attention", "ffn", "embed", "norm", "conv"],
    "flow": ["conv"],
    "decoder": ["conv", "stem"],
    "durations": ["conv", "norm"],
    "posterior": ["conv", "stem"],
}


# ---- methods

ON = {"VeRA": ["attention"], "ConvAdapter": ["conv@flow"]}


def spec_of(method):
    """A method at toy size."""
    small = {name: value for name, value in SMALL.get(method, {}).items() if name != "target_modules"}
    return METHODS[method](**small, **({"on": ON[method]} if method in ON else {}))


# One of each kind; the matrix tries all methods on a VITS.
OF_EACH_KIND = (
    "FullFineTune",
    "LinearProbe",
    "BitFit",
    "NormTuning",
    "NormBias",
    "LastBlocks",
    "LoRA",
    "VeRA",
    "IA3",
    "SSF",
)
OF_EACH_KIND += ("ConvAdapter", "Houlsby", "Pfeiffer", "LoKr", "FishMask")


@pytest.mark.parametrize("method", OF_EACH_KIND)
@pytest.mark.parametrize("kind", KINDS)
def test_a_method_of_each_kind_trains_and_reloads_on_a_voice(voices, kind, method, tmp_path):
    spec, voice = spec_of(method), voices(kind)
    with torch.no_grad():
        before = run(voice.model)
    attached = attach(voice.model, spec, voice.family)
    attached.train(False)
    with torch.no_grad():
        torch.testing.assert_close(run(attached.model), before, atol=1e-5, rtol=1e-5)
    probe(attached, lambda: run(attached.model))
    trained = [parameter for parameter in attached.model.parameters() if parameter.requires_grad]
    assert bool(trained) == (method != "LinearProbe")
    if not trained:
        return
    attached.train(True)
    wanted = torch.randn(before.shape, generator=torch.Generator().manual_seed(1))
    (run(attached.model) * wanted).mean().backward()
    assert all(parameter.grad is not None for parameter in trained)
    torch.optim.AdamW(trained, lr=0.01).step()
    attached.train(False)
    with torch.no_grad():
        after = run(attached.model)
    assert not torch.allclose(after, before, atol=1e-4)
    fresh = voices(kind).model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT finds no hub configuration
        if isinstance(attached.model, PeftModel):
            attached.model.save_pretrained(str(tmp_path), save_embedding_layers=False)
            fresh = PeftModel.from_pretrained(fresh, str(tmp_path))
        else:
            fresh.load_state_dict(attached.model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(run(fresh.eval()), after, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_lora_merges_without_a_trace_and_disabled_it_is_the_base(voices, kind):
    voice = voices(kind)
    with torch.no_grad():
        before = run(voice.model)
    attached = attach(voice.model, LoRA(rank=2, on=["all"]), voice.family)
    for name, parameter in attached.model.named_parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(len(name)))
    attached.train(False)
    with torch.no_grad():
        expected = run(attached.model)
        assert not torch.allclose(expected, before, atol=1e-3)
        with attached.model.disable_adapter():
            assert torch.equal(run(attached.model), before)
        merged = attached.model.merge_and_unload()
        torch.testing.assert_close(run(merged), expected, atol=1e-4, rtol=1e-4)
    assert not tuner_layers(merged)


def test_a_part_that_a_voice_has_not_is_refused(voices):
    voice = voices("piper")
    with pytest.raises(GraftError, match=r"asks for 'vocoder' of this vits backbone.*Allowed: decoder, durations"):
        attach(voice.model, LoRA(on=["conv@vocoder"]), voice.family)
