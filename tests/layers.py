"""Linear layers and convolutions of every kind, drawn at random, and how their weights read as matrices."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st
from torch import nn

CONVOLUTIONS = {
    (dims, transposed): getattr(nn, f"Conv{'Transpose' * transposed}{dims}d")
    for dims in (1, 2, 3)
    for transposed in (False, True)
}


@st.composite
def layers(draw, dtypes=(torch.float32, torch.float64), groups=3):
    """A layer, in up to so many groups, and an input for it."""
    dtype, bias, seed = draw(st.sampled_from(dtypes)), draw(st.booleans()), draw(st.integers(0, 999))
    kind = draw(st.sampled_from(["linear", *CONVOLUTIONS]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "linear":
            layer = nn.Linear(draw(st.integers(1, 6)), draw(st.integers(1, 6)), bias=bias)
            return layer.to(dtype), torch.randn(2, 3, layer.in_features, dtype=dtype)
        dims = kind[0]
        groups = draw(st.integers(1, groups))
        inputs, outputs = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
        size = tuple(draw(st.integers(1, 3)) for _ in range(dims))
        options = {"stride": draw(st.integers(1, 2)), "dilation": draw(st.integers(1, 2)), "padding": 1}
        layer = CONVOLUTIONS[kind](inputs, outputs, size, groups=groups, bias=bias, **options)
        return layer.to(dtype), torch.randn(2, inputs, *(6,) * dims, dtype=dtype)


def outputs_of(layer):
    """How many output channels a layer has."""
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def columns_of(layer):
    """How many weights an output has."""
    return layer.weight.numel() // outputs_of(layer)


def places(layer):
    """Where in the flat weight each output's weights lie, (outputs, columns), found element by element."""
    weight = torch.arange(layer.weight.numel()).view(layer.weight.shape)
    if not getattr(layer, "transposed", False):
        return weight.flatten(1)
    groups = layer.groups
    inputs, outputs = layer.in_channels // groups, layer.out_channels // groups
    rows = []
    for output in range(layer.out_channels):
        group, place = divmod(output, outputs)
        rows.append(weight[group * inputs : (group + 1) * inputs, place].flatten())
    return torch.stack(rows)


def as_matrix(layer):
    """The weight as (outputs, columns)."""
    return layer.weight.detach().flatten()[places(layer)]


def as_weight(layer, matrix):
    """The inverse of `as_matrix`."""
    weight = torch.zeros(math.prod(layer.weight.shape), dtype=matrix.dtype)
    weight[places(layer).flatten()] = matrix.flatten()
    return weight.view(layer.weight.shape)
