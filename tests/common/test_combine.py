"""Adapters combined in weight space: against the rules written out, and as folders that predict."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from common.cli import run as graft
from common.combine import Rule, combine, combined
from common.errors import GraftError
from common.exchange import GRAFT, MODEL, export, load, merge
from common.run import fit, read_record
from tests.toy import DOMAINS, ToyData, ToyTask, spec_of, toy_backbone

METHODS = {"LoRA": spec_of("LoRA"), "SSF": spec_of("SSF"), "full": spec_of("FullFineTune")}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Adapter folders of three methods on one backbone, one on another, and one that does not merge."""
    place = tmp_path_factory.mktemp("adapters")
    tasks = {name: ToyTask(spec) for name, spec in METHODS.items()}
    tasks |= {"other": ToyTask(METHODS["LoRA"], base_seed=5), "Houlsby": ToyTask(spec_of("Houlsby"))}
    for name, task in tasks.items():
        run = place / f"run-{name}"
        fit(task, ToyData(), run, max_epochs=1)
        export(run, place / name, read_record(run), DOMAINS)
    return place


def changes(seed=0, adapters=3):
    generator = torch.Generator().manual_seed(seed)
    return [
        {"a": torch.randn(4, 5, generator=generator), "b": torch.randn(7, generator=generator)} for _ in range(adapters)
    ]


def test_linear_is_the_weighted_sum():
    given = changes()
    result = combined(given, Rule(weights=(0.5, -1.0, 2.0)))
    for name, tensor in result.items():
        torch.testing.assert_close(tensor, 0.5 * given[0][name] - given[1][name] + 2 * given[2][name])


def test_a_parameter_that_an_adapter_leaves_alone_is_a_change_of_zero():
    one, two = {"a": torch.ones(2)}, {"b": torch.ones(3)}
    result = combined([one, two], Rule(weights=(0.5, 2.0)))
    assert torch.equal(result["a"], 0.5 * torch.ones(2))
    assert torch.equal(result["b"], 2 * torch.ones(3))


def ties(given, weights, density):
    """The rule entry by entry, in plain Python."""
    flat = [[float(x) for name in ("a", "b") for x in change[name].flatten()] for change in given]
    keep = max(1, round(density * len(flat[0])))
    trimmed = []
    for values in flat:
        bound = sorted(map(abs, values), reverse=True)[keep - 1]
        trimmed.append([x if abs(x) >= bound else 0.0 for x in values])
    result = []
    for entries in zip(*trimmed, strict=True):
        votes = sum(w * x for w, x in zip(weights, entries, strict=True))
        agreed = [(w, x) for w, x in zip(weights, entries, strict=True) if w * x * votes > 0]
        mean = sum(w * x for w, x in agreed) / sum(w for w, _ in agreed) if agreed else 0.0
        result.append(sum(weights) * mean)
    return result


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.2, 0.5, 0.3)])
def test_ties_is_the_rule_entry_by_entry(density, weights):
    given = changes(seed=3)
    result = combined(given, Rule(weights=weights, how="ties", density=density))
    got = [float(x) for name in ("a", "b") for x in result[name].flatten()]
    assert got == pytest.approx(ties(given, weights, density), abs=1e-6)


def test_dare_drops_at_random_and_keeps_the_mean():
    ones = {"a": torch.ones(100, 100)}
    result = combined([ones, ones], Rule(weights=(1.0, 0.0), how="dare", density=0.25))["a"]
    assert set(result.unique().tolist()) == {0.0, 4.0}
    assert abs(result.mean() - 1) < 0.1  # the share that is kept has a standard deviation of 0.0043
    again = combined([ones, ones], Rule(weights=(1.0, 0.0), how="dare", density=0.25))["a"]
    other = combined([ones, ones], Rule(weights=(1.0, 0.0), how="dare", density=0.25, seed=1))["a"]
    assert torch.equal(again, result)
    assert not torch.equal(other, result)


def test_two_methods_on_one_backbone_add_up(adapters, tmp_path):
    combine([adapters / "LoRA", adapters / "SSF"], tmp_path / "both", DOMAINS, Rule(weights=(0.5, 0.25)))
    state = load_file(tmp_path / "both" / MODEL)
    merge(adapters / "LoRA", tmp_path / "one", DOMAINS)
    merge(adapters / "SSF", tmp_path / "two", DOMAINS)
    one, two = (load_file(tmp_path / name / MODEL) for name in ("one", "two"))
    for name, frozen in toy_backbone().state_dict().items():
        expected = frozen + 0.5 * (one[name] - frozen) + 0.25 * (two[name] - frozen)
        torch.testing.assert_close(state[name], expected.to(frozen.dtype), atol=1e-6, rtol=1e-6)
    assert load(tmp_path / "both", DOMAINS).peft == METHODS["full"]


def test_one_adapter_whole_and_one_at_zero_is_that_adapter(adapters, tmp_path):
    for how in ("linear", "ties", "dare"):
        rule = Rule(weights=(1.0, 0.0), how=how, density=1.0)
        combine([adapters / "full", adapters / "LoRA"], tmp_path / how, DOMAINS, rule)
        task, alone = load(tmp_path / how, DOMAINS), load(adapters / "full", DOMAINS)
        batch = alone.example_batch()
        with torch.no_grad():
            torch.testing.assert_close(task(batch), alone(batch), atol=1e-5, rtol=1e-5)


def test_the_command_writes_what_it_did(adapters, tmp_path, capsys):
    names = [str(adapters / "LoRA"), str(adapters / "SSF")]
    assert (
        graft(["combine", *names, "--out", str(tmp_path / "both"), "--how", "ties", "--density", "0.5"], DOMAINS) == 0
    )
    told = json.loads((tmp_path / "both" / "certificate.json").read_text())["combined"]
    assert told == {"adapters": names, "weights": [0.5, 0.5], "how": "ties", "density": 0.5, "seed": 0}
    assert json.loads((tmp_path / "both" / GRAFT).read_text())["method"]["class_path"] == "FullFineTune"
    assert "2 adapters combined (ties)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("names", "rule", "message"),
    [
        (("LoRA", "other"), Rule(weights=(1.0, 1.0)), "other stands on other weights"),
        (("LoRA", "Houlsby"), Rule(weights=(1.0, 1.0)), "Houlsby cannot be merged"),
        (("LoRA", "nothing"), Rule(weights=(1.0, 1.0)), "is not an adapter folder"),
        (("LoRA",), Rule(weights=(1.0,)), "fewer than two adapters"),
        (
            ("LoRA", "SSF"),
            Rule(weights=(1.0,), how="mean", density=0),
            "how is 'mean' .*1 weights for 2 .*density",
        ),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_left(adapters, tmp_path, names, rule, message):
    with pytest.raises(GraftError, match=message):
        combine([Path(adapters / name) for name in names], tmp_path / "out", DOMAINS, rule)
    assert not list(tmp_path.iterdir())
