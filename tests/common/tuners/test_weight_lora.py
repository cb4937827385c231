"""LoRA and DoRA in weight space: against their formulas on every kind of layer, and against PEFT where it is right."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from timm.layers import Conv2dSame, StdConv2d
from torch import nn
from torch.func import functional_call

from common.tuners import WeightLoraConfig, matrix_shape

LAYERS = {
    "linear": (nn.Linear(4, 6), (2, 3, 4)),
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
    "pointwise": (nn.Conv3d(4, 6, 1), (2, 4, 3, 3, 3)),
    "line": (nn.Conv3d(4, 6, (1, 1, 3)), (2, 4, 3, 3, 4)),
    "no bias": (nn.Conv2d(4, 6, (1, 3), bias=False), (2, 4, 5, 5)),
    "dilated": (nn.Conv2d(4, 6, 3, padding=2, dilation=2), (2, 4, 5, 5)),
    "dilated line": (nn.Conv1d(4, 6, 3, padding="same", dilation=3), (2, 4, 9)),
    "reflected": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 5, 5)),
    "circular": (nn.Conv3d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 3, 3, 3)),
    "same": (Conv2dSame(4, 6, 3, stride=2), (2, 4, 7, 7)),
    "standardised": (StdConv2d(4, 6, 3), (2, 4, 5, 5)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    "channelwise": (nn.Conv3d(4, 8, 3, groups=4), (2, 4, 3, 3, 3)),
    "transposed1d": (nn.ConvTranspose1d(4, 6, 3, stride=2), (2, 4, 5)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), (2, 4, 5, 5)),
    "transposed3d": (nn.ConvTranspose3d(4, 6, 2, stride=2), (2, 4, 3, 3, 3)),
    "transposed in groups": (nn.ConvTranspose2d(4, 6, 2, groups=2, dilation=2), (2, 4, 5, 5)),
}
EACH = pytest.mark.parametrize("kind", LAYERS)


class Net(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = copy.deepcopy(layer).requires_grad_(False)

    def forward(self, x):
        return self.layer(x)


def wrap(layer, **settings):
    torch.manual_seed(5)
    return get_peft_model(Net(layer), WeightLoraConfig(target_modules="layer", **({"r": 2, "scale": 1.5} | settings)))


def random(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    return model


def as_matrix(layer, weight):
    """Outputs by (inputs of a group, kernel), element by element."""
    if not getattr(layer, "transposed", False):
        return weight.flatten(1)
    groups = layer.groups
    inputs, outputs = layer.in_channels // groups, layer.out_channels // groups
    rows = []
    for output in range(layer.out_channels):
        group, place = divmod(output, outputs)
        rows.append(weight[group * inputs : (group + 1) * inputs, place].flatten())
    return torch.stack(rows)


def as_weight(layer, matrix):
    """The inverse of `as_matrix`."""
    weight = torch.zeros_like(layer.weight)
    if not getattr(layer, "transposed", False):
        return matrix.view_as(weight)
    groups = layer.groups
    inputs, outputs = layer.in_channels // groups, layer.out_channels // groups
    for output in range(layer.out_channels):
        group, place = divmod(output, outputs)
        weight[group * inputs : (group + 1) * inputs, place] = matrix[output].view(inputs, *layer.kernel_size)
    return weight


@EACH
@pytest.mark.parametrize("dora", [False, True])
def test_the_layer_runs_with_the_changed_weight(kind, dora):
    bare, shape = LAYERS[kind]
    x = torch.randn(shape)
    model = wrap(bare, dora=dora)
    with torch.no_grad():
        before = Net(bare)(x)
        assert torch.equal(model(x), before)
        layer = random(model).layer
        a, b = layer.wlora_A["default"], layer.wlora_B["default"]
        matrix = as_matrix(bare, bare.weight)
        assert (len(b), a.shape[1]) == tuple(matrix.shape) == matrix_shape(bare)
        changed = matrix + 1.5 * b @ a
        if dora:
            magnitude = layer.wlora_magnitude["default"]
            changed = magnitude[:, None] * changed / changed.norm(dim=1, keepdim=True)
        expected = functional_call(bare, {"weight": as_weight(bare, changed)}, (x,))
        torch.testing.assert_close(model(x), expected, atol=1e-4, rtol=1e-5)
        with model.disable_adapter():
            assert torch.equal(model(x), before)
        own = model(x)
        plain = model.merge_and_unload().layer
        assert type(plain) is type(bare)
        assert torch.equal(plain(x), own)


def test_an_embedding_is_changed_too():
    bare, x = nn.Embedding(7, 4), torch.tensor([[0, 6, 3]])
    model = random(wrap(bare))
    a, b = model.layer.wlora_A["default"], model.layer.wlora_B["default"]
    assert (b.shape, a.shape) == ((4, 2), (2, 7))
    torch.testing.assert_close(model(x), (bare.weight + 1.5 * (b @ a).T)[x])


@pytest.mark.parametrize("kind", ["linear", "conv1d", "no bias"])
@pytest.mark.parametrize("dora", [False, True])
def test_outputs_and_gradients_are_pefts_where_that_is_right(kind, dora):
    bare, shape = LAYERS[kind]
    x = torch.randn(shape)
    ours = random(wrap(bare, dora=dora, scale=2.0))
    theirs = get_peft_model(Net(bare), LoraConfig(target_modules="layer", r=2, lora_alpha=4, use_dora=dora))
    own, other = ours.layer, theirs.layer
    pairs = [(own.wlora_A["default"], other.lora_A["default"].weight)]
    pairs += [(own.wlora_B["default"], other.lora_B["default"].weight)]
    if dora:
        pairs += [(own.wlora_magnitude["default"], other.lora_magnitude_vector["default"].weight)]
    with torch.no_grad():
        for mine, its in pairs:
            its.copy_(mine.view_as(its))
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-4, rtol=1e-5)
    for model in (ours, theirs):
        model(x).square().sum().backward()
    for mine, its in pairs:  # with `dora` the norm is a constant in both
        torch.testing.assert_close(mine.grad, its.grad.view_as(mine), atol=1e-2, rtol=1e-4)


@pytest.mark.parametrize(("init", "deviation"), [("default", 1 / (3 * 64) ** 0.5), ("gaussian", 1 / 8)])
def test_the_start_is_pefts(init, deviation):
    """Kaiming uniform with a slope of root 5 has this deviation: 1 / sqrt(3 * columns)."""
    layer = wrap(nn.Linear(64, 300), r=8, init=init).layer
    a = layer.wlora_A["default"]
    assert a.std().item() == pytest.approx(deviation, rel=0.1)
    assert not layer.wlora_B["default"].any()
    theirs = (
        get_peft_model(
            Net(nn.Linear(64, 300)),
            LoraConfig(target_modules="layer", r=8, init_lora_weights=True if init == "default" else init),
        )
        .layer.lora_A["default"]
        .weight
    )
    assert theirs.std().item() == pytest.approx(deviation, rel=0.1)


@pytest.mark.parametrize(("layer", "rank"), [(nn.Conv3d(1, 8, 1), 1), (nn.Conv2d(2, 8, 2), 8), (nn.Linear(30, 3), 3)])
def test_the_rank_is_at_most_the_layers_own_and_the_scale_stays(layer, rank):
    model = random(wrap(layer, r=16))
    a, b = model.layer.wlora_A["default"], model.layer.wlora_B["default"]
    assert (len(a), b.shape[1]) == (rank, rank)
    model.merge_adapter()
    matrix = layer.weight.flatten(1) + 1.5 * b @ a
    torch.testing.assert_close(model.layer.weight.flatten(1), matrix)


def test_an_output_of_zeros_makes_no_nan():
    bare = nn.Conv2d(3, 4, 3)
    with torch.no_grad():
        bare.weight[1] = 0
    model = wrap(bare, dora=True)
    x = torch.randn(2, 3, 4, 4)
    output = model(x)
    torch.testing.assert_close(output, bare(x))
    output.square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", ["linear", "transposed3d", "dilated"])
def test_no_activation_but_the_layers_input_is_kept(kind):
    """PEFT's tuner also keeps the output of A; ours keeps weights."""
    bare, shape = LAYERS[kind]
    x = torch.randn(shape)
    model = wrap(bare)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(x)
    others = [t for t in kept if t.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()]
    assert len(others) < len(kept)
    weights = {bare.weight.numel(), *(p.numel() for p in model.layer.parameters())}
    assert {t.numel() for t in others} <= weights


# ---- thirds of the rows


@settings(max_examples=25, deadline=None)
@given(
    thirds=st.sets(st.integers(0, 2), min_size=1, max_size=2).map(sorted),
    size=st.integers(1, 4),
    columns=st.integers(1, 6),
    rank=st.integers(1, 5),
    dora=st.booleans(),
)
def test_thirds_of_the_rows_are_changed_each_by_its_own(thirds, size, columns, rank, dora):
    layer = nn.Linear(columns, 3 * size)
    model = random(wrap(layer, r=rank, dora=dora, thirds={"layer": thirds}))
    tuned = model.base_model.model.layer
    fitting = min(rank, size, columns)
    down, up = tuned.wlora_A["default"], tuned.wlora_B["default"]
    assert down.shape == (len(thirds) * fitting, columns)
    assert up.shape == (len(thirds) * size, fitting)
    expected = layer.weight.detach().clone()
    for place, third in enumerate(thirds):
        rows = slice(third * size, (third + 1) * size)
        own = slice(place * size, (place + 1) * size)
        changed = expected[rows] + 1.5 * up[own] @ down[place * fitting : (place + 1) * fitting]
        if dora:
            changed = changed * (tuned.wlora_magnitude["default"][own] / changed.norm(dim=1)).unsqueeze(1)
        expected[rows] = changed.detach()
    found = tuned.exchanged("default")["weight"]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for third in {0, 1, 2} - set(thirds):
        rows = slice(third * size, (third + 1) * size)
        assert torch.equal(found[rows], layer.weight[rows])
