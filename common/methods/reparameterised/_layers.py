"""What the reparameterised methods share: who runs a layer, PEFT's own tuner or Graft's, and settings that must fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from common.errors import GraftError
from common.methods._base import CONVOLUTIONS, OnModules, Plan, exact, listed, require_types

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn

    from common.roles import RoleMap

# Rows (outputs) and columns (inputs / groups times kernel positions) of a weight read as a matrix.
Shape = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class OnLinear(OnModules):
    """A method on linear layers, in PEFT's own tuner."""

    acts_on: ClassVar[tuple[str, ...]] = ("Linear",)

    def plan(self, model: nn.Module, roles: RoleMap | None) -> Plan:
        """Take Linear layers; see the base class."""
        self.check()
        targets = self.select(model, roles)
        require_types(type(self).__name__, model, targets, self.acts_on)
        self.check_layers({name: model.get_submodule(name) for name in targets})
        config, notes = self.configure(exact(list(targets)), _shapes(model, targets))
        return Plan(peft_config=config, targets=targets, notes=notes)

    def check(self) -> None:
        """Refuse settings out of range."""

    def check_layers(self, layers: Mapping[str, nn.Module]) -> None:
        """Refuse layers that the method cannot act on though their type is right."""

    def configure(self, target: str, shapes: Mapping[str, Shape]) -> tuple[PeftConfig, tuple[str, ...]]:
        """Return PEFT's configuration and notes for the user.

        Args:
            target: Pattern of the modules to adapt.
            shapes: Name to shape of their weights.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class WeightChange(OnModules):
    """A structured change of the weight: PEFT's own tuner on linear layers, Graft's where a target is none or misfits.

    PEFT's tuners of this kind lack most convolutions, or drop their padding mode, or cannot merge into them.
    """

    acts_on: ClassVar[tuple[str, ...]] = ("Linear", *CONVOLUTIONS)

    def plan(self, model: nn.Module, roles: RoleMap | None) -> Plan:
        """Take Linear and convolution layers; see the base class."""
        from torch import nn as torch_nn

        from common.tuners import WeightFormConfig

        self.check()
        method, targets = type(self).__name__, self.select(model, roles)
        require_types(method, model, targets, self.acts_on)
        reasons = {}
        for name, shape in _shapes(model, targets).items():
            self.check_shape(name, shape)
            layer = model.get_submodule(name)
            reason = self.misfit(shape) if isinstance(layer, torch_nn.Linear) else type(layer).__name__
            if reason:
                reasons[name] = reason
        if not reasons:
            note = f"{method} runs in PEFT's own tuner."
            return Plan(peft_config=self.engine(exact(list(targets))), targets=targets, notes=(note,))
        form, settings = self.form()
        config = WeightFormConfig(target_modules=exact(list(targets)), form=form, settings=settings)
        shown = listed([f"{name} ({reason})" for name, reason in reasons.items()])
        note = f"{method} runs in Graft's own tuner, since PEFT's cannot do {len(reasons)} of {len(targets)} layers: "
        return Plan(peft_config=config, targets=targets, notes=(f"{note}{shown}.",))

    def check(self) -> None:
        """Refuse settings out of range."""

    def check_shape(self, name: str, shape: Shape) -> None:
        """Refuse a layer that no setting lowered would fit."""

    def misfit(self, shape: Shape) -> str:
        """Say why PEFT's tuner cannot take a linear layer of this shape, or nothing where it can."""
        return ""

    def engine(self, target: str) -> PeftConfig:
        """Return PEFT's configuration for the modules of this pattern."""
        raise NotImplementedError

    def form(self) -> tuple[str, dict[str, Any]]:
        """Return name and settings of the change in Graft's own tuner (`common/tuners/_forms.py`)."""
        raise NotImplementedError


def _shapes(model: nn.Module, names: Iterable[str]) -> dict[str, Shape]:
    from common.tuners import matrix_shape

    return {name: matrix_shape(model.get_submodule(name)) for name in names}


def at_least(least: int, method: str, **values: int) -> None:
    """Refuse whole numbers below the least that makes sense.

    Raises:
        GraftError: The first such setting, by name.
    """
    for name, value in values.items():
        if value < least:
            raise GraftError(f"{method} {name} is {value}; give a whole number of at least {least}.")


def in_unit(method: str, **values: float) -> None:
    """Refuse shares outside of [0, 1).

    Raises:
        GraftError: The first such setting, by name.
    """
    for name, value in values.items():
        if not 0.0 <= value < 1.0:
            raise GraftError(f"{method} {name} is {value}; give a share in [0, 1).")


def fitting(wanted: int, sizes: Iterable[int]) -> int:
    """Return the greatest number up to the wanted one that divides all sizes."""
    distinct = set(sizes)
    return next(number for number in range(wanted, 0, -1) if all(size % number == 0 for size in distinct))


def say_fitted(what: str, wanted: int, taken: int) -> tuple[str, ...]:
    """Word that a setting was lowered to one that fits all layers, or nothing where it was not."""
    if taken == wanted:
        return ()
    return (f"{what} {wanted} is lowered to {taken}, the next that divides the sizes of all chosen layers.",)
