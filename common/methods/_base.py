"""What a method spec is, and what it hands to `attach`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from jsonargparse import set_parsing_settings

from common.errors import GraftError

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import Tensor, nn

    from common.roles import RoleMap

ModePolicy = Literal["frozen", "adapted", "full"]

# Classes of torch.nn, for `require_types`.
CONVOLUTIONS = ("Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a spec wants done to one backbone.

    Attributes:
        peft_config: The PEFT configuration to inject, or None where the method adds no tuner.
        targets: Module name to role of every module that the method acts on.
        mode: `frozen` keeps the whole backbone in eval mode and out of the graph; `adapted` trains with dropout on and
            the statistics of frozen norms fixed; `full` trains everything.
        quantise: Frozen linear layers to hold in fewer bits, name to `int8` or `nf4`, before anything is wrapped.
        looks: Methods that want to see training data before the first step (`MethodSpec.calibration`), each with the
            modules that it acts on: the planned one itself, or parts of a composed one.
        notes: What the user should know of how the settings were carried out, one sentence each.
    """

    peft_config: PeftConfig | None
    targets: Mapping[str, str]
    mode: ModePolicy = "adapted"
    quantise: Mapping[str, Literal["int8", "nf4"]] = field(default_factory=dict)
    looks: tuple[tuple[MethodSpec, tuple[str, ...]], ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What a method wants to see of the training data before the first step.

    Attributes:
        of: What is gathered of each target while the bare backbone runs in eval mode: `gradient`, the mean gradient of
            the task's loss with respect to its weight (in the weight's shape); `fisher`, the mean over single examples
            of that gradient squared; `output_energy`, the mean square of each output channel; `input_moment`, the mean
            of x x' over its inputs x (linear layers).
        batches: How many training batches are run, from the first on.
    """

    of: Literal["gradient", "fisher", "output_energy", "input_moment"]
    batches: int


@dataclass(frozen=True, kw_only=True)
class MethodSpec:
    """One PEFT method and its settings: the typed content of a recipe's `peft:` block.

    A spec is plain data; importing it needs no torch. `plan` is called once the backbone stands. `recomputable` says
    whether blocks may be computed anew in the backward pass, one at a time (gradient checkpointing).
    """

    taxonomy: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    source: ClassVar[str] = ""
    sized_by: ClassVar[str] = ""  # the setting that sizes the method, such as `rank`: more of it, more parameters
    recomputable: ClassVar[bool] = True
    needs_adapters: ClassVar[bool] = False  # whether it is built on adapters that other runs have exported

    def plan(self, model: nn.Module, roles: RoleMap | None) -> Plan:
        """Resolve the settings against one backbone.

        Args:
            model: The bare backbone.
            roles: Its roles, or None for an architecture without a family.
        """
        raise NotImplementedError

    @property
    def alone(self) -> str:
        """Why the method can be no part of a composed one; empty where it can."""
        return "" if self.recomputable else "it acts on all blocks together"

    def after_attach(self, model: nn.Module) -> None:
        """Change the model once it is wrapped, such as freeze a part of the adapter."""

    def rate_factor(self, name: str) -> float:
        """Return the factor on the learning rate of a trained parameter of the backbone, by its name."""
        return 1.0

    def penalty(self, model: nn.Module) -> Tensor | None:
        """Return a scalar to add to the training loss, or None."""

    def after_step(self, model: nn.Module, memory: dict[str, Tensor], step: int, steps: int) -> None:
        """Act behind an optimizer step, while its gradients stand.

        Args:
            model: The adapted backbone.
            memory: What the method keeps between steps; a checkpoint holds it, so that a run resumes exactly.
            step: Steps taken, this one included.
            steps: Steps of the whole fit.
        """

    @property
    def calibration(self) -> Calibration | None:
        """What the method wants to see of the training data before the first step; None where it needs no look.

        Its plan says so in `looks`. Without data a method must stand by itself: an adapter is attached to be loaded,
        too.
        """
        return None

    def calibrate(self, layers: Mapping[str, Any], seen: Mapping[str, Tensor]) -> None:
        """Set the fresh adapter by what `calibration` asked for.

        Args:
            layers: The adapted layers, by the target's name.
            seen: What was gathered, by the target's name.
        """

    def describe(self) -> dict[str, Any]:
        """Return the spec as the `class_path` / `init_args` mapping of a recipe."""
        return {"class_path": type(self).__name__, "init_args": dataclasses.asdict(self)}


@dataclass(frozen=True, kw_only=True)
class OnModules(MethodSpec):
    """A method that acts on chosen modules.

    Args:
        on: Roles or groups of roles (`attention`, `attention_q`, `ffn`, `conv`, `all`, ...); names are resolved per
            backbone family.
            `@` narrows one down to the first or last blocks that hold such modules (`attention@last:4`), or to a part
            that the family names (`attention@decoder`, `attention@decoder@last:2`).
        target_modules: Exact module names instead of roles, for an architecture that has no family.
    """

    takes_thirds: ClassVar[bool] = False  # whether it can act on the queries, keys or values of a fused module alone

    on: list[str] = field(default_factory=lambda: ["all"])
    target_modules: list[str] | None = None

    def select(self, model: nn.Module, roles: RoleMap | None) -> dict[str, str]:
        """Return the chosen modules, name to role (`custom` for names given by hand).

        Raises:
            GraftError: A name that the model has not, a role that matches nothing, or roles without a family.
        """
        if self.target_modules is not None:
            names = dict(model.named_modules())
            missing = [name for name in self.target_modules if name not in names]
            if missing:
                raise GraftError(
                    f"target_modules {missing} do not exist in {type(model).__name__}. Give exact names out of "
                    f"model.named_modules(), such as {list(names)[1:4]}."
                )
            return {name: (roles.role_of.get(name, "custom") if roles else "custom") for name in self.target_modules}
        if roles is None:
            raise GraftError(
                f"{type(model).__name__} belongs to no family that Graft knows, so 'on: {self.on}' cannot be resolved. "
                "Give 'target_modules' with exact module names, or add a family (CONTRIBUTING.md)."
            )
        if not self.takes_thirds and (fused := roles.thirds(self.on)):
            name = next(iter(fused))
            raise GraftError(
                f"{type(self).__name__} cannot act on the queries, keys or values of '{name}' alone, which computes "
                "all three. Choose attention_qkv with 'on', or LoRA."
            )
        return roles.select(self.on)

    def thirds(self, roles: RoleMap | None) -> dict[str, tuple[int, ...]]:
        """Return the chosen modules of which only queries, keys or values are wanted; see `RoleMap.thirds`."""
        return roles.thirds(self.on) if roles is not None and self.target_modules is None else {}


def require_types(method: str, model: nn.Module, names: Mapping[str, str], allowed: Sequence[str]) -> None:
    """Refuse modules that a method cannot act on, before anything is wrapped.

    Args:
        method: The method's name, for the message.
        model: The backbone.
        names: Chosen modules, name to role.
        allowed: Class names out of `torch.nn`; subclasses count.
    """
    from torch import nn as torch_nn

    types = tuple(getattr(torch_nn, name) for name in allowed)
    wrong = {name: model.get_submodule(name) for name in names}
    wrong = {name: module for name, module in wrong.items() if not isinstance(module, types)}
    if wrong:
        shown = [f"'{name}' ({type(module).__name__}, role {names[name]})" for name, module in wrong.items()]
        raise GraftError(
            f"{method} cannot act on {listed(shown, most=1)}; it takes {', '.join(allowed)}. Choose other roles with "
            "'on', or another method."
        )


def listed(names: Sequence[str], most: int = 3) -> str:
    """Word a list of names for a sentence, cut after the first few."""
    return ", ".join(names) if len(names) <= most else f"{', '.join(names[:most])} and {len(names) - most} more"


def exact(names: Sequence[str]) -> str:
    """Return a PEFT target pattern that matches these module names and no other.

    PEFT matches a *list* of names by suffix, so that 'norm' would also take 'patch_embed.norm'; a string is matched in
    full.
    """
    return "|".join(re.escape(name) for name in names)


# A recipe's `peft:` block names a subclass of this dataclass; jsonargparse has to be told that a dataclass is a base.
set_parsing_settings(subclasses_enabled=[MethodSpec])
