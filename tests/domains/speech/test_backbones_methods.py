"""Roles of the speech networks, and every method on them."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import PeftModel
from torch import nn

from common.attach import attach, probe, tuner_layers
from common.errors import GraftError
from common.matrix.settings import TINY
from common.methods import METHODS, LoRA
from common.roles import resolve
from domains.speech.backbones import build, decode, encode
from tests.cases import CASES, LINEAR_ONLY, on_networks
from tests.domains.speech.nets import noise, tiny_wave, tiny_whisper
from tests.toy import SMALL

NETWORKS = ("whisper", "whisper-encoder", "wav2vec2", "hubert", "wavlm")
AUDIO = noise((6400, 4000))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Compute in one thread; toy tensors are too small to share out."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Each tiny network, saved once."""
    root = tmp_path_factory.mktemp("nets")
    saved = {kind: tiny_wave(root / kind, kind) for kind in ("wav2vec2", "hubert", "wavlm")}
    return saved | dict.fromkeys(("whisper", "whisper-encoder"), tiny_whisper(root / "whisper"))


def tiny(folders, key):
    return build(folders[key], encoder_only=key == "whisper-encoder")


def run(built, model):
    """What a task trains on: the features, or for a recogniser the decoder's logits."""
    features, _ = encode(built, model, *AUDIO)
    if built.kind != "seq2seq":
        return features
    start = built.tokens.start()
    ids = torch.tensor([[*start, *built.tokens.encode("a cab")], [*start, *built.tokens.encode("bad a")]])
    return decode(built, model, features, ids)


# ---- roles

BLOCK = {"attention_qkv": 3, "attention_out": 1, "ffn_in": 1, "ffn_out": 1}
WAVE = {**{role: 2 * n for role, n in BLOCK.items()}, "stem": 2, "conv": 2, "norm": 3 + 1 + 2 * 2 + 1}
ROLES = {
    # two blocks of one attention and two of two, and a final norm on each side
    "whisper": {"stem": 2, "attention_qkv": 18, "attention_out": 6, "ffn_in": 4, "ffn_out": 4, "norm": 12},
    "whisper-encoder": {**{role: 2 * n for role, n in BLOCK.items()}, "stem": 2, "norm": 5},
    "wav2vec2": WAVE,
    "hubert": WAVE,
    "wavlm": {**WAVE, "embed": 1},
}


@pytest.mark.parametrize("key", NETWORKS)
def test_roles_are_counted(folders, key):
    built = tiny(folders, key)
    assert resolve(built.model, built.family).count() == ROLES[key]


@pytest.mark.parametrize("key", NETWORKS)
def test_layers_without_a_role_are_the_known_ones_and_blocks_stand_in_order(folders, key):
    built = tiny(folders, key)
    roles = resolve(built.model, built.family)
    kinds = (nn.Linear, nn.Conv1d, nn.Embedding, nn.LayerNorm, nn.GroupNorm)
    layers = {name for name, module in built.model.named_modules() if isinstance(module, kinds)}
    known = ("proj_out", "embed_tokens", "embed_positions", "gru_rel_pos_linear", "pos_conv_embed.conv")
    assert all(name.endswith(known) for name in layers - set(roles.role_of))
    called = []
    for name in roles.blocks:
        built.model.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name))
    run(built, built.model)
    assert tuple(called) == roles.blocks
    assert len(called) == (4 if key == "whisper" else 2)


def test_a_whisper_has_an_encoder_and_a_decoder(folders):
    built = tiny(folders, "whisper")
    roles = resolve(built.model, built.family)
    for part in ("encoder", "decoder"):
        names = roles.select([f"attention@{part}"])
        assert names
        assert all(name.startswith(f"model.{part}.") for name in names)
    assert len(roles.select(["attention_qkv@decoder@last:1"])) == 6


# ---- methods

# A method whose default roles a network has not, or cannot act on, is asked for other ones.
ON = {
    **{(m, key): ["attention", "ffn"] for m in LINEAR_ONLY if m != "BEFT" for key in ("wav2vec2", "hubert", "wavlm")},
    **{("ConvAdapter", key): ["stem"] for key in ("whisper", "whisper-encoder")},
}
REFUSED = {
    (method, "wavlm"): f"{method} cannot act on this wavlm backbone: it scores features by their distance"
    for method in ("VPTShallow", "VPTDeep", "PromptTuning")
} | {
    (name, key): f"{name} needs the grid in which the tokens lie"
    for name in ("Convpass", "ConvLoRA")
    for key in NETWORKS
}


def spec_of(method, key):
    """A method at toy size."""
    small = {name: value for name, value in (SMALL | TINY).get(method, {}).items() if name != "target_modules"}
    on = {"on": ON[method, key]} if (method, key) in ON else {}
    return METHODS[method](**(small | on))


@pytest.mark.parametrize(("key", "method"), on_networks(NETWORKS, first=("whisper-encoder", "wav2vec2")))
def test_every_method_trains_and_reloads_on_every_network(folders, key, method, tmp_path):
    spec, built = spec_of(method, key), tiny(folders, key)
    if (method, key) in REFUSED:
        with pytest.raises(GraftError, match=REFUSED[method, key]):
            attach(built.model, spec, built.family)
        return
    with torch.no_grad():
        before = run(built, built.model)
    attached = attach(built.model, spec, built.family)
    attached.train(False)
    with torch.no_grad():
        CASES[method].check_start(run(built, attached.model), before)
    probe(attached, lambda: run(built, attached.model))
    trained = [parameter for parameter in attached.model.parameters() if parameter.requires_grad]
    assert bool(trained) == (method != "LinearProbe")
    if not trained:
        return
    attached.train(True)
    wanted = torch.randn(before.shape, generator=torch.Generator().manual_seed(1))
    (run(built, attached.model) * wanted).mean().backward()
    assert all(parameter.grad is not None for parameter in trained)
    torch.optim.AdamW(trained, lr=0.05).step()
    attached.train(False)
    with torch.no_grad():
        after = run(built, attached.model)
    assert not torch.allclose(after, before, atol=1e-5)
    fresh = tiny(folders, key).model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT finds no hub configuration
        if isinstance(attached.model, PeftModel):
            attached.model.save_pretrained(str(tmp_path), save_embedding_layers=False)
            fresh = PeftModel.from_pretrained(fresh, str(tmp_path))
        else:
            fresh.load_state_dict(attached.model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(run(built, fresh.eval()), after, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("key", NETWORKS)
def test_queries_and_values_are_chosen_alone(folders, key):
    built = tiny(folders, key)
    attached = attach(built.model, LoRA(rank=2, on=["attention_q", "attention_v"]), built.family)
    ends = [name.rpartition(".")[2] for name in attached.plan.targets]
    assert set(ends) == {"q_proj", "v_proj"}
    assert len(ends) * 3 == 2 * ROLES[key]["attention_qkv"]


@pytest.mark.parametrize("key", NETWORKS)
def test_lora_merges_without_a_trace_and_disabled_it_is_the_base(folders, key):
    built = tiny(folders, key)
    with torch.no_grad():
        before = run(built, built.model)
    attached = attach(built.model, LoRA(rank=2, on=["all"]), built.family)
    for name, parameter in attached.model.named_parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    attached.train(False)
    with torch.no_grad():
        expected = run(built, attached.model)
        assert not torch.allclose(expected, before, atol=1e-3)
        with attached.model.disable_adapter():
            assert torch.equal(run(built, attached.model), before)
        merged = attached.model.merge_and_unload()
        torch.testing.assert_close(run(built, merged), expected, atol=1e-4, rtol=1e-4)
    assert not tuner_layers(merged)


@pytest.mark.parametrize("method", ["LoRA", "FullFineTune", "BitFit"])
@pytest.mark.parametrize("key", NETWORKS)
def test_gradients_are_the_same_with_checkpointing(folders, key, method):
    gradients = []
    for recompute in (False, True):
        built = tiny(folders, key)
        if recompute:
            built.model.gradient_checkpointing_enable()
        for module in built.model.modules():  # what drops out is drawn anew in a recomputation
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        attached = attach(built.model, spec_of(method, key), built.family)
        attached.train(True)
        torch.manual_seed(0)
        run(built, attached.model).square().mean().backward()
        gradients.append({n: p.grad for n, p in attached.model.named_parameters() if p.requires_grad})
    assert gradients[0]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_a_role_that_a_network_has_not_is_refused_with_those_it_has(folders):
    built = tiny(folders, "whisper")
    with pytest.raises(GraftError, match=r"'embed' matches no module of this whisper.*attention_qkv \(18\)"):
        attach(built.model, LoRA(on=["embed"]), built.family)
