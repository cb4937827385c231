"""Reading YAML as version 1.2 of the language means it.

PyYAML follows version 1.1, where the plain words `on`, `off`, `yes` and `no` are booleans, `1e-3` is text and
`2024-01-31` is a date. Recipes use `on` as a key and write learning rates as `1e-3`, so plain scalars are resolved here
by the core schema of YAML 1.2 (https://yaml.org/spec/1.2.2/#103-core-schema). Keys given twice are refused: PyYAML
would keep the last one and say nothing.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from common.errors import GraftError


class Loader(yaml.SafeLoader):
    """A `SafeLoader` with the plain scalars of YAML 1.2 and without repeated keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Build a mapping, refusing a key that is written twice."""
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise ConstructorError(None, None, f"the key '{key.value}' is given twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep=deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """Build an integer: decimal (`010` is ten), `0o` octal or `0x` hexadecimal."""
        text = str(self.construct_scalar(node))
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


Loader.yaml_implicit_resolvers = {}  # none of version 1.1's
Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_yaml_int)
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+0123456789."),
    ),
    ("merge", r"<<", ["<"]),
):
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)


def load_yaml(path: Path) -> Any:  # noqa: ANN401 (a YAML file can hold anything)
    """Read one YAML file.

    Args:
        path: The file, in UTF-8.

    Returns:
        What the file holds: mappings, lists, text, numbers, booleans or None.

    Raises:
        GraftError: If the file cannot be read, is not YAML, or gives a key twice.
    """
    try:
        # The loader is a SafeLoader: it builds plain data and runs nothing.
        return yaml.load(path.read_text(encoding="utf-8"), Loader=Loader)
    except OSError as error:
        raise GraftError(f"Cannot read '{path}': {error.strerror}. Give the path of a YAML file.") from error
    except UnicodeDecodeError as error:
        raise GraftError(f"'{path}' is not text in UTF-8. Give the path of a YAML file.") from error
    except yaml.MarkedYAMLError as error:
        where = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise GraftError(f"'{path}'{where} is not valid YAML: {error.problem}.") from error
    except yaml.YAMLError as error:
        raise GraftError(f"'{path}' is not valid YAML: {' '.join(str(error).split())}") from error
