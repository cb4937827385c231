"""Specimens for the tests of the matrix itself: the toy backbone, and one whose last layer is never called."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from common.matrix import Specimen
from common.roles import Pattern
from tests.toy import FAMILY, toy_backbone

_INPUTS = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(1))


def toy():
    return Specimen(
        name="toy", model=toy_backbone().eval(), family=FAMILY, inputs=_INPUTS, run=lambda model, x: model(x)
    )


def with_a_dead_layer():
    """The toy backbone with one more Linear that no forward pass calls."""
    specimen = toy()
    specimen.model.spare = nn.Linear(8, 8)
    roles = {**FAMILY.roles, "conv": (Pattern(r"spare", (nn.Linear,)),)}
    return dataclasses.replace(specimen, family=dataclasses.replace(FAMILY, roles=roles))
