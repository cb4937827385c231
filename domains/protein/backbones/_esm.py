"""The ESM models: their published sizes, fair-esm's own checkpoints, and the network of transformers that runs them.

fair-esm's files are run by transformers' network too: its attention calls every layer as a module, where fair-esm's
attention in ESM-1b and ESM-1v reads the weights past any adapter.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from common.errors import GraftError

if TYPE_CHECKING:
    from transformers import EsmConfig

VOCABULARY, PAD_ID, MASK_ID = 33, 1, 32


@dataclass(frozen=True, kw_only=True)
class EsmSize:
    """The architecture of an ESM model.

    Attributes:
        layers: Number of blocks.
        width: Channels of its features.
        heads: Attention heads.
        positions: Longest input in tokens, of a model that learns its positions; None for rotary positions.
        norm_before: Whether the embeddings are normalised.
        token_dropout: Whether embeddings are scaled by the share of hidden tokens, and theirs set to zero.
    """

    layers: int
    width: int
    heads: int
    positions: int | None = None
    norm_before: bool = False
    token_dropout: bool = True

    def config(self) -> EsmConfig:
        """Return the configuration of transformers, whose own defaults are none of these models'."""
        from transformers import EsmConfig

        return EsmConfig(
            vocab_size=VOCABULARY,
            pad_token_id=PAD_ID,
            mask_token_id=MASK_ID,
            hidden_size=self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            intermediate_size=4 * self.width,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            # Learned positions are counted from behind the padding's id.
            max_position_embeddings=(self.positions or 1024) + PAD_ID + 1,
            position_embedding_type="absolute" if self.positions else "rotary",
            layer_norm_eps=1e-5,
            emb_layer_norm_before=self.norm_before,
            token_dropout=self.token_dropout,
        )


_1B = EsmSize(layers=33, width=1280, heads=20, positions=1024, norm_before=True)
_1V = EsmSize(layers=33, width=1280, heads=20, positions=1024)
ESM: Mapping[str, EsmSize] = MappingProxyType(
    {
        "esm2_t6_8M_UR50D": EsmSize(layers=6, width=320, heads=20),
        "esm2_t12_35M_UR50D": EsmSize(layers=12, width=480, heads=20),
        "esm2_t30_150M_UR50D": EsmSize(layers=30, width=640, heads=20),
        "esm2_t33_650M_UR50D": EsmSize(layers=33, width=1280, heads=20),
        "esm2_t36_3B_UR50D": EsmSize(layers=36, width=2560, heads=40),
        "esm2_t48_15B_UR50D": EsmSize(layers=48, width=5120, heads=40),
        "esm1b_t33_650M_UR50S": _1B,
        **{f"esm1v_t33_650M_UR90S_{number}": _1V for number in range(1, 6)},
    }
)
"""The published ESM models; the hub has each under `facebook/NAME`."""


def random_esm(config: EsmConfig) -> tuple[nn.Module, nn.Module]:
    """Build a network with random weights; return it without its output layer, and that layer."""
    from transformers import EsmForMaskedLM

    return take_apart(EsmForMaskedLM(config).eval())


def take_apart(model: Any) -> tuple[nn.Module, nn.Module]:  # noqa: ANN401  (EsmForMaskedLM)
    """Split a masked language model into its encoder and its output layer, each with weights of its own.

    The encoder's predictor of contacts goes: no feature depends on it, so nothing in it could be trained.
    """
    encoder, output = model.esm, model.lm_head
    output.decoder.weight = nn.Parameter(encoder.embeddings.word_embeddings.weight.detach().clone())
    encoder.contact_head = None
    return encoder, output


@dataclass(frozen=True, kw_only=True)
class FairEsm:
    """What a checkpoint of fair-esm holds.

    Attributes:
        size: The architecture.
        encoder: Weights under the names of transformers' `EsmModel`.
        output: Weights under the names of its language model's output layer.
    """

    size: EsmSize
    encoder: Mapping[str, Tensor]
    output: Mapping[str, Tensor]


def read_fair_esm(path: Path) -> FairEsm:
    """Read an ESM-2, ESM-1b or ESM-1v checkpoint as fair-esm publishes it.

    Nothing in it is run: besides tensors and plain containers, only `argparse.Namespace`, in which it keeps its
    arguments, is allowed.

    Args:
        path: The `.pt` file.

    Raises:
        GraftError: No such file, one that is damaged or would run code, or another architecture.
    """
    if not path.is_file():
        raise GraftError(f"There is no weights file {path}. Give a .pt file of fair-esm.")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            data = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle fails in any of a dozen ways
        raise GraftError(
            f"{path} cannot be read: it is damaged, or holds more than tensors and arguments, which Graft never loads."
        ) from error
    size = _size(path, data)
    encoder: dict[str, Tensor] = {}
    output: dict[str, Tensor] = {}
    for name, tensor in data["model"].items():
        found = _rename(re.sub(r"^(encoder\.)?(sentence_encoder\.)?", "", name))
        if found is None:
            raise GraftError(f"{path} holds a tensor '{name}' that no ESM-2, ESM-1b or ESM-1v has. Give one of these.")
        part, key = found
        if part:
            (encoder if part == "encoder" else output)[key] = tensor.float()
    return FairEsm(size=size, encoder=encoder, output=output)


def _size(path: Path, data: Any) -> EsmSize:  # noqa: ANN401
    """Read the architecture off a checkpoint's arguments."""
    try:
        old = "args" in data
        arguments = vars(data["args"] if old else data["cfg"]["model"])
        arguments = {name.rpartition("encoder_")[2]: value for name, value in arguments.items()}
        architecture = arguments.get("arch") if old else "ESM-2"
        if old and architecture != "roberta_large":
            raise GraftError(
                f"{path} is of the architecture '{architecture}', which transformers has not. Give an ESM-2, ESM-1b or "
                "ESM-1v checkpoint."
            )
        return EsmSize(
            layers=arguments["layers"],
            width=arguments["embed_dim"],
            heads=arguments["attention_heads"],
            positions=arguments["max_positions"] if old else None,
            norm_before=any("emb_layer_norm_before" in name for name in data["model"]),
            token_dropout=bool(arguments.get("token_dropout", False)),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise GraftError(f"{path} is no checkpoint of fair-esm (missing: {error}). Give its .pt file.") from error


_BLOCK = {
    "self_attn.q_proj": "attention.self.query",
    "self_attn.k_proj": "attention.self.key",
    "self_attn.v_proj": "attention.self.value",
    "self_attn.out_proj": "attention.output.dense",
    "self_attn_layer_norm": "attention.LayerNorm",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
    "final_layer_norm": "LayerNorm",
}
_REST = {
    "embed_tokens.weight": ("encoder", "embeddings.word_embeddings.weight"),
    "embed_positions.weight": ("encoder", "embeddings.position_embeddings.weight"),
    **{f"emb_layer_norm_before.{part}": ("encoder", f"embeddings.layer_norm.{part}") for part in ("weight", "bias")},
    **{
        f"emb_layer_norm_after.{part}": ("encoder", f"encoder.emb_layer_norm_after.{part}")
        for part in ("weight", "bias")
    },
    **{f"lm_head.{name}": ("output", name) for name in ("dense.weight", "dense.bias", "bias")},
    **{f"lm_head.layer_norm.{part}": ("output", f"layer_norm.{part}") for part in ("weight", "bias")},
    "lm_head.weight": ("output", "decoder.weight"),
    "contact_head.regression.weight": ("", ""),
    "contact_head.regression.bias": ("", ""),
}


def _rename(name: str) -> tuple[str, str] | None:
    """Return the part and the name under transformers, ("", "") for what is not taken over, None for the unknown."""
    if name in _REST:
        return _REST[name]
    match = re.fullmatch(r"layers\.(\d+)\.(.+)\.(weight|bias|inv_freq)", name)
    if match is None:
        return None
    index, layer, part = match.groups()
    if layer == "self_attn.rot_emb":
        # All blocks hold the same frequencies, rounded where the checkpoint was; transformers holds them once.
        return ("encoder", "rotary_embeddings.inv_freq") if index == "0" else ("", "")
    return ("encoder", f"encoder.layer.{index}.{_BLOCK[layer]}.{part}") if layer in _BLOCK else None
