"""Splits are described by their ids, and by what they share: texts, or files byte for byte."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from common.split_data import SplitData


class Item(NamedTuple):
    id: str
    content: object


class Items(SplitData):
    def __init__(self, **splits):
        super().__init__()
        self._records = {name: tuple(splits.get(name, ())) for name in ("train", "val", "test")}

    def _content(self, record):
        return record.content


@pytest.fixture
def files(tmp_path):
    """Two equal files, one of their length, and one of another."""
    contents = {"a": b"12345", "same": b"12345", "near": b"12346", "far": b"1"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    return {name: tmp_path / name for name in contents}


def test_texts_that_two_splits_share_are_counted_once():
    data = Items(
        train=[Item("1", "MKT"), Item("2", "AAA"), Item("3", "AAA")],
        val=[Item("4", "CCC"), Item("5", "AAA")],
        test=[Item("6", "MKT"), Item("7", "AAA"), Item("8", "G")],
    )
    assert data.describe_splits()["shared"] == {"train-val": 1, "train-test": 2, "val-test": 1}


def test_files_are_compared_byte_for_byte(files):
    data = Items(
        train=[Item("1", files["a"]), Item("2", files["far"])],
        val=[Item("3", files["near"])],
        test=[Item("4", files["same"]), Item("5", files["near"].with_name("gone"))],
    )
    assert data.describe_splits()["shared"] == {"train-val": 0, "train-test": 1, "val-test": 0}


def test_the_digest_is_of_the_ids_in_any_order_and_of_each_split_alone():
    one = Items(train=[Item("1", None), Item("2", None)], test=[Item("3", None)]).describe_splits()
    two = Items(train=[Item("2", None), Item("1", None)], test=[Item("4", None)]).describe_splits()
    assert one["splits"].keys() == {"train", "test"}
    assert one["splits"]["train"] == two["splits"]["train"]
    assert one["splits"]["test"] != two["splits"]["test"]


def test_unknown_contents_share_nothing_that_is_known():
    assert Items(train=[Item("1", None)], test=[Item("2", None)]).describe_splits()["shared"] == {}
