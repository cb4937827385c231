"""LoRA and VeRA against their formulas; which engine LoRA takes, and the ranks that thin layers allow."""

from __future__ import annotations

import pytest
import torch
from timm.layers import Conv2dSame
from torch import nn

from common.attach import attach
from common.errors import GraftError
from common.methods import LoRA, VeRA
from common.tuners import WeightLoraConfig, is_own
from tests.toy import FAMILY, toy_backbone


def layered(spec, module, x):
    """Attach to one layer, make the adapter's weights random, return (adapted layer, output)."""
    torch.manual_seed(5)
    net = nn.Sequential(module)
    result = attach(net, spec, None)
    layer = result.model.get_submodule("base_model.model.0")
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.requires_grad:
                parameter.normal_()
        return layer, result.model(x)


def on_first(**settings):
    return LoRA(**({"target_modules": ["0"], "rank": 2} | settings))


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({}, 2.0),  # alpha is twice the rank where it is not given
        ({"alpha": 3.0}, 1.5),
        ({"alpha": 3.0, "rslora": True}, 3.0 / 2**0.5),
        ({"init": "gaussian"}, 2.0),
    ],
)
def test_lora_adds_the_scaled_low_rank_change(settings, scale):
    x, base = torch.randn(3, 5), nn.Linear(5, 4)
    layer, output = layered(on_first(**settings), base, x)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert (a.shape, b.shape) == ((2, 5), (4, 2))
    expected = x @ (base.weight + scale * b @ a).T + base.bias
    torch.testing.assert_close(output, expected)


def test_dora_trains_magnitude_and_direction_apart():
    x, base = torch.randn(3, 5), nn.Linear(5, 4)
    layer, output = layered(on_first(alpha=3.0, dora=True), base, x)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    magnitude = layer.lora_magnitude_vector["default"].weight
    direction = base.weight + 1.5 * b @ a
    expected = x @ (magnitude[:, None] * direction / direction.norm(dim=1, keepdim=True)).T + base.bias
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
        (nn.Conv2d(4, 6, 3, padding=2), (2, 4, 5, 5)),
        (nn.Conv3d(4, 6, 2), (2, 4, 3, 3, 3)),
        (nn.Conv2d(4, 6, 3, padding="same"), (2, 4, 5, 5)),
    ],
)
def test_lora_on_convolutions_is_a_change_of_the_kernel(layer, shape):
    x = torch.randn(shape)
    adapted, output = layered(on_first(), layer, x)
    a, b = adapted.lora_A["default"].weight, adapted.lora_B["default"].weight
    kernel = layer.weight + 2.0 * torch.einsum("or,ri...->oi...", b.flatten(1), a)
    expected = torch.nn.functional.__dict__[f"conv{x.ndim - 2}d"](
        x, kernel, layer.bias, layer.stride, layer.padding, layer.dilation
    )
    torch.testing.assert_close(output, expected, atol=1e-4, rtol=1e-4)


def test_lora_on_an_embedding_is_a_change_of_the_table():
    x, base = torch.tensor([[0, 3, 3]]), nn.Embedding(7, 4)
    layer, output = layered(on_first(), base, x)
    a, b = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    torch.testing.assert_close(output, (base.weight + 2.0 * (b @ a).T)[x])


def test_vera_scales_shared_random_matrices():
    x, base = torch.randn(3, 5), nn.Linear(5, 4)
    layer, output = layered(VeRA(target_modules=["0"], rank=3), base, x)
    a, b = layer.vera_A["default"][:, :5], layer.vera_B["default"][:4]
    d, scale = layer.vera_lambda_d["default"], layer.vera_lambda_b["default"]
    assert (d.shape, scale.shape) == ((3,), (4,))
    change = torch.diag(scale) @ b @ torch.diag(d) @ a
    torch.testing.assert_close(output, x @ (base.weight + change).T + base.bias)


def test_vera_starts_at_zero_with_the_given_d_and_draws_by_seed():
    def model(**settings):
        return attach(toy_backbone(), VeRA(rank=3, **settings), FAMILY).model

    layer = model(d_initial=0.3).get_submodule("base_model.model.blocks.0.fc1")
    assert torch.equal(layer.vera_lambda_d["default"], torch.full((3,), 0.3))
    assert not layer.vera_lambda_b["default"].any()
    shared = [m.vera_A["default"] for m in model().modules() if hasattr(m, "vera_A") and "default" in m.vera_A]
    assert len({matrix.data_ptr() for matrix in shared}) == 1
    first, again, other = (model(seed=s).get_submodule("base_model.model").blocks[0].fc1 for s in (0, 0, 1))
    assert torch.equal(first.vera_A["default"], again.vera_A["default"])
    assert not torch.equal(first.vera_A["default"], other.vera_A["default"])


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_from_the_spectrum_splits_the_weight(init):
    base = nn.Linear(6, 5)
    weight = base.weight.detach().clone()
    layer = attach(nn.Sequential(base), on_first(init=init), None).model.get_submodule("base_model.model.0")
    part = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    assert part.abs().max() > 0.01
    torch.testing.assert_close(base.weight + part, weight)
    if init == "pissa":  # the adapter holds the best rank-2 approximation
        u, s, vh = torch.linalg.svd(weight)
        torch.testing.assert_close(part, u[:, :2] @ torch.diag(s[:2]) @ vh[:2], atol=1e-5, rtol=1e-4)


# ---- engines -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Conv1d(4, 4, 3, dilation=2), "dilation (2,)"),
        (nn.Conv2d(4, 4, 3, dilation=(1, 3)), "dilation (1, 3)"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "padding mode 'reflect'"),
        (nn.Conv2d(4, 4, 3, groups=2), "2 groups"),
        (nn.ConvTranspose3d(4, 4, 2), "transposed"),
        (nn.Conv3d(4, 4, (1, 1, 3)), "kernel (1, 1, 3)"),
        (Conv2dSame(4, 4, 3), "class Conv2dSame"),
        (nn.utils.parametrizations.orthogonal(nn.Conv2d(4, 4, 1)), "class ParametrizedConv2d"),
    ],
)
def test_convolutions_that_the_engine_gets_wrong_take_grafts_own(layer, reason):
    net = nn.Sequential(nn.Linear(4, 4), layer)
    plan = on_first(target_modules=["0", "1"], alpha=3.0, rslora=True, dora=True).plan(net, None)
    assert plan.notes == (f"LoRA runs in Graft's own tuner, since PEFT's cannot do 1 of 2 layers: 1 ({reason}).",)
    config = plan.peft_config
    assert isinstance(config, WeightLoraConfig)
    assert (config.r, config.scale, config.dora, config.init) == (2, 3.0 / 2**0.5, True, "default")
    assert is_own(config.peft_type)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(4, 4),
        nn.Embedding(4, 4),
        nn.Conv1d(4, 4, 1),
        nn.Conv2d(4, 4, 1, bias=False),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.Conv3d(4, 4, (3, 1, 1)),
        nn.Conv3d(4, 4, 3, stride=2),
    ],
)
@pytest.mark.parametrize("dora", [False, True])
def test_all_others_take_pefts(layer, dora):
    plan = on_first(dora=dora).plan(nn.Sequential(layer), None)
    assert plan.notes == ("LoRA runs in PEFT's own tuner.",)
    assert plan.peft_config.peft_type == "LORA"


def test_many_layers_are_named_in_part():
    net = nn.Sequential(*(nn.Conv3d(2, 2, 1) for _ in range(5)))
    notes = LoRA(target_modules=list("01234"), rank=2).plan(net, None).notes
    assert len(notes) == 1
    assert notes[0].endswith(
        "5 of 5 layers: " + ", ".join(f"{i} (kernel (1, 1, 1))" for i in range(3)) + " and 2 more."
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"dropout": 0.2},
            r"LoRA dropout is 0\.2, but PEFT's own tuner cannot do '0' \(transposed\).*Set dropout to 0",
        ),
        *(
            ({"init": init}, rf"LoRA init is '{init}', but .*'0' \(transposed\).*'default' or 'gaussian'")
            for init in ("orthogonal", "pissa", "olora")
        ),
    ],
)
def test_what_weight_space_cannot_is_refused(settings, words):
    with pytest.raises(GraftError, match=words):
        on_first(**settings).plan(nn.Sequential(nn.ConvTranspose2d(4, 4, 2)), None)


def test_a_weight_that_is_computed_at_each_call_is_refused():
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1)))
    with pytest.raises(GraftError, match=r"does not fit Sequential.*no parameter 'weight' itself"):
        attach(net, on_first(), None)


# ---- thin layers ---------------------------------------------------------------------------------------------------


def thin_net():
    return nn.Sequential(nn.Conv2d(1, 8, 2), nn.Conv2d(8, 3, 1), nn.Conv2d(3, 6, 3))


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_a_rank_above_a_layers_size_is_lowered_at_the_same_scale(rslora, own):
    net = thin_net()
    if own:
        net[2] = nn.Conv2d(3, 6, 3, padding=2, dilation=2)
    spec = LoRA(target_modules=["0", "1", "2"], rank=6, alpha=3.0, rslora=rslora)
    result = attach(net, spec, None)
    assert result.plan.notes[1] == "Rank 6 is lowered to the layer's own size in 2 layers: 0 (4), 1 (3)."
    scale = 3.0 / (6**0.5 if rslora else 6)
    for index, rank in enumerate((4, 3, 6)):
        layer = result.model.get_submodule(f"base_model.model.{index}")
        a = layer.wlora_A["default"] if own else layer.lora_A["default"].weight
        assert len(a) == rank
        assert layer.scaling["default"] == pytest.approx(scale)
    assert sum(p.numel() for p in result.model.parameters() if p.requires_grad) == 4 * 12 + 3 * 11 + 6 * (27 + 6)


def test_lowered_ranks_are_exactly_the_named_layers():
    """PEFT's pattern would match a suffix: `1` is also the end of `2.1`."""
    net = nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 2), nn.Sequential(nn.Linear(2, 9), nn.Linear(9, 9)))
    result = attach(net, LoRA(target_modules=["1", "2.1"], rank=4), None)
    ranks = {name: result.model.get_submodule(f"base_model.model.{name}").r["default"] for name in ("1", "2.1")}
    assert ranks == {"1": 2, "2.1": 4}


def test_a_start_from_the_spectrum_takes_what_a_thin_layer_has():
    base = nn.Linear(9, 2)
    weight = base.weight.detach().clone()
    layer = attach(nn.Sequential(base), LoRA(target_modules=["0"], rank=6, init="pissa"), None).model
    layer = layer.get_submodule("base_model.model.0")
    part = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(part, weight, atol=1e-5, rtol=1e-4)  # a full rank takes all


def test_an_orthogonal_start_stays_even():
    def ranks(*layers):
        spec = LoRA(target_modules=[str(i) for i in range(len(layers))], rank=4, init="orthogonal")
        result = attach(nn.Sequential(*layers), spec, None)
        return [result.model.get_submodule(f"base_model.model.{i}").r["default"] for i in range(len(layers))]

    assert ranks(nn.Linear(3, 9), nn.Linear(9, 9)) == [2, 4]
    with pytest.raises(GraftError, match="init 'orthogonal' needs a rank of at least 2, and '0' allows 1"):
        ranks(nn.Linear(1, 9))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_no_export_could_hold_is_refused(init):
    spec = LoRA(target_modules=["0"], rank=4, init=init, rslora=True)
    with pytest.raises(GraftError, match=rf"rslora cannot start from {init} where layers allow less than rank 4 \(0\)"):
        spec.plan(nn.Sequential(nn.Linear(9, 2)), None)
    spec.plan(nn.Sequential(nn.Linear(9, 9)), None)


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [nn.LayerNorm(4), nn.PReLU(), nn.Sequential(nn.Linear(2, 2)), nn.LSTM(4, 4)])
@pytest.mark.parametrize("method", [LoRA, VeRA])
def test_layers_of_other_types_are_refused(layer, method):
    with pytest.raises(GraftError, match=rf"{method.__name__} cannot act on '0' \({type(layer).__name__}"):
        attach(nn.Sequential(layer), method(target_modules=["0"]), None)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (LoRA(rank=0), "LoRA rank is 0"),
        (VeRA(rank=-1), "VeRA rank is -1"),
        (LoRA(dropout=1.0), r"dropout is 1\.0"),
        (LoRA(dropout=-0.1), r"dropout is -0\.1"),
        (LoRA(dora=True, init="pissa"), "dora cannot start from pissa"),
        (LoRA(rank=3, init="orthogonal"), "rank to be even"),
        (LoRA(target_modules=["blocks.0.nope"]), r"\['blocks.0.nope'\] do not exist"),
    ],
)
def test_settings_out_of_range_are_refused(spec, words):
    with pytest.raises(GraftError, match=words):
        attach(toy_backbone(), spec, FAMILY)


def test_what_the_engine_refuses_is_the_users_error_too():
    with pytest.raises(GraftError, match=r"does not fit Sequential.*pissa"):
        attach(nn.Sequential(nn.Conv2d(4, 8, 3)), LoRA(target_modules=["0"], init="pissa"), None)


def test_exactly_the_named_modules_are_adapted():
    """`fc1` is no suffix here: `blocks.0.fc1` alone is taken, not `blocks.1.fc1`."""
    result = attach(toy_backbone(), LoRA(target_modules=["blocks.0.fc1"]), FAMILY)
    assert result.plan.targets == {"blocks.0.fc1": "ffn_in"}
    adapted = [name for name, module in result.model.named_modules() if hasattr(module, "lora_A")]
    assert adapted == ["base_model.model.blocks.0.fc1"]
