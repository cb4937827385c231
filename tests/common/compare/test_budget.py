"""Methods at budgets: the blocks and names that they get, and which words on the command line are understood."""

from __future__ import annotations

import pytest

from common.compare.budget import at_budgets, parse_budgets
from common.compare.study import Method
from common.errors import GraftError


def method(**peft):
    return Method(name="Low", peft=peft, lrs=(1e-3,), lr_options=("model.optim.lr",), overrides={"a": 1})


def test_a_method_becomes_one_for_each_budget():
    lora = {"class_path": "LoRA", "init_args": {"on": ["all"]}}
    small, large = at_budgets(method(**lora), (0.003, 0.01))
    assert (small.name, large.name) == ("Low-0.3percent", "Low-1percent")
    assert small.peft == {"class_path": "AtBudget", "init_args": {"method": lora, "share": 0.003}}
    assert large.peft["init_args"]["share"] == 0.01
    assert (small.lrs, small.overrides) == ((1e-3,), {"a": 1})


def test_without_budgets_a_method_is_as_it_was():
    assert at_budgets(method(class_path="LoRA"), ()) == [method(class_path="LoRA")]


@pytest.mark.parametrize("path", ["AtBudget", "common.methods.AtBudget"])
def test_a_sized_method_takes_another_share_and_keeps_the_rest(path):
    inner = {"method": {"class_path": "LoRA"}, "tolerance": 0.9}
    (one,) = at_budgets(method(class_path=path, init_args={**inner, "share": 0.5}), (0.02,))
    assert one.peft == {"class_path": "AtBudget", "init_args": {**inner, "share": 0.02}}


def test_percentages_are_read():
    assert parse_budgets("0.3%, 1 %") == (0.003, 0.01)


@pytest.mark.parametrize("text", ["", "0.003", "1%,", "0%", "100%", "1%,1%", "-1%", "much"])
def test_other_words_are_refused(text):
    with pytest.raises(GraftError, match=r"as 0\.3%,1%"):
        parse_budgets(text)
