"""Attach a method to a backbone: wrap, freeze, fix the train/eval policy, prove that every adapter is alive, count."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from common._digest import state_digest
from common.cost import kept_buffers
from common.errors import GraftError
from common.methods import MethodSpec, Plan
from common.quantise import quantise
from common.roles import Family, RoleMap, resolve

if TYPE_CHECKING:
    from peft import PeftConfig

_INNER = "base_model.model."  # PEFT's name for the backbone in its wrapper
_TRIES = 5  # a layer that a deep network skips at random one time in three is missed by all of them once in 243


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
    quantise(backbone, plan.quantise)
    model = backbone
    if plan.peft_config is not None:
        model = _wrap(backbone, plan.peft_config, seed)
        spec.after_attach(model)
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
        try:
            return get_peft_model(cast("Any", backbone), config)
        except (ValueError, TypeError, NotImplementedError) as error:
            raise GraftError(
                f"The method does not fit {type(backbone).__name__}: {' '.join(str(error).split())} "
                "Choose other roles with 'on', other settings, or another method."
            ) from error


def _params_by_role(model: nn.Module, role_of: Mapping[str, str]) -> dict[str, int]:
    totals: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        role = role_of.get(name.rpartition(".")[0], "other")
        totals[role] = totals.get(role, 0) + parameter.numel()
    return totals


def recount(attached: Attached) -> None:
    """Count the trainable parameters by role again, where the training data decided how many there are."""
    trainable = _trainable_by_role(attached.model, attached.plan, attached.roles)
    for role, (total, _) in attached.params_by_role.items():
        attached.params_by_role[role] = (total, trainable.get(role, 0))


def _trainable_by_role(model: nn.Module, plan: Plan, roles: RoleMap | None) -> dict[str, int]:
    """Count trained parameters by role; what layers of several roles share counts as `shared`, once."""
    found: dict[nn.Parameter, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            known = found.setdefault(parameter, set())
            if plan.peft_config is None or name.startswith(_INNER):
                known.add(_role_of_parameter(name.removeprefix(_INNER), plan, roles))
    counts: dict[str, int] = {}
    for parameter, carrying in found.items():
        role = next(iter(carrying)) if len(carrying) == 1 else "shared"
        counts[role] = counts.get(role, 0) + parameter.numel()
    return counts


def _role_of_parameter(name: str, plan: Plan, roles: RoleMap | None) -> str:
    """Walk up from a parameter to the module that was adapted, or that carries a role."""
    owner = ".".join(part for part in name.split(".") if part != "base_layer")  # of a layer within an adapted one
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
    layers = tuner_layers(attached.model)
    if not layers:
        return
    was_training = attached.model.training
    try:
        with kept_buffers(attached.model):
            for training in (True, False):
                attached.train(training)
                dead = _dead(attached.model, layers, features, tries=_TRIES if training else 1)
                dead = dead or ([] if training else _uncalled(layers, features))
                if dead:
                    mode = "train" if training else "eval"
                    raise GraftError(
                        f"{len(dead)} of {len(layers)} adapters are dead in {mode} mode: the backbone never uses them "
                        f"({', '.join(_short(dead))}). Choose other roles with 'on'."
                    )
    finally:
        attached.train(was_training)


def _dead(model: nn.Module, layers: dict[str, Any], features: Callable[[], Tensor], tries: int) -> list[str]:
    """Return the layers that no try called with a gradient; stochastic depth may skip a layer in one of them."""
    dead = list(layers)
    for attempt in range(tries):
        try:
            with _calls(layers) as called, torch.random.fork_rng(devices=[]):
                torch.manual_seed(attempt)
                output = features()
                if output.requires_grad:
                    (output * torch.randn_like(output)).sum().backward()
            dead = [name for name in dead if name not in called or not _has_gradient(layers[name])]
        finally:
            model.zero_grad(set_to_none=True)
        if not dead:
            break
    return dead


def _uncalled(layers: dict[str, Any], features: Callable[[], Tensor]) -> list[str]:
    """Return the layers that an evaluation does not call; fused kernels run only where no gradient is wanted."""
    with _calls(layers) as called, torch.random.fork_rng(devices=[]), torch.no_grad():
        features()
    return [name for name in layers if name not in called]


@contextlib.contextmanager
def _calls(layers: dict[str, Any]) -> Generator[set[str]]:
    """Note which layers are called. No hooks: torch's fused kernels step aside where a module has one."""
    called: set[str] = set()
    before = {name: layer.__dict__.get("forward") for name, layer in layers.items()}

    def noting(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            called.add(name)
            return forward(*args, **kwargs)

        return run

    for name, layer in layers.items():
        layer.forward = noting(name, layer.forward)
    try:
        yield called
    finally:
        for name, layer in layers.items():
            if before[name] is None:
                del layer.forward
            else:
                layer.forward = before[name]


def _has_gradient(layer: nn.Module) -> bool:
    """Whether a gradient arrived; a layer that only hands on what another one trains has nothing to get one.

    Where a layer trains few of its weights, one batch may give all of them a zero.
    """
    trained = [p for p in layer.parameters() if p.requires_grad]
    arrived = [p.grad for p in trained if p.grad is not None]
    few = getattr(layer, "few_weights", False)
    return not trained or (bool(arrived) if few else any(bool(grad.any()) for grad in arrived))


def _short(names: list[str], most: int = 3) -> list[str]:
    shown = [name.removeprefix("base_model.model.") for name in names[:most]]
    return shown if len(names) <= most else [*shown, "..."]
