"""Heads: where their weights come from, their shapes, and their formulas."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional

from common.errors import GraftError
from domains.medical.backbones import features
from domains.medical.heads import PooledVolumeHead, SegmentationHead, TokenDecoder
from tests.domains.medical.nets import EACH, build_net, images, upstream

NAMES = ("background", "cortex", "other")


def with_weights(key, dims, tmp_path, names=NAMES):
    """A backbone out of a checkpoint that names its classes, and the network that the checkpoint is of."""
    net = upstream(key, dims)
    torch.save(net.state_dict(), tmp_path / "w.pt")
    built = build_net(key, dims, weights=str(tmp_path / "w.pt"))
    return dataclasses.replace(built, head_classes=names), net.eval()


@pytest.mark.parametrize(("key", "dims"), EACH)
def test_backbone_and_head_are_the_network_where_the_classes_agree(key, dims, tmp_path):
    built, net = with_weights(key, dims, tmp_path)
    head = SegmentationHead(built, NAMES).eval()
    assert head.from_checkpoint
    with torch.no_grad():
        assert torch.equal(head(features(built, built.model, images(key, dims))), net(images(key, dims)))


@pytest.mark.parametrize(
    ("names", "init"),
    [(("background", "other", "cortex"), "auto"), (("background", "cortex", "tumour"), "auto"), (NAMES, "fresh")],
)
def test_other_classes_or_order_start_from_random_weights(names, init, tmp_path):
    built, _ = with_weights("unet", 3, tmp_path)
    heads = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        heads.append(SegmentationHead(built, names, init))
    assert not heads[0].from_checkpoint
    weights = [head.output[0].conv.weight for head in heads]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], built.head_weights["0.conv.weight"])
    assert torch.equal(heads[0].output[0].adn.N.weight, torch.ones(3))


def test_a_checkpoint_that_names_no_classes_gives_no_head(tmp_path):
    built, _ = with_weights("unet", 2, tmp_path, names=())
    assert not SegmentationHead(built, NAMES).from_checkpoint
    assert not SegmentationHead(built, ()).from_checkpoint


def test_two_heads_share_nothing(tmp_path):
    built, _ = with_weights("unet", 2, tmp_path)
    first, second = SegmentationHead(built, NAMES), SegmentationHead(built, NAMES)
    with torch.no_grad():
        first.output[0].conv.weight.zero_()
    assert second.output[0].conv.weight.any()
    assert built.head_weights["0.conv.weight"].any()
    assert next(iter(first.state_dict())).startswith("output.")


def test_a_head_that_names_the_classes_and_does_not_fit_is_refused(tmp_path):
    built, _ = with_weights("unet", 2, tmp_path)
    less = {name: tensor for name, tensor in built.head_weights.items() if "adn" not in name}
    with pytest.raises(GraftError, match=r"'UNet' names these classes and does not fit \(3 tensors differ"):
        SegmentationHead(dataclasses.replace(built, head_weights=less), NAMES)
    with pytest.raises(GraftError, match=r"Unknown head_init 'Fresh'\. Did you mean 'fresh'"):
        SegmentationHead(built, NAMES, "Fresh")


def test_gradients_reach_the_head_and_the_features():
    for key, dims in EACH:
        built = build_net(key, dims)
        head = SegmentationHead(built, NAMES)
        out = features(built, built.model, images(key, dims, 1)).detach().requires_grad_()
        head(out).square().sum().backward()
        assert out.grad is not None
        assert out.grad.any()
        assert all(parameter.grad is not None for parameter in head.parameters())


# ---- tokens


@pytest.mark.parametrize(("patch", "grid"), [(14, (3, 2)), (16, (2, 2)), (32, (1, 1))])
def test_the_decoder_reaches_the_size_of_the_image(patch, grid):
    decoder = TokenDecoder(24, 5, patch, hidden=8)
    out = decoder(torch.randn(2, 24, *grid))
    assert out.shape == (2, 5, grid[0] * patch, grid[1] * patch)
    out.square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in decoder.parameters())


def test_the_decoder_is_what_it_says():
    torch.manual_seed(0)
    decoder, x = TokenDecoder(6, 3, 8, hidden=4), torch.randn(1, 6, 2, 3)
    y = functional.conv2d(x, decoder.project.weight, decoder.project.bias)
    for conv, norm, _ in decoder.refine:
        y = functional.interpolate(y, scale_factor=2, mode="bilinear")
        y = functional.conv2d(y, conv.weight, conv.bias, padding=1)
        mean, variance = y.mean(dim=(1, 2, 3), keepdim=True), y.var(dim=(1, 2, 3), correction=0, keepdim=True)
        y = (y - mean) / (variance + 1e-5).sqrt() * norm.weight.view(1, -1, 1, 1) + norm.bias.view(1, -1, 1, 1)
        y = functional.gelu(y)
    y = functional.conv2d(y, decoder.classifier.weight, decoder.classifier.bias)
    expected = functional.interpolate(y, size=(16, 24), mode="bilinear")
    torch.testing.assert_close(decoder(x), expected, atol=1e-5, rtol=1e-5)


# ---- classification


@pytest.mark.parametrize("shape", [(4, 3), (2, 4, 3)])
def test_the_pooled_head_is_linear_in_mean_and_maximum(shape):
    torch.manual_seed(0)
    head, x = PooledVolumeHead(5, 2), torch.randn(3, 5, *shape)
    axes = tuple(range(2, x.ndim))
    pooled = torch.cat((x.mean(dim=axes), x.amax(dim=axes)), dim=1)
    expected = pooled @ head.classifier.weight.T + head.classifier.bias
    torch.testing.assert_close(head(x), expected)
    assert isinstance(head.classifier, nn.Linear)
