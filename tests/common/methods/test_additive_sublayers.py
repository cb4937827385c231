"""AdaptFormer, ParallelAdapter, Convpass, Compacter, RepAdapter and InvertibleAdapter: where they stand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from common.attach import attach, probe
from common.errors import GraftError
from common.methods import AdaptFormer, Compacter, Convpass, Houlsby, InvertibleAdapter, ParallelAdapter, RepAdapter
from common.methods.additive._parallel import sub_layers
from common.roles import Family, Pattern, resolve
from tests.toy import FAMILY, toy_backbone
from tests.zoo import FAMILY as ZOO
from tests.zoo import zoo


def randomise(attached):
    for name, parameter in attached.model.named_parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
    attached.train(False)


def test_a_parallel_adapter_reads_what_the_sub_layer_reads():
    """The whole backbone by hand: f(LN h) + s * adapter(LN h), as in figure 3 of He et al."""
    attached = attach(toy_backbone(), ParallelAdapter(on=["attention", "ffn"], width=3, scale=2.0), FAMILY)
    assert list(attached.plan.targets.items()) == [
        (f"blocks.{i}.{name}", role) for i in (0, 1) for name, role in (("out", "attention_out"), ("fc2", "ffn_out"))
    ]
    randomise(attached)
    net, x = toy_backbone().eval(), torch.randn(2, 3, 4)

    def adapter(name, read):
        layer = attached.model.get_submodule(f"base_model.model.{name}")
        down, up = layer.padapter_down["default"], layer.padapter_up["default"]
        return 2.0 * (torch.relu(read @ down.weight.T + down.bias) @ up.weight.T + up.bias)

    with torch.no_grad():
        h = net.embed(net.input_norm(x.mT).mT)
        h = h + net.mix(h.mT).mT
        for i, block in enumerate(net.blocks):
            read = block.norm1(h)
            q, k, v = block.qkv(read).chunk(3, dim=-1)
            h = h + block.out((q @ k.mT / 8**0.5).softmax(-1) @ v) + adapter(f"blocks.{i}.out", read)
            read = block.norm2(h)
            h = h + block.fc2(torch.relu(block.fc1(read))) + adapter(f"blocks.{i}.fc2", read)
        torch.testing.assert_close(attached.model(x), net.norm(h), atol=1e-4, rtol=1e-4)


def test_any_layer_of_a_sub_layer_stands_for_it():
    for on in (["ffn"], ["ffn_in"], ["ffn_out"], ["ffn_in", "ffn_out@last:1", "ffn@first:1"]):
        assert list(attach(toy_backbone(), AdaptFormer(on=on), FAMILY).plan.targets) == ["blocks.0.fc2", "blocks.1.fc2"]
    assert list(attach(toy_backbone(), AdaptFormer(on=["ffn@last:1"]), FAMILY).plan.targets) == ["blocks.1.fc2"]


class Attention(nn.Module):
    """Keys and values of another sequence than the queries', defined first, and a gated feed-forward network."""

    def __init__(self):
        super().__init__()
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (nn.Linear(4, 4) for _ in range(4))
        self.gate, self.wide, self.narrow = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x, other):
        weights = (self.q_proj(x) @ self.k_proj(other).mT).softmax(-1)
        x = x + self.out_proj(weights @ self.v_proj(other))
        return x + self.narrow(torch.relu(self.gate(x)) * self.wide(x))


def cross(names="[kvq]_proj"):
    return Family(
        name="cross",
        block=r"\d+",
        roles={
            "attention_qkv": (Pattern(rf"\d+\.{names}", (nn.Linear,)),),
            "attention_out": (Pattern(r"\d+\.out_proj", (nn.Linear,)),),
            "ffn_in": (Pattern(r"\d+\.(gate|wide)", (nn.Linear,)),),
            "ffn_out": (Pattern(r"\d+\.narrow", (nn.Linear,)),),
        },
    )


def test_beside_attention_it_reads_the_queries_sequence():
    net = nn.ModuleList([Attention(), Attention()])
    known = sub_layers(resolve(net, cross()))
    assert known["0.out_proj"] == ["0.q_proj", "0.k_proj", "0.v_proj"]
    assert known["1.narrow"] == ["1.gate", "1.wide"]
    attached = attach(net, ParallelAdapter(on=["attention@last:1", "ffn"], width=2), cross())
    assert list(attached.plan.targets) == ["0.narrow", "1.out_proj", "1.narrow"]
    layers = attached.model.base_model.model
    x, other = torch.randn(2, 5, 4), torch.randn(2, 3, 4)

    def run():
        return layers[1](layers[0](x, other), other)

    assert run().shape == x.shape
    probe(attached, run)


def test_an_attention_may_define_its_layers_in_any_order():
    net = nn.ModuleList([nn.ModuleDict({"out_proj": nn.Linear(4, 4), "qkv": nn.Linear(4, 12)})])
    assert sub_layers(resolve(net, cross("qkv"))) == {"0.out_proj": ["0.qkv"]}


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        names = ("out_proj", "k_proj", "v_proj", "q_proj")
        self.own, self.cross = (nn.ModuleDict({name: nn.Linear(4, 4) for name in names}) for _ in range(2))


def test_several_attentions_of_a_block_are_kept_apart():
    roles = {
        "attention_qkv": (Pattern(r"\d+\.(own|cross)\.[kvq]_proj", (nn.Linear,)),),
        "attention_out": (Pattern(r"\d+\.(own|cross)\.out_proj", (nn.Linear,)),),
    }
    family = Family(name="decoder", block=r"\d+", roles=roles)
    known = sub_layers(resolve(nn.ModuleList([Decoder()]), family))
    assert known == {
        f"0.{name}.out_proj": [f"0.{name}.{part}_proj" for part in ("q", "k", "v")] for name in ("own", "cross")
    }


def test_an_attention_whose_queries_have_no_known_name_is_refused():
    with pytest.raises(GraftError, match=r"'0.k_proj' \(attention_qkv\), .* is in none whose beginning and end Graft"):
        attach(nn.ModuleList([Attention()]), ParallelAdapter(on=["attention"]), cross("[kv]_proj"))
    with pytest.raises(GraftError, match=r"'blocks.0.down' \(conv\)"):
        attach(zoo(2), AdaptFormer(on=["conv"]), ZOO)


def test_pairs_by_name_are_two_and_in_order():
    net = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4), nn.Conv1d(4, 4, 3))
    for names in (["0"], ["0", "1", "1"], ["1", "1"]):
        with pytest.raises(GraftError, match=r"are no pairs\. Give for each sub-layer the layer that reads its input"):
            attach(net, ParallelAdapter(target_modules=names), None)
    with pytest.raises(GraftError, match=r"cannot act between '0' \(Linear\) and '2' \(Conv1d\); it takes two Linear"):
        attach(net, ParallelAdapter(target_modules=["0", "2"]), None)
    assert attach(net, ParallelAdapter(target_modules=["0", "1"]), None).plan.targets == {"1": "custom"}


@pytest.mark.parametrize("spec", [ParallelAdapter, AdaptFormer, Convpass])
def test_a_width_out_of_range_is_refused(spec):
    with pytest.raises(GraftError, match=f"{spec.__name__} width is 0; give a whole number of at least 1"):
        attach(toy_backbone(), spec(width=0), FAMILY)


def test_convpass_without_a_grid_is_refused():
    with pytest.raises(GraftError, match="needs the grid in which the tokens lie, and Graft knows none at fc2 of"):
        attach(zoo(2), Convpass(on=["ffn"]), ZOO)


def test_compacter_lowers_what_does_not_divide_and_says_so():
    attached = attach(zoo(2), Compacter(on=["conv"], width=5), ZOO)
    assert attached.plan.notes == (
        "Division 4 is lowered to 2, which divides all layers' outputs.",
        "Width 5 is taken as 4, a multiple of 2 within all outputs.",
    )
    assert attach(toy_backbone(), Compacter(width=8), FAMILY).plan.notes == ()
    for name in ("width", "division", "rank"):
        with pytest.raises(GraftError, match=f"Compacter {name} is 0; give a whole number of at least 1"):
            attach(toy_backbone(), Compacter(**{name: 0}), FAMILY)


def test_compacter_is_much_smaller_than_houlsby():
    def trained(spec):
        model = attach(toy_backbone(width=64), spec, FAMILY).model
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    assert trained(Compacter()) < trained(Houlsby(width=24)) / 8


def test_rep_adapter_says_what_it_lowers_and_refuses_groups():
    attached = attach(toy_backbone(), RepAdapter(width=6, groups=3), FAMILY)
    assert attached.plan.notes == ("Groups 3 are lowered to 2, which divides all layers' inputs.",)
    with pytest.raises(GraftError, match="RepAdapter width 8 is no multiple of groups 3"):
        attach(toy_backbone(), RepAdapter(groups=3), FAMILY)
    with pytest.raises(GraftError, match=r"has no weights for: 'blocks.1.grouped', 'blocks.1.channelwise', "):
        attach(zoo(2), RepAdapter(on=["conv"]), ZOO)


def test_an_invertible_adapter_needs_two_channels():
    with pytest.raises(GraftError, match="InvertibleAdapter halves a layer's outputs, and 0 has one"):
        attach(nn.Sequential(nn.Linear(3, 1)), InvertibleAdapter(target_modules=["0"]), None)
    with pytest.raises(GraftError, match="InvertibleAdapter reduction is 0"):
        attach(nn.Sequential(nn.Linear(3, 2)), InvertibleAdapter(target_modules=["0"], reduction=0), None)
