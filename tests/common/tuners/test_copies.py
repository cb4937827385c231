"""Trained copies of named parameters: any layer, and the named ones alone."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn

from common.tuners import CopiesConfig

LAYERS = {
    "linear": (nn.Linear(4, 3), (2, 4)),
    "conv1d": (nn.Conv1d(4, 3, 3, dilation=2, padding=2, padding_mode="reflect"), (2, 4, 7)),
    "conv2d": (nn.Conv2d(4, 8, 3, groups=4), (2, 4, 5, 5)),
    "transposed": (nn.ConvTranspose2d(4, 3, 2, stride=2), (2, 4, 5, 5)),
    "layer norm": (nn.LayerNorm(4), (2, 4)),
    "group norm": (nn.GroupNorm(2, 4), (2, 4, 3)),
    "batch norm": (nn.BatchNorm1d(4).eval(), (5, 4)),
    "bilinear": (nn.Bilinear(4, 4, 3), (2, 4)),
    "slope": (nn.PReLU(4), (2, 4)),
}


class Net(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *x):
        return self.layer(*x)


def wrap(layer, *names):
    of = {f"{name}_of": "layer" for name in names}
    return get_peft_model(Net(copy.deepcopy(layer)), CopiesConfig(target_modules="layer", **of))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("names", [("bias",), ("weight",), ("weight", "bias")])
def test_the_named_parameters_are_exchanged_and_no_other(kind, names):
    layer, shape = LAYERS[kind]
    if kind == "slope" and "bias" in names:
        return
    x = (torch.randn(shape),) * (2 if kind == "bilinear" else 1)
    expected = copy.deepcopy(layer)
    with torch.no_grad():
        before = layer(*x)
        model = wrap(layer, *names).eval()
        assert torch.equal(model(*x), before)
        for name in names:
            getattr(expected, name).normal_()
            getattr(model.layer, f"copied_{name}")["default"].copy_(getattr(expected, name))
        torch.testing.assert_close(model(*x), expected(*x))
        with model.disable_adapter():
            assert torch.equal(model(*x), before)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained == [f"base_model.model.layer.copied_{name}.default" for name in names]


def test_each_layer_trains_what_is_named_for_it():
    net = nn.ModuleDict({"conv": nn.Conv2d(2, 2, 1), "norm": nn.GroupNorm(1, 2)})
    config = CopiesConfig(target_modules="conv|norm", weight_of="norm", bias_of="conv|norm")
    model = get_peft_model(net, config)
    assert sorted(n for n, p in model.named_parameters() if p.requires_grad) == [
        f"base_model.model.{name}.default" for name in ("conv.copied_bias", "norm.copied_bias", "norm.copied_weight")
    ]


def test_the_gradient_is_the_copys():
    model = wrap(nn.Linear(4, 3), "bias")
    model(torch.randn(5, 4)).sum().backward()
    assert torch.equal(model.layer.copied_bias["default"].grad, torch.full((3,), 5.0))
    assert model.layer.base_layer.bias.grad is None


def test_what_is_not_there_is_refused():
    with pytest.raises(TypeError, match="Linear holds no parameter 'bias' itself"):
        wrap(nn.Linear(4, 3, bias=False), "bias")
    with pytest.raises(ValueError, match="'layer' is a target, but neither"):
        wrap(nn.Linear(4, 3))
