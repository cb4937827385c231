"""The Lightning module that adapts a voice which speaks by way of a mel spectrogram and a vocoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection

from common.attach import Attached
from common.errors import GraftError, unknown
from common.frozen import content
from common.methods import MethodSpec
from common.task import Backbone, OptimSpec
from domains.speech._voice_task import VoiceTask
from domains.speech.backbones._backbone import bare
from domains.speech.data.voices import VoiceBatch
from domains.speech.voice_metrics import PARTS, Part
from domains.speech.voices import MelVoice, build_mel_voice, say
from domains.speech.voices._mel_voice import Target, draws


class Speaker(nn.Module):
    """The speaker vector that the network reads, trained as it is: only its direction counts.

    Args:
        width: Its width.
        start: Where it starts, (width,); None draws a direction.
    """

    def __init__(self, width: int, start: Tensor | None = None) -> None:
        super().__init__()
        drawn = torch.randn(width, generator=torch.Generator().manual_seed(0))
        # Of the length of an x-vector after the network's own normalisation.
        self.embedding = nn.Parameter(nn.functional.normalize(drawn if start is None else start, dim=0))

    def forward(self, outputs: Tensor) -> Tensor:
        """Return what the voice makes as it is; the vector goes into it."""
        return outputs


class SpectrogramVoice(VoiceTask):
    """Adapt a SpeechT5 or a FastSpeech2Conformer to a speaker from recordings with their texts, by its own loss.

    Both write log-mel frames, of which a frozen HiFi-GAN makes sound. A SpeechT5 (arXiv 2110.07205) writes them one
    after the other, guided by the text through cross-attention: recordings become frames as its feature extractor makes
    them, and the loss is the mean absolute error before and after its postnet, the cross-entropy of the end, and guided
    attention; see `SpeechT5Talker`. Nothing has to be aligned.

    A FastSpeech2Conformer (arXiv 2006.04558, 2010.13956) predicts duration, pitch and energy of each phoneme and writes
    all frames at once; see `FastSpeech2Talker` for its loss. transformers has no front end for it, so at what scale it
    writes frames, pitch and energy is measured before training on what the unadapted voice says and how that sounds
    (`measure_scales`; `data.scales` in metrics.json), and refused where its frames cannot be recovered. Recordings are
    aligned by warping them onto the unadapted voice's frames of their texts; see `FastSpeech2Teacher`.

    A SpeechT5, and a FastSpeech2Conformer of several speakers, was trained with x-vectors of speakers (512 numbers).
    Here the vector is the head: trained with the adapter and exported in the head's slot. It starts from `speaker`
    where an x-vector is at hand, else from a direction that no speaker had, which costs steps. A method without
    parameters (`LinearProbe`) trains it alone. A voice of one speaker has no head.

    A SpeechT5 reads characters, numbers written out in English; a FastSpeech2Conformer reads English phonemes
    (`Arpabet`). Validation and test speak the texts with draws of their own (SpeechT5's prenet drops units in every
    mode) and measure as `VoiceAdaptation` does.

    Args:
        backbone: A folder or hub name of a `SpeechT5ForTextToSpeech`, such as `microsoft/speecht5_tts`, or of a
            `FastSpeech2ConformerModel`, such as `espnet/fastspeech2_conformer`.
        peft: The PEFT method; parts for its `on` are `text`, `decoder` and `postnet`, and for a FastSpeech2Conformer
            also `durations`, `pitch`, `energy`, and `speaker` where it reads a speaker vector.
        optim: Optimizer and schedule. `head_lr` is that of the speaker vector.
        vocoder: A folder or hub name of a `SpeechT5HifiGan` or `FastSpeech2ConformerHifiGan`. It stays frozen and is
            never exported.
        speaker: A `.npy` file with the vector to start from.
        longest: Most frames that are spoken for each symbol: a voice that does not find its end is cut there.
        measures: What a test measures: `acoustics`, `words`, `speaker`. Validation leaves out `words`.
        val_spoken: Validation recordings whose texts are spoken after each epoch, chosen by a hash.
        pretrained: Start from pretrained weights.
        seed: Seed of the adapter and the training steps.
        gradient_checkpointing: Recompute blocks in the backward pass.

    Raises:
        GraftError: An argument is out of range.
    """

    def __init__(
        self,
        backbone: str,
        peft: MethodSpec,
        optim: OptimSpec = OptimSpec(),  # noqa: B008  (frozen)
        vocoder: str = "microsoft/speecht5_hifigan",
        speaker: str | None = None,
        longest: float = 20.0,
        measures: Sequence[Part] = PARTS,
        val_spoken: int = 12,
        pretrained: bool = True,
        seed: int = 0,
        gradient_checkpointing: bool = False,
    ) -> None:
        settings = {
            "backbone": backbone,
            "vocoder": vocoder,
            "speaker": speaker,
            "longest": longest,
            "measures": list(measures),
            "val_spoken": val_spoken,
            "pretrained": pretrained,
        }
        _check(settings)
        super().__init__(
            peft=peft, optim=optim, settings=settings, seed=seed, gradient_checkpointing=gradient_checkpointing
        )
        self.posterior = None
        self._voice: MelVoice
        self._has_vector = False  # whether it comes with the adapter
        self._targets: dict[tuple[bytes, str], Target] = {}
        self._scales: Mapping[str, Any] = {}

    # ---- building

    def build_backbone(self) -> Backbone:
        """Build the named voice and its vocoder.

        Raises:
            GraftError: One cannot be had, the data come at another rate than the voice speaks, or transformers cannot
                recompute the network's blocks.
        """
        settings = self.settings
        voice = build_mel_voice(settings["backbone"], settings["vocoder"], pretrained=settings["pretrained"])
        if self.facts.rate != voice.rate:
            raise GraftError(
                f"'{voice.name}' speaks at {voice.rate} Hz, and the data come at {self.facts.rate} Hz. "
                f"Set data.rate to {voice.rate}."
            )
        if self.gradient_checkpointing and not voice.model.supports_gradient_checkpointing:
            raise GraftError(
                f"The network of '{voice.name}' recomputes no blocks. Set gradient_checkpointing to false."
            )
        self._voice = voice
        return voice

    def build_head(self) -> nn.Module:
        """Build the speaker vector, or nothing for a voice that reads none.

        Raises:
            GraftError: The file to start from is none, or of another network.
        """
        file, width = self.settings["speaker"], self._voice.speaker_width
        if width == 0:
            if file is not None:
                raise GraftError(f"'{self._voice.name}' reads no speaker vector. Leave out 'speaker'.")
            return nn.Identity()
        start = None if file is None or self._has_vector else _vector(file, width)
        return Speaker(width, start)

    def load_facts(self, facts: Mapping[str, Any]) -> None:
        """Set the facts from an adapter's record; the adapter brings its speaker vector too."""
        super().load_facts(facts)
        self._has_vector = True

    def assemble(self, attach_with: Callable[[Backbone], Attached] | None = None) -> None:
        """Build everything, and leave the words out of validation."""
        super().assemble(attach_with)
        self.val_metrics: MetricCollection = self._without_words()

    def prepare(self, stage: str | None) -> None:
        """Read all texts, and make of the recordings what the loss compares with.

        Raises:
            GraftError: There is nothing to train, the voice cannot say a text, or a text or a recording is longer than
                it takes; or its scales cannot be measured.
        """
        data = self._datamodule()
        self._read_texts(data)
        self._choose_spoken(data)
        if stage in ("fit", "validate"):
            self.learn_targets(data)

    def learn_targets(self, data: Any) -> None:  # noqa: ANN401
        """Make of the recordings of training and validation what the loss compares with, while nothing is trained yet.

        Raises:
            GraftError: See `prepare`.
        """
        if self.attached.plan.mode == "frozen" and self._speaker() is None:
            raise GraftError(
                f"{type(self.peft).__name__} trains nothing in '{self._voice.name}', which reads no speaker vector. "
                "Take another method."
            )
        was_training = self.training
        self.eval()
        # The adapters are still without effect, so this is the voice as it came.
        speaker = self._speaker()
        with torch.no_grad():
            teacher = self._voice.talker.teacher(self._voice, bare(self.backbone), speaker)
            for split in ("train", "val"):
                for record in data.records(split):
                    audio = data.load(record)
                    key = (content(audio), record.text)
                    self._targets[key] = teacher(torch.tensor(self._ids(record.text)), audio)
        self._scales = teacher.figures
        self.train(was_training)

    def _read_texts(self, data: Any) -> None:  # noqa: ANN401
        voice = self._voice
        for split in ("train", "val", "test"):
            for record in data.records(split):
                symbols = len(self._ids(record.text))
                frames = voice.front.frames(round(record.seconds * voice.rate))
                if split == "test":
                    continue
                if symbols > voice.most_symbols:
                    raise GraftError(
                        f"The text of '{record.id}' ({split}) has {symbols} symbols, and '{voice.name}' reads "
                        f"{voice.most_symbols}. Cut the recording or leave it out."
                    )
                if frames > voice.most_frames:
                    most = voice.most_frames * voice.front.hop / voice.rate
                    raise GraftError(
                        f"'{record.id}' ({split}) lasts {record.seconds:.1f} s, and '{voice.name}' writes {most:.1f}. "
                        "Lower data.max_seconds."
                    )

    # ---- steps

    def features(self, batch: VoiceBatch) -> Tensor:
        """Run all parts of the network on a batch with the same draws at every call, (B, N); see `Talker`."""
        pairs = zip(batch.audio, batch.lengths.tolist(), strict=True)
        mels = [self._voice.front(audio[:length]) for audio, length in pairs]
        with draws(0, self.device):
            return self._voice.talker.everything(bare(self.backbone), self._lines(batch.text), mels, self._speaker())

    def parts_of(self, batch: VoiceBatch) -> dict[str, Tensor]:
        """Return the network's own loss by its parts."""
        rows = zip(batch.audio.cpu(), batch.lengths.tolist(), batch.text, strict=True)
        targets = [self._targets[content(audio[:length]), text].to(self.device) for audio, length, text in rows]
        return self._voice.talker.loss(bare(self.backbone), self._lines(batch.text), targets, self._speaker())

    def _speaker(self) -> Tensor | None:
        return self.head.embedding if isinstance(self.head, Speaker) else None

    # ---- speaking

    def most_symbols(self) -> int:
        """Return how many symbols are said at once: as the network reads, with room for a start and an end."""
        return min(super().most_symbols(), self._voice.most_symbols - 2)

    def utter(self, ids: Tensor, seed: int) -> Tensor:
        """Speak ids (L,) at once: (T,)."""
        speaker = self._speaker()
        speaker = None if speaker is None else speaker.detach()
        return say(self._voice, self.backbone, ids, speaker, longest=self.settings["longest"], seed=seed)

    # ---- results

    def identity(self) -> dict[str, Any]:
        """Return what a checkpoint must agree with; how it is spoken and measured is none of it."""
        found = super().identity()
        spoken = ("vocoder", "longest", "measures", "val_spoken")
        return {**found, "settings": {key: value for key, value in found["settings"].items() if key not in spoken}}

    def describe_data(self, data: Any) -> dict[str, Any]:  # noqa: ANN401
        """Return what is known of the data, and how well the voice's scales could be measured."""
        return super().describe_data(data) | ({"scales": dict(self._scales)} if self._scales else {})

    def usage(self) -> str:
        """Return lines that load the export with peft and safetensors onto the network that Graft builds."""
        spoken = self._speaker() is not None
        return self._usage_with(
            names="build_mel_voice, say",
            build=f"build_mel_voice({self.settings['backbone']!r}, {self.settings['vocoder']!r})",
            head='speaker = load_file(f"{FOLDER}/head.safetensors")["embedding"]' if spoken else "",
            speak=f"say(voice, model, ids{', speaker' if spoken else ''})",
        )


def _vector(file: str, width: int) -> Tensor:
    """Read a speaker vector."""
    try:
        found = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise GraftError(f"speaker is {file}, which could not be read ({error}). Give a .npy file.") from error
    vector = torch.as_tensor(np.asarray(found, dtype=np.float64)).squeeze()
    if tuple(vector.shape) != (width,) or not bool(vector.isfinite().all()) or not bool(vector.any()):
        raise GraftError(f"{file} holds {tuple(found.shape)} numbers. Give {width} finite ones that are not all 0.")
    return vector.float()


def _check(settings: Mapping[str, Any]) -> None:
    """Raise one `GraftError` that names every argument out of range."""
    for part in settings["measures"]:
        if part not in PARTS:
            raise unknown("measure", part, PARTS)
    wrong = [f"longest is {settings['longest']:g} (at least 1)"] if settings["longest"] < 1 else []
    wrong += [f"val_spoken is {settings['val_spoken']} (at least 1)"] if settings["val_spoken"] < 1 else []
    wrong += ["measures is empty"] if not settings["measures"] else []
    missing = "vocoder is missing (a SpeechT5HifiGan or FastSpeech2ConformerHifiGan)"
    wrong += [missing] if not settings["vocoder"] else []
    if wrong:
        raise GraftError(f"SpectrogramVoice: {'; '.join(wrong)}. Mend the recipe's model.")
