"""Heads: shapes, what padding may not change, pooling against its formula, the weighted layers."""

from __future__ import annotations

import pytest
import torch

from common.errors import GraftError
from domains.speech.heads import CTCHead, UtteranceHead

MASK = torch.tensor([[True, True, True, True], [True, True, False, False]])


@pytest.mark.parametrize("pooling", ["mean", "attention"])
@pytest.mark.parametrize("hidden", [0, 8])
@pytest.mark.parametrize("layers", [None, 3])
def test_padding_changes_nothing(pooling, hidden, layers):
    torch.manual_seed(0)
    head = UtteranceHead(6, 5, pooling=pooling, hidden=hidden, layers=layers)
    shape = (2, 4, 6) if layers is None else (2, layers, 4, 6)
    features = torch.randn(shape)
    out = head(features, MASK)
    assert out.shape == (2, 5)
    other = features.clone()
    other[1, ..., 2:, :] = float("nan")
    torch.testing.assert_close(head(other, MASK), out)
    torch.testing.assert_close(head(features[1:, ..., :2, :], MASK[1:, :2]), out[1:])


def test_the_mean_is_the_mean_over_speech():
    head = UtteranceHead(6, 5, hidden=0)
    features = torch.randn(2, 4, 6)
    expected = head.classifier(torch.stack([features[0].mean(dim=0), features[1, :2].mean(dim=0)]))
    torch.testing.assert_close(head(features, MASK), expected)


def test_attention_is_a_softmax_of_scores():
    head = UtteranceHead(6, 5, pooling="attention", hidden=0)
    features = torch.randn(2, 4, 6)
    weights = head.score(features[1, :2]).softmax(dim=0)
    expected = head.classifier((weights * features[1, :2]).sum(dim=0))
    torch.testing.assert_close(head(features, MASK)[1], expected)


def test_layers_are_weighed_equally_at_the_start_and_learn():
    head = UtteranceHead(6, 5, hidden=0, layers=3)
    features = torch.randn(2, 3, 4, 6)
    plain = UtteranceHead(6, 5, hidden=0)
    plain.classifier = head.classifier
    torch.testing.assert_close(head(features, MASK), plain(features.mean(dim=1), MASK))
    head(features, MASK).square().sum().backward()
    assert head.layer_sum.scores.grad.abs().max() > 0
    head.layer_sum.scores.data = torch.tensor([0.0, 50.0, 0.0])
    torch.testing.assert_close(head(features, MASK), plain(features[:, 1], MASK))


def test_ctc_maps_each_feature():
    head = CTCHead(6, 9)
    features = torch.randn(2, 4, 6)
    assert head(features).shape == (2, 4, 9)
    torch.testing.assert_close(head(features)[1, 2], head(features[1, 2]))


def test_heads_that_do_not_fit_are_refused():
    with pytest.raises(GraftError, match="Unknown pooling 'max'"):
        UtteranceHead(6, 5, pooling="max")
    with pytest.raises(GraftError, match="hidden is -1"):
        UtteranceHead(6, 5, hidden=-1)
    with pytest.raises(GraftError, match="layers is 0"):
        UtteranceHead(6, 5, layers=0)
    with pytest.raises(GraftError, match=r"weighs 3 layers and was given features of shape \(2, 4, 6\)"):
        UtteranceHead(6, 5, layers=3)(torch.randn(2, 4, 6), MASK)
