"""Roles of the protein networks, and every method on them."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import EsmModel, T5Config, T5EncoderModel

from common.attach import attach, probe, tuner_layers
from common.errors import GraftError
from common.matrix.settings import TINY
from common.methods import METHODS, LoRA, NormTuning
from common.roles import resolve
from domains.protein.backbones import build, residue_features
from domains.protein.backbones._families import BERT, ESM, T5
from domains.protein.backbones._huggingface import _use_torch_norms
from tests.cases import CASES, on_networks
from tests.domains.protein.nets import SIZES, proteins, tiny
from tests.toy import SMALL

NETWORKS = ("esm2", "esm1b", "unirep")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Compute in one thread; toy tensors are too small to share out."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- roles

BLOCK = {"attention_qkv": 3, "attention_out": 1, "ffn_in": 1, "ffn_out": 1}
ROLES = {
    "esm2": {**{role: 2 * n for role, n in BLOCK.items()}, "norm": 2 * 2 + 1, "embed": 1},
    "esm1b": {**{role: 2 * n for role, n in BLOCK.items()}, "norm": 2 * 2 + 2, "embed": 2},
    "unirep": {"recurrent": 2 * 4, "embed": 1},
}


@pytest.mark.parametrize("key", NETWORKS)
def test_roles_are_counted(key):
    built = tiny(key)
    assert resolve(built.model, built.family).count() == ROLES[key]


@pytest.mark.parametrize("key", NETWORKS)
def test_every_layer_carries_a_role_and_blocks_stand_in_order(key):
    built = tiny(key)
    roles = resolve(built.model, built.family)
    layers = [n for n, m in built.model.named_modules() if isinstance(m, (nn.Linear, nn.Embedding, nn.LayerNorm))]
    assert list(roles.role_of) == layers
    called = []
    for name in roles.blocks:
        built.model.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name))
    residue_features(built, built.model, *proteins())
    assert tuple(called) == roles.blocks
    assert len(called) == built.layers == 2


@pytest.mark.parametrize("gated", [True, False])
def test_the_roles_of_a_t5(gated):
    kind = "gated-gelu" if gated else "relu"
    config = T5Config(vocab_size=28, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, feed_forward_proj=kind)
    model = T5EncoderModel(config)
    _use_torch_norms(model)
    counts = {**{role: 2 * n for role, n in BLOCK.items()}, "norm": 2 * 2 + 1}
    assert resolve(model, T5).count() == counts | {"ffn_in": 4 if gated else 2}
    assert len(resolve(model, T5).blocks) == 2
    attach(model, NormTuning(), T5)


def test_a_bert_has_the_roles_of_an_esm():
    assert BERT.roles == ESM.roles
    assert BERT.name == "bert"


# ---- methods

# A method whose default roles a network has not is asked for the ones that it has; what remains is refused.
ON = {("SSF", "unirep"): ["all"], **{("InvertibleAdapter", key): ["embed"] for key in NETWORKS}}
REFUSED = {
    **{(method, "unirep"): "NormTuning finds no norm" for method in ("NormTuning", "Mixture", "PerGroup")},
    ("BOFT", "unirep"): "needs inputs that 4 divides, and 'layers.0.wx' has 10",
    ("BEFT", "unirep"): "Role 'attention_qkv' matches no module of this unirep",
    **{("ConvAdapter", key): "Role 'conv' matches no module" for key in NETWORKS},
    **{
        (method, "unirep"): "Role 'attention_out' matches no module of this unirep"
        for method in ("Houlsby", "DiffFit", "SCT")
    },
    ("Pfeiffer", "unirep"): "Role 'ffn_out' matches no module of this unirep",
    **{
        (name, "unirep"): f"{name} cannot act on this unirep backbone: it reads residues one after another"
        for name, method in METHODS.items()
        if method.taxonomy == "prompts"
    },
    ("Compacter", "unirep"): "Role 'attention_out' matches no module of this unirep",
    ("ParallelAdapter", "unirep"): "Role 'ffn' matches no module of this unirep",
    ("AdaptFormer", "unirep"): "Role 'ffn' matches no module of this unirep",
    ("RepAdapter", "unirep"): "Role 'attention_qkv' matches no module of this unirep",
    **{
        (method, key): f"{method} needs the grid .* none at .* of this esm backbone"
        for method in ("Convpass", "ConvLoRA")
        for key in ("esm2", "esm1b")
    },
    ("Convpass", "unirep"): "Role 'attention' matches no module of this unirep",
    ("ConvLoRA", "unirep"): "Role 'attention_qkv' matches no module of this unirep",
    **{
        (method, "unirep"): f"{method} acts on the hidden states that blocks hand on"
        for method in ("AdapterPlus", "LoReFT", "NoReFT", "DiReFT", "LST")
    },
}
REFUSED |= {  # of which it is a part
    (name, key): reason
    for (method, key), reason in REFUSED.items()
    for name in ("MAM", "UniPELT")
    if method == "PrefixTuning"
}


def spec_of(method, key):
    """A method at toy size."""
    on = {"on": ON[method, key]} if (method, key) in ON else {}
    small = {name: value for name, value in (SMALL | TINY).get(method, {}).items() if name != "target_modules"}
    return METHODS[method](**(small | on))


@pytest.mark.parametrize(("key", "method"), on_networks(NETWORKS, first=("esm2", "unirep")))
def test_every_method_trains_and_reloads_on_every_network_or_says_why_not(key, method, tmp_path):
    spec, built = spec_of(method, key), tiny(key)
    batch = proteins()
    if (method, key) in REFUSED:
        with pytest.raises(GraftError, match=REFUSED[method, key]):
            attach(built.model, spec, built.family)
        return

    def run(model, training=False):
        with torch.set_grad_enabled(training):
            return residue_features(built, model, *batch)

    bare = run(built.model)
    attached = attach(built.model, spec, built.family)
    attached.train(False)
    CASES[method].check_start(run(attached.model), bare)
    probe(attached, lambda: residue_features(built, attached.model, *batch))
    trained = [parameter for parameter in attached.model.parameters() if parameter.requires_grad]
    assert bool(trained) == (method != "LinearProbe")
    if not trained:
        return
    attached.train(True)
    wanted = torch.randn(bare.shape, generator=torch.Generator().manual_seed(1))
    (run(attached.model, training=True) * wanted).mean().backward()
    torch.optim.AdamW(trained, lr=0.05).step()
    attached.train(False)
    after = run(attached.model)
    assert not torch.allclose(after, bare, atol=1e-5)
    fresh = tiny(key).model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT finds no hub configuration
        if isinstance(attached.model, PeftModel):
            attached.model.save_pretrained(str(tmp_path), save_embedding_layers=False)
            fresh = PeftModel.from_pretrained(fresh, str(tmp_path))
        else:
            fresh.load_state_dict(attached.model.state_dict())
    torch.testing.assert_close(run(fresh.eval()), after, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("key", "on"), [("esm2", "attention"), ("esm1b", "ffn"), ("unirep", "recurrent")])
def test_roles_are_narrowed_down_to_the_first_and_last_blocks(key, on):
    built = tiny(key)
    roles = resolve(built.model, built.family)
    for where, block in (("first:1", roles.blocks[0]), ("last:1", roles.blocks[1])):
        assert list(roles.select([f"{on}@{where}"])) == [n for n in roles.select([on]) if n.startswith(f"{block}.")]
    attached = attach(built.model, METHODS["Houlsby"](on=[f"{on}@last:1"], width=3), built.family)
    probe(attached, lambda: residue_features(built, attached.model, *proteins()))


def test_a_method_without_its_roles_names_those_that_there_are():
    built = tiny("unirep")
    with pytest.raises(GraftError, match=r"'norm' matches no module of this unirep.*recurrent \(8\)"):
        attach(built.model, METHODS["SSF"](), built.family)


def test_queries_and_values_are_chosen_alone():
    built = tiny("esm2")
    attached = attach(built.model, LoRA(rank=2, on=["attention_q", "attention_v"]), built.family)
    assert [name.rpartition(".")[2] for name in attached.plan.targets] == ["query", "value"] * 2
    probe(attached, lambda: residue_features(built, attached.model, *proteins()))


@pytest.mark.parametrize("key", ["esm2", "unirep"])
def test_lora_merges_without_a_trace(key):
    built = tiny(key)
    attached = attach(built.model, LoRA(rank=2), built.family)
    for name, parameter in attached.model.named_parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(len(name)))
    attached.train(False)
    with torch.no_grad():
        expected = residue_features(built, attached.model, *proteins())
        merged = attached.model.merge_and_unload()
        torch.testing.assert_close(residue_features(built, merged, *proteins()), expected, atol=1e-5, rtol=1e-5)
    assert not tuner_layers(merged)


def test_an_adapter_loads_onto_the_network_of_transformers(tmp_path):
    """Names are those of `EsmModel`, so a user needs peft and transformers and nothing of Graft."""
    built = tiny("esm2")
    plain = EsmModel(SIZES["esm2"].config(), add_pooling_layer=False).eval()
    plain.load_state_dict(built.model.state_dict(), strict=False)
    attached = attach(built.model, LoRA(rank=2), built.family)
    for parameter in attached.model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    attached.train(False)
    residues, mask = proteins()
    ids, attention = built.tokenizer.encode(residues, mask)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT finds no hub configuration
        attached.model.save_pretrained(str(tmp_path), save_embedding_layers=False)
        expected = residue_features(built, attached.model, residues, mask)
        loaded = PeftModel.from_pretrained(plain, str(tmp_path)).eval()
        hidden = loaded(input_ids=ids, attention_mask=attention).last_hidden_state[:, 1:-1]
    torch.testing.assert_close(hidden[mask], expected[mask], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["LoRA", "FullFineTune", "BitFit"])
@pytest.mark.parametrize("key", ["esm2", "unirep"])
def test_gradients_are_the_same_with_checkpointing(key, method):
    gradients = []
    for recompute in (False, True):
        built = tiny(key)
        switch = getattr(built.model, "set_grad_checkpointing", None) or built.model.gradient_checkpointing_enable
        if recompute:
            switch()
        attached = attach(built.model, spec_of(method, key), built.family)
        attached.train(True)
        residue_features(built, attached.model, *proteins()).square().sum().backward()
        gradients.append({n: p.grad for n, p in attached.model.named_parameters() if p.requires_grad})
    assert gradients[0]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_the_starters_architecture_takes_every_role():
    built = build("esm2-graft", pretrained=False)
    assert resolve(built.model, built.family).count()["attention_qkv"] == 3 * built.layers
