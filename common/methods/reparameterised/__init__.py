"""Reparameterised methods: a weight change of low rank or few degrees of freedom, which merges into the weight."""

from __future__ import annotations

from common.methods.reparameterised._adalora import AdaLoRA
from common.methods.reparameterised._entries import BEFT, SuperTuning
from common.methods.reparameterised._fact import FacTTK, FacTTT
from common.methods.reparameterised._lora import LoRA
from common.methods.reparameterised._products import DEFT, DeLoRA, GLoRA, GraLoRA, HiRA, LoHa, LoKr, MiSS, PEANuT
from common.methods.reparameterised._rotations import BOFT, HRA, OFT, PSOFT, RoAd
from common.methods.reparameterised._shared import PVeRA, RandLoRA, TinyLoRA, UniLoRA, VBLoRA, VeRA
from common.methods.reparameterised._spectral import C3A, FourierFT, WaveFT

__all__ = [
    "BEFT",
    "BOFT",
    "C3A",
    "DEFT",
    "HRA",
    "OFT",
    "PSOFT",
    "AdaLoRA",
    "DeLoRA",
    "FacTTK",
    "FacTTT",
    "FourierFT",
    "GLoRA",
    "GraLoRA",
    "HiRA",
    "LoHa",
    "LoKr",
    "LoRA",
    "MiSS",
    "PEANuT",
    "PVeRA",
    "RandLoRA",
    "RoAd",
    "SuperTuning",
    "TinyLoRA",
    "UniLoRA",
    "VBLoRA",
    "VeRA",
    "WaveFT",
]
