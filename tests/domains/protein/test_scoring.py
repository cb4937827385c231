"""Mutations scored by a language model, against one pass a mutation written out here."""

from __future__ import annotations

import pytest
import torch

from common.errors import GraftError
from common.methods import LinearProbe
from domains.protein._alphabet import ALPHABET, encode
from domains.protein.backbones import MASK, build, lm_logits
from domains.protein.residue_tasks import MaskedLM
from domains.protein.scoring import score_mutations
from tests.domains.protein.conftest import ESM, UNIREP, data_of, task_of

pytestmark = pytest.mark.usefixtures("tiny")

WILD = "MKTAYIAKQR"
MUTATIONS = ["M1A", "A4V", "A4W", "R10K", "A4V:Y5F", "k2r", "Y5F:A4V", "A4A"]


def random_backbone(name):
    torch.manual_seed(0)
    return build(name, pretrained=False)


def logs(built, residues):
    mask = torch.ones(1, len(residues), dtype=torch.bool)
    with torch.no_grad():
        return lm_logits(built, built.model, residues[None], mask)[0].double().log_softmax(dim=-1)


def parse(mutation):
    parts = [part.upper() for part in mutation.split(":")]
    return [(int(part[1:-1]) - 1, ALPHABET.index(part[0]), ALPHABET.index(part[-1])) for part in parts]


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_masked_marginals_hide_all_mutated_positions(batch_size):
    built = random_backbone(ESM)
    found = score_mutations(built, built.model, WILD, MUTATIONS, batch_size=batch_size)
    for mutation, score in zip(MUTATIONS, found, strict=True):
        residues = torch.tensor(encode(WILD))
        residues[[at for at, *_ in parse(mutation)]] = MASK
        table = logs(built, residues)
        expected = sum(float(table[at, after] - table[at, before]) for at, before, after in parse(mutation))
        assert score == pytest.approx(expected, abs=1e-5)
    assert found[4] == found[6]
    assert found[7] == 0.0


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_model_that_reads_from_left_to_right_compares_whole_proteins(batch_size):
    built = random_backbone(UNIREP)
    found = score_mutations(built, built.model, WILD, MUTATIONS, batch_size=batch_size)

    def total(residues):
        return float(logs(built, residues)[torch.arange(len(residues)), residues].sum())

    for mutation, score in zip(MUTATIONS, found, strict=True):
        residues = torch.tensor(encode(WILD))
        for at, _, after in parse(mutation):
            residues[at] = after
        assert score == pytest.approx(total(residues) - total(torch.tensor(encode(WILD))), abs=1e-5)


def test_an_adapted_model_scores_too_and_keeps_its_mode():
    made = task_of(LinearProbe(), data_of("unlabelled"), MaskedLM)
    made.backbone.train()
    assert len(score_mutations(made._built, made.backbone, WILD, ["A4V"])) == 1
    assert made.backbone.training
    assert score_mutations(made._built, made.backbone, WILD, []) == []


@pytest.mark.parametrize(
    ("mutation", "message"),
    [
        ("A4", "'A4' is no mutation. Write the wild type's letter"),
        ("A4V;Y5F", "is no mutation"),
        ("A0V", "the protein has 10 residues, counted from 1"),
        ("A11V", "the protein has 10 residues"),
        ("A5V", "says A at position 5, where the protein has Y"),
        ("A4V:A4W", "changes position 4 twice"),
        ("A4J", "has no symbol for J"),
    ],
)
def test_a_mutation_that_does_not_fit_is_refused(mutation, message):
    built = random_backbone(ESM)
    with pytest.raises(GraftError, match=message):
        score_mutations(built, built.model, WILD, [mutation])
