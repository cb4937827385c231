"""One factorised tensor for all layers: against its formula, and that its outer factors are one for all."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from torch import nn
from torch.func import functional_call

from common.tuners import FactConfig
from tests.layers import as_matrix, as_weight, columns_of, layers, outputs_of


def wrap(*bare, adapter="default", **options):
    net = nn.ModuleList(copy.deepcopy(layer) for layer in bare)
    config = FactConfig(target_modules=r"\d+", **options)
    return get_peft_model(net, config, adapter_name=adapter)


def random(model, adapter="default", seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(f".{adapter}"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def change(model, index, rows, columns, adapter="default"):
    """The change of a layer's matrix, tile by tile."""
    first, layer = model.base_model.model[0], model.base_model.model[index]
    left, right = first.fact_left[adapter].double(), first.fact_right[adapter].double()
    whole = torch.zeros(rows, columns, dtype=left.dtype)
    across = math.ceil(columns / len(right))
    for number, inner in enumerate(layer.fact_inner[adapter].double()):
        if adapter in first.fact_core:
            core = first.fact_core[adapter].double()
            inner = sum(weight * core[k] for k, weight in enumerate(inner))
        down, right_of = number // across * len(left), number % across * len(right)
        tile = left @ inner @ right.T
        whole[down : down + len(left), right_of : right_of + len(right)] = tile[: rows - down, : columns - right_of]
    return layer.scaling[adapter] * whole


@settings(deadline=None, max_examples=25)
@given(layers(), layers(), st.sampled_from(["tt", "tk"]), st.data())
def test_each_layer_runs_with_its_tiles(one, two, form, data):
    pairs = (one, two)
    sizes = [(outputs_of(layer), columns_of(layer)) for layer, _ in pairs]
    rows, columns = (min(size[axis] for size in sizes) for axis in (0, 1))
    rank = data.draw(st.integers(1, min(rows, columns)))
    model = wrap(one[0], two[0], r=rank, tile_rows=rows, tile_columns=columns, form=form, scale=0.5)
    net = model.base_model.model
    for index, (layer, x) in enumerate(pairs):
        with torch.no_grad():
            assert torch.equal(net[index](x), layer(x))
    random(model)
    for index, (layer, x) in enumerate(pairs):
        with torch.no_grad():
            wanted = as_matrix(layer) + change(model, index, *sizes[index]).to(layer.weight.dtype)
            expected = functional_call(layer, {"weight": as_weight(layer, wanted)}, (x,))
            torch.testing.assert_close(net[index](x), expected, atol=1e-3, rtol=1e-4)


def three(**options):
    return wrap(nn.Linear(4, 12), nn.Linear(4, 4), nn.Linear(10, 4), r=2, tile_rows=4, tile_columns=4, **options)


@pytest.mark.parametrize("form", ["tt", "tk"])
def test_the_outer_factors_lie_in_the_first_layer(form):
    model = three(form=form)
    counts = [sum(p.numel() for n, p in layer.named_parameters() if "fact_" in n) for layer in model.base_model.model]
    inner = [tiles * (4 if form == "tt" else 2) for tiles in (3, 1, 3)]  # the last has 10 columns in tiles of 4
    outer = 2 * 4 * 2 + (8 if form == "tk" else 0)
    assert counts == [inner[0] + outer, inner[1], inner[2]]


def test_all_layers_learn_the_outer_factors():
    model = random(three())
    first, last = model.base_model.model[0], model.base_model.model[2]
    last(torch.randn(3, 10)).square().sum().backward()
    assert first.fact_left["default"].grad.any()
    assert first.fact_right["default"].grad.any()
    assert first.fact_inner["default"].grad is None


def outputs(model):
    with torch.no_grad():
        net = model.base_model.model
        return [layer(torch.ones(2, layer.get_base_layer().in_features)) for layer in net]


def same(one, two):
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_a_copy_has_outer_factors_of_its_own():
    model = random(three())
    twin = copy.deepcopy(model)
    before = outputs(model)
    assert same(outputs(twin), before)
    random(twin, seed=1)
    assert same(outputs(model), before)
    assert not any(torch.equal(a, b) for a, b in zip(outputs(twin), before, strict=True))


@pytest.mark.parametrize("form", ["tt", "tk"])
def test_two_adapters_share_nothing(form, tmp_path):
    model = random(three(adapter="one", form=form), "one")
    with torch.no_grad():
        before = outputs(model)
    config = FactConfig(target_modules=r"\d+", r=2, tile_rows=4, tile_columns=4, form=form)
    model.add_adapter("two", config)
    assert same(outputs(model), before)
    assert all(".one" in name for name, p in model.named_parameters() if p.requires_grad)
    model.set_adapter("two")
    assert all(".two" in name for name, p in model.named_parameters() if p.requires_grad)
    random(model, "two", 2)
    after = outputs(model)
    model.delete_adapter("one")
    assert same(outputs(model), after)
    model.add_adapter("one", config)  # holds outer factors of its own again
    model.set_adapter("one")
    assert len([name for name, p in model.named_parameters() if p.requires_grad]) == 3 + 2 + (form == "tk")
    model.set_adapter("two")
    model.save_pretrained(tmp_path, selected_adapters=["two"], save_embedding_layers=False)
    bare = nn.ModuleList(copy.deepcopy(layer.get_base_layer()) for layer in model.base_model.model)
    loaded = PeftModel.from_pretrained(bare, str(tmp_path / "two"))
    assert same(outputs(loaded), after)
    assert not any(p.requires_grad for p in loaded.parameters())


def test_layers_merge_one_after_the_other():
    model = random(three())
    before = outputs(model)
    plain = model.merge_and_unload()
    with torch.no_grad():
        assert all(
            torch.equal(layer(torch.ones(2, layer.in_features)), y) for layer, y in zip(plain, before, strict=True)
        )


@pytest.mark.parametrize("form", ["tt", "tk"])
def test_a_frozen_adapter_computes_the_same_to_the_bit(form):
    """Loaded, it needs no gradients, which must not choose other kernels."""
    model = random(wrap(nn.Linear(64, 192), nn.Linear(256, 64), r=8, tile_rows=64, tile_columns=64, form=form))
    before = outputs(model)
    assert same(outputs(model.requires_grad_(False)), before)


def test_a_rank_above_the_tile_is_refused():
    with pytest.raises(ValueError, match="Rank 3 does not fit tiles of 4 x 2"):
        wrap(nn.Linear(2, 4), r=3, tile_rows=4, tile_columns=2)
