"""The sets out of packages: the rules for their labels, and the figures of the real ones."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from common.errors import GraftError
from domains.protein.data import (
    AntimicrobialPeptides,
    EnzymeClass,
    SumoWindows,
    Superkingdom,
    UnlabelledPeptides,
    _prepared,
)
from domains.protein.data._records import Record
from domains.protein.data._uniprot import ENZYME_CLASSES, enzyme_class, parse_header, superkingdom
from domains.protein.data.base import ProteinData


@pytest.mark.parametrize(
    ("header", "parts"),
    [
        (
            "tr|M4KW32|M4KW32_BACIU Choline transporter (ATP-binding) OS=Bacillus subtilis XF-1 GN=opuBA PE=4 SV=1",
            ("M4KW32", "Choline transporter (ATP-binding)", "Bacillus subtilis XF-1"),
        ),
        ("sp|P1|P1_X Protein OS=Homo sapiens OX=9606 PE=1 SV=2", ("P1", "Protein", "Homo sapiens")),
        ("sp|P1|P1_X Protein OS=Homo sapiens", ("P1", "Protein", "Homo sapiens")),
        ("P1 some protein", None),
    ],
)
def test_headers_of_uniprot_are_read(header, parts):
    assert parse_header(header) == parts


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        # The EC numbers of these entries are public; the class is their first figure.
        ("L-lactate dehydrogenase", "oxidoreductase"),  # 1.1.1.27
        ("Superoxide dismutase [Cu-Zn]", "oxidoreductase"),  # 1.15.1.1
        ("Isocitrate dehydrogenase [NADP(+)] 2 (Fragment)", "oxidoreductase"),  # 1.1.1.42
        ("1-deoxy-D-xylulose 5-phosphate reductoisomerase", "oxidoreductase"),  # 1.1.1.267
        ("Putative serine/threonine-protein kinase wnk4", "transferase"),  # 2.7.11.1
        ("E3 ubiquitin-protein ligase RSP5", "transferase"),  # 2.3.2.26
        ("Ribosomal RNA small subunit methyltransferase A", "transferase"),  # 2.1.1.182
        ("Transaldolase", "transferase"),  # 2.2.1.2
        ("Ribonuclease HIII (Fragment)", "hydrolase"),  # 3.1.26.4
        ("Beta-glucosidase 13", "hydrolase"),  # 3.2.1.21
        ("Adenylosuccinate lyase", "lyase"),  # 4.3.2.2
        ("Orotidine 5'-phosphate decarboxylase", "lyase"),  # 4.1.1.23
        ("Phosphoenolpyruvate carboxylase", "lyase"),  # 4.1.1.31
        ("Phosphoglycerate mutase", "isomerase"),  # 5.4.2
        ("DNA topoisomerase 3", "isomerase"),  # 5.6.2.1
        ("Threonine--tRNA ligase, mitochondrial", "ligase"),  # 6.1.1.3
        ("Pyruvate carboxylase", "ligase"),  # 6.4.1.1
        ("Polygalacturonase inhibitor", None),
        ("ATP synthase subunit beta", None),
        ("Bifunctional kinase/phosphatase", None),
        ("Ribose-phosphate pyrophosphokinase", None),
        ("Uncharacterized protein", None),
        ("Cellulose synthase", None),
    ],
)
def test_enzyme_classes_are_read_off_names(name, wanted):
    assert enzyme_class(name) == wanted


@pytest.mark.parametrize(
    ("organism", "wanted"),
    [
        ("Homo sapiens", "eukaryota"),
        ("Human herpesvirus 1", "viruses"),
        ("Enterobacteria phage T4", "viruses"),
        ("Treponema phagedenis", "bacteria"),
        ("[Clostridium] difficile", "bacteria"),
        ("'Deinococcus soli' Cha et al. 2014", "bacteria"),
        ("Candidatus Rickettsia amblyommii", "bacteria"),
        ("uncultured Acidilobus sp. JCHS", "archaea"),
        ("uncultured archaeon", "archaea"),
        ("bacterium BRH_c32", "bacteria"),
        ("Methanocaldococcus jannaschii", "archaea"),
        ("endosymbiont of Acanthamoeba sp. UWC8", None),
        ("marine sediment metagenome", None),
        ("Nobody knows", None),
    ],
)
def test_superkingdoms_are_read_off_organisms(organism, wanted):
    assert superkingdom(organism) == wanted


def test_a_set_is_split_once_and_read_back(tmp_path, monkeypatch, draw):
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path))
    listed = [Record(f"p{n}", draw(n), "ab"[n % 2]) for n in range(40)]
    calls = []

    def read():
        calls.append(1)
        return [*listed, Record("copy", draw(0), "a")], {"unusable": 3}

    class Own(ProteinData):
        def _read(self):
            return _prepared.read_set("own-1", "modlamp", read, ("b", "a"))

    one, other = Own(), Own()
    one.setup()
    other.setup()
    assert calls == [1]
    assert one.facts == other.facts
    assert one.names == ("b", "a")
    assert one.facts.left_out == {"unusable": 3, "copies": 1}
    assert sorted(r.id for s in ("train", "val", "test") for r in one.records(s)) == sorted(r.id for r in listed)
    batch = next(iter(one.val_dataloader()))
    assert [one.names[t] for t in batch.target] == [one.records("val")[i].label for i in batch.index]


def test_a_published_split_is_kept_and_its_leak_named(tmp_path, monkeypatch, draw):
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path))
    listed = [Record(f"{'test' if n % 3 == 0 else 'train'}/{n}", draw(n), "ab"[n % 2]) for n in range(40)]

    def stated(record):
        return "val" if record.id[-1] == "1" else record.id.split("/")[0]

    class Own(ProteinData):
        def _read(self):
            return _prepared.read_set("own-2", "modlamp", lambda: (listed, {}), ("a", "b"), stated=stated)

    data = Own()
    data.setup()
    assert {r.id.split("/")[0] for r in data.records("test")} == {"test"}
    assert {r.id[-1] for r in data.records("val")} == {"1"}
    assert set(data.facts.leak) == {"random", "published"}


def test_an_unknown_split_of_windows_is_refused():
    with pytest.raises(GraftError, match=r"Unknown split 'official'.*protein, published"):
        SumoWindows(split="official")


@pytest.mark.artifacts
def test_the_published_split_of_sumo_sites_leaks_and_the_one_by_protein_does_not():
    leaks = {}
    protein = lambda record: record.id.split("/")[1].rpartition("_")[0]  # noqa: E731
    for split in ("published", "protein"):
        data = SumoWindows(split=split)
        data.setup()
        sides = {side: {protein(r) for r in data.records(side)} for side in ("train", "val", "test")}
        held = [r for r in data.records("test") if protein(r) in sides["train"]]
        shared = len(held) / data.facts.counts["test"]
        assert shared > 0.9 if split == "published" else shared == 0
        assert not sides["train"] & sides["val"]
        assert all(r.sequence[10] == "K" for r in data.records("test"))
        leaks |= data.facts.leak
    assert leaks["published"] > leaks["similarity"] + 0.05


def jaccard(one, other):
    a, b = ({s[n : n + 3] for n in range(len(s) - 2)} for s in (one, other))
    return len(a & b) / len(a | b)


@pytest.mark.artifacts
def test_antimicrobial_peptides_are_split_by_similarity():
    data = AntimicrobialPeptides()
    data.setup()
    facts = data.facts
    records = {split: data.records(split) for split in ("train", "val", "test")}
    kept = sum(map(len, records.values()))
    assert kept + sum(facts.left_out.values()) == 5200
    assert len({r.sequence for rs in records.values() for r in rs}) == kept
    for split, share in (("train", 0.5), ("val", 0.15), ("test", 0.35)):
        assert facts.counts[split] / kept == pytest.approx(share, abs=0.01)
        assert Counter(r.label for r in records[split])["antimicrobial"] / len(records[split]) > 0.5
    sample = [(split, r.sequence) for split, rs in records.items() for r in rs[::12]]
    for (one, first), (other, second) in itertools.combinations(sample, 2):
        assert one == other or jaccard(first, second) < 0.2
    # A random split flatters: the nearest neighbour alone gains more than ten points.
    assert facts.leak["random"] > facts.leak["similarity"] + 0.1


@pytest.mark.artifacts
def test_unlabelled_peptides_stand_in_the_same_splits():
    labelled, bare = AntimicrobialPeptides(), UnlabelledPeptides()
    for data in (labelled, bare):
        data.setup()
    assert (bare.facts.kind, bare.names) == ("unlabelled", ())
    for split in ("train", "val", "test"):
        pairs = zip(labelled.records(split), bare.records(split), strict=True)
        assert all((one.id, one.sequence) == (other.id, other.sequence) and not other.label for one, other in pairs)


@pytest.mark.artifacts
@pytest.mark.parametrize("make", [EnzymeClass, Superkingdom])
def test_uniprot_sets_have_every_class_on_every_side(make):
    data = make()
    data.setup()
    for split in ("train", "val", "test"):
        assert {r.label for r in data.records(split)} == set(data.names)
    assert data.facts.counts["long"] > 0
    assert data.facts.leak["random"] > data.facts.leak["similarity"] + 0.1
    assert make is Superkingdom or data.names == ENZYME_CLASSES
