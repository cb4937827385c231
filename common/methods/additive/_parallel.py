"""Bottlenecks beside whole sub-layers: from the input of an attention or feed-forward network to its output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from common.errors import GraftError
from common.methods._base import OnModules, Plan, exact, listed

if TYPE_CHECKING:
    from torch import nn

    from common.roles import RoleMap

_ENDS = {"attention_qkv": "attention_out", "ffn_in": "ffn_out"}
# The last parts of the name of the layer that computes queries: alone it reads what an attention puts out positions
# for, where keys and values are of another sequence.
_QUERY = ("qkv", "q_proj", "query", "q", "query.proj")


def sub_layers(roles: RoleMap) -> dict[str, list[str]]:
    """Find the layers of each attention and each feed-forward network that read its input.

    A block that holds several of a kind, such as the attentions of a decoder, keeps each in a module of its own.

    Returns:
        Name of the layer that puts out a sub-layer's result to the names of those before it, the one that reads what
        the sub-layer is asked for first; in the model's order.
    """
    held: dict[tuple[str, str], list[str]] = {}
    for name, role in roles.role_of.items():
        held.setdefault((_block(name, roles), role), []).append(name)
    found: dict[str, list[str]] = {}
    for (block, role), outs in held.items():
        reading = [n for begins, ends in _ENDS.items() if ends == role for n in held.get((block, begins), [])]
        for out in outs if reading else []:
            inside = [n for n in reading if len(outs) == 1 or n.rpartition(".")[0] == out.rpartition(".")[0]]
            asked = [n for n in inside if role == "ffn_out" or any(f".{n}".endswith(f".{last}") for last in _QUERY)]
            if asked:
                found[out] = [asked[0], *(n for n in inside if n != asked[0])]
    return {name: found[name] for name in roles.role_of if name in found}


def _block(name: str, roles: RoleMap) -> str:
    return next((block for block in roles.blocks if name.startswith(f"{block}.")), "")


def grids_of(method: str, reads: Mapping[str, str], roles: RoleMap | None) -> dict[str, list[int]]:
    """Return the grids in which tokens lie, as prefix tokens and positions along each axis, by layer.

    Args:
        method: The method's name, for the message.
        reads: Name of a layer to the one whose input is meant.
        roles: The backbone's roles, or None without a family.

    Raises:
        GraftError: There is no grid at some of the layers.
    """
    grids = {name: roles.grid_of(read) if roles else None for name, read in reads.items()}
    without = [name for name, grid in grids.items() if grid is None]
    if without:
        raise GraftError(
            f"{method} needs the grid in which the tokens lie, and Graft knows none at {listed(without)} of "
            f"{f'this {roles.family} backbone' if roles else 'an architecture without a family'}. Choose other "
            "roles with 'on', or another method."
        )
    return {name: [grid.prefix, *grid.sides] for name, grid in grids.items() if grid is not None}


@dataclass(frozen=True, kw_only=True)
class _Parallel(OnModules):
    activation: ClassVar[Literal["gelu", "relu"]]
    sized_by: ClassVar[str] = "width"

    width: int = 64
    scale: float = 1.0

    def plan(self, model: nn.Module, roles: RoleMap | None) -> Plan:
        """Take whole attentions and feed-forward networks; see the base class."""
        from common.tuners import ParallelConfig

        if self.width < 1:
            raise GraftError(f"{type(self).__name__} width is {self.width}; give a whole number of at least 1.")
        pairs, targets = self._pairs(model, roles)
        config = ParallelConfig(
            target_modules=exact(list(dict.fromkeys((*pairs.values(), *pairs)))),
            pairs=dict(pairs),
            width=self.width,
            scale=self.scale,
            activation=self.activation,
            grids=self._grids(pairs, roles),
        )
        return Plan(peft_config=config, targets=targets)

    def _grids(self, pairs: Mapping[str, str], roles: RoleMap | None) -> dict[str, list[int]] | None:
        """Return the grid of the tokens at each sub-layer, for a method that looks at neighbours."""
        return None

    def _pairs(self, model: nn.Module, roles: RoleMap | None) -> tuple[dict[str, str], dict[str, str]]:
        """Return the chosen sub-layers as `sub_layers` does, and the layers behind which they end with their roles."""
        name, chosen = type(self).__name__, self.select(model, roles)
        if self.target_modules is not None:
            given = list(zip(self.target_modules[::2], self.target_modules[1::2], strict=False))
            if len(self.target_modules) % 2 or len(set(self.target_modules)) < len(self.target_modules):
                raise GraftError(
                    f"{name} target_modules {self.target_modules} are no pairs. Give for each sub-layer the layer that "
                    "reads its input, then the one that puts out its result."
                )
            pairs = {puts_out: reads for reads, puts_out in given}
        else:
            known = sub_layers(roles) if roles else {}
            inside = {name: out for out, names in known.items() for name in (out, *names)}
            left = [f"'{n}' ({role})" for n, role in chosen.items() if n not in inside]
            if left:
                raise GraftError(
                    f"{name} stands beside a whole attention or feed-forward network, and {listed(left)} is in none "
                    "whose beginning and end Graft knows. Choose 'attention' or 'ffn' with 'on', or another method."
                )
            wanted = {inside[n] for n in chosen}
            pairs = {out: names[0] for out, names in known.items() if out in wanted}
        self._check_types(model, pairs)
        return pairs, {out: chosen.get(out, roles.role_of[out] if roles else "custom") for out in pairs}

    def _check_types(self, model: nn.Module, pairs: Mapping[str, str]) -> None:
        """Refuse sub-layers whose ends see more than one position at a time."""
        from common.tuners import parallel_fits

        for puts_out, reads in pairs.items():
            both = model.get_submodule(reads), model.get_submodule(puts_out)
            if not parallel_fits(*both):
                raise GraftError(
                    f"{type(self).__name__} cannot act between '{reads}' ({type(both[0]).__name__}) and '{puts_out}' "
                    f"({type(both[1]).__name__}); it takes two Linear layers, or two convolutions of kernel and stride "
                    "1. Choose other roles with 'on', or another method."
                )


@dataclass(frozen=True, kw_only=True)
class ParallelAdapter(_Parallel):
    """Bottlenecks beside attention or feed-forward networks (He et al. 2021, arXiv 2110.04366).

    y = f(x) + s * (U relu(D x + b) + c): f a block's whole attention or feed-forward network, x (..., d) what it reads
    (behind the block's norm, where that comes first) and y what the skip connection adds: D of shape (w, d), U of shape
    (d, w), U = 0 and c = 0 at the start. Trainable parameters: 2 w d + w + d for each sub-layer. The paper finds it
    better beside the feed-forward network (the default) than beside attention, and better than a bottleneck behind it
    (Houlsby); its scale is 4 and its width 512 where d is 1024. Cannot be merged.

    Args:
        on: `ffn`, `attention` or both, narrowed down with `@` as everywhere; any layer of one stands for the whole.
        target_modules: Exact names in pairs instead of roles: the layer that reads a sub-layer's input, then the one
            that puts out its result.
        width: Width w of the bottleneck.
        scale: The factor s.
    """

    taxonomy: ClassVar[str] = "additive"
    summary: ClassVar[str] = "a scaled bottleneck beside each feed-forward network"
    source: ClassVar[str] = "arXiv 2110.04366"
    activation: ClassVar[Literal["gelu", "relu"]] = "relu"

    on: list[str] = field(default_factory=lambda: ["ffn"])
    scale: float = 4.0


@dataclass(frozen=True, kw_only=True)
class AdaptFormer(_Parallel):
    """Bottlenecks beside the feed-forward networks of vision transformers (Chen et al. 2022, arXiv 2205.13535).

    y = f(x) + s * (U relu(D x + b) + c): f a block's whole feed-forward network and x = LN(h) (..., d) what it reads,
    with the block's own, frozen norm where that comes first: D of shape (w, d), U of shape (d, w), U = 0 and c = 0
    at the start. Trainable parameters: 2 w d + w + d for each block. Defaults of the paper: w = 64, s = 0.1.
    The form of `ParallelAdapter` with the small scale that images want; for a vision transformer or a ConvNeXt. Cannot
    be merged.

    Args:
        on: Roles of the sub-layers; any layer of one stands for the whole.
        target_modules: Exact names in pairs instead of roles: the layer that reads a sub-layer's input, then the one
            that puts out its result.
        width: Width w of the bottleneck.
        scale: The factor s.
    """

    taxonomy: ClassVar[str] = "additive"
    summary: ClassVar[str] = "a bottleneck beside each feed-forward network, for images"
    source: ClassVar[str] = "arXiv 2205.13535"
    activation: ClassVar[Literal["gelu", "relu"]] = "relu"

    on: list[str] = field(default_factory=lambda: ["ffn"])
    scale: float = 0.1


@dataclass(frozen=True, kw_only=True)
class Convpass(_Parallel):
    """Convolutional bypasses over the patches of a vision transformer (Jie and Deng 2022, arXiv 2207.07039).

    y = f(x) + s * (U gelu(K * gelu(D x + b) + k) + c): f a block's whole attention or feed-forward network, x (B, N, d)
    what it reads, D of shape (w, d), K a convolution of kernel 3 over the grid in which the patches lie, from w to w
    channels, U of shape (d, w), U = 0 and c = 0 and K the identity at the start. A class or register token is an image
    of one patch. Trainable parameters for each sub-layer with a grid of n axes: 2 w d + w + d + 3^n w^2 + w. Gives a
    transformer the neighbourhood that few images cannot teach it; w = 8 as in the paper, which chooses s of 0.01 to
    100. Refused where tokens lie in no grid, as those of proteins and speech, and beside attention in windows. Cannot
    be merged.

    Args:
        on: `attention`, `ffn` or both; any layer of one stands for the whole.
        target_modules: Exact names in pairs instead of roles: the layer that reads a sub-layer's input, then the one
            that puts out its result.
        width: Width w of the bypass.
        scale: The factor s.
    """

    taxonomy: ClassVar[str] = "additive"
    summary: ClassVar[str] = "a convolution over the patches beside each sub-layer"
    source: ClassVar[str] = "arXiv 2207.07039"
    activation: ClassVar[Literal["gelu", "relu"]] = "gelu"

    on: list[str] = field(default_factory=lambda: ["attention", "ffn"])
    width: int = 8

    def _grids(self, pairs: Mapping[str, str], roles: RoleMap | None) -> dict[str, list[int]]:
        return grids_of("Convpass", pairs, roles)
