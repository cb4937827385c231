"""The methods that PEFT's own tuners run, each against its formula on one linear layer; and what they refuse."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from common.attach import attach
from common.errors import GraftError
from common.methods import (
    BEFT,
    BOFT,
    C3A,
    HRA,
    METHODS,
    OFT,
    AdaLoRA,
    DeLoRA,
    FourierFT,
    GLoRA,
    LoHa,
    LoRA,
    MiSS,
    PEANuT,
    PVeRA,
    RandLoRA,
    RoAd,
    SuperTuning,
    TinyLoRA,
    UniLoRA,
    VBLoRA,
    WaveFT,
)
from tests.cases import LINEAR_ONLY
from tests.toy import FAMILY, toy_backbone
from tests.zoo import FAMILY as ZOO
from tests.zoo import zoo, zoo_spec

INPUTS, OUTPUTS = 6, 8


def matrices(spec, inputs=INPUTS, outputs=OUTPUTS):
    """Attach to one layer with random trained values; return (adapted layer, old weight and bias, new ones)."""
    torch.manual_seed(5)
    net = nn.Sequential(nn.Linear(inputs, outputs))
    weight, bias = (p.detach().clone() for p in net.parameters())
    result = attach(net, spec, None)
    result.train(False)
    with torch.no_grad():
        for parameter in result.model.parameters():
            if parameter.requires_grad:
                parameter += 0.5 * torch.randn(parameter.shape)
        shift = result.model(torch.zeros(1, inputs))[0]
        changed = (result.model(torch.eye(inputs)) - shift).T
    return result.model.get_submodule("base_model.model.0"), weight, bias, changed, shift


def on_it(method, **settings):
    return method(target_modules=["0"], **settings)


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_adalora_adds_a_singular_value_decomposition():
    layer, weight, bias, changed, shift = matrices(on_it(AdaLoRA, rank=2, start_rank=3, alpha=4.5))
    a, e, b = (getattr(layer, f"lora_{part}")["default"] for part in "AEB")
    close(changed, weight + 4.5 / 3 * b @ torch.diag(e[:, 0]) @ a)
    close(shift, bias)


def test_glora_scales_and_shifts_weight_and_bias():
    layer, weight, bias, changed, shift = matrices(on_it(GLoRA, rank=2))
    a, b, c, d, e = (getattr(layer, f"glora_{part}")["default"] for part in "ABCDE")
    close(changed, weight * (1 + a.Xd @ a.Xu) + b.Xd @ b.Xu)
    close(shift, bias * (1 + d.X) + e.X + weight @ (c.Xd @ c.Xu)[:, 0])


@pytest.mark.parametrize("depth", [0, 1])
def test_peanut_reads_the_weight_and_writes_its_change(depth):
    layer, weight, _, changed, _ = matrices(on_it(PEANuT, rank=3, depth=depth, activation="tanh", scale=0.5))
    hidden = torch.tanh(weight.T @ layer.peanut_A["default"].weight.T)
    if depth:
        inner = torch.tanh(layer.peanut_encoders["default"][0](hidden))
        hidden = torch.tanh(layer.peanut_decoders["default"][0](inner)) + hidden
    close(changed, weight + 0.5 * layer.peanut_B["default"](hidden).T)


@pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"])
def test_road_turns_pairs_of_outputs(variant):
    layer, weight, bias, changed, shift = matrices(on_it(RoAd, variant=variant, group=4))
    angle, scale = layer.road_theta["default"], layer.road_alpha["default"]
    turn = torch.zeros(OUTPUTS, OUTPUTS)
    for pair in range(OUTPUTS // 2):
        group, place = divmod(pair, 2)
        i, j = 4 * group + place, 4 * group + place + 2
        for row, column, sign in ((i, j, -1), (j, i, 1)):
            near = far = {"road_1": pair, "road_2": row}.get(variant)
            if variant == "road_4":
                near, far = 8 * group + row % 4, 8 * group + 4 + row % 4
            turn[row, row] = scale[near] * angle[near].cos()
            turn[row, column] = sign * scale[far] * angle[far].sin()
    close(changed, turn @ weight)
    close(shift, turn @ bias)


def test_pvera_uses_the_mean():
    layer, weight, _, changed, _ = matrices(on_it(PVeRA, rank=3))
    a, b = layer.pvera_A["default"][:, :INPUTS], layer.pvera_B["default"][:OUTPUTS]
    d, scale = layer.pvera_lambda_d["default"], layer.pvera_lambda_b["default"]
    close(changed, weight + torch.diag(scale) @ b @ (d[:, None] * a)[:3])


def test_pvera_draws_in_training_alone():
    model = attach(nn.Sequential(nn.Linear(4, 4)), on_it(PVeRA, rank=3), None)
    for parameter in model.model.parameters():
        if parameter.requires_grad:
            nn.init.ones_(parameter)
    x = torch.randn(3, 4)
    model.train(False)
    assert torch.equal(model.model(x), model.model(x))
    model.train(True)
    assert not torch.equal(model.model(x), model.model(x))


@pytest.mark.parametrize("sides", [(6, 8), (8, 6)])
def test_randlora_sums_scaled_random_bases(sides):
    layer, weight, _, changed, _ = matrices(on_it(RandLoRA, rank=4, alpha=2.0), *sides)
    a, b = layer.randlora_A["default"], layer.randlora_B["default"]  # (rank, 1, 6), (8, 2, rank)
    scales, rows = layer.randlora_lambda["default"], layer.randlora_gamma["default"]
    change = torch.zeros(8, 6)
    for f in range(2 * 4):  # the paper pairs column k of basis j with row k of A; PEFT counts the two in other orders
        (j, k), (row, scale) = divmod(f, 4), divmod(f, 2)
        change += torch.outer(b[:, j, k], scales[row, scale] * a[row, 0] * rows[scale])
    close(changed, weight + 0.5 * (change if sides == (6, 8) else change.T))


def test_vblora_puts_its_factors_together_from_a_bank():
    layer, weight, _, changed, _ = matrices(on_it(VBLoRA, rank=3, vectors=5, length=2, top=2))
    bank = layer.vblora_vector_bank["default"]

    def vector(logits):
        values, places = logits.sort(descending=True)
        return values[:2].softmax(0) @ bank[places[:2]]

    a = torch.stack([torch.cat([vector(part) for part in row]) for row in layer.vblora_logits_A["default"]])
    b = torch.cat([torch.stack([vector(part) for part in tile], dim=1) for tile in layer.vblora_logits_B["default"]])
    close(changed, weight + b @ a)


def test_unilora_reads_its_factors_out_of_one_vector():
    layer, weight, _, changed, _ = matrices(on_it(UniLoRA, rank=2, length=5))
    vector = layer.unilora_theta_d["default"]
    places = [layer.unilora_indices_A["default"], layer.unilora_indices_B["default"]]
    uses = torch.bincount(torch.cat([part.flatten().long() for part in places]), minlength=5)
    assert uses.max() - uses.min() <= 1
    a, b = (vector[part.long()] / uses[part.long()].sqrt() for part in places)
    close(changed, weight + b @ a)


def test_tinylora_combines_random_matrices_within_the_weights_subspace():
    layer, weight, _, changed, _ = matrices(on_it(TinyLoRA, rank=2, parameters=3))
    u, s, vh = torch.linalg.svd(weight)
    a, b = layer.tinylora_A["default"], layer.tinylora_B["default"]
    close(b @ a, u[:, :2] @ torch.diag(s[:2]) @ vh[:2])
    (vector,) = layer.tinylora_v["default"].values()
    close(changed, weight + b @ sum(v * p for v, p in zip(vector, layer.tinylora_P["default"], strict=True)) @ a)


@pytest.mark.parametrize("greatest", [True, False])
def test_supertuning_changes_the_greatest_entries_alone(greatest):
    layer, weight, _, changed, _ = matrices(on_it(SuperTuning, sparsity=0.75, greatest=greatest))
    order = weight.abs().flatten().argsort(descending=greatest)[:12]
    assert set(layer.supertuning_indices["default"].tolist()) == set(order.tolist())
    moved = (changed - weight).abs().flatten() > 1e-5
    assert set(moved.nonzero()[:, 0].tolist()) == set(order.tolist())


def test_beft_changes_the_bias_alone():
    layer, weight, bias, changed, shift = matrices(on_it(BEFT))
    close(changed, weight)
    close(shift, bias + layer.beft_bias["default"][0])


def test_waveft_puts_haar_coefficients_back():
    layer, weight, _, changed, _ = matrices(on_it(WaveFT, entries=9, scale=2.0))
    spectrum = torch.zeros(OUTPUTS, INPUTS)
    rows, columns = layer.waveft_indices["default"]
    spectrum[rows, columns] = layer.waveft_spectrum["default"]
    low, high = torch.tensor([[1.0, 1.0], [1.0, 1.0]]) / 2, torch.tensor([[1.0, -1.0], [1.0, -1.0]]) / 2
    half_rows, half_columns = OUTPUTS // 2, INPUTS // 2
    change = torch.zeros(OUTPUTS, INPUTS)
    for i in range(half_rows):
        for j in range(half_columns):
            ll, hl = spectrum[i, j], spectrum[i, j + half_columns]
            lh, hh = spectrum[i + half_rows, j], spectrum[i + half_rows, j + half_columns]
            both = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]) / 2
            change[2 * i : 2 * i + 2, 2 * j : 2 * j + 2] = ll * low + hl * high.T + lh * high + hh * both
    close((changed - weight).norm(), 2.0 * change.norm())  # Haar's transform is orthogonal
    close(changed - weight, 2.0 * change)


# ---- LoRA+ and LoRA-FA ---------------------------------------------------------------------------------------------


def test_lora_plus_trains_b_faster():
    from tests.toy import Facts, ToyTask

    task = ToyTask(LoRA(rank=2, b_rate=16.0))
    task.facts = Facts()
    task.assemble()
    names = {parameter: name for name, parameter in task.named_parameters()}
    for group in task.parameter_groups():
        for parameter in group["params"]:
            assert group["lr"] == task.optim.lr * (16 if ".lora_B." in names[parameter] else 1)


def test_lora_fa_keeps_no_input_for_a():
    """Only what B needs, A x, is kept for the backward pass."""

    def kept(freeze):
        model = attach(nn.Sequential(nn.Linear(64, 4)), on_it(LoRA, rank=2, freeze_a=freeze), None).model
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            model(torch.randn(10, 64))
        return sum(size for size in sizes if size >= 640)

    assert kept(False) >= 640
    assert kept(True) == 0


# ---- refusals and notes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", LINEAR_ONLY)
def test_methods_of_linear_layers_refuse_convolutions(method):
    settings = zoo_spec(method, on=["conv"], target_modules=None)
    with pytest.raises(GraftError, match=rf"{method} cannot act on 'blocks.0.down' \(Conv3d, role conv\) .*Linear\."):
        attach(zoo(3), settings, ZOO)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (LoHa(rank=0), "LoHa rank is 0; give a whole number of at least 1"),
        (HRA(rank=3), "HRA rank is 3; give an even number"),
        (OFT(block=1), "OFT block is 1; give a whole number of at least 2"),
        (BOFT(block=3), "BOFT block is 3; give an even number"),
        (BOFT(factors=4), r"BOFT with 4 factors needs inputs that 16 divides, and 'blocks.0.qkv' has 8"),
        (DeLoRA(bound=0.0), r"DeLoRA bound is 0\.0"),
        (VBLoRA(vectors=2, top=3), "mixes the top 3 of 2 vectors"),
        (TinyLoRA(tying=2.0), r"tying is 2\.0"),
        (SuperTuning(sparsity=0.999), r"leaves nothing to train of 'blocks.0.qkv', which has 192 weights"),
        (SuperTuning(sparsity=1.0), r"sparsity is 1\.0; give a share in \[0, 1\)"),
        (PVeRA(dropout=1.0), r"dropout is 1\.0"),
        (LoRA(b_rate=0.0), r"b_rate is 0\.0"),
        (PEANuT(depth=-1), "depth is -1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(spec, words):
    with pytest.raises(GraftError, match=words):
        attach(toy_backbone(), spec, FAMILY)


@pytest.mark.parametrize(
    ("spec", "layer", "words"),
    [
        (on_it(RoAd), nn.Linear(4, 5), "'0' has an odd number"),
        (on_it(BEFT), nn.Linear(4, 4, bias=False), "'0' has none"),
    ],
)
def test_layers_that_do_not_fit_are_refused(spec, layer, words):
    with pytest.raises(GraftError, match=words):
        attach(nn.Sequential(layer), spec, None)


@pytest.mark.parametrize(
    ("spec", "notes"),
    [
        (LoHa(), ("LoHa runs in PEFT's own tuner.",)),
        (VBLoRA(length=100), ("Vector length 100 is lowered to 8, the next that divides the sizes of all chosen",)),
        (RoAd(), ("Group size 64 is lowered to 8,",)),
        (WaveFT(entries=100), ("100 entries are lowered to the layer's own size in 2 layers.",)),
        (MiSS(rank=9), ("MiSS runs in Graft's own tuner, since PEFT's cannot do 6 of 8 layers: blocks.0.qkv (8 in",)),
        (FourierFT(entries=100), ("FourierFT runs in Graft's own tuner, since PEFT's cannot do 2 of 8 layers: ",)),
        (C3A(block=16), ("C3A runs in Graft's own tuner, since PEFT's cannot do 8 of 8 layers: ",)),
    ],
)
def test_what_was_lowered_is_told(spec, notes):
    found = attach(toy_backbone(), spec, FAMILY).plan.notes
    assert len(found) == len(notes)
    assert all(note.startswith(words) for note, words in zip(found, notes, strict=True))


def test_beft_passes_over_layers_without_a_bias():
    net = toy_backbone()
    net.blocks[0].qkv.bias = None
    assert list(attach(net, BEFT(), FAMILY).plan.targets) == ["blocks.1.qkv"]
    net = toy_backbone()
    for block in net.blocks:
        block.qkv.bias = None
    with pytest.raises(GraftError, match=r"'blocks\.0\.qkv' has none"):
        attach(net, BEFT(), FAMILY)


def test_every_source_is_of_a_known_kind():
    assert {spec.source.split()[0] for spec in METHODS.values() if spec.source} == {"arXiv", "OpenReview"}
