"""Starter files: what goes in comes out, in half precision; and the catalog knows every file."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from common import artifacts
from common.errors import GraftError
from common.methods import FullFineTune
from domains.medical.backbones import NETS
from domains.medical.starters import (
    STARTERS,
    is_starter_file,
    load_starter,
    save_starter,
    starter_file,
    starter_from_export,
)
from tests.domains.medical.conftest import data_of, task_of

FOLDER = artifacts.DATA_FOLDER / "starters"
METADATA = {"classes": ("background", "noyau caudé"), "spacing": (2, 1.5, 2.0), "recipe": "600 steps"}


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
    assert file.classes == METADATA["classes"]
    assert file.spacing == (2.0, 1.5, 2.0)
    assert file.recipe == "600 steps"


def test_weights_lie_in_the_file_in_half_precision_under_plain_names(tmp_path):
    save_starter(tmp_path / "s.safetensors", *states(), METADATA)
    stored = load_file(tmp_path / "s.safetensors")
    assert {name: tensor.dtype for name, tensor in stored.items()} == {
        "backbone.conv.weight": torch.float16,
        "backbone.index": torch.int64,
        "head.0.bias": torch.float16,
    }
    with safe_open(tmp_path / "s.safetensors", "pt") as file:
        assert json.loads(file.metadata()["classes"]) == list(METADATA["classes"])


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


def test_missing_metadata_is_refused_on_both_ways(tmp_path):
    with pytest.raises(GraftError, match="has to state its spacing, recipe"):
        save_starter(tmp_path / "s.safetensors", *states(), {"classes": ()})
    save_file({"backbone.w": torch.zeros(1)}, tmp_path / "s.safetensors", metadata={"recipe": "x"})
    with pytest.raises(GraftError, match="does not state its classes, spacing"):
        load_starter(tmp_path / "s.safetensors")


def test_what_is_no_starter_file_is_refused(tmp_path):
    path = tmp_path / "s.safetensors"
    assert not is_starter_file(path)
    with pytest.raises(GraftError, match="There is no starter file"):
        load_starter(path)
    save_starter(path, *states(), METADATA)
    whole = path.read_bytes()
    for content in (b"", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(GraftError, match="is damaged or no starter file"):
            load_starter(path)
    save_file({"model.weight": torch.zeros(1)}, path)
    assert not is_starter_file(path)


# ---- out of an export


def write_export(folder, *, full=True):
    """Write what `graft export` leaves of a segmentation run."""
    folder.mkdir()
    backbone, head = states()
    record = {
        "task": "Segmentation",
        "settings": {"backbone": "UNet"},
        "facts": {"class_names": list(METADATA["classes"]), "spacing": [2.0, 2.0, 2.0]},
        "method": {"class_path": "FullFineTune" if full else "LoRA", "init_args": {}},
        "optim": {"lr": 0.001},
        "seed": 3,
    }
    (folder / "graft.json").write_text(json.dumps(record))
    save_file({f"output.{name}": tensor for name, tensor in head.items()}, folder / "head.safetensors")
    save_file(backbone, folder / ("model.safetensors" if full else "adapter_model.safetensors"))


def test_an_export_becomes_a_starter(tmp_path):
    write_export(tmp_path / "export")
    starter_from_export(tmp_path / "export", tmp_path / "s.safetensors")
    file = load_starter(tmp_path / "s.safetensors")
    backbone, head = states()
    assert torch.equal(file.backbone["conv.weight"], backbone["conv.weight"].half().float())
    assert file.head.keys() == head.keys()
    assert file.classes == METADATA["classes"]
    assert file.spacing == (2.0, 2.0, 2.0)
    recipe = json.loads(file.recipe)
    assert recipe["optim"] == {"lr": 0.001}
    assert recipe["seed"] == 3


def test_a_segmentation_task_becomes_a_starter_under_monais_names(tmp_path):
    """The head's names and the facts are those that a starter is made of."""
    task = task_of(FullFineTune(), data_of())
    write_export(tmp_path / "export")
    record = json.loads((tmp_path / "export/graft.json").read_text()) | {"facts": task.describe_facts()}
    (tmp_path / "export/graft.json").write_text(json.dumps(record))
    save_file(task.head.state_dict(), tmp_path / "export/head.safetensors")
    save_file(task.backbone.state_dict(), tmp_path / "export/model.safetensors")
    starter_from_export(tmp_path / "export", tmp_path / "s.safetensors")
    file = load_starter(tmp_path / "s.safetensors")
    assert file.classes == task.facts.class_names
    assert file.spacing == task.facts.spacing
    again = task_of(FullFineTune(), data_of(), weights=str(tmp_path / "s.safetensors"), seed=9)
    assert again.head.from_checkpoint
    with torch.no_grad():
        batch = task.example_batch()
        torch.testing.assert_close(again(batch), task(batch), atol=1e-2, rtol=1e-2)


def test_an_export_of_an_adapter_or_of_nothing_is_refused(tmp_path):
    write_export(tmp_path / "adapter", full=False)
    with pytest.raises(GraftError, match="holds a LoRA adapter; a starter is made of the weights of FullFineTune"):
        starter_from_export(tmp_path / "adapter", tmp_path / "s.safetensors")
    with pytest.raises(GraftError, match="is not a whole export"):
        starter_from_export(tmp_path / "nothing", tmp_path / "s.safetensors")
    assert not (tmp_path / "s.safetensors").exists()


# ---- the catalog


def test_starters_name_networks_that_there_are():
    for name, starter in STARTERS.items():
        assert starter.name == name
        assert starter.arch in NETS


def test_a_starter_whose_file_is_not_in_the_catalog_says_so(monkeypatch):
    monkeypatch.setattr(artifacts, "catalog", dict)
    with pytest.raises(GraftError, match=r"The catalog has no weights of the starter 'unet3d-colin' yet\. .*'weights'"):
        starter_file("unet3d-colin")


def test_every_committed_file_is_a_starter_with_a_row_and_its_digest():
    files = sorted(FOLDER.glob("*.safetensors")) if FOLDER.is_dir() else []
    rows = {row.name: row for row in artifacts.catalog().values() if row.source == f"file:{FOLDER / row.filename}"}
    assert {path.stem for path in files} == set(rows)
    for path in files:
        row = rows[path.stem]
        assert (row.filename, row.size) == (path.name, path.stat().st_size)
        assert row.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        assert row.backbone == f"monai:{STARTERS[path.stem].arch}"
        assert load_starter(path).classes


def test_a_starter_is_fetched_out_of_the_repository_and_verified(tmp_path, monkeypatch):
    """From the committed file through the catalog into a network, without a network connection."""
    data, path = tmp_path / "data", tmp_path / "data" / "starters" / "unet3d-colin.safetensors"
    save_starter(path, *states(), METADATA)
    row = {"domains": ["medical"], "source": f"file:starters/{path.name}", "filename": path.name, "summary": "a test"}
    row |= {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "size": path.stat().st_size}
    row |= {"licence": "none", "citation": "nobody", "backbone": "monai:UNet"}
    (data / "checkpoints.yaml").write_text(json.dumps({"unet3d-colin": row}))
    (data / "datasets.yaml").write_text("")
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(artifacts, "DATA_FOLDER", data)
    assert load_starter(starter_file("unet3d-colin")).classes == METADATA["classes"]
    assert starter_file("unet3d-colin").is_relative_to(tmp_path / "cache")
