"""Roles: what the modules of a backbone are, so that a user says `attention` and never `blocks.3.attn.qkv`.

A `Family` maps each role to name patterns *and* the module types that may carry it. `resolve` returns the exact module
names of one model; nothing is ever matched by a substring or a suffix. A role may be narrowed down to blocks by depth,
`attention@last:4`, or to a part of the backbone, `attention@decoder`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from common.errors import GraftError, suggest, unknown

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
# What an `attention_qkv` module computes: one of them, or a fused module all, each in a third of its outputs.
SHARES = ("attention_q", "attention_k", "attention_v")

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
class TokenStream:
    """How the blocks of a family take their tokens: what a method needs that adds tokens, or keys to attend to.

    A block is called with its tokens (B, T, C) first and returns as many, alone or first in a tuple. Every token
    attends to every other that is no padding.

    Attributes:
        blocks: Pattern (matched in full) of the names of the blocks through which the tokens run.
        attention: The self-attention modules, each of which calls torch's `scaled_dot_product_attention` once.
        mask: Name and place (0 is the first argument behind the tokens) of a block's mask of the keys, (B, T) or
            (B, 1, T or 1, T), True or 0 where a token is seen; None where blocks take none.
        key_mask: Name of an attention module's argument with that mask, where it takes one.
        rotary: Name of a block's argument with the rotary positions, and their form: `pair`, cosines and sines of the
            positions 0, 1, ... (..., T, D) each; `cat`, sines and cosines side by side (..., T, 2 D) for the last T
            tokens.
        biased: Whether attention adds a bias of its own to the scores of T tokens.
        fixed: Why a block can take no further token; empty where it can.
        alone: Why attention can take no further key; empty where it can.
    """

    blocks: str
    attention: Pattern | None = None
    mask: tuple[str, int] | None = None
    key_mask: str = "attention_mask"
    rotary: tuple[str, Literal["pair", "cat"]] | None = None
    biased: bool = False
    fixed: str = ""
    alone: str = ""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """How the tokens that a layer reads lie in an image or volume.

    Attributes:
        sides: Positions along each axis, in the order in which the tokens stand; zeros where the tokens keep these
            axes, (B, *sides, C), and any size will do.
        prefix: Tokens before them that belong to no position (class and register tokens).
    """

    sides: tuple[int, ...]
    prefix: int = 0


@dataclass(frozen=True, kw_only=True)
class Family:
    """A backbone family: its roles, and the name pattern of its blocks in forward order.

    Attributes:
        name: Name for messages and model cards.
        roles: Role to the patterns of the modules that carry it.
        block: Pattern (matched in full) of the names of its blocks.
        parts: Parts that a user may choose, such as `encoder`, each with the pattern (matched in full) of the name of
            the module that holds it.
        tokens: How its blocks take tokens, or why they take none.
        stream: Pattern (matched in full) of the names of the blocks that put out the hidden state (..., C) that the
            next one reads, alone or first in a tuple; None where there are none.
        grid: Says of a model and one of its layers how the tokens that the layer reads lie in an image, or None where
            they are in no order of one (windows); None for a family of other inputs.
        projections: Pattern (matched in full) of the names of the `attention_qkv` modules that compute queries, keys or
            values alone, by `SHARES`.
        fused: Pattern of those that compute all three, in thirds of their outputs.
    """

    name: str
    roles: Mapping[str, tuple[Pattern, ...]]
    block: str
    parts: Mapping[str, str] = field(default_factory=dict)
    tokens: TokenStream | str = "nothing is said of how its blocks take tokens"
    stream: str | None = None
    grid: Callable[[nn.Module, str], Grid | None] | None = None
    projections: Mapping[str, str] = field(default_factory=dict)
    fused: str = ""

    def __post_init__(self) -> None:
        for part in self.parts:
            if not part.isidentifier():
                raise GraftError(f"Part '{part}' of family '{self.name}' needs a name of letters, digits and '_'.")
        for role in self.roles:
            if role not in ROLES:
                raise unknown("role", role, ROLES)

    def shares(self, name: str) -> tuple[str, ...]:
        """Return which of queries, keys and values an `attention_qkv` module computes; nothing where it is not said."""
        if re.fullmatch(self.fused, name):
            return SHARES
        return tuple(share for share, pattern in self.projections.items() if re.fullmatch(pattern, name))


@dataclass(frozen=True, kw_only=True)
class RoleMap:
    """The roles of one model.

    Attributes:
        family: Name of the family.
        role_of: Module name to role, in the model's order.
        blocks: Names of the blocks, first to last.
        parts: Part to the names of the modules that hold it, for the parts that this model has.
        tokens: How its blocks take tokens, or why they take none.
        stream: Those of the blocks that put out the hidden state; see `Family.stream`.
        grid_of: The layer's name to its grid of tokens; see `Family.grid`.
        shares: Name of each `attention_qkv` module to what it computes of `SHARES`.
    """

    family: str
    role_of: Mapping[str, str]
    blocks: tuple[str, ...]
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    tokens: TokenStream | str = ""
    stream: tuple[str, ...] = ()
    grid_of: Callable[[str], Grid | None] = field(default=lambda name: None)
    shares: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

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
                act on and never the head, the norms, the stem or an embedding. `attention_q`, `attention_k` and
                `attention_v` take the modules that compute queries, keys or values, fused ones too (see `thirds`). Each
                may be narrowed down by `@first:N` or `@last:N`, the first or last N of the blocks that hold such
                modules, and by `@PART`, a part that the family names. Narrowings apply from left to right:
                `attention@decoder@last:2`.

        Returns:
            Module name to role, in the model's order.

        Raises:
            GraftError: An unknown role or part, one that matches no module of this model, or more blocks than there
                are.
        """
        if not on:
            raise GraftError(f"'on' is empty; give at least one of: {', '.join(self._offer())}.")
        wanted: set[str] = set()
        for item in on:
            role, *narrowings = item.split("@")
            wanted.update(self.narrow(item, self._carrying(role), narrowings))
        return {name: role for name, role in self.role_of.items() if name in wanted}

    def thirds(self, on: Sequence[str]) -> dict[str, tuple[int, ...]]:
        """Return the fused modules of which only queries, keys or values are wanted.

        Args:
            on: As in `select`.

        Returns:
            Module name to the wanted thirds of its outputs, of 0, 1, 2; a module that is wanted as a whole is left out.
        """
        wanted: dict[str, set[int]] = {}
        for item in on:
            role, *narrowings = item.split("@")
            thirds = {SHARES.index(role)} if role in SHARES else {0, 1, 2}
            for name in self.narrow(item, self._carrying(role), narrowings):
                if self.shares.get(name) == SHARES:
                    wanted[name] = wanted.get(name, set()) | thirds
        return {name: tuple(sorted(thirds)) for name, thirds in wanted.items() if len(thirds) < len(SHARES)}

    def _carrying(self, item: str) -> list[str]:
        """Return the modules that carry a role or a role of a group."""
        if item not in ROLES and item not in GROUPS and item not in SHARES:
            raise unknown("role", item, (*ROLES, *GROUPS, *SHARES))
        roles = GROUPS.get(item, (item,))
        names = [name for name, role in self.role_of.items() if role in roles or item in self.shares.get(name, ())]
        if not names:
            raise GraftError(
                f"Role '{item}' matches no module of this {self.family} backbone. "
                f"Roles it has: {', '.join(self._offer())}. Change 'on'."
            )
        return names

    def narrow(self, item: str, names: list[str], narrowings: Sequence[str]) -> list[str]:
        """Narrow modules down, step by step.

        Args:
            item: What was asked for, for the message.
            names: Modules to choose from.
            narrowings: `first:N`, `last:N` or parts, from left to right; see `select`.

        Raises:
            GraftError: An unknown part, one that holds none of the modules, or more blocks than there are.
        """
        for how in narrowings:
            end, _, number = how.partition(":")
            if how in self.parts:
                names = _within(names, self.parts[how])
                if not names:
                    raise GraftError(
                        f"'{item}' matches no module of this {self.family} backbone: nothing of the role is left in "
                        f"its {how}. Change 'on'."
                    )
            elif end in ("first", "last"):
                blocks = [block for block in self.blocks if _within(names, [block])]
                names = _within(names, self._ends(item, blocks, end, number))
            else:
                offer = suggest(how, ["first:N", "last:N", *self.parts])
                raise GraftError(f"'{item}' asks for '{how}' of this {self.family} backbone.{offer}")
        return names

    def _ends(self, item: str, blocks: list[str], end: str, number: str) -> list[str]:
        """Return the wanted number of blocks, from the first on or up to the last."""
        if not blocks:
            raise GraftError(
                f"'{item}' asks for the {end} blocks, but no block of this {self.family} backbone holds such modules. "
                f"Leave '@{end}:{number}' out."
            )
        if not re.fullmatch("[0-9]+", number) or not 1 <= int(number) <= len(blocks):
            raise GraftError(
                f"'{item}' asks for the {end} '{number}' blocks, and {len(blocks)} blocks of this {self.family} "
                f"backbone hold such modules; give a whole number from 1 to {len(blocks)}, as in '{end}:1'."
            )
        return blocks[: int(number)] if end == "first" else blocks[-int(number) :]

    def _offer(self) -> list[str]:
        counts = self.count()
        groups = [group for group, roles in GROUPS.items() if any(role in counts for role in roles)]
        return [*groups, *(f"{role} ({number})" for role, number in counts.items())]


def resolve(model: nn.Module, family: Family) -> RoleMap:
    """Find the role of every module of a model, by name and type.

    A norm without parameters of its own is left out, since nothing in it can be trained. Blocks are ordered as they
    stand in the model; parts that it has not are left out.

    Raises:
        GraftError: The family's patterns match nothing in this model, or give one module two roles.
    """
    role_of: dict[str, str] = {}
    blocks: list[str] = []
    parts: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if not name:
            continue
        if re.fullmatch(family.block, name):
            blocks.append(name)
        for part in (part for part, pattern in family.parts.items() if re.fullmatch(pattern, name)):
            parts.setdefault(part, []).append(name)
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
    return RoleMap(
        family=family.name,
        role_of=role_of,
        blocks=tuple(blocks),
        parts={part: tuple(names) for part, names in parts.items()},
        tokens=family.tokens,
        stream=tuple(name for name in blocks if family.stream and re.fullmatch(family.stream, name)),
        grid_of=(lambda name: None) if family.grid is None else functools.partial(family.grid, model),
        shares={name: family.shares(name) for name, role in role_of.items() if role == "attention_qkv"},
    )


def _within(names: Iterable[str], outer: Iterable[str]) -> list[str]:
    """Return the names of the modules that are among these outer ones or lie in them."""
    prefixes = tuple(f"{name}." for name in outer)
    return [name for name in names if f"{name}.".startswith(prefixes)]
