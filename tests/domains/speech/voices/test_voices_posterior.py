"""The distilled posterior encoder, and the objective on top of it."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch.distributions import Normal, kl_divergence

from common import artifacts
from common.errors import GraftError
from domains.speech.voices import build_voice, expand, frames_of, log_durations, read, synthesize
from domains.speech.voices._alignment import align, frame_likelihoods
from domains.speech.voices._objective import (
    Lines,
    Windows,
    everything,
    posterior_terms,
    reconstruction,
    warped_terms,
)
from domains.speech.voices._posterior import (
    Pair,
    Posterior,
    distil,
    gaussian_loss,
    load_posterior,
    posterior_of,
    speak_pairs,
)
from domains.speech.voices._spectrum import magnitudes
from domains.speech.voices._warping import warp_recording
from tests.domains.speech.voices.nets import toy_folder

TEXTS = ("a bad cab", "feed a deaf dab")


@pytest.fixture(scope="module")
def voice(tmp_path_factory):
    """A tiny voice that reads letters."""
    return build_voice(toy_folder(tmp_path_factory.mktemp("voice") / "v", seed=1))


@pytest.fixture(scope="module")
def lines(voice):
    """Two texts as ids."""
    rows = [torch.tensor(voice.symbols.encode(text)) for text in TEXTS]
    return Lines(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.tensor([len(row) for row in rows]))


def test_pairs_are_what_the_voice_says(voice):
    pairs = speak_pairs(voice, [*TEXTS, "...", "3 é"], seconds=0.5, seed=0)
    assert sum(len(pair.audio) for pair in pairs) >= 0.5 * voice.rate
    for pair in pairs:
        with torch.no_grad():
            torch.testing.assert_close(voice.model.decoder(pair.latents[None])[0, 0], pair.audio)
    again = speak_pairs(voice, [*TEXTS, "...", "3 é"], seconds=0.5, seed=0)
    assert all(torch.equal(one.audio, two.audio) for one, two in zip(pairs, again, strict=True))
    with pytest.raises(GraftError, match="can say none of the 1 lines"):
        speak_pairs(voice, ["..."], seconds=1.0, seed=0)


def sound(voice, seed, frames=90):
    """Noise whose loudness changes, and latents that are a linear map of its log magnitudes: (C, F) and (F * hop,)."""
    generator = torch.Generator().manual_seed(seed)
    level = torch.rand(frames // 10, generator=generator).repeat_interleave(10 * voice.hop)
    audio = (0.05 + level) * torch.randn(len(level), generator=generator)
    spectrum = magnitudes(audio[None], 2 * (voice.bins - 1), voice.hop)[0]
    mixing = torch.randn(voice.latents, voice.bins, generator=torch.Generator().manual_seed(99))
    return Pair(mixing @ spectrum.log() / voice.bins**0.5, audio)


def test_a_distilled_posterior_finds_latents_that_it_has_not_heard(voice, monkeypatch):
    monkeypatch.setattr("domains.speech.voices._posterior._GAIN", (1.0, 1.0))
    made = distil(voice, [sound(voice, seed) for seed in range(12)], steps=150, lr=1e-2, sound=0.0, width=32, layers=1)
    held = sound(voice, 7)
    spectrum = magnitudes(held.audio[None], 2 * (voice.bins - 1), voice.hop)
    with torch.no_grad():
        mean, log_scale = made(spectrum, torch.ones(1, 1, spectrum.shape[2]))
    latents = held.latents[None]
    assert float((mean - latents).square().mean()) < 0.5 * float(latents.var(dim=2).mean())
    # Better than a Gaussian of each channel, which takes the answer's own mean and deviation.
    plain = gaussian_loss(latents, latents.mean(2, keepdim=True), latents.std(2, keepdim=True).log())
    assert float(gaussian_loss(latents, mean, log_scale)) < float(plain)
    assert not any(parameter.requires_grad for parameter in made.parameters())


def test_it_is_distilled_once_and_kept(voice, tmp_path, monkeypatch):
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path))
    first = posterior_of(voice, TEXTS, seconds=0.3, steps=1)
    monkeypatch.setattr("domains.speech.voices._posterior.distil", lambda *a, **k: pytest.fail("made twice"))
    again = posterior_of(voice, TEXTS, seconds=0.3, steps=1)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in first.state_dict().items())
    (file,) = tmp_path.glob("prepared/*/posterior.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(GraftError, match="no posterior encoder of"):
        load_posterior(voice, file)


def test_the_divergence_is_that_of_gaussians(voice, lines, monkeypatch):
    """With the draw at the posterior's mean it is the Kullback-Leibler divergence but for the drawn part."""
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    net = voice.model
    posterior = Posterior(voice.bins, voice.latents, width=8, layers=1)
    audio = 0.1 * torch.randn(2, 2000, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([2000, 1600])
    frames = lengths // voice.hop
    with torch.no_grad():
        found = posterior_terms(voice, net, posterior, lines, audio, lengths, 8).likelihood
        mask = (torch.arange(125) < frames[:, None])[:, None].float()
        mean, log_scale = posterior(magnitudes(audio, 2 * (voice.bins - 1), voice.hop), mask)
        prior, carried = read(net, *lines), net.flow(mean * mask, mask)
        durations = align(frame_likelihoods(carried, prior.mean, prior.log_scale), lines.lengths, frames)
        inside = expand(prior.mask, durations) > 0  # the second line is shorter
        expected_scale = torch.where(inside, expand(prior.log_scale, durations), 0.0).exp()
        text = Normal(expand(prior.mean, durations), expected_scale)
        divergence = kl_divergence(Normal(carried, log_scale.exp()), text)
        divergence -= 0.5 * (log_scale.exp() / expected_scale).square()
    torch.testing.assert_close(found, (divergence * mask).sum() / mask.sum(), rtol=1e-4, atol=1e-4)


def test_both_routes_train_text_flow_and_decoder(voice, lines):
    posterior = Posterior(voice.bins, voice.latents, width=8, layers=1)
    audio = 0.1 * torch.randn(2, 2000, generator=torch.Generator().manual_seed(0))
    durations = torch.zeros_like(lines.ids)
    durations[torch.arange(durations.shape[1]) < lines.lengths[:, None]] = 3
    for terms in (
        posterior_terms(voice, voice.model, posterior, lines, audio, torch.tensor([2000, 1600]), 16),
        warped_terms(voice, voice.model, lines, torch.cat([audio, audio], 1), durations, 16),
    ):
        voice.model.zero_grad()
        assert terms.windows.made.shape == terms.windows.wanted.shape == (2, 16 * voice.hop)
        loss = reconstruction(voice, terms.windows, 45.0, 1.0) + terms.symbols
        loss = loss if terms.likelihood is None else loss + terms.likelihood
        loss.backward()
        for part in (
            "text_encoder.project",
            "flow.flows.0.conv_post",
            "decoder.conv_pre",
            "duration_predictor.conv_pre",
        ):
            gradient = voice.model.get_submodule(part).weight.grad
            assert gradient is not None
            assert bool(gradient.any()), part
    voice.model.zero_grad()


def test_windows_are_cut_where_the_latents_are(voice, lines):
    same = Windows(torch.zeros(1, 512), torch.zeros(1, 512))
    assert float(reconstruction(voice, same, 45.0, 1.0)) == pytest.approx(0.0, abs=1e-6)
    audio = torch.arange(4000.0)[None].repeat(2, 1) / 4000
    durations = torch.zeros_like(lines.ids)
    durations[torch.arange(durations.shape[1]) < lines.lengths[:, None]] = 4
    torch.manual_seed(0)
    windows = warped_terms(voice, voice.model, lines, audio, durations, 16).windows
    starts = (windows.wanted[:, 0] * 4000).round()
    assert (starts % voice.hop == 0).all()
    assert (windows.wanted.diff(dim=1) > 0).all()


def test_running_everything_is_the_same_every_time(voice, lines):
    with torch.no_grad():
        one, two = (everything(voice, voice.model, lines) for _ in range(2))
    assert torch.equal(one, two)


def test_a_recording_of_the_voice_itself_is_warped_onto_its_own_durations(voice):
    ids = torch.tensor(voice.symbols.encode(TEXTS[0]))
    with torch.no_grad():
        prior = read(voice.model, ids[None], torch.tensor([len(ids)]))
        frames = frames_of(log_durations(voice.model, prior.hidden, prior.mask, None), prior.mask)[0].long()
    said = synthesize(voice, voice.model, ids, durations=frames, noise=0.0)
    assert torch.equal(warp_recording(voice, voice.model, ids, said), frames)


def test_a_catalogued_posterior_is_taken_and_nothing_distilled(voice, tmp_path, monkeypatch):
    made = Posterior(voice.bins, voice.latents)
    half = {name: tensor.half() for name, tensor in made.state_dict().items()}
    save_file(half, tmp_path / "p.safetensors")
    monkeypatch.setattr(artifacts, "catalog", lambda: {f"{voice.name}-posterior": None})
    monkeypatch.setattr(artifacts, "fetch", lambda name: tmp_path / "p.safetensors")
    found = posterior_of(voice, TEXTS, seconds=1.0, steps=1)
    assert all(torch.equal(found.state_dict()[name], tensor.float()) for name, tensor in half.items())
