"""Numbers: against formulas written out here, and what the tables make of them."""

from __future__ import annotations

import csv
import io
import json
import math

import pytest
from rich.console import Console

from common.compare.results import Spread, read_metrics
from common.compare.tables import NOTHING, amount, duration, percent, quality
from common.errors import GraftError


def mean(values):
    return sum(values) / len(values)


def std(values):
    return math.sqrt(sum((value - mean(values)) ** 2 for value in values) / (len(values) - 1))


def test_csv_holds_mean_and_sample_deviation_over_the_seeds(world):
    world.run()
    with (world.out / "results.csv").open() as file:
        lora, full = csv.DictReader(file)
    assert (lora["method"], full["method"]) == ("LoRA", "FullFineTune")
    for row, values in ((lora, [0.70, 0.73, 0.76]), (full, [0.80, 0.70, 0.75])):
        assert float(row["test_accuracy_mean"]) == pytest.approx(mean(values))
        assert float(row["test_accuracy_std"]) == pytest.approx(std(values))
        assert (row["n"], row["seeds"], row["failed_runs"]) == ("3", "0 1 2", "0")
        # The median of the fake's times, 60, 61, 162 s and 0.4, 0.5, 0.6 s.
        assert float(row["fit_seconds"]) == pytest.approx(61.0)
        assert float(row["step_seconds"]) == pytest.approx(0.5)
        assert row["peak_cuda_bytes"] == ""
        parts = [float(row[f"memory_{part}"]) for part in ("weights", "gradients", "optimizer", "activations")]
        assert float(row["memory_total"]) == sum(parts)
    assert (lora["lr"], full["lr"]) == ("0.001", "5e-05")
    assert float(lora["val_primary_mean"]) == pytest.approx(0.74)
    assert full["params_trainable"] == full["params_total"]


def test_markdown_has_quality_and_cost_in_one_table(world):
    world.run()
    text = (world.out / "results.md").read_text()
    table = [line for line in text.splitlines() if line.startswith("|")]
    head, rule, lora, full = ([cell.strip() for cell in line.strip("|").split("|")] for line in table)
    assert len(head) == len(rule) == len(lora) == len(full)
    row = dict(zip(head, lora, strict=True))
    assert row["Method"] == "LoRA"
    assert row["accuracy"] == "0.730 ± 0.030"
    assert (row["Seeds"], row["lr"], row["%"], row["Adapter"]) == ("3", "0.001", "0.67 %", "600 kB")
    assert "mean ± sample standard deviation" in text


def test_a_baseline_has_a_row_with_quality_and_no_cost_but_time(world):
    world.add_baselines()
    world.run()
    with (world.out / "results.csv").open() as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["Majority", "Nearest", "LoRA", "FullFineTune"]
    row = rows["Nearest"]
    values = [0.50, 0.54, 0.52]
    assert float(row["test_accuracy_mean"]) == pytest.approx(mean(values))
    assert float(row["test_accuracy_std"]) == pytest.approx(std(values))
    assert float(row["fit_seconds"]) == pytest.approx(8.0)
    assert float(row["val_primary_mean"]) == pytest.approx(0.5)
    for name in ("lr", "params_trainable", "trainable_percent", "memory_total", "flops_per_step", "step_seconds"):
        assert row[name] == "", name
    text = (world.out / "results.md").read_text()
    table = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    cells = dict(zip(table[0], next(line for line in table if line[0] == "Nearest"), strict=True))
    dashes = [title for title, cell in cells.items() if cell == NOTHING]
    assert dashes == ["lr", "Trainable", "%", "Train memory", "FLOPs/step", "Step", "Adapter"]
    assert (cells["accuracy"], cells["Seeds"], cells["Fit"]) == ("0.520 ± 0.020", "3", "8 s")
    assert "Not trained, and so without costs of training: Majority, Nearest; their Fit" in text
    assert "Nearest" in world.output.splitlines()[-5]


def test_the_printed_table_is_not_cut_in_a_log(world):
    world.run()
    assert "FullFineTune" in world.output
    assert "0.730 ± 0.030" in world.output
    assert "…" not in world.output


def test_a_terminal_shows_what_runs_and_keeps_what_ended(world):
    stream = io.StringIO()
    world.run(console=Console(file=stream, force_terminal=True, width=200))
    text = stream.getvalue()
    assert "start   " not in text
    assert "done    recipe LoRA lr 0.001 seed 0  val accuracy 0.7400" in text
    assert "FullFineTune" in text[text.rindex("testing:") :]


def test_one_seed_has_no_deviation(world):
    world.write((world.folder / "study.yaml").read_text().replace("seeds: [0, 1, 2]", "seeds: [1]"))
    world.run()
    with (world.out / "results.csv").open() as file:
        row = next(csv.DictReader(file))
    assert (row["test_accuracy_mean"], row["test_accuracy_std"], row["n"]) == ("0.73", "", "1")
    assert "| 0.730 |" in (world.out / "results.md").read_text()


def test_a_value_that_is_not_finite_is_not_averaged_away():
    spread = Spread.of([0.5, math.nan])
    assert math.isnan(spread.mean)
    assert spread.n == 2


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (quality(None), NOTHING),
        (quality(Spread(mean=0.7123, std=None, n=1)), "0.712"),
        (amount(7), "7"),
        (amount(999), "999"),
        (amount(999.9), "1.0 k"),
        (amount(147_456), "147 k"),
        (amount(22_056_576), "22.1 M"),
        (amount(88_226_304, "B"), "88.2 MB"),
        (amount(None), NOTHING),
        (duration(0.4123), "0.412 s"),
        (duration(61.3), "61.3 s"),
        (duration(599), "599 s"),
        (duration(3900), "1 h 05 min"),
        (percent(100.0), "100 %"),
        (percent(0.6789), "0.68 %"),
        (percent(41.3), "41 %"),
    ],
)
def test_numbers_are_written_for_people(written, expected):
    assert written == expected


def test_metrics_of_another_schema_or_shape_are_refused(tmp_path):
    assert read_metrics(tmp_path) is None
    (tmp_path / "metrics.json").write_text(json.dumps({"schema": 99}))
    with pytest.raises(GraftError, match="schema 99"):
        read_metrics(tmp_path)
    (tmp_path / "metrics.json").write_text(json.dumps({"schema": 1}))
    with pytest.raises(GraftError, match="primary"):
        read_metrics(tmp_path)
    (tmp_path / "metrics.json").write_text("{")
    with pytest.raises(GraftError, match="cannot be read"):
        read_metrics(tmp_path)
