"""Train named parts of the backbone as they are: biases, norms, blocks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from common.errors import GraftError
from common.methods._base import CONVOLUTIONS, MethodSpec, OnModules, Plan, exact, require_types

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from common.roles import RoleMap

Statistics = Literal["frozen", "saved"]


@dataclass(frozen=True, kw_only=True)
class BitFit(MethodSpec):
    """Train the bias vectors alone (Ben Zaken et al. 2022, arXiv 2106.10199).

    For each layer y = f(x; W) + b, b is trained and W stays. Trainable parameters: the sum of the bias lengths.

    Args:
        norms: Include the biases of the norms, as the paper does.
        statistics: What becomes of the running statistics of batch norms whose bias is trained: `frozen`, or `saved`:
            they follow the training data, are kept in the adapter, and a merge writes them into the norms.
    """

    taxonomy: ClassVar[str] = "selective"
    summary: ClassVar[str] = "train the biases"
    source: ClassVar[str] = "arXiv 2106.10199"

    norms: bool = True
    statistics: Statistics = "frozen"

    def plan(self, model: nn.Module, roles: RoleMap | None) -> Plan:
        """Take every module that has a bias; see the base class."""
        from common.roles import NORMS

        biases = [n for n, m in model.named_modules() if _has(m, "bias") and (self.norms or not isinstance(m, NORMS))]
        if not biases:
            raise GraftError(f"BitFit finds no bias in {type(model).__name__}; choose another method.")
        statistics = _with_statistics(self, model, biases) if self.statistics == "saved" else ()
        return _copies(roles, biases=biases, statistics=statistics)


@dataclass(frozen=True, kw_only=True)
class NormBias(MethodSpec):
    """Train scale and shift of the norms, all biases, and the slopes of learnable activations (PReLU).

    For each norm y = w * norm(x) + b, w and b are trained, for each other layer y = f(x; W) + b, b, and for each PReLU
    y = max(0, x) + a * min(0, x), a. These are the scale-and-bias patches of Mudrakarta et al. 2018 (arXiv 1810.10703)
    and the biases of BitFit (arXiv 2106.10199) in one. Trainable parameters: the sum of the lengths of these vectors.
    For convolutional networks, whose norms and slopes say as much as their biases (many convolutions before a norm have
    none); merges without a trace.

    Args:
        statistics: What becomes of the running statistics of batch norms with a scale: `frozen`, or `saved`: they
            follow the training data, are kept in the adapter, and a merge writes them into the norms.
    """

    taxonomy: ClassVar[str] = "selective"
    summary: ClassVar[str] = "train norms, biases and activations' slopes"
    source: ClassVar[str] = "arXiv 1810.10703"

    statistics: Statistics = "frozen"

    def plan(self, model: nn.Module, roles: RoleMap | None) -> Plan:
        """Take every norm, every module that has a bias and every PReLU; see the base class."""
        from torch import nn as torch_nn

        from common.roles import NORMS

        modules = dict(model.named_modules())
        biases = [n for n, m in modules.items() if _has(m, "bias")]
        weights = [n for n, m in modules.items() if isinstance(m, (*NORMS, torch_nn.PReLU)) and _has(m, "weight")]
        if not biases and not weights:
            raise GraftError(
                f"NormBias finds no norm, bias or slope to train in {type(model).__name__}; choose another method."
            )
        statistics = _with_statistics(self, model, [*weights, *biases]) if self.statistics == "saved" else ()
        return _copies(roles, weights=weights, biases=biases, statistics=statistics)


@dataclass(frozen=True, kw_only=True)
class DiffFit(OnModules):
    """Train biases, norms and scales of the residual branches (Xie et al. 2023, arXiv 2304.06648).

    As `NormBias` without slopes of activations: all biases and the norms' own scale and shift are trained. Besides, the
    layers that end a branch give y = g * (W x + b) with one trained number g an output channel, g = 1 at the start, so
    that a block computes h + g1 * attention(h) and h + g2 * ffn(h). Trainable parameters: the sum of the lengths of
    biases and norm scales, + the outputs of each layer with a g. Made for diffusion transformers; a little more than
    BitFit where biases alone move too little. Merges without a trace.

    Args:
        on: Roles of the layers that end a branch and get the scale g.
        target_modules: Their exact names instead of roles.
    """

    taxonomy: ClassVar[str] = "selective"
    summary: ClassVar[str] = "train biases, norms and branch scales"
    source: ClassVar[str] = "arXiv 2304.06648"

    on: list[str] = field(default_factory=lambda: ["attention_out", "ffn_out"])

    def plan(self, model: nn.Module, roles: RoleMap | None) -> Plan:
        """Take every norm, every module that has a bias, and the ends of the branches; see the base class."""
        from common.roles import NORMS

        scales = self.select(model, roles)
        require_types("DiffFit", model, scales, ("Linear", *CONVOLUTIONS))
        modules = dict(model.named_modules())
        weights = [n for n, m in modules.items() if isinstance(m, NORMS) and _has(m, "weight")]
        biases = [n for n, m in modules.items() if _has(m, "bias")]
        return _copies(roles, weights=weights, biases=biases, scales=list(scales))


def _has(module: nn.Module, name: str) -> bool:
    """Whether a module holds this parameter itself."""
    return module.__dict__.get("_parameters", {}).get(name) is not None


def _with_statistics(spec: MethodSpec, model: nn.Module, names: Sequence[str]) -> list[str]:
    """Return the modules that keep running statistics.

    Raises:
        GraftError: None does.
    """
    from torch.nn.modules.batchnorm import _NormBase

    modules = {name: model.get_submodule(name) for name in names}
    found = [name for name, m in modules.items() if isinstance(m, _NormBase) and m.running_mean is not None]
    if not found:
        raise GraftError(
            f"{type(spec).__name__} statistics is 'saved', but it trains no norm of {type(model).__name__} that keeps "
            "running statistics. Set statistics to frozen."
        )
    return found


def _copies(
    roles: RoleMap | None,
    *,
    weights: Sequence[str] = (),
    biases: Sequence[str] = (),
    scales: Sequence[str] = (),
    statistics: Sequence[str] = (),
) -> Plan:
    """Plan to train copies of the weights and biases of the named modules, scales of them, and their statistics."""
    from common.tuners import CopiesConfig

    role_of = roles.role_of if roles else {}
    names = list(dict.fromkeys((*weights, *biases, *scales)))
    config = CopiesConfig(
        target_modules=exact(names),
        weight_of=exact(weights) if weights else None,
        bias_of=exact(biases) if biases else None,
        scale_of=exact(scales) if scales else None,
        statistics_of=exact(statistics) if statistics else None,
    )
    return Plan(peft_config=config, targets={name: role_of.get(name, "other") for name in names})


@dataclass(frozen=True, kw_only=True)
class NormTuning(MethodSpec):
    """Train the affine parameters of the normalisation layers (LayerNorm tuning; Zhao et al. 2023, arXiv 2312.11420).

    Trainable parameters: twice the channels of each norm (once where a norm has a scale and no shift). PEFT's own tuner
    does it while the statistics are frozen, else Graft's.

    Args:
        statistics: What becomes of the running statistics of batch norms: `frozen`, or `saved`: they follow the
        training
            data, are kept in the adapter, and a merge writes them into the norms.
    """

    taxonomy: ClassVar[str] = "selective"
    summary: ClassVar[str] = "train the norms' scale and shift"
    source: ClassVar[str] = "arXiv 2312.11420"

    statistics: Statistics = "frozen"

    def plan(self, model: nn.Module, roles: RoleMap | None) -> Plan:
        """Take every norm with parameters; see the base class."""
        from peft import LNTuningConfig

        from common.roles import NORMS, has_affine

        targets = {n: "norm" for n, m in model.named_modules() if isinstance(m, NORMS) and has_affine(m)}
        if not targets:
            raise GraftError(
                f"NormTuning finds no norm with parameters in {type(model).__name__}; choose another method, or build "
                "the model with affine norms."
            )
        if self.statistics == "saved":
            biases = [name for name in targets if _has(model.get_submodule(name), "bias")]
            statistics = _with_statistics(self, model, list(targets))
            return _copies(roles, weights=list(targets), biases=biases, statistics=statistics)
        return Plan(peft_config=LNTuningConfig(target_modules=exact(list(targets))), targets=targets)


@dataclass(frozen=True, kw_only=True)
class LastBlocks(MethodSpec):
    """Train the last k blocks as they are (partial-k fine-tuning, the baseline of Jia et al. 2022, arXiv 2203.12119).

    The engine's layer-copy tuner holds the trained copies, so that the frozen originals stay, the adapter loads with
    plain `peft`, and the weights of k blocks are held twice while training.

    Args:
        k: How many blocks to train, counted from the output.
    """

    taxonomy: ClassVar[str] = "selective"
    summary: ClassVar[str] = "train the last k blocks"
    source: ClassVar[str] = "arXiv 2203.12119"

    k: int = 1

    def plan(self, model: nn.Module, roles: RoleMap | None) -> Plan:
        """Take the last k blocks; see the base class."""
        from peft import LNTuningConfig

        blocks = roles.blocks if roles else ()
        if not 1 <= self.k <= len(blocks):
            raise GraftError(f"LastBlocks k={self.k}: this backbone has {len(blocks)} blocks; give 1 to {len(blocks)}.")
        chosen = blocks[-self.k :]
        return Plan(
            peft_config=LNTuningConfig(target_modules=exact(chosen)),
            targets=dict.fromkeys(chosen, "block"),
        )
