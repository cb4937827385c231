"""Tiny members of every family of vision backbones, with random weights: no file, no network, milliseconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import timm
import torch

from common.images.backbones import ImageBackbone, build

_TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2}
_SWIN = {"embed_dim": 16, "depths": (1, 1, 2, 1), "num_heads": (1, 1, 2, 2)}


@dataclass(frozen=True)
class Net:
    """A timm model, an input size that suits it, and what makes it tiny."""

    arch: str
    size: int = 32
    args: Mapping[str, Any] = field(default_factory=dict)


NETS = {
    "vit": Net("test_vit"),
    "vit-avg": Net("vit_tiny_patch16_224", args={**_TINY, "global_pool": "avg"}),
    "deit": Net("deit_tiny_distilled_patch16_224", args=_TINY),
    "dinov2": Net("vit_small_patch14_reg4_dinov2", 28, _TINY),
    "siglip": Net("vit_base_patch16_siglip_224", args=_TINY),
    "beit": Net("beit_base_patch16_224", args=_TINY),
    "eva02-fused": Net("eva02_tiny_patch14_224", 28, _TINY),
    "eva02": Net("eva02_base_patch14_224", 28, _TINY),
    "dinov3": Net("vit_small_patch16_dinov3", args=_TINY),
    "swin": Net("swin_tiny_patch4_window7_224", 64, _SWIN),
    "swinv2": Net("swinv2_tiny_window8_256", 64, _SWIN),
    "convnext": Net("test_convnext2"),
    "efficientnet": Net("test_efficientnet"),
    "mobilenetv3": Net("mobilenetv3_small_050"),
    "mobilenetv4": Net("mobilenetv4_conv_small_035"),
    "resnet": Net("test_resnet"),
}


def build_net(key: str, **options: Any) -> ImageBackbone:
    """Build a tiny backbone through the domain's own `build`, always with the same random weights."""
    net = NETS[key]
    create = timm.create_model

    def tiny(name: str, **given: Any) -> Any:
        return create(name, **(given | dict(net.args)))

    with mock.patch.object(timm, "create_model", tiny), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build(net.arch, net.size, pretrained=False, **options)


def images(key: str, count: int = 2) -> torch.Tensor:
    """Make normalised images (count, 3, H, W) of a net's size."""
    size = NETS[key].size
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))
