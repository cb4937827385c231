"""Structured changes of a weight against dense references on any layer, and against PEFT's own on linear ones."""

from __future__ import annotations

import cmath
import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from torch import nn

from common.methods import C3A, DEFT, HRA, DeLoRA, FourierFT, HiRA, LoHa, LoKr, MiSS
from common.methods._base import exact
from common.tuners import WeightFormConfig
from common.tuners._forms import FORMS, divisor, factors

FORM_SETTINGS = {
    "hadamard": {"rank": 2, "scale": 1.5},
    "kronecker": {"rank": 1, "scale": 0.5},
    "hadamard_weight": {"rank": 2},
    "granular": {"rank": 6, "blocks": 3, "scale": 0.7},
    "reflections": {"rank": 4},
    "block_rotation": {"block": 3},
    "butterfly": {"block": 4, "factors": 2},
    "subspace_rotation": {"rank": 3},
    "spectrum": {"entries": 7, "scale": 2.0, "seed": 3},
    "circulant": {"block": 4},
    "shards": {"rank": 5},
    "bounded": {"rank": 2, "bound": 3.0},
    "projection": {"rank": 2},
}


def wrapped(layer, form, **more):
    """The layer with the change at it, in double precision, its parameters random."""
    config = WeightFormConfig(target_modules="0", form=form, settings=FORM_SETTINGS[form] | more)
    model = get_peft_model(nn.Sequential(layer), config)
    adapted = model.base_model.model[0]
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in adapted.wform_change.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.double(), adapted.wform_change["default"]


# ---- dense references ----------------------------------------------------------------------------------------------


def rotation(angles, side):
    """(I + S)^-1 (I - S), S filled entry by entry."""
    s = torch.zeros(side, side, dtype=angles.dtype)
    entries = iter(angles)
    for i in range(side):
        for j in range(i + 1, side):
            s[i, j] = next(entries)
            s[j, i] = -s[i, j]
    identity = torch.eye(side, dtype=s.dtype)
    return torch.linalg.inv(identity + s) @ (identity - s)


def butterfly(weight, change):
    half, columns = change.side // 2, weight.shape[1]
    for level, angles in enumerate(change.angles):
        dense, blocks = torch.zeros(columns, columns, dtype=weight.dtype), iter(angles)
        chunks = columns // half
        for start in range(0, chunks, 2 ** (level + 1)):
            for chunk in range(start, start + 2**level):  # paired with the one 2^level further
                near = range(chunk * half, (chunk + 1) * half)
                far = range((chunk + 2**level) * half, (chunk + 2**level + 1) * half)
                places = torch.tensor([*near, *far])
                dense[places[:, None], places[None]] = rotation(next(blocks), change.side)
        weight = weight @ dense
    return change.scales[:, None] * weight


def spectrum(weight, change):
    rows, columns = weight.shape
    found = torch.zeros_like(weight)
    for place, value in zip(change.places.tolist(), change.entries, strict=True):
        u, v = divmod(place, columns)
        wave = [
            [cmath.exp(2j * math.pi * (u * i / rows + v * j / columns)).real for j in range(columns)]
            for i in range(rows)
        ]
        found += value * torch.tensor(wave, dtype=weight.dtype) / (rows * columns)
    return weight + change.scale * found


def kronecker(weight, change):
    inner = change.up @ change.down if hasattr(change, "up") else change.inner
    changed, (b, d) = weight.clone(), inner.shape
    for i in range(change.outer.shape[0]):
        for j in range(change.outer.shape[1]):
            changed[i * b : (i + 1) * b, j * d : (j + 1) * d] += change.scale * change.outer[i, j] * inner
    return changed


def reflections(weight, change):
    for u in change.directions.T:
        weight = weight @ (torch.eye(len(u), dtype=u.dtype) - 2 * torch.outer(u, u) / u.dot(u))
    return weight


def granular(weight, change):
    cuts, changed = len(change.up), weight.clone()
    b, d = weight.shape[0] // cuts, weight.shape[1] // cuts
    for i in range(cuts):
        for j in range(cuts):
            changed[i * b : (i + 1) * b, j * d : (j + 1) * d] += change.scale * change.up[i, j] @ change.down[i, j]
    return changed


def subspace(weight, change):
    u, s, vh = torch.linalg.svd(weight)
    rank = len(change.scale_in)
    best = u[:, :rank] @ torch.diag(s[:rank]) @ vh[:rank]
    torch.testing.assert_close(change.up @ change.down, best, atol=1e-5, rtol=1e-5)
    turned = torch.diag(change.scale_out) @ rotation(change.angles[0], rank) @ torch.diag(change.scale_in)
    return weight - change.up @ change.down + change.up @ turned @ change.down


def circulant(weight, change):
    side, changed = change.side, weight.clone()
    for m in range(change.kernels.shape[0]):
        for n in range(change.kernels.shape[1]):
            for i in range(side):
                for j in range(side):
                    changed[m * side + i, n * side + j] += change.kernels[m, n, (j - i) % side] / weight.shape[1]
    return changed


def bounded(weight, change):
    rank, changed = len(change.down), weight.clone()
    for a, b in zip(change.down, change.up.T, strict=True):
        changed = changed + change.bound / rank * torch.outer(b / b.norm(), a / a.norm()) * change.lengths
    return changed


def projection(weight, change):
    p = change.directions
    kept = torch.eye(len(p), dtype=p.dtype) - p @ torch.relu(p).T
    return kept @ weight + p @ change.injected


DENSE = {
    "hadamard": lambda w, c: w + c.scale * torch.einsum("ir,rj,is,sj->ij", c.up_1, c.down_1, c.up_2, c.down_2),
    "kronecker": kronecker,
    "hadamard_weight": lambda w, c: w * (1 + c.up @ c.down),
    "granular": granular,
    "reflections": reflections,
    "block_rotation": lambda w, c: w @ torch.block_diag(*(rotation(angles, c.side) for angles in c.angles)),
    "butterfly": butterfly,
    "subspace_rotation": subspace,
    "spectrum": spectrum,
    "circulant": circulant,
    "shards": lambda w, c: w + torch.stack([c.shard[j % len(c.shard)] for j in range(w.shape[1])], dim=1),
    "bounded": bounded,
    "projection": projection,
}


def as_matrix(layer):
    """The weight as (outputs, inputs / groups * kernel), gathered output by output."""
    weight = layer.weight
    if not getattr(layer, "transposed", False):
        return weight.flatten(1)
    inputs, outputs = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    rows = [
        weight[group * inputs : (group + 1) * inputs, output].flatten()
        for group in range(layer.groups)
        for output in range(outputs)
    ]
    return torch.stack(rows)


def from_matrix(layer, matrix):
    """Write a matrix back into a weight of the layer's own shape, output by output."""
    if not getattr(layer, "transposed", False):
        return matrix.view(layer.weight.shape)
    weight = torch.empty_like(layer.weight, dtype=matrix.dtype)
    inputs, outputs = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    for number, row in enumerate(matrix):
        group, output = divmod(number, outputs)
        weight[group * inputs : (group + 1) * inputs, output] = row.view(inputs, *layer.kernel_size)
    return weight


@st.composite
def layers(draw):
    """A linear layer or a convolution of any kind, and an input."""
    torch.manual_seed(draw(st.integers(0, 9)))
    dims = draw(st.integers(0, 3))
    if dims == 0:
        inputs, outputs = draw(st.sampled_from([(4, 4), (8, 6), (12, 3), (4, 10)]))
        return nn.Linear(inputs, outputs, bias=draw(st.booleans())), torch.randn(2, 3, inputs)
    transposed = draw(st.booleans())
    kind = getattr(nn, f"Conv{'Transpose' if transposed else ''}{dims}d")
    groups = draw(st.sampled_from([1, 2]))
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(dims))
    options = {"stride": draw(st.integers(1, 2)), "dilation": draw(st.integers(1, 2)), "groups": groups}
    layer = kind(8, draw(st.sampled_from([4, 6])), kernel, bias=draw(st.booleans()), **options)
    return layer, torch.randn(2, 8, *(5,) * dims)


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=12, deadline=None)
@given(case=layers())
def test_the_layer_runs_with_the_changed_weight(form, case):
    layer, x = case
    bare = copy.deepcopy(layer).double()
    model, change = wrapped(layer, form)
    with torch.no_grad():
        weight = from_matrix(bare, DENSE[form](as_matrix(bare), change))
        expected = torch.func.functional_call(bare, {"weight": weight}, (x.double(),))
        torch.testing.assert_close(model(x.double()), expected, atol=1e-9, rtol=1e-9)


def test_every_form_has_a_reference():
    assert FORMS.keys() == FORM_SETTINGS.keys() == DENSE.keys()


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 200), most=st.integers(1, 50))
def test_divisors_and_factors(size, most):
    found = divisor(size, most)
    assert size % found == 0
    assert not [d for d in range(found + 1, min(most, size) + 1) if size % d == 0]
    smaller, greater = factors(size)
    assert smaller * greater == size
    assert smaller <= greater
    assert not [d for d in range(smaller + 1, math.isqrt(size) + 1) if size % d == 0]


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"The form is 'none'; give one of hadamard, kronecker"):
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), WeightFormConfig(target_modules="0", form="none"))
    with pytest.raises(ValueError, match="2 butterfly factors do not fit a weight with 6 inputs"):
        wrapped(nn.Linear(6, 2), "butterfly")


def test_the_principal_directions_have_unique_signs():
    """A library may return any signs; an adapter must find the same basis again."""
    layer = nn.Linear(6, 5)
    up = wrapped(layer, "subspace_rotation")[1].up
    assert (up.gather(0, up.abs().argmax(0, keepdim=True)) > 0).all()


# ---- PEFT's own tuners on linear layers ----------------------------------------------------------------------------

ENGINE = {
    "LoHa": (
        LoHa(rank=2, alpha=3.0),
        {"hada_w1_a": "up_1", "hada_w1_b": "down_1", "hada_w2_a": "up_2", "hada_w2_b": "down_2"},
    ),
    "LoKr": (LoKr(rank=1, alpha=0.5), {"lokr_w1": "outer", "lokr_w2_a": "up", "lokr_w2_b": "down"}),
    "LoKr-full": (LoKr(rank=4), {"lokr_w1": "outer", "lokr_w2": "inner"}),
    "HiRA": (HiRA(rank=2), {"hira_A": "down", "hira_B": "up"}),
    "HRA": (HRA(rank=4), {"hra_u": "directions"}),
    "FourierFT": (FourierFT(entries=7), {"fourierft_spectrum": "entries"}),
    "C3A": (C3A(block=4), {"c3a_kernel": "kernels"}),
    "MiSS": (MiSS(rank=5), {"miss_block": "shard"}),
    "DeLoRA": (DeLoRA(rank=2), {"delora_A": "down", "delora_B": "up", "delora_lambda": "bound"}),
    "DEFT": (DEFT(rank=2), {"deft_P": "directions", "deft_R": "injected"}),
}


@pytest.mark.parametrize("name", ENGINE)
def test_both_engines_compute_the_same(name):
    spec, names = ENGINE[name]
    torch.manual_seed(0)
    layer = nn.Linear(12, 8)
    engine = get_peft_model(nn.Sequential(copy.deepcopy(layer)), spec.engine(exact(["0"])))
    form, values = spec.form()
    own = get_peft_model(
        nn.Sequential(copy.deepcopy(layer)), WeightFormConfig(target_modules="0", form=form, settings=values)
    )
    change = own.base_model.model[0].wform_change["default"]
    trained = {
        key.removeprefix("base_model.model.0.").split(".")[0]: p
        for key, p in engine.named_parameters()
        if p.requires_grad
    }
    assert trained.keys() == names.keys()
    with torch.no_grad():
        for key, parameter in trained.items():
            parameter += 0.2 * torch.randn(parameter.shape)
            getattr(change, names[key]).copy_(parameter.view_as(getattr(change, names[key])))
        for shape in ((12,), (3, 12), (2, 3, 12), (2, 3, 2, 12), (2, 1, 3, 2, 12)):
            x = torch.randn(shape)
            torch.testing.assert_close(own(x), engine(x), atol=1e-5, rtol=1e-5)
