"""The datamodule all speech sets share: records, checks, few-shot subsets, batches of similar lengths."""

from __future__ import annotations

import dataclasses
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from common.errors import GraftError, unknown
from common.loading import BucketBatchSampler, EpochBatchSampler, StatefulLoader, bucketed_eval_loader
from common.split_data import SplitData
from common.splits import SPLITS, Split, check_share, stable_hash, take_share
from domains.speech._audio import CHANNELS, RATE, Channel
from domains.speech._text import NORMALIZERS, Normalizer, normalize
from domains.speech.data._confound import data_card
from domains.speech.data._dataset import Clips, EvalClips, TrainClips, load
from domains.speech.data._records import (
    LONG,
    SHORT_SECONDS,
    Contents,
    Kind,
    Long,
    Record,
    SpeechFacts,
    digest_of,
)

LEAST_SECONDS = 0.05
"""Below this a clip has no frame for every encoder."""

_MOST_CHARACTERS = 35.0
_SPEEDS = (0.5, 2.0)


class SpeechData(SplitData[Record, SpeechFacts]):
    """Clips of speech in three splits. Subclasses say where they come from (`_read`).

    Audio stays on disk and is read, resampled to 16 kHz and reduced to one channel when its batch is made. A batch
    holds clips of about one length, many short ones or few long ones; every epoch mixes them anew. A clip that turns
    out to be unreadable in use is named in a warning, counted and left out of its batch; more than `max_bad` stop the
    run.

    Args:
        max_seconds: Longest clip, in seconds. Whisper takes 30.
        long: What happens to longer ones: "refuse" stops, "leave_out" counts them in `facts.left_out`.
        channel: "mix" averages the channels of a file; "left" or "right" takes one.
        normalizer: How transcripts are written, for training and for measuring: "lower", "none", "english" or
            "characters"; see `domains.speech._text.normalize`.
        seconds_per_batch: Most seconds of audio in a batch, padding included.
        batch_size: Clips in a batch, whatever their lengths, in place of `seconds_per_batch`.
        speed: Speeds, one of which every training clip is played at, drawn anew in each epoch ([0.9, 1.0, 1.1]; Ko et
            al. 2015). Empty for none.
        max_bad: Share of the clips that may be unreadable.
        shots: Training clips per class, chosen by a hash; of transcripts, training clips in all. None takes all.
        shots_draw: Which subset `shots` or `share` chooses: another number, other clips.
        share: Share of the training clips (of each class, where there are classes), in place of `shots`.
        seed: Order of the training clips and their speeds. It never touches the splits.
        num_workers: Processes that make batches; 0 makes them in the main process.

    Raises:
        GraftError: An argument is out of range; all such arguments are named.
    """

    _test_only: ClassVar[bool] = False

    def __init__(
        self,
        max_seconds: float = 30.0,
        long: Long = "refuse",
        channel: Channel = "mix",
        normalizer: Normalizer = "lower",
        seconds_per_batch: float = 60.0,
        batch_size: int | None = None,
        speed: Sequence[float] = (),
        max_bad: float = 0.01,
        shots: int | None = None,
        shots_draw: int = 0,
        share: float | None = None,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        least = {"max_seconds": (max_seconds, LEAST_SECONDS), "seconds_per_batch": (seconds_per_batch, LEAST_SECONDS)}
        least |= {"max_bad": (max_bad, 0), "num_workers": (num_workers, 0)}
        least |= {
            "batch_size": (1 if batch_size is None else batch_size, 1),
            "shots": (1 if shots is None else shots, 1),
        }
        wrong = [f"{name} is {value} (at least {bound})" for name, (value, bound) in least.items() if value < bound]
        if max_bad >= 1:
            wrong.append(f"max_bad is {max_bad} (a share below 1)")
        slowest, fastest = _SPEEDS
        wrong += [f"speed has {value} ({slowest} to {fastest})" for value in speed if not slowest <= value <= fastest]
        if wrong:
            raise GraftError(f"{type(self).__name__}: {'; '.join(wrong)}.")
        for what, given, allowed in (
            ("rule for long clips", long, LONG),
            ("channel", channel, CHANNELS),
            ("normalizer", normalizer, NORMALIZERS),
        ):
            if given not in allowed:
                raise unknown(what, given, allowed)
        self.max_seconds, self.long, self.channel, self.normalizer = max_seconds, long, channel, normalizer
        self.seconds_per_batch, self.batch_size, self.speed = seconds_per_batch, batch_size, tuple(speed)
        check_share(type(self).__name__, share, shots)
        self.share = share
        self.max_bad, self.shots, self.shots_draw = max_bad, shots, shots_draw
        self.seed, self.num_workers = seed, num_workers
        self._bad: dict[Split, Tensor] = {}
        self._named: set[tuple[Split, int]] = set()

    # ---- what a subclass provides

    def _name(self) -> str:
        """Name of the set in `facts` and in reports."""
        return type(self).__name__

    def _read(self) -> Contents:
        """Find the records of all splits; download or prepare first where that was not done."""
        raise NotImplementedError

    # ---- the datamodule

    def setup(self, stage: str | None = None) -> None:
        """Find and check the records; all splits, whatever the stage. A second call does nothing.

        Raises:
            GraftError: The data cannot be used as asked; the message says what to do.
        """
        if self._facts is not None:
            return
        found = self._read()
        left_out = Counter(found.left_out)
        splits = {side: self._usable(found.splits[side], found.kind, left_out) for side in SPLITS}
        self._check(found, splits)
        confound: Mapping[str, float] = {}
        if found.kind == "classes" and not self._test_only:
            confound = data_card(splits, found.class_names, self.channel, digest_of(splits))
        if self.shots is not None and not self._test_only:
            splits["train"] = self._few(splits["train"], found.kind, self.shots)
        if self.share is not None and not self._test_only:
            names, labels = [record.id for record in splits["train"]], [record.label for record in splits["train"]]
            kept = take_share(names, labels, self.share, f"shots-{self.shots_draw}")
            splits["train"] = tuple(record for record in splits["train"] if record.id in kept)
        self._records = splits
        self._bad = {
            side: torch.zeros(len(records), dtype=torch.uint8).share_memory_() for side, records in splits.items()
        }
        longest = max(max(self._dataset(side, found.class_names).lengths, default=0) for side in SPLITS) / RATE
        self._facts = self._facts_of(found, splits, left_out, confound, longest)

    def _facts_of(
        self,
        found: Contents,
        splits: Mapping[Split, Sequence[Record]],
        left_out: Mapping[str, int],
        confound: Mapping[str, float],
        longest: float,
    ) -> SpeechFacts:
        texts = [record.text for side in SPLITS for record in splits[side]] if found.kind == "text" else []
        return SpeechFacts(
            kind=found.kind,
            rate=RATE,
            language=found.language,
            normalizer=self.normalizer,
            class_names=found.class_names,
            max_seconds=longest,
            short=longest < SHORT_SECONDS,
            name=self._name(),
            digest=digest_of(splits),
            counts={side: len(records) for side, records in splits.items()},
            seconds={side: round(sum(r.seconds for r in records), 2) for side, records in splits.items()},
            skipped=found.skipped,
            left_out={why: count for why, count in left_out.items() if count},
            confound=confound,
            transcripts=_transcripts(texts),
            characters=tuple(sorted({sign for record in splits["train"] for sign in record.text})),
            speakers={side: len({r.speaker for r in records} - {""}) for side, records in splits.items()},
        )

    def train_dataloader(self) -> StatefulLoader:
        """Return the shuffled, resumable loader of `SpeechBatch`es."""
        self._needs("train")
        dataset = self._dataset("train", self.names)
        if self.batch_size is None:
            self._check_budget(dataset)
            budget = round(self.seconds_per_batch * RATE)
            sampler = BucketBatchSampler(dataset.lengths, budget, seed=self.seed)
        else:
            sampler = EpochBatchSampler(len(dataset), self.batch_size, seed=self.seed)
        return TrainClips(dataset, sampler, partial(self.watch, "train"), **self._options(dataset))

    def watch(self, split: Split) -> None:
        """Warn of clips of a split that turned out to be unreadable since the last look.

        Raises:
            GraftError: There are more of them than `max_bad` allows.
        """
        for position in torch.nonzero(self._bad[split]).flatten().tolist():
            if (split, position) in self._named:
                continue
            self._named.add((split, position))
            reason = self._reason(self._records[split][position])
            total = sum(map(len, self._records.values())) + self.facts.skipped
            count = len(self._named) + self.facts.skipped
            if count > self.max_bad * total:
                raise GraftError(
                    f"{self._name()}: {count} of {total} clips cannot be used, more than max_bad {self.max_bad:g} "
                    f"allows. The last: {reason}"
                )
            warnings.warn(f"{self._name()}, {split}: clip {count} that is left out: {reason}", stacklevel=2)

    def _reason(self, record: Record) -> str:
        try:
            load(record, self.channel)
        except GraftError as error:
            return str(error)
        return f"{record.path} could not be read a moment ago."

    def _content(self, record: Record) -> str | None:
        return f"{record.content}/{record.start}/{record.end}" if record.content else None

    def _eval_loader(self, split: Split) -> EvalClips:
        self._needs(split)
        dataset = self._dataset(split, self.names)
        if self.batch_size is not None:
            return EvalClips(dataset, partial(self.watch, split), batch_size=self.batch_size, **self._options(dataset))
        self._check_budget(dataset)
        plan = bucketed_eval_loader(dataset, dataset.lengths, round(self.seconds_per_batch * RATE))
        return EvalClips(
            dataset, partial(self.watch, split), batch_sampler=plan.batch_sampler, **self._options(dataset)
        )

    def _options(self, dataset: Clips) -> dict[str, Any]:
        return {"num_workers": self.num_workers, "collate_fn": dataset.collate, "pin_memory": torch.cuda.is_available()}

    def _dataset(self, split: Split, class_names: Sequence[str]) -> Clips:
        number = {name: position for position, name in enumerate(class_names)}
        records = self._records[split]
        return Clips(
            records,
            [number[record.label] for record in records] if class_names else None,
            self.channel,
            self._bad[split],
            self.max_seconds,
            speed=self.speed,
            seed=self.seed,
            train=split == "train",
        )

    # ---- checks

    def _usable(self, records: Sequence[Record], kind: Kind, left_out: Counter[str]) -> tuple[Record, ...]:
        """Normalise texts; refuse or leave out clips of impossible lengths."""
        kept = []
        for record in records:
            if record.seconds < LEAST_SECONDS:
                left_out[f"shorter than {LEAST_SECONDS} s"] += 1
            elif record.seconds > self.max_seconds and self.long == "leave_out":
                left_out[f"longer than {self.max_seconds:g} s"] += 1
            elif record.seconds > self.max_seconds:
                raise GraftError(
                    f"{self._name()}: '{record.id}' lasts {record.seconds:.1f} s, longer than max_seconds "
                    f"{self.max_seconds:g}: cut it, raise max_seconds as far as the backbone's context goes, or set "
                    "long: leave_out."
                )
            elif kind == "text":
                kept.append(dataclasses.replace(record, text=normalize(record.text, self.normalizer)))
            else:
                kept.append(record)
        return tuple(kept)

    def _check(self, found: Contents, splits: Mapping[Split, Sequence[Record]]) -> None:
        for side, records in splits.items():
            if not records and (side == "test" or not self._test_only):
                raise GraftError(f"{self._name()} has no clips in its {side} split: add some.")
            for record in records:
                if found.kind == "text" and not record.text:
                    raise GraftError(
                        f"{self._name()}: nothing is left of the text of '{record.id}' under normalizer "
                        f"'{self.normalizer}': write what is said, or leave the clip out."
                    )
        if found.kind == "text":
            self._warn_of_speed([record for records in splits.values() for record in records])
            return
        if len(found.class_names) < 2:
            got = ", ".join(found.class_names) or "none"
            raise GraftError(f"{self._name()} needs at least 2 classes to tell apart and has {got}: add another class.")
        trained = {record.label for record in splits["train"]}
        untrained = [f"'{name}'" for name in found.class_names if name not in trained]
        if untrained:
            raise GraftError(
                f"{self._name()} has no training clip with label {', '.join(untrained)}: add some, or leave the "
                "label out."
            )

    def _warn_of_speed(self, records: Sequence[Record]) -> None:
        fast = [record for record in records if len(record.text) > _MOST_CHARACTERS * record.seconds]
        if fast:
            warnings.warn(
                f"{self._name()}: {len(fast)} of {len(records)} texts have more than {_MOST_CHARACTERS:g} characters a "
                f"second ('{fast[0].id}': {len(fast[0].text)} in {fast[0].seconds:.2f} s): nobody speaks so fast. "
                "Either the text is not what is said, or the file states a rate that it was not recorded at.",
                stacklevel=2,
            )

    def _check_budget(self, dataset: Clips) -> None:
        longest = max(dataset.lengths, default=0) / RATE
        if longest > self.seconds_per_batch:
            raise GraftError(
                f"{self._name()}: the longest clip has {longest:.1f} s and seconds_per_batch is "
                f"{self.seconds_per_batch:g}: raise it to at least that, or lower max_seconds."
            )

    def _needs(self, split: Split) -> None:
        if not self.records(split):
            raise GraftError(
                f"{self._name()} is for testing only ({self.facts.counts['test']} clips) and has no {split} split: "
                "train on another set."
            )

    def _few(self, records: Sequence[Record], kind: Kind, shots: int) -> tuple[Record, ...]:
        counts = Counter(record.label for record in records)
        short = [f"'{label}' ({count})" if label else str(count) for label, count in counts.items() if count < shots]
        if short:
            raise GraftError(f"shots is {shots}, more than the training clips of {', '.join(sorted(short))}: lower it.")
        taken: Counter[str] = Counter()
        kept: set[str] = set()
        for record in sorted(records, key=lambda r: (stable_hash(r.id, f"shots-{self.shots_draw}"), r.id)):
            if taken[record.label] < shots:
                taken[record.label] += 1
                kept.add(record.id)
        return tuple(record for record in records if record.id in kept)


def _transcripts(texts: Sequence[str]) -> dict[str, int]:
    if not texts:
        return {}
    return {
        "words": sum(len(text.split()) for text in texts),
        "distinct": len(set(texts)),
        "digits": sum(any(sign.isdigit() for sign in text) for text in texts),
        "longest": max(map(len, texts)),
    }
