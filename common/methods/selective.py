"""Selective methods: train a chosen part of the backbone's own parameters, and the two ends of the scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from common.errors import GraftError
from common.methods._base import MethodSpec, Plan, exact

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from common.roles import RoleMap


@dataclass(frozen=True, kw_only=True)
class FullFineTune(MethodSpec):
    """Train every parameter of the backbone: the reference that PEFT is measured against.

    Normalisation statistics train too. The shared artifact is a whole model, so `graft export` writes all weights.
    """

    taxonomy: ClassVar[str] = "baseline"
    summary: ClassVar[str] = "train every parameter"

    def plan(self, model: nn.Module, roles: RoleMap | None) -> Plan:
        """Train all; see the base class."""
        targets = dict(roles.role_of) if roles else {}
        return Plan(peft_config=None, targets=targets, mode="full")


@dataclass(frozen=True, kw_only=True)
class LinearProbe(MethodSpec):
    """Train the head alone on the frozen backbone's features.

    The backbone stays in eval mode and outside the autograd graph, so a step costs one forward pass.
    """

    taxonomy: ClassVar[str] = "baseline"
    summary: ClassVar[str] = "train the head alone"

    def plan(self, model: nn.Module, roles: RoleMap | None) -> Plan:
        """Train nothing of the backbone; see the base class."""
        return Plan(peft_config=None, targets={}, mode="frozen")


@dataclass(frozen=True, kw_only=True)
class BitFit(MethodSpec):
    """Train the bias vectors alone (Ben Zaken et al. 2022, arXiv 2106.10199).

    For each layer y = f(x; W) + b, b is trained and W stays. Trainable parameters: the sum of the bias lengths.

    Args:
        norms: Include the biases of the norms, as the paper does.
    """

    taxonomy: ClassVar[str] = "selective"
    summary: ClassVar[str] = "train the biases"
    source: ClassVar[str] = "arXiv 2106.10199"

    norms: bool = True

    def plan(self, model: nn.Module, roles: RoleMap | None) -> Plan:
        """Take every module that has a bias; see the base class."""
        from common.roles import NORMS

        biases = [n for n, m in model.named_modules() if _has(m, "bias") and (self.norms or not isinstance(m, NORMS))]
        if not biases:
            raise GraftError(f"BitFit finds no bias in {type(model).__name__}; choose another method.")
        return _copies(roles, biases=biases)


@dataclass(frozen=True, kw_only=True)
class NormBias(MethodSpec):
    """Train scale and shift of the norms, all biases, and the slopes of learnable activations (PReLU).

    For each norm y = w * norm(x) + b, w and b are trained, for each other layer y = f(x; W) + b, b, and for each PReLU
    y = max(0, x) + a * min(0, x), a. These are the scale-and-bias patches of Mudrakarta et al. 2018 (arXiv 1810.10703)
    and the biases of BitFit (arXiv 2106.10199) in one. Trainable parameters: the sum of the lengths of these vectors.
    The statistics of batch norms stay frozen. For convolutional networks, whose norms and slopes say as much as their
    biases (many convolutions before a norm have none); merges without a trace.
    """

    taxonomy: ClassVar[str] = "selective"
    summary: ClassVar[str] = "train norms, biases and activations' slopes"
    source: ClassVar[str] = "arXiv 1810.10703"

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
        return _copies(roles, weights=weights, biases=biases)


def _has(module: nn.Module, name: str) -> bool:
    """Whether a module holds this parameter itself."""
    return module.__dict__.get("_parameters", {}).get(name) is not None


def _copies(roles: RoleMap | None, *, weights: Sequence[str] = (), biases: Sequence[str] = ()) -> Plan:
    """Plan to train copies of the weights and biases of the named modules."""
    from common.tuners import CopiesConfig

    role_of = roles.role_of if roles else {}
    names = list(dict.fromkeys((*weights, *biases)))
    config = CopiesConfig(
        target_modules=exact(names),
        weight_of=exact(weights) if weights else None,
        bias_of=exact(biases) if biases else None,
    )
    return Plan(peft_config=config, targets={name: role_of.get(name, "other") for name in names})


@dataclass(frozen=True, kw_only=True)
class NormTuning(MethodSpec):
    """Train the affine parameters of the normalisation layers (LayerNorm tuning; Zhao et al. 2023, arXiv 2312.11420).

    Running statistics of BatchNorm stay frozen, so that an adapter file is complete. Trainable parameters: twice the
    channels of each norm (once where a norm has a scale and no shift).
    """

    taxonomy: ClassVar[str] = "selective"
    summary: ClassVar[str] = "train the norms' scale and shift"
    source: ClassVar[str] = "arXiv 2312.11420"

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
