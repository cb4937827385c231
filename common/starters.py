"""Checkpoints that Graft trained itself: the file format of their weights, and how an export becomes one.

A starter file is a `.safetensors` of half-precision weights, `backbone.NAME` for the network and `head.NAME` for its
output layer, whose metadata states what the domain needs to know about it, and the recipe that it was trained with.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from common import artifacts
from common.checkpoint import write_atomically
from common.errors import GraftError

_PARTS = ("backbone.", "head.")
_RECIPE = ("task", "settings", "method", "optim", "seed")


@dataclass(frozen=True, kw_only=True)
class StarterFile:
    """What a starter file holds.

    Attributes:
        backbone: Weights of the network without its output layer, float32.
        head: Weights of the output layer, float32.
        metadata: What it states about itself, as text; `recipe` says how it was trained.
    """

    backbone: Mapping[str, Tensor]
    head: Mapping[str, Tensor]
    metadata: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class FullExport:
    """An export of full fine-tuning.

    Attributes:
        model: Weights of the network.
        head: Weights of the head.
        facts: What was known about its data.
        recipe: Task, settings, method, optimizer and seed, as JSON.
    """

    model: Mapping[str, Tensor]
    head: Mapping[str, Tensor]
    facts: Mapping[str, Any]
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


def load_starter(path: Path, stated: Sequence[str] = ("recipe",)) -> StarterFile:
    """Read a starter file.

    Args:
        path: The file.
        stated: What its metadata has to state.

    Raises:
        GraftError: It is missing, damaged, has another layout or leaves metadata out.
    """
    if not path.is_file():
        raise GraftError(f"There is no starter file {path}. Fetch or train it first.")
    if not is_starter_file(path):
        raise GraftError(f"{path} is damaged or no starter file (tensors 'backbone.*' and 'head.*'). Fetch it again.")
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    missing = [key for key in stated if key not in metadata]
    if missing:
        raise GraftError(f"{path} does not state its {', '.join(missing)}. Write it with `save_starter`.")
    state = {name: t.float() if t.is_floating_point() else t for name, t in load_file(path).items()}
    backbone, head = ({n.removeprefix(p): t for n, t in state.items() if n.startswith(p)} for p in _PARTS)
    return StarterFile(backbone=backbone, head=head, metadata=metadata)


def save_starter(
    path: Path, backbone: Mapping[str, Tensor], head: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a starter file in half precision, whole or not at all.

    Args:
        path: The file; an older one is replaced.
        backbone: Weights of the network without its output layer.
        head: Weights of the output layer.
        metadata: What the file is to state.

    Raises:
        GraftError: A value that half precision cannot hold, or a disk that refuses.
    """
    tensors: dict[str, Tensor] = {}
    for prefix, state in zip(_PARTS, (backbone, head), strict=True):
        tensors |= {f"{prefix}{name}": _half(f"{prefix}{name}", tensor) for name, tensor in state.items()}
    data = save(tensors, metadata=dict(metadata))
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


def read_full_export(export: Path) -> FullExport:
    """Read a folder that `graft export` wrote after full fine-tuning.

    Raises:
        GraftError: No such export, or one of a method that shares an adapter instead of all weights.
    """
    model_file = export / "model.safetensors"
    try:
        record = json.loads((export / "graft.json").read_text(encoding="utf-8"))
        facts, method = record["facts"], record["method"]["class_path"]
        recipe = {key: record[key] for key in _RECIPE if key in record}
        head = load_file(export / "head.safetensors")
        model = load_file(model_file) if model_file.is_file() else None
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise GraftError(f"{export} is not a whole export ({error}). Write it with `graft export RUN OUT`.") from error
    if model is None:
        raise GraftError(f"{export} holds a {method} adapter; a starter is made of the weights of FullFineTune.")
    return FullExport(model=model, head=head, facts=facts, recipe=json.dumps(recipe))
