"""What a domain hands to the core: names and where to import them from, so that listing needs no torch."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from common.errors import GraftError, unknown

ENTRY_POINTS = "graft.domains"


@dataclass(frozen=True, kw_only=True)
class Domain:
    """One domain.

    Attributes:
        name: Its name, which is also its folder's.
        summary: One line.
        tasks: Public class name to `package.module` of its Lightning modules (subclasses of `AdaptedTask`).
        data: Public class name to `package.module` of its datamodules.
        predict: `package.module:function` that runs an exported adapter on the user's files; it is called with the
            loaded task, the files, `out` (the CSV or folder to write, where the user names one) and `skip_bad`, and
            returns a line that sums up.
        embed: `package.module:function` that writes the features of the user's files; it is called with the loaded task
            or the name of a bare backbone, the files, `out` (the file to write, where the user names one), `residues`
            (one vector a residue or sample, rather than one an input) and `skip_bad`, and returns a line that sums up.
        baselines: Public name to `package.module:function` of its predictors that are not trained. The function is
            called with the task (its facts known, nothing else built) and the set-up datamodule, and returns a
            predictor: a function of a batch that returns what the task's `infer` would.
        specimens: Title to `package.module:function` of tiny networks of the domain's kinds, on which `graft matrix`
            tries every method; the function takes nothing and returns a `common.matrix.Specimen`.
    """

    name: str
    summary: str
    tasks: Mapping[str, str] = field(default_factory=dict)
    data: Mapping[str, str] = field(default_factory=dict)
    predict: str = ""
    embed: str = ""
    baselines: Mapping[str, str] = field(default_factory=dict)
    specimens: Mapping[str, str] = field(default_factory=dict)

    def load_task(self, name: str) -> type[Any]:
        """Import one of the domain's tasks by its public name.

        Raises:
            GraftError: The domain has no such task.
        """
        if name not in self.tasks:
            raise unknown(f"task of domain {self.name}", name, self.tasks)
        return getattr(importlib.import_module(self.tasks[name]), name)

    @property
    def modules(self) -> list[str]:
        """The names of the modules that its tasks and datamodules are in."""
        return sorted({*self.tasks.values(), *self.data.values()})

    def load_all(self) -> None:
        """Import every task and datamodule, so that a recipe can name them without their module."""
        for module in self.modules:
            importlib.import_module(module)

    def load_predict(self) -> Callable[..., Any]:
        """Import the function that predicts on the user's files.

        Raises:
            GraftError: The domain predicts nothing.
        """
        if not self.predict:
            raise GraftError(f"Domain '{self.name}' has no predict. Use the Python API.")
        return _function(self.predict)

    def load_embed(self) -> Callable[..., Any]:
        """Import the function that writes features of the user's files.

        Raises:
            GraftError: The domain embeds nothing.
        """
        if not self.embed:
            raise GraftError(f"Domain '{self.name}' has no embed. Use the Python API.")
        return _function(self.embed)

    def load_baseline(self, name: str) -> Callable[..., Any]:
        """Import one of the domain's baselines by its public name.

        Raises:
            GraftError: The domain has no such baseline.
        """
        if not self.baselines:
            raise GraftError(f"Domain '{self.name}' has no baselines. `graft list baselines` names those of others.")
        if name not in self.baselines:
            raise unknown(f"baseline of domain {self.name}", name, self.baselines)
        return _function(self.baselines[name])


def _function(place: str) -> Callable[..., Any]:
    """Import a function that is given as `package.module:function`."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def with_plugins(builtin: Mapping[str, Domain]) -> dict[str, Domain]:
    """Add the domains that installed packages offer under the entry-point group `graft.domains`.

    Raises:
        GraftError: An entry point that is not a `Domain`, or whose name is taken.
    """
    from importlib.metadata import entry_points

    domains = dict(builtin)
    for entry in entry_points(group=ENTRY_POINTS):
        domain = entry.load()
        if not isinstance(domain, Domain):
            raise GraftError(f"Entry point '{entry.name}' of group {ENTRY_POINTS} is no common.domain.Domain.")
        if domain.name in domains:
            raise GraftError(f"Entry point '{entry.name}' offers domain '{domain.name}', a name that is taken.")
        domains[domain.name] = domain
    return domains
