"""Methods built on adapters that other runs have exported."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast, get_args

from common.errors import GraftError
from common.methods._base import MethodSpec, Plan, exact
from common.methods._folders import exported, require_base, stored
from common.methods.additive import Houlsby, Pfeiffer
from common.methods.hybrid import Composed, as_spec, configs_of, joined, refuse_loners

if TYPE_CHECKING:
    from torch import Tensor, nn

    from common.roles import RoleMap

Stays = Literal["frozen", "trainable", "merged"]


@dataclass(frozen=True, kw_only=True)
class Stack(Composed):
    """A second method above a trained adapter, such as a task's above a domain's (Gema et al. 2023, arXiv 2307.03042).

    y = g(f(x)) at a module that both act on, f the layer with the first adapter as it was exported and g the second
    method's change of that, new; elsewhere each acts alone. For LoRA on LoRA it is W x + s1 B1 A1 x + s2 B2 A2 x. The
    first adapter's `graft export` folder names its method; of that run's head and pooling nothing is taken over. The
    source adapts a language model to clinical notes (the first) and then to a task (the second), and the first one
    helps only where it stays trainable. Trainable parameters: the second method's, and the first's if trainable. The
    start is the backbone with the first adapter; disabled, it is the backbone alone, bit for bit. One adapter folder
    comes out, which holds both; a run needs the first one's folder until then. Two trained adapters of a backbone for
    which nothing is to be trained any more are combined by `graft combine` instead.

    A second method that computes layers from their frozen weights (SSF, BitFit, OFT, ...) would pass over a first one
    at the same layer and is refused there, unless the first one is merged. Merged, the first lies in the weights while
    the adapter is enabled and is taken out, bit for bit, when it is disabled; so any second method acts on weights that
    hold it, and no step pays for it. It needs a first method that merges, in layers that are not quantised. It is kept
    as an adapter in the file, so that this stands on the backbone's own weights. Both merge for good where both merge.

    Args:
        first: The first adapter's folder.
        first_stays: `trainable` trains both, `frozen` the second alone, `merged` too with the first in the weights.
        then: The second method, with `class_path` and `init_args` as in a recipe's `peft:` block.
        first_method: The first method; it is read from the folder.
        first_digest: SHA-256 of the first one's tensors; it is read from the folder.
        base_digest: SHA-256 of the weights that the first one was trained on; it is read from the folder.
    """

    summary: ClassVar[str] = "a second method above an exported adapter"
    source: ClassVar[str] = "arXiv 2307.03042"
    needs_adapters: ClassVar[bool] = True

    first: str = ""
    first_stays: Stays = "trainable"
    then: MethodSpec | None = None
    first_method: MethodSpec | None = None
    first_digest: str = ""
    base_digest: str = ""

    def __post_init__(self) -> None:
        """Read the folder, once: an exported record holds what it said."""
        found: dict[str, Any] = {"then": self.then, "first_method": self.first_method}
        if self.first and self.first_method is None:
            folder = exported(self.first, "Stack")
            found |= {
                "first_method": folder.method,
                "first_digest": folder.digest,
                "base_digest": folder.base_digest,
            }
        for name, value in found.items():
            built = as_spec(value, f"Stack {name}") if name in _METHODS and value is not None else value
            object.__setattr__(self, name, built)

    @property
    def alone(self) -> str:
        """See the base class."""
        return "it is built on an exported adapter"

    def plan(self, model: nn.Module, roles: RoleMap | None) -> Plan:
        """Plan both methods; see the base class."""
        from common.tuners import StackConfig

        first, then = self._checked()
        require_base(model, self.base_digest, self.first, "Stack")
        own = dataclasses.replace(first.plan(model, roles), looks=())
        plans = [(type(first).__name__, own), (type(then).__name__, then.plan(model, roles))]
        if plans[1][1].looks:
            raise GraftError(
                f"Stack cannot hold {plans[1][0]} as it is set: it looks at what the bare backbone does, not at what "
                "the first adapter makes of it. Choose another method."
            )
        if self.first_stays == "merged" and any(plan.quantise for _, plan in plans):
            raise GraftError("Stack cannot merge the first adapter into quantised weights. Choose frozen or trainable.")
        config = StackConfig(parts=cast("Any", configs_of("Stack", plans)), first_stays=self.first_stays)
        object.__setattr__(config, "start", functools.partial(stored, self.first, self.first_digest, "Stack"))
        note = f"The first adapter is {plans[0][0]} of {self.first}, {self.first_stays}; its head is not used."
        plan = joined("Stack", plans, config)
        return dataclasses.replace(plan, notes=(note, *plan.notes))

    def _checked(self) -> tuple[MethodSpec, MethodSpec]:
        """Return both methods, or say what is missing or does not go together."""
        if self.first_method is None or self.then is None:
            what = "first adapter. Give 'first', a folder that `graft export` wrote"
            what = what if self.first_method is None else "second method. Give 'then', with class_path and init_args"
            raise GraftError(f"Stack has no {what}.")
        if self.first_stays not in get_args(Stays):
            raise GraftError(f"Stack first_stays is '{self.first_stays}'; give one of {', '.join(get_args(Stays))}.")
        if self.first_method.needs_adapters:
            raise GraftError(
                f"Stack: '{self.first}' is of {type(self.first_method).__name__}, which is built on adapters itself. "
                "Give an adapter of one method."
            )
        refuse_loners("Stack", [self.then, *([self.first_method] if self.first_stays == "trainable" else [])])
        for method in (self.first_method, self.then):
            name = type(method).__name__
            if not method.recomputable:
                raise GraftError(f"Stack cannot hold {name}: it acts on all blocks together. Choose another method.")
            start = getattr(method, "init", "")
            if start in ("pissa", "olora"):
                raise GraftError(
                    f"Stack cannot hold {name} with init '{start}', which moves a part of the weight into the adapter. "
                    "Choose another init."
                )
        return self.first_method, self.then


_METHODS = ("then", "first_method")


@dataclass(frozen=True, kw_only=True)
class AdapterFusion(Composed):
    """Attention over several trained bottleneck adapters (AdapterFusion; Pfeiffer et al. 2021, arXiv 2005.00247).

    At each layer behind which the N adapters stand, h (..., d) its output: z_n = s_n (U_n act(D_n h + b_n) + c_n) as
    `Houlsby` and `Pfeiffer` export them, frozen, and h + sum_n p_n V z_n with p = softmax_n((Q h + a) . (K z_n + b)): a
    query of the layer's output, keys and values of the adapters' outputs, at each token (or position) by itself. Q, K
    and V have the shape (d, d), a and b (d,). Q and K start from noise (0.02), a and b at 0, and V at the identity with
    noise of 1e-6 beside the diagonal, so that the start is nearly the adapters' mean, and is not the bare backbone. As
    in the paper, V is held near the identity: `value_penalty` times |V - I|^2 is added to the loss (the paper's weight
    is 0.01). Trainable parameters: 3 d^2 + 2 d for each layer, more than the adapters' own. Where several source
    tasks have adapters on one backbone and a task with few labels should use what it can of each; heads are not taken
    over. One adapter folder comes out, which holds all; a run needs the N folders until then. Cannot be merged.

    Args:
        adapters: Folders that `graft export` wrote of `Houlsby` or `Pfeiffer`, two or more, at the same layers.
        value_penalty: Weight of |V - I|^2 in the loss.
        methods: The adapters' methods; they are read from the folders.
        digests: SHA-256 of each one's tensors; they are read from the folders.
        base_digest: SHA-256 of the weights that all were trained on; it is read from the folders.
    """

    summary: ClassVar[str] = "attention over several exported bottleneck adapters"
    source: ClassVar[str] = "arXiv 2005.00247"
    needs_adapters: ClassVar[bool] = True

    adapters: list[str] = field(default_factory=list)
    value_penalty: float = 0.01
    methods: list[MethodSpec] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    base_digest: str = ""

    def __post_init__(self) -> None:
        """Read the folders, once: an exported record holds what they said."""
        methods: list[Any] = list(self.methods)
        if self.adapters and not methods:
            folders = [exported(folder, "AdapterFusion") for folder in self.adapters]
            for name, other in zip(self.adapters, folders, strict=True):
                if other.base_digest != folders[0].base_digest:
                    raise GraftError(
                        f"AdapterFusion: '{name}' was trained on other weights than '{self.adapters[0]}'. Give "
                        "adapters of one backbone."
                    )
            methods = [folder.method for folder in folders]
            object.__setattr__(self, "digests", [folder.digest for folder in folders])
            object.__setattr__(self, "base_digest", folders[0].base_digest)
        built = [as_spec(method, f"AdapterFusion adapter {i}") for i, method in enumerate(methods, 1)]
        object.__setattr__(self, "methods", built)

    @property
    def alone(self) -> str:
        """See the base class."""
        return "it adds a penalty to the loss of the whole run"

    def penalty(self, model: nn.Module) -> Tensor | None:
        """Return how far the value maps are from the identity, weighted."""
        from common.tuners.fusion import distance_from_identity

        far = distance_from_identity(model)
        return None if far is None or not self.value_penalty else self.value_penalty * far

    def plan(self, model: nn.Module, roles: RoleMap | None) -> Plan:
        """Plan the adapters' layers; see the base class."""
        from common.tuners import FusionConfig

        if len(self.methods) < 2:
            raise GraftError(
                f"AdapterFusion has {len(self.methods)} adapters. Give two or more folders that `graft export` wrote "
                "of Houlsby or Pfeiffer."
            )
        if self.value_penalty < 0:
            raise GraftError(f"AdapterFusion value_penalty is {self.value_penalty}; give 0 or more.")
        for folder, method in zip(self.adapters, self.methods, strict=True):
            if not isinstance(method, (Houlsby, Pfeiffer)):
                raise GraftError(
                    f"AdapterFusion: '{folder}' is of {type(method).__name__}. Give adapters of Houlsby or Pfeiffer."
                )
        require_base(model, self.base_digest, self.adapters[0], "AdapterFusion")
        plans = [method.plan(model, roles) for method in self.methods]
        for folder, plan in zip(self.adapters, plans, strict=True):
            if plan.targets != plans[0].targets:
                other = sorted(plan.targets.keys() ^ plans[0].targets.keys())
                raise GraftError(
                    f"AdapterFusion: '{folder}' and '{self.adapters[0]}' stand at other layers "
                    f"({', '.join(other[:3])}). Give adapters of the same layers."
                )
        bottlenecks = [
            {"width": method.width, "scale": method.scale, "activation": method.activation}
            for method in cast("list[Houlsby]", self.methods)
        ]
        config = FusionConfig(target_modules=exact(list(plans[0].targets)), bottlenecks=bottlenecks)
        object.__setattr__(config, "start", self._tensors)
        note = f"Fuses {', '.join(self.adapters)}; their heads are not used."
        return Plan(peft_config=config, targets=plans[0].targets, notes=(note,))

    def _tensors(self) -> list[dict[str, Tensor]]:
        return [stored(*each, "AdapterFusion") for each in zip(self.adapters, self.digests, strict=True)]
