"""What a recipe's method would act on and cost, read off one real batch without training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from common.attach import Attached, probe
from common.cost import TrainMemory, measure_step, nbytes
from common.errors import GraftError
from common.methods import FullFineTune, LinearProbe, MethodSpec
from common.run import fast_precision
from common.task import AdaptedTask

NEAR = 0.95  # a method that needs this share of full fine-tuning's memory saves none worth the name
_HALF = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What one method would cost.

    Attributes:
        name: What is trained.
        trainable: Number of trained parameters, the head's included.
        memory: Memory of a training step; None where the method is refused.
        refusal: Why it is refused.
    """

    name: str
    trainable: int = 0
    memory: TrainMemory | None = None
    refusal: str = ""

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.memory.as_dict()["total"] if self.memory else 0


@dataclass(frozen=True, kw_only=True)
class RoleRow:
    """The modules of one role that a method acts on.

    Attributes:
        role: The role.
        modules: How many there are.
        kinds: Their classes, each with its count.
        depth: The blocks that hold them, counted from 1.
        trainable: Parameters trained there.
        example: The first one's name.
    """

    role: str
    modules: int
    kinds: str
    depth: str
    trainable: int
    example: str


def fresh(task: AdaptedTask, spec: MethodSpec, facts: Any) -> AdaptedTask:  # noqa: ANN401
    """Build a recipe's task with another method on it, assembled."""
    options = {"gradient_checkpointing": True} if task.gradient_checkpointing else {}
    own = type(task)(**task.settings, peft=spec, optim=task.optim, seed=task.seed, **options)
    own.facts = facts
    own.assemble()
    return own


def forecasts(task: AdaptedTask, batch: Any, precision: str | None) -> tuple[AdaptedTask, list[Forecast]]:  # noqa: ANN401
    """Measure a step of the recipe's method, of full fine-tuning and of the head alone.

    Args:
        task: The recipe's task, its facts known, nothing built yet.
        batch: One training batch.
        precision: The recipe's `trainer.precision`.

    Returns:
        The recipe's task, assembled and probed, and the three forecasts, its own first.

    Raises:
        GraftError: The recipe's own method is refused.
    """
    own = fresh(task, task.peft, task.facts)
    probe(own.attached, lambda: own.features(own.example_batch()))
    found = [_measure(type(task.peft).__name__, own, batch, precision)]
    for name, spec in (("full fine-tuning", FullFineTune()), ("head only", LinearProbe())):
        if type(spec) is type(task.peft):
            continue
        try:
            found.append(_measure(name, fresh(task, spec, task.facts), batch, precision))
        except GraftError as error:
            found.append(Forecast(name=name, refusal=str(error)))
    return own, found


def _measure(name: str, task: AdaptedTask, batch: Any, precision: str | None) -> Forecast:  # noqa: ANN401
    task.train()
    torch.manual_seed(task.seed)
    with _autocast(precision):
        activations, _ = measure_step(task, lambda: task.compute_loss(batch))
    trainable = [parameter for parameter in task.parameters() if parameter.requires_grad]
    size = sum(parameter.numel() * parameter.element_size() for parameter in trainable)
    memory = TrainMemory(
        weights=nbytes((*task.parameters(), *task.buffers())),
        gradients=size,
        optimizer=2 * size + 4 * len(trainable),  # AdamW: two moments a parameter, and one step count a tensor
        activations=activations,
    )
    return Forecast(name=name, trainable=sum(p.numel() for p in trainable), memory=memory)


def _autocast(precision: str | None) -> AbstractContextManager[Any]:
    chosen = fast_precision() if precision == "auto" else precision
    half = _HALF.get(str(chosen))
    return torch.autocast("cpu", dtype=half) if half else contextlib.nullcontext()


def verdict(found: Sequence[Forecast]) -> str:
    """Say in one sentence whether the method saves memory against full fine-tuning on this batch."""
    own = found[0]
    full = next((forecast for forecast in found if forecast.name == "full fine-tuning"), None)
    if full is None or full.memory is None or own.memory is None:
        return ""
    sizes = f"{megabytes(own.total)} against {megabytes(full.total)} of full fine-tuning"
    saved = 1 - own.total / full.total
    if own.total <= NEAR * full.total:
        return f"{own.name} saves {100 * saved:.0f} % of the training memory: {sizes}."
    share = 100 * own.memory.activations / own.total
    more = "more" if own.memory.activations > full.memory.activations else "no less"
    return (
        f"{own.name} saves no memory on this network at this input size: {sizes}. Activations are {share:.0f} % of it, "
        f"and it keeps {more} of them than full fine-tuning ({megabytes(own.memory.activations)} against "
        f"{megabytes(full.memory.activations)})."
    )


def megabytes(size: int) -> str:
    """Word a number of bytes."""
    return f"{size / 1e6:,.1f} MB"


def roles_of(attached: Attached) -> list[RoleRow]:
    """Return what a method acts on, a row a role, in the order of the model."""
    blocks = attached.roles.blocks if attached.roles else ()
    base = _base_modules(attached.model)
    rows = []
    for role in dict.fromkeys(attached.plan.targets.values()):
        names = [name for name, own in attached.plan.targets.items() if own == role]
        classes = [type(base[name]).__name__ for name in names if name in base]
        rows.append(
            RoleRow(
                role=role,
                modules=len(names),
                kinds=", ".join(f"{classes.count(kind)} {kind}" for kind in dict.fromkeys(classes)),
                depth=_depth(names, blocks),
                trainable=attached.params_by_role.get(role, (0, 0))[1],
                example=names[0],
            )
        )
    return rows


def _base_modules(model: nn.Module) -> Mapping[str, nn.Module]:
    """Return the modules by the bare network's names, as they were before a tuner wrapped them."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        bare = name.removeprefix("base_model.model.").replace(".base_layer", "")
        inner: Any = getattr(module, "get_base_layer", None)
        found.setdefault(bare, inner() if callable(inner) else module)
    return found


def _depth(names: Iterable[str], blocks: Sequence[str]) -> str:
    """Word in which blocks modules lie: '1-3, 6 of 12'."""
    inside: set[int] = set()
    outside = False
    for name in names:
        at = [number for number, block in enumerate(blocks, 1) if f"{name}.".startswith(f"{block}.")]
        inside.update(at[-1:])  # the innermost of blocks within blocks
        outside |= not at
    words = [f"{_ranges(sorted(inside))} of {len(blocks)}"] if inside else []
    return ", ".join([*words, *(["outside of the blocks"] if outside else [])])


def _ranges(numbers: Sequence[int]) -> str:
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


def shapes(batch: Any) -> str:  # noqa: ANN401
    """Word the shapes of a batch's tensors."""
    fields = batch._asdict().items() if hasattr(batch, "_asdict") else enumerate(batch)
    sizes = {name: tuple(value.shape) for name, value in fields if isinstance(value, Tensor)}
    return ", ".join(f"{name} {' x '.join(map(str, size)) or 'scalar'}" for name, size in sizes.items())
