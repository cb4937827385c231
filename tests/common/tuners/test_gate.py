"""Gates that tokens open: a mean over an example's tokens without its padding."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn

from common.tuners._gate import TokenGate, seen_tokens


def gate(inputs=4, gates=2, dtype=torch.float32):
    made = TokenGate(inputs, gates, torch.empty(1, dtype=dtype))
    nn.init.normal_(made.weight)
    nn.init.normal_(made.bias)
    return made


def tokens(*sizes, dtype=torch.float32):
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(0)).to(dtype)


@settings(max_examples=30, deadline=None)
@given(sides=st.lists(st.integers(1, 4), max_size=3), gates=st.integers(1, 3), padded=st.booleans())
def test_a_gate_is_the_mean_of_its_tokens_own(sides, gates, padded):
    made, x = gate(gates=gates), tokens(2, *sides, 4)
    seen = torch.rand(2, *sides, generator=torch.Generator().manual_seed(1)) < 0.5 if padded else None
    found = made(x, seen)
    assert found.shape == (2, *(1,) * len(sides), gates)
    for row in range(2):
        rows = x[row].reshape(-1, 4)
        rows = rows if seen is None else rows[seen[row].flatten()]
        expected = [1 / (1 + torch.exp(-(t @ made.weight.T + made.bias))) for t in rows]
        expected = torch.stack(expected).mean(0) if expected else torch.zeros(gates)
        torch.testing.assert_close(found[row].flatten(), expected)


def test_a_gate_starts_about_half_open():
    started = TokenGate(64, 3, torch.empty(1))
    assert not started.bias.any()
    assert started.weight.std().item() == pytest.approx(0.02, rel=0.3)
    torch.testing.assert_close(started(tokens(2, 5, 64)), torch.full((2, 1, 3), 0.5), atol=0.05, rtol=0)


def test_half_precision_opens_in_single():
    made, x = gate(dtype=torch.bfloat16), tokens(2, 5, 4)
    assert made.weight.dtype == torch.float32
    assert made(x.bfloat16()).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        found = made(x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, made(x), atol=0.02, rtol=0)


def test_a_mask_of_other_tokens_is_an_error():
    with pytest.raises(ValueError, match=r"reads tokens \(2, 5, 4\), and its mask is of \(2, 4\)"):
        gate()(tokens(2, 5, 4), torch.ones(2, 4, dtype=torch.bool))


SEEN = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
ADDED = torch.zeros(2, 4).masked_fill(~SEEN, -10000.0)


@pytest.mark.parametrize(
    "mask",
    [
        SEEN,
        SEEN.long(),
        SEEN[:, None, None, :],
        SEEN[:, None, None, :].expand(2, 3, 4, 4),
        ADDED,
        ADDED[:, None, None, :].expand(2, 1, 4, 4),
    ],
    ids=["bool", "long", "of keys", "of heads", "added", "added to scores"],
)
def test_padding_is_what_no_token_sees(mask):
    assert torch.equal(seen_tokens(tokens(2, 4, 3), mask), SEEN)


def test_a_mask_of_all_examples_and_none():
    assert torch.equal(seen_tokens(tokens(2, 4, 3), SEEN[1:, None, None, :]), SEEN[1:].expand(2, 4))
    assert seen_tokens(tokens(2, 4, 3), None).all()
