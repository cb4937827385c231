"""From residues, which know no backbone, to the ids that a backbone reads, and from its logits back to letters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.errors import GraftError
from domains.protein._alphabet import ALPHABET, PAD

MASK = PAD + 1
"""The residue that hides a letter from a masked language model; behind PAD, so that it is no letter."""

# The logit of a letter that a backbone does not know. Finite in half precision, so that 0 * log 0 is 0 and not NaN.
NEVER = -1e4

_ESM = "LAGVSERTIDPKQNFYMHWCXBUZO"
_UNIREP = "MRHKDESTNQCUGPAVIFYWLOX"


@dataclass(frozen=True, kw_only=True)
class TokenMap:
    """How a backbone spells a protein.

    Attributes:
        ids: The backbone's id of each letter of `ALPHABET`, in its order.
        missing: Letters that the backbone has no symbol of its own for; it reads its unknown symbol instead.
        pad: Id of the padding.
        start: Id of the token before the first residue; None where there is none.
        stop: Id of the token behind the last residue; None where there is none.
        mask: Id of the token that hides a residue; None where there is none.
    """

    ids: tuple[int, ...]
    missing: str
    pad: int
    start: int | None = None
    stop: int | None = None
    mask: int | None = None

    def encode(self, residues: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Spell a batch for the backbone.

        Args:
            residues: (B, L), positions in `ALPHABET`, `MASK`, or `PAD` behind the end.
            mask: (B, L) bool, True at residues, which stand before all padding.

        Returns:
            Ids (B, T) and where they are no padding (B, T) bool; T is L and one for each of start and stop.

        Raises:
            GraftError: A hidden residue, for a backbone that has no token for it.
        """
        if self.mask is None and bool((residues == MASK).any()):
            raise GraftError(
                "This backbone reads proteins from left to right and cannot hide residues. Take a masked language "
                "model, such as esm2_t6_8M_UR50D."
            )
        hidden = self.pad if self.mask is None else self.mask
        table = torch.tensor([*self.ids, self.pad, hidden], device=residues.device)
        ids = table[residues.masked_fill(~mask, PAD)]
        ends = mask.sum(dim=1, keepdim=True)  # (B, 1)
        if self.start is not None:
            ids, ends = functional.pad(ids, (1, 0), value=self.start), ends + 1
        if self.stop is not None:
            ids = functional.pad(ids, (0, 1), value=self.pad).scatter(1, ends, self.stop)
            ends = ends + 1
        return ids, torch.arange(ids.shape[1], device=ids.device) < ends


class LanguageModelHead(nn.Module):
    """A backbone's own output layer, with its logits brought into the order of `ALPHABET`.

    Args:
        output: Maps features (..., width) to logits of the backbone's symbols (..., V).
        tokens: How the backbone spells.
        shift: The column of `output` that belongs to id 0.
    """

    columns: Tensor
    absent: Tensor

    def __init__(self, output: nn.Module, tokens: TokenMap, shift: int = 0) -> None:
        super().__init__()
        self.output = output
        columns = [index + shift for index in tokens.ids]
        self.register_buffer("columns", torch.tensor(columns), persistent=False)
        absent = [letter in tokens.missing for letter in ALPHABET]
        self.register_buffer("absent", torch.tensor(absent), persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        """Map features (..., width) to logits (..., len(ALPHABET)).

        Letters without a symbol get -1e4, so they are never predicted and must not be asked for as targets.
        """
        return self.output(features)[..., self.columns].masked_fill(self.absent, NEVER)


def esm_tokens() -> TokenMap:
    """Return the map of every ESM model from ESM-1b on, which reads J as its unknown symbol."""
    unknown, first = 3, 4
    ids = tuple(_ESM.index(letter) + first if letter in _ESM else unknown for letter in ALPHABET)
    missing = "".join(letter for letter in ALPHABET if letter not in _ESM)
    return TokenMap(ids=ids, missing=missing, start=0, pad=1, stop=2, mask=32)


def unirep_tokens() -> TokenMap:
    """Return the map of UniRep, which reads Z, B and J as X. Its stop symbol is left out: no feature is read there."""
    ids = tuple(_UNIREP.index(letter if letter in _UNIREP else "X") + 1 for letter in ALPHABET)
    missing = "".join(letter for letter in ALPHABET if letter not in _UNIREP)
    return TokenMap(ids=ids, missing=missing, pad=0, start=24)


def map_vocabulary(
    name: str,
    vocabulary: dict[str, int],
    *,
    pad: int | None,
    start: int | None,
    stop: int | None,
    mask: int | None,
) -> TokenMap:
    """Map letters by a vocabulary of single letters, plain or with the word mark of SentencePiece.

    Args:
        name: What to call the backbone in an error.
        vocabulary: Symbol to id.
        pad: Id of the padding.
        start: Id of the token before the first residue, or None.
        stop: Id of the token behind the last residue, or None.
        mask: Id of the token that hides a residue, or None.

    Raises:
        GraftError: It does not spell proteins letter by letter.
    """
    known = {letter: vocabulary.get(f"▁{letter}", vocabulary.get(letter)) for letter in ALPHABET}
    needed: Sequence[str] = [letter for letter in (*ALPHABET[:20], "X") if known[letter] is None]
    if needed or pad is None:
        lacking = ", ".join([*needed, *(["padding"] if pad is None else [])])
        raise GraftError(
            f"'{name}' does not spell proteins letter by letter: its vocabulary has no {lacking}. Take a protein "
            "model, such as esm2_t6_8M_UR50D."
        )
    found = {letter: index for letter, index in known.items() if index is not None}
    return TokenMap(
        ids=tuple(found.get(letter, found["X"]) for letter in ALPHABET),
        missing="".join(letter for letter in ALPHABET if letter not in found),
        pad=pad,
        start=start,
        stop=stop,
        mask=mask,
    )
