"""RepAdapter against a bottleneck that runs before the layer, as the paper draws it."""

from __future__ import annotations

import copy

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, given, settings
from peft import get_peft_model
from torch import nn

from common.tuners import RepAdapterConfig

CONVOLUTIONS = [nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d]


def wrap(layer, **options):
    return get_peft_model(nn.Sequential(copy.deepcopy(layer)), RepAdapterConfig(target_modules="0", **options))


def before(layer, x, scale, groups):
    """What the layer reads: x + s (U (D x + b) + c), position by position, with U in groups."""
    down, up = layer.repadapter_down["default"], layer.repadapter_up["default"]
    blocks = torch.block_diag(*up.unflatten(0, (groups, -1)))  # (C, w)
    narrow = torch.einsum("wc,bc...->bw...", down, x)
    biases = "default" in layer.repadapter_up_bias
    if biases:
        narrow = narrow + layer.repadapter_down_bias["default"].view(-1, *(1,) * (x.ndim - 2))
    wide = torch.einsum("cw,bw...->bc...", blocks, narrow)
    if biases:
        wide = wide + layer.repadapter_up_bias["default"].view(-1, *(1,) * (x.ndim - 2))
    return x + scale * wide


def check(base, x, **options):
    model = wrap(base, **options)
    layer = model.base_model.model[0]
    with torch.no_grad():
        assert torch.equal(model(x), base.requires_grad_(False)(x))
        for name, parameter in model.named_parameters():
            if "repadapter_" in name:
                nn.init.normal_(parameter, std=0.5)
        expected = base(before(layer, x, options.get("scale", 1.0), options["groups"]))
        torch.testing.assert_close(model(x), expected, atol=1e-4, rtol=1e-4)
        output = model(x)
        model.merge_adapter()
        assert torch.equal(model(x), output)
    return layer


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(CONVOLUTIONS),
    groups=st.integers(1, 2),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    padding=st.integers(0, 1),
    bias=st.booleans(),
    mode=st.sampled_from(["zeros", "replicate"]),
)
def test_a_convolution_reads_what_the_bottleneck_puts_out(kind, groups, kernel, stride, dilation, padding, bias, mode):
    assume(mode == "zeros" or "Transpose" not in kind.__name__)
    base = kind(4, 3, kernel, stride=stride, dilation=dilation, padding=padding, bias=bias, padding_mode=mode)
    layer = check(base, torch.randn(2, 4, *(6,) * (base.weight.ndim - 2)), groups=groups, width=4, scale=0.5)
    assert ("default" in layer.repadapter_up_bias) == (bias and kernel == stride == 1 and padding == 0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_a_linear_layer_reads_what_the_bottleneck_puts_out(groups, bias):
    layer = check(nn.Linear(12, 5, bias=bias), torch.randn(3, 12), groups=groups, width=6, scale=2.0)
    assert ("default" in layer.repadapter_down_bias) == bias


def test_what_it_cannot_fold_is_refused():
    with pytest.raises(ValueError, match="has 5 inputs, the bottleneck 4; 2 does not divide both"):
        wrap(nn.Linear(5, 3), width=4)
    with pytest.raises(TypeError, match=r"'0' \(Conv2d\) is no linear layer and no convolution of one group"):
        wrap(nn.Conv2d(4, 4, 3, groups=2))
