"""CTranslate2's model files of Whisper, read without CTranslate2 and without executing anything.

A file is little-endian: u32 version, string name of the kind, u32 revision, u32 count of tensors; per tensor its name,
u8 rank, u32 for each dimension, u8 type, u32 bytes, data; u32 count of aliases, each a name and what it stands for. A
string is a u16 length, which counts its closing NUL, and its bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.errors import GraftError

_VERSION, _KIND = 6, "WhisperSpec"
_TYPES = (np.dtype("<f4"), np.dtype("i1"), np.dtype("<i2"), np.dtype("<i4"), np.dtype("<f2"))
_ENCODER, _DECODER = "encoder", "decoder"


class _Reader:
    """A position in a file, that never reads behind its end."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def take(self, count: int) -> bytes:
        if count > len(self._data) - self._at:
            raise ValueError(f"it ends at byte {len(self._data)}, within a value of {count} bytes")
        self._at += count
        return self._data[self._at - count : self._at]

    def number(self, kind: str) -> int:
        return struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}")))[0]

    def text(self) -> str:
        return self.take(self.number("H")).removesuffix(b"\0").decode()

    @property
    def rest(self) -> int:
        return len(self._data) - self._at


def read_ctranslate2(data: bytes, source: str) -> dict[str, Tensor]:
    """Read the tensors of a Whisper, those in half precision widened to single.

    Args:
        data: The file's content.
        source: What to call it in an error.

    Raises:
        GraftError: It is damaged, or no Whisper of a layout that is known.
    """
    reader = _Reader(data)
    try:
        version, kind = reader.number("I"), reader.text()
        if (version, kind) != (_VERSION, _KIND):
            raise ValueError(f"it is a {kind!r} of version {version}, and {_KIND!r} of version {_VERSION} is known")
        reader.number("I")
        tensors = dict(_tensor(reader) for _ in range(reader.number("I")))
        for _ in range(reader.number("I")):
            alias, target = reader.text(), reader.text()
            tensors[alias] = tensors[target]
        if reader.rest:
            raise ValueError(f"{reader.rest} bytes stand behind its end")
    except (ValueError, KeyError, IndexError, UnicodeDecodeError) as error:
        raise GraftError(f"{source} is no CTranslate2 file of a Whisper ({error}). Fetch it again.") from error
    return tensors


def _tensor(reader: _Reader) -> tuple[str, Tensor]:
    name = reader.text()
    shape = [reader.number("I") for _ in range(reader.number("B"))]
    kind = _TYPES[reader.number("B")]
    values = np.frombuffer(reader.take(reader.number("I")), dtype=kind).reshape(shape)
    tensor = torch.from_numpy(values.astype(kind.newbyteorder("=")))  # a copy of its own
    return name, tensor.float() if tensor.is_floating_point() else tensor


@dataclass(frozen=True, kw_only=True)
class WhisperSize:
    """The architecture of a Whisper.

    Attributes:
        vocabulary: Number of ids.
        width: Channels.
        layers: Blocks of the encoder, and as many of the decoder.
        heads: Attention heads of each block.
        hidden: Channels of the feed-forward networks.
        bands: Mel bands.
        eos: The id that ends a text.
    """

    vocabulary: int
    width: int
    layers: int
    heads: int
    hidden: int
    bands: int
    eos: int


def whisper_state(tensors: Mapping[str, Tensor], layers: int, source: str) -> dict[str, Tensor]:
    """Name CTranslate2's tensors as transformers' `WhisperForConditionalGeneration` does.

    Args:
        tensors: What `read_ctranslate2` returned.
        layers: Blocks of the encoder, and as many of the decoder.
        source: What to call the file in an error.

    Raises:
        GraftError: Tensors are missing.
    """
    try:
        state = {}
        for side in (_ENCODER, _DECODER):
            state[f"model.{side}.embed_positions.weight"] = tensors[f"{side}/position_encodings/encodings"]
            state |= _norm(tensors, f"{side}/layer_norm", f"model.{side}.layer_norm")
            for index in range(layers):
                state |= _block(tensors, f"{side}/layer_{index}", f"model.{side}.layers.{index}", side)
        for name in ("conv1", "conv2"):
            state |= _layer(tensors, f"encoder/{name}", f"model.encoder.{name}")
        state["model.decoder.embed_tokens.weight"] = tensors["decoder/embeddings/weight"]
        state["proj_out.weight"] = tensors["decoder/projection/weight"]
    except KeyError as error:
        raise GraftError(f"{source} has no tensor {error}, so it is no Whisper of {layers} blocks.") from error
    return state


def _layer(tensors: Mapping[str, Tensor], theirs: str, ours: str) -> dict[str, Tensor]:
    return {f"{ours}.{part}": tensors[f"{theirs}/{part}"] for part in ("weight", "bias")}


def _norm(tensors: Mapping[str, Tensor], theirs: str, ours: str) -> dict[str, Tensor]:
    return {f"{ours}.weight": tensors[f"{theirs}/gamma"], f"{ours}.bias": tensors[f"{theirs}/beta"]}


def _block(tensors: Mapping[str, Tensor], theirs: str, ours: str, side: str) -> dict[str, Tensor]:
    state = _norm(tensors, f"{theirs}/self_attention/layer_norm", f"{ours}.self_attn_layer_norm")
    state |= _norm(tensors, f"{theirs}/ffn/layer_norm", f"{ours}.final_layer_norm")
    state |= _rows(tensors, f"{theirs}/self_attention/linear_0", f"{ours}.self_attn", ("q_proj", "k_proj", "v_proj"))
    state |= _layer(tensors, f"{theirs}/self_attention/linear_1", f"{ours}.self_attn.out_proj")
    state |= _layer(tensors, f"{theirs}/ffn/linear_0", f"{ours}.fc1")
    state |= _layer(tensors, f"{theirs}/ffn/linear_1", f"{ours}.fc2")
    if side == _DECODER:
        cross = f"{theirs}/attention"
        state |= _norm(tensors, f"{cross}/layer_norm", f"{ours}.encoder_attn_layer_norm")
        state |= _layer(tensors, f"{cross}/linear_0", f"{ours}.encoder_attn.q_proj")
        state |= _rows(tensors, f"{cross}/linear_1", f"{ours}.encoder_attn", ("k_proj", "v_proj"))
        state |= _layer(tensors, f"{cross}/linear_2", f"{ours}.encoder_attn.out_proj")
    return state


def _rows(tensors: Mapping[str, Tensor], theirs: str, ours: str, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Cut a layer of several projections into them; the bias of the keys is zero, and transformers has none."""
    state = {}
    weights, biases = (tensors[f"{theirs}/{part}"].chunk(len(names)) for part in ("weight", "bias"))
    for name, weight, bias in zip(names, weights, biases, strict=True):
        state[f"{ours}.{name}.weight"] = weight.clone()
        if name != "k_proj":
            state[f"{ours}.{name}.bias"] = bias.clone()
    return state
