"""Piper's voices: the weights of an exported VITS, read out of its ONNX graph under the names of transformers."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.errors import GraftError

_LAYER = r"text_encoder.encoder.layers.\1"
_RENAMED: tuple[tuple[str, str], ...] = (
    (r"enc_p\.emb\.", "text_encoder.embed_tokens."),
    (r"enc_p\.proj\.", "text_encoder.project."),
    (r"enc_p\.encoder\.attn_layers\.(\d+)\.conv_([qkv])\.", rf"{_LAYER}.attention.\2_proj."),
    (r"enc_p\.encoder\.attn_layers\.(\d+)\.conv_o\.", rf"{_LAYER}.attention.out_proj."),
    (r"enc_p\.encoder\.attn_layers\.(\d+)\.emb_", rf"{_LAYER}.attention.emb_"),
    (r"enc_p\.encoder\.norm_layers_1\.(\d+)\.", rf"{_LAYER}.layer_norm."),
    (r"enc_p\.encoder\.norm_layers_2\.(\d+)\.", rf"{_LAYER}.final_layer_norm."),
    (r"enc_p\.encoder\.ffn_layers\.(\d+)\.", rf"{_LAYER}.feed_forward."),
    (r"dp\.", "duration_predictor."),
    (r"dec\.ups\.", "decoder.upsampler."),
    (r"dec\.", "decoder."),
)
_INNER: tuple[tuple[str, str], ...] = (
    (r"\.(pre|proj|post)\.", r".conv_\1."),
    (r"\.convs\.(convs|norms)_", r".conv_dds.\1_"),
    (r"\.convs_sep\.", ".convs_dilated."),
    (r"\.convs_1x1\.", ".convs_pointwise."),
    (r"\.enc\.(in|res_skip)_layers\.", r".wavenet.\1_layers."),
    (r"\.gamma$", ".weight"),
    (r"\.beta$", ".bias"),
)


def onnx_state(data: bytes, source: str) -> dict[str, Tensor]:
    """Read the weights of a Piper voice.

    The export folded its weight norms into tensors without a name, so a convolution's weights are found by the name of
    the node that uses them.

    Args:
        data: The file's content.
        source: What to call it in an error.

    Returns:
        Tensors by the names of transformers' `VitsModel`, its residual blocks those of `ResidualBlock2`.

    Raises:
        GraftError: It is damaged, or no graph of a VITS.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        graph = onnx.load_model_from_string(data).graph
    except (DecodeError, ValueError, RuntimeError) as error:
        raise GraftError(f"{source} is no ONNX file, or damaged ({error}). Fetch it again.") from error
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    found = _owned(graph, values)
    if not any(name.startswith("enc_p.") for name in found):
        raise GraftError(f"{source} is no VITS: it has no text encoder 'enc_p'. Give a voice of Piper.")
    return {_renamed(name): _tensor(name, value) for name, value in found.items()}


def _owned(graph: Any, values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:  # noqa: ANN401
    """Return the arrays by the name that they had in VITS."""
    found = {name: value for name, value in values.items() if re.match(r"(enc_p|dp|flow|dec)\.", name)}
    for node in graph.node:
        if node.op_type in ("Conv", "ConvTranspose"):
            owner = node.name.removesuffix(f"/{node.op_type}").removeprefix("/").replace("/", ".")
            for part, tensor in zip(("weight", "bias"), node.input[1:], strict=False):
                found[f"{owner}.{part}"] = values[tensor]
        elif node.name == "/enc_p/emb/Gather":
            found["enc_p.emb.weight"] = values[node.input[0]]
    for name in [name for name in found if name.endswith("flows.0.m")]:
        # The affine flow's inverse multiplies by exp(-log_scale), which the export has folded into a constant.
        found[name.removesuffix("m") + "translate"] = found.pop(name)
        folded = values[f"/{name.removesuffix('.m').replace('.flows', '/flows')}/Exp_output_0"]
        found[name.removesuffix("m") + "log_scale"] = -np.log(folded)
    return found


def _renamed(name: str) -> str:
    for pattern, new in _RENAMED:
        name, changed = re.subn(f"^{pattern}", new, name)
        if changed:
            break
    for pattern, new in _INNER:
        name = re.sub(pattern, new, name)
    return re.sub(r"^(\w+)\.flows\.(\d+)", _flow, name)


def _flow(match: re.Match[str]) -> str:
    """Number a flow as transformers does: flips are no modules there, and an affine flow keeps its place."""
    owner, number = match[1], int(match[2])
    return f"{owner}.flows.{number // 2 if owner == 'flow' else (number + 1) // 2}"


def _tensor(name: str, value: np.ndarray) -> Tensor:
    tensor = torch.from_numpy(np.array(value, dtype=np.float32))
    attention = re.search(r"\.conv_[qkvo]\.weight$", name)  # a convolution of width 1 there, a linear layer here
    return tensor[..., 0] if attention else tensor
