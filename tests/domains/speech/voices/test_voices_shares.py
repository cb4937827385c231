"""Shares of a change: parameters on their way, and the share that is chosen."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from common.errors import GraftError
from domains.speech._share import Share
from domains.speech.shares import best_share


def test_parameters_go_to_their_share_and_back():
    layer = nn.Linear(2, 2)
    start = layer.weight.detach().clone()
    share = Share(dict(layer.named_parameters()), 0.25)
    nn.init.constant_(layer.weight, 5.0)
    share.enter()
    share.enter()  # a second time changes nothing
    torch.testing.assert_close(layer.weight.detach(), start + 0.25 * (5.0 - start))
    assert share.entered
    share.leave()
    assert torch.equal(layer.weight, torch.full((2, 2), 5.0))
    assert not share.entered


def test_the_nearest_voice_that_keeps_its_words_is_chosen():
    rows = [
        {"share": share, "wer": wer, "speaker_similarity": cosine}
        for share, wer, cosine in ((0.0, 0.02, 0.4), (0.5, 0.04, 0.55), (0.7, 0.06, 0.6), (1.0, 0.14, 0.7))
    ]
    assert best_share(rows) == 0.7
    assert best_share(rows, most_words=0.2) == 1.0
    assert best_share(rows, most_words=0.0) == 0.0
    with pytest.raises(GraftError, match="share 0"):
        best_share(rows[1:])
