"""Score mutations without training: how much likelier a language model finds the mutant than the wild type."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from common.errors import GraftError
from domains.protein._alphabet import ALPHABET, encode
from domains.protein.backbones import MASK, ProteinBackbone, lm_logits

_MUTATION = re.compile(rf"([{ALPHABET}])(\d+)([{ALPHABET}])")

Mutant = tuple[tuple[int, int], ...]  # position, 0-based, and residue of each exchange, by position


def score_mutations(
    built: ProteinBackbone, model: nn.Module, sequence: str, mutations: Sequence[str], *, batch_size: int = 8
) -> list[float]:
    """Score mutants of a protein; above 0 the model prefers the mutant.

    A masked language model gives the masked marginals (Meier et al. 2021, doi 10.1101/2021.07.09.450648): the sum over
    the mutated positions of log p(mutant) - log p(wild type), with all positions of the mutant hidden at once. A model
    that reads from left to right gives log p(mutant protein) - log p(wild type).

    Args:
        built: The backbone that `build` returned.
        model: Its model, bare or adapted, in eval mode.
        sequence: The wild type.
        mutations: Such as `A23V`: alanine at position 23 (from 1) becomes valine; several at once as `A23V:L30P`.
        batch_size: Proteins that go through the model at a time.

    Returns:
        One score a mutation, in nats.

    Raises:
        GraftError: A mutation that does not fit the sequence, a letter that the backbone has no symbol for, or a
            backbone without a language model.
    """
    wild = torch.tensor(encode(sequence))
    mutants = [_parse(mutation, wild, built) for mutation in mutations]
    if not mutants:
        return []
    marginals = _likelihood_ratios if built.causal else _masked_marginals
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            return marginals(built, model, wild, mutants, batch_size)
    finally:
        model.train(was_training)


def _masked_marginals(
    built: ProteinBackbone, model: nn.Module, wild: Tensor, mutants: Sequence[Mutant], batch_size: int
) -> list[float]:
    # Mutants of the same positions hide the same residues: all 19 exchanges of a position cost one pass.
    hidden = list(dict.fromkeys(tuple(at for at, _ in mutant) for mutant in mutants))
    found: dict[tuple[int, ...], Tensor] = {}
    for start in range(0, len(hidden), batch_size):
        places = hidden[start : start + batch_size]
        residues = wild.repeat(len(places), 1)
        for row, at in enumerate(places):
            residues[row, list(at)] = MASK
        logs = _log_probabilities(built, model, residues)
        found |= {at: logs[row, list(at)] for row, at in enumerate(places)}  # (positions, letters)
    scores = []
    for mutant in mutants:
        logs = found[tuple(at for at, _ in mutant)]
        gains = [logs[row, letter] - logs[row, wild[at]] for row, (at, letter) in enumerate(mutant)]
        scores.append(float(torch.stack(gains).sum()))
    return scores


def _likelihood_ratios(
    built: ProteinBackbone, model: nn.Module, wild: Tensor, mutants: Sequence[Mutant], batch_size: int
) -> list[float]:
    proteins = wild.repeat(1 + len(mutants), 1)
    for row, mutant in enumerate(mutants, start=1):
        for at, letter in mutant:
            proteins[row, at] = letter
    totals: list[float] = []
    for part in proteins.split(batch_size):
        logs = _log_probabilities(built, model, part)
        totals += logs.gather(2, part[..., None]).sum(dim=(1, 2)).tolist()
    return [total - totals[0] for total in totals[1:]]


def _log_probabilities(built: ProteinBackbone, model: nn.Module, residues: Tensor) -> Tensor:
    """Return log probabilities of the letters (B, L, len(ALPHABET)), double, on the CPU."""
    residues = residues.to(next(model.parameters()).device)
    mask = torch.ones_like(residues, dtype=torch.bool)
    return lm_logits(built, model, residues, mask).double().log_softmax(dim=-1).cpu()


def _parse(mutation: str, wild: Tensor, built: ProteinBackbone) -> Mutant:
    exchanges: dict[int, int] = {}
    for part in mutation.split(":"):
        match = _MUTATION.fullmatch(part.strip().upper())
        if match is None:
            raise GraftError(
                f"'{part}' is no mutation. Write the wild type's letter, the position from 1 and the new letter, as "
                "A23V, with ':' between several."
            )
        before, number, after = match.groups()
        at = int(number) - 1
        if not 0 <= at < len(wild):
            raise GraftError(f"Mutation '{part}': the protein has {len(wild)} residues, counted from 1.")
        if ALPHABET[wild[at]] != before:
            raise GraftError(
                f"Mutation '{part}' says {before} at position {number}, where the protein has {ALPHABET[wild[at]]}. "
                "Positions count from 1; give the wild type that the mutations were written for."
            )
        if at in exchanges:
            raise GraftError(f"Mutation '{mutation}' changes position {number} twice. Give one exchange a position.")
        lacking = [letter for letter in (before, after) if letter in built.tokenizer.missing]
        if lacking:
            raise GraftError(f"Mutation '{part}': '{built.name}' has no symbol for {lacking[0]}. Leave it out.")
        exchanges[at] = ALPHABET.index(after)
    return tuple(sorted(exchanges.items()))
