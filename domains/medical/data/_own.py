"""What the user's own sets share: checks of every file, and splits that keep a subject on one side."""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.errors import GraftError, unknown
from common.splits import SPLITS, Split
from domains.medical.data._dataset import Loaded
from domains.medical.data._geometry import spacing_of
from domains.medical.data._records import IGNORE, Case
from domains.medical.data._splits import assign_splits, refuse_leaks
from domains.medical.data.base import Contents, VolumeData, checked_patch, refuse_small
from domains.medical.data.prepare import INTENSITIES, prepare, prepare_label

# Cases may differ by this share in the side of a voxel before a common spacing has to be chosen.
_SPACING_TOLERANCE = 0.05


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One case as the user states it.

    Attributes:
        case: Its files.
        split: The split it was given; None if none.
        subject: Whose image it is; "" if unknown.
    """

    case: Case
    split: Split | None = None
    subject: str = ""


@dataclass(frozen=True, kw_only=True)
class Listing:
    """All cases that the user states; see `VolumeFacts` for the other fields."""

    entries: Sequence[Entry]
    class_names: tuple[str, ...]
    channels: int


class OwnVolumes(VolumeData):
    """The user's own images or volumes. Subclasses list them (`_list`).

    Every file is read once at the start, so that a damaged one is named before training begins. Splits that are not
    given are cut by a hash: of the subject where it is stated, else of the image's content. So they depend on no seed,
    name or order, and neither a subject nor a copy of an image stands in two splits.

    Args:
        spatial_dims: 3 for volumes, 2 for images.
        patch_size: Sides of a training patch and of the sliding window, in voxels; None takes 64 (volumes) or 128
            (images).
        spacing: Resample to these sides of a voxel, in mm; None keeps the files' own, which have to agree then.
        intensity: "zscore" (the voxels that are not 0 get mean 0 and deviation 1), "percentiles" (the 0.5th to the
            99.5th become 0 to 1) or "window" (for CT; see `window`).
        window: Lowest and highest value that "window" keeps, such as [-150, 250].
        crop_foreground: Cut each case to its voxels that are not 0 after that.
        allow_empty: Accept label maps with nothing but background.
        skip_bad: Leave cases that cannot be used out and count them, rather than stop at the first.
        val_fraction: Share cut for validation where no such split is given.
        test_fraction: Share cut for the test where no such split is given.
        **kwargs: See `VolumeData`.

    Raises:
        GraftError: An argument is out of range.
    """

    _classification = False

    def __init__(
        self,
        spatial_dims: int = 3,
        patch_size: Sequence[int] | None = None,
        spacing: Sequence[float] | None = None,
        intensity: str = "zscore",
        window: Sequence[float] | None = None,
        crop_foreground: bool = False,
        allow_empty: bool = False,
        skip_bad: bool = False,
        val_fraction: float = 0.15,
        test_fraction: float = 0.15,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(**kwargs)
        name = type(self).__name__
        if spatial_dims not in (2, 3):
            raise GraftError(f"{name}: spatial_dims is {spatial_dims}; give 3 for volumes or 2 for images.")
        if intensity not in INTENSITIES:
            raise unknown("intensity", intensity, INTENSITIES)
        if (intensity == "window") != (window is not None) or (window and (len(window) != 2 or window[0] >= window[1])):
            raise GraftError(
                f"{name}: intensity is {intensity} and window is {window}; give a lowest and a highest value with "
                'intensity "window", and none without.'
            )
        if spacing is not None and (len(spacing) != spatial_dims or min(spacing) <= 0):
            raise GraftError(f"{name}: spacing is {list(spacing)}; give {spatial_dims} sides above 0, in mm.")
        refuse_small(name, val_fraction=(val_fraction, 0.001), test_fraction=(test_fraction, 0.001))
        if val_fraction + test_fraction >= 1:
            raise GraftError(
                f"{name}: val_fraction is {val_fraction} and test_fraction {test_fraction}; the sum is below 1."
            )
        self.spatial_dims, self.spacing, self.intensity, self.window = spatial_dims, spacing, intensity, window
        self.patch_size = checked_patch(
            name, patch_size or [64 if spatial_dims == 3 else 128] * spatial_dims, spatial_dims
        )
        self.crop_foreground, self.allow_empty, self.skip_bad = crop_foreground, allow_empty, skip_bad
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self._preprocessing: dict[str, Any] = {}
        self._first: dict[str, Loaded] = {}
        self._classes: tuple[str, ...] = ()

    def _list(self) -> Listing:
        """List all cases without reading their images."""
        raise NotImplementedError

    def _size(self) -> list[int] | None:
        """Return the size that every image is brought to, where there is one."""
        return None

    def _relabelled(self, label: Tensor) -> Tensor:
        """Turn the numbers of a label map into classes, where they are not that already."""
        return label

    def _read(self) -> Contents:
        listing = self._list()
        self._classes = listing.class_names
        self._preprocessing = {
            "spatial_dims": self.spatial_dims,
            "channels": listing.channels,
            "spacing": None if self.spacing is None else [*self.spacing],
            "size": self._size(),
            "intensity": self.intensity,
            "window": None if self.window is None else [*self.window],
            "crop_foreground": self.crop_foreground,
        }
        entries = self._existing(listing.entries)
        _refuse_doubles(entries)
        contents = {entry.case.id: content_of([*entry.case.image]) for entry in entries}
        groups = {entry.case.id: entry.subject or contents[entry.case.id] for entry in entries}
        refuse_leaks([*groups.values()], [entry.split for entry in entries], [*groups])
        usable, sides = self._checked(entries)
        splits = self._split(usable, groups)
        # What the set's own files were read with stays; a new file of another spacing is brought to theirs.
        preprocessing = {**self._preprocessing, "spacing": self._preprocessing["spacing"] or sides}
        rows: list[tuple[str, ...]] = []
        found: dict[Split, list[Case]] = {split: [] for split in SPLITS}
        for entry in sorted(usable, key=lambda entry: entry.case.id):
            case = replace(entry.case, group=entry.subject)
            split = splits[case.id]
            found[split].append(case)
            drawn = content_of([case.label]) if case.label else case.target
            rows.append((case.id, split, contents[case.id], drawn))
        if self._classification:
            _refuse_untrained(self._classes, found["train"])
        return Contents(
            splits=found,
            class_names=self._classes,
            channels=listing.channels,
            spacing=tuple(preprocessing["spacing"]),
            patch_size=self.patch_size,
            preprocessing=preprocessing,
            digest=rows,
            skipped=len(listing.entries) - len(usable),
        )

    def _load(self, split: Split, index: int) -> Loaded:
        case = self.records(split)[index]
        kept = self._first.pop(case.id, None)
        return self._prepared(case) if kept is None else kept

    def _prepared(self, case: Case) -> Loaded:
        """Read and check one case."""
        image, affine, meta = prepare(case.image, self._preprocessing)
        if self._classification:
            return Loaded(image, torch.tensor(self._classes.index(case.target)), affine)
        if case.label is None:
            raise RuntimeError("A case for segmentation has a label map.")
        label = self._relabelled(prepare_label(case.label, meta, case.image[0]))
        values = torch.unique(label).tolist()
        wrong = [value for value in values if value != IGNORE and not 0 <= value < len(self._classes)]
        if wrong:
            raise GraftError(
                f"The label map '{case.label}' holds {', '.join(map(str, wrong[:5]))}; classes are 0 to "
                f"{len(self._classes) - 1} and {IGNORE} is 'not labelled'. Correct it, or name all classes."
            )
        if values == [IGNORE]:
            raise GraftError(f"The label map '{case.label}' has no labelled voxel: leave the case out.")
        if not self.allow_empty and set(values) <= {0, IGNORE}:
            raise GraftError(
                f"The label map '{case.label}' is empty: it holds background only. Correct it, leave the case out, or "
                "set allow_empty: true if that is right."
            )
        return Loaded(image, label.to(torch.uint8), affine)

    # ---- checks

    def _existing(self, entries: Sequence[Entry]) -> list[Entry]:
        absent = {entry.case.id: path for entry in entries for path in _files(entry.case) if not path.exists()}
        if absent and not self.skip_bad:
            listed = ", ".join(f"'{path}'" for path in [*absent.values()][:3])
            more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
            raise GraftError(
                f"{self._name()} lists files that do not exist: {listed}{more}. Correct the paths, or set "
                "skip_bad: true to leave these cases out."
            )
        return [entry for entry in entries if entry.case.id not in absent]

    def _split(self, entries: Sequence[Entry], groups: Mapping[str, str]) -> dict[str, Split]:
        """Complete the given splits; cases of one group stay together."""
        given = {entry.split for entry in entries}
        shares: dict[Split, float] = {"val": self.val_fraction, "test": self.test_fraction}
        asked = {split: share for split, share in shares.items() if split not in given}
        fractions: dict[Split, float] = {"train": 1 - sum(asked.values()), **asked}
        splits = {entry.case.id: entry.split for entry in entries}
        free = [entry for entry in entries if entry.split in (None, "train")]
        if not free:
            raise GraftError(f"{self._name()} has no cases in its train split: add some.")
        if asked:
            ids = [entry.case.id for entry in free]
            sides = assign_splits([groups[name] for name in ids], [entry.case.target for entry in free], fractions)
            splits.update(zip(ids, sides, strict=True))
        return {name: split or "train" for name, split in splits.items()}

    def _checked(self, entries: Sequence[Entry]) -> tuple[list[Entry], list[float]]:
        """Read every case once; return those that can be used, and the sides of their voxels."""
        usable: list[Entry] = []
        sides: list[tuple[float, ...]] = []
        room = self.cache_bytes
        for entry in entries:
            try:
                found = self._prepared(entry.case)
            except GraftError as error:
                if not self.skip_bad:
                    raise
                warnings.warn(f"Left out: {error}", stacklevel=2)
                continue
            usable.append(entry)
            sides.append(spacing_of(found.affine)[: self.spatial_dims])
            room -= found.image.nbytes + found.label.nbytes
            if room >= 0:
                self._first[entry.case.id] = found
        if not usable:
            raise GraftError(f"{self._name()} has no case that can be used: add some.")
        lowest, highest = np.min(sides, axis=0), np.max(sides, axis=0)
        if self._size() is None and (highest > lowest * (1 + _SPACING_TOLERANCE)).any():
            raise GraftError(
                f"The voxels of {self._name()} have sides from {_sides(lowest)} to {_sides(highest)} mm: choose "
                f"one size with `spacing`, such as {[round(float(side), 2) for side in np.median(sides, axis=0)]}."
            )
        return usable, [round(float(side), 4) for side in np.median(sides, axis=0)]


def content_of(paths: Sequence[Path]) -> str:
    """Hash the contents of files, or of all files of folders, to a sha256."""
    digest = hashlib.sha256()
    for path in paths:
        for file in sorted(part for part in path.iterdir() if part.is_file()) if path.is_dir() else [path]:
            try:
                with file.open("rb") as opened:
                    digest.update(hashlib.file_digest(opened, "sha256").digest())
            except OSError as error:
                raise GraftError(f"Cannot read '{file}': {error.strerror}. Replace the file.") from error
    return digest.hexdigest()


def _files(case: Case) -> list[Path]:
    return [*case.image, *([case.label] if case.label else [])]


def _refuse_doubles(entries: Sequence[Entry]) -> None:
    double = [name for name, count in Counter(entry.case.id for entry in entries).items() if count > 1]
    if double:
        raise GraftError(f"'{double[0]}' is listed more than once: delete all lines for it but one.")


def _refuse_untrained(class_names: Sequence[str], train: Sequence[Case]) -> None:
    untrained = sorted({*class_names} - {case.target for case in train})
    if untrained:
        raise GraftError(
            f"There is no training image of class {', '.join(untrained)}: add some, or leave the class out."
        )


def _sides(sides: np.ndarray) -> str:
    return "x".join(f"{side:.3g}" for side in sides)
