from __future__ import annotations

import csv
import io
import struct
import zlib
from collections import Counter, defaultdict

import imagehash
import numpy as np
import pytest
from PIL import Image, ImageDraw

from common import artifacts
from common.artifacts import Member
from common.errors import GraftError
from domains.vision.data import OpenClipart, OpenClipartStars, TuxPaintPhotos, openclipart, tuxpaint
from domains.vision.data._prepare import Drawing, build_set, read_index, tidy

CLIPART = "usr/share/openclipart/png/"
STAMPS = "usr/share/tuxpaint/stamps/"


def png(seed, size=(64, 48), border=10):
    """A drawing of random blocks inside a transparent border."""
    blocks = np.random.default_rng(seed).integers(0, 230, (6, 6, 3), dtype=np.uint8)
    image = Image.new("RGBA", (size[0] + 2 * border, size[1] + 2 * border))
    image.paste(Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST), (border, border))
    return encode(image)


def encode(image):
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """Put made-up members in the place of the real archives."""
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    members: list[Member] = []
    monkeypatch.setattr(artifacts, "fetch", lambda name: tmp_path / name)
    monkeypatch.setattr(
        artifacts, "iter_members", lambda path, prefix="": iter(m for m in members if m.name.startswith(prefix))
    )
    return members


def index(folder):
    with (folder / "index.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# ---- cleaning


def test_tidy_cuts_the_border_and_squares():
    image = tidy(png(0, size=(60, 30), border=40), side=256)
    assert image.width == image.height
    assert 60 < image.width < 70
    ink = np.asarray(image.convert("L")) < 250
    rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    assert columns[-1] - columns[0] + 1 == 60
    assert rows[-1] - rows[0] + 1 == 30
    assert abs(rows[0] - (image.height - 1 - rows[-1])) <= 1


def test_tidy_bounds_the_side():
    assert tidy(png(0, size=(600, 500)), side=128).size == (128, 128)


def test_tidy_refuses_blank_and_enormous_drawings():
    assert tidy(encode(Image.new("RGBA", (20, 20))), side=64) == "blank"
    assert tidy(encode(Image.new("L", (20, 20), 250)), side=64) == "blank"
    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    chunks = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    )
    assert tidy(b"\x89PNG\r\n\x1a\n" + chunks, side=64) == "too large"
    assert tidy(encode(Image.new("1", (5000, 4001))), side=64) == "too large"


def test_build_set(tmp_path):
    drawings = [Drawing(f"{n}", "a", png(n)) for n in range(20)] + [Drawing(f"{n}", "b", png(50 + n)) for n in range(8)]
    drawings.append(Drawing("copy", "a", png(3)))
    drawings.append(Drawing("larger border", "a", png(4, border=30)))
    drawings.append(Drawing("astray", "b", png(5)))
    drawings.append(Drawing("blank", "b", encode(Image.new("RGBA", (9, 9)))))
    folder = tmp_path / "set"
    folder.mkdir()
    build_set(folder, drawings, fractions={"train": 0.5, "val": 0.15, "test": 0.35}, title="test", cap=12)
    rows = index(folder)
    assert Counter(row["label"] for row in rows) == {"a": 12, "b": 8}
    assert {row["split"] for row in rows} == {"train", "val", "test"}
    contents = read_index(folder, ["a", "b"])
    assert contents.left_out == {"blank": 1, "in two classes": 2, "exact duplicates": 2, "over the cap of a class": 7}
    assert all(record.path.is_file() for records in contents.splits.values() for record in records)


def test_variants_and_mirror_images_stay_on_one_side(tmp_path):
    drawings = []
    for n in range(12):
        image = Image.open(io.BytesIO(png(n, size=(128, 128), border=0)))
        marked = image.copy()
        ImageDraw.Draw(marked).ellipse((60, 60, 66, 66), fill="white")
        mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        for name, variant in (("plain", image), ("marked", marked), ("mirrored", mirrored)):
            drawings.append(Drawing(f"{n}-{name}", "ab"[n % 2], encode(variant)))
    folder = tmp_path / "set"
    folder.mkdir()
    build_set(folder, drawings, fractions={"train": 0.5, "val": 0.25, "test": 0.25}, title="test")
    sides, groups = defaultdict(set), defaultdict(set)
    for row in index(folder):
        number = row["path"].split("/")[1].split("-")[0]
        sides[number].add(row["split"])
        groups[number].add(row["group"])
    assert len(sides) == 12
    assert all(len(found) == 1 for found in (*sides.values(), *groups.values()))


def test_damaged_folder(tmp_path):
    with pytest.raises(GraftError, match="delete it"):
        read_index(tmp_path, ["a"])


# ---- the sets, from made-up archives


def test_openclipart_follows_links_and_reads_its_categories(archive):
    for number, prefix in enumerate(openclipart.CLASSES.values()):
        archive += [Member(f"{CLIPART}{prefix}{n}.png", png(100 * number + n), None) for n in range(4)]
    archive += [
        Member(f"{CLIPART}animals/birds/linked.png", None, f"{CLIPART}elsewhere/owl.png"),
        Member(f"{CLIPART}animals/birds/dangling.png", None, f"{CLIPART}elsewhere/nothing.png"),
        Member(f"{CLIPART}elsewhere/owl.png", png(9999), None),
        Member(f"{CLIPART}elsewhere/unused.png", png(9998), None),
    ]
    data = OpenClipart(image_size=16)
    data.prepare_data()
    archive.clear()  # prepared once
    data.setup()
    assert data.names == tuple(sorted(openclipart.CLASSES))
    records = [r for s in ("train", "val", "test") for r in data.records(s)]
    assert Counter(r.label for r in records) == {name: 5 if name == "birds" else 4 for name in openclipart.CLASSES}
    assert "birds/linked.png" in {r.id for r in records}
    some = OpenClipart(image_size=16, classes=["birds", "bugs"], shots=1)
    some.setup()
    assert some.facts.counts["train"] == 2


def test_star_bins_cover_all_points_once():
    bins = openclipart.STAR_BINS
    assert [first for first, _ in bins[1:]] == [last + 1 for _, last in bins[:-1]]
    names = [openclipart.star_bin(points) for points in range(bins[0][0], bins[-1][1] + 1)]
    assert names == sorted(names)
    assert len(set(names)) == len(bins)


def test_stars(archive):
    for points in range(5, 99):
        archive.append(Member(f"{CLIPART}shapes/stars/star_{points:02d}pt02step.png", png(points), None))
    archive.append(Member(f"{CLIPART}shapes/stars/estrella_01.png", png(1), None))
    data = OpenClipartStars(image_size=20)
    data.setup()
    records = [r for s in ("train", "val", "test") for r in data.records(s)]
    assert len(records) == 94
    for record in records:
        assert record.label == openclipart.star_bin(int(record.id[5:7]))
    assert next(iter(data.train_dataloader())).images.shape[1:] == (3, 20, 20)


def test_tuxpaint_leaves_drawings_out(archive):
    for number, prefixes in enumerate(tuxpaint.CLASSES.values()):
        archive += [Member(f"{STAMPS}{prefixes[-1]}{n}.png", png(100 * number + n), None) for n in range(4)]
    archive += [
        Member(f"{STAMPS}animals/birds/cartoon/drawn.png", png(9999), None),
        Member(f"{STAMPS}animals/birds/0.txt", b"a bird", None),
        Member(f"{STAMPS}symbols/a.png", png(9998), None),
    ]
    data = TuxPaintPhotos(image_size=16)
    data.setup()
    assert sum(data.facts.counts.values()) == 4 * len(tuxpaint.CLASSES)


# ---- the real archives


@pytest.mark.artifacts
@pytest.mark.parametrize(("make", "classes", "least"), [(OpenClipart, 19, 1200), (TuxPaintPhotos, 8, 220)])
def test_real_drawings(make, classes, least):
    data = make()
    data.prepare_data()
    data.setup()
    facts = data.facts
    total = sum(facts.counts.values())
    assert len(facts.class_names) == classes
    assert total >= least
    assert facts.counts["train"] / total == pytest.approx(0.5, abs=0.03)
    assert facts.counts["test"] / total == pytest.approx(0.35, abs=0.03)
    hashes = {}
    for split in ("train", "val", "test"):
        assert {record.label for record in data.records(split)} == set(facts.class_names)
        assert max(Counter(record.label for record in data.records(split)).values()) <= 120
        opened = [Image.open(record.path) for record in data.records(split)]
        hashes[split] = np.stack([imagehash.phash(image, hash_size=16).hash.ravel() for image in opened])
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        distance = (hashes[one][:, None] != hashes[other][None]).sum(axis=-1)
        assert distance.min() > 40


@pytest.mark.artifacts
def test_real_stars():
    data = OpenClipartStars()
    data.prepare_data()
    data.setup()
    assert sum(data.facts.counts.values()) == 1375
    counts = Counter(r.label for s in ("train", "val", "test") for r in data.records(s))
    assert max(counts.values()) < 1.1 * min(counts.values())
