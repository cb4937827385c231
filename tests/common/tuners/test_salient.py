"""A map of chosen channels against its formula, on every kind of layer."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from torch import nn

from common.tuners import SalientConfig
from tests.layers import layers, outputs_of


def wrap(layer, **options):
    return get_peft_model(nn.Sequential(copy.deepcopy(layer)), SalientConfig(target_modules="0", **options))


@settings(deadline=None, max_examples=25)
@given(layers(groups=1), st.integers(1, 9), st.floats(0.1, 3))
def test_the_chosen_channels_are_mapped_and_no_other(drawn, channels, scale):
    layer, x = drawn
    model = wrap(layer, channels=channels, scale=scale)
    adapted = model.base_model.model[0]
    chosen = adapted.salient_channels["default"].long()
    assert len(set(chosen.tolist())) == len(chosen) == min(channels, outputs_of(layer))
    with torch.no_grad():
        z = layer(x)
        assert torch.equal(model(x), z)
        m = adapted.salient_map["default"].normal_()
        shift = torch.zeros(len(m), dtype=m.dtype)
        if layer.bias is not None:
            shift = adapted.salient_shift["default"].normal_()
        axis = -1 if isinstance(layer, nn.Linear) else 1
        expected = z.movedim(axis, -1).clone()
        part = expected[..., chosen]
        expected[..., chosen] = part + scale * (part @ m.T + shift)
        torch.testing.assert_close(model(x), expected.movedim(-1, axis), atol=1e-4, rtol=1e-4)


def test_a_layer_without_a_bias_gets_no_shift():
    model = wrap(nn.Linear(4, 6, bias=False), channels=2)
    trained = {name.rpartition("0.")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"salient_map.default"}


def test_scores_choose_the_channels():
    layer = wrap(nn.Conv2d(4, 6, 3), channels=2).base_model.model[0]
    layer.choose("default", torch.tensor([0.0, 5, 1, 0, 9, 2]))
    assert layer.salient_channels["default"].tolist() == [1, 4]


def test_other_layers_are_refused():
    with pytest.raises(TypeError, match=r"'0' \(LayerNorm\) is no linear layer and no convolution"):
        wrap(nn.LayerNorm(4))
    with pytest.raises(ValueError, match="'0' has 2 groups, and channels of two have no inputs in common"):
        wrap(nn.Conv2d(4, 4, 1, groups=2))
