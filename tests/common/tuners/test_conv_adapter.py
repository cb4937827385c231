"""The bottleneck beside a convolution, against its formula and its shapes."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from timm.layers import Conv2dSame
from torch import nn

from common.tuners import ConvAdapterConfig

LAYERS = {
    "conv1d": (nn.Conv1d(8, 6, 3, stride=2, padding=1), (2, 8, 9)),
    "strided": (nn.Conv2d(8, 6, 3, stride=2), (2, 8, 7, 7)),
    "dilated": (nn.Conv3d(8, 6, 3, padding=2, dilation=2), (2, 8, 4, 4, 4)),
    "line": (nn.Conv3d(8, 6, (1, 1, 3)), (2, 8, 3, 3, 4)),
    "pointwise": (nn.Conv3d(8, 6, 1), (2, 8, 3, 3, 3)),
    "reflected": (nn.Conv2d(8, 6, 3, padding="same", padding_mode="reflect"), (2, 8, 4, 4)),
    "same": (Conv2dSame(8, 6, 3, stride=2), (2, 8, 7, 7)),
    "grouped": (nn.Conv2d(8, 6, 3, groups=2, bias=False), (2, 8, 4, 4)),
    "one input": (nn.Conv3d(1, 6, 3), (2, 1, 4, 4, 4)),
    "odd": (nn.Conv2d(9, 6, 3), (2, 9, 4, 4)),
    "transposed": (nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1, output_padding=1), (2, 8, 4, 4)),
    "transposed in groups": (nn.ConvTranspose3d(8, 6, 2, stride=2, groups=2), (2, 8, 3, 3, 3)),
}


class Net(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = copy.deepcopy(layer)

    def forward(self, x, **kwargs):
        return self.layer(x, **kwargs)


def wrap(layer, reduction=4):
    return get_peft_model(Net(layer), ConvAdapterConfig(target_modules="layer", reduction=reduction))


@pytest.mark.parametrize("kind", LAYERS)
def test_the_bottleneck_is_added(kind):
    bare, shape = LAYERS[kind]
    x = torch.randn(shape)
    model = wrap(bare)
    layer = model.layer
    with torch.no_grad():
        assert torch.equal(model(x), Net(bare).requires_grad_(False)(x))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
        down, up, scale = (getattr(layer, f"cadapter_{part}")["default"] for part in ("down", "up", "scale"))
        narrow = nn.functional.gelu(down(x))
        width = max(1, bare.in_channels // 4)
        assert narrow.shape[1] == width
        added = torch.einsum("oc,bc...->bo...", up.weight.flatten(1), narrow)
        expected = bare(x) + scale.view(-1, *(1,) * (x.ndim - 2)) * added
        torch.testing.assert_close(model(x), expected, atol=1e-4, rtol=1e-5)
    assert (down.bias, up.bias) == (None, None)
    assert down.groups == {"odd": 1, "one input": 1}.get(kind, 2)
    assert layer.base_layer.groups == bare.groups
    assert torch.equal(layer.base_layer.weight, bare.weight)


def test_each_bottleneck_channel_sees_its_own_inputs():
    """Depthwise as in the paper: a group of C / width inputs feeds one channel."""
    model = wrap(nn.Conv2d(8, 8, 3, padding=1))
    down = model.layer.cadapter_down["default"]
    assert down.weight.shape == (2, 4, 3, 3)
    x = torch.zeros(1, 8, 5, 5)
    x[:, 4:] = 1
    narrow = down(x)
    assert not narrow[:, 0].any()
    assert narrow[:, 1].any()


def test_an_output_size_reaches_both_paths():
    layer = nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1)
    model = wrap(layer, reduction=1)
    assert model(torch.randn(1, 4, 5, 5), output_size=[10, 10]).shape == (1, 3, 10, 10)


def test_it_is_not_merged():
    model = wrap(nn.Conv2d(4, 4, 3))
    with pytest.raises(NotImplementedError, match="run beside the layers and are no change of their weights"):
        model.merge_adapter()
    model.unmerge_adapter()


def test_layers_of_other_types_are_refused():
    with pytest.raises(TypeError, match=r"'layer' \(Linear\) is no plain convolution"):
        wrap(nn.Linear(4, 4))
