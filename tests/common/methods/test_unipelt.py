"""UniPELT: LoRA, prefixes and bottlenecks behind gates, against blocks computed by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel
from torch import nn
from torch.nn import functional

from common.attach import attach
from common.errors import GraftError
from common.images import backbones as images
from common.methods import MAM, Houlsby, LoRA, Mixture, NormTuning, PerGroup, UniPELT
from common.roles import NORMS, Family, Pattern, TokenStream
from tests.toy import FAMILY, toy_backbone
from tests.zoo import FAMILY as ZOO
from tests.zoo import zoo

LINEAR = (nn.Linear,)


class Attention(nn.Module):
    def __init__(self, width, heads, fused):
        super().__init__()
        self.heads, self.fused = heads, fused
        if fused:
            self.qkv = nn.Linear(width, 3 * width)
        else:
            self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, *, hidden, seen=None):
        parts = self.qkv(hidden).chunk(3, dim=2) if self.fused else (self.q(hidden), self.k(hidden), self.v(hidden))
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts)
        return self.out(functional.scaled_dot_product_attention(q, k, v, seen).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width, heads, fused):
        super().__init__()
        self.attention = Attention(width, heads, fused)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x, seen=None):
        x = x + self.attention(hidden=self.norm1(x), seen=seen)
        return x + self.fc2(torch.relu(self.fc1(self.norm2(x))))


class Net(nn.Module):
    """Tokens (B, T, 8), and a mask of the keys (B, 1, 1, T), to tokens."""

    def __init__(self, fused=False):
        super().__init__()
        self.blocks = nn.ModuleList(Block(8, 2, fused) for _ in range(2))
        self.decoder = nn.ModuleList([Block(8, 2, fused)])

    def forward(self, x, seen=None):
        for block in (*self.blocks, *self.decoder):
            x = block(x, seen=seen)
        return x


def family(**stream):
    name = r"(blocks|decoder)\.\d"
    tokens = {
        "blocks": r"blocks\.\d",
        "attention": Pattern(rf"{name}\.attention", (nn.Module,)),
        "mask": ("seen", 0),
        "key_mask": "seen",
    }
    return Family(
        name="made",
        block=name,
        roles={
            "attention_qkv": (Pattern(rf"{name}\.attention\.(qkv|q|k|v)", LINEAR),),
            "attention_out": (Pattern(rf"{name}\.attention\.out", LINEAR),),
            "ffn_in": (Pattern(rf"{name}\.fc1", LINEAR),),
            "ffn_out": (Pattern(rf"{name}\.fc2", (nn.Linear, nn.Conv1d)),),
            "norm": (Pattern(r".*", NORMS),),
        },
        tokens=TokenStream(**(tokens | stream)),
        projections={f"attention_{part}": rf"{name}\.attention\.{part}" for part in "qkv"},
        fused=rf"{name}\.attention\.qkv",
    )


def net(fused=False):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net(fused).eval()


def spread(model, adapter="default", seed=0):
    """Let every trained tensor matter."""
    for name, parameter in model.named_parameters():
        if f".{adapter}" in name:
            generator = torch.Generator().manual_seed(seed + sum(map(ord, name.replace(adapter, ""))))
            parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator)
    return model


def adapted(fused=False, **settings):
    result = attach(net(fused), UniPELT(**({"rank": 2, "length": 3, "width": 4} | settings)), family())
    result.train(False)
    return result


def x():
    return torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))


SEEN = torch.arange(5) < torch.tensor([5, 2, 4])[:, None]


def run(model, tokens=None, seen=SEEN):
    with torch.no_grad():
        return model(x() if tokens is None else tokens, None if seen is None else seen[:, None, None, :])


def opened(gate, tokens, number=0):
    """The mean over tokens (T, 8) of sigmoid(w . t + a)."""
    return (1 / (1 + (-(tokens @ gate.weight[number] + gate.bias[number])).exp())).mean()


def block_by_hand(block, tokens, adapter="default"):
    """One block of one example, (T, 8), without padding."""
    own = lambda layer, name: getattr(layer, name)[adapter]  # noqa: E731
    outer, ffn = block.attention, block.fc2
    attention = outer.base_layer
    h = block.norm1(tokens)
    changed = {}
    if attention.fused:
        layer = attention.qkv
        parts = dict(zip("qkv", layer.base_layer(h).chunk(3, dim=1), strict=True))
        for number, part in enumerate("qv"):
            down, up = (own(layer, f"gatelora_{one}").chunk(2)[number] for one in "AB")
            changed[part] = opened(own(layer, "gatelora_gate"), h, number) * h @ down.T @ up.T
    else:
        parts = {"k": attention.k(h)}
        for part in "qv":
            layer = getattr(attention, part)
            parts[part] = layer.base_layer(h)
            share = opened(own(layer, "gatelora_gate"), h)
            changed[part] = share * h @ own(layer, "gatelora_A").T @ own(layer, "gatelora_B").T
    q, k, v = parts["q"] + changed["q"], parts["k"], parts["v"] + changed["v"]
    share = opened(own(outer, "kvprefix_input_gate"), h)
    k, v = (torch.cat((share * own(outer, f"kvprefix_{name}"), part)) for name, part in (("keys", k), ("values", v)))
    heads = [
        ((q[:, at] @ k[:, at].T) / 2).softmax(1) @ v[:, at] for at in (slice(0, 4), slice(4, 8))
    ]  # of four channels
    tokens = tokens + attention.out(torch.cat(heads, dim=1))
    h = ffn.base_layer(torch.relu(block.fc1(block.norm2(tokens))))
    narrow = torch.relu(own(ffn, "badapter_down")(h))
    return tokens + h + opened(own(ffn, "badapter_gate"), h) * own(ffn, "badapter_up")(narrow)


@pytest.mark.parametrize("fused", [False, True])
@torch.no_grad()
def test_every_example_is_computed_as_by_hand_without_its_padding(fused):
    model = spread(adapted(fused).model)
    bare, found = model.base_model.model, run(model)
    for row, length in enumerate(SEEN.sum(1).tolist()):
        tokens = x()[row, :length]
        for block in bare.blocks:
            tokens = block_by_hand(block, tokens)
        expected = bare.decoder[0](tokens[None])[0]
        torch.testing.assert_close(found[row, :length], expected, atol=1e-5, rtol=1e-5)
        alone = run(model, x()[row : row + 1, :length], None)[0]
        torch.testing.assert_close(alone, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found, run(net(fused)), atol=1e-2)


def test_at_the_start_prefixes_alone_change_anything():
    model = adapted().model
    assert not torch.equal(run(model), run(net()))
    started = dict(model.named_parameters())
    closed = [n for n in started if any(part in n for part in ("gatelora_B", "badapter_up", "_gate.default.bias"))]
    assert len(closed) == 2 * (2 + 2 + 4)
    assert not any(started[name].any() for name in closed)


def test_it_acts_in_the_blocks_whose_tokens_see_all_others():
    plan = adapted().plan
    inside = {"attention": "attention", "attention.q": "attention_qkv", "attention.v": "attention_qkv"}
    inside |= {"fc2": "ffn_out"}
    assert plan.targets == {f"blocks.{i}.{name}": role for i in (0, 1) for name, role in inside.items()}
    assert plan.notes == ()
    notes = adapted(rank=9, width=9).plan.notes
    assert [note.split(" is ")[0] for note in notes] == ["Rank 9", "Width 9"]
    assert "blocks.0.attention.q (8)" in notes[0]


def test_two_adapters_switch_copy_and_reload(tmp_path):
    outputs = {}
    for number, (name, settings) in enumerate({"one": {}, "two": {"rank": 1, "length": 2, "width": 3}}.items()):
        model = spread(adapted(**settings).model, seed=number)
        outputs[name] = run(model)
        assert torch.equal(run(copy.deepcopy(model)), outputs[name])
        with model.disable_adapter():
            assert torch.equal(run(model), run(net().requires_grad_(False)))
        model.save_pretrained(str(tmp_path / name), save_embedding_layers=False)
    model = PeftModel.from_pretrained(net(), str(tmp_path / "one"), adapter_name="one")
    model.load_adapter(str(tmp_path / "two"), "two")
    for name in ("one", "two", "one"):
        model.set_adapter(name)
        assert torch.equal(run(model.eval()), outputs[name])
    model.set_adapter("two")
    model.delete_adapter("one")
    assert torch.equal(run(model), outputs["two"])
    assert not torch.allclose(outputs["one"], outputs["two"], atol=1e-2)


def test_a_copy_has_gates_of_its_own_examples():
    """Where padding is known is not shared between a model and its copy."""
    model = spread(adapted().model)
    copied = copy.deepcopy(model)
    layers = [
        [layer.passages["default"] for layer in net.modules() if getattr(layer, "passages", None)]
        for net in (model, copied)
    ]
    assert len(layers[0]) == len(layers[1]) == 2 * 3
    assert len({id(passage) for passage in layers[0]}) == len({id(passage) for passage in layers[1]}) == 2
    assert not {id(passage) for passage in layers[0]} & {id(passage) for passage in layers[1]}


@pytest.mark.parametrize(
    ("spec", "held"),
    [
        (Mixture(parts=[LoRA(on=["all"], rank=2), UniPELT(rank=2, length=2, width=3), NormTuning()]), 3),
        (Mixture(parts=[UniPELT(rank=2, length=2, width=3), Houlsby(width=2), MAM(length=2, width=3)]), 3),
        (PerGroup(groups=[[UniPELT(rank=2, length=2, width=3)], [NormTuning()]]), 2),
    ],
    ids=["in the middle", "innermost", "in a group"],
)
def test_it_is_a_part_of_other_methods(spec, held, tmp_path):
    result = attach(toy_backbone(depth=3), spec, FAMILY, name="toy")
    spread(result.model)
    gates = [name for name, _ in result.model.named_parameters() if "kvprefix_input_gate" in name and "weight" in name]
    assert len(gates) == held
    tokens = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = result.model.eval()(tokens)
        result.model.save_pretrained(str(tmp_path), save_embedding_layers=False)
        loaded = PeftModel.from_pretrained(toy_backbone(depth=3), str(tmp_path)).eval()
        assert torch.equal(loaded(tokens), expected)


def test_in_a_vit_it_has_the_parameters_that_it_says():
    vit = images.build("test_vit", 32, pretrained=False)
    result = attach(vit.model, UniPELT(rank=3, length=4, width=5), vit.family, name="vit")
    d = vit.width
    block = 2 * 3 * (d + d) + 2 * 4 * d + 2 * 5 * d + 5 + d + 4 * (d + 1)
    count = sum(p.numel() for p in result.model.parameters() if p.requires_grad)
    assert count == len(vit.model.blocks) * block


@pytest.mark.parametrize(
    ("model", "kind", "settings", "message"),
    [
        (net(), None, {}, "it belongs to no family that Graft knows"),
        (net(), family(), {"rank": 0}, "UniPELT rank is 0; give a whole number of at least 1"),
        (net(), family(), {"length": 0}, "PrefixTuning length is 0; give a whole number of at least 1"),
        (net(), family(), {"width": 0}, "Pfeiffer width is 0; give a whole number of at least 1"),
        (zoo(2), ZOO, {}, "PrefixTuning cannot act on this zoo backbone: its blocks are convolutions and read no"),
        (net(), family(alone="no key fits"), {}, "PrefixTuning cannot act on this made backbone: no key fits"),
        (net(), family(blocks=r"blocks|decoder\.0"), {}, "'blocks' holds 2 attentions, 2 layers .*, and 2 that end"),
    ],
    ids=["family", "rank", "length", "width", "convolutions", "alone", "blocks"],
)
def test_what_it_cannot_act_on_is_refused(model, kind, settings, message):
    with pytest.raises(GraftError, match=message):
        attach(model, UniPELT(**settings), kind)


def test_networks_of_convolutions_within_a_block_are_refused():
    made = net()
    made.blocks[1].fc2 = nn.Conv1d(16, 8, 1)
    with pytest.raises(GraftError, match=r"UniPELT cannot act on 'blocks.1.fc2' \(Conv1d, role ffn_out\); it takes"):
        attach(made, UniPELT(), family())
