"""MONAI bundles: the network that a bundle's configuration describes, read as data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import GraftError
from domains.medical.backbones._nets import FROM_DATA, NETS, upstream_defaults

_TARGETS = {f"{place}{arch}": arch for arch in NETS for place in ("", "monai.networks.nets.")}


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """What Graft takes from a bundle.

    Attributes:
        arch: A name of `NETS`.
        net: Constructor arguments, without those that follow from the data.
        takes: Those that follow from the data, as the bundle states them.
        classes: Names of the output channels, in order; empty where the bundle does not state them.
        weights: The file of its weights.
    """

    arch: str
    net: Mapping[str, Any]
    takes: Mapping[str, Any]
    classes: tuple[str, ...]
    weights: Path


def read_bundle(folder: Path) -> Bundle:
    """Read `network_def` of `configs/inference.json` and the channel names of `configs/metadata.json`.

    Nothing of the bundle is run: a value that is an expression (`$...`) or a reference (`@...`) is refused.

    Raises:
        GraftError: A missing or damaged file, another network than those of `NETS`, or an expression.
    """
    path = folder / "configs" / "inference.json"
    given = _read_json(path).get("network_def")
    if not isinstance(given, dict) or given.get("_target_") not in _TARGETS:
        found = given.get("_target_") if isinstance(given, dict) else None
        raise GraftError(
            f"{path} has no 'network_def' of a network that Graft knows (its _target_ is {found!r}). "
            f"Known are: {', '.join(NETS)}."
        )
    arch = _TARGETS[given["_target_"]]
    args = {key: value for key, value in given.items() if not key.startswith("_")}
    for key, value in args.items():
        if _is_expression(value):
            raise GraftError(
                f"{path}: network_def.{key} is {value!r}, an expression, which Graft never runs. Write its value there."
            )
    if arch == "SwinUNETR":
        args.pop("img_size", None)  # bundles of older releases state it; the network has not taken it since
    return Bundle(
        arch=arch,
        net=upstream_defaults(arch)
        | {key: value for key, value in args.items() if key not in FROM_DATA and key not in NETS[arch].forced},
        takes={key: value for key, value in args.items() if key in FROM_DATA},
        classes=_classes(folder / "configs" / "metadata.json"),
        weights=folder / "models" / "model.pt",
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise GraftError(f"There is no file {path}. Give the folder of a MONAI bundle: 'bundle:FOLDER'.") from error
    except ValueError as error:
        raise GraftError(f"{path} is damaged: {error}. Fetch the bundle again.") from error
    return content if isinstance(content, dict) else {}


def _is_expression(value: object) -> bool:
    if isinstance(value, str):
        return value.startswith(("$", "@", "%"))
    if isinstance(value, dict):
        return "_target_" in value or any(map(_is_expression, value.values()))
    return isinstance(value, list) and any(map(_is_expression, value))


def _classes(path: Path) -> tuple[str, ...]:
    """Read the names of the output channels, `{"0": "background", "1": "spleen"}`."""
    found: Any = _read_json(path) if path.is_file() else {}
    for key in ("network_data_format", "outputs", "pred", "channel_def"):
        found = found.get(key) if isinstance(found, dict) else None
    if not isinstance(found, dict) or set(found) != {str(index) for index in range(len(found))}:
        return ()
    return tuple(str(found[str(index)]) for index in range(len(found)))
