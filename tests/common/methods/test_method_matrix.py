"""What every method must do, whatever it is: one matrix over the registry, so that a new method cannot be forgotten."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel
from torch import nn

from common.attach import attach, probe, state_digest
from common.errors import GraftError
from common.exchange import merged_backbone
from common.methods import METHODS, MethodSpec
from common.roles import NORMS
from tests.toy import FAMILY, SMALL, Facts, ToyTask, spec_of, toy_backbone

SPECS: dict[str, MethodSpec] = {name: spec_of(name) for name in METHODS} | {
    "LoRA-dropout": spec_of("LoRA", dropout=0.2),
    "LoRA-rslora": spec_of("LoRA", rslora=True, alpha=3.0),
    "LoRA-dora": spec_of("LoRA", dora=True),
    "LoRA-gaussian": spec_of("LoRA", init="gaussian"),
    "LoRA-orthogonal": spec_of("LoRA", init="orthogonal"),
    "LoRA-pissa": spec_of("LoRA", init="pissa"),
    "LoRA-olora": spec_of("LoRA", init="olora"),
    "LoRA-one-role": spec_of("LoRA", on=["attention_qkv"]),
    "LoRA-norms-by-name": spec_of("LoRA", target_modules=["blocks.1.fc1", "embed"]),
    "VeRA-ffn": spec_of("VeRA", on=["ffn"]),
    "IA3-ffn": spec_of("IA3", on=["ffn"]),
    "SSF-one-role": spec_of("SSF", on=["norm"]),
    "ConvAdapter-wide": spec_of("ConvAdapter", reduction=1),
    "Houlsby-scaled": spec_of("Houlsby", scale=0.5, on=["attention_out@last:2", "ffn_in@first:1"]),
    "Houlsby-wide": spec_of("Houlsby", width=64, target_modules=["mix", "blocks.0.qkv"]),
    "BitFit-no-norms": spec_of("BitFit", norms=False),
    "LastBlocks-2": spec_of("LastBlocks", k=2),
}
NOT_MERGEABLE = {name for name in SPECS if name.partition("-")[0] in ("ConvAdapter", "Houlsby", "Pfeiffer")}
RANDOM_START = ("LoRA", "ConvAdapter", "Houlsby", "Pfeiffer")
MOVES_WEIGHT = {"LoRA-pissa", "LoRA-olora"}  # they move a part of the frozen weight into the adapter
EACH = pytest.mark.parametrize("name", SPECS)


def inputs(batch=5):
    return torch.randn(batch, 3, 4, generator=torch.Generator().manual_seed(1))


def attached(name, seed=0):
    return attach(toy_backbone(depth=3), SPECS[name], FAMILY, seed=seed, name="toy")


def train(model, parameters, steps=3):
    """Take a few large optimizer steps towards a fixed target."""
    optimizer = torch.optim.AdamW(parameters, lr=0.05)
    torch.manual_seed(3)
    target = torch.randn(5, 3, 8)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(inputs()) - target).square().mean().backward()
        optimizer.step()


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def trained(name):
    result = attached(name)
    result.train(True)
    if parameters := list(trainable(result.model).values()):
        train(result.model, parameters)
    result.train(False)
    return result


def run(model):
    with torch.no_grad():
        return model(inputs())


def bare_output(frozen=True):
    """The bare backbone's output; torch chooses its kernels by `requires_grad` too, and bits are compared here."""
    return run(toy_backbone(depth=3).requires_grad_(not frozen).eval())


def base_layer_name(name):
    """The bare backbone's name of a parameter that PEFT has wrapped."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


@EACH
def test_a_fresh_method_changes_no_output(name):
    bare = bare_output(frozen=name != "FullFineTune")
    result = attached(name)
    result.train(False)
    output = run(result.model)
    if name in {*MOVES_WEIGHT, "LoRA-orthogonal"}:  # zero up to rounding only
        torch.testing.assert_close(output, bare, atol=1e-5, rtol=1e-5)
    else:
        assert torch.equal(output, bare)


@EACH
def test_only_the_intended_parameters_move(name):
    result = attached(name)
    result.train(True)
    own = trainable(result.model)
    before = {key: value.clone() for key, value in result.model.state_dict().items()}
    if own:
        train(result.model, list(own.values()))
    after = result.model.state_dict()
    moved = {key for key, value in after.items() if not torch.equal(value, before[key])}
    buffers = {key for key, _ in result.model.named_buffers()}
    assert moved - buffers == set(own)
    statistics = {key for key in buffers if "running" in key or "num_batches" in key}
    assert moved & buffers == (statistics if result.plan.mode == "full" else set())


@EACH
def test_the_frozen_weights_are_the_bare_backbones(name):
    if name in MOVES_WEIGHT or name == "FullFineTune":
        pytest.skip("changes the base weights by design")
    bare = toy_backbone(depth=3).state_dict()
    frozen = {base_layer_name(key): value for key, value in trained(name).model.state_dict().items()}
    assert bare.keys() <= frozen.keys()
    assert all(torch.equal(frozen[key], value) for key, value in bare.items())


def linear_shapes(backbone, names):
    return [(layer.in_features, layer.out_features) for layer in map(backbone.get_submodule, names)]


def lora(spec, backbone, targets):
    shapes = linear_shapes(backbone, targets)
    return sum(spec.rank * (i + o) for i, o in shapes) + (sum(o for _, o in shapes) if spec.dora else 0)


def bottleneck(spec, backbone, targets):
    outputs = [backbone.get_submodule(name).bias.numel() for name in targets]
    widths = [min(spec.width, number) for number in outputs]
    return sum(2 * width * number + width + number for width, number in zip(widths, outputs, strict=True))


FORMULAS = {
    "FullFineTune": lambda spec, model, targets: sum(p.numel() for p in model.parameters()),
    "LinearProbe": lambda spec, model, targets: 0,
    "BitFit": lambda spec, model, targets: sum(
        module.bias.numel()
        for module in model.modules()
        if getattr(module, "bias", None) is not None and (spec.norms or not isinstance(module, NORMS))
    ),
    "NormTuning": lambda spec, model, targets: sum(
        2 * module.weight.numel() for module in model.modules() if isinstance(module, NORMS)
    ),
    "NormBias": lambda spec, model, targets: sum(
        module.bias.numel() + (module.weight.numel() if isinstance(module, NORMS) else 0)
        for module in model.modules()
        if getattr(module, "bias", None) is not None
    ),
    "LastBlocks": lambda spec, model, targets: sum(p.numel() for p in model.blocks[-spec.k :].parameters()),
    "LoRA": lora,
    "VeRA": lambda spec, model, targets: sum(spec.rank + o for _, o in linear_shapes(model, targets)),
    "IA3": lambda spec, model, targets: sum(
        i if role == "ffn_out" else o
        for (i, o), role in zip(linear_shapes(model, targets), targets.values(), strict=True)
    ),
    "SSF": lambda spec, model, targets: sum(2 * model.get_submodule(name).bias.numel() for name in targets),
    # `mix` has 8 inputs, 8 outputs and 3 positions; the bottleneck is 2 wide in two groups, or 8 wide in eight
    "ConvAdapter": lambda spec, model, targets: {4: 2 * 4 * 3 + 8 * 2 + 8, 1: 8 * 1 * 3 + 8 * 8 + 8}[spec.reduction],
    "Houlsby": bottleneck,
    "Pfeiffer": bottleneck,
}


def test_every_method_has_a_formula_here():
    assert FORMULAS.keys() == METHODS.keys()
    assert SMALL.keys() <= METHODS.keys()


@EACH
def test_the_number_of_trainable_parameters_is_the_documented_one(name):
    result = attached(name)
    spec = SPECS[name]
    expected = FORMULAS[type(spec).__name__](spec, toy_backbone(depth=3), result.plan.targets)
    assert sum(p.numel() for p in trainable(result.model).values()) == expected


@EACH
def test_parameters_by_role_add_up(name):
    result = attached(name)
    bare = sum(p.numel() for p in toy_backbone(depth=3).parameters())
    assert result.base_params == bare
    assert sum(total for total, _ in result.params_by_role.values()) == bare
    count = sum(p.numel() for p in trainable(result.model).values())
    assert sum(number for _, number in result.params_by_role.values()) == count


@EACH
def test_trained_adapters_count_under_the_role_of_their_target(name):
    result = attached(name)
    counted = {role for role, (_, number) in result.params_by_role.items() if number}
    assert counted == set(result.plan.targets.values())


@EACH
def test_disabled_adapters_leave_the_bare_backbone(name):
    result = trained(name)
    if not isinstance(result.model, PeftModel):
        pytest.skip("no PEFT model")
    bare = bare_output(frozen=name != "FullFineTune")
    assert not torch.allclose(run(result.model), bare, atol=1e-3)
    if name in MOVES_WEIGHT:
        return
    with result.model.disable_adapter():
        assert torch.equal(run(result.model), bare)


@EACH
def test_a_merged_backbone_is_plain_and_computes_the_same(name):
    task = ToyTask(SPECS[name])
    task.facts = Facts()
    task.assemble()
    task.train()
    if parameters := list(trainable(task.backbone).values()):
        train(task.backbone, parameters)
    task.eval()
    expected = run(task.backbone)
    if name in NOT_MERGEABLE:
        with pytest.raises(GraftError, match=r"\w+ cannot be merged on toy: .*no change of their weights"):
            merged_backbone(task)
        return
    merged = merged_backbone(task).eval()
    torch.testing.assert_close(run(merged), expected, atol=1e-4, rtol=1e-4)
    assert merged.state_dict().keys() == toy_backbone().state_dict().keys()
    assert {type(m) for m in merged.modules()} == {type(m) for m in toy_backbone().modules()}


@EACH
def test_the_seed_alone_decides_the_start(name):
    torch.manual_seed(11)
    first = attached(name, seed=1)
    state = torch.get_rng_state()
    torch.manual_seed(12)
    again, other = attached(name, seed=1), attached(name, seed=2)
    assert state_digest(first.model) == state_digest(again.model)
    torch.manual_seed(11)
    assert torch.equal(torch.get_rng_state(), state)  # attaching draws nothing from the global state
    random_start = type(SPECS[name]).__name__ in RANDOM_START and name not in MOVES_WEIGHT
    assert (state_digest(first.model) != state_digest(other.model)) == random_start


@EACH
def test_every_adapter_passes_the_probe(name):
    result = attached(name)
    probe(result, lambda: result.model(inputs()))


@EACH
def test_the_spec_rebuilds_from_its_description(name):
    described = SPECS[name].describe()
    assert METHODS[described["class_path"]](**described["init_args"]) == SPECS[name]


@pytest.mark.parametrize("name", METHODS)
def test_the_class_explains_itself(name):
    spec = METHODS[name]
    assert spec.__name__ == name
    assert spec.taxonomy in ("baseline", "selective", "reparameterised", "additive", "prompts", "hybrid")
    assert spec.summary
    assert len(spec.__doc__.splitlines()) > 2
    assert spec.taxonomy == "baseline" or spec.source.startswith("arXiv ")
    assert not spec.source or spec.source.removeprefix("arXiv ") in spec.__doc__


@EACH
def test_a_copy_of_the_model_works(name):
    result = trained(name)
    assert torch.equal(run(copy.deepcopy(result.model)), run(result.model))


@pytest.mark.parametrize("name", METHODS)
def test_an_architecture_without_a_family(name):
    """Methods that need no roles run on any module; the others say what to give instead."""

    def build():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3))

    spec = SPECS[name]
    if name == "ConvAdapter":
        with pytest.raises(GraftError, match=r"\['mix'\] do not exist"):
            attach(build(), spec, None)
        return
    if name == "LastBlocks":
        with pytest.raises(GraftError, match="has 0 blocks"):
            attach(build(), spec, None)
        return
    if hasattr(spec, "target_modules"):
        with pytest.raises(GraftError, match="target_modules"):
            attach(build(), spec, None)
        spec = spec_of(name, target_modules=["0", "3"])
    result = attach(build(), spec, None)
    result.train(False)
    x = torch.randn(2, 4)
    with torch.no_grad():
        assert torch.equal(result.model(x), build()(x))
