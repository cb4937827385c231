"""Heads: their formulas, padding, symmetry, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from common.errors import GraftError
from domains.protein.backbones import residue_features
from domains.protein.heads import PairHead, Pool, PooledProteinHead, PositionHead, ResidueHead
from tests.domains.protein.nets import proteins, tiny

WIDTH = 6


def made(lengths=(5, 2, 1), seed=0):
    """Random features (B, L, C), not zero at padding, and their mask."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return torch.randn(len(lengths), max(lengths), WIDTH, generator=generator), mask


def test_the_mean_is_over_the_residues():
    features, mask = made()
    expected = torch.stack([row[kept].mean(0) for row, kept in zip(features, mask, strict=True)])
    torch.testing.assert_close(Pool(WIDTH, "mean")(features, mask), expected)


def test_attention_is_a_mean_by_the_softmax_of_the_scores():
    torch.manual_seed(0)
    features, mask = made()
    pool = Pool(WIDTH, "attention")
    for row, kept, pooled in zip(features, mask, pool(features, mask), strict=True):
        scores = row[kept] @ pool.score.weight[0] + pool.score.bias
        weights = scores.exp() / scores.exp().sum()
        torch.testing.assert_close(pooled, weights @ row[kept])


def test_cls_is_the_start_token():
    features, mask = made()
    with_start = torch.cat((torch.full((3, 1, WIDTH), 7.0), features), dim=1)
    assert (Pool(WIDTH, "cls")(with_start, mask) == 7).all()
    with pytest.raises(GraftError, match="needs the features of the start token"):
        Pool(WIDTH, "cls")(features, mask)


@pytest.mark.parametrize("pooling", ["mean", "cls", "attention"])
def test_cls_and_the_others_pool_what_a_backbone_gives(pooling):
    built = tiny("esm2")
    residues, mask = proteins()
    features = residue_features(built, built.model, residues, mask, start=pooling == "cls")
    assert PooledProteinHead(built.width, 3, pooling=pooling)(features, mask).shape == (3, 3)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("pooling", ["mean", "attention"])
def test_padding_changes_nothing(pooling, kind):
    features, mask = made()
    other = torch.where(mask[..., None], features, 1e3)
    longer = functional.pad(other, (0, 0, 0, 4), value=-1e3)
    head = PooledProteinHead(WIDTH, 2, pooling=pooling, kind=kind, hidden=5)
    expected = head(features, mask)
    assert torch.equal(head(other, mask), expected)
    torch.testing.assert_close(head(longer, functional.pad(mask, (0, 4))), expected)


def test_gradients_are_finite_and_zero_at_padding():
    features, mask = made()
    for pooling in ("mean", "attention"):
        given = features.clone().requires_grad_()
        PooledProteinHead(WIDTH, 2, pooling=pooling)(given, mask).sum().backward()
        assert torch.isfinite(given.grad).all()
        assert not given.grad[~mask].any()
        assert given.grad[mask].any(dim=1).all()


def test_a_pooled_head_is_linear_or_has_one_hidden_layer():
    features, mask = made()
    linear, mlp = PooledProteinHead(WIDTH, 2), PooledProteinHead(WIDTH, 2, kind="mlp", hidden=5)
    assert isinstance(linear.classifier, nn.Linear)
    first, _, last = mlp.classifier
    pooled = Pool(WIDTH)(features, mask)
    expected = functional.gelu(pooled @ first.weight.T + first.bias) @ last.weight.T + last.bias
    torch.testing.assert_close(mlp(features, mask), expected)
    assert first.out_features == 5


def test_positions_are_read_where_they_are():
    features, _ = made((7, 7))
    head = PositionHead(WIDTH, 3)
    positions = torch.tensor([[6, 0, 2], [1, 1, 3]])
    outputs = head(features, positions)
    for row in range(2):
        for place, position in enumerate(positions[row].tolist()):
            torch.testing.assert_close(outputs[row, place], head.classifier(features[row, position]))


def test_each_residue_is_classified_by_itself():
    features, mask = made()
    head = ResidueHead(WIDTH, 4)
    torch.testing.assert_close(head(features, mask), features @ head.classifier.weight.T + head.classifier.bias)
    assert torch.equal(head(features), head(features, mask))


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("pooling", ["mean", "attention"])
def test_a_pair_is_the_same_in_both_orders(pooling, kind):
    torch.manual_seed(0)
    first, second = made((5, 2, 1)), made((3, 8, 2), seed=1)
    head = PairHead(WIDTH, 2, pooling=pooling, kind=kind, hidden=5)
    outputs = head(*first, *second)
    assert torch.equal(outputs, head(*second, *first))
    assert not torch.allclose(outputs, head(*first, *first))


def test_a_pair_is_joined_by_sum_difference_and_product():
    first, second = made((5, 2, 1)), made((3, 8, 2), seed=1)
    head = PairHead(WIDTH, 2)
    a, b = Pool(WIDTH)(*first), Pool(WIDTH)(*second)
    joint = torch.cat((a + b, (a - b).abs(), a * b), dim=1)
    torch.testing.assert_close(head(*first, *second), joint @ head.classifier.weight.T + head.classifier.bias)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: PooledProteinHead(4, 2, pooling="max"), "Unknown pooling 'max'.*attention, cls, mean"),
        (lambda: PairHead(4, 2, kind="Linear"), "Unknown head 'Linear'. Did you mean 'linear'"),
        (lambda: PositionHead(4, 2, kind="mlp", hidden=0), "hidden is 0; give a width of at least 1"),
    ],
)
def test_what_is_not_offered_is_refused(make, named):
    with pytest.raises(GraftError, match=named):
        make()
