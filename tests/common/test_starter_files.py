"""Starter files: what goes in comes out, in half precision; exports of full fine-tuning; and the catalog's rows."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from common import artifacts
from common.errors import GraftError
from common.starters import is_starter_file, load_starter, read_full_export, save_starter, starter_file

FOLDER = artifacts.DATA_FOLDER / "starters"
METADATA = {"classes": json.dumps(["noyau caudé"], ensure_ascii=False), "recipe": "600 steps"}


def states():
    generator = torch.Generator().manual_seed(0)
    backbone = {
        "conv.weight": torch.randn(4, 3, generator=generator),
        "index": torch.tensor([[70000]]),  # beyond half precision, and no weight
    }
    return backbone, {"0.bias": torch.randn(5, generator=generator)}


def test_a_file_gives_back_what_was_written(tmp_path):
    backbone, head = states()
    save_starter(tmp_path / "deep" / "s.safetensors", backbone, head, METADATA)
    file = load_starter(tmp_path / "deep" / "s.safetensors")
    assert file.backbone.keys() == backbone.keys()
    assert torch.equal(file.backbone["conv.weight"], backbone["conv.weight"].half().float())
    assert torch.equal(file.backbone["index"], backbone["index"])
    assert torch.equal(file.head["0.bias"], head["0.bias"].half().float())
    assert file.metadata == METADATA


def test_weights_lie_in_the_file_in_half_precision_under_plain_names(tmp_path):
    save_starter(tmp_path / "s.safetensors", *states(), METADATA)
    stored = load_file(tmp_path / "s.safetensors")
    assert {name: tensor.dtype for name, tensor in stored.items()} == {
        "backbone.conv.weight": torch.float16,
        "backbone.index": torch.int64,
        "head.0.bias": torch.float16,
    }
    with safe_open(tmp_path / "s.safetensors", "pt") as file:
        assert file.metadata() == METADATA


@pytest.mark.parametrize("value", [1e5, float("nan"), float("-inf")])
def test_what_half_precision_cannot_hold_is_refused_and_the_older_file_kept(value, tmp_path):
    path = tmp_path / "s.safetensors"
    path.write_bytes(b"older")
    backbone, head = states()
    backbone["conv.weight"][1, 2] = value
    with pytest.raises(GraftError, match=r"backbone\.conv\.weight holds NaN, infinite values or values beyond 65504"):
        save_starter(path, backbone, head, METADATA)
    assert [entry.name for entry in tmp_path.iterdir()] == ["s.safetensors"]
    assert path.read_bytes() == b"older"


def test_saving_changes_and_shares_nothing_of_the_given_weights(tmp_path):
    backbone, head = states()
    half = {"w": torch.ones(2, dtype=torch.float16), "v": backbone["conv.weight"].t(), "tied": backbone["conv.weight"]}
    save_starter(tmp_path / "s.safetensors", backbone | half, head, METADATA)
    assert torch.equal(load_starter(tmp_path / "s.safetensors").backbone["v"], half["v"].half().float())
    assert torch.equal(backbone["conv.weight"], states()[0]["conv.weight"])


def test_what_is_no_starter_file_is_refused(tmp_path):
    path = tmp_path / "s.safetensors"
    assert not is_starter_file(path)
    with pytest.raises(GraftError, match="There is no starter file"):
        load_starter(path)
    save_starter(path, *states(), METADATA)
    with pytest.raises(GraftError, match="does not state its spacing, size"):
        load_starter(path, ("recipe", "spacing", "size"))
    whole = path.read_bytes()
    for content in (b"", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(GraftError, match="is damaged or no starter file"):
            load_starter(path)
    save_file({"model.weight": torch.zeros(1)}, path)
    assert not is_starter_file(path)


# ---- out of an export


def write_export(folder, method="FullFineTune"):
    """Write what `graft export` leaves of a run."""
    folder.mkdir()
    record = {
        "task": "Segmentation",
        "settings": {"backbone": "UNet"},
        "facts": {"spacing": [2.0]},
        "method": {"class_path": method, "init_args": {}},
        "optim": {"lr": 0.001},
        "seed": 3,
        "cost": {},
    }
    (folder / "graft.json").write_text(json.dumps(record))
    backbone, head = states()
    save_file(head, folder / "head.safetensors")
    save_file(backbone, folder / ("model.safetensors" if method == "FullFineTune" else "adapter_model.safetensors"))


def test_an_export_of_full_fine_tuning_is_read_whole(tmp_path):
    write_export(tmp_path / "export")
    found = read_full_export(tmp_path / "export")
    backbone, head = states()
    assert torch.equal(found.model["conv.weight"], backbone["conv.weight"])
    assert torch.equal(found.head["0.bias"], head["0.bias"])
    assert found.facts == {"spacing": [2.0]}
    assert json.loads(found.recipe).keys() == {"task", "settings", "method", "optim", "seed"}


def test_an_export_of_an_adapter_half_a_one_and_nothing_are_refused(tmp_path):
    write_export(tmp_path / "adapter", "LoRA")
    with pytest.raises(GraftError, match="holds a LoRA adapter; a starter is made of the weights of FullFineTune"):
        read_full_export(tmp_path / "adapter")
    (tmp_path / "adapter" / "graft.json").write_text("{}")
    for folder in ("adapter", "nothing"):
        with pytest.raises(GraftError, match="is not a whole export"):
            read_full_export(tmp_path / folder)


# ---- the catalog


def test_every_committed_file_is_a_starter_with_a_row_and_its_digest():
    files = sorted(FOLDER.glob("*.safetensors")) if FOLDER.is_dir() else []
    rows = {row.name: row for row in artifacts.catalog().values() if row.source == f"file:{FOLDER / row.filename}"}
    assert {path.stem for path in files} == set(rows)
    for path in files:
        row = rows[path.stem]
        assert (row.filename, row.size) == (path.name, path.stat().st_size)
        assert row.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        assert load_starter(path).backbone


def test_a_starter_whose_file_is_not_in_the_catalog_says_so(monkeypatch):
    monkeypatch.setattr(artifacts, "catalog", dict)
    with pytest.raises(GraftError, match=r"The catalog has no weights of the starter 'unet3d-colin' yet\. .*'weights'"):
        starter_file("unet3d-colin")


def test_a_starter_is_fetched_out_of_the_repository_and_verified(tmp_path, monkeypatch):
    """From the committed file through the catalog, without a network connection."""
    data, path = tmp_path / "data", tmp_path / "data" / "starters" / "unet3d-colin.safetensors"
    save_starter(path, *states(), METADATA)
    row = {"domains": ["medical"], "source": f"file:starters/{path.name}", "filename": path.name, "summary": "a test"}
    row |= {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "size": path.stat().st_size}
    row |= {"licence": "none", "citation": "nobody", "backbone": "monai:UNet"}
    (data / "checkpoints.yaml").write_text(json.dumps({"unet3d-colin": row}))
    (data / "datasets.yaml").write_text("")
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(artifacts, "DATA_FOLDER", data)
    assert load_starter(starter_file("unet3d-colin")).metadata == METADATA
    assert starter_file("unet3d-colin").is_relative_to(tmp_path / "cache")
