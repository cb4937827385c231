"""Protein language models that Graft trained itself: which network each one is, and how an export becomes one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from common.starters import read_full_export, save_starter


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


def starter_from_export(export: Path, out: Path) -> None:
    """Turn a folder that `graft export` wrote after full training of `MaskedLM` or `Distillation` into a starter file.

    Args:
        export: The folder.
        out: The file to write.

    Raises:
        GraftError: No such export, or one of a method that shares an adapter instead of all weights.
    """
    found = read_full_export(export)
    # Half precision would bend the rotary frequencies, and they follow from the architecture.
    backbone = {name: tensor for name, tensor in found.model.items() if not name.endswith("inv_freq")}
    # A distilled student's head also holds the layer that says the teacher's states, which a starter does without.
    distilled = {name.removeprefix("lm."): tensor for name, tensor in found.head.items() if name.startswith("lm.")}
    save_starter(out, backbone, distilled or found.head, {"recipe": found.recipe})
