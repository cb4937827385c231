"""Plain scalars of YAML 1.2, and errors that say where."""

from __future__ import annotations

import math

import pytest

from common._yaml import load_yaml
from common.errors import GraftError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("{on: yes, off: no}", {"on": "yes", "off": "no"}),
        ("[true, False, null, ~, Null]", [True, False, None, None, None]),
        ("[1e-3, 1.0e-3, 2., .5, 1E5, -3.5]", [1e-3, 1e-3, 2.0, 0.5, 1e5, -3.5]),
        ("[7, -7, +7, 010, 0o10, 0x1f]", [7, -7, 7, 10, 8, 31]),
        ("[.inf, -.inf]", [math.inf, -math.inf]),
        ("[2024-01-31, 1:30, 0.1.1, '1', \"on\"]", ["2024-01-31", "1:30", "0.1.1", "1", "on"]),
        ("{a: &x {p: 1}, b: {<<: *x, q: 2}}", {"a": {"p": 1}, "b": {"p": 1, "q": 2}}),
        ("a:\nb:", {"a": None, "b": None}),
        ("", None),
    ],
)
def test_values(tmp_path, text, value):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    assert load_yaml(path) == value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3.*'a' is given twice"),
        ("a: [1\nb: 2\n", "line 2.*not valid YAML"),
        ("a: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
    ],
)
def test_errors_name_file_and_line(tmp_path, text, words):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(GraftError, match=words) as error:
        load_yaml(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_unreadable_files_are_the_users_error(tmp_path):
    with pytest.raises(GraftError, match="Cannot read"):
        load_yaml(tmp_path / "none.yaml")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(GraftError, match="UTF-8"):
        load_yaml(tmp_path / "b.yaml")
