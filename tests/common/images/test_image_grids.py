"""Where the patches of an image stand among the tokens, for methods that convolve over them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from common.attach import attach, probe
from common.images.backbones import tokens
from common.methods import ConvLoRA, Convpass
from common.roles import resolve
from tests.nets import build_net, images


def read_by(model, name, batch):
    """What a layer reads."""
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        tokens(model, batch)
    handle.remove()
    return seen[0]


def moved(model, name, key, rows, columns):
    """Which tokens change with a part of the image, given in shares of its sides."""
    batch, side = images(key, 1), images(key, 1).shape[-1]
    other = batch.clone()
    other[..., int(rows[0] * side) : int(rows[1] * side), int(columns[0] * side) : int(columns[1] * side)] += 1
    return (read_by(model, name, batch) != read_by(model, name, other)).any(-1)[0]


@pytest.mark.parametrize("key", ["vit", "vit-avg", "deit", "dinov2", "siglip", "beit", "eva02", "dinov3"])
def test_patches_of_a_vit_stand_in_row_order_behind_the_prefix(key):
    built = build_net(key)
    roles = resolve(built.model, built.family)
    layer = next(name for name, role in roles.role_of.items() if role == "attention_qkv")
    grid = roles.grid_of(layer)
    assert grid.prefix == built.prefix_tokens
    assert grid.sides == (2, 2)
    for row in range(2):
        for column in range(2):
            changed = moved(built.model, layer, key, (row / 2, row / 2 + 0.5), (column / 2, column / 2 + 0.5))
            assert changed.nonzero().flatten().tolist() == [grid.prefix + 2 * row + column]


@pytest.mark.parametrize(("key", "window"), [("swin", 7), ("swinv2", 8)])
def test_a_swin_reads_its_grid_in_row_order_before_the_feed_forward_network(key, window):
    built = build_net(key)
    grid = resolve(built.model, built.family).grid_of("layers.0.blocks.0.mlp.fc1")
    assert (grid.sides, grid.prefix) == ((16, 16), 0)
    assert resolve(built.model, built.family).grid_of("layers.2.blocks.1.mlp.fc2").sides == (4, 4)
    changed = moved(built.model, "layers.0.blocks.0.mlp.fc1", key, (0, 1 / 16), (15 / 16, 1)).view(16, 16)
    last = 16 - 16 // window * window or window
    expected = torch.zeros(16, 16, dtype=torch.bool)
    expected[:window, -last:] = True
    assert not (changed & ~expected).any()  # the window at the top right, and no transposed one
    assert changed[0, -1]


@pytest.mark.parametrize(("key", "spec"), [("swin", Convpass), ("swinv2", ConvLoRA), ("convnext", Convpass)])
def test_feed_forward_networks_with_a_grid_take_a_convolution(key, spec):
    built, batch = build_net(key), images(key)
    with torch.no_grad():
        bare = tokens(built.model, batch)
    if spec is ConvLoRA:
        spec = spec(on=["ffn"], experts=2)
    else:
        spec = spec(on=["ffn"])
    attached = attach(built.model, spec, built.family)
    attached.train(False)
    with torch.no_grad():
        torch.testing.assert_close(tokens(attached.model, batch), bare, atol=1e-5, rtol=1e-5)
    probe(attached, lambda: tokens(attached.model, batch))
    for parameter in attached.model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    larger = batch.repeat(1, 1, 2, 2) if key == "convnext" else batch  # whose grid is whatever it reads
    with torch.no_grad():
        assert tokens(attached.model, larger).isfinite().all()
