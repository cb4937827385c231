"""Share what a run learned: an adapter folder that plain `peft` loads, with head, card and certificate; and merging.

An adapter folder holds `adapter_config.json` and `adapter_model.safetensors` (the format of Hugging Face PEFT),
`head.safetensors`, `graft.json` (what it belongs to), `certificate.json` (how exactly it reloads and merges, measured),
`probe.safetensors` (outputs that any copy has to give again) and `README.md` (the model card). A linear probe has no
adapter files; full fine-tuning has `model.safetensors` instead.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn

from common import __version__
from common import card as model_card
from common.attach import Attached, attach, state_digest, tuner_layers
from common.checkpoint import read_finished
from common.domain import Domain
from common.errors import GraftError, unknown
from common.methods import METHODS, MethodSpec, Plan
from common.methods._folders import ADAPTER, GRAFT
from common.quantise import quantise
from common.roles import resolve

if TYPE_CHECKING:
    from common.task import AdaptedTask, Backbone

HEAD, MODEL, PROBE = "head.safetensors", "model.safetensors", "probe.safetensors"
ADAPTER_CONFIG, CERTIFICATE = "adapter_config.json", "certificate.json"
RELOAD_TOLERANCE, MERGE_TOLERANCE = 1e-5, 1e-4


def adapter_state(task: AdaptedTask) -> dict[str, Tensor]:
    """Return the tensors that an export shares beside the head: the adapter's, or the whole model's, or none."""
    from peft import PeftModel, get_peft_model_state_dict

    if isinstance(task.backbone, PeftModel):
        return get_peft_model_state_dict(task.backbone, save_embedding_layers=False)
    return dict(task.backbone.state_dict()) if task.attached.plan.mode == "full" else {}


def adapter_bytes(task: AdaptedTask) -> dict[str, int]:
    """Return the file sizes of a task's adapter, head and bare backbone, as safetensors."""
    shared = _plain(adapter_state(task))
    if starts_from_the_weight(task.peft):  # the export holds the start beside the trained factors
        shared = {name: torch.cat((tensor, tensor)) for name, tensor in shared.items()}
    backbone = sum(size for size, _ in task.attached.params_by_role.values()) * 4
    return {
        "adapter_bytes": len(save(shared)) if shared else 0,
        "head_bytes": len(save(_plain(task.head.state_dict()))),
        "backbone_bytes": backbone,
    }


def _plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors as safetensors takes them: contiguous, none sharing memory (tied weights are written twice)."""
    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in state.items():
        whole = tensor.detach().contiguous()
        plain[name] = whole.clone() if whole.untyped_storage().data_ptr() in seen else whole
        seen.add(whole.untyped_storage().data_ptr())
    return plain


def starts_from_the_weight(spec: MethodSpec) -> bool:
    """Whether the method moves part of the weight into the adapter, so that an export must move it back."""
    return getattr(spec, "init", "default") in ("pissa", "olora")


def rebuild(record: Mapping[str, Any], domains: Mapping[str, Domain]) -> AdaptedTask:
    """Build the task that a run's record or an adapter's `graft.json` describes, not yet assembled.

    Only names are read from the file; classes come from the registered domains and methods.

    Raises:
        GraftError: A domain, task or method that is not registered here, or settings that it does not have.
    """
    try:
        return _rebuild(record, domains)
    except (KeyError, TypeError, AttributeError) as error:
        raise GraftError(
            f"The record does not describe a task of Graft {__version__} ({error}). It was written by another version "
            "or changed by hand; export the adapter again."
        ) from error


def _rebuild(record: Mapping[str, Any], domains: Mapping[str, Domain]) -> AdaptedTask:
    from common.task import OptimSpec

    if record.get("domain") not in domains:
        raise unknown("domain", str(record.get("domain")), domains)
    cls = domains[record["domain"]].load_task(record["task"])
    method = record["method"]
    if method["class_path"] not in METHODS:
        raise unknown("method", method["class_path"], METHODS)
    spec: MethodSpec = METHODS[method["class_path"]](**method["init_args"])
    task = cls(**record["settings"], peft=spec, optim=OptimSpec(**record["optim"]), seed=record["seed"])
    task.load_facts(record["facts"])
    return task


def restore(run: Path, record: Mapping[str, Any], domains: Mapping[str, Domain]) -> AdaptedTask:
    """Build a finished run's task with its trained state, in eval mode."""
    task = rebuild(record, domains)
    task.assemble()
    if task.attached.base_digest != record["base_digest"]:
        raise GraftError(_wrong_base(task.backbone_name, record["base_digest"], task.attached.base_digest))
    task.load_trained(read_finished(run, record["cost"]["steps"])["state_dict"])
    task.eval()
    return task


def export(run: Path, out: Path, record: Mapping[str, Any], domains: Mapping[str, Domain]) -> dict[str, Any]:
    """Write a finished run's adapter folder.

    Args:
        run: The run's folder.
        out: The folder to make; it must not exist.
        record: The run's `metrics.json`.
        domains: The registered domains.

    Returns:
        The certificate: max absolute difference of the outputs after reload with plain `peft`, and after merging.

    Raises:
        GraftError: `out` exists, the run is not finished, or the reload is not exact (nothing is left then).
    """
    task = restore(run, record, domains)
    with new_folder(out) as folder:
        write_adapter(task.attached, folder, lambda: fresh(task).backbone)
        save_file(_plain(task.head.state_dict()), folder / HEAD)
        identity = {
            k: record[k] for k in ("domain", "task", "settings", "facts", "method", "optim", "seed", "base_digest")
        }
        write_json(folder / GRAFT, {"schema": 1, "graft": __version__, **identity, "backbone": record["backbone"]})
        certificate = _certify(task, folder, domains)
        write_json(folder / CERTIFICATE, certificate)
        (folder / "README.md").write_text(model_card.render(record, certificate, task.usage()))
    return certificate


def write_adapter(attached: Attached, folder: Path, start: Callable[[], nn.Module]) -> None:
    """Write a trained method's tensors into a folder: PEFT's format, a whole model, or nothing for a frozen backbone.

    Args:
        attached: The backbone with its trained method.
        folder: An existing folder.
        start: Builds the attached model as it was before training, where the adapter began as a part of the weight.
    """
    from peft import PeftModel

    model = attached.model
    if isinstance(model, PeftModel):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT warns that it finds no hub config, which a timm model never has
            if starts_from_the_weight(attached.spec):
                with tempfile.TemporaryDirectory() as before:
                    cast("PeftModel", start()).save_pretrained(before, save_embedding_layers=False)
                    model.save_pretrained(
                        str(folder), save_embedding_layers=False, path_initial_model_for_weight_conversion=before
                    )
            else:
                model.save_pretrained(str(folder), save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)
    elif attached.plan.mode == "full":
        save_file(_plain(model.state_dict()), folder / MODEL)


def fresh(task: AdaptedTask, peft: MethodSpec | None = None) -> AdaptedTask:
    """Build the task again as it was before training, with its own method or another one."""
    built = type(task)(**task.settings, peft=peft or task.peft, optim=task.optim, seed=task.seed)
    built.load_facts(task.describe_facts())
    built.assemble()
    return built


def _certify(task: AdaptedTask, folder: Path, domains: Mapping[str, Domain]) -> dict[str, Any]:
    batch = task.example_batch()
    reloaded = load(folder, domains)
    with torch.no_grad():
        expected = task(batch)
        reload_error = float((reloaded(batch) - expected).abs().max())
    if reload_error > RELOAD_TOLERANCE:
        raise GraftError(
            f"The export does not reload exactly: outputs differ by {reload_error:.1e}, {RELOAD_TOLERANCE:.0e} is "
            "allowed. Nothing was written."
        )
    merge_error, reason = _try_merge(reloaded, batch, expected)
    save_file({"outputs": probe_values(expected)}, folder / PROBE)
    return {
        "base_digest": task.attached.base_digest,
        "reload_max_abs_error": reload_error,
        "merge_max_abs_error": merge_error,
        "not_mergeable": reason,
        "inputs": "seeded random batch",
        "versions": _versions(),
    }


def probe_values(outputs: Tensor) -> Tensor:
    """Return at most 4,096 of the outputs for the example batch, evenly spread: what a folder keeps of them."""
    flat = outputs.detach().flatten()
    return flat[:: -(-len(flat) // 4096)].float().clone()


def _try_merge(task: AdaptedTask, batch: Any, expected: Tensor) -> tuple[float | None, str | None]:  # noqa: ANN401
    try:
        task.backbone = merged_backbone(task)
    except GraftError as error:
        return None, str(error)
    with torch.no_grad():
        return float((task(batch) - expected).abs().max()), None


def load(folder: Path, domains: Mapping[str, Domain]) -> AdaptedTask:
    """Load an adapter folder onto its backbone, ready to predict, in eval mode.

    Raises:
        GraftError: Not an adapter folder, another base model, or missing or unexpected tensors.
    """
    if not (folder / GRAFT).is_file():
        raise GraftError(
            f"{folder} is not an adapter folder ({GRAFT} is missing). Write one with `graft export RUN OUT`."
        )
    try:
        record = json.loads((folder / GRAFT).read_text())
    except ValueError as error:
        raise GraftError(f"{folder / GRAFT} is damaged: {error}. Export the adapter again.") from error
    task = rebuild(record, domains)
    task.assemble(lambda built: attach_folder(built, task.peft, folder, record.get("base_digest", "")))
    _load_exactly(task.head, _read(folder / HEAD), "head")
    task.eval()
    return task


def attach_folder(built: Backbone, spec: MethodSpec, folder: Path, digest: str) -> Attached:
    """Put a folder's adapter onto the bare backbone with PEFT's own loader, and check that it took.

    Args:
        built: The bare backbone.
        spec: The method that the folder is of.
        folder: The adapter folder.
        digest: The digest of the weights that it was trained on.

    Raises:
        GraftError: Another base model, another configuration, or missing or unexpected tensors.
    """
    from peft import PeftModel, get_peft_model_state_dict

    import common.tuners  # noqa: F401  (registers the tuner types that PEFT lacks)

    own = state_digest(built.model)
    if own != digest:
        raise GraftError(_wrong_base(built.name, digest, own))
    if not (folder / ADAPTER).is_file():
        attached = attach(built.model, spec, built.family, name=built.name)
        if attached.plan.peft_config is not None:
            raise GraftError(
                f"{folder} has no {ADAPTER}, which a {type(spec).__name__} adapter needs. Export it again."
            )
        if attached.plan.mode == "full":
            _load_exactly(attached.model, _read(folder / MODEL), "model")
        return attached
    roles = resolve(built.model, built.family) if built.family else None
    plan = spec.plan(built.model, roles)
    base_params = sum(p.numel() for p in built.model.parameters())
    stored = _read(folder / ADAPTER)
    _check_config(folder, spec, plan)
    quantise(built.model, plan.quantise)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # missing keys only warn in PEFT; they are checked below instead
        try:
            model = PeftModel.from_pretrained(built.model, str(folder))
        except RuntimeError as error:
            raise GraftError(f"{folder / ADAPTER} does not fit: {' '.join(str(error).split())}") from error
    own_keys = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    _compare_keys(set(stored), own_keys, str(folder / ADAPTER))
    return Attached(model=model, spec=spec, plan=plan, roles=roles, base_digest=digest, base_params=base_params)


def _check_config(folder: Path, spec: MethodSpec, plan: Plan) -> None:
    """Refuse a PEFT configuration that is not the method's: PEFT would load another scale or target without a word."""
    try:
        given = json.loads((folder / ADAPTER_CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise GraftError(f"{folder / ADAPTER_CONFIG} is missing or damaged. Export the adapter again.") from error
    wanted = plan.peft_config.to_dict() if plan.peft_config else {}
    wanted = json.loads(json.dumps(wanted, default=sorted))  # sets as PEFT writes them
    free = {"base_model_name_or_path", "inference_mode", "peft_version", "auto_mapping"}
    if starts_from_the_weight(spec):  # exported as plain LoRA of twice the rank
        free |= {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "init_lora_weights", "use_rslora"}
    wrong = sorted(key for key in given if key not in free and given[key] != wanted.get(key))
    if wrong:
        raise GraftError(
            f"{folder / ADAPTER_CONFIG} does not say what {GRAFT} says ({', '.join(wrong)}). Export the adapter again."
        )


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise GraftError(f"{path} is missing or damaged. Export the adapter again.") from error


def _load_exactly(module: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    own = module.state_dict()
    _compare_keys(set(state), set(own), what)
    wrong = [name for name in sorted(own) if state[name].shape != own[name].shape]
    if wrong:
        raise GraftError(f"{what} does not fit: {', '.join(wrong[:3])} have other shapes. Export it again.")
    module.load_state_dict(dict(state))


def _compare_keys(stored: set[str], expected: set[str], what: str) -> None:
    if stored != expected:
        missing, unexpected = sorted(expected - stored), sorted(stored - expected)
        raise GraftError(
            f"{what} does not fit: {len(missing)} tensors missing ({', '.join(missing[:3])}), "
            f"{len(unexpected)} unexpected ({', '.join(unexpected[:3])}). Export it again."
        )


def merged_backbone(task: AdaptedTask) -> nn.Module:
    """Return the plain backbone with the adapter merged into its weights; the task's own model is used up.

    Raises:
        GraftError: The method cannot be merged on this backbone; the message says why.
    """
    if bits := set(task.attached.plan.quantise.values()):
        raise GraftError(
            f"{type(task.peft).__name__} cannot be merged on {task.backbone_name}: its weights are held in "
            f"{', '.join(bits)}, and rounding them again would change the outputs. Load the adapter on the whole "
            "weights and merge there."
        )
    return merged(task.backbone, type(task.peft).__name__, task.backbone_name)


def merged(model: nn.Module, method: str, backbone: str) -> nn.Module:
    """Merge a model's adapter into the weights, and return the plain model; the given one is used up.

    Args:
        model: The model, with adapters or without.
        method: Name of the method, for the message.
        backbone: Name of the backbone, for the message.

    Raises:
        GraftError: The method cannot be merged on this backbone; the message says why.
    """
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        return model
    base = model.get_base_model()
    try:
        # PEFT's own merge_and_unload needs every replaced module to have a `weight`, which a block has not.
        # From the inside out: an outer layer is merged into what an inner one left.
        for name, layer in reversed(tuner_layers(base).items()):
            layer.merge(safe_merge=True)
            parent, _, child = name.rpartition(".")
            setattr(base.get_submodule(parent), child, layer.get_base_layer())
    except (NotImplementedError, ValueError, RuntimeError, AttributeError) as error:
        raise GraftError(f"{method} cannot be merged on {backbone}: {error}") from error
    return base


def merge(folder: Path, out: Path, domains: Mapping[str, Domain]) -> float:
    """Write an adapter folder's model as plain weights: `model.safetensors` (the library's own names) and the head.

    Returns:
        Max absolute difference of the outputs, merged against unmerged, on a seeded random batch.

    Raises:
        GraftError: `out` exists, the method cannot be merged, or the difference exceeds the tolerance.
    """
    task = load(folder, domains)
    batch = task.example_batch()
    with torch.no_grad():
        expected = task(batch)
        task.backbone = merged_backbone(task)
        error = float((task(batch) - expected).abs().max())
    if error > MERGE_TOLERANCE:
        raise GraftError(
            f"Merging changes the outputs by {error:.1e} (allowed {MERGE_TOLERANCE:.0e}); nothing was written."
        )
    with new_folder(out) as place:
        save_file(_plain(task.backbone.state_dict()), place / MODEL)
        shutil.copy(folder / HEAD, place / HEAD)
        shutil.copy(folder / GRAFT, place / "source.json")
        write_json(place / CERTIFICATE, {"merge_max_abs_error": error, "versions": _versions()})
    return error


class new_folder:
    """Fill a folder beside its final name and move it there when all went well; else leave nothing."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def __enter__(self) -> Path:
        if self.out.exists():
            raise GraftError(f"{self.out} exists already. Choose another folder, or remove it first.")
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.folder = Path(tempfile.mkdtemp(dir=self.out.parent, prefix=f".{self.out.name}."))
        except OSError as error:
            raise GraftError(f"{self.out} cannot be written: {error.strerror}. Choose another folder.") from error
        return self.folder

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is None:
            self.folder.chmod(0o755)
            self.folder.replace(self.out)
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        if isinstance(error, (OSError, SafetensorError)):
            reason = getattr(error, "strerror", None) or str(error)
            raise GraftError(f"{self.out} could not be written: {reason}. Nothing was left.") from error


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write one of the folder's JSON files."""
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {"graft": __version__, "torch": torch.__version__, "peft": version("peft")}


def _wrong_base(name: str, expected: str, found: str) -> str:
    return (
        f"This adapter was trained on other weights of '{name}': digest {expected[:12]} expected, {found[:12]} found. "
        "Use the backbone that the run was trained on."
    )
