"""Conv-LoRA against its formula, and what a tuner of linear layers must keep."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn import functional

from common.tuners import ConvLoraConfig

GRID = [1, 2, 3]


def base():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5))


def wrap(grid=GRID, adapter="default", layer=None, **options):
    config = ConvLoraConfig(target_modules="0", grids={"0": grid}, **({"r": 2, "experts": 3} | options))
    return get_peft_model(base() if layer is None else nn.Sequential(layer), config, adapter_name=adapter)


def randomise(model, adapter="default", seed=0):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if f".{adapter}" in name:
            nn.init.normal_(parameter, std=0.5, generator=generator)
    return model


def images(tokens=7):
    return torch.randn(2, tokens, 4, generator=torch.Generator().manual_seed(1))


def test_the_experts_see_the_map_at_their_scales_and_are_weighed_by_image():
    model = wrap(scale=0.5)
    with torch.no_grad():
        assert torch.equal(model(images()), base().requires_grad_(False)(images()))
        randomise(model)
        layer = model.base_model.model[0]
        down, up, gate, kernels, biases = (
            getattr(layer, f"convlora_{name}")["default"] for name in ("A", "B", "gate", "kernel", "bias")
        )
        narrow = images() @ down.weight.T
        first, maps = narrow[:, :1], narrow[:, 1:].reshape(2, 2, 3, 2).permute(0, 3, 1, 2)
        weights = (maps.mean((2, 3)) @ gate.weight.T + gate.bias).softmax(-1)
        experts = []
        for i in range(3):
            seen = functional.interpolate(maps, size=(2 * (i + 1), 3 * (i + 1)), mode="bilinear")
            seen = functional.conv2d(seen, kernels[i], biases[i], padding=1)
            experts.append(functional.interpolate(seen, size=(2, 3), mode="bilinear"))
        mixed = torch.einsum("bn,nbchw->bhwc", weights, torch.stack(experts)).reshape(2, 6, 2)
        expected = base()(images()) + 0.5 * torch.cat((first, mixed), dim=1) @ up.weight.T
        torch.testing.assert_close(model(images()), expected, atol=1e-5, rtol=1e-5)


def test_one_expert_at_the_start_is_lora():
    model = wrap(experts=1)
    with torch.no_grad():
        up = model.base_model.model[0].convlora_B["default"].weight.normal_()
        change = up @ model.base_model.model[0].convlora_A["default"].weight
        torch.testing.assert_close(model(images()), base()(images()) + images() @ change.T, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_tokens_that_keep_their_axes_are_a_map(axes):
    sides = (2, 3, 2)[:axes]
    model, flat = randomise(wrap([0] * (axes + 1))), randomise(wrap([0, *sides]))
    x = torch.randn(2, *sides, 4)
    torch.testing.assert_close(model(x), flat(x.flatten(1, -2)).unflatten(1, sides))


def test_tokens_that_do_not_fill_the_grid_are_refused():
    with pytest.raises(ValueError, match=r"reads 6 tokens, and its grid has 1 \+ 2 x 3; give images of the size"):
        wrap()(images(6))


def test_every_parameter_gets_a_gradient_and_only_they():
    model = randomise(wrap())
    model(images()).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == ("base_layer" not in name), name


def test_two_adapters_save_load_and_copy(tmp_path):
    model = wrap(adapter="one")
    model.add_adapter("two", ConvLoraConfig(target_modules="0", grids={"0": GRID}, r=3, experts=2))
    randomise(randomise(model, "one", 1), "two", 2)
    outputs = {}
    for name in ("one", "two"):
        model.set_adapter(name)
        outputs[name] = model(images()).detach()
        assert torch.equal(copy.deepcopy(model)(images()), outputs[name])
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    for name, expected in outputs.items():
        loaded = PeftModel.from_pretrained(base(), str(tmp_path / name))
        assert torch.equal(loaded(images()), expected)
        assert not any(p.requires_grad for p in loaded.parameters())
    with model.disable_adapter():
        torch.testing.assert_close(model(images()), base()(images()))


def test_half_precision_and_autocast():
    model = randomise(wrap(layer=nn.Linear(4, 5).bfloat16()))
    assert model(images().bfloat16()).dtype == torch.bfloat16
    assert {p.dtype for n, p in model.named_parameters() if "convlora" in n} == {torch.float32}
    model = randomise(wrap())
    with torch.autocast("cpu", torch.bfloat16):
        output = model(images())
    assert output.dtype == torch.bfloat16
    output.float().square().sum().backward()
    assert {p.grad.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_what_it_cannot_do_is_refused():
    with pytest.raises(TypeError, match=r"'0' \(Conv2d\) is no linear layer"):
        wrap(layer=nn.Conv2d(4, 4, 1))
    with pytest.raises(NotImplementedError, match="no change of their weights"):
        wrap().merge_adapter()
