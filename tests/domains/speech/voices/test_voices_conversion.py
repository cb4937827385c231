"""Speech with another pitch and envelope: the vocoder, the map between speakers, and lessons of a tiny voice."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from common.errors import GraftError
from domains.speech._pitch import median_pitch, pitch
from domains.speech.voices import build_voice, frames_of, log_durations, read
from domains.speech.voices._conversion import Conversion, fit_conversion
from domains.speech.voices._lessons import Lesson, lessons_of
from domains.speech.voices._objective import Lines, taught_terms
from domains.speech.voices._world import CEPSTRA, Analysis, analyse, render
from tests.domains.speech.voices.nets import toy_folder

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
RATE = 16_000


def vowels(hertz, seconds=2.0, seed=0):
    """A buzz of changing pitch through two resonances that move: float32 (T,)."""
    from scipy.signal import lfilter

    draw = np.random.default_rng(seed)
    count = int(seconds * RATE)
    track = hertz * 2 ** (0.1 * np.sin(2 * np.pi * 2 * np.arange(count) / RATE))
    buzz = np.diff(np.floor(np.cumsum(track) / RATE), prepend=0.0) + 1e-3 * draw.standard_normal(count)
    for first in range(0, count, RATE // 4):
        part = slice(first, first + RATE // 4)
        for centre in (draw.uniform(300, 900), draw.uniform(1000, 2500)):
            angle, radius = 2 * np.pi * centre / RATE, 0.96
            buzz[part] = lfilter([1.0], [1.0, -2 * radius * np.cos(angle), radius**2], buzz[part])
    return torch.tensor(0.3 * buzz / np.abs(buzz).max(), dtype=torch.float32)


def test_a_clip_is_rendered_with_the_pitch_that_is_asked_for_and_stays_as_long_and_loud():
    clip = vowels(110.0)
    found = analyse(clip, RATE)
    assert found.envelope.shape == (len(found.pitch), CEPSTRA)
    assert median_pitch([found.pitch]) == pytest.approx(110, rel=0.03)
    made = render(clip, RATE, found, Analysis(found.pitch * 1.8, found.envelope))
    assert made.shape == clip.shape
    assert median_pitch([pitch(made, RATE)]) == pytest.approx(198, rel=0.03)
    assert float(made.square().mean()) == pytest.approx(float(clip.square().mean()), rel=1e-4)
    again = analyse(made, RATE)
    inside = (again.pitch > 0) & (found.pitch > 0)
    distance = np.abs(again.envelope - found.envelope)[inside, 1:13].mean()
    spread = found.envelope[inside, 1:13].std(axis=0).mean()
    assert distance < 0.5 * spread  # the envelope stayed


def speakers(count=6, frames=400, seed=0):
    """Pairs of analyses: the second speaker has linearly other cepstra, is twice as slow, and higher."""
    draw = np.random.default_rng(seed)
    mixing = np.diag(draw.uniform(0.5, 1.5, CEPSTRA))  # which warping does not see
    pairs = []
    for _ in range(count):
        walk = np.cumsum(draw.standard_normal((frames, CEPSTRA)), axis=0)
        one = walk - walk.mean(axis=0)
        hertz = np.exp(np.log(100) + 0.1 * draw.standard_normal(frames))
        hertz[:50] = 0.0
        other = np.where(hertz > 0, 200 * (np.maximum(hertz, 1) / 100) ** 2, 0.0)
        pairs.append((Analysis(hertz, one), Analysis(other.repeat(2), (one @ mixing + 3.0).repeat(2, axis=0))))
    return pairs, mixing


def test_the_map_finds_a_linear_one_and_the_pitch_s_level_and_range():
    pairs, mixing = speakers()
    made = fit_conversion(pairs[:-1])
    assert isinstance(made, Conversion)
    source = pairs[-1][0]
    wanted = source.envelope @ mixing + 3.0
    error = np.abs(made.expected(source.envelope) - wanted).mean()
    assert error < 0.2 * np.abs(source.envelope - wanted).mean()
    found = made(source)
    np.testing.assert_array_equal(found.envelope[:, 0], source.envelope[:, 0])  # the level stays
    assert np.abs(found.envelope - wanted)[:, 1:].mean() < 0.6 * np.abs(source.envelope - wanted)[:, 1:].mean()
    voiced = source.pitch > 0
    np.testing.assert_array_equal(found.pitch > 0, voiced)
    expected = np.log(200) + 2 * (np.log(source.pitch[voiced]) - np.log(100))
    np.testing.assert_allclose(np.log(found.pitch[voiced]), expected, atol=0.05)


def test_it_follows_the_formula_with_one_gaussian():
    """One component is the regression of least squares, but for the ridge that keeps it stable."""
    pairs, _ = speakers(count=2, frames=400)
    made = fit_conversion(pairs)
    assert len(made.weights) == 1
    source = pairs[0][0].envelope
    mean, slope = made.means[0], made.slopes[0]
    np.testing.assert_allclose(made.expected(source), mean[CEPSTRA:] + (source - mean[:CEPSTRA]) @ slope.T)


def test_without_pitch_the_pitch_stays_and_too_little_speech_is_refused():
    pairs, _ = speakers(count=2)
    silent = [
        (Analysis(one.pitch * 0, one.envelope), Analysis(other.pitch * 0, other.envelope)) for one, other in pairs
    ]
    made = fit_conversion(silent)
    assert made.pitches is None
    np.testing.assert_array_equal(made(pairs[0][0]).pitch, pairs[0][0].pitch)
    short = [(Analysis(one.pitch[:90], one.envelope[:90]), other) for one, other in pairs]
    with pytest.raises(GraftError, match=r"Only \d+ frames of 5 ms .* 500 are needed"):
        fit_conversion(short[:1])


@pytest.fixture
def voice(tmp_path):
    return build_voice(toy_folder(tmp_path / "v", seed=3))


def test_a_lesson_is_what_the_voice_said_with_the_draws_that_it_said_it_with(voice, tmp_path, monkeypatch):
    """With a conversion that changes nothing, the voice makes of its lessons' latents what it is taught already."""
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("domains.speech.voices._lessons.fit_conversion", lambda pairs, seed: lambda found: found)
    monkeypatch.setattr("domains.speech.voices._lessons.render", lambda audio, rate, found, wanted: audio)
    lines = {text: torch.tensor(voice.symbols.encode(text)) for text in ("a bad cab", "feed a deaf dab")}
    clips = {"a bad cab": 0.1 * torch.randn(voice.rate, generator=torch.Generator().manual_seed(0))}
    lessons = lessons_of(voice, lines, clips)
    assert list(lessons) == list(lines)
    for text, lesson in lessons.items():
        frames = int(lesson.durations.sum())
        assert lesson.durations.shape == lines[text].shape
        assert (lesson.drawn.shape, len(lesson.audio)) == ((voice.latents, frames), frames * voice.hop)
    ids = torch.nn.utils.rnn.pad_sequence(list(lines.values()), batch_first=True)
    batch = Lines(ids, torch.tensor([len(row) for row in lines.values()]))
    shortest = min(int(lesson.durations.sum()) for lesson in lessons.values())
    torch.manual_seed(0)
    with torch.no_grad():
        terms = taught_terms(voice, voice.model, batch, list(lessons.values()), torch.tensor([40, 60]), shortest)
    windows = terms.windows
    edge = 12 * voice.hop  # frames at a window's ends lack what the decoder saw beyond them
    torch.testing.assert_close(windows.made[:, edge:-edge], windows.wanted[:, edge:-edge], atol=1e-3, rtol=1e-2)
    assert (terms.likelihood, terms.symbols) == (None, None)


def test_the_pace_is_told_by_the_recordings(voice, monkeypatch):
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    ids = torch.tensor(voice.symbols.encode("a bad cab"))
    with torch.no_grad():
        prior = read(voice.model, ids[None], torch.tensor([len(ids)]))
        logs = log_durations(voice.model, prior.hidden, prior.mask, torch.zeros(1, 2, len(ids)))
        frames = frames_of(logs, prior.mask)[0].long()
        lesson = Lesson(
            frames, torch.zeros(voice.latents, int(frames.sum())), torch.zeros(int(frames.sum()) * voice.hop)
        )
        recorded = torch.tensor([37])
        found = taught_terms(
            voice, voice.model, Lines(ids[None], torch.tensor([len(ids)])), [lesson], recorded, 8
        ).total
    wanted = (logs.exp().sum() + 0.5 * len(ids)) / 37
    torch.testing.assert_close(found, wanted.log()[None])


def test_lessons_are_made_once_and_a_damaged_file_is_named(voice, tmp_path, monkeypatch):
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    lines = {text: torch.tensor(voice.symbols.encode(text)) for text in ("a bad cab", "dad had a bag", "bag a big cab")}
    clips = {text: 0.1 * torch.randn(9000, generator=torch.Generator().manual_seed(len(text))) for text in lines}
    monkeypatch.setattr("domains.speech.voices._conversion._FRAMES_EACH", 20)
    first = lessons_of(voice, lines, clips)
    monkeypatch.setattr("domains.speech.voices._lessons.fit_conversion", lambda *a: pytest.fail("made twice"))
    again = lessons_of(voice, lines, clips)
    for text, lesson in first.items():
        assert all(torch.equal(one, two) for one, two in zip(lesson, again[text], strict=True))
        assert bool(lesson.audio.abs().max() <= 1)
    (file,) = (tmp_path / "cache").glob("prepared/lessons-*/lessons.safetensors")
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(GraftError, match=r"is damaged.*delete its folder"):
        lessons_of(voice, lines, clips)
