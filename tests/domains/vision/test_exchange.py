"""What a vision run leaves behind can be resumed, reloaded with plain libraries, and merged, exactly."""

from __future__ import annotations

import json

import peft
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from common import exchange
from common import run as runs
from common.methods import METHODS, BitFit, FullFineTune, LinearProbe, LoRA
from common.task import OptimSpec
from domains import DOMAINS
from domains.vision.data import ImageFolder
from domains.vision.tasks import ImageClassification
from tests.domains.vision.conftest import SIZE

RATES = OptimSpec(lr=0.01, head_lr=0.01)
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:.*{noise}")
    for noise in ("LeafSpec", "eval mode at the start", "Specified to not save vera_A", "callbacks used to create")
]


def fit(pictures, folder, method, backbone="test_vit", *, steps=2, resume=False, epochs=1, **options):
    """Train a few steps and return the task and the run's record."""
    options = {"pretrained": False, "optim": RATES, **options}
    task = ImageClassification(backbone, method, **options)
    data = ImageFolder(str(pictures), image_size=SIZE, batch_size=6, val_fraction=0.2, test_fraction=0.2)
    limits = {"max_epochs": epochs} if steps is None else {"max_steps": steps, "limit_val_batches": 1}
    record = runs.fit(task, data, folder, resume=resume, **limits, precision="32-true", accelerator="cpu")
    return task, record


def outputs(task):
    task.eval()
    with torch.no_grad():
        return task(task.example_batch())


def normalised(batch, model):
    facts = timm.data.resolve_model_data_config(model)
    mean, std = (torch.tensor(facts[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    return (batch.images.float() / 255 - mean) / std


def weights_file(tmp_path, arch, **options):
    torch.manual_seed(5)
    path = tmp_path / f"{arch}.safetensors"
    save_file(timm.create_model(arch, num_classes=0, **options).state_dict(), path)
    return path


# ---- reload and merge

COMBINATIONS = [
    *(("test_efficientnet", method) for method in ("LoRA", "IA3", "BitFit", "NormTuning")),
    *(("test_vit", method) for method in ("LoRA", "IA3", "VeRA", "LastBlocks")),
    ("test_resnet", "LoRA"),
    ("test_convnext2", "LoRA"),
    ("test_convnext2", "NormTuning"),
]


@pytest.mark.parametrize(("backbone", "method"), COMBINATIONS, ids=["-".join(pair) for pair in COMBINATIONS])
def test_an_export_reloads_and_merges_exactly(tmp_path, pictures, backbone, method):
    spec = METHODS[method](**({"rank": 4} if method in ("LoRA", "VeRA") else {}))
    task, record = fit(pictures, tmp_path / "run", spec, backbone)
    expected = outputs(task)
    fresh = ImageClassification(backbone, spec, RATES, pretrained=False)
    fresh.load_facts(task.describe_facts())
    fresh.assemble()
    assert (outputs(fresh) - expected).abs().max() > 1e-3, "the steps changed nothing, so this would prove nothing"

    certificate = exchange.export(tmp_path / "run", tmp_path / "out", record, DOMAINS)
    assert certificate["reload_max_abs_error"] <= 1e-6
    assert certificate["merge_max_abs_error"] <= 1e-5
    reloaded = exchange.load(tmp_path / "out", DOMAINS)
    torch.testing.assert_close(outputs(reloaded), expected, atol=1e-6, rtol=0)

    exchange.merge(tmp_path / "out", tmp_path / "merged", DOMAINS)
    options = {"img_size": SIZE} if "vit" in backbone else {}
    plain = timm.create_model(backbone, num_classes=0, **options)
    plain.load_state_dict(load_file(tmp_path / "merged" / "model.safetensors"), strict=True)
    reloaded.backbone = plain.eval()
    torch.testing.assert_close(outputs(reloaded), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("backbone", "pooled"), [("test_vit", "cls"), ("test_efficientnet", "mean")])
def test_plain_timm_and_plain_peft_give_the_same_logits(tmp_path, pictures, backbone, pooled):
    """Nothing of Graft is used to load: timm, peft and the two files."""
    sized = {"img_size": SIZE} if backbone == "test_vit" else {}
    weights = weights_file(tmp_path, backbone, **sized)
    task, record = fit(
        pictures, tmp_path / "run", LoRA(on=["all"], rank=4), backbone, weights=str(weights), pretrained=True
    )
    exchange.export(tmp_path / "run", tmp_path / "out", record, DOMAINS)

    base = timm.create_model(backbone, num_classes=0, **sized)
    base.load_state_dict(load_file(weights))
    model = peft.PeftModel.from_pretrained(base, str(tmp_path / "out")).eval()
    head = load_file(tmp_path / "out" / "head.safetensors")
    with torch.no_grad():
        features = model.forward_features(normalised(task.example_batch(), base))
        vector = features[:, 0] if pooled == "cls" else features.mean(dim=(2, 3))
        logits = vector @ head["classifier.weight"].T + head["classifier.bias"]
    torch.testing.assert_close(logits, outputs(task), atol=1e-6, rtol=1e-6)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "out" / file).is_file()


@pytest.mark.parametrize("method", [LoRA(on=["attention"], rank=2), BitFit(), FullFineTune(), LinearProbe()], ids=type)
def test_the_lines_on_the_card_load_the_model(tmp_path, pictures, method):
    weights = weights_file(tmp_path, "test_vit", img_size=SIZE)
    task, record = fit(pictures, tmp_path / "run", method, weights=str(weights), depth=3, pretrained=True)
    exchange.export(tmp_path / "run", tmp_path / "out", record, DOMAINS)
    card = (tmp_path / "out" / "README.md").read_text()
    lines = card.partition("```python\n")[2].partition("```")[0]
    names = {"FOLDER": str(tmp_path / "out")}
    batch = task.example_batch()
    names["images"] = normalised(batch, timm.create_model("test_vit", num_classes=0))
    with torch.no_grad():
        exec(lines, names)
    task.eval()
    with torch.no_grad():
        torch.testing.assert_close(names["tokens"], task.features(batch), atol=1e-6, rtol=1e-6)


def test_full_fine_tuning_exports_the_whole_model(tmp_path, pictures):
    task, record = fit(pictures, tmp_path / "run", FullFineTune(), "test_efficientnet")
    exchange.export(tmp_path / "run", tmp_path / "out", record, DOMAINS)
    plain = timm.create_model("test_efficientnet", num_classes=0)
    plain.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"), strict=True)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, task.backbone.state_dict()[name]), name
    reloaded = exchange.load(tmp_path / "out", DOMAINS)
    torch.testing.assert_close(outputs(reloaded), outputs(task), atol=1e-6, rtol=0)


def test_a_linear_probe_exports_its_head_alone(tmp_path, pictures):
    task, record = fit(pictures, tmp_path / "run", LinearProbe(), head="mlp", hidden=8)
    exchange.export(tmp_path / "run", tmp_path / "out", record, DOMAINS)
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()
    torch.testing.assert_close(outputs(exchange.load(tmp_path / "out", DOMAINS)), outputs(task), atol=1e-6, rtol=0)


def test_other_weights_of_the_same_architecture_are_refused(tmp_path, pictures):
    weights = weights_file(tmp_path, "test_vit", img_size=SIZE)
    _, record = fit(pictures, tmp_path / "run", LoRA(rank=2), weights=str(weights), pretrained=True)
    exchange.export(tmp_path / "run", tmp_path / "out", record, DOMAINS)
    state = load_file(weights)
    state["norm.bias"] += 1e-3
    save_file(state, weights)
    with pytest.raises(exchange.GraftError, match="trained on other weights of 'test_vit'"):
        exchange.load(tmp_path / "out", DOMAINS)


# ---- running statistics


def statistics(module: nn.Module):
    return {name: value for name, value in module.state_dict().items() if "running_" in name or "num_batches" in name}


@pytest.mark.parametrize("method", [FullFineTune(), BitFit()], ids=type)
def test_a_net_with_batch_norm_resumes_exactly(tmp_path, pictures, method):
    # With a constant rate, a run of one epoch is the first half of a run of two.
    rates = OptimSpec(lr=0.01, schedule="constant", warmup=0.0)
    whole, _ = fit(pictures, tmp_path / "whole", method, "test_efficientnet", steps=None, epochs=2, optim=rates)
    fit(pictures, tmp_path / "parts", method, "test_efficientnet", steps=None, epochs=1, optim=rates)
    parts, _ = fit(
        *(pictures, tmp_path / "parts", method, "test_efficientnet"), steps=None, epochs=2, optim=rates, resume=True
    )
    assert statistics(whole.backbone)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(parts.state_dict()[name], tensor), name


@pytest.mark.parametrize("method", [FullFineTune(), LoRA(rank=2)], ids=type)
def test_running_statistics_train_with_full_fine_tuning_only_and_are_tested_as_trained(tmp_path, pictures, method):
    task, record = fit(pictures, tmp_path / "run", method, "test_efficientnet", steps=None, epochs=2)
    fresh = ImageClassification("test_efficientnet", method, RATES, pretrained=False)
    fresh.load_facts(task.describe_facts())
    fresh.assemble()
    changed = [n for n, v in statistics(task.backbone).items() if not torch.equal(v, statistics(fresh.backbone)[n])]
    assert bool(changed) == isinstance(method, FullFineTune)

    again = ImageClassification("test_efficientnet", method, RATES, pretrained=False)
    data = ImageFolder(str(pictures), image_size=SIZE, batch_size=6, val_fraction=0.2, test_fraction=0.2)
    validated = runs.validate(again, data, tmp_path / "run", precision="32-true", accelerator="cpu")
    assert validated["val"] == record["val"]
    for name, value in statistics(task.backbone).items():
        assert torch.equal(statistics(again.backbone)[name], value), name
    stored = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["state_dict"]
    assert any("running_mean" in name for name in stored) == isinstance(method, FullFineTune)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["val"] == record["val"]
