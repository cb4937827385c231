"""Hybrid methods: several methods on one backbone, and one method at a given budget."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, cast

from common.errors import GraftError, unknown
from common.methods._base import Calibration, MethodSpec, Plan, exact

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import Tensor, nn

    from common.roles import RoleMap


@dataclass(frozen=True, kw_only=True)
class Composed(MethodSpec):
    """A method that is made of others, which a recipe gives as blocks of their own."""

    taxonomy: ClassVar[str] = "hybrid"

    def describe(self) -> dict[str, Any]:
        """Return the spec as the `class_path` / `init_args` mapping of a recipe, the inner ones too."""
        fields = {entry.name: _described(getattr(self, entry.name)) for entry in dataclasses.fields(self)}
        return {"class_path": type(self).__name__, "init_args": fields}


def _described(value: object) -> object:
    if isinstance(value, MethodSpec):
        return value.describe()
    return [_described(item) for item in value] if isinstance(value, (list, tuple)) else value


def as_spec(given: MethodSpec | Mapping[str, Any], where: str) -> MethodSpec:
    """Return a method that is given as a spec, or as the `class_path` / `init_args` mapping of a recipe.

    Raises:
        GraftError: No such mapping, a method that does not exist, or settings that it has not.
    """
    from common.methods import METHODS

    if isinstance(given, MethodSpec):
        return given
    if not isinstance(given, Mapping) or not isinstance(given.get("class_path"), str) or given.keys() - _BLOCK:
        raise GraftError(f"{where} is no method: {given!r}. Give class_path and init_args, as in a recipe's 'peft'.")
    name = given["class_path"].rpartition(".")[2]
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    settings = given.get("init_args") or {}
    allowed = [entry.name for entry in dataclasses.fields(METHODS[name])]
    for key in settings:
        if key not in allowed:
            raise unknown(f"setting of {name}", key, allowed)
    return METHODS[name](**settings)


_BLOCK = {"class_path", "init_args"}


@dataclass(frozen=True, kw_only=True)
class Mixture(Composed):
    """Several methods at once (design spaces of He et al. 2021, arXiv 2110.04366).

    Every part changes its modules as it would alone: y_i = f_i(x; part) for the modules i that the part chooses. Where
    two parts choose one module, the first is innermost: the later acts on what the earlier made of it, as a bottleneck
    behind a layer with LoRA; where one acts on a block and another inside of it, each does so. A part that computes a
    layer from its frozen weights (SSF, BitFit, LoRA with dora, ...) would pass over the earlier one and is refused
    there: give it first. The parts train, save, load, disable and merge as one adapter. Trainable parameters: the sum
    of the parts'. To say that attention wants another method than the norms or the convolutions; one learning rate
    serves all.

    Args:
        parts: The methods, each with `class_path` and `init_args` as in a recipe's `peft:` block.
    """

    summary: ClassVar[str] = "several methods at once"
    source: ClassVar[str] = "arXiv 2110.04366"

    parts: list[MethodSpec] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Build parts that are given as plain values, as an adapter's record holds them."""
        object.__setattr__(self, "parts", [as_spec(part, f"Mixture part {i}") for i, part in enumerate(self.parts, 1)])

    def plan(self, model: nn.Module, roles: RoleMap | None) -> Plan:
        """Plan each part; see the base class."""
        if not self.parts:
            raise GraftError("Mixture has no parts. Give a list of methods, each with class_path and init_args.")
        refuse_loners("Mixture", self.parts)
        return together("Mixture", [(type(part).__name__, part.plan(model, roles)) for part in self.parts])


def refuse_loners(method: str, parts: Sequence[MethodSpec]) -> None:
    """Refuse parts that need a run to themselves."""
    for part in parts:
        if part.alone:
            raise GraftError(f"{method} cannot hold {type(part).__name__}: {part.alone}. Use it by itself.")


def together(method: str, plans: Sequence[tuple[str, Plan]]) -> Plan:
    """Join the plans of methods into that of one adapter.

    Parts may share modules, or act inside of what another one wraps: each wraps the bare network's modules, the first
    part innermost. A tuner that passes over what it wraps refuses that (`common.tuners.mixture`).

    Args:
        method: Name of the joining method, for messages.
        plans: Name and plan of each part, in the order of wrapping.

    Raises:
        GraftError: A part without an adapter of its own, or one that looks at data and shares a module.
    """
    from common.tuners import MixtureConfig

    return joined(method, plans, MixtureConfig(parts=configs_of(method, plans)))  # ty: ignore[invalid-argument-type]


def configs_of(method: str, plans: Sequence[tuple[str, Plan]]) -> list[PeftConfig]:
    """Return the configurations of planned methods; refuse one that adds no adapter."""
    for name, plan in plans:
        if plan.mode != "adapted" or plan.peft_config is None:
            raise GraftError(f"{method} cannot hold {name}, which adds no adapter. Give methods that do.")
    return [cast("PeftConfig", plan.peft_config) for _, plan in plans]


def joined(method: str, plans: Sequence[tuple[str, Plan]], config: PeftConfig) -> Plan:
    """Return the plan of several methods' adapters as one, with its configuration; see `together`."""
    targets: dict[str, str] = {}
    for name, plan in plans:
        for other, others in plans if plan.looks else ():
            shared = [
                module for module in plan.targets if any(_one_holds_the_other(module, held) for held in others.targets)
            ]
            if others is not plan and shared:
                raise GraftError(
                    f"{method}: {name} looks at what the bare network does at '{shared[0]}', where {other} acts too. "
                    "Narrow one of them down with 'on'."
                )
        targets |= {module: role for module, role in plan.targets.items() if module not in targets}
    notes = tuple(note for _, plan in plans for note in plan.notes)
    quantise = {name: bits for _, plan in plans for name, bits in plan.quantise.items()}
    looks = tuple(look for _, plan in plans for look in plan.looks)
    return Plan(peft_config=config, targets=targets, quantise=quantise, looks=looks, notes=notes)


def _one_holds_the_other(first: str, second: str) -> bool:
    return first == second or first.startswith(f"{second}.") or second.startswith(f"{first}.")


@dataclass(frozen=True, kw_only=True)
class MAM(MethodSpec):
    """Mix-and-match adapter: prefixes in attention, bottlenecks beside the feed-forward networks (arXiv 2110.04366).

    softmax(Q [P_K, K]^T s) [P_V, V] in each self-attention, with n trained keys and values (see `PrefixTuning`), and
    f(x) + s (U relu(D x + b) + c) for each feed-forward network f (see `ParallelAdapter`). He et al. 2021 found that a
    few prefixes and a wide bottleneck share a budget best, and take n = 30, a width of 512 and s = 4 where a layer has
    1,024 channels. Trainable parameters: 2 n c for each attention with c channels, and 2 w d + w + d for each
    feed-forward network on d channels. For transformers at a few percent of their parameters; cannot be merged, and
    its prefixes are no identity at the start.

    Args:
        length: Number n of keys and values.
        width: Width w of the bottlenecks.
        scale: The factor s.
    """

    taxonomy: ClassVar[str] = "hybrid"
    summary: ClassVar[str] = "prefixes in attention, bottlenecks beside the rest"
    source: ClassVar[str] = "arXiv 2110.04366"
    sized_by: ClassVar[str] = "width"

    length: int = 30
    width: int = 64
    scale: float = 4.0

    def plan(self, model: nn.Module, roles: RoleMap | None) -> Plan:
        """Plan both parts; see the base class."""
        from common.methods.additive import ParallelAdapter
        from common.methods.prompts import PrefixTuning

        parts = (PrefixTuning(length=self.length), ParallelAdapter(width=self.width, scale=self.scale))
        return together("MAM", [(type(part).__name__, part.plan(model, roles)) for part in parts])


@dataclass(frozen=True, kw_only=True)
class PerGroup(Composed):
    """Another set of methods for each group of blocks (S4 of Chen et al. 2023, arXiv 2301.01821).

    The backbone's B blocks are split into as many groups as `groups` has entries, in a spindle: the sizes grow towards
    the middle, in the proportions 1, 2, ..., 2, 1. Each group's methods act inside its blocks alone; no module may be
    in two of them. Trainable parameters: the sum of the parts'. The source's best pattern gave adapters and LoRA to
    the first group, adapters and prefixes to the second, those and biases to the third, and prefixes, biases and LoRA
    to the last. For a search over where which method pays.

    Args:
        groups: The methods of each group, first to last.
    """

    summary: ClassVar[str] = "a set of methods for each group of blocks"
    source: ClassVar[str] = "arXiv 2301.01821"

    groups: list[list[MethodSpec]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Build parts that are given as plain values, as an adapter's record holds them."""
        built = [[as_spec(part, f"PerGroup group {i}") for part in group] for i, group in enumerate(self.groups, 1)]
        object.__setattr__(self, "groups", built)

    def plan(self, model: nn.Module, roles: RoleMap | None) -> Plan:
        """Plan each group's methods inside its blocks; see the base class."""
        blocks = roles.blocks if roles else ()
        if not self.groups or not all(self.groups) or len(self.groups) > len(blocks):
            raise GraftError(
                f"PerGroup has {len(self.groups)} groups for {len(blocks)} blocks. Give at least one group and at most "
                "one for each block, each a list of methods."
            )
        refuse_loners("PerGroup", [part for group in self.groups for part in group])
        plans = []
        for number, (size, parts) in enumerate(zip(spindle(len(blocks), len(self.groups)), self.groups, strict=True)):
            inside, blocks = blocks[:size], blocks[size:]
            for part in parts:
                name = f"{type(part).__name__} of group {number + 1}"
                plans.append((name, _narrowed(part.plan(model, roles), inside, name)))
        return together("PerGroup", plans)


def spindle(blocks: int, groups: int) -> list[int]:
    """Split a number of blocks into groups whose sizes grow towards the middle, each at least 1.

    The proportions are 1, 2, ..., 2, 1 (1 and 1 for two groups); what does not divide goes to the groups with the
    largest remainder, the middle ones first.
    """
    shares = [1.0 if i in (0, groups - 1) else 2.0 for i in range(groups)]
    ideal = [blocks * share / sum(shares) for share in shares]
    sizes = [max(1, int(size)) for size in ideal]
    while sum(sizes) > blocks:
        sizes[max(range(groups), key=lambda i: sizes[i] - ideal[i])] -= 1
    middle = (groups - 1) / 2
    while sum(sizes) < blocks:
        sizes[max(range(groups), key=lambda i: (ideal[i] - sizes[i], -abs(i - middle)))] += 1
    return sizes


def _narrowed(plan: Plan, blocks: Sequence[str], name: str) -> Plan:
    """Keep of a plan what lies inside these blocks."""
    held = [module for module in plan.targets if any(f"{module}.".startswith(f"{block}.") for block in blocks)]
    if not held or plan.peft_config is None:
        raise GraftError(f"PerGroup: {name} has nothing to act on in {', '.join(blocks)}. Leave it out there.")
    config = copy.deepcopy(plan.peft_config)
    _keep(config, held)
    looks = tuple((spec, tuple(module for module in names if module in held)) for spec, names in plan.looks)
    targets = {module: plan.targets[module] for module in held}
    return dataclasses.replace(plan, peft_config=config, targets=targets, looks=looks)


def _keep(config: Any, held: Sequence[str]) -> None:  # noqa: ANN401  (PeftConfig itself declares no target_modules)
    """Let a configuration act on these modules alone; of several methods' each part on those that it has chosen."""
    from common.tuners import MixtureConfig

    if isinstance(config, MixtureConfig):
        parts: list[Any] = []
        for part in config.built():
            inner = isinstance(part, MixtureConfig)
            own = [name for name in held if inner or re.fullmatch(getattr(part, "target_modules"), name)]  # noqa: B009
            _keep(part, own)
            if part.parts if inner else own:
                parts.append(part)
        config.parts = MixtureConfig(parts=parts).parts
        return
    config.target_modules = exact(held)
    for pattern in ("rank_pattern", "alpha_pattern"):  # PEFT warns of entries for layers that are no targets
        given = getattr(config, pattern, None) or {}
        if given:
            setattr(
                config, pattern, {key: value for key, value in given.items() if any(map(re.compile(key).match, held))}
            )


@dataclass(frozen=True, kw_only=True)
class AtBudget(Composed):
    """One method with its size chosen to meet a budget of trainable parameters.

    The setting that sizes the method (LoRA's rank, a bottleneck's width, a mask's density) takes the value whose number
    of trainable parameters in the backbone is nearest to `share` of the backbone's; where two are equally near, the
    smaller one.
    Methods can so be compared at equal size, as arXiv 2403.14608 asks. The chosen value and its share stand in the
    notes of the run.

    Args:
        method: The method, with `class_path` and `init_args` as in a recipe's `peft:` block.
        share: Wanted share of the backbone's parameters, in (0, 1).
        most: Largest value to try, of settings that count something.
        tolerance: How far the nearest count may lie from the wanted one, as a share of it; farther off is refused, for
            methods would be called equal that are not.
    """

    summary: ClassVar[str] = "one method, sized to a budget of parameters"
    source: ClassVar[str] = "arXiv 2403.14608"

    method: MethodSpec | None = None
    share: float = 0.003
    most: int = 16384
    tolerance: float = 0.5

    def __post_init__(self) -> None:
        """Build the method where it is given as plain values, as an adapter's record holds it."""
        if self.method is not None:
            object.__setattr__(self, "method", as_spec(self.method, "AtBudget method"))

    def plan(self, model: nn.Module, roles: RoleMap | None) -> Plan:
        """Choose the size and plan with it; see the base class."""
        if self.method is None or not self.method.sized_by:
            name = type(self.method).__name__ if self.method is not None else "nothing"
            raise GraftError(f"AtBudget cannot size {name}. Give a method with a size: {', '.join(with_a_size())}.")
        if not 0 < self.share < 1 or self.most < 1 or not self.tolerance > 0:
            raise GraftError(
                f"AtBudget share is {self.share}, most {self.most} and tolerance {self.tolerance}; give a share in "
                "(0, 1), 1 or more, and a tolerance above 0."
            )
        total = sum(parameter.numel() for parameter in model.parameters())
        size, count = self._nearest(model, roles, self.share * total)
        found = (
            f"{type(self.method).__name__} of {self.method.sized_by} {size:g} has {count:,} trainable parameters, "
            f"{count / total:.3%} of the backbone's ({self.share:.3%} wanted)"
        )
        if abs(count / total - self.share) > self.tolerance * self.share:
            more = f"Name more roles in its 'on', raise most (now {self.most})"
            remedy = "Name fewer roles in its 'on'" if count > self.share * total else more
            raise GraftError(f"AtBudget comes no nearer: {found}. {remedy}, or choose another share.")
        plan = self._sized(size).plan(model, roles)
        note = f"{found}."
        return dataclasses.replace(plan, notes=(note, *plan.notes))

    def _held(self) -> MethodSpec:
        if self.method is None:
            raise GraftError("AtBudget has no method. Give one with class_path and init_args.")
        return self.method

    def _sized(self, size: float) -> MethodSpec:
        return dataclasses.replace(self._held(), **{self._held().sized_by: size})

    @property
    def alone(self) -> str:
        """What is true of the method."""
        return self._held().alone

    @property
    def calibration(self) -> Calibration | None:
        """What the method asks for."""
        return self._held().calibration

    def calibrate(self, layers: Mapping[str, Any], seen: Mapping[str, Tensor]) -> None:
        """Let the method set its adapter."""
        self._held().calibrate(layers, seen)

    def after_attach(self, model: nn.Module) -> None:
        """Let the method change the model."""
        self._held().after_attach(model)

    def rate_factor(self, name: str) -> float:
        """Return the method's own factor."""
        return self._held().rate_factor(name)

    def penalty(self, model: nn.Module) -> Tensor | None:
        """Return the method's own penalty."""
        return self._held().penalty(model)

    def after_step(self, model: nn.Module, memory: dict[str, Tensor], step: int, steps: int) -> None:
        """Let the method act."""
        self._held().after_step(model, memory, step, steps)

    def _nearest(self, model: nn.Module, roles: RoleMap | None, wanted: float) -> tuple[float, int]:
        """Find the size of the nearest count, and that count.

        A share of the weights follows from what all of them count. Other sizes are doubled up to the wanted count, so
        that none far above it is built, then searched by halving: the count grows with the size, or stays where a layer
        takes no more. A size that the method refuses is too large.
        """
        if isinstance(getattr(self._held(), self._held().sized_by), float):
            share = min(1.0, wanted / self._count(model, roles, 1.0))
            return share, self._count(model, roles, share)
        low, high = 1, 2
        counts = {low: self._count(model, roles, low)}

        def fits(size: int) -> bool:
            try:
                counts[size] = self._count(model, roles, size)
            except GraftError:
                return False
            return counts[size] <= wanted

        while high <= self.most and counts[low] <= wanted and fits(high):
            low, high = high, 2 * high
        high = min(high, self.most + 1)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        size = min(counts, key=lambda size: (abs(counts[size] - wanted), size))
        return size, counts[size]

    def _count(self, model: nn.Module, roles: RoleMap | None, size: float) -> int:
        """Count the trainable parameters of one size, on a copy."""
        import torch
        from peft import get_peft_model

        config = self._sized(size).plan(model, roles).peft_config
        if config is None:
            raise GraftError(f"AtBudget cannot size {type(self.method).__name__}, which adds no adapter.")
        bare = cast("Any", copy.deepcopy(model).requires_grad_(False))
        with torch.random.fork_rng(devices=[]):
            wrapped = get_peft_model(bare, config)
        return sum(parameter.numel() for parameter in wrapped.parameters() if parameter.requires_grad)


def with_a_size() -> list[str]:
    """Name the methods that `AtBudget` can size."""
    from common.methods import METHODS

    return [name for name, spec in METHODS.items() if spec.sized_by]
