"""IA3 against its formula."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from common.attach import attach
from common.errors import GraftError
from common.methods import IA3
from tests.toy import FAMILY, toy_backbone


def scaled_layer(model, name):
    layer = model.get_submodule(f"base_model.model.{name}")
    with torch.no_grad():
        layer.ia3_l["default"].normal_()
    return layer, layer.ia3_l["default"].flatten()


@pytest.mark.parametrize("name", ["blocks.0.qkv", "blocks.1.fc1"])
def test_outputs_are_scaled(name):
    bare = toy_backbone().get_submodule(name)
    layer, scale = scaled_layer(attach(toy_backbone(), IA3(), FAMILY).model, name)
    x = torch.randn(2, 3, bare.in_features)
    assert scale.numel() == bare.out_features
    torch.testing.assert_close(layer(x), scale * (x @ bare.weight.T + bare.bias))


def test_the_second_feed_forward_layer_is_scaled_at_its_input():
    bare = toy_backbone().get_submodule("blocks.0.fc2")
    layer, scale = scaled_layer(attach(toy_backbone(), IA3(), FAMILY).model, "blocks.0.fc2")
    x = torch.randn(2, 3, bare.in_features)
    assert scale.numel() == bare.in_features
    torch.testing.assert_close(layer(x), (scale * x) @ bare.weight.T + bare.bias)


def test_convolutions_are_scaled_by_channel():
    bare = nn.Conv2d(3, 5, 2)
    result = attach(nn.Sequential(bare), IA3(target_modules=["0"]), None)
    layer, scale = scaled_layer(result.model, "0")
    x = torch.randn(2, 3, 4, 4)
    expected = scale[:, None, None] * bare(x)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("layer", [nn.Embedding(3, 3), nn.Conv1d(3, 3, 1), nn.LayerNorm(3)])
def test_layers_of_other_types_are_refused(layer):
    with pytest.raises(GraftError, match=rf"IA3 cannot act on '0' \({type(layer).__name__}.*Linear, Conv2d, Conv3d"):
        attach(nn.Sequential(layer), IA3(target_modules=["0"]), None)
