"""Outputs of what never trains, computed once: a cache of any frozen prefix (a ViT, an ESM, a Whisper encoder).

A row is what a prefix makes of one item. It is found by the content of that item (`content`), never by a position or a
file's name, under a key of all else that it depends on: weights and buffers of the prefix, its layout and
configuration, Graft's code, versions of libraries, device, threads, precision. Each row is computed alone, without
neighbours or padding, so that it is a function of its item: it does not matter which run, epoch or batch came first.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import sys
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from random import SystemRandom
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._python_dispatch import _disable_current_modes

from common import __version__
from common._row_store import IDENTITY, RowStore
from common.attach import tuner_layers
from common.errors import GraftError

Row = tuple[Tensor, ...]

_FORMAT = "1"
_PACKAGES = ("torch", "torchvision", "torchaudio", "timm", "transformers", "monai", "fair-esm", "numpy")
_ALIGN = 64  # bytes; a tensor's data begin at a multiple of it
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8)
} | {"bool": torch.bool}
# Attributes in which layers keep the share of what they drop at random while they train.
_CHANCES = ("dropout", "drop_prob", "drop_path", "layerdrop", "attention_dropout", "activation_dropout", "attn_drop")
# A stored row and the same row computed again may differ by this share of its largest value (another library's kernel).
_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 4e-2}


@dataclass(frozen=True, kw_only=True)
class FrozenPrefix:
    """The part of a task whose outputs are kept.

    Attributes:
        modules: All modules that compute a row, by name. Nothing in them trains, carries an adapter or is random.
        transform: What else shapes a row and is neither weight nor input: sizes, normalisation, which output is
            taken. Plain values.
        half: Keep float32 rows as float16, in half the space. Without it a row is kept exactly.
    """

    modules: Mapping[str, nn.Module]
    transform: Mapping[str, Any]
    half: bool = False


def content(*tensors: Tensor) -> bytes:
    """Return the digest of tensors by type, shape and values: what identifies an item.

    Args:
        *tensors: All that the prefix reads of the item, without padding; on the CPU is quickest.
    """
    digest = hashlib.blake2b(digest_size=IDENTITY)
    for tensor in tensors:
        digest.update(f"{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(_bytes(tensor))
    return digest.digest()


class FrozenRows:
    """The outputs of a frozen prefix, out of the cache or computed.

    The rows lie in `$GRAFT_CACHE/frozen` (`common/_row_store.py`), and any number of processes may use them at once.

    Args:
        prefix: What computes them.
        owner: The object whose code runs the prefix; the source files of its class belong to the key.

    Raises:
        GraftError: The prefix trains, carries adapters, or its parameters are spread over processes.
    """

    def __init__(self, prefix: FrozenPrefix, owner: object) -> None:
        refuse_trained(prefix.modules)
        self.prefix = prefix
        self._fixed = {
            "format": _FORMAT,
            "graft": __version__,
            "code": _code_digest(type(owner)),
            "task": type(owner).__qualname__,
            "transform": json.dumps(dict(prefix.transform), sort_keys=True),
            "half": str(prefix.half),
        }
        self._stores: dict[tuple[str, ...], RowStore] = {}
        self._seen: tuple[Any, ...] = ()
        self._weights = ""
        self._proven: set[tuple[RowStore, bool]] = set()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_stores": {}, "_proven": set()}  # files do not travel to another process

    def rows(self, identities: Sequence[bytes], compute: Callable[[int], Row]) -> list[Row]:
        """Return the rows of some items, on the prefix's device.

        Args:
            identities: What identifies each item; see `content`.
            compute: Runs the prefix on the item at a position of `identities`, as a batch of that item alone and
                without padding, and returns its outputs without the batch dimension.

        Raises:
            GraftError: The prefix is not frozen, its outputs are random, or a stored row is not what it computes.
        """
        store = self._store()
        self._prove(store, identities, compute)
        positions = {identity: position for position, identity in reversed([*enumerate(identities)])}
        order = list(positions)
        if any(identity not in store for identity in order):
            # Processes that begin together read the same batches: each takes an order of its own and looks at what
            # others have added meanwhile, so that they share the work.
            SystemRandom().shuffle(order)
        device = self._device()
        rows: dict[bytes, Row] = {}
        for identity in order:
            if identity not in store:
                store.refresh()
            found = store.get(identity)
            row = _decode(*found) if found else self._add(store, identity, self._alone(compute, positions[identity]))
            rows[identity] = tuple(tensor.to(device) for tensor in row)
        return [rows[identity] for identity in identities]

    # ---- computing

    def _alone(self, compute: Callable[[int], Row], position: int) -> Row:
        # Out of sight of a counter of FLOPs: what a step costs does not depend on what the cache held before.
        with torch.no_grad(), _evaluating(self.prefix.modules.values()), _disable_current_modes():
            return tuple(tensor.detach() for tensor in compute(position))

    def _add(self, store: RowStore, identity: bytes, row: Row) -> Row:
        """Store a row; return it as it will be read."""
        description, body = _encode(row, half=self.prefix.half)
        store.put(identity, description, body)
        return _decode(description, memoryview(bytearray(body)))

    def _device(self) -> torch.device:
        return next((t.device for _, t in _tensors(self.prefix.modules)), torch.device("cpu"))

    # ---- checks

    def _prove(self, store: RowStore, identities: Sequence[bytes], compute: Callable[[int], Row]) -> None:
        """Once a store and mode: nothing trains, nothing is random, and a stored row is what is computed now."""
        training = any(m.training for module in self.prefix.modules.values() for m in module.modules())
        if (store, training) in self._proven or not identities:
            return
        refuse_trained(self.prefix.modules)
        fresh = self._alone(compute, 0)
        if not torch.is_inference_mode_enabled():
            with torch.enable_grad(), _evaluating(self.prefix.modules.values()), _disable_current_modes():
                if any(tensor.requires_grad for tensor in compute(0)):
                    raise GraftError(
                        f"The outputs of {_named(self.prefix.modules)} depend on parameters that train outside of it; "
                        "they cannot be cached. Turn the cache off, or adapt only what comes behind."
                    )
        if training:
            refuse_random(self.prefix.modules)
            with torch.no_grad(), torch.random.fork_rng(), _disable_current_modes():
                torch.manual_seed(1)
                _compare(compute(0), fresh, f"{_named(self.prefix.modules)} computes something else while it trains")
        stored = store.get(identities[0])
        if stored is not None:
            _compare(_decode(*stored), fresh, f"{store.folder} holds rows that this backbone does not compute")
        self._proven.add((store, training))

    # ---- the key

    def _store(self) -> RowStore:
        seen = tuple(
            (t.data_ptr(), -1 if t.is_inference() else t._version, t.requires_grad)
            for _, t in _tensors(self.prefix.modules)
        )
        if seen != self._seen:  # first use, moved, or changed in place
            refuse_trained(self.prefix.modules)
            self._weights, self._seen = _state_digest(self.prefix.modules), seen
        context = _context(self._device())
        found = (self._weights, *context.values())
        if found not in self._stores:
            layout = _layout(self.prefix.modules)
            versions = _versions(self.prefix.modules)
            self._stores[found] = RowStore(
                {**self._fixed, "weights": self._weights, "layout": layout, "versions": versions, **context}
            )
        return self._stores[found]


def refuse_trained(modules: Mapping[str, nn.Module]) -> None:
    """Refuse a prefix that changes while a run lasts.

    Raises:
        GraftError: Adapters, trained parameters or parameters spread over processes, by name.
    """
    from torch.distributed.tensor import DTensor

    for name, module in modules.items():
        adapted = [f"{name}.{inner}" for inner in tuner_layers(module)]
        trained = [f"{name}.{inner}" for inner, parameter in module.named_parameters() if parameter.requires_grad]
        if adapted or trained:
            what = f"adapters ({adapted[0]}, ...)" if adapted else f"parameters that train ({trained[0]}, ...)"
            raise GraftError(
                f"The outputs of '{name}' cannot be cached: it has {what}. Turn the cache off, or choose a method that "
                "leaves it alone."
            )
        if any(isinstance(parameter, DTensor) for parameter in module.parameters()):
            raise GraftError(
                f"The outputs of '{name}' cannot be cached while its parameters are spread over processes. Turn the "
                "cache off, or train with DDP."
            )


def refuse_random(modules: Mapping[str, nn.Module]) -> None:
    """Refuse a prefix that drops or measures something while it trains: its output is another one each time.

    Raises:
        GraftError: It names the first such module.
    """
    for name, module in modules.items():
        for inner, child in module.named_modules():
            chances = [getattr(child, chance, 0) for chance in _CHANCES]
            chances += [child.p] if isinstance(child, nn.modules.dropout._DropoutNd) else []
            random = any(isinstance(chance, (int, float)) and chance > 0 for chance in chances)
            if child.training and (random or isinstance(child, _NormBase)):
                raise GraftError(
                    f"The outputs of '{name}' cannot be cached: '{inner or name}' ({type(child).__name__}) makes them "
                    "differ from step to step while training. Turn the cache off, or turn its dropout off."
                )


def _compare(found: Row, fresh: Row, what: str) -> None:
    """Refuse rows that are not, but for rounding, what was just computed."""
    fits = len(found) == len(fresh)
    for a, b in zip(found, fresh, strict=False):
        if a.shape != b.shape or a.dtype != b.dtype:
            fits = False
            break
        a, b = a.detach().cpu().double(), b.detach().cpu().double()
        allowed = max(_TOLERANCE.get(t.dtype, 0.0) for t in (found[0], fresh[0]))
        largest = float(b.nan_to_num(0, 0, 0).abs().max()) if b.numel() else 0.0
        fits &= bool(torch.isclose(a, b, rtol=0, atol=allowed * largest, equal_nan=True).all())
    if not fits:
        raise GraftError(f"{what}. Turn the cache off, or clear it with `graft cache --clear all`.")


@contextlib.contextmanager
def _evaluating(modules: Iterable[nn.Module]) -> Generator[None]:
    """Put modules into eval mode inside the block, each of their parts back into its own behind it."""
    parts = [part for module in modules for part in module.modules() if part.training]
    for part in parts:
        part.training = False
    try:
        yield
    finally:
        for part in parts:
            part.training = True


# ---- what a row depends on


def _tensors(modules: Mapping[str, nn.Module]) -> Generator[tuple[str, Tensor]]:
    """Yield parameters and buffers, those too that no checkpoint holds, by name."""
    for name, module in modules.items():
        for inner, tensor in (*module.named_parameters(), *module.named_buffers()):
            yield f"{name}.{inner}", tensor


def _state_digest(modules: Mapping[str, nn.Module]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(_tensors(modules), key=lambda pair: pair[0]):
        digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _layout(modules: Mapping[str, nn.Module]) -> str:
    """Digest how the modules are built: classes, settings that they print, and a Hugging Face configuration."""
    digest = hashlib.sha256()
    for name, module in modules.items():
        digest.update(f"{name}|{re.sub(r'0x[0-9a-f]+', '', repr(module))}".encode())
        for inner, child in module.named_modules():
            plain = {k: v for k, v in vars(child).items() if isinstance(v, (int, float, str)) and k != "training"}
            digest.update(f"{inner}|{type(child).__module__}.{type(child).__qualname__}|{plain}".encode())
        config = getattr(module, "config", None)
        if hasattr(config, "to_dict"):
            attention = getattr(config, "_attn_implementation", "")
            digest.update(f"{json.dumps(config.to_dict(), sort_keys=True, default=str)}|{attention}".encode())
    return digest.hexdigest()


def _versions(modules: Mapping[str, nn.Module]) -> str:
    """Return the versions of the libraries that compute, and of those whose classes the modules are."""
    found = {package: _version(package) for package in _PACKAGES}
    for root in sorted({type(m).__module__.partition(".")[0] for top in modules.values() for m in top.modules()}):
        if root not in ("common", "domains"):  # those are in the digest of the code
            found[root] = found.get(root) or str(getattr(sys.modules.get(root), "__version__", "")) or _version(root)
    return ", ".join(f"{name} {number}" for name, number in found.items() if number)


@cache
def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


@cache
def _code_digest(owner: type) -> str:
    """Digest the source files of the core, and of the packages in which a task's classes stand.

    Raises:
        GraftError: A class that was typed into a session, whose changes nobody could notice.
    """
    folders, files = {Path(__file__).parent}, set()
    for cls in owner.__mro__:
        if cls.__module__.partition(".")[0] in ("builtins", "lightning", "torch", "common"):
            continue
        file = getattr(sys.modules.get(cls.__module__), "__file__", None)
        if file is None:
            raise GraftError(
                f"{cls.__name__} stands in no file, so that its outputs cannot be cached: a change of it would go "
                "unseen. Write it into a module, or turn the cache off."
            )
        place = Path(file)
        (folders.add(place.parent) if (place.parent / "__init__.py").exists() else files.add(place))
    files |= {file for folder in folders for file in folder.rglob("*.py")}
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _context(device: torch.device) -> dict[str, str]:
    """Return what changes the numbers of the same operation on the same values."""
    kind = device.type
    if kind == "cuda":
        where = f"{torch.cuda.get_device_name(device)} {torch.version.cuda}"
    else:
        where = f"{kind} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    backends: Any = torch.backends
    flags = (
        backends.cuda.matmul.fp32_precision,
        backends.cudnn.conv.fp32_precision,
        backends.mkldnn.matmul.fp32_precision,
        backends.mkldnn.conv.fp32_precision,
        backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
        backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        backends.mkldnn.enabled,
        backends.cudnn.enabled,
        backends.mha.get_fastpath_enabled(),
        backends.cuda.flash_sdp_enabled(),
        backends.cuda.mem_efficient_sdp_enabled(),
        backends.cuda.cudnn_sdp_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_default_dtype(),
    )
    autocast = str(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else "off"
    return {"device": where, "autocast": autocast, "flags": " ".join(map(str, flags))}


# ---- rows as bytes


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())


def _encode(row: Row, *, half: bool) -> tuple[str, bytes]:
    """Return a row's description (type as given, type as kept, shape of each tensor) and its bytes."""
    described, parts = [], []
    for tensor in row:
        kept = tensor.detach().cpu()
        if half and tensor.dtype == torch.float32 and bool((kept.abs() <= torch.finfo(torch.float16).max).all()):
            kept = kept.half()
        names = [str(dtype).removeprefix("torch.") for dtype in (tensor.dtype, kept.dtype)]
        if not set(names) <= set(_DTYPES):
            raise GraftError(f"Rows of {tensor.dtype} cannot be cached. Turn the cache off.")
        described.append([*names, list(tensor.shape)])
        data = bytes(_bytes(kept))
        parts.append(data + bytes(-len(data) % _ALIGN))
    text = json.dumps(described)
    return text + " " * (-len(text) % _ALIGN), b"".join(parts)


def _decode(description: str, body: memoryview) -> Row:
    tensors, start = [], 0
    for given, kept, shape in json.loads(description):
        dtype = _DTYPES[kept]
        count = 1
        for side in shape:
            count *= side
        size = count * dtype.itemsize
        data = body[start : start + size]
        flat = torch.frombuffer(data, dtype=dtype) if size else torch.empty(0, dtype=dtype)
        tensors.append(flat.view(shape).to(_DTYPES[given]))
        start += size + -size % _ALIGN
    return tuple(tensors)


def _named(modules: Mapping[str, nn.Module]) -> str:
    return ", ".join(f"'{name}'" for name in modules)
