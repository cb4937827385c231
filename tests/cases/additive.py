"""Cases of `common/methods/additive.py`."""

from __future__ import annotations

import math

from common.roles import NORMS
from tests.cases._case import Case, both, matrix, toy, zoo


def _ia3(spec, layer, role):
    return layer.in_features if role == "ffn_out" else matrix(layer)[0]


def _ssf(spec, layer, role):
    outputs = layer.weight.numel() if isinstance(layer, NORMS) else matrix(layer)[0]
    return outputs * (1 if layer.bias is None else 2)


def _conv_adapter(spec, layer, role):
    width = max(1, layer.in_channels // spec.reduction)
    inputs = layer.in_channels // math.gcd(layer.in_channels, width)
    return width * inputs * math.prod(layer.kernel_size) + layer.out_channels * (width + 1)


def _bottleneck(spec, layer, role):
    outputs = matrix(layer)[0]
    width = min(spec.width, outputs)
    return 2 * width * outputs + width + outputs


_BESIDE = {"mergeable": False, "random_start": True}

CASES = {
    "IA3": both("IA3", per_layer=_ia3),
    "IA3-ffn": Case(toy=toy("IA3", on=["ffn"]), zoo=None, per_layer=_ia3),
    "IA3-peft": Case(
        toy=None, zoo=zoo("IA3", target_modules=["stem", "blocks.0.dilated", "blocks.1.grouped"]), per_layer=_ia3
    ),
    "SSF": both("SSF", per_layer=_ssf),
    "SSF-one-role": Case(toy=toy("SSF", on=["norm"]), zoo=None, per_layer=_ssf),
    "ConvAdapter": both("ConvAdapter", per_layer=_conv_adapter, **_BESIDE),
    "ConvAdapter-wide": Case(
        toy=toy("ConvAdapter", reduction=1),
        zoo=zoo("ConvAdapter", reduction=1, on=["stem", "conv"]),
        per_layer=_conv_adapter,
        **_BESIDE,
    ),
    "Houlsby": both("Houlsby", per_layer=_bottleneck, **_BESIDE),
    "Houlsby-scaled": Case(
        toy=toy("Houlsby", scale=0.5, on=["attention_out@last:2", "ffn_in@first:1"]),
        zoo=zoo("Houlsby", scale=0.5, on=["conv@last:1", "ffn_out"]),
        per_layer=_bottleneck,
        **_BESIDE,
    ),
    "Houlsby-wide": Case(
        toy=toy("Houlsby", width=64, target_modules=["mix", "blocks.0.qkv"]),
        zoo=None,
        per_layer=_bottleneck,
        **_BESIDE,
    ),
    "Pfeiffer": both("Pfeiffer", per_layer=_bottleneck, **_BESIDE),
}
