"""What a method has to do on every network: one function a check, over fresh objects.

A check returns a remark, or an empty string, and raises `CheckFailed` with what went wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import PeftModel, mapping
from torch import Tensor

from common import tuners
from common.attach import Attached, tuner_layers
from common.errors import GraftError
from common.exchange import MERGE_TOLERANCE, RELOAD_TOLERANCE, merged, starts_from_the_weight
from common.matrix.bench import STEPS, Bench, difference, load_state, optimizer_of, peft_model
from common.matrix.settings import CHANGES_AT_START

START_TOLERANCE = 1e-5
HALF_TOLERANCE = 5e-2
# What `exchange.merged` takes for a refusal to merge.
_REFUSALS = (NotImplementedError, ValueError, RuntimeError, AttributeError)


class CheckFailed(Exception):
    """A check that a method does not pass; the message says what was found."""


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise CheckFailed(what)


def _require_close(output: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    error = difference(output, expected)
    _require(error <= tolerance, f"{what} by {error:.1e} ({tolerance:.0e} allowed)")


def identity(bench: Bench) -> str:
    """A fresh method computes what the bare network computes, up to rounding."""
    reason = CHANGES_AT_START.get(type(bench.spec).__name__)
    if reason is not None:
        return f"changes the output from the start: {reason}"
    _require_close(bench.run(bench.fresh().model), bench.bare, START_TOLERANCE, "a fresh method changes the output")
    return ""


def only_intended_move(bench: Bench) -> str:
    """In three steps every trainable parameter moves, and nothing else."""
    trained = bench.trained
    own = {n for n, p in trained.attached.model.named_parameters() if p.requires_grad and p.numel()}
    buffers = {name for name, _ in trained.attached.model.named_buffers()}
    moved = {name for name, value in trained.after.items() if not torch.equal(value, trained.before[name])}
    own -= _of_keys(trained.attached) - moved
    _require(not own - moved, f"{len(own - moved)} of {len(own)} trainable never move: {_some(own - moved)}")
    allowed = own | buffers if trained.attached.plan.mode == "full" else own | _of_tuners(trained.attached)
    _require(not moved - allowed, f"frozen ones move: {_some(moved - allowed)}")
    changed = difference(trained.output, bench.bare)
    _require(not own or changed > 10 * RELOAD_TOLERANCE, f"training changes the output by {changed:.1e} only")
    return ""


def _of_keys(attached: Attached) -> set[str]:
    """Return the adapter parameters at projections of keys alone: what a bias adds to all keys, attention takes out."""
    keys = (
        [name for name, shares in attached.roles.shares.items() if shares == ("attention_k",)] if attached.roles else []
    )
    names = {name for name, parameter in attached.model.named_parameters() if parameter.requires_grad}
    return {name for name in names if any(f".{key}." in f".{name}" for key in keys)}


def _of_tuners(attached: Attached) -> set[str]:
    """Return the names of buffers that belong to adapters and not to the network."""
    inner: set[str] = set()
    for prefix, layer in tuner_layers(attached.model).items():
        base = tuple(f"{name}." for name, _ in layer.named_modules() if name.rpartition(".")[2] == "base_layer")
        inner |= {f"{prefix}.{name}" for name, _ in layer.named_buffers() if not name.startswith(base)}
    return inner


def resume(bench: Bench) -> str:
    """Trained tensors and optimizer state, loaded into a fresh model, go on bit for bit."""
    attached = bench.fresh()
    optimizer = optimizer_of(attached.model)
    memory = load_state(attached, optimizer, bench.trained.interrupted)
    bench.step(attached, optimizer, memory, STEPS - 1)
    state = {**dict(attached.model.named_parameters()), **dict(attached.model.named_buffers())}
    wrong = {name for name, value in bench.trained.after.items() if not torch.equal(value, state[name])}
    _require(not wrong, f"{len(wrong)} tensors differ after a resumed step: {_some(wrong)}")
    return ""


def disabled(bench: Bench) -> str:
    """With its adapter disabled the model is the bare network, bit for bit; enabled again, it is as it was."""
    model = peft_model(bench.trained.attached)
    if model is None:
        return ""
    if starts_from_the_weight(bench.spec):
        return "disabled, it is not the bare network: a part of the weight lies in the adapter"
    with model.disable_adapter():
        output = bench.run(model)
    _require(torch.equal(output, bench.bare), f"disabled, outputs differ by {difference(output, bench.bare):.1e}")
    _require(torch.equal(bench.run(model), bench.trained.output), "enabled again, outputs differ")
    return ""


def reload(bench: Bench) -> str:
    """The adapter folder, loaded onto a fresh network, gives the same outputs."""
    output = bench.run(bench.reloaded().model)
    _require_close(output, bench.trained.output, RELOAD_TOLERANCE, "reloaded, outputs differ")
    return ""


def plain_peft(bench: Bench) -> str:
    """Where the tuner is PEFT's own, `peft` loads the folder without Graft."""
    config = bench.trained.attached.plan.peft_config
    if config is None or tuners.is_own(config.peft_type):
        return ""
    with _without_own_tuners():
        model = PeftModel.from_pretrained(cast("Any", bench.build().model), str(bench.trained.folder)).eval()
        output = bench.run(model)
    _require_close(output, bench.trained.output, RELOAD_TOLERANCE, "loaded by plain peft, outputs differ")
    return ""


@contextmanager
def _without_own_tuners() -> Generator[None]:
    """Hide Graft's tuner types from PEFT."""
    tables = [
        cast("dict[Any, Any]", table)
        for table in (
            mapping.PEFT_TYPE_TO_CONFIG_MAPPING,
            mapping.PEFT_TYPE_TO_TUNER_MAPPING,
            mapping.PEFT_TYPE_TO_PREFIX_MAPPING,
        )
    ]
    kept = [dict(table) for table in tables]
    for table in tables:
        for key in [key for key in table if tuners.is_own(key)]:
            del table[key]
    for key, kind in tuners.MENDED.items():
        tables[1][key] = kind.__mro__[1]
    try:
        yield
    finally:
        for table, whole in zip(tables, kept, strict=True):
            table.clear()
            table.update(whole)


def merge(bench: Bench) -> str:
    """Merged outputs are equal, unmerged ones too, and what is left is the plain network; or merging says why not."""
    attached = bench.reloaded()
    if peft_model(attached) is None:
        return ""
    expected = bench.trained.output
    name = type(bench.spec).__name__
    layers = list(tuner_layers(attached.model).values())
    try:
        for layer in reversed(layers):
            layer.merge(safe_merge=True)
    except _REFUSALS:
        try:
            merged(bench.reloaded().model, name, bench.specimen.name)
        except GraftError as error:
            return f"not mergeable: {str(error).removeprefix(f'{name} cannot be merged on {bench.specimen.name}: ')}"
        raise CheckFailed("merging in place is refused, and merging for good is not") from None
    _require_close(bench.run(attached.model), expected, MERGE_TOLERANCE, "merged, outputs differ")
    for layer in layers:
        layer.unmerge()
    _require_close(bench.run(attached.model), expected, MERGE_TOLERANCE, "unmerged, outputs differ")
    plain = merged(attached.model, name, bench.specimen.name).eval()
    _require_close(bench.run(plain), expected, MERGE_TOLERANCE, "merged for good, outputs differ")
    bare = bench.build().model
    _require(plain.state_dict().keys() == bare.state_dict().keys(), "merged, it has other tensors than the network")
    # By name: a parametrised module has a class of its own.
    kinds, wanted = ([type(module).__qualname__ for module in net.modules()] for net in (plain, bare))
    _require(kinds == wanted, "merged, it is made of other modules than the network")
    return ""


def switch(bench: Bench) -> str:
    """Two adapters on one network, one active at a time, compute what each computes alone."""
    if peft_model(bench.trained.attached) is None:
        return ""
    first, second = bench.trained, bench.other
    _require(difference(second.output, first.output) > 10 * RELOAD_TOLERANCE, "two trainings end in one adapter")
    model = PeftModel.from_pretrained(cast("Any", bench.build().model), str(first.folder), adapter_name="first")
    model.load_adapter(str(second.folder), "second")
    model.eval()
    for name, trained in (("first", first), ("second", second), ("first", first)):
        model.set_adapter(name)
        model.eval()
        _require_close(bench.run(model), trained.output, RELOAD_TOLERANCE, f"switched to the {name}, outputs differ")
    return ""


def half_precision(bench: Bench) -> str:
    """Under bfloat16 autocast it runs and trains, finite and as near as the bare network."""
    attached = bench.fresh()
    load_state(attached, None, bench.trained.interrupted)
    attached.train(False)
    exact = bench.run(attached.model)
    bare = bench.build().model.eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = bench.specimen.run(attached.model, bench.specimen.inputs)
        bare_half = bench.run(bare)
    _require(bool(torch.isfinite(output).all()), "in bfloat16 outputs are not finite")
    error, own = _relative(output, exact), _relative(bare_half, bench.bare)
    allowed = max(HALF_TOLERANCE, 3 * own)
    _require(error <= allowed, f"in bfloat16 outputs differ by {error:.1e} ({allowed:.0e} allowed)")
    if output.requires_grad:
        output.float().square().mean().backward()
        gradients = [p.grad for p in attached.model.parameters() if p.grad is not None]
        finite = all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
        _require(bool(gradients) and finite, "in bfloat16 gradients are missing or not finite")
    return ""


def _relative(output: Tensor, expected: Tensor) -> float:
    return float((output.detach().float() - expected).norm() / expected.norm())


def _some(names: set[str], most: int = 3) -> str:
    shown = [name.removeprefix("base_model.model.") for name in sorted(names)]
    return ", ".join(shown[:most]) + (", ..." if len(shown) > most else "")


CHECKS: Mapping[str, Callable[[Bench], str]] = {
    "identity at the start": identity,
    "only intended parameters move": only_intended_move,
    "exact resume": resume,
    "disabled": disabled,
    "save and reload": reload,
    "plain peft": plain_peft,
    "merge": merge,
    "two adapters": switch,
    "bfloat16": half_precision,
}
