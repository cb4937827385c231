"""Protein backbones: UniRep, ESM and other language models of proteins, with the roles of their modules."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from common.errors import GraftError, unknown
from common.starters import load_starter, starter_file
from domains.protein.backbones._backbone import ProteinBackbone, lm_features, lm_logits, residue_features
from domains.protein.backbones._esm import ESM, EsmSize, read_fair_esm
from domains.protein.backbones._families import UNIREP
from domains.protein.backbones._huggingface import Encoder, esm_encoder, load_encoder
from domains.protein.backbones._tokens import MASK, LanguageModelHead, TokenMap, unirep_tokens
from domains.protein.backbones._unirep import COLUMNS, SIZES, UniRep, read_unirep
from domains.protein.starters import STARTERS

__all__ = [
    "MASK",
    "LanguageModelHead",
    "ProteinBackbone",
    "TokenMap",
    "build",
    "lm_features",
    "lm_logits",
    "residue_features",
]

_HUB = "facebook/"


def build(
    name: str, *, pretrained: bool = True, weights: str | None = None, layers: int | None = None
) -> ProteinBackbone:
    """Build a backbone.

    Args:
        name: `unirep-256` or `unirep-1900`; a starter of the catalog (`esm2-graft`); a published ESM model
            (`esm2_t6_8M_UR50D`); a `.pt` file of fair-esm; or a local folder or hub name (`OWNER/NAME`) of an ESM, BERT
            or T5 encoder of proteins.
        pretrained: Load weights; False gives random ones (tests, from-scratch baselines).
        weights: A local file or folder with the weights of the named backbone: for UniRep a `.npz`, for a starter a
            `.safetensors`, for ESM a folder of transformers or a `.pt` of fair-esm.
        layers: Keep only the first so many blocks. A pretrained backbone that is cut has no language model any more.

    Raises:
        GraftError: An unknown name, weights that cannot be had or do not fit, or a number of layers out of range.
    """
    name = name.removeprefix(_HUB) if name.removeprefix(_HUB) in ESM else name
    if weights is not None and not pretrained:
        raise GraftError(f"'weights' is {weights} and pretrained is false. Leave one of them out.")
    if name in SIZES:
        built = _build_unirep(name, pretrained=pretrained, weights=weights)
    elif name in STARTERS:
        built = _build_starter(name, pretrained=pretrained, weights=weights)
    elif name in ESM:
        built = _build_esm(name, pretrained=pretrained, weights=weights)
    elif weights is not None:
        raise GraftError(f"'{name}' brings its own weights. Leave out 'weights', or name one of: {_offer()}.")
    elif name.endswith(".pt"):
        built = _build_fair_esm(name, Path(name), pretrained=pretrained).backbone(name)
    elif Path(name).is_dir() or name.count("/") == 1:
        built = load_encoder(name, pretrained=pretrained).backbone(name)
    else:
        raise unknown("protein backbone", name, (*SIZES, *STARTERS, *ESM, "FILE.pt", "FOLDER", "OWNER/NAME"))
    return built if layers is None else _cut(built, layers, pretrained=pretrained)


def _offer() -> str:
    return ", ".join((*SIZES, *STARTERS, *ESM))


def _build_unirep(name: str, *, pretrained: bool, weights: str | None) -> ProteinBackbone:
    size, tokens = SIZES[name], unirep_tokens()
    model, output = UniRep(size.width, size.layers), nn.Linear(size.width, COLUMNS)
    if pretrained:
        backbone_state, output_state = read_unirep(name, Path(weights) if weights else None)
        model.load_state_dict(backbone_state)
        output.load_state_dict(output_state)
    return ProteinBackbone(
        name=name,
        model=model.eval(),
        family=UNIREP,
        width=size.width,
        layers=size.layers,
        tokenizer=tokens,
        lm_head=LanguageModelHead(output, tokens, shift=-1).eval(),
        causal=True,
    )


def _build_starter(name: str, *, pretrained: bool, weights: str | None) -> ProteinBackbone:
    starter = STARTERS[name]
    size = EsmSize(layers=starter.layers, width=starter.width, heads=starter.heads)
    built = esm_encoder(size.config()).backbone(name)
    if pretrained:
        path = Path(weights) if weights else starter_file(name)
        file = load_starter(path)
        _fill(built.model, file.backbone, str(path))
        if built.lm_head is not None:
            _fill(built.lm_head, file.head, str(path))
    return built


def _build_esm(name: str, *, pretrained: bool, weights: str | None) -> ProteinBackbone:
    if not pretrained:
        return esm_encoder(ESM[name].config()).backbone(_HUB + name)
    if weights is not None and weights.endswith(".pt"):
        return _build_fair_esm(name, Path(weights), pretrained=True, size=ESM[name]).backbone(_HUB + name)
    if weights is not None and not Path(weights).is_dir():
        raise GraftError(f"There is no folder {weights}. Give one of transformers, or a .pt file of fair-esm.")
    encoder = load_encoder(weights or _HUB + name, pretrained=True, size=ESM[name])
    return encoder.backbone(_HUB + name)


def _build_fair_esm(name: str, path: Path, *, pretrained: bool, size: EsmSize | None = None) -> Encoder:
    found = read_fair_esm(path)
    if size is not None and found.size != size:
        raise GraftError(f"{path} is of {found.size}, and '{name}' is of {size}. Give the weights of this backbone.")
    encoder = esm_encoder(found.size.config())
    if pretrained:
        _fill(encoder.model, found.encoder, str(path))
        if encoder.output is not None:
            _fill(encoder.output, found.output, str(path))
    return encoder


def _fill(module: nn.Module, state: Any, source: str) -> None:  # noqa: ANN401  (name to tensor)
    """Load a state dict that has to be whole; rotary frequencies follow from the architecture where it has none."""
    own = module.state_dict()
    state = {name: own[name] for name in own if name.endswith("rotary_embeddings.inv_freq")} | dict(state)
    wrong = sorted(set(own) ^ set(state)) or [key for key in own if own[key].shape != state[key].shape]
    if wrong:
        shapes = [_shape(side, wrong[0]) for side in (state, own)]
        raise GraftError(
            f"{source} does not fit: {len(wrong)} tensors differ, such as {wrong[0]} ({shapes[0]} in the file, "
            f"{shapes[1]} here). Give the weights of this backbone."
        )
    module.load_state_dict(state)


def _shape(state: dict[str, Tensor], name: str) -> str:
    return str(tuple(state[name].shape)) if name in state else "missing"


def _cut(built: ProteinBackbone, layers: int, *, pretrained: bool) -> ProteinBackbone:
    """Take the last blocks off."""
    if not 1 <= layers <= built.layers:
        raise GraftError(f"layers={layers}: '{built.name}' has {built.layers} blocks; give 1 to {built.layers}.")
    model: Any = built.model
    if built.causal:
        model.layers = model.layers[:layers]
    elif hasattr(model.encoder, "block"):
        model.encoder.block = model.encoder.block[:layers]
    else:
        model.encoder.layer = model.encoder.layer[:layers]
    # The output layer reads what the last block writes, so it fits a cut network only where nothing was learnt yet.
    head = None if pretrained and layers < built.layers else built.lm_head
    return dataclasses.replace(built, layers=layers, lm_head=head)
