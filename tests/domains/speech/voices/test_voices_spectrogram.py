"""The task on tiny networks of both kinds: it trains, resumes exactly, exports what speaks alone, answers bad input."""

from __future__ import annotations

import dataclasses
import re
import shutil

import numpy as np
import pytest
import torch

from common import run as runs
from common.errors import GraftError
from common.exchange import export, load
from common.frozen import content
from common.methods import FishMask, FullFineTune, LinearProbe, LoRA
from common.task import OptimSpec
from domains.speech import DOMAIN
from domains.speech.spectrogram import SpectrogramVoice
from domains.speech.synthesis import base_voice
from domains.speech.voices import _fastspeech2
from tests.domains.speech.voices.mel_nets import (
    Tones,
    toy_fastspeech2,
    toy_fastspeech2_vocoder,
    toy_speecht5,
    toy_vocoder,
)
from tests.domains.speech.voices.toy_data import RATE, TEXTS, data_of, table

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
DOMAINS = {"speech": DOMAIN}
TRAINER = {"accelerator": "cpu", "precision": "32-true", "gradient_clip_val": 1.0}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache for the module, so that recordings are cleaned once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRAFT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny SpeechT5 and its vocoder."""
    folder = tmp_path_factory.mktemp("speecht5")
    return toy_speecht5(folder / "voice"), toy_vocoder(folder / "vocoder")


@pytest.fixture(scope="module")
def fast(tmp_path_factory):
    """A tiny FastSpeech2Conformer whose vocoder has a known scale, measured on two lines."""
    folder = tmp_path_factory.mktemp("fastspeech2")
    load = _fastspeech2.load_vocoder
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_fastspeech2, "load_vocoder", lambda *given, **more: Tones(load(*given, **more).config))
        patch.setattr(_fastspeech2, "LINES", _fastspeech2.LINES[:2])
        yield toy_fastspeech2(folder / "voice"), toy_fastspeech2_vocoder(folder / "vocoder")


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A table of recordings."""
    return table(tmp_path_factory.mktemp("clips"))


def task_of(folders, peft=None, **options):
    method = LoRA(on=["attention", "ffn", "conv@postnet", "head"], rank=2) if peft is None else peft
    optim = OptimSpec(lr=1e-2, warmup=0.0, schedule="constant")
    settings = {"vocoder": folders[1], "longest": 1.5, "measures": ["acoustics"], "val_spoken": 1} | options
    return SpectrogramVoice(folders[0], method, optim, **settings)


def fitted(folders, clips, folder, epochs=1, peft=None, **options):
    return runs.fit(task_of(folders, peft), data_of(clips), folder, max_epochs=epochs, **TRAINER, **options)


def assembled(folders, clips, **options):
    task = task_of(folders, **options)
    task.facts = data_of(clips).facts
    task.assemble()
    return task.eval()


@pytest.mark.parametrize(("kind", "part", "head"), [("folders", "spectrogram", 6), ("fast", "network", 0)])
def test_a_run_goes_from_fit_to_an_export_that_speaks(cache, request, clips, tmp_path, kind, part, head):
    folders, run, adapter = request.getfixturevalue(kind), tmp_path / "run", tmp_path / "adapter"
    record = fitted(folders, clips, run)
    assert {"loss", part, "mcd", "duration_ratio"} <= set(record["val"])
    assert record["cost"]["params_trainable_head"] == head
    assert (record["data"].get("scales", {}).get("kept") == ["pitch", "energy"]) == (kind == "fast")
    stored = torch.load(run / "last.ckpt", weights_only=True)["state_dict"]
    assert not any("vocoder" in name for name in stored)
    record = runs.test(task_of(folders), data_of(clips), run, **TRAINER)
    assert len((run / "predictions.jsonl").read_text().splitlines()) == len(TEXTS["test"])

    certificate = export(run, adapter, record, DOMAINS)
    assert certificate["reload_max_abs_error"] <= 1e-5
    loaded = load(adapter, DOMAINS)
    wave, rate = loaded.say("a bad cab. dad had a bag")
    trained = assembled(folders, clips)
    base = trained.say("a bad cab. dad had a bag")[0]
    trained.load_trained(stored)
    torch.testing.assert_close(wave, trained.eval().say("a bad cab. dad had a bag")[0], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(wave[:500], base[:500], atol=1e-3)
    assert (rate, wave.dtype) == (RATE, torch.float32)
    card = (adapter / "README.md").read_text()
    code = card[card.index("import soundfile") : card.index('soundfile.write("hello.wav"')]
    code = code.replace("Hello, it is me.", "a bad cab").replace("FOLDER", repr(str(adapter)))
    space = {}
    exec(re.sub(r"wave = say\((.*)\)", r"wave = say(\1, longest=1.5)", code), space)
    if head:
        assert torch.equal(space["speaker"], loaded.head.embedding.detach())
    torch.testing.assert_close(space["wave"], loaded.utter(space["ids"], 0), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("kind", "peft"), [("folders", None), ("folders", LinearProbe()), ("fast", None)])
def test_a_stopped_run_goes_on_exactly(cache, request, clips, tmp_path, kind, peft):
    folders = request.getfixturevalue(kind)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    fitted(folders, clips, whole, 2, peft)
    fitted(folders, clips, parts, 2, peft, save_every=1, max_steps=1)
    shutil.rmtree(parts / "predictions", ignore_errors=True)
    fitted(folders, clips, parts, 2, peft, resume=True)
    one, two = (torch.load(folder / "last.ckpt", weights_only=True)["state_dict"] for folder in (whole, parts))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name
    if kind == "folders":
        start = assembled(folders, clips, peft=peft).head.embedding
        assert not torch.equal(one["head.embedding"], start)


@pytest.mark.parametrize("kind", ["folders", "fast"])
def test_training_lowers_the_networks_own_loss(cache, request, clips, kind):
    folders = request.getfixturevalue(kind)
    task, data = assembled(folders, clips, peft=FullFineTune()), data_of(clips)
    task.learn_targets(data)
    task.train()
    batch = next(iter(data.train_dataloader()))
    optimizer = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for _ in range(15):
        torch.manual_seed(0)
        loss = task.compute_loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


def test_a_methods_penalty_is_part_of_the_loss(cache, folders, clips, monkeypatch):
    task, data = assembled(folders, clips), data_of(clips)
    task.learn_targets(data)
    monkeypatch.setattr(task, "log", lambda *args, **options: None)
    monkeypatch.setattr(task, "log_dict", lambda *args, **options: None)
    batch, losses = next(iter(data.train_dataloader())), []
    for penalty in (None, torch.tensor(2.5)):
        monkeypatch.setattr(type(task.peft), "penalty", lambda spec, model, penalty=penalty: penalty)
        torch.manual_seed(0)
        losses.append(float(task.training_step(batch, 0)))
    assert losses[1] - losses[0] == pytest.approx(2.5, abs=1e-5)


def test_a_method_that_looks_at_the_data_sees_the_loss(cache, fast, clips, tmp_path):
    record = fitted(fast, clips, tmp_path / "run", peft=FishMask(on=["attention@decoder"], density=0.1, batches=1))
    assert record["cost"]["params_trainable"] > 0


def test_a_voice_without_a_speaker_vector_has_nothing_else_to_train(cache, fast, clips, tmp_path):
    with pytest.raises(GraftError, match=r"LinearProbe trains nothing in '.*', which reads no speaker vector"):
        fitted(fast, clips, tmp_path / "run", peft=LinearProbe())
    with pytest.raises(GraftError, match=r"reads no speaker vector. Leave out 'speaker'"):
        assembled(fast, clips, speaker="one.npy")
    with pytest.raises(GraftError, match=r"recomputes no blocks\. Set gradient_checkpointing to false"):
        assembled(fast, clips, gradient_checkpointing=True)


def test_a_fast_voice_has_the_frames_of_each_recording(cache, fast, clips):
    task, data = assembled(fast, clips), data_of(clips)
    task.learn_targets(data)
    records = [record for split in ("train", "val") for record in data.records(split)]
    assert len(task._targets) == len(records)
    for record in records:
        audio = data.load(record)
        target = task._targets[content(audio), record.text]
        assert len(target.mel) == task._voice.front.frames(len(audio)) == int(target.durations.sum())
        assert len(target.durations) == len(target.pitch) == len(target.energy) == len(task._ids(record.text))


def test_long_lines_are_cut_to_what_the_network_reads(cache, folders, clips, monkeypatch):
    task = assembled(folders, clips)
    read = []
    monkeypatch.setattr(
        "domains.speech.spectrogram.say", lambda voice, model, ids, *rest, **more: read.append(len(ids)) or ids.float()
    )
    task.say("a bad cab had " * 40)
    assert max(read) <= 60
    assert sum(read) >= 40 * 14


def test_a_speaker_vector_is_where_training_starts(cache, folders, clips, tmp_path):
    np.save(tmp_path / "one.npy", np.arange(6.0)[None])
    task = assembled(folders, clips, speaker=str(tmp_path / "one.npy"))
    torch.testing.assert_close(task.head.embedding.detach(), torch.arange(6.0) / 55**0.5)
    base_voice(task, data_of(clips))
    torch.testing.assert_close(task.head.embedding.detach(), torch.arange(6.0) / 55**0.5)
    np.save(tmp_path / "wide.npy", np.ones(7))
    (tmp_path / "odd.npy").write_text("x")
    for name, named in (("wide", r"holds \(7,\) numbers. Give 6"), ("odd", "could not be read"), ("no", "could not")):
        with pytest.raises(GraftError, match=named):
            assembled(folders, clips, speaker=str(tmp_path / f"{name}.npy"))


def test_what_does_not_suit_the_voice_is_refused(cache, folders, clips, tmp_path):
    with pytest.raises(GraftError, match=r"longest is 0.5 \(at least 1\).*val_spoken is 0.*vocoder is missing"):
        task_of(folders, longest=0.5, val_spoken=0, vocoder="")
    with pytest.raises(GraftError, match="Unknown measure 'wer'"):
        task_of(folders, measures=["wer"])
    task = task_of(folders)
    task.facts = dataclasses.replace(data_of(clips).facts, rate=16_000)
    with pytest.raises(GraftError, match=r"speaks at 8000 Hz, and the data come at 16000 Hz\. Set data.rate to 8000"):
        task.assemble()
    for options, named in (
        ({"max_text_positions": 10}, r"The text of '.*' \((train|val)\) has 1\d symbols, and '.*' reads 10"),
        ({"max_speech_positions": 32}, r"\((train|val)\) lasts .* s, and '.*' writes 1.0. Lower data.max_seconds"),
    ):
        small = toy_speecht5(tmp_path / next(iter(options)), **options), folders[1]
        with pytest.raises(GraftError, match=named):
            fitted(small, clips, tmp_path / "run")
