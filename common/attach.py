"""Attach a method to a backbone: wrap, freeze, fix the train/eval policy, prove that every adapter is alive, count."""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from common.errors import GraftError
from common.methods import MethodSpec, Plan
from common.roles import Family, RoleMap, resolve

if TYPE_CHECKING:
    from peft import PeftConfig


@dataclass(frozen=True, kw_only=True)
class Attached:
    """A backbone with a method on it.

    Attributes:
        model: The module to run: the backbone itself, or PEFT's wrapper around it.
        spec: The method.
        plan: What the method resolved to on this backbone.
        roles: The backbone's roles, or None without a family.
        base_digest: SHA-256 of the backbone's weights before anything was attached.
        base_params: Number of the bare backbone's parameters.
        params_by_role: Role to `(total of the bare backbone, trainable now)`; adapters count under their target's role.
    """

    model: nn.Module
    spec: MethodSpec
    plan: Plan
    roles: RoleMap | None
    base_digest: str
    base_params: int
    params_by_role: dict[str, tuple[int, int]] = field(default_factory=dict)

    def train(self, training: bool) -> None:
        """Set train or eval modes by the method's policy (see `Plan.mode`)."""
        mode = self.plan.mode
        self.model.train(training and mode != "frozen")
        if training and mode == "adapted":
            for module in self.model.modules():
                if isinstance(module, _NormBase) and module.track_running_stats:
                    module.eval()

    def grad_mode(self) -> AbstractContextManager[None]:
        """Context in which features are computed: without a graph where nothing in the backbone trains."""
        return torch.no_grad() if self.plan.mode == "frozen" else contextlib.nullcontext()


def attach(
    backbone: nn.Module,
    spec: MethodSpec,
    family: Family | None,
    *,
    seed: int = 0,
    name: str = "",
) -> Attached:
    """Put a method onto a backbone.

    Args:
        backbone: The bare, pretrained backbone; it is changed in place.
        spec: The method.
        family: The backbone's family of roles, or None for an unknown architecture.
        seed: Seed of the adapter's random start.
        name: Name under which plain `peft` will know the base model.

    Raises:
        GraftError: The method does not fit this backbone; the message says why.
    """
    roles = resolve(backbone, family) if family else None
    plan = spec.plan(backbone, roles)
    digest = state_digest(backbone)
    totals = _params_by_role(backbone, roles.role_of if roles else {})
    base_params = sum(p.numel() for p in backbone.parameters())
    object.__setattr__(backbone, "name_or_path", name)
    backbone.requires_grad_(plan.mode == "full")
    model = backbone
    if plan.peft_config is not None:
        model = _wrap(backbone, plan.peft_config, seed)
    trainable = _trainable_by_role(model, plan, roles)
    by_role = {role: (totals.get(role, 0), trainable.get(role, 0)) for role in {**totals, **trainable}}
    return Attached(
        model=model,
        spec=spec,
        plan=plan,
        roles=roles,
        base_digest=digest,
        base_params=base_params,
        params_by_role=by_role,
    )


def tuner_layers(model: nn.Module) -> dict[str, Any]:
    """Return PEFT's adapted layers by their full name in `model`."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def _wrap(backbone: nn.Module, config: PeftConfig, seed: int) -> nn.Module:
    from peft import get_peft_model

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # PEFT warns of layers whose sizes it does not know; whether an adapter works is what `probe` finds out.
        warnings.filterwarnings("ignore", message="Unsupported layer type.*")
        torch.manual_seed(seed)
        # PEFT's annotations ask for a transformers model; it takes any module.
        return get_peft_model(cast("Any", backbone), config)


def state_digest(model: nn.Module) -> str:
    """Return the SHA-256 of all parameters and persistent buffers with their names, shapes and types."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _params_by_role(model: nn.Module, role_of: Mapping[str, str]) -> dict[str, int]:
    totals: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        role = role_of.get(name.rpartition(".")[0], "other")
        totals[role] = totals.get(role, 0) + parameter.numel()
    return totals


def _trainable_by_role(model: nn.Module, plan: Plan, roles: RoleMap | None) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            role = _role_of_parameter(name.removeprefix("base_model.model."), plan, roles)
            counts[role] = counts.get(role, 0) + parameter.numel()
    return counts


def _role_of_parameter(name: str, plan: Plan, roles: RoleMap | None) -> str:
    """Walk up from a parameter to the module that was adapted, or that carries a role."""
    owner = name
    while owner:
        owner = owner.rpartition(".")[0]
        if owner in plan.targets:
            return plan.targets[owner]
        if roles and owner in roles.role_of:
            return roles.role_of[owner]
    return "other"


def probe(attached: Attached, features: Callable[[], Tensor]) -> None:
    """Prove that every adapter runs and learns, in train mode and in eval mode.

    Some libraries compute a layer's result without calling the layer (fused attention paths); an adapter on such a
    layer trains nothing and fails silently. Here each adapted layer must be called and must receive a gradient.
    Weights, buffers, gradients, modes and the random state are left as they were.

    Args:
        attached: The backbone with its method.
        features: Runs the attached model on one example batch and returns a float tensor of any shape.

    Raises:
        GraftError: Adapters that are never called or never receive a gradient, by name.
    """
    if attached.plan.mode == "frozen":
        return
    layers = tuner_layers(attached.model)
    before = {name: buffer.detach().clone() for name, buffer in attached.model.named_buffers()}
    was_training = attached.model.training
    try:
        for training in (True, False):
            attached.train(training)
            with _calls(layers) as called, torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                output = features()
                (output * torch.randn_like(output)).sum().backward()
            dead = [name for name, layer in layers.items() if name not in called or not _has_gradient(layer)]
            attached.model.zero_grad(set_to_none=True)
            if dead:
                raise GraftError(
                    f"{len(dead)} of {len(layers)} adapters are dead in {'train' if training else 'eval'} mode: the "
                    f"backbone never uses them ({', '.join(_short(dead))}). Choose other roles with 'on'."
                )
    finally:
        attached.model.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, buffer in attached.model.named_buffers():
                buffer.copy_(before[name])
        attached.train(was_training)


@contextlib.contextmanager
def _calls(layers: Mapping[str, nn.Module]) -> Generator[set[str]]:
    called: set[str] = set()
    handles = []
    for name, layer in layers.items():

        def note(module: nn.Module, args: object, output: object, name: str = name) -> None:
            called.add(name)

        handles.append(layer.register_forward_hook(note))
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()


def _has_gradient(layer: nn.Module) -> bool:
    return any(p.grad is not None and bool(p.grad.any()) for p in layer.parameters() if p.requires_grad)


def _short(names: list[str], most: int = 3) -> list[str]:
    shown = [name.removeprefix("base_model.model.") for name in names[:most]]
    return shown if len(names) <= most else [*shown, "..."]
