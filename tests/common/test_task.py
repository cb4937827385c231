"""Schedule, optimizer groups, step counts and modes of the task."""

from __future__ import annotations

import math

import lightning as L
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from common.cost import CostMeter
from common.errors import GraftError
from common.loading import mix_seed
from common.run import build_trainer
from common.task import Backbone, OptimSpec
from tests.toy import FAMILY, Facts, ToyBackbone, ToyData, ToyTask, spec_of


def assembled(method="LoRA", optim=None, task=ToyTask, **settings):
    built = task(spec_of(method, **settings), optim=optim or OptimSpec())
    built.facts = Facts()
    built.assemble()
    return built


def fit(task, folder, *callbacks, data=None, **options):
    trainer = build_trainer(folder, *callbacks, **({"limit_val_batches": 0} | options))
    trainer.fit(task, datamodule=data or ToyData())
    return trainer


# ---- schedule ------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(total=st.integers(1, 400), warmup=st.floats(0, 0.99), constant=st.booleans())
def test_the_schedule_is_a_warm_up_and_half_a_cosine(total, warmup, constant):
    spec = OptimSpec(warmup=warmup, schedule="constant" if constant else "cosine")
    warm = round(warmup * total)
    factors = [spec.factor(step, total) for step in range(total + 1)]
    for step in range(warm):
        assert factors[step] == pytest.approx((step + 1) / (warm + 1))
    for step in range(warm, total):
        turned = math.pi * (step - warm) / (total - warm)
        assert factors[step] == pytest.approx(1.0 if constant else (1 + math.cos(turned)) / 2)
    assert all(0 < factor <= 1 for factor in factors[:total])
    assert factors[:warm] == sorted(factors[:warm])
    assert factors[warm:] == sorted(factors[warm:], reverse=True)
    if not constant and warm < total:
        assert factors[total] == pytest.approx(0.0, abs=1e-12)
        assert spec.factor(total + 7, total) == pytest.approx(0.0, abs=1e-12)


class Rates(L.Callback):
    """Note each step's learning rates, as the optimizer will use them."""

    def __init__(self):
        self.rates, self.seeds, self.total = [], [], None

    def on_train_start(self, trainer, pl_module):
        self.total = pl_module._total_steps()

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rates.append([group["lr"] for group in optimizer.param_groups])
        self.seeds.append(torch.initial_seed())


def test_the_optimizer_follows_the_schedule(tmp_path):
    spec = OptimSpec(lr=0.01, head_lr=0.05, warmup=0.3)
    rates = Rates()
    fit(assembled(optim=spec), tmp_path, rates, max_epochs=2)
    groups = {tuple(rate / spec.factor(step, 10) for rate in row) for step, row in enumerate(rates.rates)}
    assert len(rates.rates) == 10
    assert {tuple(round(rate, 9) for rate in row) for row in groups} == {(0.01, 0.05, 0.05)}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_epochs": 2}, 10),
        ({"max_epochs": 2, "accumulate_grad_batches": 2}, 6),  # the last batch of an epoch steps alone
        ({"max_epochs": 2, "accumulate_grad_batches": 5}, 2),
        ({"max_epochs": 1, "accumulate_grad_batches": 9}, 1),
        ({"max_epochs": 2, "limit_train_batches": 3}, 6),
        ({"max_epochs": 2, "limit_train_batches": 99}, 10),
        ({"max_epochs": 2, "limit_train_batches": 0.5}, 4),
        ({"max_epochs": 2, "limit_train_batches": 0.7, "accumulate_grad_batches": 2}, 4),
        ({"max_epochs": 2, "limit_train_batches": 1}, 2),
        ({"max_epochs": 2, "limit_train_batches": 1.0}, 10),
        ({"max_steps": 7}, 7),
        ({"max_steps": 7, "accumulate_grad_batches": 2}, 7),
        ({"max_steps": 7, "max_epochs": 1}, 5),
        ({"max_steps": 7, "max_epochs": 9}, 7),
        ({"overfit_batches": 2, "max_epochs": 3}, 6),
        ({"fast_dev_run": 2}, 2),
    ],
)
def test_the_steps_are_counted_as_lightning_takes_them(tmp_path, options, expected):
    rates = Rates()
    trainer = fit(assembled(), tmp_path, rates, **options)
    assert rates.total == trainer.global_step == len(rates.rates) == expected


def test_a_fit_without_an_end_is_refused(tmp_path):
    with pytest.raises(GraftError, match=r"max_epochs or trainer\.max_steps"):
        fit(assembled(), tmp_path, max_epochs=-1)


def test_settings_out_of_range_are_all_named_at_once():
    spec = OptimSpec(lr=0, head_lr=-1, weight_decay=-0.1, warmup=1.0, layer_decay=0)
    with pytest.raises(GraftError) as caught:
        ToyTask(spec_of("LoRA"), optim=spec)
    for words in ("lr is 0", "head_lr is -1", "weight_decay is -0.1", "warmup is 1.0", "layer_decay is 0"):
        assert words in str(caught.value)
    OptimSpec(lr=1e-9, head_lr=None, weight_decay=0, warmup=0, layer_decay=1).check()


# ---- groups --------------------------------------------------------------------------------------------------------


def by_parameter(task):
    """Parameter name to (rate, decay)."""
    names = {id(parameter): name for name, parameter in task.named_parameters()}
    found = {}
    for group in task.parameter_groups():
        for parameter in group["params"]:
            assert names[id(parameter)] not in found
            found[names[id(parameter)]] = group["lr"], group["weight_decay"]
    return found


@pytest.mark.parametrize("method", ["LoRA", "BitFit", "NormTuning", "IA3", "VeRA", "LastBlocks", "FullFineTune"])
def test_head_and_adapter_have_their_rates_and_every_trained_parameter_is_in_one_group(method):
    task = assembled(method, OptimSpec(lr=0.01, head_lr=0.2))
    groups = by_parameter(task)
    assert groups.keys() == {name for name, p in task.named_parameters() if p.requires_grad}
    assert {name: rate for name, (rate, _) in groups.items()} == {
        name: 0.2 if name.startswith("head.") else 0.01 for name in groups
    }


def test_without_a_head_rate_the_head_takes_the_one_rate():
    assert {rate for rate, _ in by_parameter(assembled(optim=OptimSpec(lr=0.03))).values()} == {0.03}


def test_matrices_decay_and_vectors_do_not():
    groups = by_parameter(assembled("FullFineTune", OptimSpec(weight_decay=0.1)))
    for name, (_, decay) in groups.items():
        vector = name.endswith(".bias") or "norm" in name
        assert decay == (0.0 if vector else 0.1), name


@pytest.mark.parametrize("method", ["IA3", "VeRA", "BitFit", "NormTuning"])
def test_scales_and_shifts_never_decay(method):
    """An IA3 scale is stored as a matrix of one row or column; decay would pull it to zero, away from one."""
    groups = by_parameter(assembled(method, OptimSpec(weight_decay=0.1)))
    assert {decay for name, (_, decay) in groups.items() if name.startswith("backbone.")} == {0.0}
    assert groups["head.weight"][1] == 0.1


def test_the_factors_of_lora_decay():
    groups = by_parameter(assembled("LoRA", OptimSpec(weight_decay=0.1)))
    assert {decay for name, (_, decay) in groups.items() if "lora_" in name} == {0.1}


@pytest.mark.parametrize(("method", "settings"), [("FullFineTune", {}), ("BitFit", {}), ("LoRA", {"on": ["all"]})])
def test_layer_decay_lowers_the_rate_towards_the_input(method, settings):
    """Block i of n trains at lr * d^(n-i), what lies before the blocks at lr * d^(n+1), what follows them at lr."""
    task = assembled(method, OptimSpec(lr=1.0, head_lr=3.0, layer_decay=0.5), **settings)
    for name, (rate, _) in by_parameter(task).items():
        plain = name.removeprefix("backbone.").removeprefix("base_model.model.")
        expected = 1.0
        if name.startswith("head."):
            expected = 3.0
        elif plain.startswith("blocks."):
            expected = 0.5 ** (2 - int(plain.split(".")[1]))
        elif plain.startswith(("embed.", "mix.")):
            expected = 0.5**3
        elif plain.startswith("input_norm."):
            continue  # a norm says nothing of where it stands
        assert rate == pytest.approx(expected), name


def test_parameters_of_the_backbone_itself_count_as_its_input():
    class WithToken(ToyBackbone):
        def __init__(self):
            super().__init__()
            self.token = nn.Parameter(torch.zeros(1, 1, 8))

    class Task(ToyTask):
        def build_backbone(self):
            return Backbone(name="toy", model=WithToken(), family=FAMILY)

    task = assembled("FullFineTune", OptimSpec(lr=1.0, layer_decay=0.5, weight_decay=0.1), task=Task)
    assert by_parameter(task)["backbone.token"] == (0.5**3, 0.0)


# ---- modes and seeds -----------------------------------------------------------------------------------------------


class Modes(L.Callback):
    def __init__(self):
        self.training, self.evaluating = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.training.append({name: module.training for name, module in pl_module.backbone.named_modules()})

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.evaluating.append({module.training for module in pl_module.modules()})


@pytest.mark.parametrize("method", ["LoRA", "FullFineTune", "LinearProbe"])
@pytest.mark.parametrize("arrives_training", [True, False])
def test_each_training_step_has_the_policys_modes_also_behind_a_validation(tmp_path, method, arrives_training):
    class Task(ToyTask):
        def build_backbone(self):
            built = super().build_backbone()
            built.model.train(arrives_training)
            return built

    modes = Modes()
    task = assembled(method, task=Task)
    fit(task, tmp_path, modes, max_epochs=2, limit_val_batches=1, val_check_interval=2)
    assert len(modes.training) == 10
    assert len(modes.evaluating) == 4
    assert all(seen == {False} for seen in modes.evaluating)
    task.train()
    expected = {name: module.training for name, module in task.backbone.named_modules()}
    assert all(seen == expected for seen in modes.training)
    drops = {value for name, value in expected.items() if name.endswith(".drop")}
    assert drops == {method != "LinearProbe"}
    norm = next(value for name, value in expected.items() if name.endswith("input_norm"))
    assert norm == (method == "FullFineTune")


def test_each_batch_is_seeded_by_its_number(tmp_path):
    rates = Rates()
    fit(assembled(), tmp_path, rates, max_epochs=2)
    assert rates.seeds == [mix_seed(0, 3, 0, step) for step in range(10)]


def test_the_seed_decides_head_and_adapter_and_no_other_state_does():
    def state(seed, noise):
        torch.manual_seed(noise)
        task = ToyTask(spec_of("LoRA"), seed=seed)
        task.facts = Facts()
        task.assemble()
        return task.state_dict()

    first, again, other = state(1, 5), state(1, 6), state(2, 5)
    assert all(torch.equal(first[name], again[name]) for name in first)
    changed = {name for name in first if not torch.equal(first[name], other[name])}
    assert "head.weight" in changed
    assert any("lora_A" in name for name in changed)
    assert not any(name.endswith("base_layer.weight") for name in changed)


def test_epochs_are_shuffled_anew(tmp_path):
    class Batches(L.Callback):
        seen = []  # noqa: RUF012

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.seen.append(batch[0].clone())

    fit(assembled(), tmp_path, Batches(), max_epochs=3)
    epochs = [torch.cat(Batches.seen[i : i + 5]) for i in (0, 5, 10)]
    sums = [torch.sort(epoch.sum((1, 2))).values for epoch in epochs]
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[1], epochs[2])
    assert not torch.allclose(sums[0], sums[1])  # augmented anew, too


# ---- gradient checkpointing ----------------------------------------------------------------------------------------


def test_gradient_checkpointing_without_support_is_refused():
    task = ToyTask(spec_of("LoRA"), gradient_checkpointing=True)
    task.facts = Facts()
    with pytest.raises(GraftError, match=r"ToyBackbone has no gradient checkpointing; set gradient_checkpointing"):
        task.assemble()


class Recomputing(ToyBackbone):
    again = False

    def forward(self, x):
        x = self.embed(self.input_norm(x.transpose(1, 2)).transpose(1, 2))
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.again and self.training else block(x)
        return self.norm(x)

    def set_grad_checkpointing(self):
        self.again = True


class RecomputingTask(ToyTask):
    def build_backbone(self):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = Recomputing()
        if type(self.peft).__name__ == "FullFineTune":
            model.input_norm = nn.Identity()
        return Backbone(name="toy", model=model, family=FAMILY)


@pytest.mark.parametrize("method", ["LoRA", "LastBlocks", "FullFineTune"])
def test_gradient_checkpointing_changes_memory_and_not_the_result(tmp_path, method):
    states, kept = [], []
    for on in (False, True):
        task, meter = RecomputingTask(spec_of(method), gradient_checkpointing=on), CostMeter()
        fit(task, tmp_path, meter, max_epochs=1)
        states.append(task.state_dict())
        kept.append(meter.step["activations"])
    assert kept[1] < kept[0]
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, msg=name)


def test_either_librarys_switch_is_used():
    class Other(nn.Module):
        switched = False

        def gradient_checkpointing_enable(self):
            self.switched = True

    model = Other()
    ToyTask._switch_checkpointing(model)
    assert model.switched


def test_batch_norm_statistics_that_train_are_not_counted_twice():
    class Task(RecomputingTask):
        def build_backbone(self):
            return Backbone(name="toy", model=Recomputing(), family=FAMILY)

    task = Task(spec_of("FullFineTune"), gradient_checkpointing=True)
    task.facts = Facts()
    with pytest.raises(GraftError, match="batch norm statistics twice"):
        task.assemble()
