"""Prediction on the user's own sequences: the table it writes, and sequences it cannot use."""

from __future__ import annotations

import csv
import gzip

import pytest
import torch

from common.errors import GraftError
from common.methods import LinearProbe, LoRA
from domains.protein import _inputs
from domains.protein._alphabet import encode
from domains.protein.data._records import ProteinBatch
from domains.protein.predict import predict
from domains.protein.residue_tasks import MaskedLM, ResidueClassification
from domains.protein.tasks import MultiLabel, PairClassification, SequenceRegression
from tests.domains.protein.conftest import NAMES, data_of, task_of

pytestmark = pytest.mark.usefixtures("tiny")

PROTEINS = {"long": "MKTAYIAKQRQISFVKSHFSRQ", "short": "ACDW", "odd": "MKXBZUOLLA"}


@pytest.fixture
def fasta(tmp_path):
    path = tmp_path / "mine.fasta"
    path.write_text(
        "".join(f">{name} some words\n{sequence[:8]}\n{sequence[8:]}\n" for name, sequence in PROTEINS.items())
    )
    return path


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def outputs(task, sequence, second=""):
    residues, partner = torch.tensor([encode(sequence)]), torch.tensor([encode(second)] if second else [[]]).long()
    none = torch.zeros(1, dtype=torch.long)
    with torch.no_grad():
        return task(ProteinBatch(residues, torch.ones_like(residues, dtype=torch.bool), none, none, partner))[0]


def test_the_table_has_a_row_a_protein_and_a_column_a_class(fasta, tmp_path):
    task, out = task_of(LoRA(on=["all"], rank=2), data_of()), tmp_path / "new" / "out.csv"
    assert predict(task, [fasta], out) == f"{out}: 3 proteins"
    rows = table(out)
    assert list(rows[0]) == ["file", "id", "prediction", "probability", *NAMES["classes"]]
    assert [row["id"] for row in rows] == list(PROTEINS)  # their own order, not that of the batches
    for row, sequence in zip(rows, PROTEINS.values(), strict=True):
        expected = outputs(task, sequence).softmax(dim=0).tolist()
        assert [float(row[name]) for name in NAMES["classes"]] == pytest.approx(expected, abs=2e-6)
        assert row["prediction"] == NAMES["classes"][expected.index(max(expected))]
        assert float(row["probability"]) == pytest.approx(max(expected), abs=2e-6)
        assert row["file"] == str(fasta)


def test_the_batches_do_not_matter(fasta, tmp_path, monkeypatch):
    task = task_of(LinearProbe(), data_of())
    predict(task, [fasta], tmp_path / "one.csv")
    monkeypatch.setattr(_inputs, "_TOKENS", 1)
    predict(task, [fasta], tmp_path / "two.csv")
    for one, two in zip(table(tmp_path / "one.csv"), table(tmp_path / "two.csv"), strict=True):
        assert one["prediction"] == two["prediction"]
        assert float(one["probability"]) == pytest.approx(float(two["probability"]), abs=2e-6)


def test_values_and_labels(fasta, tmp_path):
    out = tmp_path / "out.csv"
    task = task_of(LinearProbe(), data_of("value"), SequenceRegression)
    predict(task, [fasta], out)
    for row, sequence in zip(table(out), PROTEINS.values(), strict=True):
        assert float(row["prediction"]) == pytest.approx(float(outputs(task, sequence)), abs=1e-4)
    task = task_of(LinearProbe(), data_of("labels"), MultiLabel)
    predict(task, [fasta], out)
    for row, sequence in zip(table(out), PROTEINS.values(), strict=True):
        shares = dict(zip(NAMES["labels"], outputs(task, sequence).sigmoid().tolist(), strict=True))
        assert {name: float(row[name]) for name in shares} == pytest.approx(shares, abs=2e-6)
        assert row["prediction"] == ";".join(name for name, share in shares.items() if share > 0.5)


@pytest.mark.parametrize("long", ["truncate", "window"])
def test_each_residue_has_a_row(fasta, tmp_path, long):
    task, out = (
        task_of(LinearProbe(), data_of("residues", max_length=9, long=long), ResidueClassification),
        tmp_path / "o",
    )
    predict(task, [fasta], out)
    rows = table(out)
    for name, sequence in PROTEINS.items():
        mine = [row for row in rows if row["id"] == name]
        starts = range(0, len(sequence) if long == "window" else 1, 9)
        expected = torch.cat([outputs(task, sequence[at : at + 9]).T for at in starts]).softmax(dim=1)
        assert [int(row["position"]) for row in mine] == list(range(1, len(expected) + 1))
        assert "".join(row["residue"] for row in mine) == sequence[: len(expected)]
        for row, shares in zip(mine, expected.tolist(), strict=True):
            assert [float(row[key]) for key in NAMES["residues"]] == pytest.approx(shares, abs=2e-6)


def test_pairs_come_from_a_table(tmp_path):
    path, out = tmp_path / "pairs.csv", tmp_path / "out.csv"
    path.write_text("a,b\nMKTAYI,ACDW\nACDW,MKLLVVAA\n")
    task = task_of(LinearProbe(), data_of("pairs"), PairClassification)
    assert predict(task, [path], out) == f"{out}: 2 pairs"
    expected = outputs(task, "ACDW", "MKLLVVAA").softmax(dim=0).tolist()
    assert [float(table(out)[1][name]) for name in NAMES["pairs"]] == pytest.approx(expected, abs=2e-6)
    assert [row["id"] for row in table(out)] == ["line 2", "line 3"]


def test_folders_are_searched_and_files_may_be_packed(fasta, tmp_path):
    deep = tmp_path / "in" / "deep"
    deep.mkdir(parents=True)
    (deep / "a.faa.gz").write_bytes(gzip.compress(fasta.read_bytes()))
    (deep / "notes.txt").write_text("no proteins")
    out = tmp_path / "out.csv"
    assert predict(task_of(LinearProbe(), data_of()), [tmp_path / "in"], out) == f"{out}: 3 proteins"


def test_a_sequence_that_cannot_be_used_stops_or_is_counted(fasta, tmp_path):
    task, out = task_of(LinearProbe(), data_of()), tmp_path / "out.csv"
    fasta.write_text(f"{fasta.read_text()}>bad\nMK1A\n")
    with pytest.raises(GraftError, match=r"'bad': '1' at position 3 is no amino acid .* --skip-bad"):
        predict(task, [fasta], out)
    assert not out.exists()
    assert predict(task, [fasta], out, skip_bad=True) == f"{out}: 3 proteins, 1 unusable ones left out"


def test_a_protein_that_is_too_long_is_refused_where_the_data_refuses_it(fasta, tmp_path):
    task, out = task_of(LinearProbe(), data_of(max_length=12, long="refuse")), tmp_path / "out.csv"
    with pytest.raises(GraftError, match="'long': 22 residues are more than the 12 allowed"):
        predict(task, [fasta], out)
    assert predict(task, [fasta], out, skip_bad=True) == f"{out}: 2 proteins, 1 unusable ones left out"


def test_what_cannot_be_predicted_is_refused(fasta, tmp_path):
    task = task_of(LinearProbe(), data_of())
    with pytest.raises(GraftError, match=r"There is no file or folder '.*nowhere'"):
        predict(task, [tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(GraftError, match=r"No sequences in .*empty\. Give files or folders with \.fasta"):
        predict(task, [tmp_path / "empty"])
    with pytest.raises(GraftError, match="is a folder; give the name of the CSV"):
        predict(task, [fasta], tmp_path)
    with pytest.raises(GraftError, match="MaskedLM predicts no labels"):
        predict(task_of(LinearProbe(), data_of("unlabelled"), MaskedLM), [fasta])
