"""The datamodule all voice sets share: recordings of one speaker, cleaned, checked, split by what is said."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from common.errors import GraftError, unknown
from common.loading import BucketBatchSampler, EpochBatchSampler, StatefulLoader, bucketed_eval_loader
from common.split_data import SplitData
from common.splits import SPLITS, Split, stable_hash
from domains.speech._audio import CHANNELS, Channel, read_audio
from domains.speech._pitch import median_pitch, pitch
from domains.speech.data._records import Record
from domains.speech.data.voices._quality import Limits, middle_of
from domains.speech.data.voices._ready import Cleaning, Ready, ready
from domains.speech.data.voices._records import VoiceBatch, VoiceFacts, VoiceRecord, VoiceSource, digest_of

Check = Literal["refuse", "warn"]
CHECKS: tuple[Check, ...] = ("refuse", "warn")

_FASTEST, _SLOWEST = 30.0, 2.0  # characters a second
_PITCHED = 150.0  # seconds of training speech that the median pitch is taken over
_RATES = (8_000, 48_000)


class VoiceData(SplitData[VoiceRecord, VoiceFacts]):
    """Recordings of one speaker with what is said, in three splits. Subclasses say where they come from (`_read`).

    At the first use every recording is resampled, its silence at both ends is cut, its loudness evened, and the result
    kept in the cache. What cannot be used is left out and counted: recordings that cannot be read, that are silent, too
    short or too long, or whose text does not fit their length (2 to 30 characters a second).

    A set that no voice can be learnt of is refused with its figures; see `Limits`.

    Args:
        rate: Samples per second of a batch, Hz: that of the voice.
        level: Loudness that speech is brought to, dBFS.
        margin: Seconds of silence that stay at either end.
        min_seconds: Shortest recording in use.
        max_seconds: Longest recording in use.
        minutes: Minutes of training speech to use, chosen by a hash; None takes all.
        minutes_draw: Which recordings `minutes` chooses: another number, other recordings.
        seconds_per_batch: Most seconds of audio in a batch, padding included.
        batch_size: Recordings in a batch, whatever their lengths, in place of `seconds_per_batch`.
        channel: "mix" averages the channels of a file; "left" or "right" takes one.
        max_bad: Share of the recordings that may be unreadable or not fit their text.
        limits: What the set has to reach.
        check: What happens where it does not: "refuse" stops, "warn" goes on and states it in `facts.faults`.
        seed: Order of the training recordings. It never touches the splits.
        num_workers: Processes that make batches; 0 makes them in the main process.

    Raises:
        GraftError: An argument is out of range; all such arguments are named.
    """

    def __init__(
        self,
        rate: int = 22_050,
        level: float = -23.0,
        margin: float = 0.075,
        min_seconds: float = 0.5,
        max_seconds: float = 15.0,
        minutes: float | None = None,
        minutes_draw: int = 0,
        seconds_per_batch: float = 40.0,
        batch_size: int | None = None,
        channel: Channel = "mix",
        max_bad: float = 0.1,
        limits: Limits = Limits(),  # noqa: B008  (frozen)
        check: Check = "refuse",
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        lowest, highest = _RATES
        wrong = [f"rate is {rate} ({lowest} to {highest} Hz)"] if not lowest <= rate <= highest else []
        wrong += [f"level is {level:g} (-60 to 0 dBFS)"] if not -60 <= level <= 0 else []
        wrong += [f"margin is {margin:g} (0 to 1 s)"] if not 0 <= margin <= 1 else []
        if not 0.1 <= min_seconds < max_seconds:
            wrong.append(f"min_seconds is {min_seconds:g} (at least 0.1, below max_seconds {max_seconds:g})")
        wrong += [f"minutes is {minutes:g} (above 0)"] if minutes is not None and minutes <= 0 else []
        if batch_size is None and seconds_per_batch < max_seconds:
            wrong.append(f"seconds_per_batch is {seconds_per_batch:g} (at least max_seconds {max_seconds:g})")
        wrong += [f"batch_size is {batch_size} (at least 1)"] if batch_size is not None and batch_size < 1 else []
        wrong += [f"max_bad is {max_bad:g} (0 up to below 1)"] if not 0 <= max_bad < 1 else []
        wrong += [f"num_workers is {num_workers} (at least 0)"] if num_workers < 0 else []
        if wrong:
            raise GraftError(f"{type(self).__name__}: {'; '.join(wrong)}.")
        if check not in CHECKS:
            raise unknown("check", check, CHECKS)
        if channel not in CHANNELS:
            raise unknown("channel", channel, CHANNELS)
        self.cleaning = Cleaning(rate=rate, level=level, margin=margin, channel=channel)
        self.min_seconds, self.max_seconds = min_seconds, max_seconds
        self.minutes, self.minutes_draw = minutes, minutes_draw
        self.seconds_per_batch, self.batch_size, self.max_bad = seconds_per_batch, batch_size, max_bad
        self.limits, self.check, self.seed, self.num_workers = limits, check, seed, num_workers

    # ---- what a subclass provides

    def _name(self) -> str:
        """Name of the set in `facts` and in reports."""
        return type(self).__name__

    def _read(self) -> VoiceSource:
        """Find the recordings of all splits; download or prepare first where that was not done."""
        raise NotImplementedError

    # ---- the datamodule

    def prepare_data(self) -> None:
        """Find and clean all recordings, once."""
        self._cleaned(self._read())

    def setup(self, stage: str | None = None) -> None:
        """Find, clean and check the recordings; all splits, whatever the stage. A second call does nothing.

        Raises:
            GraftError: The set cannot be used as asked, or no voice can be learnt of it; the message says what to do.
        """
        if self._facts is not None:
            return
        source = self._read()
        found, unusable = self._cleaned(source)
        left_out = Counter(source.left_out) + Counter({"unreadable or silent": len(unusable)})
        splits = {side: self._usable(source.splits[side], found, source, left_out) for side in SPLITS}
        self._refuse_bad(source, unusable, left_out)
        for side, records in splits.items():
            if not records:
                raise GraftError(
                    f"{self._name()} has no recordings in its {side} split ({_in_words(left_out) or 'nothing'} left "
                    "out): add some."
                )
        if self.minutes is not None:
            splits["train"] = self._few(splits["train"], self.minutes)
        self._records = splits
        self._facts = self._facts_of(source, splits, found, left_out)

    def _cleaned(self, source: VoiceSource) -> tuple[dict[str, Ready], dict[str, str]]:
        return ready([record for side in SPLITS for record in source.splits[side]], self.cleaning)

    def _facts_of(
        self,
        source: VoiceSource,
        splits: Mapping[Split, Sequence[VoiceRecord]],
        found: Mapping[str, Ready],
        left_out: Mapping[str, int],
    ) -> VoiceFacts:
        used = [found[record.id] for side in SPLITS for record in splits[side]]
        quality = middle_of([one.quality for one in used], [one.samples_before for one in used])
        minutes = {side: round(sum(r.seconds for r in records) / 60, 3) for side, records in splits.items()}
        # Who asked for fewer minutes than the limit means it.
        spoken = minutes["train"] if self.minutes is None else max(minutes["train"], self.limits.minutes)
        faults = self.limits.faults(quality, spoken)
        if faults and self.check == "refuse":
            raise GraftError(
                f"{self._name()}: no voice can be learnt of this: {'; '.join(faults)}. Or go on all the same with "
                "check: warn."
            )
        if faults:
            warnings.warn(f"{self._name()}: a poor source of a voice: {'; '.join(faults)}.", stacklevel=3)
        pseudo = {side: sum(record.pseudo for record in records) for side, records in splits.items()}
        return VoiceFacts(
            rate=self.cleaning.rate,
            language=source.language,
            speaker=source.speaker,
            name=self._name(),
            digest=digest_of(splits, str(self.cleaning)),
            counts={side: len(records) for side, records in splits.items()},
            minutes=minutes,
            max_seconds=max(record.seconds for side in SPLITS for record in splits[side]),
            pseudo_labelled=any(pseudo.values()),
            pseudo=pseudo,
            left_out={why: count for why, count in left_out.items() if count},
            f0_median=self._f0_median(splits["train"]),
            quality=quality,
            faults=tuple(faults),
        )

    def _f0_median(self, records: Iterable[VoiceRecord]) -> float:
        tracks, seconds = [], 0.0
        for record in sorted(records, key=lambda one: (stable_hash(one.id, "pitch"), one.id)):
            tracks.append(pitch(self.load(record), self.cleaning.rate))
            seconds += record.seconds
            if seconds >= _PITCHED:
                break
        return median_pitch(tracks)

    # ---- loaders

    def load(self, record: VoiceRecord) -> Tensor:
        """Read a cleaned recording: float32 (T,) at `facts.rate`."""
        return read_audio(Path(record.path), self.cleaning.rate)

    def train_dataloader(self) -> StatefulLoader:
        """Return the shuffled, resumable loader of `VoiceBatch`es."""
        dataset = _Recordings(self.records("train"), self)
        if self.batch_size is None:
            sampler = BucketBatchSampler(dataset.lengths, self._budget(), seed=self.seed)
        else:
            sampler = EpochBatchSampler(len(dataset), self.batch_size, seed=self.seed)
        return StatefulLoader(dataset, sampler, **self._options())

    def _eval_loader(self, split: Split) -> DataLoader[Any]:
        dataset = _Recordings(self.records(split), self)
        if self.batch_size is not None:
            return DataLoader(dataset, batch_size=self.batch_size, **self._options())
        plan = bucketed_eval_loader(dataset, dataset.lengths, self._budget())
        return DataLoader(dataset, batch_sampler=plan.batch_sampler, **self._options())

    def _budget(self) -> int:
        return round(self.seconds_per_batch * self.cleaning.rate)

    def _options(self) -> dict[str, Any]:
        return {"num_workers": self.num_workers, "collate_fn": collate, "pin_memory": torch.cuda.is_available()}

    # ---- checks

    def _usable(
        self, records: Sequence[Record], found: Mapping[str, Ready], source: VoiceSource, left_out: Counter[str]
    ) -> tuple[VoiceRecord, ...]:
        """Keep the recordings of a split that can be used."""
        kept = []
        for record in records:
            if record.id not in found:
                continue
            one = found[record.id]
            seconds, text = one.samples / self.cleaning.rate, " ".join(record.text.split())
            if seconds < self.min_seconds:
                left_out[f"shorter than {self.min_seconds:g} s"] += 1
            elif seconds > self.max_seconds:
                left_out[f"longer than {self.max_seconds:g} s"] += 1
            elif not _SLOWEST * (seconds - 1) <= len(text) <= _FASTEST * seconds:
                left_out[_MISMATCH] += 1
            else:
                kept.append(
                    VoiceRecord(
                        id=record.id,
                        path=one.path,
                        text=text,
                        seconds=round(seconds, 4),
                        content=record.content,
                        pseudo=record.id in source.pseudo,
                        confidence=source.pseudo.get(record.id, 0.0),
                    )
                )
        return tuple(kept)

    def _refuse_bad(self, source: VoiceSource, unusable: Mapping[str, str], left_out: Mapping[str, int]) -> None:
        """Stop where too many recordings are unreadable or say something else than their text."""
        total = sum(map(len, source.splits.values()))
        mismatched = left_out.get(_MISMATCH, 0)
        if len(unusable) > self.max_bad * total:
            raise GraftError(
                f"{self._name()}: {len(unusable)} of {total} recordings cannot be used, more than max_bad "
                f"{self.max_bad:g} allows. The first: {next(iter(unusable.values()))}"
            )
        if mismatched > self.max_bad * total:
            raise GraftError(
                f"{self._name()}: the texts of {mismatched} of {total} recordings do not fit their lengths "
                f"({_SLOWEST:g} to {_FASTEST:g} characters a second), more than max_bad {self.max_bad:g} allows: the "
                "table pairs files with the texts of others, or the files state a rate that they were not recorded at."
            )
        for number, (name, reason) in enumerate(unusable.items(), start=1):
            warnings.warn(f"{self._name()}: recording {number} that is left out, '{name}': {reason}", stacklevel=3)

    def _few(self, records: Sequence[VoiceRecord], minutes: float) -> tuple[VoiceRecord, ...]:
        total = sum(record.seconds for record in records) / 60
        if total < minutes:
            raise GraftError(f"{self._name()}: minutes is {minutes:g}, and there are {total:.2f}: lower it.")
        kept: set[str] = set()
        seconds = 0.0
        for record in sorted(records, key=lambda r: (stable_hash(r.id, f"minutes-{self.minutes_draw}"), r.id)):
            if seconds >= 60 * minutes:
                break
            kept.add(record.id)
            seconds += record.seconds
        return tuple(record for record in records if record.id in kept)


_MISMATCH = "text does not fit the length"


class _Recordings(Dataset[VoiceBatch]):
    """Recordings of a split; items are `VoiceBatch`es without their first dimension."""

    def __init__(self, records: Sequence[VoiceRecord], data: VoiceData) -> None:
        self._records, self._rate = records, data.cleaning.rate
        self.lengths = [max(1, round(record.seconds * self._rate)) for record in records]

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> VoiceBatch:
        record = self._records[index]
        audio = read_audio(Path(record.path), self._rate)
        return VoiceBatch(audio, torch.tensor(len(audio)), (record.text,), torch.tensor(index))


def collate(items: Sequence[VoiceBatch]) -> VoiceBatch:
    """Pad items to the longest and stack them."""
    return VoiceBatch(
        pad_sequence([item.audio for item in items], batch_first=True),
        torch.stack([item.lengths for item in items]),
        tuple(text for item in items for text in item.text),
        torch.stack([item.index for item in items]),
    )


def _in_words(left_out: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {why}" for why, count in left_out.items() if count)
