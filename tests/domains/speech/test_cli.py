"""Speech runs from the recipe to the prediction, through the real command line."""

from __future__ import annotations

import csv
import json
import shutil

import pytest
import yaml
from safetensors.torch import load_file

from common.cli import run as graft
from domains.speech.backbones import build
from tests.domains.speech.toy import DOMAINS

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def recipe(path, folder, task, peft, **data):
    """Write a recipe for the beeps."""
    content = {
        "model": task,
        "peft": peft,
        "data": {"class_path": "tests.domains.speech.toy.Beeps", "init_args": {"folder": str(folder), **data}},
        "trainer": {"max_epochs": 2, "accelerator": "cpu", "precision": "32-true"},
    }
    path.write_text(yaml.safe_dump(content))
    return path


def done(*argv):
    assert graft([*map(str, argv)], DOMAINS) == 0


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


LORA = {"class_path": "LoRA", "init_args": {"on": ["all"], "rank": 2}}


def test_a_whisper_goes_from_fit_to_merged_weights(whisper, folder, tmp_path, capsys):
    run, adapter, merged = (tmp_path / name for name in ("run", "adapter", "merged"))
    model = {"class_path": "Seq2SeqRecognition", "init_args": {"backbone": whisper, "max_tokens": 12}}
    given = recipe(tmp_path / "r.yaml", folder, model, LORA)
    done("fit", "--config", given, "--run", run, "--trainer.max_epochs", "1")
    half = json.loads((run / "metrics.json").read_text())
    done("fit", "--run", run, "--resume", "--trainer.max_epochs", "2")
    record = json.loads((run / "metrics.json").read_text())
    assert record["cost"]["steps"] == 2 * half["cost"]["steps"]
    capsys.readouterr()
    done("validate", "--run", run)
    assert f"loss {record['val']['loss']:.4f}" in capsys.readouterr().out

    done("test", "--run", run)
    record = json.loads((run / "metrics.json").read_text())
    assert {"wer_lower", "cer_lower", "wer_lower_full_context", "words_reference"} <= set(record["test"])
    assert record["primary"] == {"name": "wer_lower", "mode": "min"}
    rows = rows_of(run / "predictions.jsonl")
    assert len(rows) == record["data"]["test"] == 5
    errors, words = sum(row["errors"] for row in rows), sum(row["words"] for row in rows)
    assert record["test"]["wer_lower"] == pytest.approx(errors / words)
    assert all((run / row["picture"]).read_bytes().startswith(b"\x89PNG") for row in rows)

    done("export", run, adapter)
    done("merge", adapter, merged)
    built = build(whisper)
    kept = {name: tensor for name, tensor in load_file(merged / "model.safetensors").items()}
    assert not built.model.load_state_dict(kept).missing_keys
    done("predict", "--adapter", adapter, "--out", tmp_path / "out.csv", folder)
    with (tmp_path / "out.csv").open(newline="") as file:
        texts = {row["path"]: row["text"] for row in csv.DictReader(file)}
    assert len(texts) == 21
    done("predict", "--adapter", adapter, "--out", tmp_path / "out", folder)
    assert len(list((tmp_path / "out").glob("*.srt"))) == len(list((tmp_path / "out").glob("*.vtt"))) == 21


def test_ctc_goes_from_fit_to_prediction(wave, folder, tmp_path):
    run, adapter, out = tmp_path / "run", tmp_path / "adapter", tmp_path / "out.jsonl"
    model = {"class_path": "CTCRecognition", "init_args": {"backbone": wave, "optim": {"lr": 3e-3}}}
    given = recipe(tmp_path / "r.yaml", folder, model, {"class_path": "FullFineTune"})
    done("fit", "--config", given, "--run", run)
    done("test", "--run", run)
    record = json.loads((run / "metrics.json").read_text())
    assert {"wer_lower", "cer_lower", "too_short"} <= set(record["test"])
    assert record["facts"]["characters"] == sorted(set("low mid high"))
    done("export", run, adapter)
    done("predict", "--adapter", adapter, "--out", out, folder)
    said = {row["path"]: row["text"] for row in rows_of(out)}
    for row in rows_of(run / "predictions.jsonl"):
        assert said[row["path"]].strip() == row["hypothesis"]


def test_utterances_go_from_fit_to_prediction(wave, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    run, adapter, out = tmp_path / "run", tmp_path / "adapter", tmp_path / "out.csv"
    model = {"class_path": "UtteranceClassification", "init_args": {"backbone": wave, "layer_mix": True, "hidden": 8}}
    given = recipe(tmp_path / "r.yaml", folder, model, LORA, classes=True)
    done("fit", "--config", given, "--run", run)
    done("test", "--run", run)
    record = json.loads((run / "metrics.json").read_text())
    assert set(record["test"]) == {"uar", "macro_f1", "accuracy", "loss", "mel_statistics_accuracy"}
    probe = record["data"]["confound"]["mel_statistics"]
    assert record["test"]["mel_statistics_accuracy"] == pytest.approx(probe)
    for name in ("MajorityClass", "MelStatistics"):
        done("baseline", name, "--config", given, "--run", tmp_path / name)
    probed = json.loads((tmp_path / "MelStatistics" / "metrics.json").read_text())
    assert probed["test"]["accuracy"] == pytest.approx(probe, abs=1e-4)
    done("export", run, adapter)
    done("predict", "--adapter", adapter, "--out", out, folder)
    with out.open(newline="") as file:
        said = {row["path"]: row for row in csv.DictReader(file)}
    for row in rows_of(run / "predictions.jsonl"):
        assert said[row["path"]]["prediction"] == row["prediction"]
        assert float(said[row["path"]]["probability"]) == pytest.approx(row["probability"], abs=1e-4)


def test_an_unadapted_recogniser_is_measured_at_its_whole_context(whisper, folder, tmp_path, monkeypatch):
    from domains.speech import _task

    seen = []
    encode = _task.encode
    monkeypatch.setattr(_task, "encode", lambda *a, **k: seen.append(k["full_context"]) or encode(*a, **k))
    model = {"class_path": "Seq2SeqRecognition", "init_args": {"backbone": whisper, "max_tokens": 5}}
    given = recipe(tmp_path / "r.yaml", folder, model, LORA)
    done("baseline", "ZeroShot", "--config", given, "--run", tmp_path / "zero")
    assert seen
    assert all(seen)
    record = json.loads((tmp_path / "zero" / "metrics.json").read_text())
    assert record["cost"]["params_trainable"] == 0
    assert len(rows_of(tmp_path / "zero" / "predictions.jsonl")) == 5


def test_the_encoder_is_cached_between_epochs_and_runs(whisper, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    from domains.speech import _task

    seen = []
    encode = _task.encode
    monkeypatch.setattr(_task, "encode", lambda *a, **k: seen.append(len(a[2])) or encode(*a, **k))
    options = {"backbone": whisper, "max_tokens": 5, "cache_encoder": True}
    peft = {"class_path": "LoRA", "init_args": {"on": ["attention@decoder"], "rank": 2}}
    given = recipe(tmp_path / "r.yaml", folder, {"class_path": "Seq2SeqRecognition", "init_args": options}, peft)
    done("fit", "--config", given, "--run", tmp_path / "one")
    first = len(seen)
    done("fit", "--config", given, "--run", tmp_path / "two")
    assert len(seen) - first < first
    records = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two")]
    assert records[0]["val"] == records[1]["val"]
    plain = {**options, "cache_encoder": False}
    wide = {"class_path": "Seq2SeqRecognition", "init_args": plain}
    assert (tmp_path / "cache" / "frozen").exists()
    shutil.rmtree(tmp_path / "cache" / "frozen")
    done("fit", "--config", recipe(tmp_path / "p.yaml", folder, wide, peft), "--run", tmp_path / "plain")
    assert not (tmp_path / "cache" / "frozen").exists()
