"""Adapter folders that a method is built on: what they say of themselves, and their tensors."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common._digest import file_digest, state_digest
from common.errors import GraftError

if TYPE_CHECKING:
    from torch import Tensor, nn

GRAFT = "graft.json"
ADAPTER = "adapter_model.safetensors"


@dataclass(frozen=True)
class Exported:
    """What a method keeps of an adapter folder, so that it stands without it later.

    Attributes:
        method: The folder's method, as a recipe writes it.
        base_digest: SHA-256 of the weights that it was trained on.
        digest: SHA-256 of its tensors' file.
    """

    method: dict[str, Any]
    base_digest: str
    digest: str


def exported(folder: str, by: str) -> Exported:
    """Read what an adapter folder says of itself.

    Args:
        folder: A folder that `graft export` wrote.
        by: The method that builds on it, for messages.

    Raises:
        GraftError: No such folder, or one without an adapter.
    """
    place = Path(folder)
    try:
        record = json.loads((place / GRAFT).read_text())
        method, base = record["method"], record["base_digest"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GraftError(
            f"{by}: '{folder}' is no readable adapter folder ({GRAFT}: {type(error).__name__}). Write one with `graft "
            "export RUN OUT`."
        ) from error
    if not (place / ADAPTER).is_file():
        raise GraftError(
            f"{by}: '{folder}' holds no adapter ({ADAPTER} is missing; its method is {method.get('class_path')}). Give "
            "one that `graft export` wrote of a method that adds an adapter."
        )
    return Exported(method=method, base_digest=str(base), digest=file_digest(place / ADAPTER))


def stored(folder: str, digest: str, by: str) -> dict[str, Tensor]:
    """Read an adapter folder's tensors.

    Args:
        folder: The folder.
        digest: SHA-256 that its tensors' file had when the method was given.
        by: The method that builds on it, for messages.

    Raises:
        GraftError: The file is gone, has changed since, or is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(folder) / ADAPTER
    try:
        if file_digest(path) != digest:
            raise GraftError(
                f"{by}: {path} has changed since this run was begun (SHA-256 {digest[:12]} expected). Give the folder "
                "that it was begun with, or start a new run."
            )
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise GraftError(
            f"{by}: {path} cannot be read. A run needs the adapters that it builds on until it is exported; put the "
            "folder back."
        ) from error


def require_base(model: nn.Module, base_digest: str, folder: str, by: str) -> None:
    """Refuse a backbone that an adapter was not trained on.

    Raises:
        GraftError: Other weights.
    """
    found = state_digest(model)
    if found != base_digest:
        raise GraftError(
            f"{by}: '{folder}' was trained on other weights: digest {base_digest[:12]} expected, {found[:12]} found. "
            "Use the backbone that it was trained on."
        )
