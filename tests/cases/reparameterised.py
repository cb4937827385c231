"""Cases of `common/methods/reparameterised/`."""

from __future__ import annotations

import math

from tests.cases._case import Case, both, matrix, toy, zoo


def _lora(spec, layer, role):
    rows, columns = matrix(layer)
    return min(spec.rank, rows, columns) * (rows + columns * (not spec.freeze_a)) + rows * spec.dora


def _adalora(spec, layer, role):
    return spec.start_rank * (_sides(layer) + 1)


def _sides(layer):
    return sum(matrix(layer))


def _low_rank(spec, layer, role):
    return spec.rank * _sides(layer)


def _loha(spec, layer, role):
    return 2 * spec.rank * _sides(layer)


def _halves(size):
    smaller = max(d for d in range(1, math.isqrt(size) + 1) if size % d == 0)
    return smaller, size // smaller


def _lokr(spec, layer, role):
    (a, b), (c, d) = (_halves(size) for size in matrix(layer))
    return a * c + (spec.rank * (b + d) if 2 * spec.rank < max(b, d) else b * d)


def _glora(spec, layer, role):
    rows, columns = matrix(layer)
    bias = spec.rank * (columns + 1) + 2 if layer.bias is not None else 0
    return 2 * spec.rank * (rows + columns) + bias


def _delora(spec, layer, role):
    return spec.rank * _sides(layer) + 1


def _miss(spec, layer, role):
    rows, columns = matrix(layer)
    return min(spec.rank, columns) * rows


def _deft(spec, layer, role):
    rows, columns = matrix(layer)
    return min(spec.rank, rows) * (rows + columns)


def _peanut(spec, layer, role):
    return 2 * spec.rank * layer.out_features + 2 * spec.depth * spec.rank**2


def _divisor(size, most):
    return max(d for d in range(1, most + 1) if size % d == 0)


def _oft(spec, layer, role):
    columns = matrix(layer)[1]
    return columns * (_divisor(columns, spec.block) - 1) // 2


def _boft(spec, layer, role):
    rows, columns = matrix(layer)
    side = 2 * _divisor(columns // 2**spec.factors, spec.block // 2)
    return spec.factors * columns * (side - 1) // 2 + rows


def _hra(spec, layer, role):
    return spec.rank * matrix(layer)[1]


def _psoft(spec, layer, role):
    rank = min(spec.rank, *matrix(layer))
    return rank * (rank - 1) // 2 + 2 * rank


def _road(spec, layer, role):
    return {"road_1": 1, "road_2": 2, "road_4": 4}[spec.variant] * layer.out_features


def _entries(spec, layer, role):
    return min(spec.entries, math.prod(matrix(layer)))


def _c3a(spec, layer, role):
    return math.prod(matrix(layer)) // _divisor(math.gcd(*matrix(layer)), spec.block)


def _lora_of_two_thirds(spec, layer, role):
    rows, columns = matrix(layer)
    return 2 * (spec.rank * (rows // 3 + columns) + rows // 3 * spec.dora)


def _lora_by_block(spec, model, targets):
    """Queries in each of the three blocks, values in the last two."""
    rows, columns = matrix(model.blocks[0].qkv)
    return 5 * spec.rank * (rows // 3 + columns)


def _vera(spec, layer, role):
    return spec.rank + layer.out_features


def _pvera(spec, layer, role):
    return 2 * spec.rank + layer.out_features


def _randlora(spec, layer, role):
    least = min(matrix(layer))
    return math.ceil(least / spec.rank) * (spec.rank + least)


def _vblora(spec, model, targets):
    sides = sum(_sides(model.get_submodule(name)) for name in targets)
    return spec.vectors * spec.length + spec.rank * spec.vectors * sides // spec.length


def _tinylora(spec, model, targets):
    return spec.parameters * max(1, round(len(targets) * (1 - spec.tying)))


def _sparse(spec, layer, role):
    return int(math.prod(matrix(layer)) * (1 - spec.sparsity))


def _bias(spec, layer, role):
    return layer.bias.numel()


def _fact(spec, model, targets):
    sizes = [matrix(model.get_submodule(name)) for name in targets]
    rows, columns = (min(size[axis] for size in sizes) for axis in (0, 1))
    tiles = sum(math.ceil(size[0] / rows) * math.ceil(size[1] / columns) for size in sizes)
    inner = tiles * spec.rank**2 if spec.form == "tt" else spec.rank**3 + tiles * spec.rank
    return (rows + columns) * spec.rank + inner


def _variant(toy_settings=None, zoo_settings=None, **facts):
    """LoRA with settings; None leaves it out on that network."""
    return Case(
        toy=None if toy_settings is None else toy("LoRA", **toy_settings),
        zoo=None if zoo_settings is None else zoo("LoRA", **zoo_settings),
        **{"per_layer": _lora, "random_start": True} | facts,
    )


def _on_toy(method, settings, **facts):
    return Case(toy=toy(method, **settings), zoo=None, **facts)


_LINEAR = ["stem", "blocks.0.down", "fc1"]  # layers of the zoo that PEFT's own tuner does right
_RANDOM = {"random_start": True}
_ROUNDED = {"exact_start": False}

CASES = {
    "LoRA": both("LoRA", per_layer=_lora, random_start=True),
    "LoRA-dropout": _variant({"dropout": 0.2}),
    "LoRA-rslora": _variant({"rslora": True, "alpha": 3.0}, {"rslora": True, "alpha": 3.0}),
    "LoRA-dora": _variant({"dora": True}, {"dora": True}),
    "LoRA-gaussian": _variant({"init": "gaussian"}),
    "LoRA-orthogonal": _variant({"init": "orthogonal"}, exact_start=False),
    "LoRA-pissa": _variant({"init": "pissa"}, exact_start=False, moves_weight=True, random_start=False),
    "LoRA-olora": _variant({"init": "olora"}, exact_start=False, moves_weight=True, random_start=False),
    "LoRA-eva": _variant({"init": "eva", "batches": 2}),
    "LoRA-one-role": _variant({"on": ["attention_qkv"]}),
    "LoRA-query-value": _variant({"on": ["attention_q", "attention_v@last:2"]}, total=_lora_by_block),
    "LoRA-key-value-dora": _variant(
        {"on": ["attention_k", "attention_v"], "dora": True}, per_layer=_lora_of_two_thirds
    ),
    "LoRA-norms-by-name": _variant({"target_modules": ["blocks.1.fc1", "embed"]}),
    "LoRA-thin": _variant(None, {"rank": 6, "dora": True, "init": "gaussian", "on": ["stem", "all"]}),
    "LoRA-peft": _variant(None, {"target_modules": _LINEAR}),
    "LoRA-peft-thin": _variant(None, {"rank": 9, "target_modules": _LINEAR, "dropout": 0.1}),
    "LoRA-plus": _variant({"b_rate": 16.0}),
    "LoRA-fa": _variant({"freeze_a": True, "on": ["all", "stem"]}, {"freeze_a": True}),
    "AdaLoRA": both("AdaLoRA", per_layer=_adalora, random_start=True),
    "LoHa": both("LoHa", per_layer=_loha, **_RANDOM),
    "LoHa-scaled": _on_toy("LoHa", {"alpha": 3.0, "on": ["ffn@last:1"]}, per_layer=_loha, **_RANDOM),
    "LoHa-conv": _on_toy("LoHa", {"alpha": 3.0, "target_modules": ["mix", "embed"]}, per_layer=_loha, **_RANDOM),
    "LoKr": both("LoKr", per_layer=_lokr, **_RANDOM),
    "LoKr-thin": _on_toy("LoKr", {"rank": 1, "alpha": 0.5, "on": ["stem", "all"]}, per_layer=_lokr, **_RANDOM),
    "HiRA": both("HiRA", per_layer=_low_rank, **_RANDOM),
    "GraLoRA": both("GraLoRA", per_layer=_low_rank, **_RANDOM),
    "GraLoRA-4": _on_toy("GraLoRA", {"rank": 4, "blocks": 4, "alpha": 1.0}, per_layer=_low_rank, **_RANDOM),
    "GLoRA": both("GLoRA", per_layer=_glora, **_RANDOM),
    "DeLoRA": both("DeLoRA", per_layer=_delora, **_RANDOM),
    "MiSS": both("MiSS", per_layer=_miss),
    "MiSS-uneven": _on_toy("MiSS", {"rank": 3}, per_layer=_miss),
    "MiSS-wide": _on_toy("MiSS", {"rank": 12}, per_layer=_miss),
    "DEFT": both("DEFT", per_layer=_deft, **_RANDOM, **_ROUNDED),
    "PEANuT": both("PEANuT", per_layer=_peanut, **_RANDOM),
    "PEANuT-deep": _on_toy("PEANuT", {"depth": 2, "activation": "gelu"}, per_layer=_peanut, **_RANDOM),
    "OFT": both("OFT", per_layer=_oft),
    "OFT-uneven": _on_toy("OFT", {"block": 3, "on": ["stem", "all"]}, per_layer=_oft),
    "BOFT": both("BOFT", per_layer=_boft),
    "BOFT-factors": _on_toy("BOFT", {"block": 4, "factors": 3}, per_layer=_boft),
    "HRA": both("HRA", per_layer=_hra, **_RANDOM, **_ROUNDED),
    "PSOFT": both("PSOFT", per_layer=_psoft),
    "RoAd": both("RoAd", per_layer=_road),
    "RoAd-4": _on_toy("RoAd", {"variant": "road_4", "on": ["ffn"]}, per_layer=_road),
    "FourierFT": both("FourierFT", per_layer=_entries),
    "FourierFT-thin": _on_toy("FourierFT", {"entries": 100, "scale": 20.0}, per_layer=_entries),
    "WaveFT": both("WaveFT", per_layer=_entries),
    "WaveFT-thin": _on_toy("WaveFT", {"entries": 100, "on": ["attention"]}, per_layer=_entries),
    "C3A": both("C3A", per_layer=_c3a),
    "C3A-uneven": _on_toy("C3A", {"block": 3}, per_layer=_c3a),
    "VeRA": both("VeRA", per_layer=_vera),
    "FacTTT": both("FacTTT", total=_fact, random_start=True),
    "FacTTK": both("FacTTK", total=_fact, random_start=True),
    "VeRA-ffn": Case(toy=toy("VeRA", on=["ffn"]), zoo=None, per_layer=_vera),
    "PVeRA": both("PVeRA", per_layer=_pvera),
    "RandLoRA": both("RandLoRA", per_layer=_randlora),
    "VBLoRA": both("VBLoRA", total=_vblora, starts_elsewhere=True, **_RANDOM),
    "TinyLoRA": both("TinyLoRA", total=_tinylora),
    "TinyLoRA-tied": _on_toy("TinyLoRA", {"tying": 0.5}, total=_tinylora),
    "UniLoRA": both("UniLoRA", total=lambda spec, model, targets: spec.length, starts_elsewhere=True, **_RANDOM),
    "SuperTuning": both("SuperTuning", per_layer=_sparse),
    "BEFT": both("BEFT", per_layer=_bias),
}
