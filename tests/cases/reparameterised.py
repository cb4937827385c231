"""Cases of `common/methods/reparameterised.py`."""

from __future__ import annotations

from tests.cases._case import Case, both, matrix, toy, zoo


def _lora(spec, layer, role):
    rows, columns = matrix(layer)
    return min(spec.rank, rows, columns) * (rows + columns) + rows * spec.dora


def _vera(spec, layer, role):
    return spec.rank + layer.out_features


def _variant(toy_settings=None, zoo_settings=None, **facts):
    """LoRA with settings; None leaves it out on that network."""
    return Case(
        toy=None if toy_settings is None else toy("LoRA", **toy_settings),
        zoo=None if zoo_settings is None else zoo("LoRA", **zoo_settings),
        **{"per_layer": _lora, "random_start": True} | facts,
    )


_LINEAR = ["stem", "blocks.0.down", "fc1"]  # layers of the zoo that PEFT's own tuner does right

CASES = {
    "LoRA": both("LoRA", per_layer=_lora, random_start=True),
    "LoRA-dropout": _variant({"dropout": 0.2}),
    "LoRA-rslora": _variant({"rslora": True, "alpha": 3.0}, {"rslora": True, "alpha": 3.0}),
    "LoRA-dora": _variant({"dora": True}, {"dora": True}),
    "LoRA-gaussian": _variant({"init": "gaussian"}),
    "LoRA-orthogonal": _variant({"init": "orthogonal"}, exact_start=False),
    "LoRA-pissa": _variant({"init": "pissa"}, exact_start=False, moves_weight=True, random_start=False),
    "LoRA-olora": _variant({"init": "olora"}, exact_start=False, moves_weight=True, random_start=False),
    "LoRA-one-role": _variant({"on": ["attention_qkv"]}),
    "LoRA-norms-by-name": _variant({"target_modules": ["blocks.1.fc1", "embed"]}),
    "LoRA-thin": _variant(None, {"rank": 6, "dora": True, "init": "gaussian", "on": ["stem", "all"]}),
    "LoRA-peft": _variant(None, {"target_modules": _LINEAR}),
    "LoRA-peft-thin": _variant(None, {"rank": 9, "target_modules": _LINEAR, "dropout": 0.1}),
    "VeRA": both("VeRA", per_layer=_vera),
    "VeRA-ffn": Case(toy=toy("VeRA", on=["ffn"]), zoo=None, per_layer=_vera),
}
