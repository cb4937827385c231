"""Image classification: what a batch becomes, what is measured, what a run says about itself."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from common.cost import measure_step
from common.errors import GraftError
from common.images.backbones import build, tokens
from common.methods import BitFit, FullFineTune, LinearProbe, LoRA
from common.task import OptimSpec
from domains.vision.data import ImageBatch, ImageFacts, Record
from domains.vision.tasks import ImageClassification


def facts(classes=3, size=32, **options):
    names = tuple(f"class{number}" for number in range(classes))
    return ImageFacts(image_size=size, class_names=names, name="toy", digest="d", counts={"train": 1}, **options)


def task(backbone="test_vit", peft=None, *, classes=3, **options):
    """Build a task as a fit would, without a trainer."""
    options.setdefault("pretrained", False)
    made = ImageClassification(backbone, peft or LoRA(on=["all"], rank=2), **options)
    made.facts = facts(classes)
    made.assemble()
    return made.eval()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return ImageBatch(images, torch.tensor([0, 2, 1, 1]), torch.arange(4))


@pytest.mark.parametrize("backbone", ["test_vit", "test_resnet"])
def test_bytes_are_normalised_with_the_backbones_own_numbers(batch, backbone):
    made = task(backbone, LinearProbe())
    built = build(backbone, 32, pretrained=False)
    mean, std = (torch.tensor(numbers).view(1, 3, 1, 1) for numbers in (built.mean, built.std))
    expected = tokens(made.backbone, (batch.images.float() / 255 - mean) / std)
    torch.testing.assert_close(made.features(batch), expected)


def test_random_weights_and_head_come_from_the_seed_alone(batch):
    torch.manual_seed(1)
    first = task(seed=3)
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    second = task(seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first.attached.base_digest == second.attached.base_digest
    assert torch.equal(first(batch), second(batch))
    assert task(seed=4).attached.base_digest != first.attached.base_digest


def test_the_loss_smooths_labels(batch):
    made = task(label_smoothing=0.3)
    logits = made(batch).double()
    logs = logits.log_softmax(dim=-1)
    soft = torch.full((4, 3), 0.1, dtype=torch.float64)
    soft[range(4), batch.labels] += 0.7
    torch.testing.assert_close(made.compute_loss(batch).double(), -(soft * logs).sum(dim=-1).mean())


def test_metrics_are_top1_f1_and_calibration():
    metrics = task().build_metrics()
    assert set(metrics) == {"accuracy", "macro_f1", "ece"}
    labels, guesses = torch.tensor([0, 0, 0, 1, 2, 2]), torch.tensor([0, 0, 1, 1, 2, 0])
    probability = 0.8
    probabilities = torch.full((6, 3), (1 - probability) / 2)
    probabilities[range(6), guesses] = probability
    metrics.update(probabilities.log(), labels)
    found = {name: float(value) for name, value in metrics.compute().items()}
    assert found["accuracy"] == pytest.approx(4 / 6)
    # F1 = 2 TP / (2 TP + FP + FN), class by class.
    assert found["macro_f1"] == pytest.approx((4 / (4 + 1 + 1) + 2 / (2 + 1 + 0) + 2 / (2 + 0 + 1)) / 3)
    assert found["ece"] == pytest.approx(abs(4 / 6 - probability), abs=1e-6)


def test_top5_is_measured_where_it_says_something():
    made = task(classes=7)
    logits = torch.arange(7.0).repeat(2, 1)
    metrics = made.build_metrics()
    metrics.update(logits, torch.tensor([1, 2]))  # the lowest five logits but one, and the fifth
    assert float(metrics.compute()["top5"]) == pytest.approx(0.5)


def test_predictions_name_the_best_class_and_its_probability():
    made = task()
    rows = [Record(f"a/{n}.png", Path(f"/data/a/{n}.png"), "class2", ("", "north")[n]) for n in range(2)]

    class Data:
        def records(self, split):
            assert split == "test"
            return rows

    logits = torch.tensor([[0.0, 1.0, 3.0], [2.0, 1.0, 0.0]])
    found = made.predictions([logits], Data(), Path())
    assert [row["prediction"] for row in found] == ["class2", "class0"]
    best = math.exp(3) / (1 + math.e + math.exp(3))
    assert found[0] == {
        "id": "a/0.png",
        "label": "class2",
        "prediction": "class2",
        "probability": pytest.approx(best, abs=1e-6),
        "path": "/data/a/0.png",
    }
    assert found[1]["group"] == "north"


def test_facts_survive_a_record():
    made = task()
    made.facts = facts(4, 48, fit="squash")
    other = ImageClassification("test_vit", LinearProbe(), pretrained=False)
    other.load_facts(made.describe_facts())
    assert (other.facts.image_size, other.facts.class_names, other.facts.fit) == (48, made.facts.class_names, "squash")


def test_the_example_batch_is_always_the_same():
    made = task()
    first, second = made.example_batch(), made.example_batch()
    assert torch.equal(first.images, second.images)
    assert first.images.dtype == torch.uint8
    assert first.images.shape == (2, 3, 32, 32)


@pytest.mark.parametrize(
    ("backbone", "peft"),
    [
        *((name, LoRA(on=["all"], rank=2)) for name in ("test_vit", "test_efficientnet", "test_convnext2")),
        *((name, FullFineTune()) for name in ("test_vit", "test_convnext2")),  # refused with batch norms that train
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_gradient_checkpointing_changes_memory_and_nothing_else(batch, backbone, peft):
    found = []
    for checkpointing in (False, True):
        made = task(backbone, peft, gradient_checkpointing=checkpointing).train()
        torch.manual_seed(0)
        loss = made.compute_loss(batch)
        loss.backward()
        gradients = {name: p.grad for name, p in made.named_parameters() if p.requires_grad}
        statistics = {name: b.clone() for name, b in made.named_buffers() if "running" in name}
        made.zero_grad()
        activations, _ = measure_step(made, lambda made=made: made.compute_loss(batch))
        found.append((loss, gradients, statistics, activations))
    (loss, gradients, statistics, activations), (other_loss, other_gradients, other_statistics, fewer) = found
    torch.testing.assert_close(other_loss, loss)
    assert all(gradient is not None for gradient in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(other_gradients[name], gradient, atol=1e-5, rtol=1e-4, msg=name)
    if not isinstance(peft, FullFineTune):
        for name, value in statistics.items():
            assert torch.equal(other_statistics[name], value), name
    assert fewer < activations


def test_a_method_keeps_frozen_batch_norms_fixed(batch):
    made = task("test_efficientnet").train()
    before = {name: b.clone() for name, b in made.named_buffers() if "running" in name}
    assert before
    made.compute_loss(batch).backward()
    after = dict(made.named_buffers())
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_options_that_do_not_fit_are_refused():
    with pytest.raises(GraftError, match="pooling 'cls' needs a class token"):
        task("test_resnet", pooling="cls")
    with pytest.raises(GraftError, match="depth=7"):
        task(depth=7)
    with pytest.raises(GraftError, match=r"optim: lr is -1; warmup is 2"):
        task(optim=OptimSpec(lr=-1, warmup=2))


def test_the_card_loads_what_was_built():
    assert "timm.create_model('test_vit', pretrained=False, num_classes=0, img_size=32)" in task().usage()
    assert "img_size" not in task("test_resnet").usage()
    assert "build('test_vit', 32, depth=2).model" in task(depth=2).usage()
    assert "tokens = model.head.norm(model.forward_features(images))" in task("test_convnext2").usage()
    assert "import common.tuners" in task(peft=BitFit()).usage()
    assert "PeftModel.from_pretrained" not in task(peft=LinearProbe()).usage()
    assert "model.safetensors" in task(peft=FullFineTune()).usage()
