"""IA3, SSF, ConvAdapter, Houlsby and Pfeiffer: what they take, and their formulas through the spec."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from common.attach import attach
from common.errors import GraftError
from common.methods import IA3, SSF, ConvAdapter, Houlsby, Pfeiffer
from tests.toy import FAMILY, toy_backbone


def scaled_layer(model, name):
    layer = model.get_submodule(f"base_model.model.{name}")
    with torch.no_grad():
        layer.ia3_l["default"].normal_()
    return layer, layer.ia3_l["default"].flatten()


@pytest.mark.parametrize("name", ["blocks.0.qkv", "blocks.1.fc1"])
def test_outputs_are_scaled(name):
    bare = toy_backbone().get_submodule(name)
    layer, scale = scaled_layer(attach(toy_backbone(), IA3(), FAMILY).model, name)
    x = torch.randn(2, 3, bare.in_features)
    assert scale.numel() == bare.out_features
    torch.testing.assert_close(layer(x), scale * (x @ bare.weight.T + bare.bias))


def test_the_second_feed_forward_layer_is_scaled_at_its_input():
    bare = toy_backbone().get_submodule("blocks.0.fc2")
    layer, scale = scaled_layer(attach(toy_backbone(), IA3(), FAMILY).model, "blocks.0.fc2")
    x = torch.randn(2, 3, bare.in_features)
    assert scale.numel() == bare.in_features
    torch.testing.assert_close(layer(x), (scale * x) @ bare.weight.T + bare.bias)


def test_convolutions_are_scaled_by_channel():
    bare = nn.Conv2d(3, 5, 2)
    result = attach(nn.Sequential(bare), IA3(target_modules=["0"]), None)
    layer, scale = scaled_layer(result.model, "0")
    x = torch.randn(2, 3, 4, 4)
    expected = scale[:, None, None] * bare(x)
    torch.testing.assert_close(layer(x), expected)


def test_ia3_takes_layers_that_the_engine_lacks():
    """The same scales, in Graft's own tuner, where one target is a convolution that PEFT refuses."""
    net = nn.Sequential(nn.Conv2d(3, 4, 2), nn.ConvTranspose2d(4, 5, 2, stride=2))
    x = torch.randn(2, 3, 4, 4)
    middle, expected = net[0](x), net(x)
    result = attach(net, IA3(target_modules=["0", "1"]), None)
    assert result.plan.notes == (
        "IA3 runs in Graft's own tuner, since PEFT's cannot do 1 of 2 layers: 1 (ConvTranspose2d).",
    )
    torch.testing.assert_close(result.model(x), expected)
    first, second = (result.model.get_submodule(f"base_model.model.{i}").sshift_scale["default"] for i in (0, 1))
    with torch.no_grad():
        first.normal_()
        second.normal_()
        expected = second[:, None, None] * net[1].base_layer(first[:, None, None] * middle)
    torch.testing.assert_close(result.model(x), expected)


def test_ia3_scales_the_second_feed_forward_layer_at_its_input_in_either_tuner():
    for on in (["ffn"], ["ffn", "stem"]):
        bare = toy_backbone()
        model = attach(toy_backbone(), IA3(on=on), FAMILY).model
        layer = model.get_submodule("base_model.model.blocks.0.fc2")
        scale = layer.ia3_l["default"] if on == ["ffn"] else layer.sshift_scale["default"]
        with torch.no_grad():
            scale.normal_()
        x = torch.randn(2, 3, bare.blocks[0].fc2.in_features)
        torch.testing.assert_close(layer(x), bare.blocks[0].fc2(scale.flatten() * x))


def test_ssf_takes_weights_and_norms_and_shifts_where_there_is_a_bias():
    targets = attach(toy_backbone(), SSF(), FAMILY).plan.targets
    assert set(targets.values()) == {"attention_qkv", "attention_out", "ffn_in", "ffn_out", "norm"}
    net = nn.Sequential(nn.Linear(4, 3, bias=False), nn.BatchNorm1d(3))
    bare = nn.Sequential(nn.Linear(4, 3, bias=False), nn.BatchNorm1d(3)).eval()
    bare.load_state_dict(net.state_dict())
    model = attach(net, SSF(target_modules=["0", "1"]), None).model.eval()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    names = ["0.sshift_scale", "1.sshift_scale", "1.sshift_shift"]
    assert sorted(trained) == [f"base_model.model.{name}.default" for name in names]
    first, scale, shift = (trained[name] for name in sorted(trained))
    with torch.no_grad():
        for parameter in trained.values():
            parameter.normal_()
    x = torch.randn(5, 4)
    torch.testing.assert_close(model(x), scale * bare[1](first * bare[0](x)) + shift)


@pytest.mark.parametrize(
    ("method", "layer"),
    [
        (IA3, nn.Embedding(3, 3)),
        (IA3, nn.LayerNorm(3)),
        (SSF, nn.Embedding(3, 3)),
        (SSF, nn.PReLU()),
        (ConvAdapter, nn.Linear(3, 3)),
        (ConvAdapter, nn.LayerNorm(3)),
        (Houlsby, nn.Embedding(3, 3)),
        (Pfeiffer, nn.LayerNorm(3)),
    ],
)
def test_layers_of_other_types_are_refused(method, layer):
    words = rf"{method.__name__} cannot act on '0' \({type(layer).__name__}, role custom\); it takes .*Conv3d"
    with pytest.raises(GraftError, match=words):
        attach(nn.Sequential(layer), method(target_modules=["0"]), None)


def test_a_reduction_out_of_range_is_refused():
    with pytest.raises(GraftError, match="ConvAdapter reduction is 0"):
        attach(nn.Sequential(nn.Conv2d(3, 3, 1)), ConvAdapter(target_modules=["0"], reduction=0), None)
    with pytest.raises(GraftError, match="Role 'conv' matches no module of this toy backbone"):
        attach(toy_backbone(), ConvAdapter(), FAMILY)


def test_a_convolution_that_computes_its_weight_is_the_users_error():
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 1)))
    with pytest.raises(GraftError, match=r"does not fit Sequential.*computed at each call"):
        attach(net, SSF(target_modules=["0"]), None)


def randomised(attached):
    """Give every trained parameter a random value, and return the adapted layers' parts by layer."""
    for name, parameter in attached.model.named_parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
    attached.train(False)
    return {name: attached.model.get_submodule(f"base_model.model.{name}") for name in attached.plan.targets}


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize(
    ("spec", "act", "behind"),
    [(Houlsby, nn.functional.gelu, ("out", "fc2")), (Pfeiffer, nn.functional.relu, ("fc2",))],
)
def test_a_bottleneck_stands_before_the_skip_connection(spec, act, behind, scale):
    """The whole backbone, computed by hand with x + adapter(sub-layer(x)), as in figure 2 of the paper."""
    attached = attach(toy_backbone(), spec(width=3, scale=scale), FAMILY)
    layers = randomised(attached)
    assert list(layers) == [f"blocks.{block}.{name}" for block in (0, 1) for name in behind]
    net, x = toy_backbone().eval(), torch.randn(2, 3, 4)

    def adapter(name, h):
        if name not in layers:
            return h
        down, up = layers[name].badapter_down["default"], layers[name].badapter_up["default"]
        return h + scale * (act(h @ down.weight.T + down.bias) @ up.weight.T + up.bias)

    with torch.no_grad():
        h = net.embed(net.input_norm(x.mT).mT)
        h = h + net.mix(h.mT).mT
        for i, block in enumerate(net.blocks):
            q, k, v = block.qkv(block.norm1(h)).chunk(3, dim=-1)
            h = h + adapter(f"blocks.{i}.out", block.out((q @ k.mT / 8**0.5).softmax(-1) @ v))
            h = h + adapter(f"blocks.{i}.fc2", block.fc2(torch.relu(block.fc1(block.norm2(h)))))
        torch.testing.assert_close(attached.model(x), net.norm(h), atol=1e-4, rtol=1e-4)


def test_a_width_above_a_layers_outputs_is_lowered_and_said():
    spec = Houlsby(on=["ffn_in@first:1", "stem"], width=9)
    attached = attach(toy_backbone(), spec, FAMILY)
    assert attached.plan.notes == ("Width 9 is lowered to the layer's outputs in 2 layers: embed (8), mix (8).",)
    widths = {name: layer.badapter_down["default"].weight.shape[0] for name, layer in randomised(attached).items()}
    assert widths == {"embed": 8, "mix": 8, "blocks.0.fc1": 9}
    assert attach(toy_backbone(), Houlsby(width=8), FAMILY).plan.notes == ()


def test_a_width_out_of_range_is_refused():
    for spec in (Houlsby, Pfeiffer):
        with pytest.raises(GraftError, match=f"{spec.__name__} width is 0; give a whole number of at least 1"):
            attach(toy_backbone(), spec(width=0), FAMILY)
