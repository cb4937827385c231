"""Compacter's weights against sums of Kronecker products, and the factor that all layers share."""

from __future__ import annotations

import copy

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn import functional

from common.tuners import CompacterConfig


class Net(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def linears(n=2):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net(*(nn.Linear(8, 8) for _ in range(n)))


def wrap(net, adapter="default", **options):
    options = {"width": 4, "division": 2} | options
    return get_peft_model(net, CompacterConfig(target_modules=r"layers\.\d+", **options), adapter_name=adapter)


def randomise(model):
    for name, parameter in model.named_parameters():
        if "compacter_" in name:
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
    return model


def dense(layer, rule, name):
    """The weight as the paper writes it, a Kronecker product at a time."""
    left, right = layer.compacter_left["default"][name], layer.compacter_right["default"][name]
    return sum(torch.kron(a, s @ t) for a, s, t in zip(rule, left, right, strict=True))


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 4),
    rows=st.integers(1, 3),
    narrow=st.integers(1, 3),
    rank=st.integers(1, 3),
    dims=st.integers(0, 3),
    scale=st.sampled_from([1.0, 0.5]),
)
def test_a_weight_is_a_sum_of_kronecker_products(n, rows, narrow, rank, dims, scale):
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    base = kinds[dims](3, n * rows, *(() if not dims else (1,)))
    x = torch.randn(2, 5, 3) if not dims else torch.randn(2, 3, *(3,) * dims)
    model = wrap(Net(copy.deepcopy(base)), width=n * narrow, division=n, rank=rank, scale=scale)
    layer = model.base_model.model.layers[0]
    with torch.no_grad():
        assert torch.equal(model(x), base.requires_grad_(False)(x))
        randomise(model)
        rule, bias = layer.compacter_rule["default"], layer.compacter_bias["default"]
        h = base(x) if not dims else base(x).movedim(1, -1)
        inner = functional.gelu(h @ dense(layer, rule, "down").T + bias["down"])
        expected = h + scale * (inner @ dense(layer, rule, "up").T + bias["up"])
        output = model(x) if not dims else model(x).movedim(1, -1)
        torch.testing.assert_close(output, expected, atol=1e-4, rtol=1e-4)


def test_one_factor_is_shared_by_all_layers_and_saved_once(tmp_path):
    model = randomise(wrap(linears(3)))
    rules = [name for name, _ in model.named_parameters() if "compacter_rule" in name]
    assert rules == ["base_model.model.layers.0.compacter_rule.default"]
    x = torch.randn(2, 8)
    model(x).sum().backward()
    before = model(x).detach()
    with torch.no_grad():
        model.get_parameter(rules[0]).mul_(2)
    for layer in model.base_model.model.layers:
        name = "down"
        torch.testing.assert_close(
            layer.weight_of("default", name), dense(layer, model.get_parameter(rules[0]), name), atol=1e-5, rtol=1e-5
        )
    assert not torch.allclose(model(x), before)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(linears(3), str(tmp_path))
    assert torch.equal(loaded(x), model(x))
    assert not any(p.requires_grad for p in loaded.parameters())
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_parameter(rules[0]).zero_()
    assert torch.equal(loaded(x), model(x))  # a copy has a factor of its own
    assert not torch.equal(other(x), model(x))


def test_two_adapters_have_a_factor_each_also_after_one_was_deleted():
    model = wrap(linears(), adapter="one")
    config = CompacterConfig(target_modules=r"layers\.\d+", width=8, division=4)
    model.add_adapter("two", config)
    shapes = {n.rpartition(".")[2]: p.shape for n, p in model.named_parameters() if "compacter_rule" in n}
    assert shapes == {"one": (2, 2, 2), "two": (4, 4, 4)}
    model.set_adapter("two")
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".two" in name for name in trained)
    model.delete_adapter("one")
    model.add_adapter("one", config)
    model.set_adapter("one")
    model(torch.randn(2, 8)).sum().backward()


def test_layers_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="has 8 outputs and the bottleneck 4; 3 does not divide both"):
        wrap(linears(), division=3)
    with pytest.raises(TypeError, match=r"'layers.0' \(Embedding\) is no linear layer"):
        wrap(Net(nn.Embedding(3, 8)))
