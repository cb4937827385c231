"""Tiny protein networks with random weights, and batches of random proteins."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from domains.protein._alphabet import PAD
from domains.protein.backbones import LanguageModelHead, build
from domains.protein.backbones._esm import EsmSize
from domains.protein.backbones._huggingface import esm_encoder
from domains.protein.backbones._unirep import COLUMNS, UniRep

WIDTH = {"esm2": 16, "esm1b": 16, "unirep": 6}
SIZES = {
    "esm2": EsmSize(layers=2, width=16, heads=4),
    "esm1b": EsmSize(layers=2, width=16, heads=4, positions=20, norm_before=True),
}


def tiny(key, seed=0):
    """A backbone of two blocks, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if key != "unirep":
            built = esm_encoder(SIZES[key].config()).backbone(key)
            for name, parameter in built.model.named_parameters():
                # transformers starts so near to zero that attention hardly matters.
                if parameter.ndim > 1 and "embeddings" not in name:
                    nn.init.normal_(parameter, std=0.3)
            return built
        built = build("unirep-256", pretrained=False)
        head = LanguageModelHead(nn.Linear(WIDTH[key], COLUMNS), built.tokenizer, shift=-1)
        model = UniRep(WIDTH[key], 2).eval()
        return dataclasses.replace(built, name=key, model=model, width=WIDTH[key], layers=2, lm_head=head.eval())


def proteins(lengths=(9, 5, 1), seed=0, letters=20):
    """Residues (B, L) and mask (B, L) of random proteins."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(0, letters, (length,), generator=generator) for length in lengths]
    residues = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    return residues, residues != PAD
