"""The grid of all methods on all networks that the domains offer, or a subset that meets each of them."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import nn

from common.domain import Domain
from common.errors import GraftError, unknown
from common.matrix.cell import Cell, choose, run_cell
from common.matrix.specimen import Build, Columns, Specimen
from common.roles import resolve

Kind = Literal["attention", "recurrent", "convolutions"]


def columns_of(domains: Mapping[str, Domain]) -> Columns:
    """Import the specimens of all domains, title to builder, in the domains' order.

    A network is built once, when it is first asked for; each call of its builder returns a copy. Biases, scales and
    running statistics are moved off their start.
    """
    columns: dict[str, Build] = {}
    for domain in domains.values():
        for title, place in domain.specimens.items():
            module, _, name = place.partition(":")
            columns[title] = _copies_of(getattr(importlib.import_module(module), name))
    return columns


def _copies_of(build: Build) -> Build:
    @functools.cache
    def first() -> Specimen:
        specimen = build()
        move_off_the_start(specimen.model)
        return specimen

    def copied() -> Specimen:
        specimen = first()
        return dataclasses.replace(specimen, model=copy.deepcopy(specimen.model))

    return copied


@torch.no_grad()
def move_off_the_start(model: nn.Module) -> None:
    """Make biases, scales and running statistics what training makes of them: no round numbers.

    What multiplies a bias of zero gets no gradient, and a branch that is scaled to a millionth hides what is on it.
    """
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0.0, 0.1, generator=generator)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5, generator=generator)


def chosen(given: Sequence[str], known: Sequence[str], what: str) -> list[str]:
    """Return the wanted names, or all where none is given.

    Raises:
        GraftError: An unknown name.
    """
    for name in given:
        if name not in known:
            raise unknown(what, name, known)
    return [name for name in known if name in given or not given]


def kind_of(specimen: Specimen) -> Kind:
    """Return what a network is made of, by its roles."""
    roles = resolve(specimen.model, specimen.family).count()
    if "attention_qkv" in roles:
        return "attention"
    return "recurrent" if "recurrent" in roles else "convolutions"


def covering(methods: Sequence[str], columns: Columns) -> list[tuple[str, str]]:
    """Choose cells so that each method is tried on two networks of different kinds, and each network is met.

    A network that a method refuses does not count for it; a method that takes one kind only is tried on that one alone.
    """
    kinds = {title: kind_of(build()) for title, build in columns.items()}
    used = dict.fromkeys(columns, 0)
    cells: list[tuple[str, str]] = []
    for method in methods:
        taken: set[Kind] = set()
        for title in sorted(columns, key=lambda title: used[title]):
            if len(taken) < 2 and kinds[title] not in taken and _takes(method, columns[title]):
                taken.add(kinds[title])
                used[title] += 1
                cells.append((method, title))
        if not taken:
            first = min(used, key=lambda title: used[title])
            used[first] += 1
            cells.append((method, first))
    cells += [(methods[0], title) for title, number in used.items() if not number]
    return cells


def _takes(method: str, build: Build) -> bool:
    try:
        choose(method, build)
    except GraftError:
        return False
    except Exception:  # the cell will tell what it is
        return True
    return True


def run_grid(cells: Sequence[tuple[str, str]], columns: Columns) -> Iterator[Cell]:
    """Run cells one after the other."""
    for method, title in cells:
        yield run_cell(method, title, columns[title])


def whole(methods: Sequence[str], columns: Columns) -> list[tuple[str, str]]:
    """Return all cells, method by method."""
    return [(method, title) for method in methods for title in columns]
