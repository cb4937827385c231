"""The Lightning module that adapts a voice to another speaker."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from common.attach import Attached
from common.errors import GraftError, unknown
from common.frozen import content
from common.methods import MethodSpec
from common.task import Backbone, OptimSpec
from domains.speech._share import Share
from domains.speech._voice_task import VoiceTask
from domains.speech.data.voices import VoiceBatch
from domains.speech.voice_metrics import PARTS, Part
from domains.speech.voices import Phonemes, Voice, build_voice
from domains.speech.voices._lessons import Lesson, lessons_of
from domains.speech.voices._listening import Listener
from domains.speech.voices._objective import Terms, posterior_terms, reconstruction, taught_terms, warped_terms
from domains.speech.voices._posterior import Posterior, posterior_of
from domains.speech.voices._warping import warp_recording

Route = Literal["converted", "posterior", "dtw"]
ROUTES: tuple[Route, ...] = ("converted", "posterior", "dtw")


class VoiceAdaptation(VoiceTask):
    """Adapt a pretrained voice to a speaker from minutes of recordings with their texts.

    Route `converted` lets the voice say the recordings' texts and converts that speech, by a map of pitch and envelope
    that is learned from the recordings (`Conversion`); the voice then learns to make the converted sound of the very
    latents that it had made its own of. Nothing has to be aligned, so words stay. Route `posterior` is VITS' own
    objective (arXiv 2106.06103): latents come from a posterior encoder that hears the recording, the flow's likelihood
    aligns them to the text, the decoder turns them back into sound. Piper's voices lack the posterior encoder, so it is
    first distilled from the voice's own speech, where the latents are known. Route `dtw` needs none: durations come
    from warping the recording onto the voice's own speech, and the decoder's sound for the text alone is compared with
    the recording. With `words`, a frozen recogniser compares what it hears.

    Nothing of this is chosen by a spectral distance: that one goes on falling while words garble. Validation and test
    speak the texts and measure pitch, spectra, who seems to speak and, in the test, the words.

    Args:
        backbone: `piper-joe-medium`; or a folder or hub name of a VITS of transformers, such as `facebook/mms-tts-eng`.
        peft: The PEFT method; parts for its `on` are `text`, `flow`, `decoder` and `durations`.
        optim: Optimizer and schedule. The head is the pace, one number, and a trained posterior encoder has its rate.
        route: `converted`, `posterior` or `dtw`.
        words: Weight of the distance that a frozen recogniser hears (`Listener`); 0 leaves it out.
        scale: Share of the learned change that is spoken and exported, from 0, the voice as it was, to 1: each trained
            parameter is put at this point between its start and its end.
        posterior: `train` trains the posterior encoder too, as VITS does: one that was distilled from the voice itself
            has heard no other pitch. `frozen` keeps it as it is. It is no part of the voice, is never exported, and
            stands apart from the method's parameters (`data.posterior_parameters` in metrics.json).
        distil_seconds: How much of its own speech the voice makes for the distillation.
        distil_steps: Steps of the distillation.
        window: Frames that the decoder turns into sound at a time in training.
        mel_weight: Weight of the mel distance.
        stft_weight: Weight of the multi-resolution STFT distance.
        likelihood_weight: Weight of the divergence from the text's prior.
        duration_weight: Weight of the durations' losses.
        language: Voice of espeak-ng that reads the texts; None for the voice's own.
        measures: What a test measures: `acoustics`, `words`, `speaker`. Validation leaves out `words`.
        val_spoken: Validation recordings whose texts are spoken after each epoch, chosen by a hash.
        pretrained: Start from pretrained weights.
        weights: A local file of weights instead of the starter's own.
        seed: Seed of the adapter, the distillation and the training steps.
        gradient_checkpointing: Recompute blocks in the backward pass.

    Raises:
        GraftError: An argument is out of range.
    """

    def __init__(
        self,
        backbone: str,
        peft: MethodSpec,
        optim: OptimSpec = OptimSpec(),  # noqa: B008  (frozen)
        route: Route = "converted",
        words: float = 0.0,
        scale: float = 1.0,
        posterior: Literal["frozen", "train"] = "train",
        distil_seconds: float = 240.0,
        distil_steps: int = 1500,
        window: int = 32,
        mel_weight: float = 45.0,
        stft_weight: float = 1.0,
        likelihood_weight: float = 1.0,
        duration_weight: float = 1.0,
        language: str | None = None,
        measures: Sequence[Part] = PARTS,
        val_spoken: int = 12,
        pretrained: bool = True,
        weights: str | None = None,
        seed: int = 0,
        gradient_checkpointing: bool = False,
    ) -> None:
        settings = {
            "backbone": backbone,
            "route": route,
            "words": words,
            "scale": scale,
            "posterior": posterior,
            "distil_seconds": distil_seconds,
            "distil_steps": distil_steps,
            "window": window,
            "mel_weight": mel_weight,
            "stft_weight": stft_weight,
            "likelihood_weight": likelihood_weight,
            "duration_weight": duration_weight,
            "language": language,
            "measures": list(measures),
            "val_spoken": val_spoken,
            "pretrained": pretrained,
            "weights": weights,
        }
        _check(settings)
        super().__init__(
            peft=peft, optim=optim, settings=settings, seed=seed, gradient_checkpointing=gradient_checkpointing
        )
        self.posterior: Posterior | None = None
        self._listener: Listener | None = None
        self._share: Share | None = None
        self._warped: dict[tuple[bytes, str], Tensor] = {}
        self._lessons: dict[str, Lesson] = {}

    # ---- building

    def build_backbone(self) -> Backbone:
        """Build the named voice.

        Raises:
            GraftError: The data come at another rate or in another language than the voice speaks.
        """
        wanted = {key: self.settings[key] for key in ("pretrained", "weights")}
        voice, facts, language = build_voice(self.settings["backbone"], **wanted), self.facts, self.settings["language"]
        if facts.rate != voice.rate:
            raise GraftError(
                f"'{voice.name}' speaks at {voice.rate} Hz, and the data come at {facts.rate} Hz. "
                f"Set data.rate to {voice.rate}."
            )
        if language is not None:
            if not isinstance(voice.symbols, Phonemes):
                raise GraftError(f"'{voice.name}' reads letters, not espeak-ng's phonemes. Leave out 'language'.")
            voice = replace(voice, symbols=replace(voice.symbols, language=language))
        elif facts.language and voice.language and facts.language[:2] != voice.language[:2]:
            raise GraftError(
                f"The texts are in '{facts.language}', and '{voice.name}' speaks '{voice.language}'. Take other data, "
                f"or set 'language' to a voice of espeak-ng that reads them."
            )
        self._voice = voice
        return voice

    def assemble(self, attach_with: Callable[[Backbone], Attached] | None = None) -> None:
        """Build everything; note where the trained parameters start, and leave the words out of validation."""
        super().assemble(attach_with)
        self.val_metrics = self._without_words()
        if attach_with is None and self.settings["scale"] < 1.0:
            trained = (*self.backbone.named_parameters(), *self.head.named_parameters())
            self._share = Share({n: value for n, value in trained if value.requires_grad}, self.settings["scale"])
        if attach_with is None and self.settings["route"] == "posterior" and self.settings["posterior"] == "train":
            self.posterior = Posterior(self._voice.bins, self._voice.latents)

    def prepare(self, stage: str | None) -> None:
        """Read all texts, and make what the route trains with.

        Raises:
            GraftError: There is nothing to train, the voice cannot say a text, or a recording is too short for one.
        """
        if self.attached.plan.mode == "frozen":
            raise GraftError(f"{type(self.peft).__name__} trains nothing in a voice but its pace. Take another method.")
        data = self._datamodule()
        self._read_texts(data)
        self._choose_spoken(data)
        if stage in ("fit", "validate"):
            self._prepare_route(data)

    def _read_texts(self, data: Any) -> None:  # noqa: ANN401
        for split in ("train", "val", "test"):
            for record in data.records(split):
                symbols = len(self._ids(record.text))
                frames = round(record.seconds * self.facts.rate) // self._voice.hop
                if split != "test" and frames < symbols:
                    raise GraftError(
                        f"'{record.id}' ({split}) lasts {frames} frames and its text has {symbols} symbols: text and "
                        "recording do not belong together. Mend the table or leave it out."
                    )

    def _prepare_route(self, data: Any) -> None:  # noqa: ANN401
        settings = self.settings
        if settings["words"]:
            self._listener = Listener("whisper-tiny-en")
        if settings["route"] == "converted":
            records = {record.text: record for record in data.records("train")}
            texts = sorted({*records, *(record.text for record in data.records("val"))})
            lines = {text: torch.tensor(self._ids(text)) for text in texts}
            clips = {text: data.load(record) for text, record in sorted(records.items())}
            self._lessons = lessons_of(self._unadapted(), lines, clips)
            return
        if settings["route"] == "posterior":
            lines = sorted({record.text for record in data.records("train")})
            own = self._unadapted()
            made = posterior_of(own, lines, seconds=settings["distil_seconds"], steps=settings["distil_steps"], seed=0)
            if self.posterior is None:
                self.posterior = made
            else:
                self.posterior.load_state_dict(made.state_dict())
            return
        # The adapters are still without effect, so this is the voice as it came.
        was_training = self.training
        self.eval()
        for split in ("train", "val"):
            for record in data.records(split):
                audio = data.load(record)
                ids = torch.tensor(self._ids(record.text))
                key = (content(audio), record.text)
                self._warped[key] = warp_recording(self._voice, self.backbone, ids, audio)
        self.train(was_training)

    def _unadapted(self) -> Voice:
        """Return the voice as it came, apart from this task's network where it was pretrained."""
        settings = self.settings
        if not settings["pretrained"]:
            return replace(self._voice, model=self.attached.model)  # random weights are not built twice alike
        wanted = {key: settings[key] for key in ("pretrained", "weights")}
        return replace(build_voice(settings["backbone"], **wanted), symbols=self._voice.symbols)

    # ---- steps

    def terms(self, batch: VoiceBatch) -> Terms:
        """Compute the parts of the objective on a batch."""
        lines, window = self._lines(batch.text), self.settings["window"]
        if self.settings["route"] == "converted":
            lessons = [self._lessons[text] for text in batch.text]
            frames = batch.lengths // self._voice.hop
            return taught_terms(self._voice, self.backbone, lines, lessons, frames, window)
        if self.settings["route"] == "dtw":
            rows = [
                self._warped[content(audio[:length].cpu()), text]
                for audio, length, text in zip(batch.audio, batch.lengths.tolist(), batch.text, strict=True)
            ]
            durations = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self.device)
            return warped_terms(self._voice, self.backbone, lines, batch.audio, durations, window)
        if self.posterior is None:
            raise RuntimeError("The posterior encoder is made in setup.")
        return posterior_terms(self._voice, self.backbone, self.posterior, lines, batch.audio, batch.lengths, window)

    def parts_of(self, batch: VoiceBatch) -> dict[str, Tensor]:
        """Return the weighted parts of the loss by name."""
        settings, terms = self.settings, self.terms(batch)
        pace = (terms.total + self.head.log_pace).square().mean()
        parts = {
            "sound": reconstruction(self._voice, terms.windows, settings["mel_weight"], settings["stft_weight"]),
            "durations": settings["duration_weight"] * (pace if terms.symbols is None else terms.symbols + pace),
        }
        if terms.likelihood is not None:
            parts["likelihood"] = settings["likelihood_weight"] * terms.likelihood
        if self._listener is not None:
            parts["words"] = settings["words"] * self._listener.distance(terms.windows, self.facts.rate)
        return parts

    # ---- a share of the change

    def on_validation_start(self) -> None:
        """Speak with the wanted share of the change."""
        self._enter()

    def on_validation_end(self) -> None:
        """Go back to all of it."""
        self._leave()

    def on_test_start(self) -> None:
        """Speak with the wanted share of the change."""
        self._enter()

    def on_test_end(self) -> None:
        """Go back to all of it."""
        self._leave()

    def say(self, text: str, *, seed: int = 0) -> tuple[Tensor, int]:
        """Speak a text of any length with the wanted share of the change; see `VoiceTask.say`."""
        already = self._share is None or self._share.entered
        self._enter()
        try:
            return super().say(text, seed=seed)
        finally:
            if not already:
                self._leave()

    def _enter(self) -> None:
        if self._share is not None:
            self._share.enter()

    def _leave(self) -> None:
        if self._share is not None:
            self._share.leave()

    def load_trained(self, state: Mapping[str, Tensor]) -> None:
        """Put a checkpoint's tensors into this task, and leave the wanted share of the change in it for good."""
        super().load_trained(state)
        self._enter()
        self._share = None

    def identity(self) -> dict[str, Any]:
        """Return what a checkpoint must agree with; another share of the change is still the same run."""
        found = super().identity()
        kept = {
            key: value for key, value in found["settings"].items() if key not in ("scale", "measures", "val_spoken")
        }
        return {**found, "settings": kept}


def base_voice(task: VoiceTask, data: Any) -> Callable[[VoiceBatch], Tensor]:  # noqa: ANN401
    """Speak the texts with the voice as it came."""
    task.backbone, task.head = task.build_backbone().model.eval(), task.build_head()
    return task.infer


def recordings(task: VoiceTask, data: Any) -> Callable[[VoiceBatch], Tensor]:  # noqa: ANN401
    """Take the recordings themselves: what the measures give for the real speaker."""
    return task.targets


def _check(settings: Mapping[str, Any]) -> None:
    """Raise one `GraftError` that names every argument out of range."""
    if settings["route"] not in ROUTES:
        raise unknown("route", settings["route"], ROUTES)
    for part in settings["measures"]:
        if part not in PARTS:
            raise unknown("measure", part, PARTS)
    if settings["posterior"] not in ("frozen", "train"):
        raise unknown("posterior", settings["posterior"], ("frozen", "train"))
    weights = [key for key in settings if key.endswith("_weight") or key == "words"]
    wrong = [f"{key} is {settings[key]:g} (0 or more)" for key in weights if settings[key] < 0]
    wrong += [f"scale is {settings['scale']:g} (0 to 1)"] if not 0 <= settings["scale"] <= 1 else []
    least = {"distil_seconds": 1, "distil_steps": 1, "window": 8, "val_spoken": 1}
    wrong += [f"{key} is {settings[key]:g} (at least {low})" for key, low in least.items() if settings[key] < low]
    wrong += ["measures is empty"] if not settings["measures"] else []
    if wrong:
        raise GraftError(f"VoiceAdaptation: {'; '.join(wrong)}. Mend the recipe's model.")
