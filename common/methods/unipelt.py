"""UniPELT: three methods in each block, each behind a gate of its own."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, cast

from common.errors import GraftError
from common.methods._base import MethodSpec, Plan, exact, listed, require_types
from common.methods.hybrid import configs_of, joined

if TYPE_CHECKING:
    from torch import nn

    from common.roles import RoleMap, TokenStream

_OF = ["attention_q", "attention_v"]


@dataclass(frozen=True, kw_only=True)
class UniPELT(MethodSpec):
    """LoRA, prefixes and bottleneck adapters, each behind a gate (Mao et al. 2021, arXiv 2110.07577).

    In each block of d channels, queries and values become W x + g B A x, each with an A (rank, d) and a B (d, rank) = 0
    of its own; attention becomes softmax(Q [g P_K, K]^T s) [g P_V, V], with n trained keys and values near zero (see
    `PrefixTuning`); and behind the feed-forward network h becomes h + g (U relu(D h + b) + c), U = 0 and c = 0 at the
    start (see `Pfeiffer`). Each g is another gate, one number an example: the mean over its tokens t of
    sigmoid(w . t + a), with w near zero and a = 0 at the start, so that all begin half open.

    Where the paper leaves room it is done as in the authors' code: queries and values have a gate each, which takes the
    place of LoRA's scale alpha / rank, and one gate serves keys and values. A gate reads what its part reads: the
    input of the projection (behind a norm that comes before it), what the attention module is given (before the norm,
    where the module holds it), and h. Other than there, padding does not count in the mean where the attention has a
    mask, so that an example's result does not depend on its batch; and keys and values are trained directly, without
    the perceptron that computes them. Only blocks in which every token attends to all others are taken, of Whisper the
    encoder's: in a decoder the mean would tell a token of later ones.

    Trainable parameters: 2 rank (d + d) + 2 n c + 2 w d + w + d + 4 (d + 1) for each block, c the channels of all
    heads. Defaults of the paper: rank 8, n = 10, w = 48 at d = 768. For few data, or where nobody knows which of the
    three suits; it costs the time of all three and cannot be merged, and its prefixes are no identity at the start.

    Args:
        rank: Rank of the change of queries and values.
        length: Number n of keys and values.
        width: Width w of the bottlenecks.
    """

    taxonomy: ClassVar[str] = "hybrid"
    summary: ClassVar[str] = "LoRA, prefixes and bottlenecks, each behind a gate"
    source: ClassVar[str] = "arXiv 2110.07577"
    sized_by: ClassVar[str] = "width"

    rank: int = 8
    length: int = 10
    width: int = 48

    def plan(self, model: nn.Module, roles: RoleMap | None) -> Plan:
        """Plan the three parts in the blocks that tokens run through; see the base class."""
        from common.methods.additive import Pfeiffer
        from common.methods.prompts import PrefixTuning
        from common.tuners import BottleneckConfig, GatedLoraConfig, PrefixConfig, UniPeltConfig, matrix_shape

        if self.rank < 1:
            raise GraftError(f"UniPELT rank is {self.rank}; give a whole number of at least 1.")
        prefixes = PrefixTuning(length=self.length).plan(model, roles)  # which refuses what attends to nothing
        roles = cast("RoleMap", roles)
        blocks = _blocks(model, roles, tuple(prefixes.targets))
        attentions = [block.attention for block in blocks]
        changed = {name: "attention_qkv" for block in blocks for name in block.projections}
        require_types("UniPELT", model, changed, ("Linear",))
        bottlenecks = Pfeiffer(target_modules=[block.ffn_out for block in blocks], width=self.width).plan(model, roles)
        require_types("UniPELT", model, bottlenecks.targets, ("Linear",))
        shapes = {name: matrix_shape(model.get_submodule(name)) for name in changed}
        thirds = {name: list(some) for name, some in roles.thirds(_OF).items() if name in changed}
        lora = GatedLoraConfig(target_modules=exact(list(changed)), r=self.rank, thirds=thirds)
        prefix, bottleneck = configs_of("UniPELT", [("PrefixTuning", prefixes), ("Pfeiffer", bottlenecks)])
        prefix = dataclasses.replace(
            cast("PrefixConfig", prefix),
            target_modules=exact(attentions),
            token_widths={block.attention: shapes[block.projections[0]][1] for block in blocks},
            mask=cast("TokenStream", roles.tokens).key_mask,
        )
        bottleneck = dataclasses.replace(cast("BottleneckConfig", bottleneck), input_gate=True)
        plans = [
            ("LoRA", Plan(peft_config=lora, targets=changed, notes=self._lowered(shapes, thirds))),
            ("PrefixTuning", Plan(peft_config=prefix, targets=dict.fromkeys(attentions, "attention"))),
            ("Pfeiffer", dataclasses.replace(bottlenecks, peft_config=bottleneck)),
        ]
        attention_of = {name: block.attention for block in blocks for name in (*block.projections, block.ffn_out)}
        config = UniPeltConfig(parts=configs_of("UniPELT", plans), attention_of=attention_of)  # ty: ignore[invalid-argument-type]
        return joined("UniPELT", plans, config)

    def _lowered(self, shapes: dict[str, tuple[int, int]], thirds: dict[str, list[int]]) -> tuple[str, ...]:
        """Say in which layers the rank is their own size."""
        sizes = {name: min(rows // (3 if name in thirds else 1), columns) for name, (rows, columns) in shapes.items()}
        low = [f"{name} ({size})" for name, size in sizes.items() if size < self.rank]
        note = f"Rank {self.rank} is lowered to the layer's own size in {len(low)} layers: {listed(low)}."
        return (note,) if low else ()


@dataclass(frozen=True)
class _Block:
    """Full names of a block's attention, of those of its projections that compute queries or values, of its end."""

    attention: str
    projections: tuple[str, ...]
    ffn_out: str


def _blocks(model: nn.Module, roles: RoleMap, attentions: tuple[str, ...]) -> list[_Block]:
    """Find the parts of the blocks that tokens run through.

    Raises:
        GraftError: A block without queries and values in its attention, or with several attentions or networks.
    """
    stream = cast("TokenStream", roles.tokens)
    chosen = roles.select(_OF)
    found = []
    for block in (name for name, _ in model.named_modules() if re.fullmatch(stream.blocks, name)):
        own = _inside(block, attentions)
        ends = _inside(block, tuple(name for name, role in roles.role_of.items() if role == "ffn_out"))
        projections = _inside(own[0], tuple(chosen)) if own else ()
        if len(own) != 1 or len(ends) != 1 or not projections:
            raise GraftError(
                f"UniPELT cannot act on this {roles.family} backbone: '{block}' holds {len(own)} attentions, "
                f"{len(projections)} layers that compute its queries and values, and {len(ends)} that end a "
                "feed-forward network, and it needs one of each. Choose another method, such as LoRA."
            )
        found.append(_Block(attention=own[0], projections=projections, ffn_out=ends[0]))
    return found


def _inside(outer: str, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in names if f"{name}.".startswith(f"{outer}."))
