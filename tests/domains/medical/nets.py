"""Tiny members of every medical network, with random weights."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import monai.networks.nets
import torch
from torch import nn
from torch.nn.modules.instancenorm import _InstanceNorm

from domains.medical.backbones import MedicalBackbone, build, features
from domains.medical.specimens import GROUP, SWIN

CLASSES = 3


@dataclass(frozen=True)
class Tiny:
    """A network, its arguments, and a patch that suits it, for 2 and 3 axes."""

    arch: str
    patch: Mapping[int, tuple[int, ...]]
    net: Mapping[str, Any]
    also: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)


NETS = {
    "unet": Tiny(
        "UNet", {2: (16, 16), 3: (16, 16, 16)}, {"channels": (4, 8, 16), "strides": (2, 2), "num_res_units": 2}
    ),
    "unet-plain": Tiny("UNet", {2: (8, 8), 3: (8, 8, 8)}, {"channels": (4, 8), "strides": (2,), "num_res_units": 0}),
    "segresnet": Tiny(
        "SegResNet",
        {2: (16, 16), 3: (16, 16, 16)},
        {"init_filters": 8, "blocks_down": (1, 2, 1), "blocks_up": (1, 1)},
        {2: {"upsample_mode": "pixelshuffle"}, 3: {"upsample_mode": "deconv"}},
    ),
    "unetr": Tiny(
        "UNETR",
        {2: (32, 16), 3: (32, 16, 16)},
        {"feature_size": 4, "hidden_size": 24, "mlp_dim": 48, "num_heads": 2},
    ),
    "swin": Tiny("SwinUNETR", {2: (64, 32), 3: (32, 32, 32)}, SWIN, {2: {"use_v2": True}, 3: GROUP}),
    "dynunet": Tiny(
        "DynUNet",
        {2: (16, 16), 3: (16, 16, 16)},
        {"kernel_size": (3, 3, 3), "strides": (1, 2, 2), "upsample_kernel_size": (2, 2), "filters": (4, 8, 16)},
        {2: {"res_block": True}},
    ),
}
EACH = [(key, dims) for key in NETS for dims in (2, 3)]


def arguments(key: str, dims: int) -> dict[str, Any]:
    """Return the network's constructor arguments, but for those that follow from the data."""
    return {**NETS[key].net, **NETS[key].also.get(dims, {})}


def build_net(key: str, dims: int, **options: Any) -> MedicalBackbone:
    """Build a tiny backbone, always with the same random weights."""
    if not options:
        return copy.deepcopy(_built(key, dims))
    tiny = NETS[key]
    given = {"channels": 1, "classes": CLASSES, "patch_size": tiny.patch[dims], "net": arguments(key, dims)} | options
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build(tiny.arch, spatial_dims=dims, **({"pretrained": False} | given))


@functools.cache
def _built(key: str, dims: int) -> MedicalBackbone:
    return build_net(key, dims, pretrained=False)


def images(key: str, dims: int, count: int = 2) -> torch.Tensor:
    """Make normalised images (count, 1, *patch)."""
    return torch.randn(count, 1, *NETS[key].patch[dims], generator=torch.Generator().manual_seed(1))


def upstream(key: str, dims: int, **options: Any) -> nn.Module:
    """MONAI's own network, untouched, with random weights and random scales in its norms."""
    args = {"spatial_dims": dims, "in_channels": 1, "out_channels": CLASSES} | arguments(key, dims)
    args |= {"img_size": NETS[key].patch[dims]} if key == "unetr" else {}
    torch.manual_seed(5)
    net = getattr(monai.networks.nets, NETS[key].arch)(**(args | options))
    for module in net.modules():
        if isinstance(module, _InstanceNorm) and module.affine:
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return net


def whole(built: MedicalBackbone, model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """The network put together again: backbone, then the output layer with the checkpoint's weights."""
    built.output.load_state_dict(dict(built.head_weights))
    return built.output(features(built, model, batch))
