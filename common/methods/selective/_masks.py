"""Train single weights of a layer, chosen by magnitude, by what the training data says of them, or at random."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from common.errors import GraftError
from common.methods._base import CONVOLUTIONS, Calibration, OnModules, Plan, exact, require_types

if TYPE_CHECKING:
    from torch import Tensor, nn

    from common.roles import RoleMap

_SEEN = (
    "Which weights are trained is decided by {batches} training batches before the first step; until then, and where "
    "there are no data, they are chosen at random."
)


@dataclass(frozen=True, kw_only=True)
class _Mask(OnModules):
    def _plan(self, model: nn.Module, roles: RoleMap | None, rule: str, amount: float, mask: str = "random") -> Plan:
        from common.tuners import SparseConfig

        targets = self.select(model, roles)
        require_types(type(self).__name__, model, targets, ("Linear", *CONVOLUTIONS))
        config: Any = SparseConfig  # of literals that the specs have checked
        wanted = self.calibration
        return Plan(
            peft_config=config(target_modules=exact(list(targets)), rule=rule, amount=amount, mask=mask),
            targets=targets,
            looks=((self, tuple(targets)),) if wanted else (),
            notes=(_SEEN.format(batches=wanted.batches),) if wanted else (),
        )

    def _check_batches(self, batches: int) -> None:
        if batches < 1:
            raise GraftError(f"{type(self).__name__} batches is {batches}; give a whole number of at least 1.")


@dataclass(frozen=True, kw_only=True)
class FishMask(_Mask):
    """Train the weights with the largest Fisher information (Sung et al. 2021, arXiv 2111.09839).

    y = f(x; W + D): D is trained where the mask is set, and zero elsewhere. The mask is set once, before the first
    step, at the `density` of all adapted weights with the largest empirical Fisher information, the mean over training
    examples of the squared gradient of the loss; at least one weight of each layer. Trainable parameters: `density`
    times the weights of each layer, counted over all layers. The file holds four bytes of position for each. Head and
    loss are those of the task, at its start. For tasks unlike the pretraining, where it is unknown which layers should
    move; merges without a trace.

    Args:
        density: Share of the adapted weights that train; the paper takes 0.005.
        batches: Training batches that are looked at, each example alone.
    """

    taxonomy: ClassVar[str] = "selective"
    summary: ClassVar[str] = "train the weights of largest Fisher information"
    source: ClassVar[str] = "arXiv 2111.09839"
    sized_by: ClassVar[str] = "density"

    density: float = 0.005
    batches: int = 8

    @property
    def calibration(self) -> Calibration:
        """Look at the squared gradients of single examples."""
        return Calibration(of="fisher", batches=self.batches)

    def plan(self, model: nn.Module, roles: RoleMap | None) -> Plan:
        """Take Linear and convolution layers; see the base class."""
        self._check_batches(self.batches)
        _check_density("FishMask", self.density)
        return self._plan(model, roles, "share", self.density)

    def calibrate(self, layers: Mapping[str, Any], seen: Mapping[str, Tensor]) -> None:
        """Set the mask at the largest of all layers' weights; see the base class."""
        import torch

        adapter = next(iter(layers.values())).active_adapters[0]
        total = sum(layer.count(adapter) for layer in layers.values())
        scores = [seen[name].flatten().clone() for name in layers]
        for own in scores:
            own[own.argmax()] = torch.inf  # no layer is left without a weight
        chosen = torch.zeros(sum(map(len, scores)), dtype=torch.bool)
        chosen[torch.cat(scores).cpu().topk(total).indices] = True
        parts = chosen.split([len(own) for own in scores])
        for (name, layer), part in zip(layers.items(), parts, strict=True):
            layer.choose(adapter, part.view(seen[name].shape).float(), count=int(part.sum()))


@dataclass(frozen=True, kw_only=True)
class GPS(_Mask):
    """Gradient-based parameter selection, a few weights of each neuron (Zhang et al. 2023, arXiv 2312.10136).

    y = f(x; W + D): D is trained at `per_neuron` weights of each output (its inputs with the largest absolute gradient
    of the loss over some training batches, before the first step) and zero elsewhere, so that every layer and neuron
    can move a little. Trainable parameters: `per_neuron` times the outputs of each layer. The file holds four bytes of
    position for each. The paper takes the gradient of a contrastive loss, since a new head is random; here it is that
    of the task's own loss, head and all. For images and dense outputs, as an alternative to LoRA of the same size;
    merges without a trace.

    Args:
        per_neuron: Weights that train to each output; the paper takes 1 and more.
        batches: Training batches that are looked at.
    """

    taxonomy: ClassVar[str] = "selective"
    summary: ClassVar[str] = "train each neuron's weights of largest gradient"
    source: ClassVar[str] = "arXiv 2312.10136"
    sized_by: ClassVar[str] = "per_neuron"

    per_neuron: int = 1
    batches: int = 8

    @property
    def calibration(self) -> Calibration:
        """Look at the mean gradient."""
        return Calibration(of="gradient", batches=self.batches)

    def plan(self, model: nn.Module, roles: RoleMap | None) -> Plan:
        """Take Linear and convolution layers; see the base class."""
        self._check_batches(self.batches)
        if self.per_neuron < 1:
            raise GraftError(f"GPS per_neuron is {self.per_neuron}; give a whole number of at least 1.")
        return self._plan(model, roles, "output", self.per_neuron)

    def calibrate(self, layers: Mapping[str, Any], seen: Mapping[str, Tensor]) -> None:
        """Choose the largest of each output; see the base class."""
        for name, layer in layers.items():
            layer.choose(layer.active_adapters[0], seen[name].abs())


@dataclass(frozen=True, kw_only=True)
class SHiRA(_Mask):
    """Sparse high-rank adapters (Bhardwaj et al. 2024, arXiv 2406.13175).

    y = f(x; W + D): D is trained at as many weights as LoRA of the given rank has parameters, and zero elsewhere, so
    that the change is small and of any rank. Trainable parameters: rank (in + out) for each layer, a convolution's `in`
    being its inputs / groups times its kernel positions. The file holds four bytes of position for each. In Graft's own
    tuner: PEFT's acts on linear layers at random positions only. For adapters that are switched quickly or added to
    each other, since two of them hardly overlap; merges without a trace.

    Args:
        rank: Rank of the LoRA of equal size; the paper's is 32.
        mask: `random`; `magnitude`: the largest weights; `gradient`: the weights with the largest absolute gradient of
            the loss; `snip`: with the largest product of weight and gradient.
        batches: Training batches that `gradient` and `snip` look at before the first step.
    """

    taxonomy: ClassVar[str] = "selective"
    summary: ClassVar[str] = "train few weights, of a change of any rank"
    source: ClassVar[str] = "arXiv 2406.13175"
    sized_by: ClassVar[str] = "rank"

    rank: int = 32
    mask: Literal["random", "magnitude", "gradient", "snip"] = "random"
    batches: int = 8

    @property
    def calibration(self) -> Calibration | None:
        """Look at the mean gradient, where the mask is made of it."""
        return Calibration(of="gradient", batches=self.batches) if self.mask in ("gradient", "snip") else None

    def plan(self, model: nn.Module, roles: RoleMap | None) -> Plan:
        """Take Linear and convolution layers; see the base class."""
        self._check_batches(self.batches)
        if self.rank < 1:
            raise GraftError(f"SHiRA rank is {self.rank}; give a whole number of at least 1.")
        return self._plan(model, roles, "rank", self.rank, "largest" if self.mask == "magnitude" else "random")

    def calibrate(self, layers: Mapping[str, Any], seen: Mapping[str, Tensor]) -> None:
        """Choose the largest of each layer; see the base class."""
        for name, layer in layers.items():
            scores = seen[name].abs()
            if self.mask == "snip":
                scores = scores * layer.base_parameter("weight").detach().abs()
            layer.choose(layer.active_adapters[0], scores)


@dataclass(frozen=True, kw_only=True)
class MagnitudeMask(_Mask):
    """Train the weights of smallest magnitude (PaFi; Liao et al. 2023, arXiv 2305.16742).

    y = f(x; W + D): D is trained at the `density` of each layer's weights that are smallest (or largest) in absolute
    value, and zero elsewhere. The mask needs no data and is the same for all tasks on a backbone. Trainable parameters:
    `density` times the weights of each layer, at least one. The file holds four bytes of position for each. The
    cheapest baseline of the masks; merges without a trace.

    Args:
        density: Share of each layer's weights that train; the paper takes 0.005.
        which: `smallest`, as the paper does, or `largest`.
    """

    taxonomy: ClassVar[str] = "selective"
    summary: ClassVar[str] = "train the smallest weights"
    source: ClassVar[str] = "arXiv 2305.16742"
    sized_by: ClassVar[str] = "density"

    density: float = 0.005
    which: Literal["smallest", "largest"] = "smallest"

    def plan(self, model: nn.Module, roles: RoleMap | None) -> Plan:
        """Take Linear and convolution layers; see the base class."""
        _check_density("MagnitudeMask", self.density)
        return self._plan(model, roles, "share", self.density, self.which)


def _check_density(method: str, density: float) -> None:
    if not 0 < density <= 1:
        raise GraftError(f"{method} density is {density}; give a share in (0, 1].")
