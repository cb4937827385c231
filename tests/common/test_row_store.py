"""Rows on disk: shared by processes, whole after a kill, never another key's, within a limit."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common import _row_store as row_store
from common._row_store import KEY, RowStore, digest_of, limit_bytes, remove, root, stores
from common.errors import GraftError

KEYS = {"weights": "abc", "transform": "none"}
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def name(number):
    return number.to_bytes(20, "big")


def body(number):
    return random.Random(number).randbytes(100 + number)


def filled(count, key=KEYS):
    store = RowStore(key)
    for number in range(count):
        store.put(name(number), f"row {number}", body(number))
    return store


def read(store, number):
    found = store.get(name(number))
    return None if found is None else (found[0], bytes(found[1]))


def segments(store):
    return sorted(store.folder.glob("*.rows"))


def test_rows_come_back_to_this_process_and_to_others():
    first = filled(5)
    other = RowStore(dict(reversed(KEYS.items())))
    assert other.folder == first.folder == root() / digest_of(KEYS)
    for store in (first, other):
        assert len(store) == 5
        assert [read(store, number) for number in range(5)] == [(f"row {n}", body(n)) for n in range(5)]
        assert store.get(name(5)) is None


def test_another_key_is_another_store():
    filled(3)
    for key in ({**KEYS, "weights": "abd"}, {**KEYS, "more": ""}, {"weights": "abc"}):
        assert len(RowStore(key)) == 0


def test_rows_that_another_process_adds_are_seen_after_a_refresh():
    mine, other = RowStore(KEYS), RowStore(KEYS)
    mine.put(name(1), "row 1", body(1))
    other.put(name(2), "row 2", body(2))
    assert read(mine, 2) is None
    mine.refresh()
    assert read(mine, 2) == ("row 2", body(2))
    other.put(name(3), "row 3", body(3))
    mine.refresh()
    assert read(mine, 3) == ("row 3", body(3))
    assert len(segments(mine)) == 2  # each process writes into a file of its own


def test_a_row_is_never_replaced():
    store = filled(1)
    size = segments(store)[0].stat().st_size
    store.put(name(0), "other", b"other")
    assert read(store, 0) == ("row 0", body(0))
    assert segments(store)[0].stat().st_size == size


def test_what_is_read_is_the_readers_own():
    store = filled(1)
    store.get(name(0))[1][:] = bytes(100)
    assert read(store, 0) == ("row 0", body(0))


@pytest.mark.parametrize("lost", [1, 60, 104, 110, 130, 140])
def test_a_torn_record_is_no_row_and_those_before_it_are(lost):
    path = segments(filled(3))[0]
    os.truncate(path, path.stat().st_size - lost)
    store = RowStore(KEYS)
    assert [read(store, number) is not None for number in range(3)] == [True, True, False]
    store.put(name(2), "row 2", body(2))
    assert [read(RowStore(KEYS), number) for number in range(3)] == [(f"row {n}", body(n)) for n in range(3)]


def test_a_record_that_is_being_written_is_read_once_it_is_whole():
    writer = filled(1)
    path = segments(writer)[0]
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    reader = RowStore(KEYS)
    assert len(reader) == 0
    path.write_bytes(whole)
    reader.refresh()
    assert read(reader, 0) == ("row 0", body(0))


def test_any_damaged_byte_makes_a_row_none():
    path = segments(filled(2))[0]
    whole = path.read_bytes()
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        store = RowStore(KEYS)
        for number in range(2):
            assert read(store, number) in (None, (f"row {number}", body(number)))
        assert (read(store, 0) is None) or (read(store, 1) is None)


def test_a_folder_with_another_key_is_refused():
    store = filled(1)
    for text in (json.dumps({**KEYS, "weights": "other"}), "{}", "half a fi", "[]"):
        (store.folder / KEY).write_text(text)
        with pytest.raises(GraftError, match=r"not the cache of these frozen features.*graft cache --clear"):
            RowStore(KEYS)
    (store.folder / KEY).unlink()
    with pytest.raises(GraftError, match=r"its key\.json is missing"):
        RowStore(KEYS)


WRITER = """
import sys
sys.path.insert(0, {root!r})
from tests.common.test_row_store import KEYS, RowStore, body, name
store = RowStore(KEYS)
number = 0
while number < {count}:
    store.put(name(number), f"row {{number}}", body(number % 50) * 40)
    number += 1
    if number == 20:
        print("going", flush=True)
"""


def writer(count):
    code = WRITER.format(root=str(ROOT), count=count)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT)


def test_processes_share_a_store_and_a_kill_leaves_whole_rows_only():
    killed, ends = writer(10**9), writer(200)
    killed.stdout.readline()
    time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert ends.wait(60) == 0
    killed.stdout.close(), ends.stdout.close()
    store = RowStore(KEYS)
    assert len(store) >= 200
    for number in range(len(store)):
        assert read(store, number) == (f"row {number}", body(number % 50) * 40)
    assert store.damaged == 0


def test_a_full_disk_ends_nothing(monkeypatch):
    store = filled(2)
    whole = row_store._write_all

    def full(file, data):
        file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(row_store, "_write_all", full)
    with pytest.warns(UserWarning, match=r"computed anew from here on: .* could not be written \(No space left"):
        store.put(name(2), "row 2", body(2))
    monkeypatch.setattr(row_store, "_write_all", whole)
    store.put(name(3), "row 3", body(3))  # no more is added, and nobody is told twice
    assert [read(store, number) is not None for number in range(4)] == [True, True, False, False]
    again = RowStore(KEYS)
    assert len(again) == 2
    again.put(name(2), "row 2", body(2))
    assert read(RowStore(KEYS), 2) == ("row 2", body(2))


def test_a_cache_that_cannot_be_written_serves_and_adds_nothing(monkeypatch):
    filled(1)

    def denied(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(row_store.os, "utime", denied)
    with pytest.warns(UserWarning, match="cannot be written"):
        store = RowStore(KEYS)
    store.put(name(1), "row 1", body(1))
    assert read(store, 0) == ("row 0", body(0))
    assert read(store, 1) is None
    monkeypatch.undo()


def test_a_place_that_is_no_folder_ends_nothing(cache):
    cache.write_text("a file")
    with pytest.warns(UserWarning, match="cannot be written"):
        store = RowStore(KEYS)
    store.put(name(0), "row", b"")
    assert store.get(name(0)) is None


def aged(store, seconds):
    then = time.time() - seconds
    os.utime(store.folder / KEY, (then, then))


def test_the_limit_takes_the_stores_that_nobody_used_for_longest(monkeypatch):
    old, older, fresh = (filled(9, {"name": n}) for n in ("old", "older", "fresh"))
    size = stores()[0].size
    aged(old, 1000)
    aged(older, 2000)
    monkeypatch.setenv("GRAFT_FROZEN_GB", str(3.2 * size / 1e9))
    new = filled(9, {"name": "new"})
    assert len(new) == 9
    assert [store.folder.exists() for store in (older, old, fresh, new)] == [False, True, True, True]
    assert read(older, 3) == ("row 3", body(3))  # who has it open may read on


def test_at_the_limit_no_more_rows_are_added(monkeypatch):
    filled(9, {"name": "in use"})
    monkeypatch.setattr(row_store, "_REMEASURE", 0)
    monkeypatch.setenv("GRAFT_FROZEN_GB", "3e-6")
    with pytest.warns(UserWarning, match=r"limit of 3e-06 GB.*raise GRAFT_FROZEN_GB"):
        store = filled(30)
    assert 0 < len(store) < 30
    assert sum(stored.size for stored in stores()) <= 3000 + 200
    assert all(read(store, number) == (f"row {number}", body(number)) for number in range(len(store)))


@pytest.mark.parametrize("given", ["0", "-1", "much", "nan", "inf"])
def test_a_limit_that_is_none_is_refused(monkeypatch, given):
    monkeypatch.setenv("GRAFT_FROZEN_GB", given)
    with pytest.raises(GraftError, match=f"GRAFT_FROZEN_GB is '{given}'"):
        limit_bytes()


def test_stores_are_listed_and_removed():
    one, two = filled(2, {"name": "one"}), filled(3, {"name": "two"})
    aged(one, 50)
    assert [dict(stored.key) for stored in stores()] == [{"name": "two"}, {"name": "one"}]
    remove(two.folder)
    remove(two.folder)  # gone already
    assert [stored.folder for stored in stores()] == [one.folder]
    two._touched = 0.0  # a minute later
    with pytest.warns(UserWarning, match="is gone"):
        assert read(two, 0) == ("row 0", body(0))
