"""The worst class: against counts written out here, and where it is shown."""

from __future__ import annotations

import csv

import pytest

from common.compare.worst import worst_class

CLASSES = ["a", "b", "c"]


def answers(*pairs):
    return [{"id": str(place), "label": label, "prediction": said} for place, (label, said) in enumerate(pairs)]


def test_it_is_the_lowest_recall_of_each_seed_and_the_class_that_is_lowest_on_average():
    first = answers("aa", "aa", "ab", "ac", "bb", "ba", "cc")  # recall: a 2/4, b 1/2, c 1
    second = answers("aa", "aa", "aa", "ac", "bc", "ba", "cc")  # a 3/4, b 0, c 1
    found = worst_class([first, second], [{}, {}], CLASSES)
    assert (found.measure, found.name, found.examples) == ("recall", "b", 2)
    assert found.values == (0.5, 0.0)


def test_a_class_that_is_predicted_and_never_there_has_no_recall():
    found = worst_class([answers("aa", "ac", "bb")], [{}], CLASSES)
    assert (found.name, found.values) == ("a", (0.5,))


def test_of_a_segmentation_it_is_the_lowest_dice_and_a_class_without_one_is_left_out():
    first = {"dice": 0.7, "dice_core": 0.9, "dice_edge": 0.5, "dice_tip": 0.6, "surface_dice_mm": 0.1}
    second = {"dice": 0.7, "dice_core": 0.8, "dice_edge": 0.4, "dice_tip": float("nan")}
    found = worst_class([[{"id": "x", "dice": 0.7}]] * 2, [first, second], ["background", "core", "edge", "tip"])
    assert (found.measure, found.name, found.values, found.examples) == ("dice", "edge", (0.5, 0.4), None)


@pytest.mark.parametrize(
    ("rows", "test"),
    [
        ([], {"accuracy": 0.5}),
        ([{"id": "1", "label": 0.5, "prediction": 0.4}], {"rmse": 0.1}),
        ([{"id": "1", "label": "aab", "prediction": "aac"}], {"accuracy": 0.7}),  # one letter a residue
        ([{"id": "1", "label": "a", "prediction": "a"}], {"accuracy": 1.0}),  # one class has no worst
        ([{"id": "1", "label": ["a", "b"], "prediction": ["a"]}], {}),
        ([{"id": "1", "wer_lower": 0.5, "words": 2}], {"wer_lower": 0.5}),
    ],
)
def test_where_examples_have_no_class_there_is_none(rows, test):
    assert worst_class([rows], [test], CLASSES) is None
    assert worst_class([], [], CLASSES) is None


def test_a_seed_without_rows_leaves_it_unknown():
    assert worst_class([answers("aa", "bb"), []], [{}, {}], CLASSES) is None


def test_tables_and_report_show_it_and_the_summary_tells_where_it_turns_the_order(world):
    right = {
        "LoRA": ["ab"] * 2 + ["bb"] * 8 + ["aa"] * 2,
        "FullFineTune": ["aa"] * 3 + ["ab"] + ["bb"] * 5 + ["ba"] * 3,
    }
    world.measure(classes=["a", "b"], rows={name: answers(*pairs) for name, pairs in right.items()})
    assert world.run() == 0, world.output
    with (world.out / "results.csv").open() as file:
        lora, full = csv.DictReader(file)
    assert (lora["worst_class"], lora["worst_class_measure"], lora["worst_class_examples"]) == ("a", "recall", "4")
    assert float(lora["worst_class_mean"]) == pytest.approx(2 / 4)
    assert (full["worst_class"], float(full["worst_class_mean"])) == ("b", pytest.approx(5 / 8))
    assert "| Worst class |" in (world.out / "results.md").read_text()
    report = (world.out / "report.html").read_text()
    assert "0.500 ± 0.000 (a, 4)" in report
    assert (
        "By its worst class FullFineTune is ahead, by the means: recall 0.625 (b), against 0.500 (a) of LoRA." in report
    )
