"""The bottleneck beside a sub-layer, against its formula, and what a tuner of two layers must keep."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn import functional

from common.tuners import ParallelConfig
from common.tuners._shared import Passage

LAYERS = {
    "linear": (nn.Linear(4, 6), nn.Linear(6, 5), (2, 7, 4)),
    "pointwise": (nn.Conv2d(4, 6, 1), nn.Conv2d(6, 5, 1, bias=False), (2, 4, 3, 3)),
}


class Net(nn.Module):
    """A feed-forward network without a module of its own."""

    def __init__(self, kind):
        super().__init__()
        self.first, self.second = (copy.deepcopy(layer) for layer in LAYERS[kind][:2])

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def wrap(kind="linear", adapter="default", **settings):
    config = ParallelConfig(target_modules="first|second", pairs={"second": "first"}, **({"width": 3} | settings))
    return get_peft_model(Net(kind), config, adapter_name=adapter)


def x(kind="linear", seed=0):
    return torch.randn(LAYERS[kind][2], generator=torch.Generator().manual_seed(seed))


def randomise(model, adapter="default", seed=0):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if f".{adapter}." in name:
            nn.init.normal_(parameter, generator=generator)
    return model


def last(tensor, kind):
    return tensor if kind == "linear" else tensor.movedim(1, -1)


@pytest.mark.parametrize(("activation", "act"), [("gelu", functional.gelu), ("relu", functional.relu)])
@pytest.mark.parametrize("kind", LAYERS)
def test_the_bottleneck_leads_from_the_first_layers_input_to_the_seconds_output(kind, activation, act):
    model, bare = wrap(kind, scale=0.5, activation=activation), Net(kind).requires_grad_(False)
    with torch.no_grad():
        assert torch.equal(model(x(kind)), bare(x(kind)))
        randomise(model)
        down, up = model.second.padapter_down["default"], model.second.padapter_up["default"]
        narrow = act(last(x(kind), kind) @ down.weight.flatten(1).T + down.bias)
        expected = last(bare(x(kind)), kind) + 0.5 * (narrow @ up.weight.flatten(1).T + up.bias)
        torch.testing.assert_close(last(model(x(kind)), kind), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prefix", [0, 2])
def test_a_convolution_sees_the_grid_and_each_prefix_token_alone(prefix):
    model = wrap(grids={"second": [prefix, 2, 3]}, activation="gelu")
    images = torch.randn(2, prefix + 6, 4)
    with torch.no_grad():
        assert torch.equal(model(images), Net("linear").requires_grad_(False)(images))
        conv = model.second.padapter_conv["default"]
        assert torch.equal(conv(one := torch.randn(1, 3, 2, 3)), one)  # the identity at the start
        randomise(model)
        down, up = model.second.padapter_down["default"], model.second.padapter_up["default"]
        narrow = functional.gelu(down(images))
        seen = torch.empty_like(narrow)
        for position in range(prefix):
            seen[:, position] = narrow[:, position] @ conv.weight[:, :, 1, 1].T + conv.bias
        padded = functional.pad(narrow[:, prefix:].view(2, 2, 3, 3), (0, 0, 1, 1, 1, 1))  # (B, row, column, w)
        for row in range(2):
            for column in range(3):
                patch = padded[:, row : row + 3, column : column + 3]
                value = torch.einsum("byxi,oiyx->bo", patch, conv.weight) + conv.bias
                seen[:, prefix + 3 * row + column] = value
        expected = Net("linear")(images) + up(functional.gelu(seen))
        torch.testing.assert_close(model(images), expected, atol=1e-4, rtol=1e-4)


def test_tokens_that_keep_their_axes_are_a_grid_of_any_size():
    model = randomise(wrap(grids={"second": [0, 0, 0]}))
    flat = randomise(wrap(grids={"second": [0, 2, 5]}))
    images = torch.randn(3, 2, 5, 4)
    with torch.no_grad():
        expected = flat(images.flatten(1, 2)).unflatten(1, (2, 5))
        torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=1e-5)
        assert model(torch.randn(1, 7, 3, 4)).shape == (1, 7, 3, 5)


def test_tokens_that_do_not_fill_the_grid_are_refused():
    with pytest.raises(ValueError, match=r"reads 7 tokens, and its grid has 1 \+ 2 x 2; give images of the size"):
        wrap(grids={"second": [1, 2, 2]})(x())


def test_one_of_two_adapters_is_active_and_disabled_the_base_is_left():
    model = wrap(adapter="one")
    model.add_adapter("two", ParallelConfig(target_modules="first|second", pairs={"second": "first"}, width=5))
    randomise(randomise(model, "one", 1), "two", 2)
    outputs = {}
    for name in ("one", "two"):
        model.set_adapter(name)
        outputs[name] = model(x()).detach()
        assert {n for n, p in model.named_parameters() if p.requires_grad} == {
            f"base_model.model.second.padapter_{part}.{name}.{tensor}"
            for part in ("down", "up")
            for tensor in ("weight", "bias")
        }
    assert not torch.allclose(outputs["one"], outputs["two"], atol=1e-2)
    with model.disable_adapter():
        torch.testing.assert_close(model(x()), Net("linear")(x()))
    model.delete_adapter("one")
    assert not any(".one" in name for name, _ in model.named_parameters())
    assert torch.equal(model(x()), outputs["two"])


def test_saving_keeps_the_adapter_alone_and_loads_again(tmp_path):
    model = randomise(wrap(grids={"second": [1, 2, 3]}))
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(Net("linear"), str(tmp_path)).eval()
    assert torch.equal(loaded(x()), model(x()))
    assert not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(dtype):
    model = randomise(wrap().to(dtype))
    assert model(x().to(dtype)).dtype == dtype
    model = randomise(wrap())
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x())
    assert output.dtype == torch.bfloat16
    output.float().square().sum().backward()
    assert {p.grad.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_a_copy_reads_its_own_input():
    model = randomise(wrap())
    model(x()).sum().backward()
    model.first(x())  # leaves an input that nobody takes
    other = copy.deepcopy(model)
    assert torch.equal(other(x(seed=1)), model(x(seed=1)))
    assert other.second.passages["default"] is other.first.passage
    assert pickle.loads(pickle.dumps(Passage())).take() is None


def test_gradients_are_the_same_with_checkpointing():
    """Both layers lie in a block that is computed again, as they do in every backbone."""
    from torch.utils.checkpoint import checkpoint

    gradients = []
    for run in (lambda model, given: model(given), lambda model, given: checkpoint(model, given, use_reentrant=False)):
        model = randomise(wrap())
        run(model, x().requires_grad_()).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_the_layer_that_reads_may_be_defined_behind_the_other():
    class Backwards(Net):
        def __init__(self):
            super().__init__("linear")
            self.second = self._modules.pop("second")
            self.first = self._modules.pop("first")

    net = Backwards()
    assert [name for name, _ in net.named_children()] == ["second", "first"]
    config = ParallelConfig(target_modules="first|second", pairs={"second": "first"}, width=3)
    model = get_peft_model(net, config, adapter_name="one")
    model.add_adapter("two", config)
    model.set_adapter("one")
    other = wrap(adapter="one")
    other.load_state_dict(model.state_dict(), strict=False)
    randomise(model, "one")
    randomise(other, "one")
    assert torch.equal(model(x()), other(x()))
    model.set_adapter("two")
    assert torch.equal(model(x()).detach(), net.requires_grad_(False)(x()))


def test_what_it_cannot_do_is_refused():
    model = wrap()
    with pytest.raises(NotImplementedError, match="run beside the layers and are no change of their weights"):
        model.merge_adapter()
    with pytest.raises(RuntimeError, match="ran without the layer that reads its input"):
        model.second(torch.randn(2, 7, 6))
    with pytest.raises(ValueError, match="The activation is 'tanh'; give one of gelu, relu"):
        wrap(activation="tanh")
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(TypeError, match="'1' ends another sub-layer, so it cannot pass its input on to '2'"):
        get_peft_model(net, ParallelConfig(target_modules="0|1|2", pairs={"1": "0", "2": "1"}))
    with pytest.raises(TypeError, match=r"'0' \(Conv2d\) and '1' \(Conv2d\) are no two linear layers"):
        get_peft_model(
            nn.Sequential(nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 1)),
            ParallelConfig(target_modules="0|1", pairs={"1": "0"}),
        )
    with pytest.raises(ValueError, match="a parallel adapter needs the same positions on both sides"):
        get_peft_model(
            nn.Sequential(nn.Linear(2, 2), nn.Flatten(0, 1), nn.Linear(2, 2)),
            ParallelConfig(target_modules="0|2", pairs={"2": "0"}),
        )(torch.randn(3, 4, 2))
