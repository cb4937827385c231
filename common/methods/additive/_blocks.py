"""Methods that act on the hidden state behind whole blocks, or stand beside all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from common.errors import GraftError
from common.methods._base import MethodSpec, Plan, exact, listed

if TYPE_CHECKING:
    from torch import nn

    from common.roles import RoleMap


def _channels(method: str, model: nn.Module, roles: RoleMap | None, blocks: list[int] | None) -> dict[str, int]:
    """Return the blocks to act on, in forward order, with the channels of their hidden states.

    Raises:
        GraftError: No family, one whose blocks hand on no hidden state, or numbers of blocks that there are not.
    """
    from common.tuners import matrix_shape

    if roles is None:
        raise GraftError(
            f"{method} acts on blocks, and {type(model).__name__} belongs to no family that Graft knows. Add a family "
            "(CONTRIBUTING.md), or choose a method that takes 'target_modules'."
        )
    ends = {name for name, role in roles.role_of.items() if role in ("attention_out", "ffn_out")}
    inside = {block: [name for name in ends if name.startswith(f"{block}.")] for block in roles.stream}
    channels = {block: matrix_shape(model.get_submodule(min(names)))[0] for block, names in inside.items() if names}
    if not channels:
        raise GraftError(
            f"{method} acts on the hidden states that blocks hand on, token by token, and Graft knows none of this "
            f"{roles.family} backbone. Choose another method."
        )
    if blocks is None:
        return channels
    wrong = [number for number in blocks if not 0 <= number < len(channels)]
    if wrong or not blocks:
        raise GraftError(
            f"{method} blocks {blocks}: this {roles.family} backbone has {len(channels)} that fit; give numbers from 0 "
            f"to {len(channels) - 1}."
        )
    return {name: size for i, (name, size) in enumerate(channels.items()) if i in blocks}


def _check_rank(what: str, size: int, channels: dict[str, int]) -> None:
    """Refuse a width that is none, or one that no block could use."""
    narrow = [f"{name} ({c})" for name, c in channels.items() if c < size]
    if size < 1 or narrow:
        raise GraftError(
            f"{what} is {size}; give a whole number from 1 to {min(channels.values())}, the fewest channels of a "
            f"block{f' ({listed(narrow)})' if narrow else ''}."
        )


@dataclass(frozen=True, kw_only=True)
class AdapterPlus(MethodSpec):
    """Bottlenecks behind whole blocks, scaled by channel: Adapter+ (Steitz and Roth 2024, arXiv 2406.06820).

    h + g * (U gelu(D h + b) + c), h (..., d) what a block hands on, behind its last skip connection: D of shape (r, d)
    and U of shape (d, r) with biases b and c, g one number a channel. g = 1, U = 0 and c = 0 at the start (the paper
    draws U near 0). Trainable parameters: 2 r d + r + 2 d for each block. The paper finds this place and the scale by
    channel better for vision transformers than Houlsby's places; its rank is 8, and 1 to 32 work. Refused where blocks
    hand on no tokens, as in convolutional networks. Cannot be merged.

    Args:
        rank: Width r of the bottleneck.
        blocks: Numbers of the blocks to act on, from 0; None takes all.
    """

    taxonomy: ClassVar[str] = "additive"
    summary: ClassVar[str] = "a bottleneck behind each block, scaled by channel"
    source: ClassVar[str] = "arXiv 2406.06820"
    sized_by: ClassVar[str] = "rank"

    rank: int = 8
    blocks: list[int] | None = None

    def plan(self, model: nn.Module, roles: RoleMap | None) -> Plan:
        """Take blocks that hand on hidden states; see the base class."""
        from common.tuners import PostAdapterConfig

        channels = _channels("AdapterPlus", model, roles, self.blocks)
        _check_rank("AdapterPlus rank", self.rank, channels)
        config = PostAdapterConfig(target_modules=exact(list(channels)), channels=channels, width=self.rank)
        return Plan(peft_config=config, targets=dict.fromkeys(channels, "block"))


@dataclass(frozen=True, kw_only=True)
class _Reft(MethodSpec):
    kind: ClassVar[Literal["loreft", "noreft", "direft"]]
    sized_by: ClassVar[str] = "rank"

    rank: int = 4
    blocks: list[int] | None = None
    first: int | None = None

    def plan(self, model: nn.Module, roles: RoleMap | None) -> Plan:
        """Take blocks that hand on hidden states; see the base class."""
        from common.tuners import ReftConfig

        name = type(self).__name__
        channels = _channels(name, model, roles, self.blocks)
        _check_rank(f"{name} rank", self.rank, channels)
        if self.first is not None and self.first < 1:
            raise GraftError(f"{name} first is {self.first}; give a number of tokens from 1, or leave it out for all.")
        config = ReftConfig(
            target_modules=exact(list(channels)),
            channels=channels,
            width=self.rank,
            kind=self.kind,
            first=self.first,
        )
        return Plan(peft_config=config, targets=dict.fromkeys(channels, "block"))


@dataclass(frozen=True, kw_only=True)
class LoReFT(_Reft):
    """Low-rank linear subspace representation fine-tuning (Wu et al. 2024, arXiv 2404.03592).

    h + R^T (W h + b - R h), h (..., d) what a block hands on: within the subspace that the r orthonormal rows of R
    span, the hidden state is replaced by W h + b. R and W have the shape (r, d), b (r,); at the start W = R and b = 0,
    so that nothing changes (the authors' code starts from a random W). Trainable parameters: 2 r d + r for each block.
    Very few parameters at a rank of 1 to 8 (the paper's range), best in some of the blocks and, on classification, at
    the first tokens only. Cannot be merged: it acts behind the skip connection.

    Args:
        rank: Rank r of the subspace.
        blocks: Numbers of the blocks to act on, from 0; None takes all.
        first: Edit so many tokens at the start of each sequence (a class token stands first); None edits all.
    """

    taxonomy: ClassVar[str] = "additive"
    summary: ClassVar[str] = "rewrite each block's output within a small subspace"
    source: ClassVar[str] = "arXiv 2404.03592"
    kind: ClassVar[Literal["loreft", "noreft", "direft"]] = "loreft"


@dataclass(frozen=True, kw_only=True)
class NoReFT(_Reft):
    """LoReFT without orthonormal rows (NoReFT, an ablation of Wu et al. 2024, arXiv 2404.03592).

    h + V^T (W h + b - V h), h (..., d) what a block hands on, with any V of shape (r, d); at the start W = V, whose
    rows are drawn orthonormal, and b = 0. Trainable parameters: 2 r d + r for each block. Cheaper than `LoReFT`, which
    computes an orthonormal basis in each step, and slightly worse in the paper. Cannot be merged.

    Args:
        rank: Rank r of the edit.
        blocks: Numbers of the blocks to act on, from 0; None takes all.
        first: Edit so many tokens at the start of each sequence; None edits all.
    """

    taxonomy: ClassVar[str] = "additive"
    summary: ClassVar[str] = "LoReFT without an orthonormal basis"
    source: ClassVar[str] = "arXiv 2404.03592"
    kind: ClassVar[Literal["loreft", "noreft", "direft"]] = "noreft"


@dataclass(frozen=True, kw_only=True)
class DiReFT(_Reft):
    """LoReFT that adds and takes nothing away (DiReFT, an ablation of Wu et al. 2024, arXiv 2404.03592).

    h + V^T (W h + b), h (..., d) what a block hands on: LoRA on hidden states. V and W have the shape (r, d), b (r,);
    at the start W = 0 and b = 0. Trainable parameters: 2 r d + r for each block. The fastest of the three, slightly
    worse than `LoReFT` in the paper. Cannot be merged: it acts behind the skip connection.

    Args:
        rank: Rank r of the edit.
        blocks: Numbers of the blocks to act on, from 0; None takes all.
        first: Edit so many tokens at the start of each sequence; None edits all.
    """

    taxonomy: ClassVar[str] = "additive"
    summary: ClassVar[str] = "a low-rank change of each block's output"
    source: ClassVar[str] = "arXiv 2404.03592"
    kind: ClassVar[Literal["loreft", "noreft", "direft"]] = "direft"


@dataclass(frozen=True, kw_only=True)
class LST(MethodSpec):
    """A ladder side network: gradients stay out of the backbone (Sung et al. 2022, arXiv 2206.06522).

    Beside the blocks' outputs f_1 ... f_n (..., d) runs a network of width w = d // reduction: with z_i = g_i (D_i f_i)
    + (1 - g_i) s_(i-1) and z_1 = D_1 f_1, its states are s_i = z_i + N_i gelu(M_i LN(z_i)), and the last block's output
    becomes f_n + U s_n. D_i has the shape (w, d), M_i (4 w, w), N_i (w, 4 w), U (d, w), all with biases; each gate g_i
    = sigmoid(a_i / 0.1) begins at one half. D_i = 0 and N_i = 0 at the start. The f_i are cut off from the graph, so no
    block keeps activations for a backward pass: training memory, not the number of parameters, is what it saves. The
    paper's side network is made of small transformer blocks that start from the backbone's pruned weights; here its
    steps act token by token and start from noise, since attention would need each family's masks. Its reduction is 8.
    Trainable parameters: w d + w + 2 w + 8 w^2 + 5 w for each block, one for each gate (all blocks but the first), and
    w d + d for U. Refused where the blocks differ in width or are no sequence, as in a Swin. In a network of an encoder
    and a decoder each has a ladder, and gradients pass the decoder. Cannot be merged.

    Args:
        reduction: By how much the side network is narrower than the backbone.
    """

    taxonomy: ClassVar[str] = "additive"
    summary: ClassVar[str] = "a narrow side network fed by all blocks, to save training memory"
    source: ClassVar[str] = "arXiv 2206.06522"
    recomputable: ClassVar[bool] = False  # a step needs the state of the one before, in another block

    reduction: int = 8

    def plan(self, model: nn.Module, roles: RoleMap | None) -> Plan:
        """Take all blocks; see the base class."""
        from common.tuners import LadderConfig

        channels = _channels("LST", model, roles, None)
        widths = sorted(set(channels.values()))
        if len(widths) > 1:
            raise GraftError(
                f"LST needs blocks of one width, and this backbone's have {', '.join(map(str, widths))} channels. "
                "Choose another method."
            )
        if not 1 <= self.reduction <= widths[0]:
            raise GraftError(f"LST reduction is {self.reduction}; give a whole number from 1 to {widths[0]}.")
        previous: dict[str, str | None] = {}
        for block in channels:
            before = next(reversed(previous), "")
            joined = before and before.rpartition(".")[0] == block.rpartition(".")[0]
            previous[block] = before if joined else None
        config = LadderConfig(
            target_modules=exact(list(channels)),
            channels=channels,
            width=widths[0] // self.reduction,
            previous=previous,
        )
        stacks = sum(before is None for before in previous.values())
        note = f"LST builds {stacks} ladders, one for each stack of blocks; gradients pass the stacks behind the first."
        return Plan(peft_config=config, targets=dict.fromkeys(channels, "block"), notes=(note,) if stacks > 1 else ())
