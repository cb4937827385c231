"""Tiny image networks with random weights, on which `graft matrix` tries every method: timm's own test models."""

from __future__ import annotations

import torch

from common.images.backbones import build, tokens
from common.matrix import Specimen

SIDE = 64  # pixels; the last map of the networks that halve it five times is two wide


def vit() -> Specimen:
    """Build a ViT of three blocks."""
    return _specimen("test_vit", engine=32, depth=3)


def convnext() -> Specimen:
    """Build a ConvNeXt of four stages."""
    return _specimen("test_convnext2")


def resnet() -> Specimen:
    """Build a ResNet with batch norms."""
    return _specimen("test_resnet", engine=1)


def _specimen(name: str, engine: int | None = None, depth: int | None = None) -> Specimen:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        built = build(name, SIDE, pretrained=False, depth=depth)
    if built.family is None:
        raise TypeError(f"{name} belongs to no family.")
    inputs = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    return Specimen(name=name, model=built.model, family=built.family, inputs=inputs, run=tokens, engine=engine)
