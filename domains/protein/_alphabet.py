"""The letters of proteins: one numbering for all data, whatever numbering a backbone uses."""

from __future__ import annotations

from common.errors import GraftError

STANDARD = "ACDEFGHIKLMNPQRSTVWY"
"""The 20 amino acids of the genetic code; their positions are 0 to 19 here and in `ALPHABET`."""

ALPHABET = STANDARD + "XBZUOJ"
"""All letters: then X (any), B (D or N), Z (E or Q), U (selenocysteine), O (pyrrolysine), J (I or L)."""

PAD = len(ALPHABET)
"""Number at positions behind the end of a sequence."""

_NUMBER = {letter: position for position, letter in enumerate(ALPHABET)}
_NUMBER |= {letter.lower(): position for letter, position in _NUMBER.items()}

# A, C, G and T are amino acids too; no protein of this length is made of them alone.
_DNA_LETTERS = frozenset("ACGTUN")
_DNA_LENGTH = 20


def encode(sequence: str) -> list[int]:
    """Number the residues of a protein.

    Args:
        sequence: Letters of `ALPHABET` in either case; one `*` (stop) at the end is left out.

    Returns:
        Positions in `ALPHABET`, one a residue.

    Raises:
        GraftError: The sequence is empty or has another letter; the message names the letter and its 1-based position.
    """
    residues = sequence.removesuffix("*")
    if not residues:
        raise GraftError("The sequence is empty: give at least one residue, or leave the entry out.")
    try:
        return [_NUMBER[letter] for letter in residues]
    except KeyError:
        position = next(number for number, letter in enumerate(residues) if letter not in _NUMBER)
        raise _illegal(residues[position], position + 1) from None


def looks_like_dna(sequence: str) -> bool:
    """Tell whether a sequence is most likely DNA or RNA: at least 20 letters and none but A, C, G, T, U and N."""
    return len(sequence) >= _DNA_LENGTH and _DNA_LETTERS.issuperset(sequence.upper())


def _illegal(letter: str, position: int) -> GraftError:
    hint = {
        "-": "it is a gap: give sequences that are not aligned",
        ".": "it is a gap: give sequences that are not aligned",
        "*": "it is a stop: cut the sequence there, or write X",
    }.get(letter, "write X for a residue that is unknown")
    return GraftError(f"'{letter}' at position {position} is no amino acid ({hint}). Allowed: {ALPHABET}.")
