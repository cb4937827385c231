"""Fetching and verifying artifacts, with package clients played by small scripts."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import huggingface_hub
import pytest
import requests  # noqa: F401 (probes for IPv6 when first imported, so import it before sockets are off)

from common import _sources, artifacts
from common.artifacts import fetch, is_cached
from common.cli import run
from common.errors import GraftError

WHEEL = "tiny-1.0-py3-none-any.whl"
DEB = "tiny-images_1%3a1.0-1_all.deb"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, and no waiting between tries."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("GRAFT_CACHE", str(folder))
    monkeypatch.setattr(_sources, "BACKOFF_SECONDS", (0.0, 0.0))
    return folder


@pytest.fixture
def catalog(tmp_path, monkeypatch):
    """Write a catalog with one row, and return the writer."""

    def write(source: str, data: bytes, filename: str = WHEEL, members: dict[str, str] | None = None) -> None:
        folder = tmp_path / f"data-{time.monotonic_ns()}"
        folder.mkdir()
        lines = ["tiny:", "  domains: [vision]", "  summary: A test row", f"  source: '{source}'"]
        lines += [f"  filename: {filename}", f"  sha256: '{sha256(data)}'", f"  size: {len(data)}"]
        lines += ["  licence: MIT", "  citation: Nobody", "  backbone: timm:none"]
        lines += ["  members:", *(f"    {name}: '{digest}'" for name, digest in members.items())] if members else []
        (folder / "checkpoints.yaml").write_text("\n".join(lines))
        (folder / "datasets.yaml").write_text("")
        monkeypatch.setattr(artifacts, "DATA_FOLDER", folder)

    return write


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Play pip or apt-get by a shell script; `calls()` counts how often it ran. Pip's folder is in $DEST."""
    log = tmp_path / "calls"

    def install(name: str, script: str) -> None:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        path = folder / name
        get_dest = 'for a in "$@"; do case "$a" in --dest=*) DEST="${a#--dest=}";; esac; done\n'
        path.write_text(f'#!/bin/sh\necho "$@" >> {log}\n{get_dest}{script}\n')
        path.chmod(0o755)
        if name == "pip":
            monkeypatch.setattr(sys, "executable", str(path))
        else:
            monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    install.calls = lambda: log.read_text().splitlines() if log.exists() else []
    return install


def leftovers(cache: Path) -> list[Path]:
    return [path for path in (cache / ".partial").rglob("*")] if cache.exists() else []


def archived(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "archives").glob("*") if not path.name.endswith(".json"))


# ---- fetching


def test_fetch_verifies_a_wheel_and_keeps_it(catalog, program, tmp_path, cache):
    data = b"a wheel"
    (tmp_path / "remote.whl").write_bytes(data)
    catalog("wheel:tiny==1.0", data)
    program("pip", f'cp {tmp_path}/remote.whl "$DEST/{WHEEL}"')
    assert not is_cached("tiny")
    path = fetch("tiny")
    assert path == cache / "archives" / WHEEL
    assert path.read_bytes() == data
    assert is_cached("tiny")
    assert fetch("tiny") == path
    assert len(program.calls()) == 1
    assert "download --no-deps --only-binary=:all:" in program.calls()[0]
    assert program.calls()[0].endswith(" tiny==1.0")
    assert leftovers(cache) == []


def test_fetch_downloads_a_debian_package_of_the_exact_version(catalog, program, tmp_path):
    data = b"a package"
    (tmp_path / "remote.deb").write_bytes(data)
    catalog("deb:tiny-images=1:1.0-1", data, DEB)
    program("apt-get", f"cp {tmp_path}/remote.deb {DEB}")
    assert fetch("tiny").read_bytes() == data
    assert program.calls() == ["download tiny-images=1:1.0-1"]


def test_fetch_pins_the_commit_on_the_hub(catalog, monkeypatch):
    asked = []

    def download(repo: str, filename: str, *, revision: str, local_dir: Path) -> str:
        asked.append((repo, filename, revision))
        path = Path(local_dir) / filename
        path.parent.mkdir()
        path.write_bytes(b"weights")
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    catalog(f"hf:owner/repo@{COMMIT}/sub/model.safetensors", b"weights", "model.safetensors")
    assert fetch("tiny").read_bytes() == b"weights"
    assert asked == [("owner/repo", "sub/model.safetensors", COMMIT)]


def test_hub_errors_of_any_class_reach_the_user_as_one_line(catalog, monkeypatch):
    def download(*_: object, **__: object) -> str:
        raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    catalog(f"hf:owner/repo@{COMMIT}/model.safetensors", b"weights")
    with pytest.raises(GraftError, match=r"Connection refused.*graft fetch tiny --from"):
        fetch("tiny")


def test_relative_file_source_is_taken_from_the_catalog_folder(catalog):
    catalog("file:starters/model.bin", b"weights", "model.bin")
    (artifacts.DATA_FOLDER / "starters").mkdir()
    (artifacts.DATA_FOLDER / "starters" / "model.bin").write_bytes(b"weights")
    assert fetch("tiny").read_bytes() == b"weights"


def test_an_altered_local_source_is_refused_at_once_and_left_alone(catalog, monkeypatch, cache):
    catalog("file:starters/model.bin", b"weights", "model.bin")
    committed = artifacts.DATA_FOLDER / "starters" / "model.bin"
    committed.parent.mkdir()
    committed.write_bytes(b"weightS")
    tries = []
    copy = _sources.shutil.copyfile
    monkeypatch.setattr(_sources.shutil, "copyfile", lambda *paths: tries.append(paths) or copy(*paths))
    with pytest.raises(
        GraftError, match=rf"{committed} does not have the sha256 .* Either restore {committed} and run"
    ):
        fetch("tiny")
    assert len(tries) == 1
    assert committed.read_bytes() == b"weightS"
    assert archived(cache) == []
    committed.write_bytes(b"weights")
    assert fetch("tiny").read_bytes() == b"weights"


def test_a_committed_file_is_listed_and_shown_like_any_other(catalog, capsys):
    catalog("file:starters/model.bin", b"weights", "model.bin")
    (artifacts.DATA_FOLDER / "starters").mkdir()
    (artifacts.DATA_FOLDER / "starters" / "model.bin").write_bytes(b"weights")
    assert run(["list", "checkpoints"], {}) == 0
    assert re.search(r"tiny +vision +MIT +0 MB +no +A test row", capsys.readouterr().out)
    fetch("tiny")
    capsys.readouterr()
    assert run(["list", "checkpoints"], {}) == 0
    assert re.search(r"tiny +vision +MIT +0 MB +yes +A test row", capsys.readouterr().out)
    assert run(["show", "tiny"], {}) == 0
    assert f"sha256: {sha256(b'weights')}" in capsys.readouterr().out.replace("\n", "")


def test_corrupt_download_is_refused_after_three_tries_and_the_older_file_kept(catalog, program, cache):
    catalog("wheel:tiny==1.0", b"expected")
    program("pip", f'printf expec > "$DEST/{WHEEL}"')
    (cache / "archives").mkdir(parents=True)
    (cache / "archives" / WHEEL).write_bytes(b"older")
    with pytest.raises(GraftError, match=r"the file that came \(5 bytes\) does not have the sha256"):
        fetch("tiny")
    assert len(program.calls()) == 3
    assert (cache / "archives" / WHEEL).read_bytes() == b"older"
    assert leftovers(cache) == []
    assert not is_cached("tiny")


def test_a_try_that_fails_is_followed_by_one_that_succeeds(catalog, program, tmp_path):
    catalog("wheel:tiny==1.0", b"expected")
    flag = tmp_path / "flag"
    program("pip", f'if [ -e {flag} ]; then printf expected > "$DEST/{WHEEL}"; else touch {flag}; exit 1; fi')
    assert fetch("tiny").read_bytes() == b"expected"
    assert len(program.calls()) == 2


def test_without_network_the_error_names_the_row_the_cause_and_three_ways_out(catalog, program, cache):
    catalog("wheel:tiny==1.0", b"expected")
    program("pip", "echo noise; echo 'ERROR: No matching distribution found for tiny==1.0' >&2; echo bye >&2; exit 1")
    with pytest.raises(GraftError) as caught:
        fetch("tiny")
    text = str(caught.value)
    assert "\n" not in text
    assert "'tiny'" in text
    assert "pip says 'ERROR: No matching distribution found for tiny==1.0'" in text
    assert "connect to the network and run `graft fetch tiny`" in text
    assert f"`graft fetch tiny --from {WHEEL}`" in text
    assert f"set GRAFT_CACHE to a cache that has it (it is {cache} now)" in text
    assert archived(cache) == []
    assert leftovers(cache) == []


def test_without_apt_the_error_says_which_package_file_to_bring(catalog, monkeypatch, tmp_path):
    catalog("deb:tiny-images=1:1.0-1", b"expected", DEB)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(GraftError) as caught:
        fetch("tiny")
    text = str(caught.value)
    assert "no apt-get to download the Debian package tiny-images 1:1.0-1" in text
    assert f"`graft fetch tiny --from {DEB}`" in text
    assert "connect to the network" not in text


def test_without_package_lists_the_error_says_apt_get_update(catalog, program):
    catalog("deb:tiny-images=1:1.0-1", b"expected", DEB)
    program("apt-get", "echo 'E: Unable to locate package tiny-images' >&2; exit 100")
    with pytest.raises(GraftError, match=r"run `apt-get update` as administrator .* and run `graft fetch tiny`"):
        fetch("tiny")
    assert len(program.calls()) == 1


def test_another_version_in_the_package_lists_is_explained(catalog, program):
    catalog("deb:tiny-images=1:1.0-1", b"expected", DEB)
    program("apt-get", "echo \"E: Version '1:1.0-1' for 'tiny-images' was not found\" >&2; exit 100")
    with pytest.raises(GraftError, match=r"add a Debian release that has tiny-images 1:1\.0-1"):
        fetch("tiny")


def test_missing_pip_is_explained(catalog, monkeypatch):
    catalog("wheel:tiny==1.0", b"expected")
    monkeypatch.setattr(_sources.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(GraftError, match=r"this Python has no pip.*ensurepip"):
        fetch("tiny")


def test_missing_file_source_is_not_tried_again(catalog, tmp_path):
    catalog(f"file:{tmp_path}/gone.bin", b"expected")
    with pytest.raises(GraftError, match=r"there is no file .*gone\.bin"):
        fetch("tiny")


def test_unknown_row_suggests_the_nearest(catalog):
    catalog("wheel:tiny==1.0", b"x")
    with pytest.raises(GraftError, match=r"Unknown dataset or checkpoint 'tinny'. Did you mean 'tiny'"):
        fetch("tinny")


def test_a_second_fetch_waits_for_the_first(catalog, program, cache):
    catalog("wheel:tiny==1.0", b"expected")
    program("pip", f'sleep 0.3; printf expected > "$DEST/{WHEEL}"')
    threads = [threading.Thread(target=fetch, args=("tiny",)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(program.calls()) == 1
    assert archived(cache) == [WHEEL]


def test_what_a_killed_process_left_is_cleared(catalog, tmp_path, cache):
    (tmp_path / "remote").write_bytes(b"expected")
    catalog(f"file:{tmp_path}/remote", b"expected")
    stale = cache / ".partial" / WHEEL / "download"
    stale.mkdir(parents=True)
    (stale / "half").write_bytes(b"exp")
    assert fetch("tiny").read_bytes() == b"expected"
    assert leftovers(cache) == []


# ---- the user's own file


def test_from_file_imports_the_right_file(catalog, program, tmp_path):
    catalog("wheel:tiny==1.0", b"expected")
    program("pip", "exit 1")
    (tmp_path / "mine.whl").write_bytes(b"expected")
    path = fetch("tiny", from_file=tmp_path / "mine.whl")
    assert path.name == WHEEL
    assert path.read_bytes() == b"expected"
    assert fetch("tiny") == path
    assert program.calls() == []
    assert (tmp_path / "mine.whl").exists()


@pytest.mark.parametrize(
    ("content", "message"), [(b"short", "has 5 bytes and is not"), (b"EXPECTED", "has another sha256 and is not")]
)
def test_from_file_refuses_another_file_and_keeps_the_cached_one(catalog, tmp_path, cache, content, message):
    catalog("wheel:tiny==1.0", b"expected")
    (tmp_path / "good").write_bytes(b"expected")
    fetch("tiny", from_file=tmp_path / "good")
    (tmp_path / "bad").write_bytes(content)
    with pytest.raises(GraftError, match=message):
        fetch("tiny", from_file=tmp_path / "bad")
    assert (cache / "archives" / WHEEL).read_bytes() == b"expected"
    assert leftovers(cache) == []


def test_from_file_that_is_not_there(catalog, tmp_path):
    catalog("wheel:tiny==1.0", b"expected")
    with pytest.raises(GraftError, match=r"There is no file .*nothing; give the path of the file of 'tiny'"):
        fetch("tiny", from_file=tmp_path / "nothing")


# ---- verifying once


def test_rotten_cached_file_is_reported_and_fetched_again(catalog, tmp_path, capsys):
    (tmp_path / "remote").write_bytes(b"expected")
    catalog(f"file:{tmp_path}/remote", b"expected")
    path = fetch("tiny")
    capsys.readouterr()
    path.write_bytes(b"expectEd")
    os.utime(path, ns=(1, 1))
    assert not is_cached("tiny")
    assert fetch("tiny").read_bytes() == b"expected"
    assert "no longer has its sha256" in capsys.readouterr().err


def test_an_untouched_file_is_hashed_once(catalog, tmp_path, monkeypatch):
    (tmp_path / "remote").write_bytes(b"expected")
    catalog(f"file:{tmp_path}/remote", b"expected")
    path = fetch("tiny")
    hashed = []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, name: hashed.append(file.name) or digest(file, name))
    monkeypatch.setattr(artifacts, "_hashed_here", {})
    fetch("tiny")
    assert hashed == []
    os.utime(path, ns=(1, 1))
    fetch("tiny")
    fetch("tiny")
    assert hashed == [str(path)]
    fetch("tiny", recheck=True)
    assert hashed == [str(path)] * 2


def test_recheck_finds_rot_that_left_size_and_time_alone(catalog, tmp_path):
    (tmp_path / "remote").write_bytes(b"expected")
    catalog(f"file:{tmp_path}/remote", b"expected")
    path = fetch("tiny")
    before = path.stat()
    path.write_bytes(b"expectEd")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert fetch("tiny", recheck=True).read_bytes() == b"expected"


def test_cache_without_stamps_is_read_without_writing(catalog, tmp_path, cache, monkeypatch):
    (tmp_path / "remote").write_bytes(b"expected")
    catalog(f"file:{tmp_path}/remote", b"expected")
    fetch("tiny")
    (cache / "archives" / f"{WHEEL}.verified.json").unlink()

    def refuse(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "write_text", refuse)
    monkeypatch.setattr(Path, "mkdir", refuse)
    assert fetch("tiny").read_bytes() == b"expected"


# ---- the disk refuses


def test_full_disk_is_one_line_and_leaves_nothing(catalog, tmp_path, cache, monkeypatch):
    (tmp_path / "remote").write_bytes(b"expected")
    catalog(f"file:{tmp_path}/remote", b"expected")

    def full(_: str, target: Path) -> None:
        Path(target).write_bytes(b"exp")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))

    monkeypatch.setattr(_sources.shutil, "copyfile", full)
    with pytest.raises(GraftError, match=r"The disk is full .* while fetching 'tiny': .*GRAFT_CACHE"):
        fetch("tiny")
    assert archived(cache) == []
    assert leftovers(cache) == []


def test_full_disk_under_a_package_client_is_told_the_same_way(catalog, program):
    catalog("deb:tiny-images=1:1.0-1", b"expected", DEB)
    program("apt-get", "echo 'E: Write error - write (28: No space left on device)' >&2; exit 100")
    with pytest.raises(GraftError, match="The disk is full"):
        fetch("tiny")
    assert len(program.calls()) == 1


def test_no_permission_is_one_line(catalog, tmp_path, cache, monkeypatch):
    (tmp_path / "remote").write_bytes(b"expected")
    catalog(f"file:{tmp_path}/remote", b"expected")

    def refuse(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(GraftError, match=r"No permission for .*cache.* while fetching 'tiny': set GRAFT_CACHE"):
        fetch("tiny")


def test_cache_that_is_a_file(catalog, tmp_path, cache):
    (tmp_path / "remote").write_bytes(b"expected")
    catalog(f"file:{tmp_path}/remote", b"expected")
    cache.write_text("a file")
    with pytest.raises(GraftError, match="is a file where a folder is needed"):
        fetch("tiny")


def test_interrupt_leaves_nothing_half_written(catalog, tmp_path, cache, monkeypatch):
    (tmp_path / "remote").write_bytes(b"expected")
    catalog(f"file:{tmp_path}/remote", b"expected")

    def interrupt(_: str, target: Path) -> None:
        Path(target).write_bytes(b"exp")
        raise KeyboardInterrupt

    monkeypatch.setattr(_sources.shutil, "copyfile", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fetch("tiny")
    assert archived(cache) == []
    assert leftovers(cache) == []


# ---- progress


def test_progress_is_one_line_on_stderr_where_there_is_no_terminal(catalog, tmp_path, capsys):
    (tmp_path / "remote").write_bytes(b"expected")
    catalog(f"file:{tmp_path}/remote", b"expected")
    fetch("tiny")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "Fetching tiny (0 MB)\n"


def test_progress_is_a_bar_on_a_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with _sources.progress("Fetching tiny", tmp_path, 2_000_000):
        (tmp_path / "part").write_bytes(bytes(1_000_000))
        time.sleep(0.5)
    err = capsys.readouterr().err
    assert "1.0/2.0 MB" in err
    assert "2.0/2.0 MB" in err


# ---- cheap import


def test_importing_artifacts_imports_nothing_heavy():
    script = "import sys, common.artifacts; print([m for m in sys.argv[1:] if m in sys.modules])"
    heavy = ["torch", "pooch", "yaml", "rich", "huggingface_hub", "debian", "filelock", "requests"]
    root = str(Path(artifacts.__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", script, *heavy], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_cache_dir_follows_the_environment(monkeypatch, tmp_path):
    assert artifacts.cache_dir() == tmp_path / "cache"
    monkeypatch.setenv("GRAFT_CACHE", "~/somewhere")
    assert artifacts.cache_dir() == Path.home() / "somewhere"
    monkeypatch.delenv("GRAFT_CACHE")
    assert artifacts.cache_dir().is_absolute()
    assert "graft" in artifacts.cache_dir().parts
