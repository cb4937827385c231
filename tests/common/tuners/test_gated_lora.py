"""LoRA behind gates, against its formula."""

from __future__ import annotations

import copy

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from peft import PeftModel, get_peft_model
from torch import nn

from common.tuners import GatedLoraConfig
from common.tuners._shared import Passage


def base(**kwargs):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6, **kwargs))


def config(r=2, thirds=()):
    return GatedLoraConfig(target_modules="0", r=r, thirds={"0": list(thirds)} if thirds else {})


def randomise(model, adapter="default", seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gatelora_" in name and f".{adapter}" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def x(*sizes):
    return torch.randn(*(sizes or (2, 5, 4)), generator=torch.Generator().manual_seed(1))


def by_hand(model, tokens, seen=None, adapter="default"):
    """W x + g B A x for each third, or for all outputs, with the mean over the seen tokens of each example."""
    layer = model.base_model.model[0]
    down, up, gate = (getattr(layer, f"gatelora_{part}")[adapter] for part in ("A", "B", "gate"))
    result = layer.base_layer(tokens).clone()
    thirds = layer.thirds[adapter]
    rank, rows = up.shape[1], up.shape[0] // (len(thirds) or 1)
    for number, third in enumerate(thirds or (0,)):
        own_down = down[number * rank : (number + 1) * rank]
        own_up = up[number * rows : (number + 1) * rows]
        for row in range(len(tokens)):
            read = tokens[row] if seen is None else tokens[row][seen[row]]
            share = torch.sigmoid(read.reshape(-1, 4) @ gate.weight[number] + gate.bias[number]).mean()
            change = share * (tokens[row] @ own_down.T @ own_up.T)
            result[row, ..., third * rows : (third + 1) * rows] += change
    return result


@settings(max_examples=30, deadline=None)
@given(
    thirds=st.sampled_from([(), (0,), (0, 2), (1, 2)]),
    r=st.integers(1, 5),
    sides=st.lists(st.integers(1, 3), max_size=2),
    bias=st.booleans(),
)
def test_the_gated_change_is_added(thirds, r, sides, bias):
    model = get_peft_model(base(bias=bias), config(r, thirds))
    tokens = x(2, *sides, 4)
    with torch.no_grad():
        assert torch.equal(model(tokens), base(bias=bias).requires_grad_(False)(tokens))
        randomise(model)
        torch.testing.assert_close(model(tokens), by_hand(model, tokens), atol=1e-5, rtol=1e-5)
        assert not torch.allclose(model(tokens), base(bias=bias)(tokens), atol=1e-3)


def test_padding_that_is_known_does_not_count():
    model = randomise(get_peft_model(base(), config()))
    passage = model.base_model.model[0].passages["default"] = Passage()
    seen = torch.tensor([[True] * 5, [True, True, False, False, False]])
    passage.leave(seen)
    with torch.no_grad():
        together = model(x())
        torch.testing.assert_close(together, by_hand(model, x(), seen), atol=1e-5, rtol=1e-5)
        passage.leave(seen[1:, :2])
        torch.testing.assert_close(model(x()[1:, :2]), together[1:, :2], atol=1e-5, rtol=1e-5)
        passage.take()
        with pytest.raises(RuntimeError, match="ran without the one that leaves a tensor for it"):
            model(x())


def test_all_of_it_trains():
    model = randomise(get_peft_model(base(), config(thirds=(0, 2))))
    model(x()).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("gatelora_" in name)
        assert (parameter.grad is not None and bool(parameter.grad.any())) == parameter.requires_grad, name


def test_two_adapters_switch_save_load_copy_and_go(tmp_path):
    model = get_peft_model(base(), config(), adapter_name="one")
    model.add_adapter("two", config(r=1, thirds=(0, 2)))
    randomise(randomise(model, "one", 1), "two", 2)
    outputs = {}
    for name in ("one", "two"):
        model.set_adapter(name)
        with torch.no_grad():
            outputs[name] = model(x())
            torch.testing.assert_close(outputs[name], by_hand(model, x(), adapter=name))
            assert torch.equal(copy.deepcopy(model)(x()), outputs[name])
            with model.disable_adapter():
                assert torch.equal(model(x()), base().requires_grad_(False)(x()))
    assert not torch.allclose(outputs["one"], outputs["two"], atol=1e-2)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    for name, expected in outputs.items():
        loaded = PeftModel.from_pretrained(base(), str(tmp_path / name))
        assert torch.equal(loaded(x()), expected)
    model.delete_adapter("one")
    assert not any(".one" in name for name in model.state_dict())
    assert torch.equal(model(x()), outputs["two"])


def test_half_precision_and_autocast():
    model = randomise(get_peft_model(base(), config(thirds=(0, 2))))
    full = model(x()).detach()
    half = randomise(get_peft_model(base().bfloat16(), config(thirds=(0, 2))))
    found = half(x().bfloat16())
    assert found.dtype == torch.bfloat16
    assert {p.dtype for n, p in half.named_parameters() if "gatelora_" in n} == {torch.float32}
    torch.testing.assert_close(found.detach().float(), full, atol=0.1, rtol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x())
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.detach().float(), full, atol=0.1, rtol=0.05)
    output.float().square().sum().backward()
    assert {p.grad.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_a_rank_above_the_layers_is_lowered_to_it():
    layer = get_peft_model(base(), config(r=9, thirds=(0, 2))).base_model.model[0]
    assert layer.gatelora_A["default"].shape == (2 * 2, 4)
    assert layer.gatelora_B["default"].shape == (2 * 2, 2)


def test_what_it_cannot_do_is_refused():
    with pytest.raises(TypeError, match=r"'0' \(Conv2d\) is no linear layer; a gate averages over tokens"):
        get_peft_model(nn.Sequential(nn.Conv2d(4, 4, 1)), config())
    model = get_peft_model(base(), config())
    with pytest.raises(NotImplementedError, match=r"scale the change .* by the example .* no change of their weights"):
        model.merge_adapter()
    model.unmerge_adapter()
