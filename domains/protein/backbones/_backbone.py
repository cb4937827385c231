"""What a protein backbone is, and how it is run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import GraftError
from common.task import Backbone
from domains.protein.backbones._tokens import LanguageModelHead, TokenMap


@dataclass(frozen=True, kw_only=True)
class ProteinBackbone(Backbone):
    """A network without its output layer, and what is known of it.

    Attributes:
        width: Channels of its features.
        layers: Number of its blocks.
        tokenizer: How it spells a protein.
        lm_head: Its language model's output layer, (..., width) to (..., len(ALPHABET)); None where it has none. Its
            weights are its own: a matrix that the checkpoint ties to the embedding is copied.
        causal: Whether a feature has seen no residue behind its own, so that the language model predicts the next one.
        max_length: Most residues that it can take; None where any number will do.
    """

    width: int
    layers: int
    tokenizer: TokenMap
    lm_head: LanguageModelHead | None
    causal: bool = False
    max_length: int | None = None

    @property
    def has_lm(self) -> bool:
        """Whether it has a language model's output layer."""
        return self.lm_head is not None


def residue_features(
    built: ProteinBackbone, model: nn.Module, residues: Tensor, mask: Tensor, *, start: bool = False
) -> Tensor:
    """Run a backbone.

    Args:
        built: What `build` returned.
        model: Its model, bare or with adapters.
        residues: (B, L), positions in `ALPHABET`, `MASK`, or `PAD` behind the end.
        mask: (B, L) bool, True at residues, which stand before all padding.
        start: Put the feature of the start token first, for pooling by it.

    Returns:
        (B, L, width), zero at padding; (B, 1 + L, width) with the start token.

    Raises:
        GraftError: Proteins that are too long, hidden residues or a start token for a backbone without.
    """
    tokens = built.tokenizer
    if start and (tokens.start is None or built.causal):
        raise GraftError(
            f"'{built.name}' has no start token that has seen the protein. Set pooling to 'mean' or 'attention'."
        )
    hidden = _hidden(built, model, residues, mask)
    first = 0 if tokens.start is None else 1
    features = hidden[:, first : first + residues.shape[1]]
    features = features.masked_fill(~mask.unsqueeze(2), 0.0)
    return torch.cat((hidden[:, :1], features), dim=1) if start else features


def lm_features(built: ProteinBackbone, model: nn.Module, residues: Tensor, mask: Tensor) -> Tensor:
    """Return what the language model's output layer reads, (B, L, width).

    Row i is there to predict residue i: it is the feature of residue i itself, which `MASK` may hide, or for a causal
    backbone the one of the token before. It is zero at padding.

    Args:
        built: What `build` returned.
        model: Its model, bare or with adapters.
        residues: (B, L), as in `residue_features`.
        mask: (B, L) bool.

    Raises:
        GraftError: As in `residue_features`.
    """
    if not built.causal:
        return residue_features(built, model, residues, mask)
    before = _hidden(built, model, residues, mask)[:, : residues.shape[1]]
    return before.masked_fill(~mask.unsqueeze(2), 0.0)


def lm_logits(built: ProteinBackbone, model: nn.Module, residues: Tensor, mask: Tensor) -> Tensor:
    """Return the language model's logits of the letters at each residue, (B, L, len(ALPHABET)).

    A masked language model sees the residue itself unless `MASK` hides it; a causal one sees only those before. Letters
    that the backbone has no symbol for get -1e4.

    Args:
        built: What `build` returned.
        model: Its model, bare or with adapters.
        residues: (B, L), as in `residue_features`.
        mask: (B, L) bool.

    Raises:
        GraftError: The backbone has no language model; or as in `residue_features`.
    """
    if built.lm_head is None:
        raise GraftError(
            f"'{built.name}' has no output layer of a language model. Take one that has, without 'layers', such as "
            "unirep-256 or esm2_t6_8M_UR50D."
        )
    features = lm_features(built, model, residues, mask)
    return built.lm_head.to(features.device)(features)


def _hidden(built: ProteinBackbone, model: nn.Module, residues: Tensor, mask: Tensor) -> Tensor:
    """Return the last hidden states (B, T, width) of all tokens, start and stop included."""
    if built.max_length is not None and residues.shape[1] > built.max_length:
        raise GraftError(
            f"'{built.name}' takes at most {built.max_length} residues, and a protein has {residues.shape[1]}. Lower "
            "the data's max_length."
        )
    ids, attention = built.tokenizer.encode(residues, mask)
    out: Any = model(input_ids=ids, attention_mask=attention)
    return out if isinstance(out, Tensor) else out.last_hidden_state
