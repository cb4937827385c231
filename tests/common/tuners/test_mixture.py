"""Several tuners as one adapter: the sum of what they do, in one file, switched and disabled together."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from common.tuners import MixtureConfig, ScaleShiftConfig
from tests.toy import toy_backbone

LORA = LoraConfig(r=2, target_modules=r"blocks\.\d\.qkv", init_lora_weights=False)
SSF = ScaleShiftConfig(target_modules=r"blocks\.\d\.norm\d")


def inputs():
    return torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(1))


def run(model):
    with torch.no_grad():
        return model.eval()(inputs())


def shaken(model, seed=0):
    """Give every adapter tensor a value of its own, the same in each model."""
    for name, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            generator = torch.Generator().manual_seed(seed + sum(map(ord, name)))
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def wrapped(config, name="default"):
    torch.manual_seed(0)
    return get_peft_model(toy_backbone(), config, adapter_name=name)


def test_it_computes_what_the_parts_compute_one_around_the_other():
    mixture = shaken(wrapped(MixtureConfig(parts=[LORA, SSF])))
    inner = wrapped(LORA).get_base_model()
    inner.__dict__.pop("peft_config")
    by_hand = get_peft_model(inner, SSF)
    shaken(by_hand.requires_grad_(False).base_model.model)
    own = {n.removeprefix("base_model.model."): p for n, p in mixture.named_parameters() if p.requires_grad}
    for name, parameter in by_hand.base_model.model.named_parameters():
        if name in own:
            parameter.data = own[name].data.clone()
    assert len(own) == sum(name in own for name, _ in by_hand.base_model.model.named_parameters())
    assert torch.equal(run(mixture), run(by_hand))
    assert not torch.allclose(run(mixture), run(toy_backbone()), atol=1e-2)


def test_one_file_holds_all_parts_and_plain_peft_reads_it(tmp_path):
    model = shaken(wrapped(MixtureConfig(parts=[LORA, SSF])))
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    kinds = {kind for name in stored for kind in ("lora_A", "lora_B", "sshift_scale", "sshift_shift") if kind in name}
    assert kinds == {"lora_A", "lora_B", "sshift_scale", "sshift_shift"}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert [part["peft_type"] for part in config["parts"]] == ["LORA", "SCALE_SHIFT"]
    assert torch.equal(run(PeftModel.from_pretrained(toy_backbone(), str(tmp_path))), run(model))


def test_two_mixtures_are_switched_and_disabled_together():
    first, second = MixtureConfig(parts=[LORA, SSF]), MixtureConfig(parts=[LORA, SSF])
    alone = run(shaken(wrapped(first, "a")))
    model = shaken(wrapped(first, "a"))
    model.add_adapter("b", second)
    assert torch.equal(run(model), alone)
    model.set_adapter("b")
    shaken(model, seed=5)
    assert not torch.allclose(run(model), alone, atol=1e-3)
    model.set_adapter("a")
    assert torch.equal(run(model), alone)
    with model.disable_adapter():
        assert torch.equal(run(model), run(toy_backbone().requires_grad_(False)))
    model.delete_adapter("b")
    assert torch.equal(run(model), alone)


def test_merging_writes_every_part():
    model = shaken(wrapped(MixtureConfig(parts=[LORA, SSF])))
    expected = run(model)
    model.merge_adapter()
    torch.testing.assert_close(run(model), expected, atol=1e-5, rtol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(run(model), expected, atol=1e-5, rtol=1e-5)


def test_an_unknown_part_is_refused():
    with pytest.raises(ValueError, match="unknown type 'NOTHING'"):
        wrapped(MixtureConfig(parts=[{"peft_type": "NOTHING"}]))
