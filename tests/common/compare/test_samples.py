"""The pictures that methods made of test examples: which are shown, how large, how heavy."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.compare._samples import pictured_examples, sample_groups
from common.compare.results import Metrics, Run
from common.compare.study import Trial


@pytest.fixture
def run_of(tmp_path):
    """Make a tested run out of the rows of its predictions.jsonl."""

    def make(method, rows):
        folder = tmp_path / method
        (folder / "predictions").mkdir(parents=True)
        (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        metrics = Metrics(
            fitted=True,
            primary="mean_dice",
            mode="max",
            val={},
            test={},
            cost={},
            data={},
            environment={},
            backbone="",
        )
        trial = Trial(recipe="r", method=method, lr=None, seed=0, folder=folder, options=())
        return Run(trial=trial, metrics=metrics, chosen=True, failure=None)

    return make


def draw(run, name, size=(30, 20), *, noise=False):
    """Put a picture into a run's folder; noise is what compresses worst."""
    pixels = np.full((size[1], size[0], 3), 200, dtype=np.uint8)
    if noise:
        pixels = np.random.default_rng(0).integers(0, 256, pixels.shape, dtype=np.uint8)
    Image.fromarray(pixels).save(run.trial.folder / "predictions" / f"{name}.png")


def rows_of(names, **score):
    return [{"id": name, "picture": f"predictions/{name}.png", **score} for name in names]


def decoded(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/jpeg;base64,"))))


def shown(runs):
    return [
        (example.name, [(view.method, view.score) for view in example.views]) for example in pictured_examples(runs)
    ]


def test_a_few_examples_are_chosen_by_a_hash_and_shown_by_every_method(run_of):
    names = [f"case{i}" for i in range(8)]
    runs = [run_of("A", rows_of(names, mean_dice=0.8125)), run_of("B", rows_of(reversed(names), mean_dice="?"))]
    for run in runs:
        for name in names:
            draw(run, name)
    chosen = sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())[:3]
    assert shown(runs) == [(name, [("A", "mean dice 0.812"), ("B", "")]) for name in chosen]


@pytest.mark.parametrize("size", [(1400, 500), (900, 3000), (3000, 40)])
def test_a_picture_is_never_wider_or_heavier_than_a_page_bears(run_of, size):
    run = run_of("A", rows_of(["a"]))
    draw(run, "a", size, noise=True)
    ((view,),) = [example.views for example in pictured_examples([run])]
    assert len(view.picture) < 200_000
    width, height = decoded(view.picture).size
    assert width <= 900
    assert height / width == pytest.approx(size[1] / size[0], rel=0.05)


@pytest.mark.parametrize(("size", "expected"), [((1800, 600), (900, 300)), ((300, 100), (300, 100))])
def test_a_plain_picture_keeps_its_width_as_far_as_it_may(run_of, size, expected):
    run = run_of("A", rows_of(["a"]))
    draw(run, "a", size)
    ((view,),) = [example.views for example in pictured_examples([run])]
    assert decoded(view.picture).size == expected


def test_what_has_no_picture_leaves_the_rest(run_of):
    """Example c has none of A's, b's file is gone, and C pictures nothing."""
    first = run_of("A", [*rows_of(["a", "b"]), {"id": "c", "picture": None}])
    second, third = run_of("B", rows_of(["a", "b", "c"])), run_of("C", [{"id": "a", "mean_dice": 0.5}])
    draw(first, "a")
    draw(second, "b")
    runs = [first, second, third]
    assert dict(shown(runs)) == {"a": [("A", "")], "b": [("B", "")]}
    assert shown([third]) == shown([]) == []


def test_rows_without_label_and_prediction_are_no_answers(run_of):
    runs = [run_of("A", rows_of(["a"])), run_of("B", [{"id": "a", "prediction": 1}])]
    assert sample_groups(runs) == []


def test_a_run_without_predictions_is_left_out(run_of):
    run = run_of("A", [])
    Path(run.trial.folder / "predictions.jsonl").unlink()
    assert pictured_examples([run]) == sample_groups([run]) == []


def test_sounds_stand_beside_the_pictures_and_what_they_were_to_be_behind_them(run_of):
    rows = [
        {
            **row,
            "sound": "predictions/a.mp3",
            "reference_picture": "predictions/real.png",
            "reference_sound": "predictions/real.wav",
        }
        for row in rows_of(["a"])
    ]
    first, second = run_of("A", rows), run_of("B", rows_of(["a"]))
    for run in (first, second):
        draw(run, "a")
    draw(first, "real")
    (first.trial.folder / "predictions" / "a.mp3").write_bytes(b"tune")
    (first.trial.folder / "predictions" / "real.wav").write_bytes(bytes(300_000))
    (example,) = pictured_examples([first, second])
    assert [view.method for view in example.views] == ["A", "B", "recording"]
    assert example.views[0].sound == f"data:audio/mpeg;base64,{base64.b64encode(b'tune').decode()}"
    assert [view.sound for view in example.views[1:]] == ["", ""]  # none was made; this one is too heavy for a page
    assert all(view.picture for view in example.views)
