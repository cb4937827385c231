"""Prompts: trained tokens, keys and values that a frozen token encoder attends to."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from common.errors import GraftError
from common.methods._base import MethodSpec, Plan, exact

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn

    from common.roles import RoleMap, TokenStream


@dataclass(frozen=True, kw_only=True)
class _Prompts(MethodSpec):
    taxonomy: ClassVar[str] = "prompts"
    sized_by: ClassVar[str] = "length"

    length: int = 10

    def stream(self, model: nn.Module, roles: RoleMap | None) -> tuple[TokenStream, RoleMap]:
        """Return how the backbone's blocks take tokens, and its roles.

        Raises:
            GraftError: They take none, no family says how, or the length is no number of tokens.
        """
        name = type(self).__name__
        if self.length < 1:
            raise GraftError(f"{name} length is {self.length}; give a whole number of at least 1.")
        if roles is None:
            raise GraftError(
                f"{name} needs to know how the blocks of {type(model).__name__} take tokens, and it belongs to no "
                "family that Graft knows. Choose another method, or add a family (CONTRIBUTING.md)."
            )
        if isinstance(roles.tokens, str):
            raise GraftError(f"{name} cannot act on this {roles.family} backbone: {roles.tokens}. {_OTHER}")
        return roles.tokens, roles


@dataclass(frozen=True, kw_only=True)
class _PromptTokens(_Prompts):
    deep: ClassVar[bool]

    dropout: float = 0.0

    def plan(self, model: nn.Module, roles: RoleMap | None) -> Plan:
        """Take the blocks through which tokens run; see the base class."""
        name = type(self).__name__
        stream, roles = self.stream(model, roles)
        if not 0.0 <= self.dropout < 1.0:
            raise GraftError(f"{name} dropout is {self.dropout}; give a share in [0, 1).")
        if stream.fixed:
            raise GraftError(f"{name} cannot act on this {roles.family} backbone: {stream.fixed}. {_OTHER_OR_PREFIX}")
        found = [block for block, _ in model.named_modules() if re.fullmatch(stream.blocks, block)]
        blocks = self.choose(found, roles)
        config = self._config(stream, blocks, _channels(model, roles, blocks[0], name, inputs=False))
        return Plan(peft_config=config, targets=dict.fromkeys(blocks, "block"))

    def choose(self, blocks: list[str], roles: RoleMap) -> list[str]:
        """Choose among the blocks; all of them here."""
        return blocks

    def bound(self, width: int) -> float:
        """Return the bound within which prompts of `width` channels start."""
        from common.tuners import uniform_bound

        return uniform_bound(width)

    def _config(self, stream: TokenStream, blocks: list[str], width: int) -> PeftConfig:
        from common.tuners import PromptTokensConfig

        return PromptTokensConfig(
            target_modules=exact(blocks),
            length=self.length,
            width=width,
            deep=self.deep,
            dropout=self.dropout,
            bound=self.bound(width),
            blocks=blocks,
            mask=None if stream.mask is None else list(stream.mask),
            rotary=None if stream.rotary is None else list(stream.rotary),
            biased=stream.biased,
        )


@dataclass(frozen=True, kw_only=True)
class VPTShallow(_PromptTokens):
    """Visual prompt tuning with prompts at the input (VPT-shallow; Jia et al. 2022, arXiv 2203.12119).

    n trained tokens P of shape (n, d) run beside the network's own through all of its blocks, [x', z'] = f([x, z]) with
    z = P in front of the first block; behind the last one they are dropped, so that the head sees the tokens that it
    always sees. They start uniformly within sqrt(3 / d), which is the paper's bound for ViT-B/16, and are no identity
    at the start. Trainable parameters: n d. The paper chooses n for each task, and its runs drop 0.1 of the prompts.
    For vision transformers, and here for any encoder whose blocks attend to all tokens; with few examples, where even a
    small adapter overfits. VPTDeep is the stronger one in the paper. Try far higher learning rates than for LoRA.
    Attention costs time and memory for n tokens more; nothing can be merged.

    Args:
        length: Number n of prompts.
        dropout: Share of the prompts' values that training drops.
    """

    summary: ClassVar[str] = "trained tokens beside the network's own"
    source: ClassVar[str] = "arXiv 2203.12119"
    deep: ClassVar[bool] = False

    length: int = 50
    dropout: float = 0.1


@dataclass(frozen=True, kw_only=True)
class VPTDeep(_PromptTokens):
    """Visual prompt tuning with prompts of its own in every block (VPT-deep; Jia et al. 2022, arXiv 2203.12119).

    Block i runs as [x', z'] = f([x, P_i]) with n trained tokens P_i of shape (n, d), and z' is dropped: each block's
    own tokens attend to prompts that its projections read like any token. They start uniformly within sqrt(3 / d),
    which is the paper's bound for ViT-B/16, and are no identity at the start. Trainable parameters: n d for each block.
    The paper chooses n for each task, and its runs drop 0.1 of the prompts. For vision transformers, and here for any
    encoder whose blocks attend to all tokens. Try far higher learning rates than for LoRA. Attention costs time and
    memory for n tokens more; nothing can be merged.

    Args:
        length: Number n of prompts a block.
        dropout: Share of the prompts' values that training drops.
        blocks: `all`, or some by depth: `first:4`, `last:4`. The paper finds the first ones to matter more.
    """

    summary: ClassVar[str] = "trained tokens of its own in each block"
    source: ClassVar[str] = "arXiv 2203.12119"
    deep: ClassVar[bool] = True

    dropout: float = 0.1
    blocks: str = "all"

    def choose(self, blocks: list[str], roles: RoleMap) -> list[str]:
        """Choose blocks by depth."""
        return _narrowed(self.blocks, blocks, roles)


@dataclass(frozen=True, kw_only=True)
class PromptTuning(_PromptTokens):
    """Prompt tuning of a sequence encoder's embeddings (Lester et al. 2021, arXiv 2104.08691).

    n trained vectors P of shape (n, d) stand before the embedded sequence, [P, E], and run through all blocks with it;
    of the output the last part is kept. It is `VPTShallow` by another name and start: P is drawn uniformly from -0.5 to
    0.5, without drop-out, as in the paper's runs without words to start from. In a network of rotary positions they
    stand at -n to -1, as in a prepended sequence. Trainable parameters: n d. The paper takes n = 100 with T5, and 20
    loses little. For large language models of proteins; small networks gain more by LoRA. Nothing can be merged.

    Args:
        length: Number n of prompts.
        dropout: Share of the prompts' values that training drops.
    """

    summary: ClassVar[str] = "trained vectors before the embedded sequence"
    source: ClassVar[str] = "arXiv 2104.08691"
    deep: ClassVar[bool] = False

    length: int = 20

    def bound(self, width: int) -> float:
        """Return the paper's bound."""
        return 0.5


@dataclass(frozen=True, kw_only=True)
class PrefixTuning(_Prompts):
    """Prefix tuning: trained keys and values in self-attention (Li and Liang 2021, arXiv 2101.00190).

    Each self-attention reads n further keys and values, softmax(Q [P_K, K]^T s) [P_V, V], with P_K and P_V of shape
    (n, c), c the channels of all heads; masks, relative biases and the rotation of keys hold for the network's own keys
    alone. They start near zero, which already takes weight off the own keys, so it is no identity at the start. With
    `gate` it is one, as in the LLaMA-Adapter (arXiv 2303.16199): softmax(Q K^T s) V + tanh(g) softmax(Q P_K^T s) P_V
    with one g = 0 a layer. Trainable parameters: 2 n c for each attention, + 1 with `gate`. The paper trains P as the
    output of a perceptron, which is left out here, and takes n = 10 for short tasks and 200 for long ones. For encoders
    and decoders, where the attention should look for something new; nothing can be merged.

    Args:
        length: Number n of keys and values.
        gate: Attend to them apart, behind a gate that starts closed.
        blocks: `all`, or some by depth or part: `last:4`, `encoder`, `decoder@last:2`.
    """

    summary: ClassVar[str] = "trained keys and values in self-attention"
    source: ClassVar[str] = "arXiv 2101.00190"

    gate: bool = False
    blocks: str = "all"

    def plan(self, model: nn.Module, roles: RoleMap | None) -> Plan:
        """Take the self-attention modules; see the base class."""
        from common.tuners import PrefixConfig

        stream, roles = self.stream(model, roles)
        names = [n for n, m in model.named_modules() if stream.attention and stream.attention.matches(n, m)]
        if stream.alone or not names:
            reason = stream.alone or "no attention of it calls torch's scaled_dot_product_attention"
            raise GraftError(f"PrefixTuning cannot act on this {roles.family} backbone: {reason}. {_OTHER}")
        names = _narrowed(self.blocks, names, roles)
        widths = {name: _channels(model, roles, name, "PrefixTuning", inputs=True) for name in names}
        config = PrefixConfig(target_modules=exact(names), length=self.length, widths=widths, gate=self.gate)
        return Plan(peft_config=config, targets=dict.fromkeys(names, "attention"))


_OTHER = "Choose another method, such as LoRA."
_OTHER_OR_PREFIX = "Choose another method, such as PrefixTuning or LoRA."


def _narrowed(wanted: str, names: list[str], roles: RoleMap) -> list[str]:
    return names if wanted == "all" else roles.narrow(f"blocks: {wanted}", names, wanted.split("@"))


def _channels(model: nn.Module, roles: RoleMap, outer: str, method: str, *, inputs: bool) -> int:
    """Return the width of what the last projection of attention in a module reads (`inputs`) or writes.

    Raises:
        GraftError: The module holds none.
    """
    from common.tuners import matrix_shape

    for name, role in roles.role_of.items():
        if role == "attention_out" and name.startswith(f"{outer}."):
            return matrix_shape(model.get_submodule(name))[1 if inputs else 0]
    raise GraftError(
        f"{method} cannot act on this {roles.family} backbone: '{outer}' holds no attention_out, by which the width of "
        f"its tokens is known. {_OTHER}"
    )
