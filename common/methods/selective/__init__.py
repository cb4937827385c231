"""Selective methods: train a chosen part of the backbone's own parameters, and the two ends of the scale."""

from common.methods.selective._ends import FullFineTune, LinearProbe
from common.methods.selective._masks import GPS, FishMask, MagnitudeMask, SHiRA
from common.methods.selective._parts import BitFit, DiffFit, LastBlocks, NormBias, NormTuning
from common.methods.selective._salient import SCT

__all__ = [
    "GPS",
    "SCT",
    "BitFit",
    "DiffFit",
    "FishMask",
    "FullFineTune",
    "LastBlocks",
    "LinearProbe",
    "MagnitudeMask",
    "NormBias",
    "NormTuning",
    "SHiRA",
]
