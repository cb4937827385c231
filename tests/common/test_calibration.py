"""What methods see of the data before the first step, what they make of it, and that it comes along everywhere."""

from __future__ import annotations

import json
from pathlib import Path

import lightning as L
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from common import exchange
from common.attach import attach, probe, tuner_layers
from common.calibration import calibrate
from common.checkpoint import LAST, read_checkpoint
from common.errors import GraftError
from common.exchange import ADAPTER, export, load
from common.loading import first_batches
from common.methods import GPS, METHODS, SCT, FishMask, SHiRA
from common.run import fit, read_record
from tests.toy import DOMAINS, FAMILY, Batch, ToyData, ToyTask, spec_of, toy_backbone

SPECS = {
    "FishMask": spec_of("FishMask"),
    "GPS": spec_of("GPS", per_neuron=2),
    "SHiRA-gradient": spec_of("SHiRA", mask="gradient"),
    "SHiRA-snip": spec_of("SHiRA", mask="snip"),
    "SCT": spec_of("SCT"),
    "LoRA-eva": spec_of("LoRA", init="eva", batches=2),
}
EACH = pytest.mark.parametrize("name", SPECS)


# ---- which batches -------------------------------------------------------------------------------------------------


def test_the_first_batches_of_a_loader_in_its_order():
    whole = list(ToyData().train_dataloader())
    some = list(first_batches(ToyData().train_dataloader(), 2))
    assert len(some) == 2
    assert all(torch.equal(a[0], b[0]) for a, b in zip(some, whole, strict=False))
    single = list(first_batches(ToyData().train_dataloader(), 2, singly=True))
    assert [len(x) for x, _ in single] == [1] * 8
    assert torch.equal(torch.cat([x for x, _ in single]), torch.cat([x for x, _ in some]))
    assert len(list(first_batches(ToyData().train_dataloader(), 99))) == len(whole)


# ---- what is seen --------------------------------------------------------------------------------------------------


class Seen(Exception):
    """Carries what a method was shown."""


def loss_of(output):
    return (output * torch.linspace(-1, 2, 8)).square().mean()


def batches(count):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(2, 3, 4, generator=generator) for _ in range(count)]


def see(spec_class, monkeypatch, **settings):
    """What the method is shown of three batches."""

    def note(self, layers, seen):
        raise Seen(seen)

    monkeypatch.setattr(spec_class, "calibrate", note)
    attached = attach(toy_backbone(), spec_of(spec_class.__name__, batches=3, **settings), FAMILY)
    attached.train(False)
    loader = torch.utils.data.DataLoader(torch.cat(batches(5)), batch_size=2)
    with pytest.raises(Seen) as seen:
        calibrate(attached, loader, lambda x: loss_of(attached.model(x)), seed=0)
    assert not attached.model.training
    return seen.value.args[0]


def bare():
    return toy_backbone().eval()


def gradients(x):
    model = bare()
    loss_of(model(x)).backward()
    return {name: module.weight.grad for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def test_gradients_are_the_bare_backbones(monkeypatch):
    seen = see(GPS, monkeypatch)
    whole = [gradients(x) for x in batches(3)]
    assert len(seen) == 8
    for name, value in seen.items():
        torch.testing.assert_close(value, sum(one[name] for one in whole) / 3)


def test_the_fisher_information_is_of_single_examples(monkeypatch):
    seen = see(FishMask, monkeypatch)
    whole = [gradients(x[None]) for batch in batches(3) for x in batch]
    assert len(whole) == 6
    for name, value in seen.items():
        torch.testing.assert_close(value, sum(one[name].square() for one in whole) / 6)


def test_the_energy_of_a_channel_is_its_mean_square(monkeypatch):
    seen = see(SCT, monkeypatch, target_modules=["mix", "blocks.0.fc2"])
    model, outputs = bare(), {"mix": [], "blocks.0.fc2": []}
    for name, kept in outputs.items():
        model.get_submodule(name).register_forward_hook(lambda _, __, output, kept=kept: kept.append(output.detach()))
    for x in batches(3):
        model(x)
    torch.testing.assert_close(seen["mix"], torch.cat(outputs["mix"]).square().mean((0, 2)))
    torch.testing.assert_close(seen["blocks.0.fc2"], torch.cat(outputs["blocks.0.fc2"]).square().mean((0, 1)))


def test_nothing_but_the_adapter_is_touched():
    attached = attach(toy_backbone(), SPECS["FishMask"], FAMILY)
    attached.train(False)
    held = attached.model.get_submodule("base_model.model.blocks.0.fc1").sparse_values["default"]
    held.requires_grad_(False)  # a method may hold a part of its adapter
    before = {name: tensor.clone() for name, tensor in attached.model.state_dict().items()}
    trained = {name for name, p in attached.model.named_parameters() if p.requires_grad}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    loader = torch.utils.data.DataLoader(torch.cat(batches(3)), batch_size=2)
    calibrate(attached, loader, lambda x: (attached.model(x) * torch.randn(())).mean(), seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    after = attached.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if "sparse_" not in name)
    assert trained == {name for name, p in attached.model.named_parameters() if p.requires_grad}
    assert all(p.grad is None for p in attached.model.parameters())


# ---- what is made of it --------------------------------------------------------------------------------------------


def calibrated(spec):
    attached = attach(toy_backbone(), spec, FAMILY)
    attached.train(False)
    loader = torch.utils.data.DataLoader(torch.cat(batches(2)), batch_size=2)
    calibrate(attached, loader, lambda x: loss_of(attached.model(x)), seed=0)
    layers = {name.removeprefix("base_model.model."): layer for name, layer in tuner_layers(attached.model).items()}
    return attached, layers


def chosen(layer):
    return set(layer.sparse_indices["default"].tolist())


def test_fish_mask_takes_the_largest_of_the_whole_backbone():
    attached, layers = calibrated(SPECS["FishMask"])
    whole = [gradients(x[None]) for batch in batches(2) for x in batch]
    fisher = {name: sum(one[name].square() for one in whole).flatten() for name in layers}
    total = sum(max(1, round(0.1 * len(own))) for own in fisher.values())
    assert sum(len(chosen(layer)) for layer in layers.values()) == total
    least = min(
        float(fisher[name][list(chosen(layer))].min()) for name, layer in layers.items() if len(chosen(layer)) > 1
    )
    for name, layer in layers.items():
        left = fisher[name][[i for i in range(len(fisher[name])) if i not in chosen(layer)]]
        assert float(left.max()) <= least * (1 + 1e-5)
        assert int(fisher[name].argmax()) in chosen(layer)  # no layer goes without
    assert len({len(chosen(layer)) / layer.weight.numel() for layer in layers.values()}) > 2
    counted = sum(p.numel() for p in attached.model.parameters() if p.requires_grad)
    assert sum(number for _, number in attached.params_by_role.values()) == counted == total


def test_gps_takes_the_largest_of_each_neuron():
    _, layers = calibrated(SPECS["GPS"])
    both = [gradients(x) for x in batches(2)]
    for name, layer in layers.items():
        rows = (both[0][name] + both[1][name]).abs()
        wanted = {row * rows.shape[1] + int(i) for row, values in enumerate(rows) for i in values.topk(2).indices}
        assert chosen(layer) == wanted


@pytest.mark.parametrize("mask", ["gradient", "snip"])
def test_shira_takes_the_largest_of_each_layer(mask):
    _, layers = calibrated(SPECS[f"SHiRA-{mask}"])
    both = [gradients(x) for x in batches(2)]
    for name, layer in layers.items():
        scores = (both[0][name] + both[1][name]).abs()
        scores = (scores * layer.weight.detach().abs() if mask == "snip" else scores).flatten()
        assert chosen(layer) == set(scores.topk(min(2 * sum(layer.weight.shape), len(scores))).indices.tolist())


def test_sct_takes_the_loudest_channels():
    _, layers = calibrated(SPECS["SCT"])
    model, outputs = bare(), []
    model.blocks[1].out.register_forward_hook(lambda _, __, output: outputs.append(output.detach()))
    for x in batches(2):
        model(x)
    best = torch.cat(outputs).square().mean((0, 1)).topk(3).indices
    assert layers["blocks.1.out"].salient_channels["default"].tolist() == sorted(best.tolist())


def test_eva_starts_at_the_principal_directions_of_the_inputs():
    """A is (up to signs) what an SVD of all inputs, stacked, gives."""
    _, layers = calibrated(SPECS["LoRA-eva"])
    for name in ("blocks.0.qkv", "blocks.1.fc2"):
        model, inputs = bare(), []
        model.get_submodule(name).register_forward_hook(lambda _, x, __, kept=inputs: kept.append(x[0].detach()))
        for x in batches(2):
            model(x)
        wanted = torch.linalg.svd(torch.cat(inputs).flatten(0, -2), full_matrices=False).Vh[:2]
        found = layers[name].lora_A["default"].weight.detach()
        torch.testing.assert_close((found @ wanted.T).abs(), torch.eye(2), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("composed", ["Mixture", "PerGroup", "AtBudget"])
def test_parts_of_a_composed_method_see_their_own_layers(composed):
    gps, sct = spec_of("GPS", on=["ffn"], batches=2), spec_of("SCT", on=["attention_out"], batches=2)
    spec = {
        "Mixture": lambda: METHODS["Mixture"](parts=[gps, sct]),
        "PerGroup": lambda: METHODS["PerGroup"](groups=[[gps], [sct]]),
        "AtBudget": lambda: METHODS["AtBudget"](
            method=spec_of("LoRA", init="eva", batches=2), share=0.5, tolerance=9.0
        ),
    }[composed]()
    alone = [calibrated(part)[1] for part in ((gps, sct) if composed != "AtBudget" else (spec._sized(2),))]
    attached, layers = calibrated(spec)
    wanted = {
        "Mixture": {"blocks.0.fc1", "blocks.0.fc2", "blocks.1.fc1", "blocks.1.fc2", "blocks.0.out", "blocks.1.out"},
        "PerGroup": {"blocks.0.fc1", "blocks.0.fc2", "blocks.1.out"},
        "AtBudget": set(alone[0]),
    }[composed]
    assert layers.keys() == wanted
    for name, layer in layers.items():
        own = next(part[name] for part in alone if name in part)
        for kept in ("sparse_indices", "salient_channels"):
            if hasattr(own, kept):
                assert torch.equal(getattr(layer, kept)["default"], getattr(own, kept)["default"])
        if composed == "AtBudget":
            rows = own.lora_A["default"].weight
            assert torch.equal(layer.lora_A["default"].weight[: len(rows)], rows)
    trained = sum(p.numel() for p in attached.model.parameters() if p.requires_grad)
    assert sum(number for _, number in attached.params_by_role.values()) == trained


# ---- in a run ------------------------------------------------------------------------------------------------------


def buffers(task):
    """What was chosen; where the choice is a start, what was made of it."""
    chosen = ("sparse_indices", "salient_channels", "lora_A")
    return {name: t.clone() for name, t in task.state_dict().items() if any(part in name for part in chosen)}


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def run(spec, folder, epochs=2, seed=0, **options):
    task = ToyTask(spec, seed=seed)
    fit(task, ToyData(), folder, max_epochs=epochs, **options)
    return task


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    done = {}

    def build(name) -> tuple[Path, ToyTask]:
        if name not in done:
            folder = tmp_path_factory.mktemp("run") / name
            done[name] = folder, run(SPECS[name], folder)
        return done[name]

    return build


@EACH
def test_a_run_sees_its_data_and_runs_alike_when_repeated(runs, name, tmp_path):
    _, task = runs(name)
    fresh = attach(toy_backbone(), SPECS[name], FAMILY).model
    assert not same(buffers(task), {f"backbone.{n}": t for n, t in buffers(fresh).items()})
    again = run(SPECS[name], tmp_path / "again")
    assert same(task.state_dict(), again.state_dict())


def test_the_choice_follows_the_heads_seed_where_the_loss_does(runs, tmp_path):
    assert not same(buffers(runs("FishMask")[1]), buffers(run(SPECS["FishMask"], tmp_path / "run", seed=1)))
    assert same(buffers(runs("SCT")[1]), buffers(run(SPECS["SCT"], tmp_path / "other", seed=1)))  # sees no loss


class Die(L.Callback):
    """Stop a fit behind its third step, as if it had been killed."""

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == 3:
            raise RuntimeError("killed")


@EACH
def test_a_run_that_goes_on_ends_like_one_that_never_stopped(runs, name, tmp_path, monkeypatch):
    _, whole = runs(name)
    with pytest.raises(RuntimeError, match="killed"):
        run(SPECS[name], tmp_path / "run", save_every=1, callbacks=[Die()])
    assert buffers(whole).keys() <= read_checkpoint(tmp_path / "run" / LAST)["state_dict"].keys()
    monkeypatch.setattr("common.task.calibrate", None)  # what it would find is in the checkpoint
    task = run(SPECS[name], tmp_path / "run", resume=True, save_every=1)
    assert same(task.state_dict(), whole.state_dict())


@EACH
def test_the_choice_is_exported_and_loads_with_plain_peft(runs, name, tmp_path):
    folder, task = runs(name)
    record = read_record(folder)
    certificate = export(folder, tmp_path / "adapter", record, DOMAINS)
    assert certificate["merge_max_abs_error"] <= 1e-4
    reloaded = load(tmp_path / "adapter", DOMAINS)
    assert same(buffers(reloaded), buffers(task))
    batch = Batch(torch.randn(4, 3, 4, generator=torch.Generator().manual_seed(9)), torch.zeros(4).long())
    model = PeftModel.from_pretrained(toy_backbone(), str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        expected = task.eval()(batch)
        torch.testing.assert_close(reloaded(batch), expected)
        torch.testing.assert_close(task.head(model(batch.x).mean(dim=1)), expected)
    cost = record["cost"]
    counts = {role: row["trainable"] for role, row in cost["params_by_role"].items()}
    assert sum(counts.values()) == cost["params_trainable_backbone"]
    numbers = sum(t.numel() for t in load_file(tmp_path / "adapter" / ADAPTER).values())
    if name not in ("SCT", "LoRA-eva"):
        assert numbers == 2 * cost["params_trainable_backbone"]  # values and positions, and no dense mask


def test_a_damaged_choice_is_refused(runs, tmp_path):
    folder, _ = runs("FishMask")
    export(folder, tmp_path / "adapter", read_record(folder), DOMAINS)
    path = tmp_path / "adapter" / ADAPTER
    state = load_file(path)
    key = next(name for name in state if name.endswith("sparse_indices"))
    save_file({**state, key: state[key] + 100_000}, path, metadata={"format": "pt"})
    with pytest.raises(GraftError, match=r"does not fit: .*names weights beyond"):
        load(tmp_path / "adapter", DOMAINS)
    save_file({**state, key: state[key][:-1]}, path, metadata={"format": "pt"})
    with pytest.raises(GraftError, match=r"does not fit: .*size mismatch"):
        load(tmp_path / "adapter", DOMAINS)


def test_a_checkpoint_with_another_choice_fits_and_a_torn_one_does_not(runs):
    folder, task = runs("FishMask")
    restored = exchange.restore(folder, read_record(folder), DOMAINS)
    assert same(buffers(restored), buffers(task))
    state = dict(read_checkpoint(folder / LAST)["state_dict"])
    key = next(name for name in state if "sparse_values" in name)
    state[key] = state[key][:-1]
    with pytest.raises(GraftError, match="sparse_values"):
        restored.load_trained(state)


def test_the_user_is_told(runs):
    notes = " ".join(read_record(runs("GPS")[0])["notes"])
    assert "Which weights are trained is decided by 2 training batches before the first step" in notes
    assert json.loads((runs("GPS")[0] / "metrics.json").read_text())["method"]["init_args"]["batches"] == 2


def test_a_mask_that_meets_a_zero_gradient_is_not_dead_and_an_unused_layer_is():
    model = toy_backbone()
    with torch.no_grad():
        model.blocks[0].fc1.bias.fill_(-100.0)  # behind a ReLU
    attached = attach(model, FishMask(on=["ffn_in"], density=0.01), FAMILY)
    probe(attached, lambda: attached.model(batches(1)[0]))
    model = toy_backbone()
    model.blocks[0].forward = lambda x: x
    attached = attach(model, FishMask(on=["ffn_in"], density=0.01), FAMILY)
    with pytest.raises(GraftError, match=r"1 of 2 adapters are dead in train mode: .*\(blocks.0.fc1\)"):
        probe(attached, lambda: attached.model(batches(1)[0]))


# ---- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (FishMask(density=0), r"FishMask density is 0; give a share in \(0, 1\]"),
        (spec_of("MagnitudeMask", density=1.5), r"MagnitudeMask density is 1.5"),
        (FishMask(batches=0), "FishMask batches is 0; give a whole number of at least 1"),
        (GPS(per_neuron=0), "GPS per_neuron is 0; give"),
        (SHiRA(rank=0), "SHiRA rank is 0; give"),
        (SCT(channels=0, batches=0), "SCT channels is 0 and batches is 0; give"),
        (spec_of("FacTTT", rank=0), "FacTTT rank is 0; give"),
        (spec_of("FacTTK", rank=9), r"FacTTK rank is 9, but all layers share tiles .*'blocks.0.qkv' \(24 x 8\)"),
        (spec_of("LoRA", batches=0), "LoRA batches is 0; give"),
        (spec_of("LoRA", init="eva", on=["stem"]), r"LoRA with init 'eva' cannot act on 'mix' \(Conv1d, role stem\)"),
        (GPS(target_modules=["norm"]), r"GPS cannot act on 'norm' \(LayerNorm, role norm\); it takes Linear, Conv1d"),
    ],
)
def test_settings_that_make_no_sense_are_refused(spec, words):
    with pytest.raises(GraftError, match=words):
        attach(toy_backbone(), spec, FAMILY)
