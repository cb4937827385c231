"""Folders of the cache that are built once, whoever asks first."""

from __future__ import annotations

import errno
import functools
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from common import artifacts
from common.artifacts import prepared, prepared_parts
from common.errors import GraftError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("GRAFT_CACHE", str(folder))
    return folder


def test_prepared_builds_once(cache):
    built = []

    def build(folder: Path) -> None:
        built.append(folder)
        (folder / "weights").write_text("done")

    path = prepared("key-1", build)
    assert path == cache / "prepared" / "key-1"
    assert prepared("key-1", build) == path
    assert (path / "weights").read_text() == "done"
    assert len(built) == 1
    assert built[0] != path


def test_prepared_keeps_nothing_when_the_build_fails(cache):
    def build(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        prepared("key", build)
    assert not (cache / "prepared" / "key").exists()
    assert list((cache / ".partial").iterdir()) == []


def test_prepared_words_a_full_disk():
    def build(folder: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))

    with pytest.raises(GraftError, match=r"The disk is full .* while preparing 'key'"):
        prepared("key", build)


def test_prepared_lets_one_thread_build():
    built, seen = [], []

    def build(folder: Path) -> None:
        built.append(folder)
        (folder / "a").write_text("a")
        time.sleep(0.2)
        (folder / "b").write_text("b")

    def work() -> None:
        seen.append(sorted(path.name for path in prepared("key", build).iterdir()))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1
    assert seen == [["a", "b"]] * 4


def test_prepared_lets_one_process_build(tmp_path):
    script = (
        "import sys, time; from pathlib import Path; from common.artifacts import prepared\n"
        "def build(folder):\n"
        "    with open(sys.argv[1], 'a') as log: log.write('x')\n"
        "    time.sleep(0.3); (folder / 'done').write_text('')\n"
        "sys.exit(0 if (prepared('key', build) / 'done').exists() else 1)\n"
    )
    log = tmp_path / "log"
    root = str(Path(artifacts.__file__).parents[1])
    command = [sys.executable, "-c", script, str(log)]
    running = [subprocess.Popen(command, cwd=root) for _ in range(3)]
    assert [process.wait() for process in running] == [0, 0, 0]
    assert log.read_text() == "x"


@pytest.mark.parametrize("key", ["", "../up", "a/b", ".hidden"])
def test_prepared_refuses_keys_that_are_no_plain_name(key):
    with pytest.raises(ValueError, match="only letters"):
        prepared(key, lambda _: None)


def test_two_share_the_parts_that_both_want(cache):
    """The first part's builder waits for the last part, which so must be another's."""
    last, built, seen = threading.Event(), [], []

    def build(folder: Path, part: str) -> None:
        built.append((part, threading.current_thread().name))
        if part == "0":
            assert last.wait(timeout=20)
        if part == "3":
            last.set()
        (folder / "part").write_text(part)

    def work() -> None:
        found = prepared_parts({f"part-{n}": functools.partial(build, part=n) for n in "0123"})
        seen.append([(folder / "part").read_text() for folder in found])

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [list("0123")] * 2
    assert sorted(part for part, _ in built) == list("0123")
    assert dict(built)["0"] != dict(built)["3"]
