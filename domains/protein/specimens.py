"""Tiny protein networks with random weights, on which `graft matrix` tries every method."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from common.matrix import Specimen
from common.roles import NORMS, Family, Pattern
from domains.protein._alphabet import PAD
from domains.protein.backbones import LanguageModelHead, ProteinBackbone, build, residue_features
from domains.protein.backbones._esm import EsmSize
from domains.protein.backbones._huggingface import esm_encoder
from domains.protein.backbones._unirep import COLUMNS, UniRep

CLASSES = 3
SIZES: Mapping[str, EsmSize] = MappingProxyType(
    {
        "esm2": EsmSize(layers=2, width=16, heads=4),
        "esm1b": EsmSize(layers=2, width=16, heads=4, positions=20, norm_before=True),
    }
)
_LAYER = r"layers\.\d+"
# fair-esm's own network, as somebody brings it who has one already; Graft's backbones run its weights in
# transformers' network.
FAIR_ESM = Family(
    name="fair-esm",
    block=_LAYER,
    roles={
        "attention_qkv": (Pattern(rf"{_LAYER}\.self_attn\.(q|k|v)_proj", (nn.Linear,)),),
        "attention_out": (Pattern(rf"{_LAYER}\.self_attn\.out_proj", (nn.Linear,)),),
        "ffn_in": (Pattern(rf"{_LAYER}\.fc1", (nn.Linear,)),),
        "ffn_out": (Pattern(rf"{_LAYER}\.fc2", (nn.Linear,)),),
        "norm": (Pattern(rf"{_LAYER}\.\w+|emb_layer_norm_after", NORMS),),
        "embed": (Pattern(r"embed_tokens", (nn.Embedding,)),),
    },
)


def esm2() -> Specimen:
    """Build transformers' ESM-2 with a classification head behind it, as a task has one."""
    built = tiny_esm(EsmSize(layers=2, width=64, heads=4), std=0.15)
    generator = torch.Generator().manual_seed(3)
    head = torch.randn(CLASSES, 64, generator=generator) / 8

    def classify(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:  # noqa: ANN401
        return nn.functional.linear(residue_features(built, model, *batch).mean(dim=1), head)

    return _specimen("ESM-2", built, classify, engine=4)


def fair_esm2() -> Specimen:
    """Build fair-esm's own ESM-2, without the two output layers that no feature depends on."""
    from esm.model.esm2 import ESM2

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = ESM2(num_layers=2, embed_dim=64, attention_heads=4)
        model.contact_head, model.lm_head = nn.Identity(), nn.Identity()
        spread(model, std=0.15)
    ids = torch.randint(4, 24, (2, 10), generator=torch.Generator().manual_seed(1))
    ids[:, 0], ids[:, -1] = model.cls_idx, model.eos_idx

    def run(network: Any, tokens: Tensor) -> Tensor:  # noqa: ANN401
        return network(tokens, repr_layers=[2])["representations"][2]

    return Specimen(name="fair-esm ESM-2", model=model.eval(), family=FAIR_ESM, inputs=ids, run=run)


def unirep() -> Specimen:
    """Build UniRep: two multiplicative LSTM layers."""
    built = tiny_unirep(32)
    return _specimen("UniRep", built, lambda model, batch: residue_features(built, model, *batch))


def _specimen(name: str, built: ProteinBackbone, run: Any, engine: int | None = None) -> Specimen:  # noqa: ANN401
    if built.family is None:
        raise TypeError(f"{name} belongs to no family.")
    return Specimen(name=name, model=built.model, family=built.family, inputs=proteins((9, 5)), run=run, engine=engine)


def spread(model: nn.Module, std: float) -> None:
    """Draw matrices wide enough that attention matters; transformers and fair-esm start near zero."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "embed" not in name:
            nn.init.normal_(parameter, std=std)


def tiny_esm(size: EsmSize, seed: int = 0, name: str = "esm2", std: float = 0.3) -> ProteinBackbone:
    """Build an ESM network of transformers, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        built = esm_encoder(size.config()).backbone(name)
        spread(built.model, std=std)
    return built


def tiny_unirep(width: int, seed: int = 0) -> ProteinBackbone:
    """Build a UniRep of two layers, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        built = build("unirep-256", pretrained=False)
        head = LanguageModelHead(nn.Linear(width, COLUMNS), built.tokenizer, shift=-1)
        model = UniRep(width, 2).eval()
    return dataclasses.replace(built, name="unirep", model=model, width=width, layers=2, lm_head=head.eval())


def proteins(lengths: tuple[int, ...] = (9, 5, 1), seed: int = 0, letters: int = 20) -> tuple[Tensor, Tensor]:
    """Return residues (B, L) and mask (B, L) of random proteins."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(0, letters, (length,), generator=generator) for length in lengths]
    residues = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    return residues, residues != PAD
