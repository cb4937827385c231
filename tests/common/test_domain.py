"""A domain is names; its modules are imported when asked for, and plug-ins come in by entry point."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from types import SimpleNamespace

import pytest

from common.domain import ENTRY_POINTS, Domain, with_plugins
from common.errors import GraftError
from tests.toy import DOMAINS, ToyTask, most_frequent


def entry(name, offers):
    return SimpleNamespace(name=name, load=lambda: offers)


@pytest.fixture
def plugins(monkeypatch):
    def install(*entries):
        def entry_points(*, group):
            assert group == ENTRY_POINTS == "graft.domains"
            return entries

        monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)

    return install


def test_a_task_is_imported_by_its_public_name():
    assert DOMAINS["toy"].load_task("ToyTask") is ToyTask


def test_an_unknown_task_is_refused_with_the_nearest():
    with pytest.raises(GraftError, match=r"task of domain toy 'ToyTsk'.*'ToyTask'"):
        DOMAINS["toy"].load_task("ToyTsk")


def test_load_all_imports_tasks_and_data():
    code = (
        "import sys; from common.domain import Domain\n"
        "Domain(name='x', summary='', tasks={'A': 'wave'}, data={'B': 'colorsys'}).load_all()\n"
        "assert {'wave', 'colorsys'} <= set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_predict_is_a_function_of_a_module():
    assert Domain(name="x", summary="", predict="os.path:join").load_predict()("a", "b") == "a/b"
    with pytest.raises(GraftError, match="'x' has no predict"):
        Domain(name="x", summary="").load_predict()


def test_embed_is_a_function_of_a_module():
    assert Domain(name="x", summary="", embed="os.path:join").load_embed()("a", "b") == "a/b"
    with pytest.raises(GraftError, match="'x' has no embed"):
        Domain(name="x", summary="").load_embed()


def test_a_baseline_is_a_function_of_a_module():
    assert DOMAINS["toy"].load_baseline("MostFrequent") is most_frequent


def test_an_unknown_baseline_is_refused_with_the_nearest():
    with pytest.raises(GraftError, match=r"baseline of domain toy 'MostFrequnt'\. Did you mean 'MostFrequent'"):
        DOMAINS["toy"].load_baseline("MostFrequnt")
    with pytest.raises(GraftError, match="'x' has no baselines"):
        Domain(name="x", summary="").load_baseline("MostFrequent")


def test_a_plugin_joins_the_built_in_domains(plugins):
    mine = Domain(name="mine", summary="")
    plugins(entry("mine", mine))
    assert with_plugins(DOMAINS) == {**DOMAINS, "mine": mine}
    assert list(DOMAINS) == ["toy"]


def test_a_plugin_that_is_no_domain_is_refused(plugins):
    plugins(entry("odd", object()))
    with pytest.raises(GraftError, match=r"'odd'.*is no common\.domain\.Domain"):
        with_plugins({})


def test_a_plugin_may_not_take_a_name_in_use(plugins):
    plugins(entry("other", Domain(name="toy", summary="")))
    with pytest.raises(GraftError, match="domain 'toy', a name that is taken"):
        with_plugins(DOMAINS)
