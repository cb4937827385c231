"""Frozen linear layers in 8 or 4 bits, by bitsandbytes (LLM.int8, arXiv 2208.07339; NF4 of QLoRA, arXiv 2305.14314)."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn

from common.errors import GraftError

Bits = Literal["int8", "nf4"]


def installed() -> bool:
    """Whether bitsandbytes is there."""
    return importlib.util.find_spec("bitsandbytes") is not None


def quantise(model: nn.Module, layers: Mapping[str, Bits]) -> None:
    """Replace linear layers by quantised ones that hold the same weights, rounded; in place.

    Args:
        model: The frozen backbone.
        layers: The layers, each an `nn.Linear` that shares its weight with no other module, and what it shall be:
            `int8` (one byte a weight, columns with large inputs in half precision) or `nf4` (half a byte, in blocks of
            64 with their scales quantised too). Biases stay as they are.

    Raises:
        GraftError: bitsandbytes is not installed, cannot run on this device, or a layer is of another kind.
    """
    if not layers:
        return
    if not installed():
        raise GraftError(
            "quantize needs bitsandbytes, which is not installed. Run `pip install bitsandbytes`, or set quantize to "
            "null."
        )
    wrong = [name for name in layers if type(model.get_submodule(name)) is not nn.Linear]
    if wrong:
        kind = type(model.get_submodule(wrong[0])).__name__
        raise GraftError(
            f"quantize takes linear layers, and '{wrong[0]}' is a {kind}. Choose other roles with 'on', or "
            "set quantize to null."
        )
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    for name, bits in layers.items():
        layer = model.get_submodule(name)
        if owners[id(layer.weight)] > 1:
            raise GraftError(f"quantize cannot take '{name}', whose weight another layer shares.")
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, _quantised(layer, name, bits))


def _quantised(layer: Any, name: str, bits: Bits) -> nn.Module:  # noqa: ANN401
    """Return a quantised copy on the layer's own device."""
    bnb = importlib.import_module("bitsandbytes")

    shape = {"input_features": layer.in_features, "output_features": layer.out_features, "bias": layer.bias is not None}
    if bits == "int8":
        copy = bnb.nn.Linear8bitLt(**shape, has_fp16_weights=False, threshold=6.0)
    else:
        kind = {"quant_type": "nf4", "compress_statistics": True}
        copy = bnb.nn.Linear4bit(**shape, compute_dtype=layer.weight.dtype, **kind)
        # On some CPUs it would pack the weights anew between training and evaluation, which fails for many sizes.
        copy.support_avx512bf16_for_cpu = False
    copy.load_state_dict(layer.state_dict())
    device = layer.weight.device
    try:
        copy = copy.to(device)  # the move to a device is what quantises
        with torch.no_grad():
            copy(torch.zeros(1, layer.in_features, dtype=layer.weight.dtype, device=device))
    except (RuntimeError, NotImplementedError, AttributeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise GraftError(
            f"quantize '{bits}': bitsandbytes cannot compute '{name}' ({layer.out_features} x {layer.in_features}) on "
            f"{device}: {reason}. Use another device, or set quantize to null."
        ) from error
    return copy.requires_grad_(False).train(layer.training)
