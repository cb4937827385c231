"""What the recognition tasks share: texts out of clips, error rates, and a report of every utterance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor
from torchmetrics import MetricCollection

from common.attach import Attached
from common.checkpoint import write_atomically
from common.errors import GraftError
from common.split_data import named
from common.splits import stable_hash
from common.task import Backbone
from domains.speech._task import SpeechTask, records_of, warn
from domains.speech._text import normalize
from domains.speech.backbones import TextTokens
from domains.speech.data._records import Record, SpeechBatch
from domains.speech.metrics import align, codes_of, text_metrics, texts_of
from domains.speech.pictures import picture_of

FULL = "_full_context"
"""What the names of metrics end in that were measured with the encoder's whole context."""

_PICTURES = 16  # of a test split, chosen by a hash of their ids
_SHOWN = 12  # characters that a warning names


class Recognition(SpeechTask):
    """Turn clips into texts.

    Outputs of evaluation are texts, as tensors of code points; see `metrics.codes_of`.
    """

    kind: ClassVar[str] = "text"
    full_context_test = True  # no part of the settings: it changes neither a run nor its adapter

    def __init__(self, **options: Any) -> None:  # noqa: ANN401
        super().__init__(**options)
        self.full_metrics: MetricCollection | None = None
        self._unwritable: dict[str, Any] = {}

    @property
    def primary(self) -> tuple[str, str]:  # type: ignore[override]
        """The word error rate, named after the texts' normaliser."""
        return (f"wer_{self.facts.normalizer}", "min")

    @property
    def tokens(self) -> TextTokens:
        """How the texts are written."""
        raise NotImplementedError

    def build_metrics(self) -> MetricCollection:
        """Build word and character error rate and the counts behind them."""
        return text_metrics(self.facts.normalizer)

    # ---- slots of a subclass

    def loss_of(self, heard: tuple[Tensor, Tensor], batch: SpeechBatch) -> Tensor:
        """Return the scalar loss of encoded clips."""
        raise NotImplementedError

    def write(self, heard: tuple[Tensor, Tensor], *, beams: int = 1) -> list[str]:
        """Return the texts of encoded clips, not normalised."""
        raise NotImplementedError

    # ---- building

    def prepare(self, stage: str | None) -> None:
        """Look for texts that the backbone cannot write.

        Raises:
            GraftError: There is nothing to train, or a text is longer than the decoder.
        """
        if not any(parameter.requires_grad for parameter in self.parameters()):
            raise GraftError(
                f"{type(self.peft).__name__} trains nothing in {type(self).__name__}: a recogniser keeps its own "
                "output layer. Take another method, or `graft baseline ZeroShot` for the model as it is."
            )
        self._check_texts(self._datamodule())

    def assemble(self, attach_with: Callable[[Backbone], Attached] | None = None) -> None:
        """Build everything, with metrics at the whole context where they are asked for and the task uses less."""
        super().assemble(attach_with)
        if self.full_context_test and self._built.context is not None and not self.full_context():
            self.full_metrics = text_metrics(self.facts.normalizer, FULL)

    def _check_texts(self, data: Any) -> None:  # noqa: ANN401
        """Count the texts with characters that cannot be written, and refuse those that are too long."""
        records = [record for _, record in records_of(data)]
        for split, record in records_of(data):
            self._check_text(split, record)
        known = {character for record in records for character in record.text}
        odd = self.tokens.unwritable("".join(sorted(known)))
        found = [odd & set(record.text) for record in records]
        characters = Counter(character for missing in found for character in missing)
        texts = sum(map(bool, found))
        if texts:
            named = [f"{character!r} ({count})" for character, count in characters.most_common(_SHOWN)]
            more = f" and {len(characters) - _SHOWN} more" if len(characters) > _SHOWN else ""
            warn(
                f"{texts} of {len(records)} transcripts have characters that '{self.backbone_name}' cannot write, and "
                f"which count as errors: {', '.join(named)}{more}. Mend the transcripts or choose another normalizer."
            )
        self._unwritable = {"transcripts": texts, "characters": dict(characters.most_common())}

    def _check_text(self, split: str, record: Record) -> None:
        """Refuse a text that the task cannot learn."""

    def describe_data(self, data: Any) -> dict[str, Any]:  # noqa: ANN401
        """Return what `SpeechTask` does, and which characters of the transcripts cannot be written."""
        described = super().describe_data(data)
        return described | {"unwritable": self._unwritable} if self._unwritable.get("transcripts") else described

    # ---- steps

    def compute_loss(self, batch: SpeechBatch) -> Tensor:
        """Return the scalar training loss of a batch."""
        return self.loss_of(self.hear(batch), batch)

    def infer(self, batch: SpeechBatch) -> Tensor:
        """Return the normalised texts of a batch as code points, decoded as for a test."""
        return self.codes(self.write(self.hear(batch), beams=self.settings.get("beams", 1)))

    def codes(self, texts: Sequence[str]) -> Tensor:
        """Normalise texts as the data's are, and turn them into code points."""
        return codes_of([normalize(text, self.facts.normalizer) for text in texts]).to(self.device)

    def targets(self, batch: SpeechBatch) -> Tensor:
        """Return the transcripts as code points."""
        return codes_of(batch.text).to(self.device)

    def _evaluate(self, batch: SpeechBatch, stage: str, metrics: MetricCollection) -> Tensor:
        heard = self.hear(batch)
        beams = self.settings.get("beams", 1) if stage == "test" else 1
        output = self.codes(self.write(heard, beams=beams))
        self._note(stage, metrics, output, batch)
        loss = self.loss_of(heard, batch)
        self.log(f"{stage}/loss", loss, on_step=False, on_epoch=True, batch_size=len(batch.audio))
        return output

    def _note(self, stage: str, metrics: MetricCollection, output: Tensor, batch: SpeechBatch) -> None:
        metrics.update(output, self.targets(batch))
        named = {f"{stage}/{name}": metric for name, metric in metrics.items()}
        self.log_dict(named, prog_bar=True, on_step=False, on_epoch=True, batch_size=len(batch.audio))

    def test_step(self, batch: SpeechBatch, batch_idx: int) -> Tensor:
        """Update the test metrics, those at the whole context too, and return the texts."""
        output = self._evaluate(batch, "test", self.test_metrics)
        if self.full_metrics is not None:
            heard = self.hear(batch, full=True)
            again = self.codes(self.write(heard, beams=self.settings.get("beams", 1)))
            self._note("test", self.full_metrics, again, batch)
        return output

    # ---- results

    def predictions(self, outputs: Sequence[Tensor], data: Any, folder: Path) -> list[dict[str, Any]]:  # noqa: ANN401
        """Return for each test clip its reference, what was heard, errors and alignment; for some a picture.

        An alignment is a list of (sign, reference word, heard word); see `metrics.Alignment`. A clip that could not be
        read has no row.
        """
        primary, records = self.primary[0], data.records("test")
        order = sorted(range(len(records)), key=lambda index: stable_hash(records[index].id, "pictures"))
        shown = set(order[:_PICTURES])
        rows: dict[int, dict[str, Any]] = {}
        for place, audio, reference, said in _clips(outputs, data):
            record, found = records[place], align(reference, said)
            row = {
                **named(record.id, record.speaker),
                "path": record.path,
                "speaker": record.speaker,
                "seconds": round(record.seconds, 3),
                "reference": reference,
                "hypothesis": said,
                primary: round(found.rate, 6),
                "errors": found.errors,
                "words": found.words,
                "alignment": found.steps,
            }
            if place in shown:
                name = f"predictions/{stable_hash(record.id):016x}.png"
                drawn = picture_of(audio, self.facts.rate, reference, said, title=record.id)
                write_atomically(folder / name, lambda file, drawn=drawn: file.write(drawn))
                row["picture"] = name
            rows[place] = row
        return [rows[place] for place in sorted(rows)]


def _clips(outputs: Sequence[Tensor], data: Any) -> Iterator[tuple[int, Tensor, str, str]]:  # noqa: ANN401
    """Yield the index of each test record with its audio (T,), its transcript and what was heard."""
    for batch, codes in zip(data.test_dataloader(), outputs, strict=True):
        said = texts_of(codes)
        for row, (index, length) in enumerate(zip(batch.index.tolist(), batch.lengths.tolist(), strict=True)):
            yield index, batch.audio[row, :length], batch.text[row], said[row]
