"""Small pieces of the tuners: grids of tokens, kernels and passages."""

from __future__ import annotations

import copy
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn

from common.tuners._shared import Passage, centre_identity, join_grid, pointwise, split_grid

SIDES = st.lists(st.integers(1, 4), min_size=1, max_size=3)


@settings(max_examples=30, deadline=None)
@given(sides=SIDES, prefix=st.integers(0, 3), own=st.booleans())
def test_tokens_come_back_from_their_map(sides, prefix, own):
    grid = [0, *[0] * len(sides)] if own else [prefix, *sides]
    tokens = torch.randn(2, *(sides if own else [prefix + math.prod(sides)]), 5)
    first, maps = split_grid(tokens, grid)
    assert first.shape == (2, 0 if own else prefix, 5)
    assert maps.shape == (2, 5, *sides)
    number = 0
    for place in torch.cartesian_prod(*(torch.arange(side) for side in sides)).view(-1, len(sides)).tolist():
        token = tokens[(slice(None), *place)] if own else tokens[:, prefix + number]
        assert torch.equal(maps[(..., *place)], token)
        number += 1
    assert torch.equal(join_grid(first, maps, grid), tokens)


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_kernel_at_the_start_hands_each_channel_on(axes, channels):
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1](channels, channels, 3, padding=1, bias=False)
    centre_identity(conv.weight, axes)
    x = torch.randn(2, channels, *(4,) * axes)
    assert torch.equal(conv(x), x)


def test_a_passage_is_taken_from_once_and_copied_empty():
    passage = Passage()
    assert passage.take() is None
    passage.leave(torch.ones(1))
    other = copy.deepcopy(passage)
    assert other.take() is None
    assert passage.take() is not None
    assert passage.take() is None


def test_what_was_left_can_be_looked_at_often():
    passage = Passage()
    with pytest.raises(RuntimeError, match="ran without the one that leaves a tensor for it"):
        passage.look()
    passage.leave(torch.ones(1))
    assert passage.look() is passage.look() is passage.take()


def test_layers_at_one_position_are_of_three_kinds():
    assert isinstance(pointwise(nn.Embedding(3, 4), 4, 2), nn.Linear)
    assert isinstance(pointwise(nn.ConvTranspose3d(3, 4, 2), 4, 2), nn.Conv3d)
    with pytest.raises(TypeError, match="LayerNorm is no linear layer, no embedding and no convolution"):
        pointwise(nn.LayerNorm(3), 3, 3)
