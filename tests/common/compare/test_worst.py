"""The worst class and group: against counts written out here, and where it is shown."""

from __future__ import annotations

import csv

import pytest

from common.compare.worst import worst_class, worst_group

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


def rated(groups, rate):
    """Rows whose metric is a number of each example's own, `rate(group, place)`."""
    names = [name for name, count in groups.items() for _ in range(count)]
    return [{"id": str(n), "group": name, "score": rate(name, n)} for n, name in enumerate(names)]


def test_a_group_is_measured_by_the_metric_that_decides_on_its_own_rows():
    right = {"a": 9, "b": 5, "c": 12}  # of 12 each
    rows = [
        {"id": f"{name}{n}", "group": name, "label": "x", "prediction": "x" if n < right[name] else "y"}
        for name in right
        for n in range(12)
    ]
    found = worst_group([rows], [{"accuracy": 26 / 36}], "accuracy", "max")
    assert (found.name, found.examples, found.measure) == ("b", 12, "accuracy")
    assert found.values == (pytest.approx(5 / 12),)


def test_it_is_the_worst_of_each_seed_and_the_group_that_is_worst_on_average():
    level = [{"a": 0.5, "b": 0.25, "c": 0.75}, {"a": 0.25, "b": 0.375, "c": 0.75}]
    rows = [rated(dict.fromkeys("abc", 10), lambda name, _, own=own: own[name]) for own in level]
    tests = [{"score": sum(own.values()) / 3} for own in level]
    found = worst_group(rows, tests, "score", "max")
    assert (found.name, found.values) == ("b", (0.25, 0.25))  # means .375, .3125, .75
    upside = worst_group(rows, tests, "score", "min")
    assert (upside.name, upside.values, upside.mode) == ("c", (0.75, 0.75), "min")


def test_word_errors_of_a_group_are_counted_over_its_words():
    errors = {"anna": (3, 10), "bert": (2, 5), "carl": (9, 9)}
    counts = {"anna": 10, "bert": 11, "carl": 9}  # too few of the last
    rows = [
        {"id": f"{name}{n}", "group": name, "errors": errors[name][0] * (n % 2), "words": errors[name][1]}
        for name, count in counts.items()
        for n in range(count)
    ]
    whole = sum(row["errors"] for row in rows) / sum(row["words"] for row in rows)
    found = worst_group([rows], [{"wer_lower": whole}], "wer_lower", "min")
    assert (found.name, found.examples) == ("bert", 11)
    assert found.values == (pytest.approx(2 * 5 / (5 * 11)),)  # every second clip of the eleven has two errors


def test_a_group_of_one_class_has_no_auroc_and_is_left_out():
    scores = [0.9, 0.2, 0.8, 0.6, 0.3, 0.7]  # of the second class
    rows = []
    for group, labels in (("a", "pnpnpn"), ("b", "ppnnpn"), ("c", "nnnnnn")):
        for n in range(12):
            score = scores[(n + ord(group)) % 6]
            said = "p" if score > 0.5 else "n"
            rows.append(
                {
                    "id": f"{group}{n}",
                    "group": group,
                    "label": labels[n % 6],
                    "prediction": said,
                    "probability": score if said == "p" else 1 - score,
                }
            )

    def auroc(part):
        value = {True: [], False: []}
        for row in part:
            up = row["probability"] if row["prediction"] == "p" else 1 - row["probability"]
            value[row["label"] == "p"].append(up)
        pairs = [(one > two) + (one == two) / 2 for one in value[True] for two in value[False]]
        return sum(pairs) / len(pairs)

    own = {group: auroc([row for row in rows if row["group"] == group]) for group in "ab"}
    found = worst_group([rows], [{"auroc": auroc(rows)}], "auroc", "max")
    assert found.name == min(own, key=own.get)
    assert found.values == (pytest.approx(min(own.values())),)


@pytest.mark.parametrize(
    "rows",
    [
        [],
        rated({"a": 12, "b": 9}, lambda *_: 0.5),  # one group with enough examples
        rated({"a": 30}, lambda *_: 0.5),
        rated({"": 12, None: 12, "a": 12}, lambda *_: 0.5),  # no group is none
        [{"id": str(n), "score": 0.5} for n in range(30)],
        rated({"a": 12, "b": 12}, lambda *_: 0.1),  # rows that do not make up the metric
    ],
)
def test_without_two_groups_of_ten_there_is_no_worst(rows):
    assert worst_group([rows], [{"score": 0.5}], "score", "max") is None
    assert worst_group([], [], "score", "max") is None
    assert worst_group([rows, rated({"a": 12, "b": 12}, lambda *_: 0.5)], [{"score": 0.5}] * 2, "score", "max") is None


def test_tables_and_report_show_the_group_too(world):
    def grouped(first, second):
        pairs = ["aa"] * first + ["ab"] * (10 - first) + ["bb"] * second + ["ba"] * (10 - second)
        return [{**row, "group": f"site {n // 10}"} for n, row in enumerate(answers(*pairs))]

    world.measure(classes=["a", "b"], rows={"LoRA": grouped(9, 5), "FullFineTune": grouped(6, 7)})
    assert world.run() == 0, world.output
    with (world.out / "results.csv").open() as file:
        lora, full = csv.DictReader(file)
    told = [lora[f"worst_group{key}"] for key in ("", "_measure", "_mean", "_std", "_examples")]
    assert told == ["site 1", "accuracy", "0.5", "0.0", "10"]
    assert (full["worst_group"], float(full["worst_group_mean"])) == ("site 0", pytest.approx(0.6))
    markdown, report = (world.out / "results.md").read_text(), (world.out / "report.html").read_text()
    assert "| Worst group |" in markdown
    for text in (markdown, report):
        assert "of groups with at least 10 examples" in text
        assert "0.500 ± 0.000 (site 1, 10)" in text
    told = "By its worst group FullFineTune is ahead, by the means: accuracy 0.600 (site 0), against 0.500 (site 1) of"
    assert told in report
