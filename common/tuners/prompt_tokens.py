"""Trained tokens beside a network's own, in the blocks of any token encoder, as a PEFT tuner (arXiv 2203.12119).

Each block gets the prompts behind its own tokens and gives back its own tokens alone, so that whatever stands between
and behind the blocks, heads and positions included, sees as many tokens as ever.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from common.errors import GraftError
from common.tuners._base import OwnConfig, OwnLayer, OwnTuner, like

PROMPT_TOKENS = "PROMPT_TOKENS"

# Under this name the tokens that a block gives back carry what the block made of the prompts.
_ALONG = "_prompts_along"


@dataclass
class PromptTokensConfig(OwnConfig):
    """Configuration of the tuner.

    Args:
        length: Number of prompts.
        width: Channels of a token.
        deep: New prompts in every block; otherwise the first block's go along to the last.
        dropout: Share of the prompts' values that training drops.
        bound: The prompts start uniformly within plus and minus this.
        blocks: Full names of the blocks, first to last.
        mask: Name and place (0 is the first argument behind the tokens) of the blocks' mask of keys, or None.
        rotary: Name of the blocks' argument with rotary positions and its form, `pair` or `cat`, or None.
        biased: Whether attention adds a bias of its own to the scores.
    """

    own_type: ClassVar[str] = PROMPT_TOKENS

    length: int = 10
    width: int = 1
    deep: bool = True
    dropout: float = 0.0
    bound: float = 0.1
    blocks: list[str] = field(default_factory=list)
    mask: list[Any] | None = None
    rotary: list[str] | None = None
    biased: bool = False


class PromptTokensLayer(OwnLayer):
    """[y, z] = f([x, p]) of a block f: x (B, T, C) its tokens, p (length, C) the prompts of every example; y goes on.

    Deep prompts are the block's own, and z is dropped. Otherwise only the first block has prompts; z goes along with y
    to the next block, where it takes their place, and the last one drops it.

    Prompts have no place in the sequence, but for rotary positions of the form `pair`: there they stand before it, at
    -length to -1. A relative bias is zero to and from them. All tokens see them, and they do not see padding.
    """

    adapter_layer_names: tuple[str, ...] = ("tprompt_tokens",)
    other_param_names: tuple[str, ...] = ("settings",)

    def build(self) -> None:
        """Make the containers."""
        self.tprompt_tokens = nn.ParameterDict()
        self.settings: dict[str, _Settings] = {}

    def start(self, adapter_name: str, config: PromptTokensConfig, key: str) -> None:
        """Add the prompts of a block that has some of its own."""
        place = config.blocks.index(key)
        self.settings[adapter_name] = _Settings(
            length=config.length,
            dropout=config.dropout,
            mask=None if config.mask is None else (config.mask[0], config.mask[1]),
            rotary=None if config.rotary is None else (config.rotary[0], config.rotary[1]),
            biased=config.biased,
            hands_on=not config.deep and place < len(config.blocks) - 1,
        )
        if config.deep or not place:
            weight = next(self.get_base_layer().parameters())
            prompts = torch.empty(config.length, config.width, **like(weight)).uniform_(-config.bound, config.bound)
            self.tprompt_tokens[adapter_name] = nn.Parameter(prompts)

    def _get_available_adapters(self) -> set[str]:
        return set(self.settings)  # a block without prompts of its own takes part too

    def adapted(self, adapter_name: str, x: Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Run the block on its tokens and the prompts."""
        settings, count = self.settings[adapter_name], x.shape[1]
        prompts = self._prompts(adapter_name, x)
        args, kwargs = settings.widen(count, args, kwargs)
        tokens = torch.cat((x, prompts), dim=1)
        if settings.biased:
            with _BiasWidened(settings.length):
                out = self.base_layer(tokens, *args, **kwargs)
        else:
            out = self.base_layer(tokens, *args, **kwargs)
        hidden: Tensor = out[0] if isinstance(out, tuple) else out
        own = hidden[:, :count].contiguous()
        if settings.hands_on:
            setattr(own, _ALONG, hidden[:, count:])
        return (own, *out[1:]) if isinstance(out, tuple) else own

    def _prompts(self, adapter_name: str, x: Tensor) -> Tensor:
        """Return this block's prompts (B, length, C), or those that came along with its tokens."""
        if adapter_name in self.tprompt_tokens:
            prompts = self.tprompt_tokens[adapter_name].to(x.dtype).expand(len(x), -1, -1)
            return functional.dropout(prompts, self.settings[adapter_name].dropout, self.training)
        prompts = getattr(x, _ALONG, None)
        if prompts is None:
            raise GraftError(
                "The network changes its tokens between two blocks, so that prompts cannot go along from the first to "
                "the last. Choose prompts for each block, VPTDeep."
            )
        return prompts

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        """Refuse: a token is no change of a weight."""
        raise NotImplementedError(
            "its prompts run through the blocks as tokens and are no change of their weights; use the adapter as it is"
        )

    def unmerge(self) -> None:
        """Do nothing: it is never merged."""


@dataclass(frozen=True)
class _Settings:
    """How a block is run with prompts; see `PromptTokensConfig`."""

    length: int
    dropout: float
    mask: tuple[str, int] | None
    rotary: tuple[str, str] | None
    biased: bool
    hands_on: bool

    def widen(
        self, count: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return a block's further arguments, made for `count` tokens, for these and the prompts."""
        if self.mask is not None:
            name, place = self.mask
            if name in kwargs:
                kwargs = kwargs | {name: _widen_mask(kwargs[name], count, self.length)}
            elif place < len(args):
                args = (*args[:place], _widen_mask(args[place], count, self.length), *args[place + 1 :])
        if self.rotary is not None and kwargs.get(self.rotary[0]) is not None:
            name, form = self.rotary
            widen = _before if form == "pair" else _unrotated
            kwargs = kwargs | {name: widen(kwargs[name], self.length)}
        return args, kwargs


def _widen_mask(mask: Tensor | None, count: int, length: int) -> Tensor | None:
    """Let every token see the prompts, and the prompts what every token sees."""
    if mask is None:
        return None
    if mask.ndim > 2 and mask.shape[-2] == count:
        mask = torch.cat((mask, mask[..., :1, :].expand(*mask.shape[:-2], length, -1)), dim=-2)
    seen = 0.0 if mask.is_floating_point() else 1
    return functional.pad(mask, (0, length), value=seen)


def _before(positions: tuple[Tensor, Tensor], length: int) -> tuple[Tensor, Tensor]:
    """Add the positions -length to -1 to cosines and sines (..., T, D) of the positions 0 to T - 1.

    Position 1 holds the angles of a single step, which are no larger than one.
    """
    cosines, sines = positions
    if cosines.shape[-2] < 2:
        raise GraftError("Prompts with rotary positions need at least two tokens, start and stop included.")
    step = torch.atan2(sines[..., 1:2, :].double(), cosines[..., 1:2, :].double())
    angles = step * torch.arange(-length, 0, device=step.device, dtype=step.dtype).unsqueeze(1)
    return (
        torch.cat((cosines, angles.cos().to(cosines.dtype)), dim=-2),
        torch.cat((sines, angles.sin().to(sines.dtype)), dim=-2),
    )


def _unrotated(positions: Tensor, length: int) -> Tensor:
    """Add angles of zero to sines and cosines side by side (..., T, 2 D)."""
    sines, cosines = positions.new_zeros(()), positions.new_ones(())
    half = positions.shape[-1] // 2
    row = torch.cat((sines.expand(half), cosines.expand(half)))
    return torch.cat((positions, row.expand(*positions.shape[:-2], length, -1)), dim=-2)


class _BiasWidened(TorchFunctionMode):
    """Widens the bias that an attention adds to the scores of its own tokens by zeros for the prompts."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            bias, tokens = kwargs.get("attn_mask"), args[0].shape[-2]
            if bias is not None and bias.shape[-2:] == (tokens - self.length,) * 2:
                kwargs = kwargs | {"attn_mask": functional.pad(bias, (0, self.length, 0, self.length))}
        return func(*args, **kwargs)


class PromptTokensModel(OwnTuner):
    """The tuner that PEFT builds from a `PromptTokensConfig`."""

    prefix: str = "tprompt_"
    tuner_layer_cls = PromptTokensLayer


def uniform_bound(width: int) -> float:
    """Return the bound within which VPT's authors start prompts for patches of `width` numbers, as in ViT-B/16."""
    return math.sqrt(3 / width)
