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


SCALED = {name: LAYERS[name] for name in ("linear", "conv1d", "conv2d", "transposed")}


@pytest.mark.parametrize("kind", SCALED)
@pytest.mark.parametrize("names", [(), ("bias",), ("weight", "bias")])
def test_the_output_is_scaled_by_channel(kind, names):
    layer, shape = SCALED[kind]
    x, bare = torch.randn(shape), copy.deepcopy(layer)
    model = wrap(layer, *names, "scale")
    with torch.no_grad():
        assert torch.equal(model(x), layer(x))
        for name in names:
            getattr(bare, name).normal_()
            getattr(model.layer, f"copied_{name}")["default"].copy_(getattr(bare, name))
        scale = model.layer.copied_scale["default"].normal_()
        y = bare(x)
        expected = y * scale.view(-1, *(1,) * (y.ndim - 2))
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)


def test_a_scale_of_other_layers_is_refused():
    with pytest.raises(TypeError, match=r"'layer' \(PReLU\) is no linear layer and no convolution"):
        wrap(nn.PReLU(4), "weight", "scale")


NORMS = {
    "batch": (nn.BatchNorm1d, {}),
    "cumulative": (nn.BatchNorm2d, {"momentum": None}),
    "instance": (nn.InstanceNorm2d, {"affine": True, "track_running_stats": True}),
}


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_follow_the_batches_as_the_norms_own_would(kind, dtype):
    cls, options = NORMS[kind]
    torch.manual_seed(0)
    plain = cls(4, **options).to(dtype)
    plain.running_mean.normal_()
    frozen = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    model = wrap(plain, "weight", "bias", "statistics")
    model.train()
    model.layer.base_layer.eval()  # what the policy of an adapted backbone sets
    for _ in range(3):
        x = torch.randn(5, 4, *(3, 3) * ("2d" in cls.__name__)).to(dtype)
        torch.testing.assert_close(model(x), plain(x))
    own = model.layer
    torch.testing.assert_close(own.copied_mean["default"].to(dtype), plain.running_mean, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(own.copied_variance["default"].to(dtype), plain.running_var, atol=1e-2, rtol=1e-2)
    assert own.copied_count["default"] == plain.num_batches_tracked
    assert all(torch.equal(own.base_layer.state_dict()[name], tensor) for name, tensor in frozen.items())
    assert not own.base_layer.training
    with torch.no_grad():
        expected = plain.eval()(x)
        torch.testing.assert_close(model.eval()(x), expected, atol=1e-2, rtol=1e-2)
        model.merge_adapter()
        assert torch.equal(own.base_layer.running_mean, own.copied_mean["default"].to(dtype))
        assert own.base_layer.num_batches_tracked == plain.num_batches_tracked
        model.unmerge_adapter()
    assert all(torch.equal(own.base_layer.state_dict()[name], tensor) for name, tensor in frozen.items())


def test_a_disabled_adapter_moves_no_statistics():
    model = wrap(nn.BatchNorm1d(4), "weight", "statistics").train()
    model.layer.base_layer.eval()
    with model.disable_adapter():
        model(torch.randn(5, 4))
    assert model.layer.copied_count["default"] == 0
    assert model.layer.base_layer.num_batches_tracked == 0
