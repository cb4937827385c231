"""AdapterPlus, the ReFT methods and LST: which blocks they take, and what they refuse."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from common.attach import attach
from common.errors import GraftError
from common.methods import LST, AdapterPlus, DiReFT, LoReFT, NoReFT
from tests.toy import FAMILY, Facts, ToyTask, toy_backbone
from tests.zoo import FAMILY as ZOO
from tests.zoo import zoo

RANKED = [AdapterPlus, LoReFT, NoReFT, DiReFT]


@pytest.mark.parametrize("spec", [*RANKED, LST])
def test_a_backbone_whose_blocks_hand_on_no_tokens_is_refused(spec):
    words = f"{spec.__name__} acts on the hidden states that blocks hand on, token by token, and Graft knows none of"
    with pytest.raises(GraftError, match=f"{words} this zoo backbone"):
        attach(zoo(2), spec(), ZOO)


@pytest.mark.parametrize("spec", RANKED)
def test_blocks_are_counted_from_zero(spec):
    attached = attach(toy_backbone(depth=3), spec(rank=2, blocks=[2, 0]), FAMILY)
    assert attached.plan.targets == {"blocks.0": "block", "blocks.2": "block"}
    for blocks in ([3], [-1], []):
        with pytest.raises(GraftError, match=r"has 3 that fit; give numbers from 0 to 2"):
            attach(toy_backbone(depth=3), spec(rank=2, blocks=blocks), FAMILY)


@pytest.mark.parametrize("spec", RANKED)
def test_a_rank_out_of_range_is_refused(spec):
    with pytest.raises(GraftError, match=f"{spec.__name__} rank is 0; give a whole number from 1 to 8"):
        attach(toy_backbone(), spec(rank=0), FAMILY)
    with pytest.raises(GraftError, match=r"rank is 9; give a whole number from 1 to 8, .* \(blocks.0 \(8\), blocks.1"):
        attach(toy_backbone(), spec(rank=9), FAMILY)


def test_a_number_of_first_tokens_is_at_least_one():
    with pytest.raises(GraftError, match="LoReFT first is 0; give a number of tokens from 1"):
        attach(toy_backbone(), LoReFT(rank=2, first=0), FAMILY)


def test_adapter_plus_stands_behind_the_skip_connection():
    attached = attach(toy_backbone(), AdapterPlus(rank=2, blocks=[1]), FAMILY)
    for parameter in attached.model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    attached.train(False)
    net, x = toy_backbone().eval(), torch.randn(2, 3, 4)
    layer = attached.model.base_model.model.blocks[1]
    with torch.no_grad():
        h = net.embed(net.input_norm(x.mT).mT)
        h = net.blocks[1](net.blocks[0](h + net.mix(h.mT).mT))
        down, up = layer.postadapter_down["default"], layer.postadapter_up["default"]
        h = h + layer.postadapter_scale["default"] * up(nn.functional.gelu(down(h)))
        torch.testing.assert_close(attached.model(x), net.norm(h), atol=1e-4, rtol=1e-4)


class Two(nn.Module):
    """Two stacks of blocks, of one width or of two."""

    def __init__(self, widths):
        super().__init__()
        self.first, self.second = (toy_backbone(width=width).blocks for width in widths)


def two(widths, pattern=r"(first|second)\.\d+"):
    roles = {
        "ffn_out": tuple(
            dataclasses.replace(p, name=p.name.replace(r"blocks\.\d+", pattern)) for p in FAMILY.roles["ffn_out"]
        )
    }
    return Two(widths), dataclasses.replace(FAMILY, name="two", block=pattern, stream=pattern, roles=roles)


def test_each_stack_of_blocks_has_a_ladder_of_its_own():
    plan = attach(two((8, 8))[0], LST(reduction=4), two((8, 8))[1]).plan
    assert plan.notes == (
        "LST builds 2 ladders, one for each stack of blocks; gradients pass the stacks behind the first.",
    )
    config = plan.peft_config
    assert config.previous == {"first.0": None, "first.1": "first.0", "second.0": None, "second.1": "second.0"}
    assert config.width == 2


def test_a_ladder_needs_one_width():
    with pytest.raises(GraftError, match="LST needs blocks of one width, and this backbone's have 8, 16 channels"):
        attach(two((8, 16))[0], LST(reduction=4), two((8, 16))[1])
    for reduction in (0, 9):
        with pytest.raises(GraftError, match=f"LST reduction is {reduction}; give a whole number from 1 to 8"):
            attach(toy_backbone(), LST(reduction=reduction), FAMILY)


def test_a_ladder_is_not_computed_anew():
    task = ToyTask(LST(reduction=4), gradient_checkpointing=True)
    task.facts = Facts()
    with pytest.raises(GraftError, match=r"LST keeps no activations of .* Set gradient_checkpointing to false"):
        task.assemble()
