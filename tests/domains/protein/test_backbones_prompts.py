"""Prompts in protein language models, against networks of transformers that read them as embeddings."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, T5Config, T5EncoderModel

from common.attach import attach, probe
from common.errors import GraftError
from common.methods import PrefixTuning, PromptTuning, UniPELT, VPTDeep, VPTShallow
from domains.protein.backbones import residue_features
from domains.protein.backbones._families import BERT, T5
from tests.domains.protein.nets import proteins, tiny

LENGTH = 3


def attached(key, spec):
    built = tiny(key)
    result = attach(built.model, spec, built.family)
    result.train(False)
    return built, result.model


def prompts_of(model):
    return [p.detach() for name, p in model.named_parameters() if "tprompt_" in name]


def spread(model):
    """Prefixes, and what stands beside them, that matter."""
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("kvprefix_", "gatelora_", "badapter_")):
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))


def encoded(built):
    return built.tokenizer.encode(*proteins())


@pytest.mark.parametrize("spec", [PromptTuning(length=LENGTH), VPTShallow(length=LENGTH)], ids=["prompt", "vpt"])
@pytest.mark.parametrize("key", ["esm2", "esm1b"])
@torch.no_grad()
def test_shallow_prompts_are_embeddings_before_the_sequence(key, spec):
    built, model = attached(key, spec)
    ids, mask = encoded(built)
    bare = tiny(key).model
    embedded = bare.embeddings(input_ids=ids, attention_mask=mask)
    rows = prompts_of(model)[0].expand(len(ids), -1, -1)
    expected = bare(
        inputs_embeds=torch.cat((rows, embedded), dim=1),
        attention_mask=torch.cat((torch.ones(len(ids), LENGTH, dtype=mask.dtype), mask), dim=1),
    ).last_hidden_state[:, LENGTH:]
    found = model(input_ids=ids, attention_mask=mask).last_hidden_state
    seen = mask.bool()
    torch.testing.assert_close(found[seen], expected[seen], atol=1e-5, rtol=1e-5)
    plain = bare(input_ids=ids, attention_mask=mask).last_hidden_state
    assert not torch.allclose(found[seen], plain[seen], atol=1e-2)


@torch.no_grad()
def test_deep_prompts_stand_before_the_sequence_in_each_block():
    built, model = attached("esm2", VPTDeep(length=LENGTH))
    ids, mask = encoded(built)
    bare = tiny("esm2").model
    hidden = bare.embeddings(input_ids=ids, attention_mask=mask)
    positions = bare.rotary_embeddings(hidden, torch.arange(LENGTH + ids.shape[1]).unsqueeze(0))
    seen = torch.cat((torch.ones(len(ids), LENGTH, dtype=torch.bool), mask.bool()), dim=1)[:, None, None, :]
    for block, prompts in zip(bare.encoder.layer, prompts_of(model), strict=True):
        rows = torch.cat((prompts.expand(len(ids), -1, -1), hidden), dim=1)
        hidden = block(rows, attention_mask=seen, position_embeddings=positions)[:, LENGTH:]
    expected = bare.encoder.emb_layer_norm_after(hidden)
    found = model(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_prefix_is_attended_to_with_keys_that_are_not_rotated():
    built, model = attached("esm2", PrefixTuning(length=LENGTH, blocks="first:1"))
    spread(model)
    ids, mask = encoded(built)
    block = model.base_model.model.encoder.layer[0]
    layer, attention = block.attention, block.attention.base_layer
    x = attention.LayerNorm(model.base_model.model.embeddings(input_ids=ids, attention_mask=mask))
    heads = attention.self.num_attention_heads
    q, k, v = (
        part(x).unflatten(2, (heads, -1)).transpose(1, 2)
        for part in (attention.self.query, attention.self.key, attention.self.value)
    )
    cosines, sines = model.base_model.model.rotary_embeddings(x, torch.arange(x.shape[1]).unsqueeze(0))

    def rotated(part):
        left, right = part.chunk(2, dim=3)
        return part * cosines + torch.cat((-right, left), dim=3) * sines

    keys, values = (
        part["default"].unflatten(1, (heads, -1)).transpose(0, 1).expand(len(ids), -1, -1, -1)
        for part in (layer.kvprefix_keys, layer.kvprefix_values)
    )
    # A key that stands nowhere meets the query as attention computes it, so rotated by the query's place.
    scores = rotated(q) @ torch.cat((keys, rotated(k)), dim=2).transpose(2, 3) / q.shape[-1] ** 0.5
    seen = torch.cat((torch.ones(len(ids), LENGTH, dtype=torch.bool), mask.bool()), dim=1)
    weights = scores.masked_fill(~seen[:, None, None, :], float("-inf")).softmax(3)
    expected = (weights @ torch.cat((values, v), dim=2)).transpose(1, 2).flatten(2)
    noted = []
    attention.output.dense.register_forward_pre_hook(lambda module, args: noted.append(args[0]))
    model(input_ids=ids, attention_mask=mask)
    torch.testing.assert_close(noted[0][mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-5)


SPECS = {
    "VPTShallow": VPTShallow(length=LENGTH),
    "VPTDeep": VPTDeep(length=LENGTH),
    "PrefixTuning": PrefixTuning(length=LENGTH),
    "PrefixTuning-gate": PrefixTuning(length=LENGTH, gate=True),
    "UniPELT": UniPELT(length=LENGTH, rank=2, width=4),
}


@pytest.mark.parametrize("spec", list(SPECS.values()), ids=list(SPECS))
@pytest.mark.parametrize("key", ["esm2", "esm1b"])
@torch.no_grad()
def test_a_protein_in_a_padded_batch_has_the_features_that_it_has_alone(key, spec):
    built, model = attached(key, spec)
    spread(model)
    residues, mask = proteins()
    together = residue_features(built, model, residues, mask)
    for row, length in enumerate(mask.sum(1).tolist()):
        alone = residue_features(built, model, residues[row : row + 1, :length], mask[row : row + 1, :length])
        torch.testing.assert_close(together[row, :length], alone[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("spec", list(SPECS.values()), ids=list(SPECS))
def test_gradients_are_the_same_with_checkpointing(spec):
    gradients = []
    for recompute in (False, True):
        built = tiny("esm2")
        if recompute:
            built.model.gradient_checkpointing_enable()
        result = attach(built.model, spec, built.family)
        spread(result.model)
        result.train(True)
        torch.manual_seed(0)
        residue_features(built, result.model, *proteins()).square().sum().backward()
        gradients.append([p.grad for p in result.model.parameters() if p.requires_grad])
    for plain, recomputed in zip(*gradients, strict=True):
        assert plain.any()
        torch.testing.assert_close(recomputed, plain)


def mask_of(lengths=(6, 4)):
    return torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)


@pytest.mark.parametrize("spec", list(SPECS.values()), ids=list(SPECS))
def test_a_bert_takes_prompts(spec):
    torch.manual_seed(0)
    model = BertModel(
        BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24),
        add_pooling_layer=False,
    )
    result = attach(model.eval(), spec, BERT)
    ids, mask = torch.randint(0, 30, (2, 6), generator=torch.Generator().manual_seed(0)), mask_of()
    probe(result, lambda: result.model(input_ids=ids, attention_mask=mask).last_hidden_state[mask])
    result.train(False)
    with torch.no_grad():
        together = result.model(input_ids=ids, attention_mask=mask).last_hidden_state
        alone = result.model(input_ids=ids[1:, :4], attention_mask=mask[1:, :4]).last_hidden_state
    torch.testing.assert_close(together[1:, :4], alone, atol=1e-5, rtol=1e-5)


@pytest.fixture
def t5():
    torch.manual_seed(0)
    return T5EncoderModel(T5Config(vocab_size=28, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)).eval()


def test_the_relative_bias_of_a_t5_is_zero_for_a_prefix(t5):
    ids, mask = torch.randint(0, 28, (2, 6), generator=torch.Generator().manual_seed(0)), mask_of()
    table = t5.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
    nn.init.normal_(table.weight)
    result = attach(t5, PrefixTuning(length=LENGTH), T5)
    spread(result.model)
    probe(result, lambda: result.model(input_ids=ids, attention_mask=mask).last_hidden_state[mask])
    result.train(False)
    with torch.no_grad():
        layer = t5.encoder.block[0].layer[0].SelfAttention
        attention = layer.base_layer
        x = t5.encoder.block[0].layer[0].layer_norm(t5.encoder.embed_tokens(ids))
        q, k, v = (part(x).unflatten(2, (2, 8)).transpose(1, 2) for part in (attention.q, attention.k, attention.v))
        keys, values = (
            part["default"].unflatten(1, (2, 8)).transpose(0, 1).expand(2, -1, -1, -1)
            for part in (layer.kvprefix_keys, layer.kvprefix_values)
        )
        own = q @ k.transpose(2, 3) + attention.compute_bias(6, 6)
        scores = torch.cat((q @ keys.transpose(2, 3), own.masked_fill(~mask[:, None, None, :], float("-inf"))), dim=3)
        mixed = scores.softmax(3) @ torch.cat((values, v), dim=2)
        noted = []
        attention.o.register_forward_pre_hook(lambda module, args: noted.append(args[0]))
        result.model(input_ids=ids, attention_mask=mask)
        torch.testing.assert_close(noted[0][mask], mixed.transpose(1, 2).flatten(2)[mask], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_padding_opens_no_gate_of_a_t5(t5):
    ids, mask = torch.randint(0, 28, (2, 6), generator=torch.Generator().manual_seed(0)), mask_of()
    result = attach(t5, UniPELT(length=LENGTH, rank=2, width=4), T5)
    spread(result.model)
    result.train(False)
    together = result.model(input_ids=ids, attention_mask=mask).last_hidden_state
    alone = result.model(input_ids=ids[1:, :4], attention_mask=mask[1:, :4]).last_hidden_state
    torch.testing.assert_close(together[1:, :4], alone, atol=1e-5, rtol=1e-5)


def test_a_t5_has_no_place_for_further_tokens(t5):
    with pytest.raises(GraftError, match=r"VPTDeep cannot act on this t5 backbone: it scores tokens by their distance"):
        attach(t5, VPTDeep(), T5)
