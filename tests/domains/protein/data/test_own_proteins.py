"""The user's own proteins: read rightly, or refused with what to do."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch

from common.errors import GraftError
from domains.protein._alphabet import PAD, encode
from domains.protein.data import (
    FLIP,
    IGNORE,
    PairCSV,
    ProteinCSV,
    ProteinFASTA,
    ResidueCSV,
    Unlabelled,
    sequence_loader,
)

SPLITS = ("train", "val", "test")


def ready(data):
    data.setup()
    return data


def all_records(data):
    return {split: data.records(split) for split in SPLITS}


@pytest.fixture
def classes(draw, table):
    """60 unrelated proteins in two classes."""

    def make(change=lambda rows: rows, header="sequence,label", **kwargs):
        rows = [[draw(n, 30 + n % 20), "ab"[n % 2]] for n in range(60)]
        return ProteinCSV(str(table(header, change(rows))), **kwargs)

    return make


def replaced(row, column, value):
    def change(rows):
        rows[row][column] = value
        return rows

    return change


def test_a_table_of_classes_gives_batches_that_match_its_rows(classes):
    data = ready(classes(tokens_per_batch=300))
    facts = data.facts
    assert (facts.kind, facts.class_names, facts.name) == ("classes", ("a", "b"), "ProteinCSV:own")
    assert sum(facts.counts[split] for split in SPLITS) == 60
    assert set(facts.leak) == {"random", "similarity"}
    seen = []
    for loader, split in ((data.train_dataloader(), "train"), (data.test_dataloader(), "test")):
        records = data.records(split)
        for batch in loader:
            assert batch.residues.numel() <= 300
            assert torch.equal(batch.mask, batch.residues != PAD)
            assert batch.second.shape == (len(batch.index), 0)
            for residues, mask, target, index in zip(*batch[:4], strict=True):
                record = records[int(index)]
                assert residues[mask].tolist() == encode(record.sequence)
                assert facts.class_names[int(target)] == record.label
                seen.append(record.id)
    assert sorted(seen) == sorted(r.id for split in ("train", "test") for r in data.records(split))


def test_splits_depend_on_the_sequences_alone(classes):
    one = ready(classes(seed=0))
    other = ready(classes(lambda rows: rows[::-1], seed=3))
    for split in SPLITS:
        assert {r.sequence for r in one.records(split)} == {r.sequence for r in other.records(split)}
    assert ready(classes()).facts.digest == one.facts.digest


def test_given_splits_are_kept_and_missing_ones_cut_out_of_train(classes):
    def change(rows):
        return [[*row, "test" if n < 12 else "train", f"g{n // 3}"] for n, row in enumerate(rows)]

    data = ready(classes(change, "sequence,label,split,group"))
    assert {r.id for r in data.records("test")} == {f"line {n + 2}" for n in range(12)}
    assert 0 < data.facts.counts["val"] < 20
    groups = {split: {r.group for r in records} for split, records in all_records(data).items()}
    assert not groups["train"] & groups["val"]
    assert set(data.facts.leak) == {"random", "given"}


def test_values_have_a_mean_and_a_deviation(draw, table):
    rows = [[draw(n), n / 7] for n in range(30)]
    data = ready(ProteinCSV(str(table("sequence,label", rows)), kind="value"))
    values = torch.tensor([float(r.label) for r in data.records("train")])
    assert data.facts.mean == pytest.approx(float(values.mean()), rel=1e-5)
    assert data.facts.std == pytest.approx(float(values.std(correction=0)), rel=1e-5)
    batch = next(iter(data.train_dataloader()))
    wanted = [float(data.records("train")[i].label) for i in batch.index]
    assert batch.target.dtype == torch.float32
    assert batch.target.tolist() == pytest.approx(wanted)


def test_labels_that_go_together_are_zeros_and_ones(draw, table):
    rows = [[draw(n), ("x", "x;y", "", "z;y")[n % 4]] for n in range(40)]
    data = ready(ProteinCSV(str(table("sequence,label", rows)), kind="labels"))
    assert data.names == ("x", "y", "z")
    batch = next(iter(data.train_dataloader()))
    for target, index in zip(batch.target, batch.index, strict=True):
        label = data.records("train")[int(index)].label
        assert target.tolist() == [float(name in label.split(";")) for name in "xyz"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (replaced(3, 0, "MKV1L"), r"own\.csv, line 5: '1' at position 4 is no amino acid"),
        (replaced(3, 0, "mk-v"), r"line 5: '-' at position 3 .*gap"),
        (replaced(3, 0, ""), "line 5: The sequence is empty"),
        (replaced(3, 1, ""), "line 5: the label is missing"),
    ],
)
def test_unusable_rows_are_named_or_skipped_and_counted(classes, change, named):
    with pytest.raises(GraftError, match=named):
        ready(classes(change))
    data = ready(classes(change, skip_bad=True))
    assert data.facts.skipped == 1
    assert sum(map(len, all_records(data).values())) == 59


def test_further_unusable_rows_are_counted_in_the_error(classes):
    with pytest.raises(GraftError, match=r"line 5: .*\(1 more cannot be used either"):
        ready(classes(lambda rows: replaced(9, 0, "M?")(replaced(3, 0, "M!")(rows))))


def test_an_unknown_split_and_an_id_given_twice_are_refused(classes):
    with pytest.raises(GraftError, match=r"line 2: Unknown split 'tset'\. Did you mean 'test'"):
        ready(classes(lambda rows: [[*row, "tset"] for row in rows], "sequence,label,split"))
    with pytest.raises(GraftError, match="line 3: the id 'p' stands in line 2 already"):
        ready(classes(lambda rows: [[*row, "p"] for row in rows], "sequence,label,id"))


def test_values_that_are_no_numbers_are_refused(draw, table):
    for word in ("high", "nan"):
        path = table("sequence,label", [[draw(1), 1.5], [draw(2), word]])
        with pytest.raises(GraftError, match=f"line 3: the label '{word}' is no number"):
            ready(ProteinCSV(str(path), kind="value"))


def test_copies_and_contradictions_are_warned_of_and_counted(classes, draw):
    extra = [[draw(0, 30), "a"], [draw(1, 31), "a"]]
    data = classes(lambda rows: [*rows, *extra])
    with pytest.warns(UserWarning, match="1 copies, 2 contradictory labels"):
        data.setup()
    assert data.facts.left_out == {"copies": 1, "contradictory labels": 2}


def test_dna_is_warned_of(classes):
    data = classes(lambda rows: replaced(0, 0, "ACGTTGCA" * 5)(rows))
    with pytest.warns(UserWarning, match="1 of 60 sequences hold only the letters of DNA"):
        data.setup()


def test_variants_of_one_protein_need_another_way_to_split(draw, table):
    parent = draw(0, 60)
    rows = [[parent[:n] + "W" + parent[n + 1 :], n] for n in range(40) if parent[n] != "W"]
    path = str(table("sequence,label", rows))
    with pytest.raises(GraftError, match="Too few groups of similar sequences"):
        ready(ProteinCSV(path, kind="value"))
    data = ready(ProteinCSV(path, kind="value", clusters="none"))
    assert set(data.facts.leak) == {"random"}


LONG = 40_000


@pytest.mark.parametrize("rule", ["truncate", "window", "refuse"])
def test_a_protein_of_40000_residues_goes_by_the_long_rule(classes, draw, rule):
    giant = draw(7, LONG)

    def change(rows):
        return [*([*row, "train" if n % 3 else ("val", "test")[n % 2]] for n, row in enumerate(rows)),
                [giant, "a", "train"], [giant[::-1], "b", "test"]]  # fmt: skip

    data = classes(change, "sequence,label,split", long=rule, max_length=1022)
    if rule == "refuse":
        with pytest.raises(
            GraftError, match=r"2 protein\(s\) are longer than max_length 1022, the longest 'line 62' with"
        ):
            data.setup()
        return
    data.setup()
    assert data.facts.counts["long"] == 2

    def giants(loader):
        return [
            "".join(f"{n:02d}" for n in b.residues[i])
            for b in loader
            for i in range(len(b.index))
            if b.mask[i].sum() == 1022
        ]

    whole = {side: "".join(f"{n:02d}" for n in encode(s)) for side, s in (("train", giant), ("test", giant[::-1]))}
    loader = data.train_dataloader()
    epochs = []
    for epoch in (0, 1, 0):
        loader.batch_sampler.set_epoch(epoch)
        epochs.append(giants(loader)[0])
    assert all(stretch in whole["train"] for stretch in epochs)
    assert epochs[0] == epochs[2]
    assert (epochs[0] == epochs[1]) == (rule == "truncate")
    start = (LONG - 1022) // 2 if rule == "window" else 0
    assert giants(data.test_dataloader()) == [whole["test"][2 * start : 2 * (start + 1022)]]


def test_a_budget_below_the_longest_protein_is_refused(classes):
    data = ready(classes(tokens_per_batch=40))
    with pytest.raises(GraftError, match="tokens_per_batch is 40, the longest example has"):
        data.train_dataloader()


def test_fasta_and_labels_are_joined_by_id(tmp_path, draw, table):
    fasta = tmp_path / "own.fasta"
    fasta.write_text("".join(f">p{n} something\n{draw(n)}\n" for n in range(40)))
    labels = [[f"p{n}", "ab"[n % 2]] for n in range(40)]
    data = ready(ProteinFASTA(str(fasta), str(table("id,label", labels))))
    found = {r.id: r for records in all_records(data).values() for r in records}
    assert {(f"p{n}", draw(n), "ab"[n % 2]) for n in range(40)} == {(r.id, r.sequence, r.label) for r in found.values()}

    with pytest.raises(GraftError, match=r"own\.fasta, line 79: 'p39' has no label in .*own\.csv; add a line"):
        ready(ProteinFASTA(str(fasta), str(table("id,label", labels[:-1]))))
    with pytest.raises(GraftError, match=r"line 42: there is no entry 'p4O' in .*own\.fasta. Did you mean 'p40?'"):
        ready(ProteinFASTA(str(fasta), str(table("id,label", [*labels, ["p4O", "a"]]))))
    with pytest.raises(GraftError, match="line 42: the id 'p0' stands in line 2 already"):
        ready(ProteinFASTA(str(fasta), str(table("id,label", [*labels, ["p0", "a"]]))))
    bad = ProteinFASTA(str(fasta), str(table("id,label", [*labels[:-1], ["nobody", "a"]])), skip_bad=True)
    assert ready(bad).facts.skipped == 2


@pytest.fixture
def residues(draw, table):
    rows = [[draw(n, 20 + n), ("HEC." * 20)[: 20 + n]] for n in range(30)]
    return lambda change=lambda rows: rows, **kwargs: ResidueCSV(str(table("sequence,labels", change(rows))), **kwargs)


def test_residue_labels_follow_their_residues(residues):
    data = ready(residues(tokens_per_batch=200))
    assert (data.facts.kind, data.names) == ("residues", ("C", "E", "H"))
    for batch in data.train_dataloader():
        assert batch.target.shape == batch.residues.shape
        assert (batch.target[~batch.mask] == IGNORE).all()
        for target, mask, index in zip(batch.target, batch.mask, batch.index, strict=True):
            wanted = [{".": IGNORE, "C": 0, "E": 1, "H": 2}[c] for c in data.records("train")[int(index)].label]
            assert target[mask].tolist() == wanted


def test_windows_show_every_residue_of_a_long_protein(residues):
    data = ready(residues(max_length=16, long="window"))
    for loader, split in ((data.train_dataloader(), "train"), (data.test_dataloader(), "test")):
        parts = {}
        for batch in loader:
            for row, mask, target, index in zip(batch.residues, batch.mask, batch.target, batch.index, strict=True):
                assert mask.sum() <= 16
                parts.setdefault(int(index), []).append((row[mask].tolist(), target[mask].tolist()))
        for index, record in enumerate(data.records(split)):
            code = encode(record.sequence)
            wanted = [code[n : n + 16] for n in range(0, len(code), 16)]
            assert sorted(residues for residues, _ in parts[index]) == sorted(wanted)
            assert sum(len(target) for _, target in parts[index]) == len(record.label)


def test_truncation_cuts_residues_and_labels_alike(residues):
    data = ready(residues(max_length=16))
    assert {batch.target.shape[1] for batch in data.val_dataloader()} == {16}


def test_residue_labels_of_another_length_are_refused(residues):
    with pytest.raises(GraftError, match="line 2: there are 3 labels for 20 residues"):
        ready(residues(replaced(0, 1, "HEC")))

    def stop(rows):
        return [[rows[1][0] + "*", rows[1][1] + "C"], *rows[2:]]

    record = next(r for records in all_records(ready(residues(stop))).values() for r in records if r.id == "line 2")
    assert len(record.sequence) == len(record.label) == 21


@pytest.fixture
def pairs(draw, table):
    """All pairs of 16 proteins."""
    chosen = list(itertools.combinations(range(16), 2))
    rows = [[draw(a, 30), draw(b, 50), "01"[(a * b) % 2]] for a, b in chosen]
    return lambda rows=rows, header="a,b,label", **kwargs: PairCSV(str(table(header, rows)), **kwargs), rows


def test_no_protein_of_a_pair_stands_in_two_splits(pairs):
    data = ready(pairs[0]())
    sides = [{s for r in records for s in (r.sequence, r.second)} for records in all_records(data).values()]
    assert all(not one & other for one, other in itertools.combinations(sides, 2))
    used = sum(map(len, all_records(data).values()))
    assert data.facts.left_out["pairs across splits"] == 120 - used
    batch = next(iter(data.train_dataloader()))
    for first, second, index in zip(batch.residues, batch.second, batch.index, strict=True):
        record = data.records("train")[int(index)]
        assert first[first != PAD].tolist() == encode(record.sequence)
        assert second[second != PAD].tolist() == encode(record.second)


def test_given_pairs_are_kept_and_proteins_seen_in_training_are_warned_of(pairs):
    make, rows = pairs
    data = make([[*row, SPLITS[n % 3]] for n, row in enumerate(rows)], "a,b,label,split")
    seen = {protein for row in rows[0::3] for protein in row[:2]}
    known = sum(a in seen or b in seen for a, b, _ in rows[2::3])
    with pytest.warns(UserWarning, match=f"{known} of 40 test pairs hold a protein that training shows"):
        data.setup()
    assert data.facts.counts["test"] == 40


def test_a_pair_without_a_partner_is_refused(pairs, draw):
    with pytest.raises(GraftError, match="line 2: the partner b is empty"):
        ready(pairs[0]([[draw(1), "", "1"]]))
    with pytest.raises(GraftError, match="line 2: '5' at position 2 is no amino acid"):
        ready(pairs[0]([[draw(1), "M5", "1"]]))


def test_the_layout_of_flip_is_read(draw, table):
    rows = [[draw(n), n / 3, "test" if n % 4 == 0 else "train", "True" if n % 4 == 1 else ""] for n in range(40)]
    data = ready(FLIP(str(table("sequence,target,set,validation", rows))))
    assert {split: data.facts.counts[split] for split in SPLITS} == {"train": 20, "val": 10, "test": 10}
    assert {r.id for r in data.records("val")} == {f"line {n + 2}" for n in range(1, 40, 4)}
    assert set(data.facts.leak) == {"random", "given"}
    without = ready(FLIP(str(table("sequence,target,set", [row[:3] for row in rows]))))
    assert {split: without.facts.counts[split] for split in SPLITS} == {"train": 27, "val": 3, "test": 10}
    with pytest.raises(GraftError, match="line 2: the set is missing"):
        ready(FLIP(str(table("sequence,target,set", [[draw(0), 1, ""]]))))


def test_proteins_without_labels(tmp_path, draw):
    fasta = tmp_path / "many.fasta"
    fasta.write_text("".join(f">p{n}\n{draw(n)}\n" for n in range(30)))
    data = ready(Unlabelled(str(fasta)))
    assert (data.facts.kind, data.names, dict(data.facts.leak)) == ("unlabelled", (), {})
    batch = next(iter(data.train_dataloader()))
    assert batch.target.shape == (len(batch.index), 0)
    fasta.write_text(">p1\nMK#V\n")
    with pytest.raises(GraftError, match=r"many\.fasta, line 1 \('p1'\): '#' at position 3"):
        ready(Unlabelled(str(fasta)))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"kind": "class"}, "Unknown kind of label 'class'. Did you mean 'classes'"),
        ({"long": "cut"}, "Unknown rule for long proteins 'cut'"),
        ({"clusters": "mmseqs"}, "Did you mean 'mmseqs2'"),
        (
            {"max_length": 0, "tokens_per_batch": 0},
            r"max_length is 0 \(at least 1\); tokens_per_batch is 0 \(at least 1\)",
        ),
        ({"val_fraction": 0.6, "test_fraction": 0.5}, "sum below 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings, named):
    with pytest.raises(GraftError, match=named):
        ProteinCSV("own.csv", **settings)


def test_shots_take_as_many_of_each_class(classes):
    counts = [sum(r.label == name for r in ready(classes(shots=5)).records("train")) for name in "ab"]
    assert counts == [5, 5]
    one, other = (ready(classes(shots=5, shots_draw=draw)) for draw in (0, 1))
    assert one.records("train") != other.records("train")
    assert one.records("test") == other.records("test")
    with pytest.raises(GraftError, match="shots is 100, more than the training records of 'a'"):
        ready(classes(shots=100))


def test_a_share_is_of_each_class_and_splits_share_no_protein(classes):
    whole, half = ready(classes()), ready(classes(share=0.5))
    for name in "ab":
        counts = [sum(record.label == name for record in data.records("train")) for data in (whole, half)]
        assert counts[1] == round(counts[0] / 2)
    assert half.records("test") == whole.records("test")
    assert set(half.describe_splits()["shared"].values()) == {0}


def test_one_class_or_an_untrained_one_is_refused(classes):
    with pytest.raises(GraftError, match="needs at least 2 classes to tell apart and has a"):
        ready(classes(lambda rows: [[row[0], "a"] for row in rows]))
    with pytest.raises(GraftError, match="no training protein with label 'c'"):
        ready(
            classes(
                lambda rows: [
                    [s, "c", "test"] if n == 1 else [s, label, SPLITS[n % 3]] for n, (s, label) in enumerate(rows)
                ],
                "sequence,label,split",
            )
        )


def test_workers_and_resuming_change_nothing(classes):
    data = ready(classes(tokens_per_batch=300, max_length=25, long="window"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parallel = ready(classes(tokens_per_batch=300, max_length=25, long="window", num_workers=2))
    one, other = ([b.residues.tolist() for b in d.train_dataloader()] for d in (data, parallel))
    assert one == other
    first, second = data.train_dataloader(), data.train_dataloader()
    batches = iter(first)
    next(batches)
    second.load_state_dict(first.state_dict())
    assert [b.residues.tolist() for b in second] == one[1:]


def test_sequences_without_a_set_are_batched_with_their_positions(draw):
    sequences = [draw(n, 60 - n) for n in range(30)]
    seen = {}
    for batch in sequence_loader(sequences, 200, max_length=50):
        assert batch.residues.numel() <= 200
        for residues, mask, index in zip(batch.residues, batch.mask, batch.index, strict=True):
            seen[int(index)] = residues[mask].tolist()
    assert seen == {n: encode(sequence)[:50] for n, sequence in enumerate(sequences)}
    with pytest.raises(GraftError, match=r"10 protein\(s\) are longer than max_length 50, the longest 'sequence 1'"):
        sequence_loader(sequences, 200, max_length=50, long="refuse")
