"""Sets made from Debian's openclipart package: everyday categories, and stars whose points are to be counted."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from torch import nn

from common import artifacts
from domains.vision.data._images import progress_bar
from domains.vision.data._prepare import Drawing, build_set, read_index, write_index
from domains.vision.data._records import Contents
from domains.vision.data._splits import assign_splits
from domains.vision.data._transforms import turn_and_flip
from domains.vision.data.base import ImageData

ROW = "openclipart"
_ROOT = "usr/share/openclipart/png/"
_FRACTIONS = {"train": 0.5, "val": 0.15, "test": 0.35}

# Class to folder of the category tree. Left out: categories with few drawings, with drawings of everything (icons,
# holiday), or without a subject of their own (arrows, buttons, gradients).
CLASSES = {
    "beverages": "food/beverages/",
    "birds": "animals/birds/",
    "bugs": "animals/bugs/",
    "cards": "recreation/games/cards/",
    "clothing": "people/clothing/",
    "desserts": "food/desserts/",
    "flags": "signs_and_symbols/flags/",
    "flowers": "plants/flowers/",
    "fruit": "food/fruit/",
    "hardware": "computer/hardware/",
    "homes": "buildings/homes/",
    "mammals": "animals/mammals/",
    "music": "recreation/music/",
    "patterns": "special/patterns/",
    "pictograms": "transportation/aiga-symbols/",
    "roadsigns": "transportation/roadsigns/",
    "smilies": "people/smilies/",
    "sports": "recreation/sports/",
    "vehicles": "transportation/vehicles/",
}

# First and last number of points of each class, chosen so that the classes are about equally large.
STAR_BINS = ((5, 42), (43, 58), (59, 70), (71, 80), (81, 89), (90, 98))
_STAR = re.compile(r"shapes/stars/star_(\d+)pt(\d+)step\.png")
_MAX_LINKS = 8


class OpenClipart(ImageData):
    """Drawings in 19 everyday categories, at most 120 of each.

    A drawing is composited onto white, cut to what is drawn and squared with white. Exact duplicates and drawings that
    stand in two categories are dropped; near-duplicates (perceptual hash, mirror images included) stay on one side.
    Splits are about 50/15/35 %, by a hash of the group.

    What to know when reading a result: the categories are the contributors' own and hold some odd members (a roast
    turkey among the birds, a few "linked image not found" placeholders); drawings of one artist's series that look
    different may stand on both sides, so a model may profit from knowing a style.
    """

    def prepare_data(self) -> None:
        """Fetch the archive and prepare the drawings, once."""
        self._folder()

    def _folder(self) -> Path:
        return artifacts.prepared(f"openclipart-1-{artifacts.row(ROW).sha256[:12]}", _build_categories)

    def _read(self) -> Contents:
        return read_index(self._folder(), sorted(CLASSES))


class OpenClipartStars(ImageData):
    """Star polygons of 5 to 98 points in six bins of their number of points: 5-42, 43-58, 59-70, 71-80, 81-89, 90-98.

    Each of the 1,375 files `star_NNptMMstep.png` is one drawing, 100 x 100 pixels, thin grey lines on white; NN points
    joined in steps of MM. The split (50/15/35 %) is by a hash of the file's name. What to know when reading a result:
    a star with one point more or one step more looks nearly the same and may stand on the other side, and numbers of
    points are not held out; the size of the hole gives MM / NN and the amount of ink then gives NN, so no model needs
    to count points; from about 40 points, stars with small steps can hardly be told apart at 100 pixels.

    Augmentation shows the whole star in its 8 orientations; it never crops, rescales or blurs the lines.
    """

    _train_margin = 1.0

    def prepare_data(self) -> None:
        """Fetch the archive and take the stars out, once."""
        self._folder()

    def _folder(self) -> Path:
        return artifacts.prepared(f"openclipart-stars-1-{artifacts.row(ROW).sha256[:12]}", _build_stars)

    def _read(self) -> Contents:
        return read_index(self._folder(), [star_bin(first) for first, _ in STAR_BINS])

    def _train_transform(self) -> nn.Module:
        return turn_and_flip(self.image_size, flip=self.flip)


def star_bin(points: int) -> str:
    """Name the class of a star by its number of points (5 to 98)."""
    first, last = next((first, last) for first, last in STAR_BINS if first <= points <= last)
    return f"{first:02d}-{last:02d} points"


def _build_categories(folder: Path) -> None:
    build_set(folder, _category_drawings(), fractions=_FRACTIONS, title="Preparing openclipart", cap=120)


def _category_drawings() -> Iterator[Drawing]:
    files: dict[str, bytes] = {}
    links: dict[str, str] = {}
    # A category may link to a drawing anywhere in the tree, before or after it in the archive: read all, then resolve.
    with progress_bar() as bar:
        members = artifacts.iter_members(artifacts.fetch(ROW), _ROOT)
        for member in bar.track(members, total=None, description="Reading the openclipart archive"):
            name = member.name.removeprefix(_ROOT)
            if member.link is not None:
                links[name] = member.link.removeprefix(_ROOT)
            elif member.data is not None:
                files[name] = member.data
    for label, prefix in CLASSES.items():
        for name in sorted(name for name in (*files, *links) if name.startswith(prefix) and name.endswith(".png")):
            data = files.get(_follow(name, links))
            if data is not None:
                short = name.removeprefix(prefix).removesuffix(".png").replace("/", "__")
                yield Drawing(short, label, data)


def _follow(name: str, links: dict[str, str]) -> str:
    for _ in range(_MAX_LINKS):
        if name not in links:
            break
        name = links[name]
    return name


def _build_stars(folder: Path) -> None:
    stars: dict[str, str] = {}
    with progress_bar() as bar:
        members = artifacts.iter_members(artifacts.fetch(ROW), f"{_ROOT}shapes/stars/")
        for member in bar.track(members, total=None, description="Reading the openclipart archive"):
            found = _STAR.fullmatch(member.name.removeprefix(_ROOT))
            if found is None or member.data is None:
                continue
            path = folder / Path(member.name).name
            path.write_bytes(member.data)
            stars[path.name] = star_bin(int(found.group(1)))
    names, labels = list(stars), list(stars.values())
    sides = assign_splits(labels, names, _FRACTIONS)
    write_index(folder, list(zip(names, labels, names, sides, strict=True)), {})
