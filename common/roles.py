"""Roles: what the modules of a backbone are, so that a user says `attention` and never `blocks.3.attn.qkv`.

A `Family` maps each role to name patterns *and* the module types that may carry it. `resolve` returns the exact module
names of one model; nothing is ever matched by a substring or a suffix.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from common.errors import GraftError, unknown

ROLES = (
    "stem",
    "attention_qkv",
    "attention_out",
    "ffn_in",
    "ffn_out",
    "conv",
    "recurrent",
    "norm",
    "embed",
    "head",
)
GROUPS: Mapping[str, tuple[str, ...]] = {
    "attention": ("attention_qkv", "attention_out"),
    "ffn": ("ffn_in", "ffn_out"),
    "all": ("attention_qkv", "attention_out", "ffn_in", "ffn_out", "conv", "recurrent"),
}

NORMS: tuple[type[nn.Module], ...] = (
    nn.LayerNorm,
    nn.GroupNorm,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.RMSNorm,
)


def has_affine(module: nn.Module) -> bool:
    """Whether a norm has a weight of its own to train (an affine-free norm has none)."""
    return isinstance(getattr(module, "weight", None), nn.Parameter)


@dataclass(frozen=True)
class Pattern:
    """Which modules carry a role: a full-match pattern on the name, allowed types, and a further condition."""

    name: str
    types: tuple[type[nn.Module], ...]
    where: Callable[[nn.Module], bool] = field(default=lambda module: True)

    def matches(self, name: str, module: nn.Module) -> bool:
        """Whether the module of this full name carries the role."""
        return re.fullmatch(self.name, name) is not None and isinstance(module, self.types) and self.where(module)


@dataclass(frozen=True, kw_only=True)
class Family:
    """A backbone family: its roles, and the name pattern of its blocks in forward order."""

    name: str
    roles: Mapping[str, tuple[Pattern, ...]]
    block: str

    def __post_init__(self) -> None:
        for role in self.roles:
            if role not in ROLES:
                raise unknown("role", role, ROLES)


@dataclass(frozen=True, kw_only=True)
class RoleMap:
    """The roles of one model.

    Attributes:
        family: Name of the family.
        role_of: Module name to role, in the model's order.
        blocks: Names of the blocks, first to last.
    """

    family: str
    role_of: Mapping[str, str]
    blocks: tuple[str, ...]

    def count(self) -> dict[str, int]:
        """Return how many modules carry each role."""
        counts = dict.fromkeys(ROLES, 0)
        for role in self.role_of.values():
            counts[role] += 1
        return {role: count for role, count in counts.items() if count}

    def select(self, on: Sequence[str]) -> dict[str, str]:
        """Return the modules that carry the wanted roles or groups.

        Args:
            on: Roles (`ffn_in`) or groups (`attention`, `ffn`, `all`). `all` takes every role that a weight adapter can
                act on and never the head, the norms, the stem or an embedding.

        Returns:
            Module name to role, in the model's order.

        Raises:
            GraftError: An unknown role, or one that matches no module of this model.
        """
        if not on:
            raise GraftError(f"'on' is empty; give at least one of: {', '.join(self._offer())}.")
        wanted: set[str] = set()
        present = set(self.role_of.values())
        for item in on:
            if item not in ROLES and item not in GROUPS:
                raise unknown("role", item, (*ROLES, *GROUPS))
            roles = set(GROUPS.get(item, (item,)))
            if not roles & present:
                raise GraftError(
                    f"Role '{item}' matches no module of this {self.family} backbone. "
                    f"Roles it has: {', '.join(self._offer())}. Change 'on'."
                )
            wanted |= roles
        return {name: role for name, role in self.role_of.items() if role in wanted}

    def _offer(self) -> list[str]:
        counts = self.count()
        groups = [group for group, roles in GROUPS.items() if any(role in counts for role in roles)]
        return [*groups, *(f"{role} ({number})" for role, number in counts.items())]


def resolve(model: nn.Module, family: Family) -> RoleMap:
    """Find the role of every module of a model, by name and type.

    A norm without parameters of its own is left out, since nothing in it can be trained. Blocks are ordered as they
    stand in the model.

    Raises:
        GraftError: The family's patterns match nothing in this model, or give one module two roles.
    """
    role_of: dict[str, str] = {}
    blocks: list[str] = []
    for name, module in model.named_modules():
        if not name:
            continue
        if re.fullmatch(family.block, name):
            blocks.append(name)
        roles = [role for role, patterns in family.roles.items() if any(p.matches(name, module) for p in patterns)]
        if len(roles) > 1:
            raise GraftError(f"Module '{name}' carries two roles ({', '.join(roles)}) in family '{family.name}'.")
        if roles and not (roles[0] == "norm" and not has_affine(module)):
            role_of[name] = roles[0]
    if not role_of:
        raise GraftError(
            f"Family '{family.name}' matches no module of {type(model).__name__}. "
            "Choose the family that this architecture belongs to, or give 'target_modules'."
        )
    return RoleMap(family=family.name, role_of=role_of, blocks=tuple(blocks))
