"""The report is one whole, harmless file; its plots mark the right points."""

from __future__ import annotations

import itertools
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from common.compare._plots import Point, front, pareto_svg
from common.compare.report import write_report

VOID = {"meta", "img", "br"}
EVIL = '<script>alert("x")</script>'


class Page(HTMLParser):
    """Reads a page strictly: every tag closed in order; notes tags, addresses, ids and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.addresses, self.ids, self.text = [], [], [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        self.addresses += [value for name, value in attrs if name.split(":")[-1] in ("src", "href", "action", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def report(world):
    paths = []
    for index in range(8):
        path = world.folder / f"picture{index}.png"
        Image.new("RGBA", (40 + index, 30), (255, 0, index * 20, 128)).save(path)
        paths.append(str(path))
    world.write((world.folder / "study.yaml").read_text().replace("A small study", f"'{EVIL} & more'"))
    world.measure(classes=[EVIL, "bugs"], pictures=paths, fail=[["fit", "LoRA", "0.003", "0"]])
    assert world.run() == 1
    return (world.out / "report.html").read_text()


def test_the_report_is_whole_and_loads_nothing(report):
    page = Page(report)
    assert page.addresses
    for address in page.addresses:
        assert address.startswith(("data:image/jpeg;base64,", "#"))
    assert not re.search(r"https?://|url\((?!#)|@import", report)
    assert len(page.ids) == len(set(page.ids))
    assert {address[1:] for address in page.addresses if address.startswith("#")} <= set(page.ids)
    assert 'name="viewport"' in report
    assert "prefers-color-scheme: dark" in report


def test_the_report_escapes_other_peoples_text(report):
    page = Page(report)
    assert page.tags.count("script") == 1  # the sorting of the table
    assert EVIL not in report
    assert EVIL in page.text


def test_the_report_shows_methods_tuning_commands_pictures_and_failures(report):
    page = Page(report)
    for words in (
        "LoRA",
        "FullFineTune",
        "± 0.000",
        "0.0003: 0.700",
        "0.001: 0.740, chosen",
        "0.003: failed, exit code 3",
        "graft fit --config recipe.yaml",
        "graft test --run runs/small/recipe/LoRA/lr-0.001-seed-0",
        "Every method right",
        "32-true",
        "runs side by side",
        "Does it work?",
    ):
        assert words in page.text
    assert "graft test --run runs/small/recipe/LoRA/lr-0.0003-seed-0" not in page.text
    assert page.tags.count("svg") == 5  # one for each cost
    assert page.tags.count("img") >= 4
    assert all(f"{part} " in report for part in ("weights", "gradients", "optimizer", "activations"))


def test_runs_without_pictures_have_a_report_too(world):
    world.measure(classes=["a", "b"], pictures=["nowhere.wav", ""])
    assert world.run() == 0
    assert "What the methods said" not in (world.out / "report.html").read_text()


def test_rows_of_another_kind_are_no_pictures(world):
    world.measure(rows={"LoRA": [{"id": "a", "prediction": 1}], "FullFineTune": [{"id": "a", "value": 0.5}]})
    assert world.run() == 0
    report = (world.out / "report.html").read_text()
    assert "What the methods said" not in report
    assert "Test examples" not in report


def test_baselines_are_lines_in_the_plots_and_rows_in_the_table(world):
    world.add_baselines()
    assert world.run() == 0
    page = Page((world.out / "report.html").read_text())
    assert (
        page.text.count("Lines across: Majority: test accuracy 0.200, not trained; Nearest: test accuracy 0.520") == 5
    )
    assert page.text.count("Dotted across: not trained.") == 5
    assert "On the Pareto front: LoRA, FullFineTune." in page.text
    assert "Not trained: Majority, Nearest; their Fit is all their time." in page.text
    assert "backbone vit-small-patch14-focus" in page.text
    assert "graft baseline Majority --config recipe.yaml" in page.text
    assert "graft test --run runs/small/recipe/Majority" not in page.text
    # Bars of memory and lists of learning rates are for what trains.
    report = (world.out / "report.html").read_text()
    assert report.count("<span>LoRA</span>") == 2
    assert "<span>Nearest</span>" not in report
    assert "It does not clearly beat Nearest, where nothing is trained." in page.text
    assert "Of the trained methods, FullFineTune has the highest" in page.text


def views(world):
    """(alternative text, caption) of each picture that a method made, in order."""
    report = (world.out / "report.html").read_text()
    found = re.findall(r'<figure><img src="data:[^"]+" alt="([^"]+)"><figcaption>(.*?)</figcaption>', report)
    return [(alt, re.sub("<.*?>", "", caption)) for alt, caption in found]


def test_pictures_of_the_methods_stand_side_by_side_with_their_scores(world):
    def rows(**score):
        return [{"id": "a&b", "picture": "predictions/0.png", **score}]

    world.add_baselines(rows={"LoRA": rows(accuracy=0.8125), "FullFineTune": rows(), "Majority": rows(accuracy=0)})
    for folder in ("Majority/seed-0", "LoRA/lr-0.001-seed-0", "FullFineTune/lr-5e-05-seed-0"):
        path = world.out / "recipe" / folder / "predictions" / "0.png"
        path.parent.mkdir(parents=True)
        Image.new("RGB", (30, 10), "red").save(path)
    assert world.run() == 0
    captions = {"Majority": "Majority accuracy 0.000", "LoRA": "LoRA accuracy 0.812", "FullFineTune": "FullFineTune"}
    assert views(world) == [(f"a&amp;b: {method}", caption) for method, caption in captions.items()]
    page = Page((world.out / "report.html").read_text())
    assert "Test examples, method by method" in page.text
    assert "What the methods said" not in page.text


def test_the_front_holds_what_nothing_beats():
    def point(name, cost, quality):
        return Point(name=name, cost=cost, quality=quality, reach=None)

    points = [point("a", 1, 0.5), point("b", 2, 0.4), point("c", 2, 0.6), point("d", 9, 0.6), point("e", 5, 0.9)]
    assert [p.name for p in front(points, more_is_better=True)] == ["a", "c", "e"]
    assert [p.name for p in front(points, more_is_better=False)] == ["a", "b"]
    twins = [point("x", 1, 0.5), point("y", 1, 0.5)]
    assert len(front(twins, more_is_better=True)) == 2


def test_a_plot_says_in_words_what_it_shows_and_draws_one_point_too():
    points = [Point(name="On<ly", cost=1e6, quality=0.5, reach=None)]
    svg = pareto_svg(points, ident="p", title="T & t", cost_label="cost", quality_label="q", more_is_better=True)
    page = Page(svg)
    assert "T & t" in page.text
    assert "On<ly: q 0.500, cost 1 M. On the Pareto front: On<ly." in page.text
    assert 'role="img" aria-labelledby="p-t p-d"' in svg
    assert "currentColor" in svg
    assert "#010203" not in svg


def test_labels_of_crowded_points_do_not_cover_each_other():
    points = [Point(name=f"Method{index}", cost=100.0, quality=0.5, reach=(0.49, 0.51)) for index in range(4)]
    svg = pareto_svg(points, ident="p", title="t", cost_label="c", quality_label="q", more_is_better=True)
    heights = sorted(map(float, re.findall(r'<text[^>]* y="([-\d.]+)"[^>]*>Method\d<', svg)))
    assert len(heights) == 4
    assert all(upper - lower > 10 for lower, upper in itertools.pairwise(heights))


def test_a_line_across_widens_the_plot_to_its_height():
    points = [Point(name="A", cost=10.0, quality=0.9, reach=None)]
    settings = {"ident": "p", "title": "t", "cost_label": "c", "quality_label": "q", "more_is_better": True}
    svg = pareto_svg(points, levels=[("Chance", 0.1)], **settings)
    assert "Lines across: Chance: q 0.100, not trained." in Page(svg).text
    ticks = [float(tick) for tick in re.findall(r">(\d\.\d+)<", svg)]
    assert min(ticks) <= 0.2 < 0.8 <= max(ticks)
    assert ">Chance<" in svg


def test_more_and_less_training_data_of_one_recipe_make_curves(fabric, tmp_path):
    results = {"LoRA": [0.5, 0.6], "FullFineTune": [0.4, 0.5]}
    blocks = [fabric.block(f"r-{size}", results, train=size, recipe="r.yaml") for size in (100, 10)]
    blocks.append(fabric.block("other", results, train=10))
    write_report(blocks[0].study, blocks, None, [], tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text())
    assert "With less training data" in page.text
    assert page.text.count("Test score by training examples") == 1
    assert "LoRA: 0.550 at 10, 0.550 at 100; FullFineTune: 0.450 at 10, 0.450 at 100." in page.text
    assert len(page.ids) == len(set(page.ids))
