"""The verbs that need no training, and one line with exit code 2 for a user's mistake."""

from __future__ import annotations

import importlib.metadata
import itertools
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from common import __version__
from common._yaml import Loader
from common.artifacts import catalog
from common.cli import TRAINING, doctor, listing, run
from common.errors import GraftError
from common.methods import METHODS
from common.methods.taxonomy import BRANCHES
from tests.toy import DOMAINS

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def wide(monkeypatch, tmp_path):
    """A wide terminal, so that tables do not fold, and an empty cache."""
    monkeypatch.setenv("COLUMNS", "500")
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def call(capsys):
    """Run the command line; returns (exit code, standard output, standard error)."""

    def run_it(*argv):
        try:
            code = run(argv, DOMAINS)
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run_it


def rows(text):
    return [line.split() for line in text.splitlines() if line.strip()]


# ---- list ----------------------------------------------------------------------------------------------------------


def test_methods_are_listed_with_family_and_source(call):
    code, out, err = call("list", "methods")
    assert (code, err) == (0, "")
    names = [row[0] for row in rows(out)[1:]]
    assert sorted(names) == sorted(METHODS)
    families = [METHODS[name].taxonomy for name in names]
    assert [family for family, _ in itertools.groupby(families)] == [f for f in BRANCHES if f in families]
    for name, spec in METHODS.items():
        line = next(line for line in out.splitlines() if line.startswith(f"{name} "))
        assert spec.taxonomy in line
        assert spec.summary in line
        assert spec.source in line


@pytest.mark.parametrize(("kind", "wanted"), [("data", "dataset"), ("checkpoints", "checkpoint")])
def test_the_catalog_is_listed_by_kind(call, kind, wanted):
    code, out, _ = call("list", kind)
    assert code == 0
    assert [row[0] for row in rows(out)[1:]] == [name for name, row in catalog().items() if row.kind == wanted]
    assert " yes " not in out  # nothing is in the empty cache


def test_domains_are_what_is_listed_by_default(call):
    code, out, _ = call("list")
    assert (code, out) == call("list", "domains")[:2]
    assert rows(out)[1] == ["toy", "ToyTask", "ToyData", "tests"]


def test_baselines_are_listed_with_what_they_predict(call):
    code, out, err = call("list", "baselines")
    assert (code, err) == (0, "")
    assert [" ".join(row) for row in rows(out)[1:]] == [
        "MostFrequent toy The most frequent class, whatever the input.",
        "Untrained toy The backbone and the head as they are before training.",
    ]


@pytest.mark.parametrize("argv", [["list", "baselines"], [], ["frob"]], ids=" ".join)
def test_telling_what_there_is_needs_no_torch(argv):
    """The baselines of every built-in domain are listed out of their source."""
    code = f"""
import sys
from common.cli import run
from domains import DOMAINS
code = run({argv}, DOMAINS)
assert code == (2 if {argv} != ["list", "baselines"] else 0)
assert not {{"torch", "lightning", "peft"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert ("MajorityClass" in done.stdout) == (argv == ["list", "baselines"])


def test_recipes_are_listed_with_their_purpose(call, tmp_path, monkeypatch):
    configs = tmp_path / "configs"
    (configs / "toy").mkdir(parents=True)
    (configs / "toy" / "a.yaml").write_text("# Purpose: to show a purpose\nseed: 1\n")
    (configs / "b.yaml").write_text("seed: 1\n")
    (configs / "empty.yaml").write_text("")
    monkeypatch.setattr(listing, "CONFIGS", configs)
    code, out, _ = call("list", "recipes")
    assert code == 0
    found = [" ".join(row) for row in rows(out)[1:]]
    assert sorted(found) == ["configs/b.yaml", "configs/empty.yaml", "configs/toy/a.yaml to show a purpose"]


def test_every_recipe_of_the_repository_states_its_purpose(call):
    code, out, _ = call("list", "recipes")
    assert code == 0
    assert rows(out)[1:]
    assert all(len(row) > 2 for row in rows(out)[1:])


# ---- show ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_explained_with_its_defaults(call, name):
    code, out, err = call("show", name)
    assert (code, err) == (0, "")
    assert METHODS[name].__doc__.splitlines()[0] in out
    for setting, value in METHODS[name]().describe()["init_args"].items():
        shown = re.search(rf"^  {setting}: (.*)$", out, re.MULTILINE)
        assert yaml.load(shown.group(1), Loader=Loader) == value
    assert call("show", "method", name) == (code, out, err)


def test_what_is_shown_may_be_named_with_its_kind(call):
    assert call("show", "data", "openclipart") == call("show", "openclipart")
    assert call("show", "checkpoint", "LoRA")[2].startswith("graft: Unknown checkpoint 'LoRA'")
    assert call("show", "methods", "LoRA")[2].startswith("graft: Unknown kind 'methods'. Did you mean 'method'")
    assert "takes one name" in call("show", "method", "LoRA", "SSF")[2]


def test_settings_are_explained_those_of_the_base_class_too(call):
    _, out, _ = call("show", "LoRA")
    flat = " ".join(out.split())
    assert "rank: 8 Rank of the change. alpha: null Scale; None takes 2 * rank." in flat
    assert "on: [all] Roles or groups of roles" in flat
    assert "It has no settings." in call("show", "LinearProbe")[1]


def test_the_page_of_all_methods_is_current(call, tmp_path):
    """Made anew by `graft list methods --out common/METHODS.md`."""
    out = tmp_path / "methods.md"
    assert call("list", "methods", "--out", str(out))[0] == 0
    assert out.read_text(encoding="utf-8") == (ROOT / "common" / "METHODS.md").read_text(encoding="utf-8")
    for kind, name in (("data", "x.md"), ("methods", "x.pdf")):
        assert "graft list methods --out FILE.md" in call("list", kind, "--out", str(tmp_path / name))[2]


@pytest.mark.parametrize("name", catalog())
def test_a_row_of_the_catalog_is_shown_in_full(call, name):
    code, out, _ = call("show", name)
    row = catalog()[name]
    assert code == 0
    flat = "".join(out.split())
    for value in (row.sha256, row.licence, row.source, row.filename, str(row.size)):
        assert "".join(value.split()) in flat


# ---- doctor --------------------------------------------------------------------------------------------------------


def test_doctor_names_what_is_missing_and_how_to_get_it(call, tmp_path):
    code, out, err = call("doctor")
    assert (code, err) == (0, "")
    for word in ("python", "torch", "peft", "cores", "gpu", "precision auto", str(tmp_path / "cache")):
        assert word in out
    for name in catalog():
        assert f"graft fetch {name}" in out
    assert "things are missing; see above" in out


def test_doctor_sees_missing_and_unfit_packages(monkeypatch):
    def version(name):
        if name == "absent":
            raise importlib.metadata.PackageNotFoundError(name)
        return "3.0"

    monkeypatch.setattr(doctor, "requires", lambda name: ["absent>=1", "old<2", "fits>=2", 'extra; extra == "dev"'])
    monkeypatch.setattr(doctor, "version", version)
    problems = []
    found = dict(doctor._packages(problems))
    assert found["absent"] == "not installed"
    assert found["old"] == "3.0 (wanted <2)"
    assert found["fits"] == "3.0"
    assert "extra" not in found
    assert len(problems) == 2
    assert all("make install" in problem for problem in problems)


def test_doctor_runs_from_a_clone_that_is_not_installed(monkeypatch):
    def requires(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "requires", requires)
    problems = []
    doctor._packages(problems)
    assert len(problems) == 1
    assert "make install" in problems[0]


# ---- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["list", "method"], "Unknown list 'method'. Did you mean 'methods'?"),
        (["show", "lora"], "Unknown name 'lora'. Did you mean 'LoRA'?"),
        (["show", "xyzzy"], "Unknown name 'xyzzy'. Allowed:"),
        (["fetch", "nothing-of-this-name"], "nothing-of-this-name"),
        (["fetch", "a", "b", "--from", "x.whl"], "--from gives one file, but 2 names were given"),
        (["export", "/nonexistent/run", "out"], "has no metrics.json: not a finished run"),
        (["merge", "/nonexistent/adapter", "out"], "is not an adapter folder"),
        (["predict", "--adapter", "/nonexistent/adapter", "x.png"], "is not an adapter folder"),
        (["test"], "Say which run"),
        (["baseline"], "Say which baseline: graft baseline NAME --config RECIPE"),
        (["baseline", "--config", "x.yaml"], "Say which baseline"),
        (["baseline", "Majority", "--config", "/nonexistent.yaml"], "/nonexistent.yaml"),
        ([], "Say what to do: fit, preview, validate, test, baseline, list,"),
        (["exprt"], "Unknown verb 'exprt'. Did you mean 'export'? Allowed: baseline, cache, combine, compare,"),
        (["fly"], "Unknown verb 'fly'."),
        (["--frob"], "Unrecognized arguments: --frob. See `graft --help`."),
        (["export", "run"], "The following arguments are required: out. See `graft export --help`."),
        (["predict"], "The following arguments are required: --adapter, files. See `graft predict --help`."),
        (["list", "methods", "more"], "Unrecognized arguments: more."),
        (["compare", "study.yaml", "--jobs", "many"], "Argument --jobs: invalid int value: 'many'."),
        (["test", "--run", "/nonexistent/run"], "is not the folder of a run"),
        (["validate", "--run", "/nonexistent/run"], "is not the folder of a run"),
        (["compare", "/nonexistent/study.yaml"], "/nonexistent/study.yaml"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(call, argv, words):
    code, out, err = call(*argv)
    assert code == 2
    assert out == ""
    assert words in err
    assert err.startswith("graft: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err


def test_help_names_every_verb(call):
    code, out, _ = call("--help")
    assert code == 0
    for verb in (*TRAINING, "list", "show", "fetch", "export", "merge", "predict", "compare", "doctor"):
        assert f"\n    {verb} " in out


def test_the_version_is_told(call):
    assert call("--version")[:2] == (0, f"graft {__version__}\n")


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [(GraftError("mended so"), 2, "graft: mended so\n"), (KeyboardInterrupt(), 130, "graft: interrupted\n")],
)
def test_what_a_verb_raises_becomes_its_exit_code(call, monkeypatch, error, code, words):
    def fail(*args):
        raise error

    monkeypatch.setattr(listing, "_rows", fail)
    assert call("list") == (code, "", words)


def test_a_programming_error_is_not_dressed_up(call, monkeypatch):
    def fail(*args):
        raise ZeroDivisionError

    monkeypatch.setattr(listing, "_rows", fail)
    with pytest.raises(ZeroDivisionError):
        call("list")


def test_a_broken_plugin_is_a_users_error(call, monkeypatch):
    entry = SimpleNamespace(name="odd", load=lambda: object())
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **kwargs: [entry])
    code, _, err = call("list")
    assert code == 2
    assert "'odd'" in err
