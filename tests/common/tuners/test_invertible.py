"""The invertible coupling against its formula, and its inverse."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.nn import functional

from common.tuners import InvertibleConfig

IDS = torch.randint(0, 9, (2, 5), generator=torch.Generator().manual_seed(0))
LAYERS = {
    "embedding": (nn.Embedding(9, 8, padding_idx=0), IDS),
    "odd": (nn.Linear(4, 7), torch.randn(3, 4)),
    "convolution": (nn.Conv2d(3, 8, 2, stride=2), torch.randn(2, 3, 4, 4)),
    "transposed": (nn.ConvTranspose1d(3, 6, 2), torch.randn(2, 3, 4)),
    "unbatched": (nn.Conv3d(3, 4, 1), torch.randn(3, 2, 2, 2)),
}


def wrap(layer, **options):
    return get_peft_model(nn.Sequential(copy.deepcopy(layer)), InvertibleConfig(target_modules="0", **options))


@pytest.mark.parametrize("reduction", [1, 2, 64])
@pytest.mark.parametrize("kind", LAYERS)
def test_the_halves_are_coupled_and_can_be_taken_apart(kind, reduction):
    base, x = LAYERS[kind]
    model = wrap(base, reduction=reduction)
    layer = model.base_model.model[0]
    axis = {"convolution": 1, "transposed": 1, "unbatched": 0}.get(kind, -1)
    with torch.no_grad():
        bare = base(x)
        assert torch.equal(model(x), bare)
        for name, parameter in model.named_parameters():
            if "invertible_" in name:
                nn.init.normal_(parameter)

        def bottleneck(name, half):
            down = getattr(layer, f"invertible_{name}_down")["default"]
            up = getattr(layer, f"invertible_{name}_up")["default"]
            assert down.weight.shape[0] == max(1, half.shape[-1] // reduction)
            return functional.relu(half @ down.weight.flatten(1).T + down.bias) @ up.weight.flatten(1).T + up.bias

        h = bare.movedim(axis, -1)
        size = h.shape[-1] // 2
        first = h[..., :size] + bottleneck("f", h[..., size:])
        second = h[..., size:] + bottleneck("g", first)
        expected = torch.cat((first, second), dim=-1).movedim(-1, axis)
        output = model(x)
        torch.testing.assert_close(output, expected, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(output, bare, atol=1e-2)
        torch.testing.assert_close(layer.inverse("default", output), bare, atol=1e-3, rtol=1e-3)


def test_what_cannot_be_halved_is_refused():
    with pytest.raises(ValueError, match="'0' has one output, which cannot be halved"):
        wrap(nn.Linear(3, 1))
    with pytest.raises(TypeError, match=r"'0' \(LayerNorm\) is no embedding"):
        wrap(nn.LayerNorm(3))
    with pytest.raises(NotImplementedError, match="run behind the layers and are no change of their weights"):
        wrap(nn.Linear(3, 4)).merge_adapter()
