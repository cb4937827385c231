"""Methods built on exported adapters: exact like any other, and standing without the folders they were built on."""

from __future__ import annotations

import dataclasses
import json
import shutil

import lightning as L
import pytest
import torch
from peft import PeftModel

from common.attach import attach, probe
from common.errors import GraftError
from common.exchange import export, load, merge
from common.matrix.bench import Bench, quiet
from common.matrix.checks import CHECKS
from common.matrix.exported import write_folder
from common.matrix.specimen import Specimen
from common.methods import SSF, AdapterFusion, BitFit, FishMask, LinearProbe, LoRA, Mixture, NormTuning, Pfeiffer, Stack
from common.run import fit, read_record
from common.verify import verify
from tests.toy import DOMAINS, FAMILY, ToyData, ToyTask, spec_of, toy_backbone

X = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(1))
FIRST = LoRA(on=["attention", "ffn_in"], rank=2)
STAYS = ("frozen", "trainable", "merged")


def specimen():
    return Specimen(
        name="toy", model=toy_backbone().eval(), family=FAMILY, inputs=X, run=lambda model, inputs: model(inputs)
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Write adapter folders of the toy backbone, one a method."""
    place = tmp_path_factory.mktemp("adapters")
    made = {}

    def write(spec, seed=0):
        key = (repr(spec), seed)
        if key not in made:
            made[key] = write_folder(place / str(len(made)), specimen, spec, seed=seed)
        return made[key]

    return write


def run(model):
    with torch.no_grad():
        return model.eval()(X)


def parameters(model, prefix=""):
    return {name: p for name, p in model.named_parameters() if p.requires_grad and prefix in name}


def stacked(folder, then, stays="trainable"):
    return attach(toy_backbone(), Stack(first=folder, first_stays=stays, then=then), FAMILY)


def attached(spec, seed=0):
    return attach(toy_backbone(seed=seed), spec, FAMILY)


PAIRS = {
    "lora-lora": (FIRST, LoRA(on=["attention"], rank=3)),
    "lora-houlsby": (LoRA(on=["all"], rank=2), spec_of("Houlsby")),
    "ssf-lora": (SSF(), LoRA(on=["all"], rank=2)),
    "houlsby-lora": (spec_of("Houlsby"), LoRA(on=["all"], rank=2)),
    "lora-prefix": (FIRST, spec_of("PrefixTuning", gate=True)),
    "mixture-reft": (Mixture(parts=[LoRA(on=["ffn"], rank=2), SSF(on=["norm"])]), spec_of("LoReFT")),
    "masks-lora": (spec_of("FishMask"), LoRA(on=["attention"], rank=2)),
    "lora-ssf": (FIRST, SSF()),
    "lora-bitfit": (FIRST, BitFit()),
    "lora-dora": (FIRST, LoRA(on=["all"], rank=2, dora=True)),
    "lora-norms": (FIRST, NormTuning()),
}
CALLS = {"ssf", "bitfit", "dora"}  # second methods that read weights: with a first one that is merged alone


@pytest.mark.parametrize("stays", STAYS)
@pytest.mark.parametrize("pair", PAIRS)
def test_every_check_of_the_matrix_holds(folders, tmp_path, pair, stays):
    first, then = PAIRS[pair]
    refused = (stays == "merged" and pair.startswith("houlsby")) or (stays != "merged" and pair.split("-")[1] in CALLS)
    spec = Stack(first=folders(first), first_stays=stays, then=then)
    with quiet():
        bench = Bench(specimen, spec, tmp_path)
        if refused:
            with pytest.raises(GraftError, match=r"Stack cannot merge the first|would pass over"):
                bench.fresh()
            return
        attached = bench.fresh()
        probe(attached, lambda: attached.model(X))
        for name, check in CHECKS.items():
            if name != "identity at the start":
                check(bench)


@pytest.mark.parametrize("stays", STAYS)
def test_it_starts_as_the_first_adapter_and_is_the_backbone_when_disabled(folders, stays):
    alone = PeftModel.from_pretrained(toy_backbone(), folders(FIRST))
    result = stacked(folders(FIRST), spec_of("Houlsby"), stays)
    torch.testing.assert_close(run(result.model), run(alone))
    bare = run(toy_backbone().requires_grad_(False))
    assert not torch.allclose(run(alone), bare, atol=1e-3)
    for _ in range(2):
        before = run(result.model)
        with result.model.disable_adapter():
            assert torch.equal(run(result.model), bare)
            weights = {n.replace(".base_layer", ""): p for n, p in result.model.get_base_model().named_parameters()}
            assert all(torch.equal(weights[name], p) for name, p in toy_backbone().named_parameters())
        assert torch.equal(run(result.model), before)


@pytest.mark.parametrize("stays", STAYS)
def test_two_loras_at_one_layer_add_up(folders, stays):
    result = stacked(folders(FIRST), LoRA(on=["attention_out"], rank=3, alpha=6), stays)
    alone = PeftModel.from_pretrained(toy_backbone(), folders(FIRST)).base_model.model.blocks[0].out
    layer = result.model.base_model.model.blocks[0].out
    down, up = (
        next(p for name, p in result.model.named_parameters() if "blocks.0.out." in name and p.shape == shape)
        for shape in ((3, 8), (8, 3))
    )
    with torch.no_grad():
        up.normal_()
    x = torch.randn(4, 8)
    w, b = toy_backbone().blocks[0].out.weight, toy_backbone().blocks[0].out.bias
    a1, b1 = alone.lora_A["default"].weight, alone.lora_B["default"].weight
    expected = x @ w.T + b + 2 * x @ a1.T @ b1.T + 2 * x @ down.T @ up.T
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("stays", STAYS)
def test_the_first_trains_where_it_is_to_train(folders, stays):
    result = stacked(folders(FIRST), spec_of("Houlsby"), stays)
    first = sum(p.numel() for p in parameters(attach(toy_backbone(), FIRST, FAMILY).model).values())
    then = sum(p.numel() for p in parameters(attach(toy_backbone(), spec_of("Houlsby"), FAMILY).model).values())
    expected = then + (first if stays == "trainable" else 0)
    assert sum(p.numel() for p in parameters(result.model).values()) == expected
    with result.model.disable_adapter():
        pass
    result.model.set_adapter("default")
    assert sum(p.numel() for p in parameters(result.model).values()) == expected


@pytest.mark.parametrize("stays", STAYS)
def test_a_run_resumes_exports_and_stands_without_the_first_folder(folders, tmp_path, stays):
    fit(ToyTask(FIRST), ToyData(seed=3), tmp_path / "domain", max_epochs=1)
    export(tmp_path / "domain", tmp_path / "first", read_record(tmp_path / "domain"), DOMAINS)
    spec = Stack(first=str(tmp_path / "first"), first_stays=stays, then=LoRA(on=["attention"], rank=2))
    whole = fit(ToyTask(spec), ToyData(), tmp_path / "whole", max_epochs=2)
    with pytest.raises(RuntimeError, match="killed"):
        fit(ToyTask(spec), ToyData(), tmp_path / "run", save_every=2, max_epochs=2, callbacks=[_Kill()])
    assert (
        fit(ToyTask(spec), ToyData(), tmp_path / "run", resume=True, save_every=2, max_epochs=2)["val"] == whole["val"]
    )
    states = [torch.load(tmp_path / name / "last.ckpt", weights_only=True)["state_dict"] for name in ("whole", "run")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[1][name], tensor) for name, tensor in states[0].items())
    certificate = export(tmp_path / "run", tmp_path / "both", read_record(tmp_path / "run"), DOMAINS)
    assert certificate["reload_max_abs_error"] <= 1e-5
    assert certificate["merge_max_abs_error"] <= 1e-4
    shutil.rmtree(tmp_path / "first")
    loaded = load(tmp_path / "both", DOMAINS)
    assert loaded.peft == spec
    assert verify(tmp_path / "both", DOMAINS).output_error <= 1e-5
    assert merge(tmp_path / "both", tmp_path / "merged", DOMAINS) <= 1e-4
    with pytest.raises(GraftError, match="needs the adapters that it builds on until it is exported"):
        ToyTask(spec).assemble()


class _Kill(L.Callback):
    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == 3:
            raise RuntimeError("killed")


def test_another_backbone_is_refused(folders):
    with pytest.raises(GraftError, match=r"was trained on other weights: digest \w{12} expected, \w{12} found"):
        attach(toy_backbone(seed=1), Stack(first=folders(FIRST), then=spec_of("Houlsby")), FAMILY)


def test_a_folder_that_changed_or_is_none_is_refused(folders, tmp_path):
    with pytest.raises(GraftError, match="is no readable adapter folder"):
        Stack(first=str(tmp_path), then=spec_of("Houlsby"))
    copied = shutil.copytree(folders(FIRST), tmp_path / "copy")
    spec = Stack(first=str(copied), then=spec_of("Houlsby"))
    shutil.copy(folders(FIRST, seed=1) + "/adapter_model.safetensors", copied)
    with pytest.raises(GraftError, match="has changed since this run was begun"):
        attach(toy_backbone(), spec, FAMILY)
    (copied / "adapter_model.safetensors").unlink()
    with pytest.raises(GraftError, match="holds no adapter"):
        Stack(first=str(copied), then=spec_of("Houlsby"))


def test_a_file_of_other_tensors_is_refused(folders, tmp_path):
    copied = shutil.copytree(folders(FIRST), tmp_path / "copy")
    shutil.copy(folders(spec_of("Houlsby")) + "/adapter_model.safetensors", copied)
    with pytest.raises(GraftError, match=r"The first adapter does not fit: .* missing or unexpected"):
        attach(toy_backbone(), Stack(first=str(copied), then=SSF(on=["norm"])), FAMILY)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"first": ""}, "Stack has no first adapter"),
        ({"then": None}, "Stack has no second method"),
        ({"first_stays": "melted"}, "first_stays is 'melted'; give one of frozen, trainable, merged"),
        ({"then": LinearProbe()}, "Stack cannot hold LinearProbe, which adds no adapter"),
        ({"then": LoRA(b_rate=4)}, "Stack cannot hold LoRA: freeze_a and b_rate"),
        ({"then": LoRA(init="pissa")}, "Stack cannot hold LoRA with init 'pissa'"),
        ({"then": FishMask()}, "Stack cannot hold FishMask as it is set: it looks at what the bare backbone does"),
        ({"then": Stack()}, "Stack cannot hold Stack: it is built on an exported adapter"),
        ({"first_method": Stack(first_method=FIRST, then=FIRST)}, "is of Stack, which is built on adapters itself"),
        ({"then": spec_of("LST")}, "Stack cannot hold LST: it acts on all blocks"),
    ],
)
def test_what_does_not_stack_is_refused(folders, settings, message):
    given = {"first": folders(FIRST), "then": spec_of("Houlsby")} | settings
    with pytest.raises(GraftError, match=message):
        attach(toy_backbone(), Stack(**given), FAMILY)


def test_a_recipe_names_the_folder_and_a_record_what_it_said(folders):
    block = {"class_path": "LoRA", "init_args": {"rank": 2}}
    spec = Stack(first=folders(FIRST), then=block)
    assert spec.then == LoRA(rank=2)
    assert spec.first_method == FIRST
    described = json.loads(json.dumps(spec.describe()["init_args"]))
    assert Stack(**described) == spec
    assert Stack(**described | {"first": "gone"}) == dataclasses.replace(spec, first="gone")


# ---- fusion --------------------------------------------------------------------------------------------------------

SOURCES = (Pfeiffer(width=3), Pfeiffer(width=5, scale=0.5), Pfeiffer(width=3, scale=2.0))


def fused(folders, **settings):
    return AdapterFusion(adapters=[folders(spec, seed=i) for i, spec in enumerate(SOURCES)], **settings)


def test_a_fusion_attends_to_the_outputs_of_the_adapters(folders):
    spec = fused(folders)
    layer = attached(spec).model.base_model.model.blocks[0].fc2
    query, keys, value = (getattr(layer, f"fusion_{name}")["default"] for name in ("query", "key", "value"))
    torch.testing.assert_close(value.weight, torch.eye(8), atol=1e-4, rtol=0)  # at the start
    assert not torch.equal(value.weight, torch.eye(8))
    with torch.no_grad():
        for parameter in (query.weight, query.bias, keys.weight, keys.bias, value.weight):
            parameter.normal_()
    x = torch.randn(4, 7, 16)
    hidden = torch.nn.functional.linear(x, toy_backbone().blocks[0].fc2.weight, toy_backbone().blocks[0].fc2.bias)
    outputs = []
    for source, folder in zip(SOURCES, spec.adapters, strict=True):
        alone = PeftModel.from_pretrained(toy_backbone(), folder).base_model.model.blocks[0].fc2
        down, up = alone.badapter_down["default"], alone.badapter_up["default"]
        narrow = torch.relu(hidden @ down.weight.T + down.bias)
        outputs.append(source.scale * (narrow @ up.weight.T + up.bias))
    scores = [
        ((hidden @ query.weight.T + query.bias) * (output @ keys.weight.T + keys.bias)).sum(-1, keepdim=True)
        for output in outputs
    ]
    shares = torch.stack(scores).exp() / torch.stack(scores).exp().sum(0)
    expected = hidden + sum(share * (output @ value.weight.T) for share, output in zip(shares, outputs, strict=True))
    torch.testing.assert_close(layer(x), expected, atol=1e-4, rtol=1e-4)


def test_every_check_of_the_matrix_holds_for_a_fusion(folders, tmp_path):
    with quiet():
        bench = Bench(specimen, fused(folders), tmp_path)
        fresh = bench.fresh()
        probe(fresh, lambda: fresh.model(X))
        for name, check in CHECKS.items():
            remark = check(bench)
            assert name != "merge" or "run behind the layers" in remark


def test_only_the_fusion_trains_and_a_penalty_holds_its_values(folders):
    spec = fused(folders, value_penalty=0.5)
    result = attached(spec)
    assert sum(p.numel() for p in parameters(result.model).values()) == 2 * (3 * 8**2 + 2 * 8)
    with result.model.disable_adapter():
        assert torch.equal(run(result.model), run(toy_backbone().requires_grad_(False)))
    assert sum(p.numel() for p in parameters(result.model).values()) == 2 * (3 * 8**2 + 2 * 8)
    values = [p for name, p in result.model.named_parameters() if "fusion_value" in name]
    expected = 0.5 * sum((value - torch.eye(8)).square().sum() for value in values)
    torch.testing.assert_close(spec.penalty(result.model), expected)
    assert fused(folders, value_penalty=0).penalty(result.model) is None


def test_a_fusion_is_exported_whole(folders, tmp_path):
    copies = [shutil.copytree(folder, tmp_path / str(i)) for i, folder in enumerate(fused(folders).adapters)]
    spec = AdapterFusion(adapters=[str(copy) for copy in copies])
    fit(ToyTask(spec), ToyData(), tmp_path / "run", max_epochs=1)
    export(tmp_path / "run", tmp_path / "fused", read_record(tmp_path / "run"), DOMAINS)
    for copy in copies:
        shutil.rmtree(copy)
    assert load(tmp_path / "fused", DOMAINS).peft == spec
    assert verify(tmp_path / "fused", DOMAINS).output_error <= 1e-5


def test_what_does_not_fuse_is_refused(folders):
    one, lora = folders(SOURCES[0]), folders(FIRST)
    wide = folders(Pfeiffer(width=3, on=["attention_out"]))
    for adapters, message in (
        ([], "AdapterFusion has 0 adapters. Give two or more"),
        ([one], "AdapterFusion has 1 adapters"),
        ([one, lora], "is of LoRA. Give adapters of Houlsby or Pfeiffer"),
        ([one, wide], "stand at other layers"),
    ):
        with pytest.raises(GraftError, match=message):
            attached(AdapterFusion(adapters=adapters))
    with pytest.raises(GraftError, match="was trained on other weights"):
        attached(fused(folders), seed=1)
