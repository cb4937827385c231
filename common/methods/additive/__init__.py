"""Additive methods: small new modules beside and behind frozen ones, and learned scales of what they compute."""

from __future__ import annotations

from common.methods.additive._blocks import LST, AdapterPlus, DiReFT, LoReFT, NoReFT
from common.methods.additive._bottlenecks import (
    Compacter,
    ConvAdapter,
    Houlsby,
    InvertibleAdapter,
    Pfeiffer,
    RepAdapter,
)
from common.methods.additive._conv_lora import ConvLoRA
from common.methods.additive._parallel import AdaptFormer, Convpass, ParallelAdapter
from common.methods.additive._scaling import IA3, SSF

__all__ = [
    "IA3",
    "LST",
    "SSF",
    "AdaptFormer",
    "AdapterPlus",
    "Compacter",
    "ConvAdapter",
    "ConvLoRA",
    "Convpass",
    "DiReFT",
    "Houlsby",
    "InvertibleAdapter",
    "LoReFT",
    "NoReFT",
    "ParallelAdapter",
    "Pfeiffer",
    "RepAdapter",
]
