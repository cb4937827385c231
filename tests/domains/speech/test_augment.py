"""SpecAugment's masks: where they lie, how wide they are, and that they follow the seed."""

from __future__ import annotations

import pytest
import torch

from common.errors import GraftError
from domains.speech.backbones import SpecAugment


def runs(row):
    """Lengths of the stretches of True in a row."""
    edges = torch.diff(row.int(), prepend=torch.zeros(1, dtype=torch.int), append=torch.zeros(1, dtype=torch.int))
    return ((edges == -1).nonzero() - (edges == 1).nonzero()).flatten().tolist()


def test_masks_lie_within_the_utterance_and_are_as_wide_as_may_be():
    masks = SpecAugment(time_masks=1, time_share=0.25, band_masks=1, band_share=0.5)
    lengths = torch.tensor([80, 40, 3, 1]).repeat(200)
    torch.manual_seed(0)
    time, bands = masks.masks(lengths, 80, 10)
    assert (time.shape, bands.shape) == ((800, 80), (800, 10))
    widths = {length: set() for length in lengths.tolist()}
    for length, row in zip(lengths.tolist(), time, strict=True):
        assert not row[length:].any()
        widths[length] |= set(runs(row) or [0])
    assert widths == {80: set(range(21)), 40: set(range(11)), 3: {0}, 1: {0}}
    assert {width for row in bands for width in runs(row) or [0]} == set(range(6))
    starts = {int(row.nonzero()[0]) for row in bands if row.sum() == 5}
    assert starts == set(range(6))


def test_the_same_seed_hides_the_same_and_no_masks_hide_nothing():
    lengths = torch.tensor([50, 30])
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(torch.cat(SpecAugment(time_share=0.5).masks(lengths, 50, 50)))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert not torch.cat(SpecAugment(time_masks=0, band_masks=0).masks(lengths, 50, 50)).any()


def test_values_out_of_range_are_all_named():
    SpecAugment().check()
    with pytest.raises(GraftError, match=r"time_masks is -1 .*band_share is 1\.5 \(from 0 to 1\)"):
        SpecAugment(time_masks=-1, band_share=1.5).check()
