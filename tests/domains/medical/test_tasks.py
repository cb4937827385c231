"""Segmentation and classification: what a batch becomes, what is measured, a run from fit to export and resume."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import nibabel as nib
import numpy as np
import pytest
import torch
from monai.inferers.utils import sliding_window_inference
from PIL import Image
from scipy import ndimage
from torch.nn import functional as F

from common.checkpoint import LAST, read_checkpoint
from common.errors import GraftError
from common.exchange import export, load, merge
from common.loading import mix_seed
from common.methods import BitFit, FullFineTune, LinearProbe, LoRA
from common.run import fit, read_record
from common.run import test as run_test
from common.task import OptimSpec
from domains.medical._labelmaps import largest_components, plain_names
from domains.medical.data._records import IGNORE, Case, VolumeBatch, VolumeFacts
from domains.medical.losses import SegmentationLoss
from domains.medical.tasks import Segmentation, VolumeClassification
from tests.domains.medical.conftest import CLASSES, DOMAINS, Balls, Presence, SlicedBalls, data_of, options, task_of

LORA = LoRA(on=["conv"], rank=2)
DEEPER = {"channels": (4, 8, 8), "strides": (2, 2), "num_res_units": 1}
QUIET = {"accelerator": "cpu", "max_epochs": 1}


def batch_of(data, split="test", index=0):
    case = data.case(split, index)
    return VolumeBatch(case["image"][None], case["label"][None], torch.tensor([index]))


# ---- outputs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [2, 3])
def test_logits_have_the_images_size_whatever_it_is(dims):
    data = data_of(dims)
    made = task_of(LORA, data)
    for sides in ((8, 12, 16), (9, 7, 11)):
        images = torch.randn(2, 1, *sides[:dims])
        batch = VolumeBatch(images, torch.zeros(2, *sides[:dims], dtype=torch.long), torch.arange(2))
        assert made(batch).shape == (2, 3, *sides[:dims])
        step = made._built.divisor
        padded = [-(-side // step) * step for side in sides[:dims]]
        whole = torch.zeros(2, 1, *padded)
        inside = (..., *map(slice, sides[:dims]))
        whole[inside] = images
        torch.testing.assert_close(made(batch), made.head(made.backbone(whole))[inside])


@pytest.mark.parametrize("dims", [2, 3])
def test_whole_cases_are_seen_through_blended_windows(dims):
    data = data_of(dims)
    made = task_of(LORA, data, overlap=0.25)
    batch = batch_of(data)
    network = torch.nn.Sequential(made.backbone, made.head)
    with torch.no_grad():
        expected = sliding_window_inference(
            batch.image, data.facts.patch_size, 1, network, overlap=0.25, mode="gaussian"
        )
        found = made.infer(batch)
    torch.testing.assert_close(found, expected)
    kept = made.keep(found)
    assert kept.dtype == torch.uint8
    assert torch.equal(kept, found.argmax(1).to(torch.uint8))


def test_a_case_smaller_than_the_window_is_seen_whole():
    data = data_of(shape=(7, 5, 8))
    made = task_of(LORA, data)
    with torch.no_grad():
        assert made.infer(batch_of(data)).shape == (1, 3, 7, 5, 8)


def test_a_vit_labels_pixels():
    data = data_of(2, shape=(40, 36), patch_size=(32, 32))
    made = task_of(LoRA(on=["attention"], rank=2), data, backbone="test_vit", net=None, decoder_width=8)
    assert made(batch_of(data, "train")._replace(image=torch.randn(2, 1, 32, 32))).shape == (2, 3, 32, 32)
    with torch.no_grad():
        assert made.infer(batch_of(data)).shape == (1, 3, 40, 36)
    assert made.head.classifier.in_channels == 8


def test_only_the_largest_part_of_a_class_is_kept():
    rng = np.random.default_rng(0)
    logits = torch.as_tensor(
        np.stack([ndimage.gaussian_filter(rng.standard_normal((2, 12, 11)), 1.5) for _ in range(3)], 1)
    )
    before, after = logits.argmax(1).numpy(), largest_components(logits).argmax(1).numpy()
    for case in range(2):
        expected = np.zeros_like(before[case])
        for number in (1, 2):
            parts, count = ndimage.label(before[case] == number)
            assert count > 1
            largest = 1 + np.argmax([np.sum(parts == part) for part in range(1, count + 1)])
            expected[parts == largest] = number
        assert np.array_equal(after[case], expected)
    torch.testing.assert_close(largest_components(logits).softmax(1).amax(1), logits.softmax(1).amax(1))


def test_the_largest_part_is_an_option_of_evaluation():
    data = data_of()
    made, cleaned = task_of(LORA, data), task_of(LORA, data, largest_component=True)
    batch = batch_of(data)
    with torch.no_grad():
        torch.testing.assert_close(cleaned.infer(batch), largest_components(made.infer(batch)))
        torch.testing.assert_close(cleaned(batch), made(batch))


# ---- loss and metrics ----------------------------------------------------------------------------------------------


def test_the_loss_is_the_recipes_over_labelled_voxels():
    data = SlicedBalls(patch_size=(8, 8, 8))
    data.setup()
    made = task_of(LORA, data, loss="dice_focal", class_weights=[0.5, 1.0, 2.0])
    batch = batch_of(data, "train")
    expected = SegmentationLoss("dice_focal", IGNORE, torch.tensor([0.5, 1.0, 2.0]))(made(batch), batch.label)
    torch.testing.assert_close(made.compute_loss(batch), expected)


def test_balanced_weights_come_from_the_training_labels(tmp_path):
    data = SlicedBalls()
    made = Segmentation(peft=LORA, **options(class_weights="balanced"))
    fit(made, data, tmp_path / "run", **QUIET)
    label = data.case("train", 0)["label"]
    counts = torch.stack([(label == number).sum() for number in range(3)])
    torch.testing.assert_close(made.loss.weights, counts.sum() / (3 * counts.float()))
    assert task_of(LORA, data, class_weights="balanced").loss.weights is None  # there is nothing to count in


def test_validation_leaves_the_dear_metrics_to_the_test():
    made = task_of(LORA, data_of())
    cheap = {"dice", "dice_bright", "dice_dark_ball", "ece"}
    assert set(made.val_metrics) == cheap
    assert set(made.test_metrics) == set(made.build_metrics()) == cheap | {"hd95_mm", "surface_dice_mm"}
    assert made.test_metrics["hd95_mm"].spacing == data_of().facts.spacing
    assert not made.test_metrics["dice"].pooled
    assert task_of(LORA, data_of(2)).test_metrics["dice"].pooled


def test_names_of_classes_become_names_of_metrics():
    names = ["left kidney", "a/b", "a b", "T2*", "T2", "***", "über"]
    assert plain_names(names) == ["left_kidney", "a_b", "a_b_2", "T2", "T2_2", "_", "über"]


# ---- facts ---------------------------------------------------------------------------------------------------------


def test_facts_survive_a_file():
    made = task_of(LORA, data_of())
    text = json.dumps(made.describe_facts())
    other = Segmentation(peft=LORA, **options())
    other.load_facts(json.loads(text))
    assert other.facts == VolumeFacts(
        **{**vars(made.facts), "name": "", "digest": "", "counts": {}, "preprocessing": {**made.facts.preprocessing}}
    )
    assert other.describe_facts() == made.describe_facts() == json.loads(text)


def test_the_example_batch_is_always_the_same():
    made = task_of(LORA, data_of())
    first, second = made.example_batch(), made.example_batch()
    assert torch.equal(first.image, second.image)
    assert torch.equal(first.label, second.label)
    assert first.image.shape == (2, 1, 8, 8, 8)


def test_options_that_do_not_fit_are_refused():
    with pytest.raises(
        GraftError, match=r"overlap is 1\.5 .*; decoder_width is 0 .*; class_weights with loss 'tversky'"
    ):
        Segmentation("UNet", LORA, overlap=1.5, decoder_width=0, loss="tversky", class_weights="balanced")
    with pytest.raises(GraftError, match=r"one number of at least 0 for each of the 3 classes \(background, bright"):
        task_of(LORA, data_of(), class_weights=[1.0, 2.0])
    with pytest.raises(GraftError, match="Unknown loss 'dise_ce'"):
        task_of(LORA, data_of(), loss="dise_ce")


# ---- deep supervision ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [2, 3])
def test_coarser_outputs_are_trained_at_the_images_size(dims):
    """The loss is that of 1x1 convolutions of the decoder's features, enlarged; half the weight at each level."""
    data = data_of(dims)
    made = task_of(LORA, data, deep_supervision=1, net=DEEPER)
    plain = task_of(LORA, data, net=DEEPER).head.output.state_dict()
    assert all(torch.equal(plain[name], tensor) for name, tensor in made.head.output.state_dict().items())
    sides = (9, 7, 11)[:dims]
    batch = VolumeBatch(torch.randn(2, 1, *sides), torch.randint(0, 3, (2, *sides)), torch.arange(2))
    batch.label[0, :4] = IGNORE
    padded = [-(-side // made._built.divisor) * made._built.divisor for side in sides]
    image = torch.zeros(2, 1, *padded)
    inside = (..., *map(slice, sides))
    image[inside] = batch.image
    seen = []
    level = made._built.model.get_submodule("model.1.submodule.2")
    handle = level.register_forward_hook(lambda *args: seen.append(args[2]))
    fine = made.head(made.backbone(image))[inside]
    handle.remove()
    assert list(seen[0].shape[2:]) == [side // 2 for side in padded]
    mode = {2: "bilinear", 3: "trilinear"}[dims]
    coarse = F.interpolate(made.head.deep[0](seen[0]), scale_factor=2.0, mode=mode)[inside]
    expected = (made.loss(fine, batch.label) + 0.5 * made.loss(coarse, batch.label)) / 1.5
    found = made.compute_loss(batch)
    torch.testing.assert_close(found, expected)
    found.backward()
    assert made.head.deep[0].weight.grad.any()
    assert not level._forward_hooks


def test_deep_supervision_that_cannot_be_is_refused():
    with pytest.raises(GraftError, match=r"deep_supervision is -1 \(at least 0\)"):
        Segmentation("UNet", LORA, deep_supervision=-1)
    with pytest.raises(GraftError, match="deep_supervision with LinearProbe, which trains nothing"):
        Segmentation("UNet", LinearProbe(), deep_supervision=1)
    with pytest.raises(GraftError, match="deep_supervision is 9, and 'UNet' has 1 coarser outputs on its way up"):
        task_of(LORA, data_of(), deep_supervision=9, net=DEEPER)


# ---- a run ---------------------------------------------------------------------------------------------------------


class Die(L.Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.step:
            raise RuntimeError("killed")


@pytest.mark.parametrize("dims", [2, 3])
def test_a_run_goes_from_fit_to_export(tmp_path, dims):
    fresh = lambda: Segmentation(peft=LORA, optim=OptimSpec(lr=1e-2), **options(dims))  # noqa: E731
    run = tmp_path / "run"
    record = fit(fresh(), data_of(dims), run, accelerator="cpu", max_epochs=4)
    assert record["val"]["dice"] > 0.1
    assert record["facts"]["class_names"] == list(CLASSES)
    data = data_of(dims)
    record = run_test(fresh(), data, run, accelerator="cpu")
    assert set(record["test"]) == {"loss", "dice", "dice_bright", "dice_dark_ball", "hd95_mm", "surface_dice_mm", "ece"}

    rows = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == ["test/0 a", "test/1 a"]
    export(run, tmp_path / "adapter", record, DOMAINS)
    loaded = load(tmp_path / "adapter", DOMAINS)
    for index, row in enumerate(rows):
        batch = batch_of(data, "test", index)
        with torch.no_grad():
            expected = loaded.keep(loaded.infer(batch))[0].numpy()
        stored = nib.load(run / row["map"])
        assert np.array_equal(np.asarray(stored.dataobj).reshape(expected.shape), expected)
        assert np.array_equal(stored.affine, data.case("test", index)["affine"])
        assert Image.open(run / row["picture"]).format == "PNG"
        assert row["absent"] == []
    if dims == 3:  # volumes are scored case by case
        for key in ("dice", "dice_bright", "dice_dark_ball"):
            values = [row[key] for row in rows]
            assert record["test"][key] == pytest.approx(sum(v for v in values if v is not None) / 2, abs=1e-5)
    error = merge(tmp_path / "adapter", tmp_path / "merged", DOMAINS)
    assert error < 1e-4


@pytest.mark.parametrize(
    ("peft", "deep"),
    [(LinearProbe(), 0), (FullFineTune(), 0), (BitFit(), 0), (BitFit(), 1)],
    ids=["LinearProbe", "FullFineTune", "BitFit", "BitFit, deep supervision"],
)
def test_every_kind_of_method_is_exported_and_loaded(tmp_path, peft, deep):
    data = data_of()
    task = Segmentation(peft=peft, deep_supervision=deep, **options(net=DEEPER))
    record = fit(task, data, tmp_path / "run", **QUIET)
    export(tmp_path / "run", tmp_path / "adapter", record, DOMAINS)
    card = (tmp_path / "adapter" / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    example = load(tmp_path / "adapter", DOMAINS).example_batch()
    code = code.replace("built = build(", "torch.manual_seed(SEED)\nbuilt = build(")  # here the weights are random
    scope = {"FOLDER": str(tmp_path / "adapter"), "torch": torch, "SEED": mix_seed(1, 0), "images": example.image}
    with torch.no_grad():
        exec(code, scope)
        expected = load(tmp_path / "adapter", DOMAINS)(example)
    torch.testing.assert_close(scope["logits"], expected)


def test_a_run_that_was_killed_ends_as_if_it_had_not_been(tmp_path):
    def start(folder, **changes):
        made = Segmentation(peft=LORA, optim=OptimSpec(lr=1e-2), **options())
        return fit(
            made, data_of(augment=True), tmp_path / folder, save_every=1, accelerator="cpu", max_epochs=2, **changes
        )

    start("whole")
    with pytest.raises(RuntimeError, match="killed"):
        start("cut", callbacks=[Die(4)])
    start("cut", resume=True)
    whole, cut = (read_checkpoint(tmp_path / name / LAST) for name in ("whole", "cut"))
    assert whole["state_dict"].keys() == cut["state_dict"].keys()
    assert all(torch.equal(cut["state_dict"][name], tensor) for name, tensor in whole["state_dict"].items())
    assert read_record(tmp_path / "whole")["val"] == read_record(tmp_path / "cut")["val"]


def test_classes_that_no_label_shows_are_named(tmp_path):
    class Poor(Balls):
        def _load(self, split, index):
            found = super()._load(split, index)
            if split == "test":
                found.label[found.label == 2] = 0
            return found

    fit(Segmentation(peft=LinearProbe(), **options()), Poor(), tmp_path, **QUIET)
    with pytest.warns(UserWarning, match="No label of the test split shows dark ball"):
        record = run_test(Segmentation(peft=LinearProbe(), **options()), Poor(), tmp_path, accelerator="cpu")
    row = json.loads((tmp_path / "predictions.jsonl").read_text().splitlines()[0])
    assert row["absent"] == ["dark ball"]
    assert record["test"]["dice_dark_ball"] == 0.0 or math.isnan(record["test"]["dice_dark_ball"])


def test_labelled_planes_are_all_that_is_scored_and_shown(tmp_path):
    data = SlicedBalls()
    fit(Segmentation(peft=LinearProbe(), **options()), data, tmp_path, **QUIET)
    record = run_test(Segmentation(peft=LinearProbe(), **options()), data, tmp_path, accelerator="cpu")
    (row,) = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    found = np.asarray(nib.load(tmp_path / row["map"]).dataobj)
    truth = data.case("test", 0)["label"].numpy()
    planes = list(data.slices("test"))
    assert np.isin(np.arange(truth.shape[1]), planes).sum() == 5
    scores = []
    for number in (1, 2):
        a, b = found[:, planes] == number, truth[:, planes] == number
        if a.any() or b.any():
            scores.append(2 * (a & b).sum() / (a.sum() + b.sum()))
    assert row["dice"] == pytest.approx(np.mean(scores), abs=1e-5)
    assert record["test"]["dice"] == pytest.approx(np.mean(scores), abs=1e-5)


# ---- classification ------------------------------------------------------------------------------------------------


def test_volumes_are_classified(tmp_path):
    fresh = lambda: VolumeClassification(  # noqa: E731
        peft=LORA, optim=OptimSpec(lr=3e-2, head_lr=1e-1), **options(class_weights="balanced")
    )
    data = Presence()
    fit(fresh(), data, tmp_path / "run", accelerator="cpu", max_epochs=8)
    record = run_test(fresh(), data, tmp_path / "run", accelerator="cpu")
    assert record["test"]["accuracy"] == record["test"]["auroc"] == 1.0
    rows = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    assert [(row["label"], row["prediction"]) for row in rows] == [("balls", "balls"), ("noise", "noise")]
    export(tmp_path / "run", tmp_path / "adapter", record, DOMAINS)
    loaded = load(tmp_path / "adapter", DOMAINS)
    with torch.no_grad():
        found = loaded(batch_of(data)._replace(label=torch.tensor([0]))).softmax(-1)
    assert float(found.max()) == pytest.approx(rows[0]["probability"], abs=1e-5)


def test_the_classifier_reads_mean_and_maximum():
    data = Presence()
    data.setup()
    made = task_of(LORA, data, VolumeClassification, class_weights=[1.0, 3.0])
    batch = batch_of(data)
    features = made.features(batch)
    pooled = torch.cat((features.mean((2, 3, 4)), features.amax((2, 3, 4))), 1)
    torch.testing.assert_close(made(batch), made.head.classifier(pooled))
    expected = F.cross_entropy(made(batch), batch.label, weight=torch.tensor([1.0, 3.0]))
    torch.testing.assert_close(made.compute_loss(batch), expected)


def test_a_row_names_the_subject_where_one_is_stated():
    cases = [Case(f"c{n}", (), target="noise", group="anna" * n) for n in range(2)]
    made = SimpleNamespace(facts=SimpleNamespace(class_names=("balls", "noise")))
    data = SimpleNamespace(records=lambda split: cases)
    rows = VolumeClassification.predictions(made, [torch.tensor([[1.0, 0.0], [0.0, 1.0]])], data, Path())
    assert [(row["id"], row.get("group"), row["prediction"]) for row in rows] == [
        ("c0", None, "balls"),
        ("c1", "anna", "noise"),
    ]
