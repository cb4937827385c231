"""torch's attention, opened: the same numbers, and layers that a method can act on."""

import pytest
import torch
from torch import nn

from common.attach import attach, probe
from common.attention import OpenAttention, open_attention
from common.errors import GraftError
from common.methods import IA3, LoRA
from common.roles import Family, Pattern

LAYER = r"layers\.\d+"
FAMILY = Family(
    name="torch-transformer",
    block=LAYER,
    stream=LAYER,
    roles={
        "attention_qkv": (Pattern(rf"{LAYER}\.self_attn\.(q|k|v)_proj", (nn.Linear,)),),
        "attention_out": (Pattern(rf"{LAYER}\.self_attn\.out_proj", (nn.Linear,)),),
        "ffn_in": (Pattern(rf"{LAYER}\.linear1", (nn.Linear,)),),
        "ffn_out": (Pattern(rf"{LAYER}\.linear2", (nn.Linear,)),),
    },
    projections={f"attention_{part}": rf"{LAYER}\.self_attn\.{part}_proj" for part in "qkv"},
)


def encoder(**kwargs):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, **kwargs)
    return nn.TransformerEncoder(layer, 2)


def moved(module):
    """Zero biases, torch's start, would hide one that was lost."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("kdim", "vdim"), [(8, 8), (6, 10)])
@pytest.mark.parametrize("mask", ["none", "padding", "square", "by head", "both", "numbers"])
@pytest.mark.parametrize("need", [True, False])
def test_the_same_result_and_weights_as_torch(first, bias, kdim, vdim, mask, need):
    torch.manual_seed(1)
    plain = moved(nn.MultiheadAttention(8, 2, bias=bias, kdim=kdim, vdim=vdim, batch_first=first)).eval()
    sizes = (3, 5, 8), (3, 4, kdim), (3, 4, vdim)
    inputs = [torch.randn(size) if first else torch.randn(size).transpose(0, 1) for size in sizes]
    padding = torch.tensor([[False] * 4, [False, False, False, True], [False, True, True, True]])
    masks = {
        "none": {},
        "padding": {"key_padding_mask": padding},
        "square": {"attn_mask": torch.rand(5, 4) > 0.8},
        "by head": {"attn_mask": torch.rand(6, 5, 4) > 0.8},
        "both": {"key_padding_mask": padding, "attn_mask": torch.triu(torch.ones(5, 4, dtype=torch.bool), 2)},
        "numbers": {"key_padding_mask": padding.float(), "attn_mask": torch.randn(5, 4)},
    }[mask]
    for average in (True, False):
        kwargs = {**masks, "need_weights": need, "average_attn_weights": average}
        expected, weights = plain(*inputs, **kwargs)
        result, own = OpenAttention(plain)(*inputs, **kwargs)
        torch.testing.assert_close(result, expected)
        assert (own is None) == (weights is None)
        if need:
            torch.testing.assert_close(own, weights)


def test_one_sequence_without_a_batch():
    plain = moved(nn.MultiheadAttention(8, 2)).eval()
    x = torch.randn(5, 8)
    expected, weights = plain(x, x, x)
    result, own = OpenAttention(plain)(x, x, x)
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(own, weights)


def test_gradients_and_dropout_are_those_of_torch():
    plain = moved(nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)).train()
    opened = OpenAttention(plain)
    assert opened.training
    x = torch.randn(2, 5, 8)
    torch.manual_seed(3)
    expected = plain(x, x, x)[0]
    torch.manual_seed(3)
    result = opened(x, x, x)[0]
    torch.testing.assert_close(result, expected)
    expected.square().sum().backward()
    result.square().sum().backward()
    grads = [getattr(opened, f"{part}_proj").weight.grad for part in "qkv"]
    torch.testing.assert_close(torch.cat(grads), plain.in_proj_weight.grad, rtol=1e-4, atol=1e-5)


def test_a_hint_without_its_mask_is_an_error_as_in_torch():
    plain = nn.MultiheadAttention(8, 2)
    x = torch.randn(5, 1, 8)
    for module in (plain, OpenAttention(plain)):
        with pytest.raises((ValueError, RuntimeError)):
            module(x, x, x, is_causal=True, need_weights=False)


@pytest.mark.parametrize("norm_first", [True, False])
def test_torchs_own_encoder_runs_on_opened_attention(norm_first):
    model = moved(encoder(norm_first=norm_first)).eval()
    x = torch.randn(3, 5, 8)
    padding = torch.tensor([[False] * 5, [False] * 4 + [True], [False] * 5])
    expected = model(x), model(x, src_key_padding_mask=padding)
    assert open_attention(model) == ["layers.0.self_attn", "layers.1.self_attn"]
    assert not open_attention(model)
    torch.testing.assert_close(model(x), expected[0])
    seen = ~padding
    torch.testing.assert_close(model(x, src_key_padding_mask=padding)[seen], expected[1][seen])


def test_a_frozen_attention_stays_frozen():
    plain = nn.MultiheadAttention(8, 2).requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in OpenAttention(plain).parameters())


@pytest.mark.parametrize("kwargs", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_what_cannot_be_opened_is_refused_and_nothing_is_changed(kwargs):
    model = nn.ModuleList([nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 2, **kwargs)])
    with pytest.raises(GraftError, match="add_bias_kv or add_zero_attn"):
        open_attention(model)
    assert all(type(module) is nn.MultiheadAttention for module in model)


@pytest.mark.parametrize(
    "spec",
    [LoRA(on=["attention"], rank=2), LoRA(on=["attention_k"], rank=2), IA3(on=["attention"])],
    ids=lambda spec: f"{type(spec).__name__} on {spec.on[0]}",
)
def test_adapters_are_alive_in_opened_attention_and_exact(spec):
    model = moved(encoder()).eval()
    x = torch.randn(3, 5, 8)
    before = model(x)
    open_attention(model)
    attached = attach(model, spec, FAMILY)
    probe(attached, lambda: attached.model(x))
    attached.train(False)
    torch.testing.assert_close(attached.model(x), before)


def test_closed_attention_is_refused_by_the_probe():
    """What opening is for: an adapter inside of torch's own attention is never called."""
    attached = attach(moved(encoder()), LoRA(on=["attention_out"], rank=2), FAMILY)
    with pytest.raises(GraftError, match="out_proj"):
        probe(attached, lambda: attached.model(torch.randn(3, 5, 8)))
