"""Bytes and FLOPs against figures worked out by hand."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from common.cost import CostMeter, TrainMemory, kept_buffers, measure_step, nbytes, optimizer_bytes
from common.run import build_trainer, fit
from tests.toy import Batch, ToyData, ToyTask, spec_of

FLOAT = 4  # bytes


def chain(*widths):
    layers = [nn.Linear(i, o) for i, o in itertools.pairwise(widths)]
    return nn.Sequential(*(m for layer in layers for m in (layer, nn.ReLU())))[:-1]


def step(net, *inputs):
    return measure_step(net, lambda: net(*inputs).sum())


# ---- bytes ---------------------------------------------------------------------------------------------------------


def test_a_storage_counts_once():
    whole = torch.zeros(6, 4)
    assert nbytes([whole, whole.t(), whole[2:], whole.view(-1)]) == 24 * FLOAT
    assert nbytes([whole, whole.clone(), torch.zeros(3, dtype=torch.bfloat16)]) == 48 * FLOAT + 6
    assert nbytes([]) == 0


def test_tied_weights_count_once():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    assert nbytes(p for m in net for p in m.parameters()) == (9 + 3 + 3) * FLOAT


def test_the_parts_add_up():
    memory = TrainMemory(weights=1, gradients=20, optimizer=300, activations=4000)
    assert memory.as_dict() == {
        "weights": 1,
        "gradients": 20,
        "optimizer": 300,
        "activations": 4000,
        "total": 4321,
    }


@pytest.mark.parametrize("batch", [1, 5])
def test_a_linear_chain_keeps_its_input_and_each_hidden_layer_once(batch):
    """A Linear keeps its input and a ReLU its output; between the two they are one storage."""
    activations, _ = step(chain(4, 8, 6, 3), torch.randn(batch, 4))
    assert activations == batch * (4 + 8 + 6) * FLOAT


def test_frozen_layers_below_the_first_trained_one_keep_nothing():
    net = chain(4, 8, 6, 3)
    net[:4].requires_grad_(False)
    activations, _ = step(net, torch.randn(5, 4))
    assert activations == 5 * 6 * FLOAT


def test_frozen_layers_above_a_trained_one_keep_what_its_gradient_needs():
    """A frozen Linear needs its weight alone; the ReLUs need their outputs."""
    net = chain(4, 8, 6, 3)
    net[2:].requires_grad_(False)
    activations, _ = step(net, torch.randn(5, 4))
    assert activations == 5 * (4 + 8 + 6) * FLOAT


def test_half_precision_activations_take_half():
    activations, _ = step(chain(4, 8, 3).bfloat16(), torch.randn(5, 4, dtype=torch.bfloat16))
    assert activations == 5 * (4 + 8) * 2


def test_weights_and_buffers_are_no_activations():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(7))
            self.register_buffer("scale", torch.randn(7))

        def forward(self, x):
            return (x * self.weight) * self.scale

    assert step(Scaled(), torch.randn(5, 7))[0] == 5 * 7 * FLOAT


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_optimizer_bytes_of_sgd(momentum):
    net = chain(4, 8, 3)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=momentum)
    net(torch.randn(2, 4)).sum().backward()
    assert optimizer_bytes([optimizer]) == 0
    optimizer.step()
    numbers = sum(p.numel() for p in net.parameters())
    assert optimizer_bytes([optimizer]) == (numbers * FLOAT if momentum else 0)


def test_optimizer_bytes_of_adamw_are_two_moments_and_a_counter():
    net = chain(4, 8, 3)
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    parameters = list(net.parameters())
    expected = 2 * sum(p.numel() for p in parameters) * FLOAT + len(parameters) * FLOAT
    assert optimizer_bytes([optimizer]) == expected


# ---- FLOPs ---------------------------------------------------------------------------------------------------------


def test_a_linear_layer_costs_two_a_weight_and_three_passes_but_the_first_layers_input():
    _, flops = step(chain(4, 8, 3), torch.randn(5, 4))
    assert flops == 2 * 5 * (2 * 4 * 8 + 3 * 8 * 3)


def test_a_frozen_layer_costs_forward_and_the_gradient_of_its_input():
    net = chain(4, 8, 3)
    net[2].requires_grad_(False)
    assert step(net, torch.randn(5, 4))[1] == 2 * 5 * (2 * 4 * 8 + 2 * 8 * 3)


@pytest.mark.parametrize(
    ("conv", "shape", "positions"),
    [
        (nn.Conv1d(4, 6, 3), (5, 4, 8), 6),
        (nn.Conv2d(4, 6, 3, stride=2, padding=1), (5, 4, 8, 8), 4 * 4),
        (nn.Conv2d(4, 6, 3, groups=2), (5, 4, 8, 8), 6 * 6),
        (nn.Conv2d(4, 4, 3, groups=4), (5, 4, 8, 8), 6 * 6),
        (nn.ConvTranspose2d(4, 6, 3, stride=2), (5, 4, 8, 8), 8 * 8),
    ],
)
def test_a_convolution_costs_two_a_weight_and_position_and_as_much_for_each_gradient(conv, shape, positions):
    forward = 2 * shape[0] * positions * conv.weight.numel()
    assert step(conv, torch.randn(shape))[1] == 2 * forward
    x = torch.randn(shape, requires_grad=True)
    assert step(conv, x)[1] == 3 * forward
    assert step(conv.requires_grad_(False), x)[1] == 2 * forward


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, q):
        q = q * self.weight
        return nn.functional.scaled_dot_product_attention(q, q, q)


def test_attention_is_counted_on_the_cpu_too():
    """Two products forward; backward computes the scores again, and two gradients for each product."""
    batch, heads, length, width = 2, 3, 16, 8
    product = 2 * batch * heads * length * length * width
    assert step(Attention(), torch.randn(batch, heads, length, width))[1] == (2 + 5) * product


# ---- no trace ------------------------------------------------------------------------------------------------------


def test_measuring_leaves_no_trace():
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    state = torch.get_rng_state()
    step(net, torch.ones(5, 4))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in net.parameters())


def test_buffers_made_or_resized_in_the_block_stay():
    net = nn.BatchNorm1d(2)
    with kept_buffers(net):
        net.running_mean += 1
        net.register_buffer("cache", torch.ones(3))
        net.running_var = torch.ones(5)
    assert net.running_mean.tolist() == [0, 0]
    assert net.cache.tolist() == [1, 1, 1]
    assert net.running_var.shape == (5,)


# ---- a run ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Method to (task, record) of a short fit."""
    done = {}
    for name in ("FullFineTune", "LoRA", "LinearProbe"):
        task = ToyTask(spec_of(name))
        record = fit(task, ToyData(), tmp_path_factory.mktemp(name) / "run", max_epochs=1, limit_train_batches=3)
        done[name] = task, record["cost"]
    return done


@pytest.mark.parametrize("name", ["FullFineTune", "LoRA", "LinearProbe"])
def test_the_memory_of_a_run(runs, name):
    task, cost = runs[name]
    memory = cost["train_memory"]
    trained = [p for p in task.parameters() if p.requires_grad]
    assert memory["weights"] == sum(t.nbytes for t in (*task.parameters(), *task.buffers()))
    assert memory["gradients"] == sum(p.nbytes for p in trained) == FLOAT * cost["params_trainable"]
    assert memory["optimizer"] == 2 * memory["gradients"] + FLOAT * len(trained)
    assert memory["total"] == sum(value for key, value in memory.items() if key != "total")


@pytest.mark.parametrize("name", ["FullFineTune", "LoRA", "LinearProbe"])
def test_the_rest_of_a_runs_cost(runs, name):
    task, cost = runs[name]
    assert cost["batch_size"] == 4
    assert cost["steps"] == 3
    assert 0 < cost["step_seconds"] < cost["fit_seconds"]
    assert cost["params_total"] == task.attached.base_params + sum(p.numel() for p in task.head.parameters())
    assert cost["params_trainable"] == cost["params_trainable_backbone"] + cost["params_trainable_head"]
    assert cost["trainable_percent"] == pytest.approx(100 * cost["params_trainable"] / cost["params_total"])


def test_a_linear_probe_keeps_no_activation_of_the_backbone(runs):
    """What it keeps is what the head alone keeps on ready features."""
    task, cost = runs["LinearProbe"]
    batch = Batch(*next(iter(ToyData().train_dataloader())))
    task.train()
    with torch.no_grad(), FlopCounterMode(display=False) as forward:
        features = task.features(batch)
    kept, flops = measure_step(task.head, lambda: task.loss(task.head(features), batch.y))
    assert cost["train_memory"]["activations"] == kept
    measured = measure_step(task, lambda: task.compute_loss(batch))
    assert measured[0] == kept
    assert measured[1] - flops >= forward.get_total_flops() > 0
    assert cost["flops_per_step"] == measured[1]


def test_an_adapter_needs_less_than_full_fine_tuning(runs):
    full, lora, probe = (runs[name][1] for name in ("FullFineTune", "LoRA", "LinearProbe"))
    for part in ("gradients", "optimizer"):
        assert probe["train_memory"][part] < lora["train_memory"][part] < full["train_memory"][part]
    assert probe["flops_per_step"] < lora["flops_per_step"]
    assert probe["train_memory"]["total"] < lora["train_memory"]["total"]


def test_measuring_changes_nothing_in_the_training(tmp_path, runs):
    measured, _ = runs["FullFineTune"]
    plain = ToyTask(spec_of("FullFineTune"))
    trainer = build_trainer(tmp_path, max_epochs=1, limit_train_batches=3)
    assert not any(isinstance(callback, CostMeter) for callback in trainer.callbacks)
    trainer.fit(plain, datamodule=ToyData())
    first, second = measured.state_dict(), plain.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_resumed_meter_goes_on():
    meter = CostMeter()
    meter.step, meter.fit_seconds = {"activations": 5}, 3.0
    for seconds in (0.1, 0.2):
        meter._note(seconds)
    other = CostMeter()
    other.load_state_dict(meter.state_dict())
    for one in (meter, other):
        one._note(0.3)
    assert other.state_dict() == meter.state_dict()
    assert other.state_dict()["durations"] == [0.1, 0.2, 0.3]
    assert other.state_dict()["fit_seconds"] == 3.0


@pytest.mark.parametrize("breaks", [(), (700, 1024, 1025, 4000)])
def test_a_meter_keeps_few_step_times_spread_evenly_over_the_whole_run(breaks):
    """Whatever the number of steps, and also over resumes, the times kept are those of every so manieth step."""
    meter = CostMeter()
    for step in range(10_000):
        if step in breaks:
            state, meter = meter.state_dict(), CostMeter()
            meter.load_state_dict(state)
        meter._note(float(step))
        assert len(meter._durations) <= 1024
    kept = meter.state_dict()["durations"]
    assert len(kept) > 512
    assert kept == [float(step) for step in range(0, 10_000, 16)]
