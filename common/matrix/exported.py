"""Adapter folders of a specimen, for the methods that are built on exported adapters."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch

from common.attach import attach
from common.errors import GraftError
from common.exchange import GRAFT, write_adapter
from common.matrix.settings import candidates
from common.matrix.specimen import Build
from common.methods import METHODS, AdapterFusion, MethodSpec, Stack

_NOISE = 0.1  # by which a written adapter has moved off its start


def specs_on(method: str, build: Build, folder: Path) -> Iterator[tuple[MethodSpec, str]]:
    """Yield the settings to try on a network, as `candidates` does; folders that they need are written first.

    Args:
        method: A name of `METHODS`.
        build: Builds the network anew.
        folder: Where adapter folders may be written.

    Raises:
        GraftError: No adapter that the method could be built on fits the network.
    """
    if not METHODS[method].needs_adapters:
        yield from candidates(method)
        return
    place = folder / "built on"
    if method == "AdapterFusion":
        _, remark, folders = _written("Pfeiffer", build, place, 2)
        yield AdapterFusion(adapters=folders), f"of Pfeiffer adapters {remark}".strip()
        return
    first, remark, folders = _written("LoRA", build, place, 1)
    told = f"LoRA on LoRA {remark}".strip()
    yield Stack(first=folders[0], then=first), told
    yield Stack(first=folders[0], then=first, first_stays="merged"), f"{told}, with `first_stays: merged`"


def _written(method: str, build: Build, place: Path, number: int) -> tuple[MethodSpec, str, list[str]]:
    """Write adapters of the first settings that fit; return those, the remark on them, and the folders."""
    refusal: GraftError | None = None
    for spec, remark in candidates(method):
        try:
            return spec, remark, [write_folder(place / str(i), build, spec, seed=i) for i in range(number)]
        except GraftError as error:
            refusal = refusal or error
    raise refusal or GraftError(f"{method} has no settings to try.")


def write_folder(folder: Path, build: Build, spec: MethodSpec, seed: int = 0) -> str:
    """Write the folder of a method whose adapter has moved off its start; return its path."""
    specimen = build()
    attached = attach(specimen.model, spec, specimen.family, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in attached.model.parameters():
            if parameter.requires_grad:
                parameter += _NOISE * torch.randn(parameter.shape, generator=generator)
    folder.mkdir(parents=True, exist_ok=True)
    write_adapter(attached, folder, lambda: attached.model)
    (folder / GRAFT).write_text(json.dumps({"method": spec.describe(), "base_digest": attached.base_digest}))
    return str(folder)
