"""Frozen prefixes: a row is a function of its item and its key, and refused where it is not."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch import nn

from common import frozen
from common._row_store import remove, stores
from common.errors import GraftError
from common.frozen import FrozenPrefix, FrozenRows, content, refuse_random, refuse_trained
from common.run import build_trainer, fit
from common.run import test as run_test
from tests.toy import ToyData, ToySet, ToyTask, spec_of, toy_backbone


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class PlainSet(ToySet):
    def __getitem__(self, index):
        return self.x[index], self.y[index]


class PlainData(ToyData):
    """Toy data without augmentation."""

    def train_dataloader(self):
        loader = super().train_dataloader()
        loader.dataset.__class__ = PlainSet
        return loader

    def val_dataloader(self):
        loader = super().val_dataloader()
        loader.dataset.__class__ = PlainSet
        return loader

    test_dataloader = val_dataloader


class Alone(ToyTask):
    """Compute each item by itself, and keep nothing."""

    runs = 0

    def one(self, item):
        type(self).runs += 1
        return self.backbone(item.unsqueeze(0))[0]

    def features(self, batch):
        return torch.stack([self.one(item) for item in batch[0]]).mean(dim=1)


class Cached(Alone):
    transform = "none"

    def frozen_prefix(self):
        return FrozenPrefix(modules={"backbone": self.backbone}, transform={"toy": self.transform})

    def features(self, batch):
        if self.frozen_rows is None:
            return super().features(batch)
        rows = self.frozen_rows.rows([content(item) for item in batch[0]], lambda i: (self.one(batch[0][i]),))
        return torch.stack([row[0] for row in rows]).mean(dim=1)


class Losses(L.Callback):
    def __init__(self):
        self.train, self.val, self.runs = [], [], []

    def on_train_batch_end(self, trainer, module, outputs, *args):
        self.train.append(float(outputs["loss"]))

    def on_train_epoch_end(self, trainer, module):
        self.val.append({key: float(value) for key, value in trainer.callback_metrics.items() if "val" in key})
        self.runs.append(type(module).runs)


def losses(kind, folder, method="LinearProbe", data=None, **options):
    kind.runs = 0
    found = Losses()
    trainer = build_trainer(folder, found, max_epochs=3, **options)
    trainer.fit(kind(spec_of(method)), datamodule=data or PlainData())
    return found


# ---- exactness


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_losses_are_bit_equal_to_those_without_a_cache_cold_and_warm(tmp_path, precision):
    plain = losses(Alone, tmp_path / "a", precision=precision)
    cold = losses(Cached, tmp_path / "b", precision=precision)
    warm = losses(Cached, tmp_path / "c", precision=precision)
    assert plain.train == cold.train == warm.train
    assert plain.val == cold.val == warm.val


def test_each_item_is_computed_once(tmp_path):
    cold = losses(Cached, tmp_path / "a")
    assert cold.runs == [PROOF + 20] * 3  # the 8 items of validation are among the 20 of training
    warm = losses(Cached, tmp_path / "b")
    assert warm.runs == [PROOF] * 3


def test_rows_are_close_to_what_a_batch_gives(tmp_path):
    plain, cached = losses(ToyTask, tmp_path / "a"), losses(Cached, tmp_path / "b")
    assert cached.train == pytest.approx(plain.train, rel=1e-5)


def test_order_and_size_of_batches_and_what_filled_the_cache_make_no_difference(tmp_path):
    class Other(PlainData):
        def __init__(self):
            super().__init__(batch_size=7, seed=5)

    empty = losses(Cached, tmp_path / "a", data=Other())
    for stored in stores():
        remove(stored.folder)
    losses(Cached, tmp_path / "b")  # fills it in other batches
    assert losses(Cached, tmp_path / "c", data=Other()).train == empty.train


def test_a_run_its_record_and_its_test_are_the_same_cold_and_warm(tmp_path):
    records = []
    for name in ("cold", "warm"):
        task, data = Cached(spec_of("LinearProbe")), PlainData()
        fit(task, data, tmp_path / name, max_epochs=2)
        records.append(run_test(Cached(spec_of("LinearProbe")), PlainData(), tmp_path / name))
    cold, warm = records
    assert cold["val"] == warm["val"]
    assert cold["test"] == warm["test"]
    for cost in ("train_memory", "flops_per_step"):  # that of a step out of the cache
        assert cold["cost"][cost] == warm["cost"][cost]


def test_nothing_is_cached_outside_a_run(tmp_path):
    task = Cached(spec_of("LinearProbe"))
    task.facts = ToyData().facts
    task.assemble()
    task(task.example_batch())
    assert stores() == []


# ---- the key: whatever a row depends on


def rows_of(model=None, transform=None, half=False, owner=None, items=None):
    """A fresh cache over a backbone, and a function that reads two rows and says how many were computed."""
    model = model or toy_backbone().eval().requires_grad_(False)
    cached = FrozenRows(
        FrozenPrefix(modules={"net": model}, transform=transform or {}, half=half), owner or ToyTask(spec_of("LoRA"))
    )
    items = ToySet(2, 0).x if items is None else items
    runs = []

    def compute(position):
        runs.append(position)
        return (model(items[position].unsqueeze(0))[0],)

    def read():
        runs.clear()
        rows = cached.rows([content(item) for item in items], compute)
        return rows, len(runs)

    return cached, read


PROOF = 2  # in eval mode: alone, and with a gradient wanted


def frozen_toy():
    return toy_backbone().eval().requires_grad_(False)


def test_the_same_key_finds_its_rows():
    first, runs = rows_of()[1]()
    assert runs == PROOF + 2
    second, runs = rows_of()[1]()
    assert runs == PROOF
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, second, strict=True))


def changed_weight(model):
    model.blocks[0].fc1.weight[0, 0] += 1e-6


def changed_statistics(model):
    model.input_norm.running_mean += 1e-3


def changed_buffer(model):
    model.register_buffer("scale", torch.ones(1), persistent=False)


def changed_number(model):
    model.norm.eps = 2e-5


def changed_layer(model):
    model.blocks[0].drop = nn.Dropout(0.2).eval()


def changed_type(model):
    model.double()


@pytest.mark.parametrize(
    "change", [changed_weight, changed_statistics, changed_buffer, changed_number, changed_layer, changed_type]
)
def test_another_backbone_has_rows_of_its_own(change):
    rows_of()[1]()
    model = frozen_toy()
    with torch.no_grad():
        change(model)
    items = ToySet(2, 0).x.to(model.norm.weight.dtype)
    found, runs = rows_of(model, items=items)[1]()
    assert runs == PROOF + 2
    with torch.no_grad():
        assert torch.equal(found[1][0], model(items[1:])[0])


def test_weights_that_change_in_place_are_noticed():
    model = frozen_toy()
    read = rows_of(model)[1]
    before = read()[0]
    assert read()[1] == 0
    with torch.no_grad():
        model.norm.bias += 1.0
    after, runs = read()
    assert runs == PROOF + 2
    torch.testing.assert_close(after[0][0], before[0][0] + 1)
    with torch.no_grad():
        model.norm.bias -= 1.0
    assert len(stores()) == 2


def test_another_item_transform_code_or_library_has_rows_of_its_own(monkeypatch):
    rows_of()[1]()
    items = ToySet(2, 0).x
    items[1, 0, 0] += 1e-7
    assert rows_of(items=items)[1]()[1] == PROOF + 1
    assert rows_of(transform={"size": 3})[1]()[1] == PROOF + 2
    assert rows_of(half=True)[1]()[1] == PROOF + 2
    for name, value in (("_version", lambda package: "9"), ("_code_digest", lambda owner: "x"), ("__version__", "9")):
        with monkeypatch.context() as patch:
            patch.setattr(frozen, name, value)
            assert rows_of()[1]()[1] == PROOF + 2


def test_another_precision_or_number_of_threads_has_rows_of_its_own():
    read = rows_of()[1]
    read()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert read()[1] == PROOF + 2
        assert read()[1] == 0
    assert read()[1] == 0
    torch.set_num_threads(2)
    try:
        assert read()[1] == PROOF + 2
    finally:
        torch.set_num_threads(1)
    torch.set_float32_matmul_precision("medium")
    try:
        assert read()[1] == PROOF + 2
    finally:
        torch.set_float32_matmul_precision("highest")


def test_content_tells_types_shapes_and_values_apart():
    x = torch.arange(6.0)
    same = content(x.clone(), x[:2])
    assert same == content(x, x[:2].clone())
    others = [(x,), (x, x[:3]), (x.view(2, 3), x[:2]), (x.double(), x[:2]), (x + 1e-6, x[:2]), (x[:2], x)]
    assert len({same, *(content(*other) for other in others)}) == 7
    assert content(x.view(2, 3).T) == content(x.view(2, 3).T.contiguous())


def test_a_class_that_stands_in_no_file_is_refused():
    scope = {"ToyTask": ToyTask, "__name__": "typed"}
    exec("class Typed(ToyTask):\n    pass", scope)
    with pytest.raises(GraftError, match="Typed stands in no file"):
        rows_of(owner=scope["Typed"](spec_of("LoRA")))


def test_a_changed_source_file_changes_the_key(tmp_path, monkeypatch):
    import importlib
    import sys

    monkeypatch.syspath_prepend(str(tmp_path))
    digests = []
    for number in (1, 2):
        (tmp_path / "own_task.py").write_text(f"class Own:\n    number = {number}\n")
        importlib.invalidate_caches()
        sys.modules.pop("own_task", None)
        digests.append(frozen._code_digest(importlib.import_module("own_task").Own))
    sys.modules.pop("own_task")
    assert digests[0] != digests[1]


# ---- what is kept


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool]
)
def test_rows_of_any_type_and_shape_come_back_bit_for_bit(dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = ((), (3,), (2, 0, 4), (5, 7))
    row = tuple((torch.randn(shape, generator=generator) * 9).to(dtype) for shape in shapes)
    text, data = frozen._encode((*row, row[3].T), half=False)
    back = frozen._decode(text, memoryview(bytearray(data)))
    for tensor, expected in zip(back, (*row, row[3].T), strict=True):
        assert tensor.dtype == expected.dtype
        assert torch.equal(tensor, expected)


def test_special_values_come_back():
    row = (torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),)
    (back,) = frozen._decode(
        *(lambda text, data: (text, memoryview(bytearray(data))))(*frozen._encode(row, half=False))
    )
    assert back.view(torch.int32).tolist() == row[0].view(torch.int32).tolist()


def test_half_rounds_once_and_never_overflows():
    exact, half = rows_of()[1], rows_of(half=True)[1]
    expected = exact()[0][0][0]
    cold, warm = half()[0][0][0], half()[0][0][0]
    assert torch.equal(cold, expected.half().float())
    assert torch.equal(cold, warm)
    large = (torch.tensor([1.0, 1e5]), torch.tensor([1.0, 2.0]))
    text, data = frozen._encode(large, half=True)
    assert torch.equal(frozen._decode(text, memoryview(bytearray(data)))[0], large[0])
    sizes = {stored.key["half"]: stored.size for stored in stores()}
    assert sizes["True"] < sizes["False"]


def test_an_item_twice_in_a_batch_is_computed_once():
    items = ToySet(2, 0).x[[0, 1, 0, 0]]
    rows, runs = rows_of(items=items)[1]()
    assert runs == PROOF + 2
    assert torch.equal(rows[0][0], rows[3][0])


def test_processes_that_begin_together_share_the_work():
    model, items = frozen_toy(), ToySet(8, 0).x
    cached, other = (
        FrozenRows(FrozenPrefix(modules={"toy": model}, transform={}), ToyTask(spec_of("LoRA"))) for _ in range(2)
    )
    identities, alone = [content(item) for item in items], []

    def compute(position):
        return (model(items[position].unsqueeze(0))[0],)

    def slowly(position):
        if not torch.is_grad_enabled():
            alone.append(position)
        if len(alone) == 2:  # behind the proof, during its first row of its own: another process has done the rest
            other.rows(identities, compute)
        return compute(position)

    rows = cached.rows(identities, slowly)
    assert len(alone) == 2
    assert all(torch.equal(row[0], compute(position)[0]) for position, row in enumerate(rows))


def test_a_batch_is_begun_anywhere_and_returned_in_its_order():
    items = ToySet(32, 0).x
    begun = set()
    for seed in range(8):
        torch.manual_seed(seed)
        model = frozen_toy()
        cached = FrozenRows(FrozenPrefix(modules={"toy": model}, transform={"seed": seed}), ToyTask(spec_of("LoRA")))
        found = []

        def compute(position, model=model, found=found):
            found.append(position)
            return (model(items[position].unsqueeze(0))[0],)

        torch.manual_seed(0)
        rows = cached.rows([content(item) for item in items], compute)
        assert sorted(found[PROOF:]) == list(range(32))
        assert all(torch.equal(row[0], compute(position)[0]) for position, row in enumerate(rows))
        begun.add(found[PROOF])
    assert len(begun) > 1  # by chance one in 32 ** 7


# ---- refusals


@pytest.mark.parametrize("method", ["LoRA", "BitFit", "IA3", "FullFineTune", "LastBlocks", "ConvAdapter"])
def test_a_prefix_with_adapters_or_trained_parameters_is_refused(tmp_path, method):
    with pytest.raises(GraftError, match=r"'backbone' cannot be cached: it has (adapters|parameters that train)"):
        losses(Cached, tmp_path, method)


def test_a_switched_off_or_frozen_adapter_is_refused_too():
    task = ToyTask(spec_of("LoRA"))
    task.facts = ToyData().facts
    task.assemble()
    task.backbone.requires_grad_(False)
    with pytest.raises(GraftError, match="it has adapters"):
        refuse_trained({"net": task.backbone})


def test_parameters_that_begin_to_train_are_noticed():
    model = frozen_toy()
    read = rows_of(model)[1]
    read()
    model.blocks[1].fc2.weight.requires_grad_(True)
    with pytest.raises(GraftError, match=r"parameters that train \(net.blocks.1.fc2.weight"):
        read()


def test_a_trained_parameter_outside_of_the_named_modules_is_noticed():
    model, scale = frozen_toy(), nn.Parameter(torch.ones(8))
    cached = FrozenRows(FrozenPrefix(modules={"net": model}, transform={}), ToyTask(spec_of("LoRA")))
    items = ToySet(2, 0).x
    with pytest.raises(GraftError, match="depend on parameters that train outside of it"):
        cached.rows([content(item) for item in items], lambda i: (model(items[i : i + 1])[0] * scale,))


class Training(nn.Module):
    def __init__(self, *parts):
        super().__init__()
        self.parts = nn.ModuleList(parts)


class FunctionalDropout(nn.Module):
    def forward(self, x):
        return nn.functional.dropout(x, 0.5, self.training)


@pytest.mark.parametrize("part", [nn.Dropout(0.1), nn.Dropout2d(0.1), nn.BatchNorm1d(3, affine=False)])
def test_a_prefix_that_is_random_in_training_is_refused(part):
    refuse_random({"net": Training(nn.Dropout(0.0), nn.Linear(2, 2))})
    refuse_random({"net": Training(part).eval()})
    part.train()
    with pytest.raises(GraftError, match=f"'parts.0' \\({type(part).__name__}\\) makes them differ"):
        refuse_random({"net": Training(part)})


@pytest.mark.parametrize("chance", ["layerdrop", "dropout", "drop_prob", "attention_dropout"])
def test_shares_that_layers_keep_as_numbers_are_seen(chance):
    model = Training()
    setattr(model, chance, 0.0)
    refuse_random({"net": model})
    setattr(model, chance, 0.1)
    with pytest.raises(GraftError, match=r"'net' \(Training\)"):
        refuse_random({"net": model})


def test_dropout_inside_a_function_is_seen_when_it_runs():
    model = FunctionalDropout().train()
    cached = FrozenRows(FrozenPrefix(modules={"net": model}, transform={}), ToyTask(spec_of("LoRA")))
    items = torch.ones(2, 40)
    with pytest.raises(GraftError, match="computes something else while it trains"):
        cached.rows([content(item) for item in items], lambda i: (model(items[i]),))


def test_training_modes_are_given_back():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.0), nn.LayerNorm(4)).requires_grad_(False).train()
    model[2].eval()
    items = torch.ones(1, 4)
    cached = FrozenRows(FrozenPrefix(modules={"net": model}, transform={}), ToyTask(spec_of("LoRA")))
    seen = []

    def compute(position):
        seen.append(model.training)
        return (model(items[position]),)

    cached.rows([content(items[0])], compute)
    assert [model.training, model[1].training, model[2].training] == [True, True, False]
    assert seen.count(True) == 1  # to compare train mode with eval mode


def test_stored_rows_that_the_backbone_does_not_compute_are_refused(monkeypatch):
    """Should anything escape the key after all, the first row of a run gives it away."""
    rows_of()[1]()
    model = frozen_toy()
    model.forward = lambda x: x.repeat(1, 1, 2)
    same = {"_layout": "x", "_state_digest": "y"}
    for name, value in same.items():
        monkeypatch.setattr(frozen, name, lambda modules, value=value: value)
    rows_of()[1]()
    with pytest.raises(GraftError, match=r"holds rows that this backbone does not compute.*graft cache --clear"):
        rows_of(model)[1]()


def test_a_copy_for_another_process_carries_no_files():
    import pickle

    cached, read = rows_of(owner=ToyTask(spec_of("LoRA")))
    read()
    assert not pickle.loads(pickle.dumps(cached))._stores
