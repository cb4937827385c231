"""The bottleneck behind a layer, against its formula and its shapes."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn

from common.tuners import BottleneckConfig
from common.tuners._shared import Passage

LAYERS = {
    "linear": (nn.Linear(8, 6), (2, 5, 8)),
    "linear without a bias": (nn.Linear(8, 6, bias=False), (8,)),
    "conv1d": (nn.Conv1d(8, 6, 3, stride=2, padding=1), (2, 8, 9)),
    "pointwise": (nn.Conv2d(8, 6, 1), (2, 8, 4, 4)),
    "dilated": (nn.Conv3d(8, 6, 3, padding=2, dilation=2), (2, 8, 4, 4, 4)),
    "grouped": (nn.Conv2d(8, 6, 3, groups=2, bias=False), (2, 8, 4, 4)),
    "transposed": (nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1, output_padding=1), (2, 8, 4, 4)),
    "transposed in groups": (nn.ConvTranspose3d(8, 6, 2, stride=2, groups=2), (2, 8, 3, 3, 3)),
}


class Net(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = copy.deepcopy(layer)

    def forward(self, x, **kwargs):
        return self.layer(x, **kwargs)


def wrap(layer, **settings):
    return get_peft_model(Net(layer), BottleneckConfig(target_modules="layer", **settings))


def randomise(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()


@pytest.mark.parametrize(("activation", "act"), [("gelu", nn.functional.gelu), ("relu", nn.functional.relu)])
@pytest.mark.parametrize("kind", LAYERS)
def test_the_bottlenecks_output_is_added_to_the_layers(kind, activation, act):
    bare, shape = LAYERS[kind]
    x = torch.randn(shape)
    model = wrap(bare, width=4, scale=0.5, activation=activation)
    with torch.no_grad():
        assert torch.equal(model(x), Net(bare).requires_grad_(False)(x))
        randomise(model)
        down, up = model.layer.badapter_down["default"], model.layer.badapter_up["default"]
        last = bare(x).movedim(-1 if isinstance(bare, nn.Linear) else 1, -1)  # (..., 6)
        assert (down.weight.numel(), up.weight.numel()) == (4 * 6, 6 * 4)
        narrow = act(torch.einsum("wd,...d->...w", down.weight.flatten(1), last) + down.bias)
        added = 0.5 * (torch.einsum("dw,...w->...d", up.weight.flatten(1), narrow) + up.bias)
        expected = (last + added).movedim(-1, -1 if isinstance(bare, nn.Linear) else 1)
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(model(x), bare(x), atol=1e-2)
    assert torch.equal(model.layer.base_layer.weight, bare.weight)


@torch.no_grad()
def test_a_gate_of_the_layers_own_output_scales_what_each_example_adds():
    bare, x = nn.Linear(8, 6), torch.randn(2, 5, 8)
    model = wrap(bare, width=4, scale=0.5, activation="relu", input_gate=True)
    assert torch.equal(model(x), Net(bare).requires_grad_(False)(x))
    randomise(model)
    layer, h = model.layer, bare(x)
    down, up, gate = (getattr(layer, f"badapter_{part}")["default"] for part in ("down", "up", "gate"))
    added = 0.5 * up(torch.relu(down(h)))
    seen = torch.tensor([[True] * 5, [True, True, False, False, False]])
    for counted in (None, seen):
        if counted is not None:
            layer.passages["default"] = Passage()
            layer.passages["default"].leave(counted)
        shares = torch.stack(
            [
                torch.sigmoid((h[row] if counted is None else h[row][counted[row]]) @ gate.weight[0] + gate.bias).mean()
                for row in range(2)
            ]
        )
        torch.testing.assert_close(model(x), h + shares[:, None, None] * added, atol=1e-5, rtol=1e-5)
    with pytest.raises(RuntimeError, match="A gated bottleneck ran without the attention of its block before it"):
        model(x)


def test_a_gate_of_a_convolutions_output_is_refused():
    with pytest.raises(TypeError, match=r"'layer' \(Conv2d\) is no linear layer; a gate averages over tokens"):
        wrap(nn.Conv2d(4, 4, 1), input_gate=True)


def test_two_adapters_keep_their_own_width_scale_and_activation():
    model = wrap(nn.Linear(4, 6), width=2, scale=3.0)
    model.add_adapter("other", BottleneckConfig(target_modules="layer", width=5, activation="relu"))
    assert [m.weight.shape[0] for m in model.layer.badapter_down.values()] == [2, 5]
    assert model.layer.scaling == {"default": 3.0, "other": 1.0}
    assert model.layer.activation == {"default": "gelu", "other": "relu"}
    model.set_adapter("other")
    model.delete_adapter("default")
    assert (model.layer.scaling, model.layer.activation) == ({"other": 1.0}, {"other": "relu"})


def test_a_width_above_the_outputs_is_lowered_to_them():
    assert wrap(nn.Linear(9, 6), width=64).layer.badapter_down["default"].weight.shape == (6, 6)


def test_an_output_size_reaches_the_layer():
    model = wrap(nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1))
    randomise(model)
    assert model(torch.randn(1, 4, 5, 5), output_size=[10, 10]).shape == (1, 3, 10, 10)


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_layer_that_computes_its_weight_at_each_call_is_taken(norm):
    net = nn.Sequential(norm(nn.Linear(4, 6)))
    x = torch.randn(3, 4)
    expected = net(x).detach()
    model = get_peft_model(net, BottleneckConfig(target_modules="0"))
    torch.testing.assert_close(model(x).detach(), expected)
    model(x).square().sum().backward()
    moved = [n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()]
    assert moved == [f"base_model.model.0.badapter_up.default.{part}" for part in ("weight", "bias")]


def test_it_is_not_merged():
    model = wrap(nn.Linear(4, 4))
    with pytest.raises(NotImplementedError, match="run behind the layers and are no change of their weights"):
        model.merge_adapter()
    model.unmerge_adapter()


def test_layers_of_other_types_and_other_activations_are_refused():
    with pytest.raises(TypeError, match=r"'layer' \(Embedding\) is no linear layer and no convolution"):
        wrap(nn.Embedding(4, 4))
    with pytest.raises(ValueError, match="The activation is 'tanh'; give one of gelu, relu"):
        wrap(nn.Linear(4, 4), activation="tanh")
