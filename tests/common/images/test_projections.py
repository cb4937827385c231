"""Which of queries, keys and values each projection of an image network computes, and methods on some of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from common.attach import attach, probe
from common.errors import GraftError
from common.images.backbones import tokens
from common.methods import METHODS, LoRA
from common.roles import SHARES, resolve
from tests.nets import NETS, build_net, images


@pytest.mark.parametrize("key", list(NETS))
def test_of_every_projection_it_is_known_what_it_computes(key):
    built = build_net(key)
    roles = resolve(built.model, built.family)
    for name, role in roles.role_of.items():
        assert bool(roles.shares.get(name)) == (role == "attention_qkv"), name
    for share, modules in _by_share(roles).items():
        assert len(modules) == len(roles.blocks) * ("attention_qkv" in roles.role_of.values()), share


def _by_share(roles):
    return {share: [name for name, some in roles.shares.items() if share in some] for share in SHARES}


@pytest.mark.parametrize("key", ["vit", "beit", "swin"])
@torch.no_grad()
def test_the_thirds_of_a_fused_projection_are_queries_keys_and_values(key):
    """The same vector added to all keys changes no softmax, and added to all values the mixed ones by itself."""
    built = build_net(key)
    roles = resolve(built.model, built.family)
    name = next(name for name in roles.shares)
    qkv, attention = built.model.get_submodule(name), built.model.get_submodule(name.removesuffix(".qkv"))
    added = [torch.zeros(qkv.out_features)]
    qkv.register_forward_hook(lambda module, args, out: out + added[0])
    mixed = []
    attention.proj.register_forward_pre_hook(lambda module, args: mixed.append(args[0]))
    size = qkv.out_features // 3
    vector = torch.randn(size, generator=torch.Generator().manual_seed(0))
    for third in (None, 0, 1, 2):
        if third is not None:
            added[0] = functional.pad(vector, (third * size, (2 - third) * size))
        tokens(built.model, images(key))
    torch.testing.assert_close(mixed[2], mixed[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mixed[3], mixed[0] + vector, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(mixed[1], mixed[0], atol=1e-4)


@pytest.mark.parametrize("key", ["vit", "eva02", "eva02-fused", "swin"])
def test_lora_on_queries_and_values_leaves_the_keys(key):
    built = build_net(key)
    attached = attach(built.model, LoRA(on=["attention_q", "attention_v"], rank=2), built.family)
    probe(attached, lambda: tokens(attached.model, images(key)))
    fused = key != "eva02"
    assert ("Graft's own tuner" in attached.plan.notes[0]) == fused
    if not fused:
        assert not [name for name in attached.plan.targets if name.endswith("k_proj")]
        return
    assert "(queries and values alone)" in attached.plan.notes[0]
    for name in attached.plan.targets:
        layer = built.model.get_submodule(name)
        nn.init.normal_(layer.wlora_B["default"])
        found, size = layer.exchanged("default")["weight"], layer.base_layer.out_features // 3
        same = [torch.equal(*pair) for pair in zip(found.split(size), layer.base_layer.weight.split(size), strict=True)]
        assert same == [False, True, False]


def test_a_method_that_acts_on_whole_layers_refuses_a_third():
    built = build_net("vit")
    with pytest.raises(GraftError, match=r"IA3 cannot act on the queries, keys or values of 'blocks\.0\.attn\.qkv'"):
        attach(built.model, METHODS["IA3"](on=["attention_k"]), built.family)
