"""BitFit as a PEFT tuner: any layer with a bias, several adapters, merging, dtypes."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from common.tuners import BitFitConfig
from common.tuners.bitfit import BitFitLayer

LAYERS = {
    "linear": (nn.Linear(4, 3), (2, 4)),
    "conv1d": (nn.Conv1d(4, 3, 3, dilation=2, padding=2, padding_mode="reflect"), (2, 4, 7)),
    "conv2d": (nn.Conv2d(4, 8, 3, groups=4), (2, 4, 5, 5)),
    "transposed": (nn.ConvTranspose2d(4, 3, 2, stride=2), (2, 4, 5, 5)),
    "layer_norm": (nn.LayerNorm(4), (2, 4)),
    "group_norm": (nn.GroupNorm(2, 4), (2, 4, 3)),
    "batch_norm": (nn.BatchNorm1d(4).eval(), (5, 4)),
    "bilinear": (nn.Bilinear(4, 4, 3), (2, 4)),
}


class Net(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *x):
        return self.layer(*x)


def wrap(layer, adapter="default"):
    return get_peft_model(Net(layer), BitFitConfig(target_modules=["layer"]), adapter_name=adapter)


def set_bias(model, value, adapter="default"):
    with torch.no_grad():
        model.base_model.model.layer.bitfit_bias[adapter].fill_(value)


@pytest.fixture
def two():
    """A linear layer with the adapters `one` (bias 1) and `two` (bias 2)."""
    model = wrap(nn.Linear(4, 3), "one")
    model.add_adapter("two", BitFitConfig(target_modules=["layer"]))
    set_bias(model, 1.0, "one")
    set_bias(model, 2.0, "two")
    return model


@pytest.mark.parametrize("kind", LAYERS)
def test_the_bias_is_exchanged_and_nothing_else(kind):
    import copy

    layer, shape = LAYERS[kind]
    layer = copy.deepcopy(layer)
    x = (torch.randn(shape),) * (2 if kind == "bilinear" else 1)
    expected = copy.deepcopy(layer)
    with torch.no_grad():
        before = layer(*x)
        expected.bias.normal_()
        model = wrap(layer).eval()
        assert torch.equal(model(*x), before)
        model.base_model.model.layer.bitfit_bias["default"].copy_(expected.bias)
        torch.testing.assert_close(model(*x), expected(*x))
        with model.disable_adapter():
            assert torch.equal(model(*x), before)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["base_model.model.layer.bitfit_bias.default"]


def test_a_layer_without_a_bias_is_refused():
    with pytest.raises(TypeError, match="needs a layer with a bias, not Linear"):
        wrap(nn.Linear(4, 3, bias=False))


def test_the_gradient_is_the_biases():
    model = wrap(nn.Linear(4, 3))
    model(torch.randn(5, 4)).sum().backward()
    assert torch.equal(model.base_model.model.layer.bitfit_bias["default"].grad, torch.full((3,), 5.0))
    assert model.base_model.model.layer.base_layer.bias.grad is None


def test_one_of_several_adapters_is_active(two):
    x = torch.zeros(1, 4)
    for name, value in (("one", 1.0), ("two", 2.0), ("one", 1.0)):
        two.set_adapter(name)
        assert torch.equal(two(x), torch.full((1, 3), value))


def test_two_active_adapters_are_refused(two):
    two.base_model.set_adapter(["one", "two"])
    with pytest.raises(ValueError, match="one adapter can be active at a time"):
        two(torch.zeros(1, 4))
    with pytest.raises(ValueError, match="only one adapter can be merged"):
        two.merge_adapter(["one", "two"])


def test_an_adapter_can_be_deleted(two):
    two.set_adapter("two")
    two.delete_adapter("one")
    assert list(two.base_model.model.layer.bitfit_bias) == ["two"]
    assert torch.equal(two(torch.zeros(1, 4)), torch.full((1, 3), 2.0))


def test_merge_and_unmerge_give_the_bias_back(two):
    layer = two.base_model.model.layer
    frozen = layer.base_layer.bias.clone()
    two.merge_adapter(["two"])
    assert torch.equal(layer.base_layer.bias, torch.full((3,), 2.0))
    assert torch.equal(two(torch.zeros(1, 4)), torch.full((1, 3), 2.0))
    two.unmerge_adapter()
    assert torch.equal(layer.base_layer.bias, frozen)
    assert torch.equal(layer.bitfit_bias["two"], torch.full((3,), 2.0))


def test_disabling_a_merged_adapter_unmerges_it(two):
    frozen = two.base_model.model.layer.base_layer.bias.clone()
    two.merge_adapter(["one"])
    with two.disable_adapter():
        assert torch.equal(two(torch.zeros(1, 4))[0], frozen)


def test_adding_to_a_merged_layer_starts_at_the_frozen_bias(two):
    frozen = two.base_model.model.layer.base_layer.bias.clone()
    two.merge_adapter(["one"])
    two.add_adapter("three", BitFitConfig(target_modules=["layer"]))
    assert torch.equal(two.base_model.model.layer.bitfit_bias["three"], frozen)


def test_unmerging_twice_warns(two):
    with pytest.warns(UserWarning, match="Already unmerged"):
        two.base_model.model.layer.unmerge()


@pytest.mark.filterwarnings("ignore:.*already.*:UserWarning")
def test_a_safe_merge_refuses_values_that_are_not_finite(two):
    set_bias(two, float("nan"), "one")
    with pytest.raises(ValueError, match="not finite"):
        two.merge_adapter(["one"], safe_merge=True)
    assert not two.base_model.model.layer.merged_adapters


def test_merge_and_unload_leaves_the_plain_layer(two):
    two.set_adapter("two")
    plain = two.merge_and_unload()
    assert type(plain.layer) is nn.Linear
    assert torch.equal(plain.layer.bias, torch.full((3,), 2.0))


def test_saving_keeps_the_bias_alone_and_loads_again(two, tmp_path):
    from safetensors.torch import load_file

    two.save_pretrained(tmp_path, save_embedding_layers=False)
    for name, value in (("one", 1.0), ("two", 2.0)):
        stored = load_file(tmp_path / name / "adapter_model.safetensors")
        assert list(stored) == ["base_model.model.layer.bitfit_bias"]
        loaded = PeftModel.from_pretrained(Net(nn.Linear(4, 3)), str(tmp_path / name))
        assert torch.equal(loaded(torch.zeros(1, 4)), torch.full((1, 3), value))
        assert not any(p.requires_grad for p in loaded.parameters())
    loaded.load_adapter(str(tmp_path / "one"), "other", is_trainable=True)
    loaded.set_adapter("other")
    assert torch.equal(loaded(torch.zeros(1, 4)), torch.full((1, 3), 1.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_layers(dtype):
    model = wrap(nn.Linear(4, 3, dtype=dtype))
    set_bias(model, 1.0)
    x = torch.zeros(1, 4, dtype=dtype)
    output = model(x)
    assert (output.dtype, output.tolist()) == (dtype, [[1.0] * 3])
    model.merge_adapter()
    assert torch.equal(model(x), output)
    assert model.base_model.model.layer.base_layer.bias.dtype == dtype


def test_autocast_keeps_the_trained_bias_in_full_precision():
    model = wrap(nn.Linear(4, 3))
    with torch.autocast("cpu", torch.bfloat16):
        output = model(torch.randn(2, 4))
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    bias = model.base_model.model.layer.bitfit_bias["default"]
    assert bias.dtype == bias.grad.dtype == torch.float32


def test_the_layer_shows_its_base_layers_attributes():
    layer = wrap(nn.Linear(4, 3)).base_model.model.layer
    assert isinstance(layer, BitFitLayer)
    assert layer.weight is layer.base_layer.weight
