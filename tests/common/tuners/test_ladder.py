"""The ladder side network against its formula; what it saves is training memory."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn import functional

from common.cost import measure_step
from common.tuners import LadderConfig, WeightLoraConfig
from tests.toy import toy_backbone

BLOCKS = [f"blocks.{i}" for i in range(3)]
BEFORE = dict(zip(BLOCKS, [None, *BLOCKS], strict=False))


def wrap(width=3, depth=3, adapter="default"):
    blocks = BLOCKS[:depth]
    config = LadderConfig(
        target_modules="|".join(blocks),
        channels=dict.fromkeys(blocks, 8),
        width=width,
        previous={block: BEFORE[block] for block in blocks},
    )
    return get_peft_model(toy_backbone(depth=depth), config, adapter_name=adapter)


def x():
    return torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))


def randomise(model):
    for name, parameter in model.named_parameters():
        if "ladder_" in name:
            nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(len(name)))
    return model


def test_the_side_network_is_the_formulas():
    model, net = wrap().eval(), toy_backbone(depth=3).eval().requires_grad_(False)
    with torch.no_grad():
        assert torch.equal(model(x()), net(x()))
        randomise(model)
        h = net.embed(net.input_norm(x().mT).mT)
        h = h + net.mix(h.mT).mT
        state = None
        for block, layer in zip(net.blocks, model.base_model.model.blocks, strict=True):
            h = block(h)
            down, norm, wide, narrow = (
                getattr(layer, f"ladder_{part}")["default"] for part in ("down", "norm", "wide", "narrow")
            )
            mixed = down(h)
            if state is not None:
                gate = torch.sigmoid(layer.ladder_gate["default"] / 0.1)
                mixed = gate * mixed + (1 - gate) * state
            state = mixed + narrow(functional.gelu(wide(functional.layer_norm(mixed, (3,), norm.weight, norm.bias))))
        h = h + model.base_model.model.blocks[2].ladder_up["default"](state)
        torch.testing.assert_close(model(x()), net.norm(h), atol=1e-5, rtol=1e-5)


def test_no_gradient_passes_the_blocks():
    model = randomise(wrap())
    seen = []
    for block in model.base_model.model.blocks:
        block.get_base_layer().fc1.register_full_backward_hook(lambda module, *_: seen.append(module))
    model(x()).square().sum().backward()
    assert not seen
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.any() for p in trained)


def test_training_memory_is_that_of_the_side_network():
    """Measured with the meter of every run: LoRA at every block keeps the blocks' activations, a ladder does not."""
    images = torch.randn(8, 16, 4)

    def activations(model):
        model.train()
        return measure_step(model, lambda: model(images).square().mean())[0]

    saved = {}
    for depth in (1, 3):
        config = WeightLoraConfig(target_modules=r"blocks\.\d+\.(qkv|out|fc1|fc2)", r=2)
        lora = get_peft_model(toy_backbone(depth=depth), config)
        saved[depth] = activations(wrap(width=1, depth=depth)), activations(lora)
    ladder, lora = (saved[3][i] - saved[1][i] for i in (0, 1))  # of two further blocks, without what ends the network
    assert 0 < ladder < lora / 2


def test_two_ladders_stand_side_by_side_and_copies_apart(tmp_path):
    model = randomise(wrap(adapter="one"))
    model.add_adapter("two", copy.deepcopy(model.peft_config["one"]))
    model.set_adapter("one")
    expected = model.eval()(x())
    model.set_adapter("two")
    assert not torch.allclose(model(x()), expected)
    other = copy.deepcopy(model)
    other.set_adapter("one")
    assert torch.equal(other(x()), expected)
    assert other.blocks[1].before["one"] is other.blocks[0].passage
    other.save_pretrained(tmp_path, save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(toy_backbone(depth=3), str(tmp_path / "one")).eval()
    assert torch.equal(loaded(x()), expected)


def test_a_block_that_is_left_out_is_an_error_and_no_other_result():
    model = wrap()
    with pytest.raises(RuntimeError, match="ran without the one before it; a ladder needs every block, in order"):
        model.base_model.model.blocks[1](torch.randn(2, 3, 8))
