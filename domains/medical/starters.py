"""Starter checkpoints that Graft trained itself: which network each one is, and the file format of its weights.

A starter file is a `.safetensors` of half-precision weights, `backbone.NAME` for the network without its output layer
and `head.NAME` for that layer, whose metadata names the classes, the spacing and the recipe that it was trained with.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from common import artifacts
from common.checkpoint import write_atomically
from common.errors import GraftError

_PARTS = ("backbone.", "head.")
_METADATA = ("classes", "spacing", "recipe")


@dataclass(frozen=True, kw_only=True)
class Starter:
    """A checkpoint of the catalog and the MONAI network that takes it.

    Attributes:
        name: Name of the catalog row.
        arch: Name of the network.
        net: Its constructor arguments, without those that follow from the data.
        spatial_dims: 2 or 3.
        channels: Channels of the images.
    """

    name: str
    arch: str
    net: Mapping[str, Any]
    spatial_dims: int
    channels: int


STARTERS: Mapping[str, Starter] = MappingProxyType(
    {
        starter.name: starter
        for starter in (
            Starter(
                name="unet3d-colin",
                arch="UNet",
                net={"channels": (16, 32, 64, 128), "strides": (2, 2, 2), "num_res_units": 2},
                spatial_dims=3,
                channels=1,
            ),
        )
    }
)
"""The medical starters by catalog name."""


@dataclass(frozen=True, kw_only=True)
class StarterFile:
    """What a starter file holds.

    Attributes:
        backbone: Weights of the network without its output layer, float32.
        head: Weights of the output layer, float32.
        classes: Names of the output channels, in order.
        spacing: Voxel size along each axis that it was trained at, mm.
        recipe: How it was trained.
    """

    backbone: Mapping[str, Tensor]
    head: Mapping[str, Tensor]
    classes: tuple[str, ...]
    spacing: tuple[float, ...]
    recipe: str


def starter_file(name: str) -> Path:
    """Return the verified file of a starter.

    Raises:
        GraftError: The catalog has no file of it, or the file cannot be had.
    """
    if name not in artifacts.catalog():
        raise GraftError(
            f"The catalog has no weights of the starter '{name}' yet. Train its network and give the file "
            "with 'weights', or set pretrained to false."
        )
    return artifacts.fetch(name)


def is_starter_file(path: Path) -> bool:
    """Tell whether a file has the layout of a starter; False for a file that is missing or no safetensors."""
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
    except (OSError, SafetensorError):
        return False
    return bool(names) and all(name.startswith(_PARTS) for name in names)


def load_starter(path: Path) -> StarterFile:
    """Read a starter file.

    Raises:
        GraftError: It is missing, damaged, or has another layout.
    """
    if not path.is_file():
        raise GraftError(f"There is no starter file {path}. Fetch or train it first.")
    if not is_starter_file(path):
        raise GraftError(f"{path} is damaged or no starter file (tensors 'backbone.*' and 'head.*'). Fetch it again.")
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    missing = [key for key in _METADATA if key not in metadata]
    if missing:
        raise GraftError(f"{path} does not state its {', '.join(missing)}. Write it with `save_starter`.")
    state = {name: t.float() if t.is_floating_point() else t for name, t in load_file(path).items()}
    backbone, head = ({n.removeprefix(p): t for n, t in state.items() if n.startswith(p)} for p in _PARTS)
    return StarterFile(
        backbone=backbone,
        head=head,
        classes=tuple(json.loads(metadata["classes"])),
        spacing=tuple(json.loads(metadata["spacing"])),
        recipe=metadata["recipe"],
    )


def save_starter(
    path: Path, backbone_state: Mapping[str, Tensor], head_state: Mapping[str, Tensor], metadata: Mapping[str, Any]
) -> None:
    """Write a starter file in half precision, whole or not at all.

    Args:
        path: The file; an older one is replaced.
        backbone_state: Weights of the network without its output layer.
        head_state: Weights of the output layer.
        metadata: `classes` (names of the output channels), `spacing` (mm along each axis) and `recipe` (text).

    Raises:
        GraftError: A value that half precision cannot hold, missing metadata, or a disk that refuses.
    """
    missing = [key for key in _METADATA if key not in metadata]
    if missing:
        raise GraftError(f"A starter has to state its {', '.join(missing)}. Add them to its metadata.")
    tensors: dict[str, Tensor] = {}
    for prefix, state in zip(_PARTS, (backbone_state, head_state), strict=True):
        tensors |= {f"{prefix}{name}": _half(f"{prefix}{name}", tensor) for name, tensor in state.items()}
    text = {
        "classes": json.dumps(list(metadata["classes"]), ensure_ascii=False),
        "spacing": json.dumps([float(side) for side in metadata["spacing"]]),
        "recipe": str(metadata["recipe"]),
    }
    data = save(tensors, metadata=text)
    write_atomically(path, lambda file: file.write(data))


def _half(name: str, tensor: Tensor) -> Tensor:
    """Return a copy in half precision; whole numbers (position indices) stay as they are."""
    if not tensor.is_floating_point():
        return tensor.detach().cpu().clone().contiguous()
    half = tensor.detach().cpu().to(torch.float16, copy=True).contiguous()
    if not torch.isfinite(half).all():
        largest = torch.finfo(torch.float16).max
        raise GraftError(
            f"{name} holds NaN, infinite values or values beyond {largest:.0f}, which half precision cannot."
        )
    return half


def starter_from_export(export: Path, out: Path) -> None:
    """Turn a folder that `graft export` wrote after full fine-tuning into a starter file.

    Args:
        export: The folder.
        out: The file to write.

    Raises:
        GraftError: No such export, or one of a method that shares an adapter instead of all weights.
    """
    record_file, model_file, head_file = (
        export / name for name in ("graft.json", "model.safetensors", "head.safetensors")
    )
    try:
        record = json.loads(record_file.read_text(encoding="utf-8"))
        facts, method = record["facts"], record["method"]["class_path"]
        head = load_file(head_file)
        model = load_file(model_file) if model_file.is_file() else None
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise GraftError(f"{export} is not a whole export ({error}). Write it with `graft export RUN OUT`.") from error
    if model is None:
        raise GraftError(f"{export} holds a {method} adapter; a starter is made of the weights of FullFineTune.")
    recipe = {key: record[key] for key in ("task", "settings", "method", "optim", "seed") if key in record}
    metadata = {"classes": facts["class_names"], "spacing": facts["spacing"], "recipe": json.dumps(recipe)}
    # A head keeps the network's output layer under this name.
    layer = {name.removeprefix("output."): tensor for name, tensor in head.items()}
    save_starter(out, model, layer, metadata)
