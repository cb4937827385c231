"""`graft cache` lists what runs have kept and removes it by name."""

from __future__ import annotations

import pytest

from common._row_store import KEY, RowStore, stores
from common.cli import run
from tests.toy import DOMAINS


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "500")
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def call(capsys):
    def run_it(*argv):
        code = run(argv, DOMAINS)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run_it


def kept(name):
    store = RowStore({"task": name, "transform": '{"backbone": "toy"}'})
    store.put(bytes(20), "row", bytes(2_000_000))
    return store.folder


def test_nothing_is_listed_where_nothing_is(call):
    code, out, err = call("cache")
    assert (code, err) == (0, "")
    assert "0.0 MB of at most 20 GB" in out
    assert call("cache", "--clear", "all")[1].startswith("Removed 0 of 0")


def test_caches_are_listed_with_task_and_size(call):
    folders = [kept("One"), kept("Two")]
    (folders[1] / KEY).write_text("damaged")
    code, out, _ = call("cache")
    assert code == 0
    line = next(line for line in out.splitlines() if folders[0].name[:12] in line)
    assert all(word in line for word in ("One", "toy", "2.0 MB"))
    assert "unreadable" in next(line for line in out.splitlines() if folders[1].name[:12] in line)
    assert "4.0 MB of at most 20 GB" in out


def test_one_or_all_are_removed(call):
    folders = [kept(name) for name in ("One", "Two", "Three")]
    code, out, _ = call("cache", "--clear", folders[1].name[:12])
    assert (code, out) == (0, "Removed 1 of 3 caches (2.0 MB).\n")
    assert [folder.exists() for folder in folders] == [True, False, True]
    assert call("cache", "--clear", "all")[0] == 0
    assert stores() == []


def test_an_unknown_name_is_answered_with_the_names_there_are(call):
    folder = kept("One")
    code, _, err = call("cache", "--clear", "nothing")
    assert code == 2
    assert folder.name[:12] in err
    assert call("cache", "--clear", "")[0] == 2
    assert folder.exists()
