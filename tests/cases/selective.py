"""Cases of `common/methods/selective.py`."""

from __future__ import annotations

from torch import nn

from common.roles import NORMS
from tests.cases._case import Case, both, matrix, toy, whole, zoo


def _bias(spec, layer, role):
    return layer.bias.numel()


def _norm_bias(spec, layer, role):
    return whole(layer) if isinstance(layer, (*NORMS, nn.PReLU)) else layer.bias.numel()


def _whole(spec, layer, role):
    return whole(layer)


def _diff_fit(spec, model, targets):
    norms = sum(whole(m) for m in model.modules() if isinstance(m, NORMS))
    biases = [m.bias for m in model.modules() if not isinstance(m, NORMS) and getattr(m, "bias", None) is not None]
    scaled = [model.get_submodule(n) for n, role in targets.items() if role in spec.on]
    return norms + sum(bias.numel() for bias in biases) + sum(matrix(layer)[0] for layer in scaled)


def _share(spec, layer, role):
    return max(1, round(spec.density * layer.weight.numel()))


def _shira(spec, layer, role):
    return min(spec.rank * sum(matrix(layer)), layer.weight.numel())


def _gps(spec, layer, role):
    outputs, inputs = matrix(layer)
    return outputs * min(spec.per_neuron, inputs)


def _sct(spec, layer, role):
    channels = min(spec.channels, matrix(layer)[0])
    return channels * (channels + (layer.bias is not None))


CASES = {
    "FullFineTune": both("FullFineTune", total=lambda spec, model, targets: whole(model)),
    "LinearProbe": both("LinearProbe", total=lambda spec, model, targets: 0),
    "BitFit": both("BitFit", per_layer=_bias),
    "BitFit-no-norms": Case(toy=toy("BitFit", norms=False), zoo=None, per_layer=_bias),
    "BitFit-saved": Case(
        toy=toy("BitFit", statistics="saved"), zoo=zoo("BitFit", statistics="saved"), per_layer=_bias, statistics=True
    ),
    "NormTuning": both("NormTuning", per_layer=_whole),
    "NormTuning-saved": Case(
        toy=toy("NormTuning", statistics="saved"),
        zoo=zoo("NormTuning", statistics="saved"),
        per_layer=_whole,
        statistics=True,
    ),
    "NormBias": both("NormBias", per_layer=_norm_bias),
    "NormBias-saved": Case(
        toy=toy("NormBias", statistics="saved"),
        zoo=zoo("NormBias", statistics="saved"),
        per_layer=_norm_bias,
        statistics=True,
    ),
    "DiffFit": both("DiffFit", total=_diff_fit),
    "FishMask": both("FishMask", per_layer=_share, random_start=True),
    "GPS": both("GPS", per_layer=_gps, random_start=True),
    "SHiRA": both("SHiRA", per_layer=_shira, random_start=True),
    "SHiRA-magnitude": Case(toy=toy("SHiRA", mask="magnitude"), zoo=zoo("SHiRA", mask="magnitude"), per_layer=_shira),
    "SHiRA-all": Case(toy=toy("SHiRA", rank=64), zoo=zoo("SHiRA", rank=64), per_layer=_shira, random_start=False),
    "MagnitudeMask": both("MagnitudeMask", per_layer=_share),
    "MagnitudeMask-largest": Case(
        toy=toy("MagnitudeMask", which="largest"), zoo=zoo("MagnitudeMask", which="largest"), per_layer=_share
    ),
    "SCT": both("SCT", per_layer=_sct, random_start=True),
    "LastBlocks": both("LastBlocks", per_layer=_whole, without_family="has 0 blocks"),
    "LastBlocks-2": Case(toy=toy("LastBlocks", k=2), zoo=zoo("LastBlocks", k=2), per_layer=_whole),
}
