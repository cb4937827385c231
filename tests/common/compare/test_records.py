"""Tables for programs: Parquet says what the CSV file says."""

from __future__ import annotations

import csv
import importlib.util

import pytest

from common.compare.stages import Options
from common.errors import GraftError

here = importlib.util.find_spec("pyarrow") is not None


@pytest.mark.skipif(not here, reason="needs pyarrow")
def test_parquet_holds_what_the_csv_file_holds_with_types(world):
    import pyarrow
    from pyarrow import parquet

    world.add_baselines()
    assert world.run(options=Options(parquet=True)) == 0
    table = parquet.read_table(world.out / "results.parquet")
    with (world.out / "results.csv").open() as file:
        expected = list(csv.DictReader(file))
    assert table.column_names == list(expected[0])
    types = {field.name: field.type for field in table.schema}
    assert types["method"] == types["pareto"] == pyarrow.string()
    assert (types["n"], types["best"], types["lr"]) == (pyarrow.int64(), pyarrow.bool_(), pyarrow.float64())
    for row, told in zip(table.to_pylist(), expected, strict=True):
        for name, value in row.items():
            if value is None:
                assert told[name] == ""
            elif isinstance(value, float):
                assert float(told[name]) == pytest.approx(value)
            else:
                assert str(value) == told[name]


def test_parquet_without_pyarrow_is_refused_before_anything_runs(world, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(GraftError, match=r"--parquet needs pyarrow.*graft\[parquet\]"):
        world.run(options=Options(parquet=True))
    assert world.calls() == []


def test_parquet_is_written_only_where_it_is_asked_for(world):
    assert world.run() == 0
    assert not list(world.out.glob("*.parquet"))
