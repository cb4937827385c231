"""Medical networks that Graft trained itself: which network each one is, and what its file states."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from common.starters import StarterFile, load_starter, read_full_export, save_starter

_STATED = ("classes", "spacing", "recipe")


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


def load_segmenter(path: Path) -> StarterFile:
    """Read a starter file of a segmentation network.

    Raises:
        GraftError: It is missing, damaged, has another layout, or states no classes or spacing.
    """
    return load_starter(path, _STATED)


def classes_of(file: StarterFile) -> tuple[str, ...]:
    """Return the names of a starter's output channels, in order."""
    return tuple(json.loads(file.metadata["classes"]))


def stated(classes: Sequence[str], spacing: Sequence[float], recipe: str) -> dict[str, str]:
    """Return the metadata of a starter file.

    Args:
        classes: Names of the output channels.
        spacing: Voxel size along each axis, mm.
        recipe: How it was trained.
    """
    return {
        "classes": json.dumps(list(classes), ensure_ascii=False),
        "spacing": json.dumps([float(side) for side in spacing]),
        "recipe": recipe,
    }


def starter_from_export(export: Path, out: Path) -> None:
    """Turn a folder that `graft export` wrote after full fine-tuning into a starter file.

    Args:
        export: The folder.
        out: The file to write.

    Raises:
        GraftError: No such export, or one of a method that shares an adapter instead of all weights.
    """
    found = read_full_export(export)
    # A head keeps the network's output layer under this name.
    layer = {name.removeprefix("output."): tensor for name, tensor in found.head.items()}
    metadata = stated(found.facts["class_names"], found.facts["spacing"], found.recipe)
    save_starter(out, found.model, layer, metadata)
