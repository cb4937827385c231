"""Tiny MONAI networks with random weights, on which `graft matrix` tries every method."""

from __future__ import annotations

from typing import Any

import torch

from common.matrix import Specimen
from domains.medical.backbones import build, features

UNET = {"channels": (8, 16, 32), "strides": (2, 2), "num_res_units": 2, "norm": ("INSTANCE", {"affine": True})}
SWIN = {"feature_size": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2), "window_size": 3}
# At 32 pixels a side the innermost map of a SwinUNETR is one pixel, which a group norm can take.
GROUP = {"norm_name": ("GROUP", {"num_groups": 4})}


def unet() -> Specimen:
    """Build a 3D U-Net: strided, pointwise and transposed convolutions, affine instance norms, PReLUs."""
    return _specimen("UNet", (16, 16, 16), UNET, engine=1)


def swin_unetr() -> Specimen:
    """Build a SwinUNETR in 2D: windowed attention, convolutions of three kinds, transposed ones."""
    return _specimen("SwinUNETR", (32, 32), SWIN | GROUP, engine=31)


def _specimen(arch: str, patch: tuple[int, ...], net: dict[str, Any], engine: int) -> Specimen:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        built = build(
            arch,
            spatial_dims=len(patch),
            channels=1,
            classes=3,
            patch_size=patch,
            pretrained=False,
            net=net,
        )
    if built.family is None:
        raise TypeError(f"{arch} belongs to no family.")
    inputs = torch.randn(2, 1, *patch, generator=torch.Generator().manual_seed(1))
    return Specimen(
        name=arch,
        model=built.model.eval(),
        family=built.family,
        inputs=inputs,
        run=lambda model, images: features(built, model, images),
        engine=engine,
    )
