"""Where the patches of a volume stand among the tokens of a UNETR and a SwinUNETR."""

from __future__ import annotations

import math

import pytest
import torch

from common.roles import resolve
from domains.medical.backbones import features
from tests.domains.medical.nets import build_net, images


@pytest.mark.parametrize("dims", [2, 3])
def test_patches_of_a_unetr_stand_in_row_order(dims):
    built = build_net("unetr", dims)
    grid = resolve(built.model, built.family).grid_of("vit.blocks.0.attn.qkv")
    batch = images("unetr", dims, count=1)
    assert (grid.prefix, grid.sides) == (0, tuple(side // 16 for side in batch.shape[2:]))
    seen = []
    built.model.vit.blocks[0].attn.qkv.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        features(built, built.model, batch)
        for number in range(math.prod(grid.sides)):
            other = batch.clone()
            place = torch.unravel_index(torch.tensor(number), grid.sides)
            other[(..., *(slice(16 * int(i), 16 * int(i) + 16) for i in place))] += 1
            features(built, built.model, other)
            assert (seen[0] != seen[-1]).any(-1)[0].nonzero().flatten().tolist() == [number]


@pytest.mark.parametrize("dims", [2, 3])
def test_tokens_of_a_swin_unetr_keep_their_axes_before_the_feed_forward_network(dims):
    built = build_net("swin", dims)
    roles = resolve(built.model, built.family)
    assert roles.grid_of("swinViT.layers1.0.blocks.0.mlp.linear1").sides == (0,) * dims
    assert roles.grid_of("swinViT.layers1.0.blocks.0.attn.qkv") is None
    seen = []
    layer = built.model.get_submodule("swinViT.layers1.0.blocks.0.mlp.linear1")
    layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        features(built, built.model, images("swin", dims, count=1))
    assert seen[0].shape[1:-1] == tuple(side // 2 for side in images("swin", dims).shape[2:])
