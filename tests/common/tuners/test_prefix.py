"""Keys and values that attention reads besides its own, against attention written by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn import functional

from common.attach import attach
from common.errors import GraftError
from common.methods import PrefixTuning
from common.tuners import PrefixConfig
from tests.nets import build_net, images


class Attention(nn.Module):
    """Self-attention that takes its input by name, as those of transformers do."""

    def __init__(self, width=8, heads=2, causal=False, times=1):
        super().__init__()
        self.heads, self.causal, self.times = heads, causal, times
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, *, hidden, mask=None):
        q, k, v = self.qkv(hidden).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        for _ in range(self.times):
            q = functional.scaled_dot_product_attention(q, k, v, mask, is_causal=self.causal, scale=0.3)
        return self.out(q.transpose(1, 2).flatten(2)), "kept"


class Net(nn.Module):
    def __init__(self, **kwargs):
        super().__init__()
        self.attention = Attention(**kwargs)

    def forward(self, x, mask=None):
        out, extra = self.attention(hidden=x, mask=mask)
        assert extra == "kept"
        return out


def net(**kwargs):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net(**kwargs).eval()


def config(length=3, width=8, gate=False, opened=False):
    return PrefixConfig(
        target_modules="attention",
        length=length,
        widths={"attention": width},
        gate=gate,
        token_widths={"attention": 8} if opened else {},
        mask="mask",
    )


def wrapped(adapter="default", seed=0, gate=False, length=3, opened=False, **kwargs):
    """A net with keys and values that matter."""
    model = get_peft_model(net(**kwargs), config(length, kwargs.get("width", 8), gate, opened), adapter_name=adapter)
    return randomise(model, adapter, seed)


def randomise(model, adapter, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "kvprefix_" in name and f".{adapter}" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def by_hand(model, x, mask=None, adapter="default"):
    """softmax(Q [P_K, K]^T s + [0, M]) [P_V, V], or the gated sum, in plain products; mask True at what is seen.

    With a gate of the tokens, P_K and P_V are scaled by the mean over those that any token sees.
    """
    layer = model.base_model.model.attention
    attention = layer.base_layer
    q, k, v = attention.qkv(x).unflatten(2, (3, attention.heads, -1)).permute(2, 0, 3, 1, 4)
    keys, values = (
        part[adapter].unflatten(1, (attention.heads, -1)).transpose(0, 1).expand(len(x), -1, -1, -1)
        for part in (layer.kvprefix_keys, layer.kvprefix_values)
    )
    if adapter in layer.kvprefix_input_gate:
        gate = layer.kvprefix_input_gate[adapter]
        seen = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask.flatten(1, -2).any(1)
        read = [torch.sigmoid(x[row][seen[row]] @ gate.weight.T + gate.bias).mean() for row in range(len(x))]
        keys, values = (part * torch.stack(read)[:, None, None, None] for part in (keys, values))
    own = q @ k.transpose(2, 3) * 0.3
    if attention.causal:
        mask = torch.ones(x.shape[1], x.shape[1]).tril().bool()
    if mask is not None:
        own = own.masked_fill(~mask, float("-inf"))
    added = q @ keys.transpose(2, 3) * 0.3
    if adapter in layer.kvprefix_gate:
        mixed = own.softmax(3) @ v + layer.kvprefix_gate[adapter].tanh() * (added.softmax(3) @ values)
    else:
        weights = torch.cat((added, own), dim=3).softmax(3)
        mixed = weights[..., : keys.shape[2]] @ values + weights[..., keys.shape[2] :] @ v
    return attention.out(mixed.transpose(1, 2).flatten(2))


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    count=st.integers(1, 5),
    heads=st.sampled_from([1, 2, 4]),
    length=st.integers(1, 4),
    gate=st.booleans(),
    opened=st.booleans(),
    masked=st.sampled_from(["no", "bool", "float", "causal"]),
)
def test_attention_is_the_formulas(batch, count, heads, length, gate, opened, masked):
    model = wrapped(gate=gate, length=length, opened=opened, heads=heads, causal=masked == "causal")
    x = torch.randn(batch, count, 8, generator=torch.Generator().manual_seed(count))
    seen = None
    if masked in ("bool", "float"):
        seen = torch.rand(batch, 1, count, count, generator=torch.Generator().manual_seed(1)) < 0.5
        seen[..., 0] = True
    mask = torch.zeros(seen.shape).masked_fill(~seen, float("-inf")) if masked == "float" else seen
    with torch.no_grad():
        torch.testing.assert_close(model(x, mask), by_hand(model, x, seen), atol=1e-5, rtol=1e-5)


def x():
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))


def run(model):
    with torch.no_grad():
        return model.eval()(x())


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize("gate", [False, True])
def test_all_of_it_trains_and_a_closed_gate_changes_no_bit(gate, opened):
    model = get_peft_model(net(), config(gate=gate, opened=opened))
    assert torch.equal(run(model), run(net().requires_grad_(False))) == gate
    randomise(model, "default", 0)
    model(x()).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("kvprefix_" in name)
        assert (parameter.grad is not None and bool(parameter.grad.any())) == parameter.requires_grad, name


def test_one_of_several_adapters_runs_and_any_can_be_deleted(tmp_path):
    model = wrapped("one", 1)
    model.add_adapter("two", config(length=2, gate=True, opened=True))
    randomise(model, "two", 2)
    outputs = {}
    for name in ("one", "two"):
        model.set_adapter(name)
        outputs[name] = run(model)
        with torch.no_grad():
            torch.testing.assert_close(outputs[name], by_hand(model, x(), adapter=name))
    assert not torch.allclose(outputs["one"], outputs["two"], atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(run(model), run(net().requires_grad_(False)))
    model.delete_adapter("one")
    assert torch.equal(run(model), outputs["two"])
    model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    assert torch.equal(run(PeftModel.from_pretrained(net(), str(tmp_path / "two"))), outputs["two"])


@pytest.mark.parametrize(("gate", "opened"), [(False, False), (True, False), (False, True)])
def test_half_precision_and_autocast(gate, opened):
    full = run(wrapped(gate=gate, opened=opened))
    half = randomise(get_peft_model(net().bfloat16(), config(gate=gate, opened=opened)), "default", 0)
    assert {p.dtype for n, p in half.named_parameters() if "kvprefix_" in n} == {torch.float32}
    with torch.no_grad():
        found = half(x().bfloat16())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), full, atol=0.05, rtol=0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(run(wrapped(gate=gate, opened=opened)).float(), full, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("times", [0, 2])
def test_attention_that_torch_does_not_compute_once_is_an_error(times):
    with pytest.raises(GraftError, match=rf"Attention calls torch's scaled_dot_product_attention {times} times"):
        run(wrapped(times=times))


def test_merging_is_refused():
    with pytest.raises(NotImplementedError, match="stand beside the network's own and are no change of their weights"):
        wrapped().merge_adapter()


def test_keys_meet_rotated_queries_unrotated_in_a_vit():
    """The width is that of all heads, whatever the width of the tokens, and the first block's output is by hand."""
    bare, built = build_net("eva02"), build_net("eva02")
    attached = attach(built.model, PrefixTuning(length=3), built.family)
    attached.train(False)
    model = attached.model
    randomise(model, "default", 0)
    with torch.no_grad():
        x, rope = bare.model._pos_embed(bare.model.patch_embed(images("eva02")))
        block, layer = bare.model.blocks[0], model.base_model.model.blocks[0].attn
        seen = {}

        def noting(q, k, v, **kwargs):
            seen.update(q=q, k=k, v=v)
            return attend(q, k, v, **kwargs)

        attend = functional.scaled_dot_product_attention
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(functional, "scaled_dot_product_attention", noting)
            block.attn(block.norm1(x), rope=rope)
        heads = seen["k"].shape[1]
        keys, values = (
            part["default"].unflatten(1, (heads, -1)).transpose(0, 1).expand(2, -1, -1, -1)
            for part in (layer.kvprefix_keys, layer.kvprefix_values)
        )
        scores = seen["q"] @ torch.cat((keys, seen["k"]), 2).transpose(2, 3) * seen["q"].shape[-1] ** -0.5
        mixed = scores.softmax(3) @ torch.cat((values, seen["v"]), 2)
        expected = block.attn.proj(block.attn.norm(mixed.transpose(1, 2).flatten(2)))
        found = layer(block.norm1(x), rope=rope)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_vit_that_computes_its_scores_itself_is_refused():
    built = build_net("vit")
    for block in built.model.blocks:
        block.attn.fused_attn = False
    with pytest.raises(
        GraftError, match="PrefixTuning cannot act on this vit backbone: no attention of it calls torch"
    ):
        attach(built.model, PrefixTuning(), built.family)
