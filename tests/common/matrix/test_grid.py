"""The grid: its columns, the subset that meets them all, and the page that shows it."""

from __future__ import annotations

import html
import re
from pathlib import Path

import pytest
import torch

from common.attach import state_digest
from common.cli import run
from common.cli.matrix import PAGE
from common.domain import Domain
from common.errors import GraftError
from common.matrix import Cell, chosen, columns_of, covering, run_cell, whole
from common.matrix.grid import kind_of, move_off_the_start
from common.matrix.page import as_html, markdown
from common.methods import METHODS
from domains import DOMAINS

HERE = "tests.common.matrix.toy_specimens"
TOY = {
    "toy": Domain(name="toy", summary="tests", specimens={"toy": f"{HERE}:toy", "dead": f"{HERE}:with_a_dead_layer"})
}
COLUMNS = columns_of(DOMAINS)
TITLES = [title for domain in DOMAINS.values() for title in domain.specimens]


@pytest.mark.parametrize("title", TITLES)
def test_a_specimen_is_the_same_each_time_and_draws_nothing(title):
    domain = next(domain for domain in DOMAINS.values() if title in domain.specimens)
    module, _, name = domain.specimens[title].partition(":")
    build = getattr(__import__(module, fromlist=[name]), name)
    state = torch.get_rng_state()
    first, second = build(), build()
    assert state_digest(first.model) == state_digest(second.model)
    with torch.no_grad():
        output = first.run(first.model, first.inputs)
        assert output.is_floating_point()
        assert torch.equal(output, second.run(second.model, second.inputs))
    assert torch.equal(torch.get_rng_state(), state)
    assert 0.01 < float(output.std()) < 100
    copied, again = COLUMNS[title]().model, COLUMNS[title]().model
    assert copied is not again
    move_off_the_start(first.model)
    assert state_digest(copied) == state_digest(again) == state_digest(first.model)
    vectors = [parameter for parameter in copied.parameters() if parameter.ndim == 1]
    assert all(0 < float(vector.detach().abs().min()) for vector in vectors)


def test_there_is_a_network_of_each_kind():
    assert {kind_of(build()) for build in COLUMNS.values()} == {"attention", "recurrent", "convolutions"}


# ---- the subset


@pytest.fixture(scope="module")
def subset():
    return covering(list(METHODS), COLUMNS)


def test_the_subset_meets_every_method_and_every_network(subset):
    assert {method for method, _ in subset} == set(METHODS)
    assert {title for _, title in subset} == set(COLUMNS)
    assert len(subset) == len(set(subset))
    kinds = {title: kind_of(build()) for title, build in COLUMNS.items()}
    for method in METHODS:
        met = [kinds[title] for name, title in subset if name == method]
        assert len(met) == len(set(met)) or len(subset) > 2 * len(METHODS)
    assert {kinds[title] for name, title in subset if name == "LoRA"} > {"attention"}


@pytest.mark.parametrize("method", METHODS)
def test_no_cell_of_the_subset_fails(subset, method):
    for title in (title for name, title in subset if name == method):
        cell = run_cell(method, title, COLUMNS[title])
        assert cell.verdict != "FAIL", f"{title}: {cell.reason}"


def test_a_subset_of_names_is_checked():
    assert chosen(["b", "a"], ["a", "b", "c"], "method") == ["a", "b"]
    assert chosen([], ["a", "b"], "method") == ["a", "b"]
    with pytest.raises(GraftError, match=r"method 'LoRa'.*'LoRA'"):
        chosen(["LoRa"], list(METHODS), "method")
    assert whole(["x", "y"], dict.fromkeys("ab")) == [("x", "a"), ("x", "b"), ("y", "a"), ("y", "b")]


# ---- the page


def cells():
    return [
        Cell(method="A", column="one", verdict="exact", own=True, remarks=("not mergeable: curved",), seconds=30),
        Cell(method="A", column="two", verdict="refused", reason="A takes no <two> | three."),
        Cell(method="B", column="one", verdict="exact", remarks=("not mergeable: curved",), seconds=30),
        Cell(method="B", column="two", verdict="FAIL", reason="merge: off"),
    ]


def page(**options):
    return markdown(cells(), {"A": "selective", "B": "additive"}, {"one": 7, "two": None}, command="x", **options)


def test_the_page_shows_verdicts_reasons_and_counts():
    text = page()
    assert "4 cells of 2 methods and 2 networks: 2 exact, 1 refused, 1 FAIL." in text
    assert "| A | exact† [1](#n1) | refused [2](#n2) |" in text
    assert "| B | exact [1](#n1) | **FAIL** [3](#n3) |" in text
    assert "| **exact** | 2 | 0 |" in text
    assert "| **FAIL** | 0 | 1 |" in text
    assert re.search(r"\| \*peft 0\.21\.2 alone\* \| 7 \|  \|", text)
    assert '1. <a id="n1"></a>not mergeable: curved' in text
    assert '2. <a id="n2"></a>takes no <two> \\| three.' in text
    assert text.index("| A |") < text.index("| B |")


def test_the_page_as_html_says_the_same():
    text = as_html(page())
    for verdict, kind in (("exact†", "exact"), ("refused", "refused"), ("<b>FAIL</b>", "fail")):
        assert f'<td class="{kind}">{verdict}' in text
    assert html.escape("takes no <two>") in text
    assert 'href="#n3"' in text
    assert 'id="n3"' in text
    assert text.count("<tr>") == text.count("</tr>") == 1 + 4 + 5


def rows(text):
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[field.strip() for field in line.strip("|").split("|")] for line in lines]


def test_the_page_of_the_repository_is_of_all_methods_and_networks():
    """Made anew by `graft matrix` when a method or a network is added."""
    text = PAGE.read_text(encoding="utf-8")
    table = rows(text)
    assert table[0][1:] == TITLES
    named = [row[0] for row in table[1:] if not row[0].startswith("*") and row[0]]
    assert sorted(named) == sorted(METHODS)
    fields = [field for row in table[1:] if row[0] in METHODS for field in row[1:]]
    assert len(fields) == len(METHODS) * len(TITLES)
    assert all(field.startswith(("exact", "refused [")) for field in fields)
    assert re.search(r"Made \d{4}-\d\d-\d\d in \d+ minutes with graft \S+, Python \S+, torch \S+, peft \S+,", text)


# ---- the command


def test_the_command_prints_a_part_and_writes_a_file(tmp_path, capsys):
    assert run(["matrix", "--methods", "LinearProbe", "--columns", "toy"], TOY) == 0
    assert "| LinearProbe | exact |" in capsys.readouterr().out
    out = tmp_path / "new" / "part.html"
    assert run(["matrix", "--methods", "LinearProbe,BitFit", "--columns", "toy", "--out", str(out)], TOY) == 0
    assert f"{out}: 2 cells, 2 exact, 0 refused, 0 FAIL" in capsys.readouterr().out
    assert "<td>BitFit</td>".replace("<td>", '<td class="">') in out.read_text()


def test_the_command_covers(capsys):
    assert run(["matrix", "--methods", "LinearProbe", "--covering"], TOY) == 0
    table = rows(capsys.readouterr().out)
    assert table[0] == ["method", "toy", "dead"]
    assert ["LinearProbe", "exact", "exact"] in table


def test_a_failure_is_told_by_the_exit_code(monkeypatch, capsys):
    from common.matrix import checks

    def broken(bench):
        raise checks.CheckFailed("it is off")

    monkeypatch.setattr("common.matrix.cell.CHECKS", {"merge": broken})
    assert run(["matrix", "--methods", "LinearProbe", "--columns", "toy"], TOY) == 1
    out = capsys.readouterr().out
    assert "FAIL LinearProbe on toy: merge: it is off" in out
    assert "| LinearProbe | **FAIL** [1](#n1) |" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "LoRa"], "Unknown method 'LoRa'. Did you mean 'LoRA'"),
        (["--columns", "tey"], "Unknown column 'tey'. Did you mean 'toy'"),
        (["--out", "page.pdf"], "give a file that ends in .md or .html"),
    ],
)
def test_what_the_command_does_not_take(capsys, arguments, message):
    assert run(["matrix", *arguments], TOY) == 2
    assert message in capsys.readouterr().err


def test_domains_without_specimens_are_refused(capsys):
    assert run(["matrix"], {"x": Domain(name="x", summary="")}) == 2
    assert "No domain offers a network" in capsys.readouterr().err
    assert Path(PAGE).name == "MATRIX.md"
