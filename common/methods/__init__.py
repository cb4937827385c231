"""The catalogue of PEFT methods: one typed spec a method, one file a family of the surveys' taxonomy.

Importing it needs no torch. A method exists because it is named in `METHODS`.
"""

from __future__ import annotations

from collections.abc import Mapping

from common.methods._base import MethodSpec, ModePolicy, OnModules, Plan
from common.methods.additive import IA3, SSF, ConvAdapter, Houlsby, Pfeiffer
from common.methods.hybrid import AtBudget, Mixture, PerGroup
from common.methods.reparameterised import LoRA, VeRA
from common.methods.selective import BitFit, FullFineTune, LastBlocks, LinearProbe, NormBias, NormTuning

METHODS: Mapping[str, type[MethodSpec]] = {
    spec.__name__: spec
    for spec in (
        FullFineTune,
        LinearProbe,
        BitFit,
        NormTuning,
        NormBias,
        LastBlocks,
        LoRA,
        VeRA,
        IA3,
        SSF,
        ConvAdapter,
        Houlsby,
        Pfeiffer,
        Mixture,
        PerGroup,
        AtBudget,
    )
}

__all__ = [
    "IA3",
    "METHODS",
    "SSF",
    "AtBudget",
    "BitFit",
    "ConvAdapter",
    "FullFineTune",
    "Houlsby",
    "LastBlocks",
    "LinearProbe",
    "LoRA",
    "MethodSpec",
    "Mixture",
    "ModePolicy",
    "NormBias",
    "NormTuning",
    "OnModules",
    "PerGroup",
    "Pfeiffer",
    "Plan",
    "VeRA",
]
