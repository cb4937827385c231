"""AdaLoRA: ranking, schedule and penalty against their formulas."""

from __future__ import annotations

import pytest
import torch

from common.attach import attach
from common.checkpoint import LAST, read_checkpoint
from common.errors import GraftError
from common.methods import AdaLoRA
from common.run import fit
from common.tuners.rank_budget import layers, observe, prune
from tests.toy import FAMILY, ToyData, ToyTask, toy_backbone


def adapted(**settings):
    spec = AdaLoRA(**({"rank": 1, "start_rank": 3, "on": ["ffn"]} | settings))
    model = attach(toy_backbone(), spec, FAMILY).model
    torch.manual_seed(0)
    with torch.no_grad():
        for layer in layers(model).values():
            layer.lora_E["default"].normal_()
    return spec, model


def backward(model, seed):
    model.zero_grad()
    torch.manual_seed(seed)
    model(torch.randn(4, 3, 4)).square().sum().backward()


def entries(model):
    return {name: layer.lora_E["default"].detach().clone() for name, layer in layers(model).items()}


def test_the_penalty_is_the_mean_distance_from_orthogonal_factors():
    spec, model = adapted(penalty_weight=0.2)
    distances = []
    for layer in layers(model).values():
        a, b = layer.lora_A["default"], layer.lora_B["default"]
        distances += [(a @ a.T - torch.eye(3)).square().sum().sqrt(), (b.T @ b - torch.eye(3)).square().sum().sqrt()]
    torch.testing.assert_close(spec.penalty(model), 0.2 * sum(distances) / len(distances))
    assert AdaLoRA(penalty_weight=0.0).penalty(model) is None


def test_triplets_are_ranked_by_smoothed_sensitivity_times_uncertainty():
    _, model = adapted()
    memory, averages = {}, {}
    for seed in range(3):
        backward(model, seed)
        observe(model, memory)
        for name, layer in layers(model).items():
            for part in ("lora_A", "lora_E", "lora_B"):
                p = getattr(layer, part)["default"]
                felt = (p * p.grad).abs().detach()
                sensitivity, uncertainty = averages.get((name, part), (0.0, 0.0))
                sensitivity = 0.85 * sensitivity + 0.15 * felt
                averages[name, part] = sensitivity, 0.85 * uncertainty + 0.15 * (felt - sensitivity).abs()
    score = {}
    for name in layers(model):
        parts = {part: torch.mul(*averages[name, part]) for part in ("lora_A", "lora_E", "lora_B")}
        for rank in range(3):
            vectors = parts["lora_A"][rank].mean() + parts["lora_B"][:, rank].mean()
            score[name, rank] = float(parts["lora_E"][rank, 0] + vectors)
    before = entries(model)
    prune(model, memory, keep=5)
    best = set(sorted(score, key=score.get)[-5:])
    for name, values in entries(model).items():
        for rank in range(3):
            assert values[rank, 0] == (before[name][rank, 0] if (name, rank) in best else 0.0)


def test_the_budget_falls_by_a_cubic_schedule_and_then_stays():
    spec, model = adapted(rank=1, start_rank=3, warmup=0.1, final=0.2, every=2)
    memory, counts = {}, []
    for step in range(1, 21):
        with torch.no_grad():
            for layer in layers(model).values():
                layer.lora_E["default"].add_(1.0)  # as an optimizer moves what is masked too
        backward(model, step)
        spec.after_step(model, memory, step, 20)
        counts.append(sum(int(values.count_nonzero()) for values in entries(model).values()))
    wanted = []
    for step in range(1, 21):  # 12 triplets down to 4, after step 2, up to step 16
        budget = 4 if step >= 16 else 4 + int(8 * ((16 - step) / 14) ** 3)
        wanted.append(12 if step <= 2 or (step % 2 and step < 16) else budget)
    assert counts == wanted
    left = {name: values != 0 for name, values in entries(model).items()}
    assert all(torch.equal(mask[:, 0], memory[f"{name}.kept"]) for name, mask in left.items())


def test_a_run_ends_at_the_wanted_rank_and_keeps_its_memory(tmp_path):
    spec = AdaLoRA(rank=1, start_rank=2, on=["attention"], every=1)
    fit(ToyTask(spec), ToyData(), tmp_path / "run", max_epochs=2)
    checkpoint = read_checkpoint(tmp_path / "run" / LAST)
    trained = [value for key, value in checkpoint["state_dict"].items() if ".lora_E." in key]
    assert sum(int(value.count_nonzero()) for value in trained) == len(trained) == 4
    assert sum(int(v.sum()) for key, v in checkpoint["method_memory"].items() if key.endswith(".kept")) == 4


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rank": 0}, "AdaLoRA rank is 0"),
        ({"rank": 20}, "starts at rank 12 and goes down to 20; raise 'start_rank'"),
        ({"warmup": 0.6, "final": 0.5}, "leave no step to rank in"),
        ({"final": 1.0}, r"final is 1\.0"),
        ({"penalty_weight": -1.0}, r"penalty_weight is -1\.0"),
        ({"on": ["stem"]}, r"cannot act on 'mix' \(Conv1d"),
    ],
)
def test_settings_out_of_range_are_refused(settings, words):
    with pytest.raises(GraftError, match=words):
        attach(toy_backbone(), AdaLoRA(**settings), FAMILY)
