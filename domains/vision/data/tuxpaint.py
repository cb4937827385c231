"""A low-data set of cut-out photographs from Debian's tuxpaint-stamps package."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from common import artifacts
from domains.vision.data._images import progress_bar
from domains.vision.data._prepare import Drawing, build_set, read_index
from domains.vision.data._records import Contents
from domains.vision.data.base import ImageData

ROW = "tuxpaint-stamps"
_ROOT = "usr/share/tuxpaint/stamps/"
_FRACTIONS = {"train": 0.5, "val": 0.15, "test": 0.35}

# Class to folders of the category tree. Only where photographs dominate and there are enough of them: clothes,
# seasonal, town and symbols are mostly drawn; fish, insects, hobbies, sports and trees have fewer than 13 photographs.
CLASSES = {
    "birds": ("animals/birds/",),
    "flowers": ("plants/flowers/",),
    "fruit": ("food/fruit/",),
    "household": ("household/",),
    "mammals": ("animals/mammals/", "animals/marsupials/"),
    "space": ("space/",),
    "vegetables": ("food/vegetables/",),
    "vehicles": ("vehicles/", "military/vehicles/"),
}
_NOT_PHOTOGRAPHS = frozenset({"cartoon", "toys", "plastic"})


class TuxPaintPhotos(ImageData):
    """242 cut-out photographs of 8 kinds of things, 16 to 67 of each: a set for learning from very few images.

    Prepared as `OpenClipart` is: on white, cut to the object, squared; near-duplicates and mirrored variants stay on
    one side; about 50/15/35 % by a hash of the group. A few drawings stand among the photographs. The test split has 84
    images, so one image is more than one percentage point: compare methods over several seeds only.
    """

    def prepare_data(self) -> None:
        """Fetch the archive and prepare the photographs, once."""
        self._folder()

    def _folder(self) -> Path:
        return artifacts.prepared(f"tuxpaint-photos-1-{artifacts.row(ROW).sha256[:12]}", _build)

    def _read(self) -> Contents:
        return read_index(self._folder(), sorted(CLASSES))


def _build(folder: Path) -> None:
    build_set(folder, _photographs(), fractions=_FRACTIONS, title="Preparing tuxpaint photographs")


def _photographs() -> Iterator[Drawing]:
    with progress_bar() as bar:
        members = artifacts.iter_members(artifacts.fetch(ROW), _ROOT)
        for member in bar.track(members, total=None, description="Reading the tuxpaint archive"):
            name = member.name.removeprefix(_ROOT)
            if member.data is None or not name.endswith(".png") or _NOT_PHOTOGRAPHS & set(name.split("/")):
                continue
            for label, prefixes in CLASSES.items():
                if name.startswith(prefixes):
                    yield Drawing(name.removesuffix(".png").replace("/", "__"), label, member.data)
