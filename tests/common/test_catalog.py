"""The catalog's rows: the real ones are whole and used, broken ones are refused with every fault named."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from common.artifacts import DATA_FOLDER, catalog
from common.errors import GraftError

ROOT = Path(__file__).resolve().parents[2]
ROWS = list(catalog().values())

GOOD = """
  domains: [vision]
  summary: A row
  source: wheel:tiny==1.0
  filename: tiny-1.0.whl
  sha256: {digest}
  size: 10
  licence: MIT
  citation: Nobody
"""


def write(folder: Path, checkpoints: str = "", datasets: str = "") -> Path:
    (folder / "checkpoints.yaml").write_text(checkpoints)
    (folder / "datasets.yaml").write_text(datasets)
    return folder


def good(name: str, digest: str = "a" * 64, extra: str = "") -> str:
    return f"{name}:{GOOD.format(digest=digest)}{extra}"


@pytest.fixture(scope="module")
def code() -> str:
    """The text of all code that may use a row."""
    files = [path for room in ("common", "domains") for path in sorted((ROOT / room).rglob("*.py"))]
    return "\n".join(path.read_text(encoding="utf-8") for path in files)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_row_is_whole(row):
    assert row.licence.strip()
    assert row.citation.strip()
    assert row.summary.strip()
    assert re.fullmatch("[0-9a-f]{64}", row.sha256)
    assert row.size > 0
    assert bool(row.split) == (row.kind == "dataset")
    assert bool(row.backbone) == (row.kind == "checkpoint")
    assert all(re.fullmatch("(?:[0-9a-f]{64})?", digest) for digest in row.members.values())


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_row_names_domains_that_exist(row):
    for domain in row.domains:
        assert (ROOT / "domains" / domain).is_dir(), f"there is no folder domains/{domain}"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_row_is_used_by_code(row, code):
    named = re.search(rf"""["']{re.escape(row.name)}["']""", code)
    assert named, f"'{row.name}' is an orphan: no code in common/ or domains/ names it; use it or remove its row"


def test_names_are_unique_over_all_files():
    names = [
        match
        for path in sorted(DATA_FOLDER.glob("*.yaml"))
        for match in re.findall(r"^([^\s#][^:]*):", path.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert sorted(names) == sorted(set(names))
    assert set(names) == set(catalog())


def test_a_good_catalog_is_read_and_cannot_be_changed(tmp_path):
    rows = catalog(write(tmp_path, good("net", extra="  backbone: timm:x\n"), good("set", extra="  split: none\n")))
    assert [(row.name, row.kind, row.domains) for row in rows.values()] == [
        ("net", "checkpoint", ("vision",)),
        ("set", "dataset", ("vision",)),
    ]
    with pytest.raises(TypeError):
        rows["other"] = rows["net"]


def test_all_problems_of_all_rows_are_named_at_once(tmp_path):
    broken = """
bad:
  domains: vision
  summary: ""
  source: wheel:tiny
  filename: ../tiny.whl
  sha256: abc
  size: 0
  licence: MIT
  citaton: Nobody
  members: {a: nonsense}
Worse: 3
"""
    with pytest.raises(GraftError) as caught:
        catalog(write(tmp_path, broken, good("set")))
    text = str(caught.value)
    assert "\n" not in text
    for part in (
        "has 12 problems",
        "checkpoints.yaml, bad: 'domains' is 'vision'",
        "'summary' has to be a text",
        "'source' is 'wheel:tiny' and has to be wheel:NAME==VERSION or",
        "'filename' is '../tiny.whl'",
        "'sha256' is 'abc' and has to be 64 lower-case hex digits",
        "'size' is 0 and has to be a number of bytes above 0",
        "unknown field 'citaton'. Did you mean 'citation'?",
        "'citation' has to be a text",
        "'backbone' has to be a text",
        "'members' is {'a': 'nonsense'}",
        "checkpoints.yaml, Worse: it has to be a mapping",
        "datasets.yaml, set: 'split' has to be a text",
    ):
        assert part in text


@pytest.mark.parametrize(
    "source",
    [
        "wheel:--index-url=evil==1.0",
        "deb:-o=Evil",
        "deb:Package=1.0",
        "hf:owner/repo@main/model.safetensors",
        "hf:owner/repo@0123456789abcdef0123456789abcdef01234567/",
        "https:example",
        "wheel:tiny>=1.0",
        "wheel:tiny==1.0 other==2.0",
    ],
)
def test_sources_that_are_not_pinned_or_could_be_options_are_refused(tmp_path, source):
    row = good("net", extra="  backbone: timm:x\n").replace("wheel:tiny==1.0", f"'{source}'")
    with pytest.raises(GraftError, match="'source' is"):
        catalog(write(tmp_path, row))


def test_a_name_given_twice_is_refused(tmp_path):
    twice = good("net", extra="  backbone: timm:x\n") * 2
    with pytest.raises(GraftError, match="'net' is given twice"):
        catalog(write(tmp_path, twice))


def test_a_name_in_both_files_is_refused(tmp_path):
    with pytest.raises(GraftError, match="the name is taken by a checkpoint"):
        catalog(write(tmp_path, good("x", extra="  backbone: timm:x\n"), good("x", extra="  split: none\n")))


def test_one_file_name_for_two_files_is_refused(tmp_path):
    rows = good("x", extra="  backbone: timm:x\n") + good("y", "b" * 64, extra="  backbone: timm:x\n")
    with pytest.raises(GraftError, match=r"another row has the filename 'tiny-1\.0\.whl'"):
        catalog(write(tmp_path, rows))


def test_two_rows_may_share_one_file(tmp_path):
    rows = good("x", extra="  backbone: timm:x\n") + good("y", extra="  backbone: timm:x\n")
    assert set(catalog(write(tmp_path, rows))) == {"x", "y"}


def test_a_missing_catalog_says_what_to_do(tmp_path):
    with pytest.raises(GraftError, match="run Graft from a clone"):
        catalog(tmp_path)
