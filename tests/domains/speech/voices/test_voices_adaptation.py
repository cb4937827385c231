"""The task: all routes train, a stopped run goes on exactly, an export speaks alone, and bad input is answered."""

from __future__ import annotations

import json
import shutil

import pytest
import soundfile
import torch

from common import run as runs
from common.errors import GraftError
from common.exchange import export, load
from common.methods import BitFit, FishMask, FullFineTune, LinearProbe, LoRA
from common.task import OptimSpec
from domains.speech import DOMAIN
from domains.speech.synthesis import VoiceAdaptation, base_voice, recordings
from domains.speech.voices import build_voice, synthesize
from domains.speech.voices._lessons import lessons_of
from domains.speech.voices._listening import Listener
from tests.domains.speech.voices.nets import toy_folder
from tests.domains.speech.voices.toy_data import RATE, TEXTS, data_of, table

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
DOMAINS = {"speech": DOMAIN}
TRAINER = {"accelerator": "cpu", "precision": "32-true", "gradient_clip_val": 1.0}
LOOKS = FishMask(on=["conv@decoder"], density=0.1, batches=1)  # at training data, by the route's loss
SMALL = {
    "route": "posterior",
    "posterior": "frozen",
    "distil_seconds": 1.0,
    "distil_steps": 2,
    "window": 16,
    "measures": ["acoustics"],
    "val_spoken": 1,
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache for the module, so that recordings are cleaned and a posterior encoder is distilled once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRAFT_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr("domains.speech.voices._conversion._FRAMES_EACH", 100)  # seconds of recordings, not minutes
        yield


@pytest.fixture(scope="module")
def voice(tmp_path_factory):
    """The folder of a tiny voice that reads letters."""
    return toy_folder(tmp_path_factory.mktemp("voice") / "v", seed=3)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A table of recordings."""
    return table(tmp_path_factory.mktemp("clips"))


def task_of(voice, peft=None, **options):
    method = LoRA(on=["attention@text", "conv@flow", "conv@decoder"], rank=2) if peft is None else peft
    return VoiceAdaptation(voice, method, OptimSpec(lr=1e-2, warmup=0.0, schedule="constant"), **SMALL | options)


def fitted(voice, clips, folder, epochs=2, **options):
    return runs.fit(task_of(voice, **options), data_of(clips), folder, max_epochs=epochs, **TRAINER)


def test_a_run_goes_from_fit_to_an_export_that_speaks(cache, voice, clips, tmp_path):
    run, adapter = tmp_path / "run", tmp_path / "adapter"
    record = fitted(voice, clips, run)
    assert {"loss", "sound", "likelihood", "durations", "mcd", "duration_ratio"} <= set(record["val"])
    assert record["primary"] == {"name": "mcd", "mode": "min"}
    assert record["cost"]["params_trainable_head"] == 1
    assert not any("posterior" in name for name in torch.load(run / "last.ckpt", weights_only=True)["state_dict"])

    record = runs.test(task_of(voice), data_of(clips), run, **TRAINER)
    assert record["test"]["f0_median_reference"] == pytest.approx(165, abs=20)
    rows = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    for row in rows:
        sound, rate = soundfile.read(run / row["sound"])
        assert len(sound) / rate == pytest.approx(row["seconds"], abs=0.3)
        assert (run / row["reference_sound"]).is_file()

    certificate = export(run, adapter, record, DOMAINS)
    assert certificate["reload_max_abs_error"] <= 1e-5
    loaded = load(adapter, DOMAINS)
    wave, rate = loaded.say("a bad cab. dad had a bag")
    trained = task_of(voice)
    trained.facts = loaded.facts
    trained.assemble()
    trained.load_trained(torch.load(run / "last.ckpt", weights_only=True)["state_dict"])
    torch.testing.assert_close(wave, trained.eval().say("a bad cab. dad had a bag")[0], atol=1e-5, rtol=1e-4)
    assert not torch.equal(wave, _speech_of(build_voice(voice), "a bad cab. dad had a bag", wave))
    assert (rate, wave.dtype) == (RATE, torch.float32)
    card = (adapter / "README.md").read_text()
    code = card[card.index("import soundfile") : card.index('soundfile.write("hello.wav"')]
    space = {}
    exec(code.replace("Hello, it is me.", "a bad cab").replace("FOLDER", repr(str(adapter))), space)
    assert len(space["wave"]) > 0


def _speech_of(voice, text, like):
    ids = torch.tensor(voice.symbols.encode(voice.symbols.spell(text)))
    made = synthesize(voice, voice.model, ids)
    return torch.nn.functional.pad(made, (0, max(0, len(like) - len(made))))[: len(like)]


@pytest.mark.parametrize(
    ("options", "peft"),
    [
        ({}, None),
        ({"posterior": "train"}, None),
        ({"route": "dtw"}, BitFit()),
        ({"route": "converted"}, None),
        ({}, LOOKS),
        ({"route": "dtw"}, LOOKS),
        ({"route": "converted"}, LOOKS),
    ],
)
def test_a_stopped_run_goes_on_exactly(cache, voice, clips, tmp_path, options, peft):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = options | ({"peft": peft} if peft else {})
    fitted(voice, clips, whole, epochs=2, **options)
    runs.fit(task_of(voice, **options), data_of(clips), parts, max_epochs=2, save_every=1, max_steps=1, **TRAINER)
    shutil.rmtree(parts / "predictions", ignore_errors=True)
    runs.fit(task_of(voice, **options), data_of(clips), parts, resume=True, max_epochs=2, **TRAINER)
    one, two = (torch.load(folder / "last.ckpt", weights_only=True)["state_dict"] for folder in (whole, parts))
    assert one.keys() == two.keys()
    assert any(name.startswith("posterior.") for name in one) == (options.get("posterior") == "train")
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name


def test_the_route_of_conversion_learns_from_train_alone_and_leaves_durations(cache, voice, clips, monkeypatch):
    asked = {}

    def lessons(own, lines, recordings, seed=0):
        asked.update(lines=set(lines), recordings=set(recordings))
        return lessons_of(own, lines, recordings, seed)

    monkeypatch.setattr("domains.speech.synthesis.lessons_of", lessons)
    task, data = task_of(voice, route="converted", peft=FullFineTune()), data_of(clips)
    prepared(task, data)
    assert asked["recordings"] == set(TEXTS["train"])
    assert asked["lines"] == {*TEXTS["train"], *TEXTS["val"]}
    batch = next(iter(data.train_dataloader()))
    parts = task.parts_of(batch)
    assert set(parts) == {"sound", "durations"}
    sum(parts.values()).backward()
    touched = {name for name, p in task.backbone.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert not any("duration_predictor" in name for name in touched)
    assert all(any(part in name for name in touched) for part in ("text_encoder", "flow", "decoder"))


def test_words_add_a_distance_with_a_gradient(cache, voice, clips, whisper, monkeypatch):
    monkeypatch.setattr("domains.speech.synthesis.Listener", lambda name: Listener(whisper))
    task, data = task_of(voice, words=2.0), data_of(clips)
    prepared(task, data)
    batch = next(iter(data.train_dataloader()))
    parts = task.parts_of(batch)
    assert set(parts) == {"sound", "durations", "likelihood", "words"}
    parts["words"].backward()
    gradients = [name for name, p in task.backbone.named_parameters() if p.grad is not None and bool(p.grad.any())]
    assert any(".decoder." in name for name in gradients)


def prepared(task, data):
    """Set a task up as a fit does, without a trainer."""
    task.facts = data.facts
    task.assemble()
    task._prepare_route(data)
    task.train()


def test_the_pace_follows_the_recordings(cache, voice, clips):
    task, data = task_of(voice), data_of(clips)
    prepared(task, data)
    batch = next(iter(data.train_dataloader()))
    task.eval()
    with torch.no_grad():
        task.head.log_pace.fill_(1.0)
        torch.manual_seed(0)  # lengths are drawn: the same ones at each look
        too_long = task.terms(batch).total.mean()
    optimizer = torch.optim.SGD([task.head.log_pace], lr=0.25)  # halves what is left of a square
    for _ in range(10):
        optimizer.zero_grad()
        torch.manual_seed(0)
        task.parts_of(batch)["durations"].backward()
        optimizer.step()
    assert float(task.head.log_pace.detach()) == pytest.approx(-float(too_long), abs=0.01)


@pytest.mark.parametrize("peft", [FullFineTune(), LoRA(on=["conv@decoder"], rank=2)])
def test_a_share_of_the_change_lies_between_the_start_and_the_end(cache, voice, clips, peft):
    tasks = {share: task_of(voice, peft, scale=share) for share in (0.0, 0.5, 1.0)}
    data, waves = data_of(clips), {}
    for share, task in tasks.items():
        task.facts = data.facts
        task.assemble()
        state = {name: p.detach().clone() for name, p in task.named_parameters() if p.requires_grad}
        generator = torch.Generator().manual_seed(0)
        state = {n: t + 0.02 * torch.randn(t.shape, generator=generator) for n, t in sorted(state.items())}
        state["head.log_pace"] *= 0
        task.load_trained(state)
        waves[share] = task.eval().say("a bad cab")[0]
    base = _speech_of(build_voice(voice), "a bad cab", waves[0.0])
    whole = {share: tasks[share].state_dict() for share in tasks}
    name = next(n for n, p in tasks[0.5].named_parameters() if p.requires_grad and ".decoder." in n)
    torch.testing.assert_close(whole[0.5][name], (whole[0.0][name] + whole[1.0][name]) / 2)
    assert not torch.equal(waves[1.0][:50], waves[0.0][:50])
    assert len(base) == len(waves[0.0])


def test_a_share_is_left_again_after_a_validation(cache, voice, clips, tmp_path):
    task = task_of(voice, scale=0.5)
    runs.fit(task, data_of(clips), tmp_path / "run", max_epochs=1, **TRAINER)
    stored = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["state_dict"]
    for name, tensor in stored.items():
        assert torch.equal(task.state_dict()[name], tensor), name


def test_baselines_speak_as_the_voice_came_and_take_the_recordings(cache, voice, clips, tmp_path):
    found = {}
    for name, function in (("BaseVoice", base_voice), ("Recordings", recordings)):
        found[name] = runs.baseline(
            task_of(voice), data_of(clips), tmp_path / name, name, function, accelerator="cpu", precision="32-true"
        )["test"]
    assert found["Recordings"]["mcd"] == pytest.approx(0.0, abs=1e-3)
    assert found["Recordings"]["duration_ratio"] == pytest.approx(1.0)
    assert found["BaseVoice"]["mcd"] > 1.0


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"route": "mas"}, "Unknown route 'mas'.*Allowed: converted, dtw, posterior"),
        ({"measures": ["wer"]}, "Unknown measure 'wer'"),
        ({"scale": 1.5, "window": 2, "words": -1}, r"words is -1 .*scale is 1.5 .*window is 2 \(at least 8\)"),
    ],
)
def test_arguments_out_of_range_are_named(voice, options, named):
    with pytest.raises(GraftError, match=named):
        task_of(voice, **options)


def test_data_that_do_not_suit_the_voice_are_refused(cache, voice, clips, tmp_path):
    data = data_of(clips)
    for change, named in (
        ({"rate": 16_000}, "speaks at 8000 Hz, and the data come at 16000 Hz. Set data.rate to 8000"),
        ({"language": "es"}, "texts are in 'es', and '.*' speaks 'en"),
    ):
        task = task_of(voice)
        task.facts = _changed(data.facts, **change)
        with pytest.raises(GraftError, match=named):
            task.assemble()
    with pytest.raises(GraftError, match="trains nothing in a voice but its pace"):
        fitted(voice, clips, tmp_path / "run", peft=LinearProbe())
    with pytest.raises(GraftError, match="reads letters, not espeak-ng's phonemes"):
        fitted(voice, clips, tmp_path / "other", language="es")


def _changed(facts, **change):
    import dataclasses

    return dataclasses.replace(facts, **change)
