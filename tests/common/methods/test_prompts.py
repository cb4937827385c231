"""What the specs of prompts choose and refuse."""

from __future__ import annotations

import pytest
import torch

from common.attach import attach
from common.errors import GraftError
from common.methods import PrefixTuning, PromptTuning, VPTDeep, VPTShallow
from tests.toy import FAMILY, toy_backbone
from tests.zoo import FAMILY as ZOO
from tests.zoo import zoo

EACH = pytest.mark.parametrize("method", [VPTShallow, VPTDeep, PromptTuning, PrefixTuning])


def attached(spec):
    return attach(toy_backbone(depth=3), spec, FAMILY)


@EACH
def test_a_network_of_convolutions_is_refused(method):
    message = rf"{method.__name__} cannot act on this zoo backbone: its blocks are convolutions and read no tokens\. "
    with pytest.raises(GraftError, match=message + "Choose another method, such as LoRA"):
        attach(zoo(2), method(), ZOO)


@EACH
def test_a_length_of_nothing_is_refused(method):
    with pytest.raises(GraftError, match=rf"{method.__name__} length is 0; give a whole number of at least 1\."):
        attached(method(length=0))


@pytest.mark.parametrize("method", [VPTShallow, VPTDeep, PromptTuning])
def test_a_share_of_everything_is_refused(method):
    with pytest.raises(GraftError, match=rf"{method.__name__} dropout is 1.0; give a share in \[0, 1\)\."):
        attached(method(dropout=1.0))


@pytest.mark.parametrize("method", [VPTDeep, PrefixTuning])
@pytest.mark.parametrize(
    ("blocks", "chosen"), [("all", (0, 1, 2)), ("first:1", (0,)), ("last:2", (1, 2)), ("last:2@first:1", (1,))]
)
def test_blocks_are_chosen_by_depth(method, blocks, chosen):
    assert list(attached(method(blocks=blocks)).plan.targets) == [f"blocks.{place}" for place in chosen]


@pytest.mark.parametrize("method", [VPTDeep, PrefixTuning])
@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ("last:4", "'blocks: last:4' asks for the last '4' blocks, and 3 blocks of this toy backbone"),
        ("encoder", "'blocks: encoder' asks for 'encoder' of this toy backbone"),
    ],
)
def test_blocks_that_there_are_not_are_refused(method, blocks, message):
    with pytest.raises(GraftError, match=message):
        attached(method(blocks=blocks))


def test_prompt_tuning_starts_within_one_half():
    prompts = [p for p in attached(PromptTuning(length=200)).model.parameters() if p.requires_grad]
    assert [tuple(p.shape) for p in prompts] == [(200, 8)]
    assert 0.49 < prompts[0].abs().max() <= 0.5


def test_shallow_prompts_reach_the_last_block_and_deep_ones_their_own():
    """The gradient of what leaves the first block already shows whose prompts a later block reads."""
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    for spec, reached in ((VPTShallow(length=2, dropout=0.0), True), (VPTDeep(length=2, dropout=0.0), False)):
        result = attached(spec)
        first = result.model.base_model.model.blocks[0]
        kept = []
        first.base_layer.register_forward_hook(lambda module, args, out, kept=kept: kept.append(out))
        out = result.model(x)
        (gradient,) = torch.autograd.grad(out.square().sum(), kept[0])
        assert bool(gradient[:, 3:].any()) == reached
        assert gradient[:, :3].any()
