"""What a run shares: loadable with plain peft, exact, merged on request, and refused wherever it does not fit."""

from __future__ import annotations

import errno
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from common import exchange
from common.checkpoint import LAST
from common.domain import Domain
from common.errors import GraftError
from common.exchange import ADAPTER, GRAFT, HEAD, MODEL, adapter_bytes, export, load, merge
from common.run import fit, read_record
from common.run import test as evaluate
from tests.cases import CASES, ON_TOY
from tests.toy import DOMAINS, Batch, Facts, ToyData, ToyTask, spec_of, toy_backbone

SPECS = {name: CASES[name].toy for name in ON_TOY} | {
    "LoRA-dora": spec_of("LoRA", dora=True),
    "LoRA-pissa": spec_of("LoRA", init="pissa", rslora=True),
    "LoRA-olora": spec_of("LoRA", init="olora", dropout=0.1),
}
EACH = pytest.mark.parametrize("name", SPECS)
WITHOUT_ADAPTER = {"FullFineTune", "LinearProbe"}
NOT_MERGEABLE = [name for name in ON_TOY if not CASES[name].mergeable]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Build (run folder, adapter folder, certificate, record) of a method once, when it is first asked for."""
    done = {}

    def build(name):
        if name not in done:
            place = tmp_path_factory.mktemp(name)
            fit(ToyTask(SPECS[name]), ToyData(), place / "run", max_epochs=2)
            if name == "LoRA":
                evaluate(ToyTask(SPECS[name]), ToyData(), place / "run")
            record = read_record(place / "run")
            certificate = export(place / "run", place / "adapter", record, DOMAINS)
            done[name] = place / "run", place / "adapter", certificate, record
        return done[name]

    return build


@pytest.fixture
def adapter(shared, tmp_path):
    """A copy of the LoRA adapter folder, to be damaged."""
    return Path(shutil.copytree(shared("LoRA")[1], tmp_path / "adapter"))


def batch():
    return Batch(torch.randn(4, 3, 4, generator=torch.Generator().manual_seed(9)), torch.zeros(4).long())


def logits(task):
    with torch.no_grad():
        return task(batch())


def trained(run, record):
    return exchange.restore(run, record, DOMAINS)


def names(folder):
    return {path.name for path in folder.iterdir()}


# ---- reload and merge ----------------------------------------------------------------------------------------------


@EACH
def test_a_reloaded_adapter_computes_the_same(shared, name):
    run, adapter, certificate, record = shared(name)
    expected = logits(trained(run, record))
    reloaded = load(adapter, DOMAINS)
    torch.testing.assert_close(logits(reloaded), expected, atol=1e-5, rtol=1e-5)
    assert certificate["reload_max_abs_error"] <= 1e-5
    assert not reloaded.training
    bare = ToyTask(SPECS[name])
    bare.facts = Facts()
    bare.assemble()
    assert not torch.allclose(logits(bare.eval()), expected, atol=1e-4)  # the run has learned something to lose


@pytest.mark.parametrize("name", [name for name in SPECS if name not in NOT_MERGEABLE])
def test_a_merged_model_is_plain_weights_and_computes_the_same(shared, name, tmp_path):
    run, adapter, certificate, record = shared(name)
    assert certificate["not_mergeable"] is None
    assert certificate["merge_max_abs_error"] <= 1e-4
    error = merge(adapter, tmp_path / "merged", DOMAINS)
    assert error <= 1e-4
    plain, head = toy_backbone(seed=5).eval(), nn.Linear(8, 2)
    plain.load_state_dict(load_file(tmp_path / "merged" / MODEL))
    head.load_state_dict(load_file(tmp_path / "merged" / HEAD))
    with torch.no_grad():
        output = head(plain(batch().x).mean(dim=1))
    torch.testing.assert_close(output, logits(trained(run, record)), atol=1e-4, rtol=1e-4)
    assert names(tmp_path / "merged") == {MODEL, HEAD, "source.json", "certificate.json"}
    certificate = json.loads((tmp_path / "merged" / "certificate.json").read_text())
    assert certificate["merge_max_abs_error"] == error


@pytest.mark.parametrize("name", [name for name in SPECS if name not in WITHOUT_ADAPTER])
def test_plain_peft_loads_the_adapter_onto_the_original_base(shared, name):
    """No loader of Graft: a fresh bare backbone, PEFT, and the head's tensors."""
    run, adapter, _, record = shared(name)
    model = PeftModel.from_pretrained(toy_backbone(), str(adapter)).eval()
    head = nn.Linear(8, 2)
    head.load_state_dict(load_file(adapter / HEAD))
    with torch.no_grad():
        output = head(model(batch().x).mean(dim=1))
    torch.testing.assert_close(output, logits(trained(run, record)), atol=1e-5, rtol=1e-5)


@EACH
def test_the_folder_holds_what_it_should_and_no_frozen_weight(shared, name):
    _, adapter, _, _ = shared(name)
    always = {HEAD, GRAFT, "certificate.json", "probe.safetensors", "README.md"}
    files = {"FullFineTune": {MODEL}, "LinearProbe": set()}.get(name, {ADAPTER, "adapter_config.json"})
    assert names(adapter) == always | files
    if name not in WITHOUT_ADAPTER:
        stored = {key.replace(".base_layer", ""): tensor for key, tensor in load_file(adapter / ADAPTER).items()}
        assert not {f"base_model.model.{key}" for key in toy_backbone().state_dict()} & stored.keys() - {
            key for key in stored if name in ("LastBlocks", "NormTuning")
        }


@EACH
def test_the_recorded_sizes_are_those_of_the_files(shared, name):
    _, adapter, _, record = shared(name)
    cost = record["cost"]
    file = adapter / (MODEL if name == "FullFineTune" else ADAPTER)
    size = file.stat().st_size if file.exists() else 0
    assert abs(cost["adapter_bytes"] - size) <= 64  # PEFT adds a line of metadata
    assert cost["head_bytes"] == (adapter / HEAD).stat().st_size
    assert cost["backbone_bytes"] == 4 * sum(p.numel() for p in toy_backbone().parameters())


@pytest.mark.parametrize("name", ["LoRA-pissa", "LoRA-olora"])
def test_a_start_from_the_spectrum_is_exported_as_plain_lora(shared, name):
    config = json.loads((shared(name)[1] / "adapter_config.json").read_text())
    assert config["r"] == 2 * SPECS[name].rank
    assert config["init_lora_weights"] is True
    with pytest.raises(GraftError, match="dora cannot start"):
        ToyTask(spec_of("LoRA", init="pissa", dora=True)).peft.plan(toy_backbone(), None)


@pytest.mark.parametrize("name", NOT_MERGEABLE)
def test_what_cannot_be_merged_is_said_so(shared, name, tmp_path):
    """It trains and reloads, but is no change of a weight."""
    _, adapter, certificate, _ = shared(name)
    reason = f"{name} cannot be merged on toy: "
    assert certificate["merge_max_abs_error"] is None
    assert certificate["not_mergeable"].startswith(reason)
    assert f"not mergeable: {reason}" in (adapter / "README.md").read_text()
    with pytest.raises(GraftError, match=reason):
        merge(adapter, tmp_path / "merged", DOMAINS)
    assert names(tmp_path) == set()


# ---- the papers ----------------------------------------------------------------------------------------------------


def test_the_card_has_quality_cost_and_base(shared):
    _, adapter, certificate, record = shared("LoRA")
    card = (adapter / "README.md").read_text()
    for stage in ("val", "test"):
        for metric, value in record[stage].items():
            assert f"{metric} {value:.4f}" in card
    cost = record["cost"]
    for figure in (
        f"{cost['params_trainable']:,} of {cost['params_total']:,}",
        f"{cost['trainable_percent']:.3f} %",
        f"{cost['train_memory']['total'] / 1e6:.1f} MB",
        f"adapter {cost['adapter_bytes']:,} bytes",
        f"{cost['steps']} steps",
        record["base_digest"],
        record["data"]["digest"],
        f"{certificate['reload_max_abs_error']:.1e}",
        "rank=2",
        "import torch",
    ):
        assert figure in card
    assert card.startswith("---\nlibrary_name: peft\n")


def test_the_card_says_when_the_test_split_was_not_read(shared):
    assert "test split of this run was not read" in (shared("IA3")[1] / "README.md").read_text()
    assert "test split of this run was not read" not in (shared("LoRA")[1] / "README.md").read_text()


def test_graft_json_says_what_it_belongs_to_in_plain_values(shared):
    _, adapter, _, record = shared("LoRA")
    stored = json.loads((adapter / GRAFT).read_text())
    for key in ("domain", "task", "settings", "facts", "method", "optim", "seed", "base_digest", "backbone"):
        assert stored[key] == record[key]
    assert json.loads((adapter / "certificate.json").read_text()) == shared("LoRA")[2]


# ---- what export refuses -------------------------------------------------------------------------------------------


def test_an_existing_folder_is_refused_and_kept(shared, tmp_path):
    run, adapter, _, record = shared("LoRA")
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(GraftError, match="out exists already"):
        export(run, out, record, DOMAINS)
    with pytest.raises(GraftError, match="out exists already"):
        merge(adapter, out, DOMAINS)
    assert names(tmp_path) == {"out"}
    assert names(out) == {"mine"}


@pytest.mark.parametrize("verb", ["export", "merge"])
def test_a_failure_on_the_way_leaves_nothing(shared, tmp_path, monkeypatch, verb):
    run, adapter, _, record = shared("LoRA")

    def fail(*args):
        raise ValueError("on the way")

    monkeypatch.setattr(exchange, "write_json", fail)
    with pytest.raises(ValueError, match="on the way"):
        export(run, tmp_path / "out", record, DOMAINS) if verb == "export" else merge(
            adapter, tmp_path / "out", DOMAINS
        )
    assert names(tmp_path) == set()


@pytest.mark.parametrize("verb", ["export", "merge"])
@pytest.mark.parametrize("kind", ["system", "safetensors"])
def test_a_full_disk_is_one_line_and_leaves_nothing(shared, tmp_path, monkeypatch, verb, kind):
    from safetensors import SafetensorError

    run, adapter, _, record = shared("LoRA")
    full = OSError(errno.ENOSPC, "No space left on device")
    error = full if kind == "system" else SafetensorError(f"Error while serializing: I/O error: {full}")

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(exchange, "save_file", fail)
    with pytest.raises(GraftError, match=r"out could not be written: .*No space left on device.*Nothing was left"):
        export(run, tmp_path / "out", record, DOMAINS) if verb == "export" else merge(
            adapter, tmp_path / "out", DOMAINS
        )
    assert names(tmp_path) == set()


def test_a_place_that_cannot_be_written_is_one_line(shared, tmp_path):
    run, _, _, record = shared("LoRA")
    (tmp_path / "file").touch()
    with pytest.raises(GraftError, match=r"file/out cannot be written"):
        export(run, tmp_path / "file" / "out", record, DOMAINS)


def test_an_export_that_does_not_reload_exactly_is_refused(shared, tmp_path, monkeypatch):
    run, _, _, record = shared("LoRA")
    real = exchange.load

    def inexact(folder, domains):
        task = real(folder, domains)
        with torch.no_grad():
            task.head.bias += 1e-3
        return task

    monkeypatch.setattr(exchange, "load", inexact)
    with pytest.raises(GraftError, match=r"does not reload exactly: outputs differ by 1\.0e-03"):
        export(run, tmp_path / "out", record, DOMAINS)
    assert names(tmp_path) == set()


def test_a_merge_that_changes_the_outputs_is_refused(adapter, tmp_path, monkeypatch):
    real = exchange.merged_backbone

    def inexact(task):
        base = real(task)
        with torch.no_grad():
            base.norm.bias += 1.0
        return base

    monkeypatch.setattr(exchange, "merged_backbone", inexact)
    with pytest.raises(GraftError, match="Merging changes the outputs"):
        merge(adapter, tmp_path / "out", DOMAINS)
    assert not (tmp_path / "out").exists()


def test_a_run_whose_checkpoint_or_base_has_changed_is_refused(shared, tmp_path):
    run, _, _, record = shared("LoRA")
    with pytest.raises(GraftError, match="trained on other weights of 'toy'"):
        export(run, tmp_path / "out", {**record, "settings": {"base_seed": 3}}, DOMAINS)
    with pytest.raises(GraftError, match="There is no checkpoint"):
        export(tmp_path, tmp_path / "out", record, DOMAINS)
    with pytest.raises(GraftError, match="trained to step 10 after its results of step 9"):
        export(run, tmp_path / "out", {**record, "cost": {**record["cost"], "steps": 9}}, DOMAINS)
    with pytest.raises(GraftError, match="does not fit this model"):
        export(run, tmp_path / "out", {**record, "method": spec_of("BitFit").describe()}, DOMAINS)
    assert names(tmp_path) == set()
    assert (run / LAST).exists()


# ---- what load refuses ---------------------------------------------------------------------------------------------


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_folder_that_is_no_adapter_is_refused(tmp_path):
    with pytest.raises(GraftError, match=r"is not an adapter folder \(graft.json is missing\).*graft export"):
        load(tmp_path, DOMAINS)


def test_other_base_weights_are_refused(adapter):
    change(adapter / GRAFT, base_digest="0" * 64)
    with pytest.raises(GraftError, match=r"other weights of 'toy': digest 000000000000 expected"):
        load(adapter, DOMAINS)


@pytest.mark.parametrize("name", ["LoRA", "FullFineTune", "LinearProbe"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "empty"])
def test_damaged_files_of_tensors_are_refused(shared, tmp_path, name, damage):
    for file in {"LoRA": (ADAPTER, HEAD), "FullFineTune": (MODEL, HEAD), "LinearProbe": (HEAD,)}[name]:
        folder = Path(shutil.copytree(shared(name)[1], tmp_path / file))
        whole = (folder / file).read_bytes()
        (folder / file).unlink()
        if damage != "missing":
            (folder / file).write_bytes(whole[: len(whole) // 2] if damage == "truncated" else b"")
        with pytest.raises(GraftError, match=rf"{file}.*Export"):
            load(folder, DOMAINS)


@pytest.mark.parametrize("file", [ADAPTER, HEAD])
@pytest.mark.parametrize("damage", ["one less", "one more", "renamed", "other shape"])
def test_files_with_other_tensors_are_refused(adapter, file, damage):
    state = load_file(adapter / file)
    first = sorted(state)[0]
    tensor = state[first]
    if damage in ("one less", "renamed"):
        del state[first]
    if damage in ("one more", "renamed"):
        state["base_model.model.more.lora_A.weight"] = tensor.clone()
    if damage == "other shape":
        state[first] = torch.zeros(*(size + 1 for size in tensor.shape))
    save_file(state, adapter / file)
    with pytest.raises(GraftError, match="does not fit") as caught:
        load(adapter, DOMAINS)
    assert "\n" not in str(caught.value)


def test_a_damaged_configuration_is_refused(adapter):
    for content in ("{", "", None):
        (adapter / "adapter_config.json").unlink()
        if content is not None:
            (adapter / "adapter_config.json").write_text(content)
        with pytest.raises(GraftError, match=r"adapter_config.json is missing or damaged"):
            load(adapter, DOMAINS)


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"lora_alpha": 99}, "lora_alpha"),
        ({"peft_type": "IA3"}, "peft_type"),
        ({"target_modules": ["blocks.0.fc1"]}, "target_modules"),
        ({"megatron_config": {"x": 1}, "megatron_core": "evil"}, "megatron_config"),
    ],
)
def test_a_configuration_that_is_not_the_methods_is_refused(adapter, values, key):
    """PEFT would load another scale without a word."""
    change(adapter / "adapter_config.json", **values)
    with pytest.raises(GraftError, match=f"does not say what graft.json says .*{key}"):
        load(adapter, DOMAINS)
    assert "evil" not in sys.modules


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"domain": "nowhere"}, r"domain 'nowhere'.*Allowed: toy"),
        ({"domain": "tests.toy"}, r"domain 'tests.toy'"),
        ({"task": "os.system"}, r"task of domain toy 'os.system'.*Allowed: ToyTask"),
        ({"task": "Block"}, "task of domain toy 'Block'"),
        ({"method": {"class_path": "os.system", "init_args": {}}}, r"method 'os.system'"),
        ({"method": {"class_path": "Lora", "init_args": {}}}, r"method 'Lora'. Did you mean 'LoRA'"),
        ({"method": {"class_path": "LoRA", "init_args": {"ranks": 3}}}, r"does not describe a task.*ranks"),
        ({"method": {}}, r"does not describe a task.*class_path"),
        ({"method": "LoRA"}, "does not describe a task"),
        ({"settings": {"colour": 1}}, r"does not describe a task.*colour"),
        ({"optim": {"speed": 1}}, r"does not describe a task.*speed"),
        ({"facts": {"classes": 2, "more": 1}}, r"does not describe a task.*more"),
    ],
)
def test_only_registered_names_and_their_settings_are_taken(adapter, values, words):
    """Nothing is imported because a file names it."""
    before = set(sys.modules)
    change(adapter / GRAFT, **values)
    with pytest.raises(GraftError, match=words):
        load(adapter, DOMAINS)
    assert set(sys.modules) == before


@pytest.mark.parametrize("content", ["", "{", "[1]", "3"])
def test_a_damaged_graft_json_is_refused(adapter, content):
    (adapter / GRAFT).write_text(content)
    with pytest.raises(GraftError, match=r"damaged|does not describe"):
        load(adapter, DOMAINS)


def test_a_domain_that_is_not_installed_here_is_named(adapter):
    with pytest.raises(GraftError, match="Unknown domain 'toy'"):
        load(adapter, {"other": Domain(name="other", summary="")})


# ---- awkward tensors -----------------------------------------------------------------------------------------------


def test_tied_and_strided_weights_are_written(tmp_path):
    """Safetensors refuses tensors that share memory or are not contiguous; a model may have both."""

    class Tied(ToyTask):
        def build_backbone(self):
            built = super().build_backbone()
            built.model.blocks[1].fc1.weight = built.model.blocks[0].fc1.weight
            return built

        def build_head(self):
            head = super().build_head()
            head.weight = nn.Parameter(torch.randn(8, 2).t())
            return head

    class Hand(Domain):
        def load_task(self, name):
            return Tied

    domains = {"toy": Hand(name="toy", summary="")}
    record = fit(Tied(spec_of("FullFineTune")), ToyData(), tmp_path / "run", max_epochs=1)
    assert adapter_bytes(trained_by(Tied))["head_bytes"] == record["cost"]["head_bytes"]
    certificate = export(tmp_path / "run", tmp_path / "out", record, domains)
    assert certificate["reload_max_abs_error"] == 0.0
    merge(tmp_path / "out", tmp_path / "merged", domains)


def trained_by(task):
    built = task(spec_of("FullFineTune"))
    built.facts = Facts()
    built.assemble()
    return built
