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
from common.methods import METHODS, AtBudget, LoRA, MethodSpec, Mixture, NormTuning
from tests.cases import CASES
from tests.toy import FAMILY, SMALL, Facts, ToyTask, spec_of, toy_backbone

SPECS: dict[str, MethodSpec] = {name: case.toy for name, case in CASES.items() if case.toy is not None}
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


def check_start(name, output, bare):
    case = CASES[name]
    if case.starts_elsewhere:
        assert not torch.equal(output, bare)
    elif not case.exact_start:
        torch.testing.assert_close(output, bare, atol=1e-5, rtol=1e-5)
    else:
        assert torch.equal(output, bare)


@EACH
def test_a_fresh_method_changes_no_output(name):
    bare = bare_output(frozen=name != "FullFineTune")
    result = attached(name)
    result.train(False)
    output = run(result.model)
    check_start(name, output, bare)


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
    shared = {key for key, p in result.model.named_parameters(remove_duplicate=False) if p.requires_grad}
    assert moved - buffers == shared  # the names of what several layers share are all of them
    assert set(own) <= shared
    statistics = {key for key in buffers if "running" in key or "num_batches" in key}
    moving = result.plan.mode == "full" or CASES[name].statistics
    assert bool(moved & buffers) == moving
    assert moved & buffers <= statistics | {key for key in buffers if "copied_" in key}
    if result.plan.mode == "full":
        assert moved & buffers == statistics


@EACH
def test_the_frozen_weights_are_the_bare_backbones(name):
    if CASES[name].moves_weight or name == "FullFineTune":
        pytest.skip("changes the base weights by design")
    bare = toy_backbone(depth=3).state_dict()
    frozen = {base_layer_name(key): value for key, value in trained(name).model.state_dict().items()}
    assert bare.keys() <= frozen.keys()
    assert all(torch.equal(frozen[key], value) for key, value in bare.items())


def test_every_method_has_a_case():
    assert {type(case.toy or case.zoo).__name__ for case in CASES.values() if case.toy or case.zoo} <= METHODS.keys()
    assert METHODS.keys() <= CASES.keys()
    assert SMALL.keys() <= METHODS.keys()


@EACH
def test_the_number_of_trainable_parameters_is_the_documented_one(name):
    result = attached(name)
    expected = CASES[name].count(SPECS[name], toy_backbone(depth=3), result.plan.targets)
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
    assert counted == {"shared"} or counted - {"shared"} == set(result.plan.targets.values())


@EACH
def test_disabled_adapters_leave_the_bare_backbone(name):
    result = trained(name)
    if not isinstance(result.model, PeftModel):
        pytest.skip("no PEFT model")
    bare = bare_output(frozen=name != "FullFineTune")
    assert not torch.allclose(run(result.model), bare, atol=1e-3)
    if CASES[name].moves_weight:
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
    if not CASES[name].mergeable:
        with pytest.raises(GraftError, match=rf"\w+ cannot be merged on toy: .*{CASES[name].reason}"):
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
    assert (state_digest(first.model) != state_digest(other.model)) == CASES[name].random_start


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
    assert spec.taxonomy == "baseline" or spec.source.startswith(("arXiv ", "OpenReview "))
    assert not spec.source or spec.source.split()[1] in spec.__doc__


@EACH
def test_a_copy_of_the_model_works(name):
    result = trained(name)
    assert torch.equal(run(copy.deepcopy(result.model)), run(result.model))


@pytest.mark.parametrize("name", [name for name in METHODS if name in SPECS])
def test_an_architecture_without_a_family(name):
    """Methods that need no roles run on any module; the others say what to give instead."""

    def build():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 4))

    spec = SPECS[name]
    if name == "ConvAdapter":
        with pytest.raises(GraftError, match=r"\['mix'\] do not exist"):
            attach(build(), spec, None)
        return
    if spec.taxonomy == "hybrid" and not CASES[name].without_family:
        with pytest.raises(GraftError, match="target_modules"):
            attach(build(), spec, None)
        linear = LoRA(target_modules=["0", "3"])
        sized = AtBudget(method=linear, most=2, tolerance=99.0)
        spec = sized if name == "AtBudget" else Mixture(parts=[linear, NormTuning()])
    elif hasattr(spec, "target_modules"):
        with pytest.raises(GraftError, match="target_modules"):
            attach(build(), spec, None)
        spec = spec_of(name, target_modules=["0", "3"])
    if CASES[name].without_family:
        with pytest.raises(GraftError, match=CASES[name].without_family):
            attach(build(), spec, None)
        return
    result = attach(build(), spec, None)
    result.train(False)
    x = torch.randn(2, 4)
    with torch.no_grad():
        check_start(name, result.model(x), build()(x))
