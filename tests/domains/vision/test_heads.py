"""Pooling and classification of tokens, against plain formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from common.errors import GraftError
from domains.vision.heads import AttentionPool, PooledHead

WIDTH, PREFIX, CLASSES = 6, 2, 3


@pytest.fixture
def tokens():
    return torch.randn(4, PREFIX + 9, WIDTH, generator=torch.Generator().manual_seed(0))


def head(**options):
    torch.manual_seed(1)
    return PooledHead(WIDTH, options.pop("prefix", PREFIX), CLASSES, **options)


def test_cls_takes_the_first_token(tokens):
    assert torch.equal(head(pooling="cls").pool(tokens), tokens[:, 0])


def test_mean_leaves_class_and_register_tokens_out(tokens):
    torch.testing.assert_close(head(pooling="mean").pool(tokens), tokens[:, 2:].sum(dim=1) / 9)
    torch.testing.assert_close(head(pooling="mean", prefix=0).pool(tokens), tokens.sum(dim=1) / 11)


def test_cls_mean_puts_both_side_by_side(tokens):
    expected = torch.cat([tokens[:, 0], tokens[:, 2:].mean(dim=1)], dim=1)
    torch.testing.assert_close(head(pooling="cls_mean").pool(tokens), expected)
    assert head(pooling="cls_mean").classifier.in_features == 2 * WIDTH


@pytest.mark.parametrize(("prefix", "pooling"), [(0, "mean"), (1, "cls"), (5, "cls")])
def test_auto_takes_the_class_token_where_there_is_one(prefix, pooling):
    assert head(prefix=prefix).pooling == pooling


@pytest.mark.parametrize("pooling", ["cls", "cls_mean"])
def test_a_class_token_that_is_not_there_is_refused(pooling):
    with pytest.raises(GraftError, match=f"pooling '{pooling}' needs a class token.*Use 'mean'"):
        head(pooling=pooling, prefix=0)


def test_attention_pooling_equals_a_loop(tokens):
    pool = AttentionPool(WIDTH)
    torch.nn.init.normal_(pool.query, generator=torch.Generator().manual_seed(2))
    query, key = pool.query.detach(), pool.key.weight.detach()
    expected = []
    for sample in tokens:
        scores = [float(query @ (key @ token)) / math.sqrt(WIDTH) for token in sample]
        weights = [math.exp(score - max(scores)) for score in scores]
        expected.append(sum(w / sum(weights) * token for w, token in zip(weights, sample, strict=True)))
    torch.testing.assert_close(pool(tokens), torch.stack(expected))


def test_attention_pooling_starts_as_the_mean_and_learns(tokens):
    built = head(pooling="attention")
    torch.testing.assert_close(built.pool(tokens), tokens.mean(dim=1))
    built(tokens).square().sum().backward()
    assert built.attention.query.grad.any()


def test_linear_head_is_one_matrix(tokens):
    built = head(pooling="cls")
    weight, bias = built.classifier.weight, built.classifier.bias
    torch.testing.assert_close(built(tokens), tokens[:, 0] @ weight.T + bias)
    assert sum(parameter.numel() for parameter in built.parameters()) == CLASSES * (WIDTH + 1)


def test_mlp_head_has_one_hidden_layer(tokens):
    built = head(pooling="mean", kind="mlp", hidden=5)
    first, last = built.classifier[0], built.classifier[2]
    hidden = functional.gelu(tokens[:, 2:].mean(dim=1) @ first.weight.T + first.bias)
    assert hidden.shape == (4, 5)
    torch.testing.assert_close(built(tokens), hidden @ last.weight.T + last.bias)


def test_an_unknown_head_is_refused():
    with pytest.raises(GraftError, match=r"Unknown head 'linaer'\. Did you mean 'linear'\?"):
        head(kind="linaer")
