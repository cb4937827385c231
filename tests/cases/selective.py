"""Cases of `common/methods/selective.py`."""

from __future__ import annotations

from torch import nn

from common.roles import NORMS
from tests.cases._case import Case, both, toy, whole, zoo


def _bias(spec, layer, role):
    return layer.bias.numel()


def _norm_bias(spec, layer, role):
    return whole(layer) if isinstance(layer, (*NORMS, nn.PReLU)) else layer.bias.numel()


def _whole(spec, layer, role):
    return whole(layer)


CASES = {
    "FullFineTune": both("FullFineTune", total=lambda spec, model, targets: whole(model)),
    "LinearProbe": both("LinearProbe", total=lambda spec, model, targets: 0),
    "BitFit": both("BitFit", per_layer=_bias),
    "BitFit-no-norms": Case(toy=toy("BitFit", norms=False), zoo=None, per_layer=_bias),
    "NormTuning": both("NormTuning", per_layer=_whole),
    "NormBias": both("NormBias", per_layer=_norm_bias),
    "LastBlocks": both("LastBlocks", per_layer=_whole),
    "LastBlocks-2": Case(toy=toy("LastBlocks", k=2), zoo=zoo("LastBlocks", k=2), per_layer=_whole),
}
