"""A change of single weights: where it lies, how much of it there is, and what a stored one brings with it."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.func import functional_call

from common.tuners import SparseConfig
from tests.layers import columns_of, layers, outputs_of, places


def wrap(layer, **options):
    return get_peft_model(nn.Sequential(copy.deepcopy(layer)), SparseConfig(target_modules="0", **options))


def indices(model):
    return model.base_model.model[0].sparse_indices["default"].long()


@settings(deadline=None, max_examples=25)
@given(
    layers(), st.sampled_from([("share", 0.3), ("share", 1.0), ("rank", 1), ("rank", 9), ("output", 1), ("output", 2)])
)
def test_the_layer_runs_with_the_chosen_weights_changed(drawn, amount):
    (layer, x), (rule, amount) = drawn, amount
    rows, columns = outputs_of(layer), columns_of(layer)
    model = wrap(layer, rule=rule, amount=amount)
    chosen = indices(model)
    wanted = {
        "share": amount * rows * columns,
        "rank": amount * (rows + columns),
        "output": rows * min(amount, columns),
    }
    assert len(chosen) == min(max(1, round(wanted[rule])), rows * columns) == len(set(chosen.tolist()))
    if rule == "output":
        for row in places(layer):
            assert len(set(row.tolist()) & set(chosen.tolist())) == min(amount, columns)
    with torch.no_grad():
        assert torch.equal(model(x), layer(x))
        values = model.base_model.model[0].sparse_values["default"].normal_()
        weight = layer.weight.detach().clone().flatten()
        for place, value in zip(chosen, values, strict=True):
            weight[place] += value
        expected = functional_call(layer, {"weight": weight.view(layer.weight.shape)}, (x,))
        torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize(("mask", "sign"), [("smallest", 1), ("largest", -1)])
def test_the_weights_are_chosen_by_magnitude(mask, sign):
    layer = nn.ConvTranspose2d(4, 6, 3, groups=2)
    chosen = indices(wrap(layer, amount=0.25, mask=mask))
    order = (sign * layer.weight.detach().abs()).flatten().argsort()
    assert set(chosen.tolist()) == set(order[: round(0.25 * len(order))].tolist())


def test_the_gradient_is_the_dense_ones():
    layer, x = nn.Conv1d(3, 4, 3, padding=1), torch.randn(2, 3, 5)
    model = wrap(layer, amount=0.4)
    for run in (model, layer):
        run(x).square().sum().backward()
    own = model.base_model.model[0].sparse_values["default"].grad
    torch.testing.assert_close(own, layer.weight.grad.flatten()[indices(model)])


def test_other_layers_are_refused():
    with pytest.raises(TypeError, match=r"'0' \(Embedding\) is no linear layer and no convolution"):
        wrap(nn.Embedding(3, 4))


def test_scores_choose_and_start_again_at_zero():
    model = wrap(nn.Linear(4, 3), rule="output", amount=2)
    layer = model.base_model.model[0]
    parameter = layer.sparse_values["default"]
    with torch.no_grad():
        parameter.fill_(1.0)
    scores = torch.tensor([[3.0, 1, 2, 0], [0, 1, 2, 3], [0, 9, 8, 0]])
    layer.choose("default", scores)
    assert indices(model).tolist() == [0, 2, 6, 7, 9, 10]
    layer.choose("default", scores, count=1)
    assert indices(model).tolist() == [9]
    assert layer.sparse_values["default"] is parameter  # an optimizer may know it
    assert not parameter.any()
    assert parameter.requires_grad


def stored(tmp_path):
    """An adapter of five weights, saved, of a configuration that asks for two."""
    layer = nn.Linear(4, 5)
    model = wrap(layer, rule="share", amount=0.1)
    model.base_model.model[0].choose("default", torch.rand(5, 4), count=5)
    with torch.no_grad():
        model.base_model.model[0].sparse_values["default"].normal_()
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    return layer, model


def test_a_stored_adapter_brings_its_own_weights(tmp_path):
    layer, model = stored(tmp_path)
    file = load_file(tmp_path / "adapter_model.safetensors")
    assert {name.rpartition(".")[2]: (tuple(t.shape), t.dtype) for name, t in file.items()} == {
        "sparse_indices": ((5,), torch.int32),
        "sparse_values": ((5,), torch.float32),
    }
    loaded = PeftModel.from_pretrained(nn.Sequential(copy.deepcopy(layer)), str(tmp_path))
    x = torch.randn(2, 4)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
        assert not torch.equal(loaded(x), layer(x))


def test_positions_that_the_weight_has_not_are_refused(tmp_path):
    layer, _ = stored(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    file = load_file(path)
    key = next(name for name in file if name.endswith("sparse_indices"))
    for wrong in (20, -1):
        save_file({**file, key: torch.tensor([0, 1, 2, 3, wrong], dtype=torch.int32)}, path)
        with pytest.raises(RuntimeError, match="names weights beyond the 20 of the layer"):
            PeftModel.from_pretrained(nn.Sequential(copy.deepcopy(layer)), str(tmp_path))
