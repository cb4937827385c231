"""Edits behind blocks against their formulas: Adapter+ and the three kinds of ReFT."""

from __future__ import annotations

import functools
from unittest import mock

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn import functional

from common.errors import GraftError
from common.tuners import PostAdapterConfig, ReftConfig


class Block(nn.Module):
    """A block of any library: called by keyword or not, with the hidden state alone or in front of something else."""

    def __init__(self, puts_out):
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.puts_out = puts_out

    def forward(self, hidden, scale=1.0):
        hidden = hidden + scale * self.layer(hidden)
        return {"tensor": hidden, "tuple": (hidden, "rest"), "list": [hidden, 3], "dict": {"hidden": hidden}}[
            self.puts_out
        ]


class Net(nn.Module):
    def __init__(self, puts_out):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.block = Block(puts_out)

    def forward(self, x):
        return self.block(hidden=x, scale=0.5)


COMMON = {"target_modules": "block", "channels": {"block": 6}, "width": 2}
CONFIGS = {
    "post": PostAdapterConfig,
    **{kind: functools.partial(ReftConfig, kind=kind) for kind in ("loreft", "noreft", "direft")},
}
EACH = pytest.mark.parametrize("kind", CONFIGS)


def wrap(kind, puts_out="tensor", **options):
    return get_peft_model(Net(puts_out), CONFIGS[kind](**(COMMON | options)))


def randomise(model):
    for name, parameter in model.named_parameters():
        if ".layer." not in name:
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
    return model


def x():
    return torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(1))


def bare():
    return Net("tensor").requires_grad_(False)(x())


def edited(model, kind, hidden):
    block = model.base_model.model.block
    if kind == "post":
        down, up, scale = (getattr(block, f"postadapter_{part}")["default"] for part in ("down", "up", "scale"))
        return hidden + scale * (functional.gelu(hidden @ down.weight.T + down.bias) @ up.weight.T + up.bias)
    free, source, bias = (getattr(block, f"reft_{part}")["default"] for part in ("subspace", "source", "bias"))
    basis = torch.linalg.cholesky(free.T @ free).inverse() @ free.T if kind == "loreft" else free.T  # by Gram-Schmidt
    taken = 0 if kind == "direft" else hidden @ basis.T
    return hidden + (hidden @ source.T + bias - taken) @ basis


@EACH
@settings(max_examples=10, deadline=None)
@given(width=st.integers(1, 6), shape=st.lists(st.integers(1, 3), max_size=3))
def test_the_hidden_state_is_edited_by_the_formula(kind, width, shape):
    model, state = wrap(kind, width=width), torch.randn(*shape, 6)
    with torch.no_grad():
        expected = Net("tensor").requires_grad_(False)(state)
        assert torch.equal(model(state), expected)
        randomise(model)
        torch.testing.assert_close(model(state), edited(model, kind, expected), atol=1e-3, rtol=1e-3)
        with model.disable_adapter():
            assert torch.equal(model(state), expected)


def test_a_subspace_does_not_depend_on_the_signs_that_a_library_chooses():
    model, x0 = randomise(wrap("loreft")), x()
    block = model.base_model.model.block
    expected = model(x0)
    qr = torch.linalg.qr

    def flipped(matrix):
        factors = qr(matrix)
        return torch.return_types.linalg_qr((-factors.Q, -factors.R))

    with mock.patch.object(torch.linalg, "qr", flipped):
        torch.testing.assert_close(model(x0), expected)
    assert block.basis("default").shape == (2, 6)


@EACH
def test_what_stands_beside_the_hidden_state_is_kept(kind):
    expected = randomise(wrap(kind))(x())
    for puts_out, rest in (("tuple", "rest"), ("list", 3)):
        output = randomise(wrap(kind, puts_out))(x())
        assert type(output).__name__ == puts_out
        assert torch.equal(output[0], expected)
        assert output[1] == rest
    with pytest.raises(TypeError, match="A block puts out dict, not a tensor or a tuple that begins with one"):
        wrap(kind, "dict")(x())


def test_loreft_edits_within_an_orthonormal_subspace_and_nowhere_else():
    model = randomise(wrap("loreft"))
    basis = model.base_model.model.block.basis("default")
    torch.testing.assert_close(basis @ basis.T, torch.eye(2), atol=1e-5, rtol=1e-5)
    change = model(x()) - bare()
    torch.testing.assert_close(change @ basis.T @ basis, change, atol=1e-4, rtol=1e-4)
    source, bias = (getattr(model.base_model.model.block, f"reft_{part}")["default"] for part in ("source", "bias"))
    inside = bare() @ source.T + bias
    torch.testing.assert_close(model(x()) @ basis.T, inside, atol=1e-4, rtol=1e-4)  # whatever it was before


@pytest.mark.parametrize("kind", ["loreft", "noreft", "direft"])
def test_the_first_tokens_alone_are_edited(kind, tmp_path):
    config = ReftConfig(kind=kind, first=3, **COMMON)
    model, whole = randomise(get_peft_model(Net("tensor"), config)), randomise(wrap(kind))
    torch.testing.assert_close(model(x())[:, :3], whole(x())[:, :3])
    assert torch.equal(model(x())[:, 3:].detach(), bare()[:, 3:])
    assert torch.equal(model(x()[:, :2]), whole(x()[:, :2]))  # a sequence that is shorter
    with pytest.raises(GraftError, match=r"'first: 3' counts tokens of a sequence \(B, N, C\)"):
        model(x()[None])
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    assert torch.equal(PeftModel.from_pretrained(Net("tensor"), str(tmp_path))(x()), model(x()))


def test_a_kind_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="The kind is 'reft'; give loreft, noreft or direft"):
        get_peft_model(Net("tensor"), ReftConfig(kind="reft", **COMMON))
