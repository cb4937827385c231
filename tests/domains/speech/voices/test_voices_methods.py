"""Roles of a voice's modules, and every method on them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from common.attach import attach
from common.errors import GraftError
from common.methods import LinearProbe, LoRA
from common.roles import resolve
from domains.speech.backbones._backbone import bare
from domains.speech.voices import build_voice, expand, log_durations, read
from tests.domains.speech.voices.nets import toy_folder, toy_piper
from tests.domains.speech.voices.trying import merge_without_a_trace, small, train_and_reload

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


# One of each kind; the matrix tries all methods on a VITS.
OF_EACH_KIND = (
    "FullFineTune",
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
    def loss(model):
        made = run(model)
        return (made * torch.randn(made.shape, generator=torch.Generator().manual_seed(1))).mean()

    train_and_reload(lambda: voices(kind), run, loss, small(method, ON), tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_linear_probe_leaves_a_voice_as_it_is(voices, kind):
    voice = voices(kind)
    with torch.no_grad():
        before = run(voice.model)
        attached = attach(voice.model, LinearProbe(), voice.family)
        assert torch.equal(run(attached.model), before)
    assert not any(parameter.requires_grad for parameter in attached.model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_lora_merges_without_a_trace_and_disabled_it_is_the_base(voices, kind):
    merge_without_a_trace(voices(kind), run, ["all"])


def test_a_part_that_a_voice_has_not_is_refused(voices):
    voice = voices("piper")
    with pytest.raises(GraftError, match=r"asks for 'vocoder' of this vits backbone.*Allowed: decoder, durations"):
        attach(voice.model, LoRA(on=["conv@vocoder"]), voice.family)
