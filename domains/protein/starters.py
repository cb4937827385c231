"""Protein language models that Graft trained itself: which network each one is, and the file format of its weights.

A starter file is a `.safetensors` of half-precision weights, `backbone.NAME` for the encoder and `head.NAME` for its
language model's output layer, whose metadata states the recipe that it was trained with.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from common import artifacts
from common.checkpoint import write_atomically
from common.errors import GraftError

_BACKBONE, _HEAD = "backbone.", "head."


@dataclass(frozen=True, kw_only=True)
class Starter:
    """A checkpoint of the catalog and the network of the ESM-2 architecture that takes it.

    Attributes:
        name: Name of the catalog row.
        layers: Number of blocks.
        width: Channels of its features.
        heads: Attention heads.
    """

    name: str
    layers: int
    width: int
    heads: int


STARTERS: Mapping[str, Starter] = MappingProxyType(
    {starter.name: starter for starter in (Starter(name="esm2-graft", layers=6, width=192, heads=6),)}
)
"""The protein starters by catalog name."""


@dataclass(frozen=True, kw_only=True)
class StarterFile:
    """What a starter file holds.

    Attributes:
        backbone: Weights of the encoder, float32.
        head: Weights of the language model's output layer, float32.
        recipe: How it was trained.
    """

    backbone: Mapping[str, Tensor]
    head: Mapping[str, Tensor]
    recipe: str


def starter_file(name: str) -> Path:
    """Return the verified file of a starter.

    Raises:
        GraftError: The catalog has no file of it, or the file cannot be had.
    """
    if name not in artifacts.catalog():
        raise GraftError(
            f"The catalog has no weights of the starter '{name}' yet. Train it as a masked language model and give the "
            "file with 'weights', or set pretrained to false."
        )
    return artifacts.fetch(name)


def load_starter(path: Path) -> StarterFile:
    """Read a starter file.

    Raises:
        GraftError: It is missing, damaged, or has another layout.
    """
    if not path.is_file():
        raise GraftError(f"There is no starter file {path}. Fetch or train it first.")
    try:
        state = load_file(path)
        with safe_open(path, framework="pt") as file:
            recipe = (file.metadata() or {}).get("recipe")
    except (OSError, SafetensorError) as error:
        raise GraftError(f"{path} cannot be read as safetensors ({error}). Fetch it again.") from error
    others = [name for name in state if not name.startswith((_BACKBONE, _HEAD))]
    if others or recipe is None:
        lacking = f"it holds '{others[0]}'" if others else "it states no recipe"
        raise GraftError(f"{path} is no starter file: {lacking}. Write it with `save_starter`.")
    backbone, head = (
        {name.removeprefix(part): t.float() for name, t in state.items() if name.startswith(part)}
        for part in (_BACKBONE, _HEAD)
    )
    return StarterFile(backbone=backbone, head=head, recipe=recipe)


def save_starter(path: Path, backbone: Mapping[str, Tensor], head: Mapping[str, Tensor], recipe: str) -> None:
    """Write a starter file in half precision, whole or not at all.

    Rotary frequencies are left out: half precision would bend them, and they follow from the architecture.

    Args:
        path: The file; an older one is replaced.
        backbone: Weights of the encoder.
        head: Weights of the language model's output layer.
        recipe: How it was trained.

    Raises:
        GraftError: A value that half precision cannot hold, or a disk that refuses.
    """
    named = {f"{_BACKBONE}{name}": tensor for name, tensor in backbone.items() if not name.endswith("inv_freq")}
    named |= {f"{_HEAD}{name}": tensor for name, tensor in head.items()}
    halves = {name: tensor.detach().cpu().to(torch.float16, copy=True).contiguous() for name, tensor in named.items()}
    wrong = [name for name, tensor in halves.items() if not torch.isfinite(tensor).all()]
    if wrong:
        raise GraftError(f"{wrong[0]} holds NaN, infinite values or values beyond what half precision can.")
    data = save(halves, metadata={"recipe": recipe})
    write_atomically(path, lambda file: file.write(data))


def starter_from_export(export: Path, out: Path) -> None:
    """Turn a folder that `graft export` wrote after full training of a masked language model into a starter file.

    Args:
        export: The folder.
        out: The file to write.

    Raises:
        GraftError: No such export, or one of a method that shares an adapter instead of all weights.
    """
    model_file = export / "model.safetensors"
    try:
        record = json.loads((export / "graft.json").read_text(encoding="utf-8"))
        recipe = {key: record[key] for key in ("task", "settings", "method", "optim", "seed")}
        head = load_file(export / "head.safetensors")
        model = load_file(model_file) if model_file.is_file() else None
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise GraftError(f"{export} is not a whole export ({error}). Write it with `graft export RUN OUT`.") from error
    if model is None:
        method = recipe["method"]["class_path"]
        raise GraftError(f"{export} holds a {method} adapter; a starter is made of the weights of FullFineTune.")
    save_starter(out, model, head, json.dumps(recipe))
