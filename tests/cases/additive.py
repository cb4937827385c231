"""Cases of `common/methods/additive/`."""

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


def _parallel(spec, model, targets):
    total, begins = 0, {"fc2": "fc1", "out": "qkv", "3": "0"}
    for name in targets:
        block, _, last = name.rpartition(".")
        reads = model.get_submodule(f"{block}.{begins[last]}".removeprefix("."))
        inputs, outputs = reads.in_features, model.get_submodule(name).out_features
        total += spec.width * (inputs + outputs + 1) + outputs
    return total


def _convpass(spec, model, targets):
    return _parallel(spec, model, targets) + len(targets) * (3 * spec.width**2 + spec.width)


def _conv_lora(spec, layer, role):
    inside = spec.experts * (3 * spec.rank**2 + spec.rank) + spec.rank * spec.experts + spec.experts
    return spec.rank * (layer.in_features + layer.out_features) + inside


def _compacter(spec, model, targets):
    outputs = [matrix(model.get_submodule(name))[0] for name in targets]
    n = max(n for n in range(1, spec.division + 1) if all(size % n == 0 for size in outputs))
    width = min(spec.width, *outputs) // n * n
    return sum((2 * spec.rank + 1) * (width + size) for size in outputs) + n**3


def _adapter_plus(spec, block, role):
    return 2 * spec.rank * 8 + spec.rank + 2 * 8


def _reft(spec, block, role):
    return 2 * spec.rank * 8 + spec.rank


def _lst(spec, model, targets):
    channels, width = 8, 8 // spec.reduction
    step = width * channels + width + 2 * width + 8 * width**2 + 5 * width
    return len(targets) * step + len(targets) - 1 + width * channels + channels


def _coupling(inputs, outputs, reduction):
    width = max(1, inputs // reduction)
    return inputs * width + width + width * outputs + outputs


def _invertible(spec, layer, role):
    outputs = matrix(layer)[0]
    first, second = outputs // 2, outputs - outputs // 2
    return _coupling(second, first, spec.reduction) + _coupling(first, second, spec.reduction)


def _rep_adapter(spec, model, targets):
    layers = [model.get_submodule(name) for name in targets]
    inputs = [layer.in_features if hasattr(layer, "in_features") else layer.in_channels for layer in layers]
    groups = max(g for g in range(1, spec.groups + 1) if all(size % g == 0 for size in (*inputs, spec.width)))
    total = 0
    for layer, size in zip(layers, inputs, strict=True):
        alone = layer.bias is not None and set(getattr(layer, "kernel_size", (1,))) == {1}
        total += spec.width * size + size * spec.width // groups + alone * (spec.width + size)
    return total


_BESIDE = {"mergeable": False, "random_start": True}
_BLOCKS = {**_BESIDE, "without_family": "acts on blocks, and Sequential belongs to no family"}

CASES = {
    "IA3": both("IA3", per_layer=_ia3),
    "IA3-ffn": Case(toy=toy("IA3", on=["ffn"]), zoo=None, per_layer=_ia3),
    "IA3-peft": Case(
        toy=None, zoo=zoo("IA3", target_modules=["stem", "blocks.0.dilated", "blocks.1.grouped"]), per_layer=_ia3
    ),
    "SSF": both("SSF", per_layer=_ssf),
    "SSF-one-role": Case(toy=toy("SSF", on=["norm"]), zoo=None, per_layer=_ssf),
    "ConvAdapter": both(
        "ConvAdapter", per_layer=_conv_adapter, without_family=r"cannot act on '0' \(Linear, role custom\)", **_BESIDE
    ),
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
    "Compacter": both("Compacter", total=_compacter, **_BESIDE),
    "Compacter-rank-2": Case(
        toy=toy("Compacter", rank=2, division=3, scale=0.5, on=["ffn", "attention_qkv@last:1"]),
        zoo=zoo("Compacter", on=["all"]),
        total=_compacter,
        **_BESIDE,
    ),
    "ParallelAdapter": both("ParallelAdapter", total=_parallel, **_BESIDE),
    "ParallelAdapter-both": Case(
        toy=toy("ParallelAdapter", on=["attention@last:1", "ffn_in"], scale=1.0),
        zoo=None,
        total=_parallel,
        **_BESIDE,
    ),
    "AdaptFormer": both("AdaptFormer", total=_parallel, **_BESIDE),
    "Convpass": Case(
        toy=toy("Convpass"),
        zoo=None,
        total=_convpass,
        without_family=r"Convpass needs the grid .* an architecture without a family",
        **_BESIDE,
    ),
    "ConvLoRA": Case(
        toy=toy("ConvLoRA"),
        zoo=None,
        per_layer=_conv_lora,
        without_family=r"ConvLoRA needs the grid .* an architecture without a family",
        **_BESIDE,
    ),
    "AdapterPlus": Case(toy=toy("AdapterPlus"), zoo=None, per_layer=_adapter_plus, **_BLOCKS),
    "AdapterPlus-some": Case(toy=toy("AdapterPlus", blocks=[1]), zoo=None, per_layer=_adapter_plus, **_BLOCKS),
    "LoReFT": Case(toy=toy("LoReFT"), zoo=None, per_layer=_reft, **_BLOCKS),
    "LoReFT-first": Case(toy=toy("LoReFT", first=2, blocks=[1]), zoo=None, per_layer=_reft, **_BLOCKS),
    "NoReFT": Case(toy=toy("NoReFT"), zoo=None, per_layer=_reft, **_BLOCKS),
    "DiReFT": Case(toy=toy("DiReFT"), zoo=None, per_layer=_reft, **_BLOCKS),
    "LST": Case(toy=toy("LST"), zoo=None, total=_lst, **_BLOCKS),
    "InvertibleAdapter": both("InvertibleAdapter", per_layer=_invertible, **_BESIDE),
    "RepAdapter": both("RepAdapter", total=_rep_adapter, random_start=True),
    "RepAdapter-wide": Case(
        toy=toy("RepAdapter", on=["all", "stem"], width=6, groups=3, scale=2.0),
        zoo=zoo("RepAdapter", target_modules=["blocks.0.point", "blocks.0.copied", "blocks.1.up", "fc1"], groups=1),
        total=_rep_adapter,
        random_start=True,
    ),
}
