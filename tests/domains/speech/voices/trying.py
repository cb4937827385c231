"""What every method has to do on every voice: begin as the voice, be alive, train, and reload exactly."""

from __future__ import annotations

import warnings

import torch
from peft import PeftModel
from torch import nn

from common.attach import attach, probe, tuner_layers
from common.methods import METHODS, LoRA
from tests.toy import SMALL


def small(method, on=None):
    """A method at toy size, on the roles of the table `on` where it names some."""
    settings = {name: value for name, value in SMALL.get(method, {}).items() if name != "target_modules"}
    return METHODS[method](**settings, **({"on": on[method]} if on and method in on else {}))


def train_and_reload(build, run, loss, spec, folder, *, rate=0.01, steps=1):
    """Attach a method to a voice, train it some steps, and load what PEFT saves of it onto a fresh one.

    Args:
        build: Builds the voice anew.
        run: Runs all parts of a network, with or without adapters.
        loss: The training loss of a network.
        spec: The method.
        folder: Where it is saved.
        rate: Learning rate.
        steps: How many.
    """
    voice = build()
    with torch.no_grad():
        before = run(voice.model)
    attached = attach(voice.model, spec, voice.family)
    attached.train(False)
    with torch.no_grad():
        torch.testing.assert_close(run(attached.model), before, atol=1e-4, rtol=1e-4)
    probe(attached, lambda: run(attached.model))
    trained = [parameter for parameter in attached.model.parameters() if parameter.requires_grad]
    assert trained
    attached.train(True)
    optimizer = torch.optim.AdamW(trained, lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(attached.model).backward()
        assert all(parameter.grad is not None for parameter in trained)
        optimizer.step()
    attached.train(False)
    with torch.no_grad():
        after = run(attached.model)
    assert not torch.allclose(after, before, atol=1e-4)
    fresh = build().model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT finds no hub configuration
        if isinstance(attached.model, PeftModel):
            attached.model.save_pretrained(str(folder), save_embedding_layers=False)
            fresh = PeftModel.from_pretrained(fresh, str(folder))
        else:
            fresh.load_state_dict(attached.model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(run(fresh.eval()), after, atol=1e-5, rtol=1e-5)


def merge_without_a_trace(voice, run, on):
    """Disable LoRA and have the base; merge it and have what it computed."""
    with torch.no_grad():
        before = run(voice.model)
    attached = attach(voice.model, LoRA(rank=2, on=on), voice.family)
    for name, parameter in attached.model.named_parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(len(name)))
    attached.train(False)
    with torch.no_grad():
        expected = run(attached.model)
        assert not torch.allclose(expected, before, atol=1e-3)
        with attached.model.disable_adapter():
            assert torch.equal(run(attached.model), before)
        merged = attached.model.merge_and_unload()
        torch.testing.assert_close(run(merged), expected, atol=1e-4, rtol=1e-4)
    assert not tuner_layers(merged)
