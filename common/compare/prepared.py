"""What a study trains once, before its trials: an adapter that methods start from, named in a study file.

    prepare:
      domain:                                        # a name of your own
        recipe: configs/protein/adapt_peptides.yaml
        peft: {class_path: LoRA}                     # optional, as lr, overrides and seed are
        lr: 1.0e-3
        seed: 0
    methods:
      Stack: {peft: {class_path: Stack, init_args: {first: "${prepared:domain}", then: {class_path: LoRA}}}, lr: 1.0e-3}

It is fitted and exported by the commands that a person would give, into `RUNS/prepared/NAME` and its folder `adapter`,
which stands wherever a method's `peft` or `overrides` say `${prepared:NAME}`. It has one seed (0, if it says none),
whatever the seeds of the study are: all trials start from the same adapter, and their spread is that of the second
training alone. `overrides` of the study are for the trials and not for it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common._digest import file_digest

FOLDER, ADAPTER = "prepared", "adapter"
PREFIX = "prepared:"
_REFERENCE = re.compile(r"\$\{([^{}]*)\}")


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """An adapter to fit and export before the trials.

    Attributes:
        name: Its name in the study file.
        recipe: The path of its recipe.
        method: The name of its method.
        seed: Its one seed.
        folder: Its run folder.
        options: The command line of the fit, without the run folder.
    """

    name: str
    recipe: str
    method: str
    seed: int
    folder: Path
    options: tuple[str, ...]

    @property
    def adapter(self) -> Path:
        """The folder that `graft export` writes; it appears whole or not at all."""
        return self.folder / ADAPTER

    @property
    def fit(self) -> tuple[str, ...]:
        """The arguments of the command that fits it."""
        return (*self.options, "--run", str(self.folder))

    @property
    def export(self) -> tuple[str, ...]:
        """The arguments of the command that exports it."""
        return ("export", str(self.folder), str(self.adapter))

    @property
    def stated(self) -> tuple[str, ...]:
        """What it is told by; see `Trial.stated`."""
        return self.options

    @property
    def prepared(self) -> tuple[Preparation, ...]:
        """What it starts from itself, which is nothing."""
        return ()


def references(value: object) -> list[str]:
    """Find what stands in `${...}` in a setting, at any depth, each text once."""
    found: dict[str, None] = {}

    def note(text: str) -> str:
        found[text] = None
        return text

    _mapped(value, note)
    return list(found)


def placed(value: Any, preparations: Mapping[str, Preparation]) -> Any:  # noqa: ANN401
    """Return a setting with adapters' folders where it refers to them, at any depth."""
    return _mapped(value, lambda text: str(preparations[text.removeprefix(PREFIX)].adapter))


def adapter_digest(run: Path) -> str:
    """Digest the tensors of a preparation's adapter; "" where it was not exported."""
    files = sorted((run / ADAPTER).glob("*.safetensors"))
    lines = [f"{path.name} {file_digest(path)}\n" for path in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest() if files else ""


def option_words(overrides: Mapping[str, Any]) -> list[str]:
    """Word options as a command line takes them."""
    words: list[str] = []
    for key, value in overrides.items():
        text = value if isinstance(value, str) else json.dumps(value)
        # A value that starts with a dash would be read as an option of its own.
        words += [f"--{key}={text}"] if text.startswith("-") else [f"--{key}", text]
    return words


def _mapped(value: Any, put: Callable[[str], str]) -> Any:  # noqa: ANN401
    if isinstance(value, Mapping):
        return {key: _mapped(one, put) for key, one in value.items()}
    if isinstance(value, list):
        return [_mapped(one, put) for one in value]
    return _REFERENCE.sub(lambda match: put(match[1]), value) if isinstance(value, str) else value
