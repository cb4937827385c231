"""Scales and shifts against their formulas, on every kind of layer."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn

from common.tuners import ScaleShiftConfig

LAYERS = {
    "linear": (nn.Linear(4, 6), (2, 3, 4)),
    "no bias": (nn.Linear(4, 6, bias=False), (2, 3, 4)),
    "conv1d": (nn.Conv1d(4, 6, 3), (2, 4, 5)),
    "reflected": (nn.Conv2d(4, 6, 3, padding=1, dilation=1, padding_mode="reflect"), (2, 4, 5, 5)),
    "grouped": (nn.Conv3d(4, 6, 3, padding=1, groups=2), (2, 4, 3, 3, 3)),
    "transposed": (nn.ConvTranspose3d(4, 6, 2, stride=2), (2, 4, 3, 3, 3)),
    "transposed in groups": (nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False), (2, 4, 3, 3)),
    "layer norm": (nn.LayerNorm(4), (2, 3, 4)),
    "wide layer norm": (nn.LayerNorm((3, 4)), (2, 3, 4)),
    "scale alone": (nn.RMSNorm(4), (2, 3, 4)),
    "group norm": (nn.GroupNorm(2, 4), (2, 4, 5)),
    "instance norm": (nn.InstanceNorm3d(4, affine=True), (2, 4, 3, 3, 3)),
    "batch norm": (nn.BatchNorm2d(4).eval(), (2, 4, 3, 3)),
}


def wrap(layer, **settings):
    net = nn.Sequential(copy.deepcopy(layer))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_()
    bare = copy.deepcopy(net[0])
    return bare, get_peft_model(net, ScaleShiftConfig(target_modules="0", **settings))


def shaped(values, layer, output):
    """A vector of channels (or a norm's own shape) beside an output."""
    if isinstance(layer, (nn.Linear, nn.LayerNorm, nn.RMSNorm)):
        return values
    return values.view(-1, *(1,) * (output.ndim - 2))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("shift", [True, False])
def test_the_output_is_scaled_and_where_there_is_a_bias_shifted(kind, shift):
    layer, shape = LAYERS[kind]
    bare, model = wrap(layer, shift=shift)
    x = torch.randn(shape)
    adapted = model.base_model.model[0]
    with torch.no_grad():
        before = bare(x)
        assert torch.equal(model(x), before)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
        expected = shaped(adapted.sshift_scale["default"], bare, before) * before
        shifted = shift and getattr(bare, "bias", None) is not None
        assert ("default" in adapted.sshift_shift) == shifted
        if shifted:
            expected = expected + shaped(adapted.sshift_shift["default"], bare, before)
        torch.testing.assert_close(model(x), expected, atol=1e-4, rtol=1e-5)
        plain = model.merge_and_unload()[0]
        assert type(plain) is type(bare)
        torch.testing.assert_close(plain(x), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "conv1d", "reflected", "grouped", "transposed", "transposed in groups"])
def test_inputs_are_scaled_where_it_is_so_configured(kind):
    layer, shape = LAYERS[kind]
    bare, model = wrap(layer, shift=False, inputs="0")
    x = torch.randn(shape)
    scale = model.base_model.model[0].sshift_scale["default"]
    with torch.no_grad():
        scale.normal_()
        assert scale.shape == (4,)
        by_channel = scale if kind == "linear" else scale.view(-1, *(1,) * (x.ndim - 2))
        torch.testing.assert_close(model(x), bare(by_channel * x), atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(model.merge_and_unload()[0](x), bare(by_channel * x), atol=1e-4, rtol=1e-5)
