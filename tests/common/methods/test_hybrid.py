"""Methods made of others: what each part gets, what is refused, and a size that meets a budget."""

from __future__ import annotations

import dataclasses
import itertools
import re

import pytest
import torch
from peft import PeftModel

from common.attach import attach
from common.errors import GraftError
from common.images import backbones as images
from common.methods import (
    MAM,
    METHODS,
    AdaLoRA,
    AtBudget,
    BitFit,
    FishMask,
    FullFineTune,
    Houlsby,
    LastBlocks,
    LoRA,
    Mixture,
    NormTuning,
    PerGroup,
    VeRA,
)
from common.methods.hybrid import spindle
from tests.toy import FAMILY, toy_backbone


def attached(spec, depth=3):
    return attach(toy_backbone(depth=depth), spec, FAMILY, name="toy")


def trainable(result):
    return {name: p for name, p in result.model.named_parameters() if p.requires_grad}


def number(result):
    return sum(p.numel() for p in trainable(result).values())


def test_a_part_trains_what_it_trains_alone():
    parts = [LoRA(on=["attention"], rank=2), Houlsby(on=["ffn_out"], width=3), NormTuning()]
    mixed = trainable(attached(Mixture(parts=parts)))
    alone = [trainable(attached(part)) for part in parts]
    assert mixed.keys() == set().union(*alone)
    for name, parameter in itertools.chain.from_iterable(part.items() for part in alone):
        assert mixed[name].shape == parameter.shape


def test_parts_are_built_from_the_plain_values_of_a_record():
    spec = Mixture(parts=[LoRA(rank=2), AtBudget(method=Houlsby(), share=0.1, tolerance=9)])
    described = spec.describe()
    assert described["init_args"]["parts"][1]["init_args"]["method"]["class_path"] == "Houlsby"
    assert METHODS["Mixture"](**described["init_args"]) == spec
    groups = PerGroup(groups=[[LoRA()], [BitFit()]])
    assert METHODS["PerGroup"](**groups.describe()["init_args"]) == groups


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "Mixture has no parts"),
        ([LoRA(), FullFineTune()], "Mixture cannot hold FullFineTune, which adds no adapter"),
        ([LoRA(b_rate=4), NormTuning()], "Mixture cannot hold LoRA: freeze_a and b_rate act on all"),
        ([AdaLoRA()], "Mixture cannot hold AdaLoRA: its ranks follow a schedule"),
        ([LoRA(), BitFit()], "One part computes '.*' from the frozen weights and would pass over what another does"),
        ([LoRA(), LastBlocks()], r"One part computes 'blocks\.2' from the frozen .* at 'blocks\.2\.qkv'"),
        ([LoRA(), FishMask()], "FishMask looks at what the bare network does at '.*', where LoRA acts too"),
    ],
)
def test_what_does_not_mix_is_refused(parts, message):
    with pytest.raises(GraftError, match=message):
        attached(Mixture(parts=parts))


def test_a_later_part_acts_on_what_an_earlier_one_made_of_a_layer():
    result = attached(Mixture(parts=[LoRA(on=["attention_out"], rank=2), Houlsby(on=["attention_out"], width=3)]))
    with torch.no_grad():
        for parameter in trainable(result).values():
            parameter.normal_()
    layer, bare = result.model.base_model.model.blocks[0].out, toy_backbone(depth=3).blocks[0].out
    inner = layer.base_layer
    x = torch.randn(4, 8)
    hidden = bare(x) + 2 * x @ inner.lora_A["default"].weight.T @ inner.lora_B["default"].weight.T
    down, up = layer.badapter_down["default"], layer.badapter_up["default"]
    expected = hidden + torch.nn.functional.gelu(hidden @ down.weight.T + down.bias) @ up.weight.T + up.bias
    torch.testing.assert_close(layer(x), expected, atol=1e-4, rtol=1e-4)


def test_nested_parts_switch_with_those_of_another_adapter(tmp_path):
    """Which wraps the same modules: each part is found again among those that are nested in others."""
    specs = [Mixture(parts=[LoRA(on=["all"], rank=rank), MAM(length=2, width=rank)]) for rank in (2, 3)]
    x, outputs = torch.randn(2, 3, 4), []
    for number_, spec in enumerate(specs):
        result = attached(spec)
        with torch.no_grad():
            for parameter in trainable(result).values():
                parameter += 0.1 * torch.randn_like(parameter)
            outputs.append(result.model.eval()(x))
        result.model.save_pretrained(str(tmp_path / str(number_)))
    model = PeftModel.from_pretrained(toy_backbone(depth=3), str(tmp_path / "0"), adapter_name="first")
    model.load_adapter(str(tmp_path / "1"), "second")
    for name, expected in (("first", outputs[0]), ("second", outputs[1]), ("first", outputs[0])):
        model.set_adapter(name)
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(x), expected)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"class_path": "LoRAA"}, "Unknown method 'LoRAA'. Did you mean 'LoRA'"),
        ({"class_path": "LoRA", "init_args": {"rnk": 2}}, "Unknown setting of LoRA 'rnk'. Did you mean 'rank'"),
        ({"class_path": "LoRA", "rank": 2}, "part 1 is no method"),
        ("LoRA", "part 1 is no method"),
    ],
)
def test_a_part_that_is_no_method_is_named(part, message):
    with pytest.raises(GraftError, match=message):
        Mixture(parts=[part])


@pytest.mark.parametrize("blocks", range(1, 30))
def test_a_spindle_takes_all_blocks_and_is_thickest_in_the_middle(blocks):
    for groups in range(1, min(blocks, 6) + 1):
        sizes = spindle(blocks, groups)
        assert sum(sizes) == blocks
        assert min(sizes) >= 1
        ends, inner = (sizes[0], sizes[-1]), sizes[1:-1]
        assert not inner or min(inner) >= max(ends)
    assert spindle(12, 4) == [2, 4, 4, 2]  # as 1, 2, 2, 1


def test_a_group_acts_inside_its_blocks_alone():
    spec = PerGroup(groups=[[LoRA(on=["attention"])], [LoRA(on=["ffn"], rank=2), NormTuning()]])
    targets = attached(spec, depth=4).plan.targets
    first = {f"blocks.{i}.{name}" for i in (0, 1) for name in ("qkv", "out")}
    second = {f"blocks.{i}.{name}" for i in (2, 3) for name in ("fc1", "fc2", "norm1", "norm2")}
    assert set(targets) == first | second  # the norms outside of the blocks stay frozen


@pytest.mark.parametrize(
    "spec",
    [
        MAM(length=2, width=3),
        Mixture(parts=[LoRA(on=["attention"]), Mixture(parts=[Houlsby(), NormTuning()])]),
        Mixture(parts=[LoRA(), Mixture(parts=[LoRA(target_modules=["embed"])])]),
    ],
    ids=["a hybrid", "mixtures", "a part without a module"],
)
def test_a_group_holds_a_composed_method_inside_its_blocks(spec):
    """Also where a part has nothing in them."""
    found = set(trainable(attached(PerGroup(groups=[[spec], [BitFit()]]), depth=4)))
    first, second = (trainable(attached(method, depth=4)) for method in (spec, BitFit()))
    expected = {name for name in first if re.search(r"\.blocks\.[01]\.", name)}
    assert expected < set(first)
    assert found == expected | {name for name in second if re.search(r"\.blocks\.[23]\.", name)}


def test_groups_that_do_not_fit_are_refused():
    with pytest.raises(GraftError, match="3 groups for 2 blocks"):
        attached(PerGroup(groups=[[LoRA()]] * 3), depth=2)
    with pytest.raises(GraftError, match=r"LoRA of group 2 has nothing to act on in blocks\.1"):
        attached(PerGroup(groups=[[LoRA()], [LoRA(on=["attention@first:1"])]]), depth=2)


@pytest.mark.parametrize("share", [0.01, 0.05, 0.2, 0.9])
@pytest.mark.parametrize("method", [LoRA(on=["all"]), Houlsby()])
def test_the_size_nearest_to_the_budget_is_taken(method, share):
    result = attached(AtBudget(method=method, share=share, most=9, tolerance=99))
    total = result.base_params
    counts = {
        size: sum(
            p.numel() for p in trainable(attached(type(method)(**{method.sized_by: size}, on=method.on))).values()
        )
        for size in range(1, 10)
    }
    best = min(counts.values(), key=lambda count: abs(count - share * total))
    got = sum(p.numel() for p in trainable(result).values())
    assert abs(got - share * total) == abs(best - share * total)
    assert f"{got:,} trainable parameters" in result.plan.notes[0]


SIZED = [name for name, spec in METHODS.items() if spec.sized_by]
DENSE = [name for name in SIZED if METHODS[name].sized_by == "density"]


@pytest.mark.parametrize("method", DENSE)
@pytest.mark.parametrize("share", [0.003, 0.02, 0.9])
def test_a_mask_takes_the_density_of_the_budget(method, share):
    vit = images.build("test_vit", 32, pretrained=False)
    total = sum(p.numel() for p in vit.model.parameters())
    spec = METHODS[method](on=["attention", "ffn"])
    everything = number(attach(vit.model, dataclasses.replace(spec, density=1.0), vit.family))
    wanted = min(share * total, everything)  # the embeddings are not among the roles
    vit = images.build("test_vit", 32, pretrained=False)
    result = attach(vit.model, AtBudget(method=spec, share=share), vit.family)
    assert number(result) == pytest.approx(wanted, abs=len(result.plan.targets))  # each layer's share is rounded
    assert f"density {wanted / everything:.3g}"[:12] in result.plan.notes[0]


def test_no_size_far_above_the_budget_is_built(monkeypatch):
    built = []

    def counted(self, model, roles, size, own=AtBudget._count):
        built.append(size)
        return own(self, model, roles, size)

    monkeypatch.setattr(AtBudget, "_count", counted)
    result = attached(AtBudget(method=LoRA(on=["all"]), share=0.3, tolerance=9))
    size = int(re.search(r"rank (\d+) has", result.plan.notes[0])[1])
    assert max(built) <= 2 * size + 2
    assert len(set(built)) == len(built)


@pytest.mark.parametrize("method", [name for name in SIZED if name not in DENSE])
def test_every_counted_size_meets_a_budget(method):
    """Between the sizes below and above, within one step of the wanted share."""
    spec = METHODS[method]()
    vit = images.build("test_vit", 32, pretrained=False)
    total = sum(p.numel() for p in vit.model.parameters())
    result = attach(vit.model, AtBudget(method=spec, share=0.02, most=24, tolerance=99), vit.family, name="vit")
    count = number(result)
    size = int(re.search(rf"{spec.sized_by} (\d+) has", result.plan.notes[0])[1])
    steps = [size - 1, size + 1]
    for step in (step for step in steps if 1 <= step <= 24):
        other = images.build("test_vit", 32, pretrained=False)
        try:
            near = number(attach(other.model, dataclasses.replace(spec, **{spec.sized_by: step}), other.family))
        except GraftError:  # more than the layers take
            continue
        assert abs(count - 0.02 * total) <= abs(near - 0.02 * total)


def test_a_budget_passes_on_what_the_method_does_while_it_trains():
    inner = LoRA(b_rate=16, freeze_a=True)
    spec = AtBudget(method=inner, share=0.1, most=4, tolerance=9)
    result = attached(spec)
    assert not any("lora_A" in name for name in trainable(result))
    name = "backbone.base_model.model.blocks.0.qkv.lora_B.default.weight"
    assert spec.rate_factor(name) == inner.rate_factor(name) == 16
    assert AtBudget(method=FishMask()).calibration == FishMask().calibration


def test_mam_is_prefixes_and_parallel_bottlenecks():
    vit = images.build("test_vit", 32, pretrained=False)
    result = attach(vit.model, MAM(length=5, width=6), vit.family, name="vit")
    blocks, width = len(vit.model.blocks), vit.width
    assert number(result) == blocks * (2 * 5 * width + 2 * 6 * width + 6 + width)
    assert {name.rpartition(".")[2] for name in result.plan.targets} == {"attn", "fc2"}
    nested = attached(MAM(length=2, width=3))  # whose attention holds the feed-forward network
    assert number(nested) == 3 * (2 * 2 * 8 + 3 * (8 + 8 + 1) + 8)


def test_a_budget_leaves_the_random_state_and_the_model_alone():
    state = torch.get_rng_state()
    model = toy_backbone()
    before = {name: p.clone() for name, p in model.named_parameters()}
    AtBudget(method=LoRA(target_modules=["embed"]), share=0.1, tolerance=9).plan(model, None)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (AtBudget(), "cannot size nothing. Give a method with a size: .*LoRA"),
        (AtBudget(method=NormTuning()), "cannot size NormTuning"),
        (AtBudget(method=LoRA(), share=1.5), "share is 1.5, .* in \\(0, 1\\)"),
        (AtBudget(method=VeRA(), most=0), "most 0"),
        (AtBudget(method=LoRA(), tolerance=0), "tolerance 0"),
        (AtBudget(method=LoRA(on=["all"]), share=0.01), "of rank 1 has .* fewer roles"),
        (AtBudget(method=LoRA(on=["all"]), share=0.9, most=2), "rank 2 has .* more roles in its 'on', raise most"),
    ],
)
def test_a_budget_that_cannot_be_met_is_refused(spec, message):
    with pytest.raises(GraftError, match=message):
        attached(spec)
