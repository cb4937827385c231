"""Features of the user's proteins: `embed` and the verb `graft embed`."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors import safe_open

from common.cli import run
from common.errors import GraftError
from common.exchange import export
from common.methods import LoRA
from common.run import fit, read_record
from domains.protein import embed as module
from domains.protein._alphabet import encode
from domains.protein.backbones import build, residue_features
from domains.protein.embed import embed
from domains.protein.tasks import SequenceClassification
from tests.domains.protein.conftest import DOMAINS, ESM, Toy, data_of, task_of

pytestmark = pytest.mark.usefixtures("tiny")

PROTEINS = {"a": "MKTAYIAKQRQISFVK", "b": "ACDW", "c": "MKXBZUOLLA"}


@pytest.fixture
def fasta(tmp_path):
    path = tmp_path / "mine.fasta"
    path.write_text("".join(f">{name}\n{sequence}\n" for name, sequence in PROTEINS.items()))
    return path


@pytest.fixture
def bare(monkeypatch):
    """The tiny backbone with random weights in the place of pretrained ones."""
    torch.manual_seed(0)
    built = build(ESM, pretrained=False)
    monkeypatch.setattr(module, "build", lambda name: built)
    return built


def features(built, model, sequence):
    residues = torch.tensor([encode(sequence)])
    with torch.no_grad():
        return residue_features(built, model, residues, torch.ones_like(residues, dtype=torch.bool))[0]


def read(path):
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()


@pytest.mark.parametrize("residues", [False, True])
def test_a_parquet_file_says_the_same(bare, fasta, tmp_path, residues):
    parquet = pytest.importorskip("pyarrow.parquet")
    embed(ESM, [fasta], tmp_path / "e.safetensors", residues=residues)
    tensors, _ = read(tmp_path / "e.safetensors")
    embed(ESM, [fasta], tmp_path / "e.parquet", residues=residues)
    table = parquet.read_table(tmp_path / "e.parquet")
    found = torch.tensor(table["embedding"].to_pylist())
    lengths = [len(sequence) for sequence in PROTEINS.values()]
    if residues:
        assert torch.equal(found, torch.cat([tensors[str(n)] for n in range(3)]))
        assert table["id"].to_pylist() == [name for name, n in zip(PROTEINS, lengths, strict=True) for _ in range(n)]
        assert table["position"].to_pylist() == [place for n in lengths for place in range(1, n + 1)]
    else:
        assert torch.equal(found, tensors["embeddings"])
        assert table["id"].to_pylist() == list(PROTEINS)
    assert table.schema.metadata[b"pooling"] == (b"none" if residues else b"mean")


def test_parquet_without_pyarrow_is_refused_and_nothing_is_written(bare, fasta, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(GraftError, match=r"e\.parquet needs pyarrow, which is not installed.*graft\[parquet\]"):
        embed(ESM, [fasta], tmp_path / "e.parquet")
    assert not (tmp_path / "e.parquet").exists()


def test_a_protein_is_the_mean_of_its_residues(bare, fasta, tmp_path):
    out = tmp_path / "new" / "e.safetensors"
    assert embed(ESM, [fasta], out) == f"{out}: 3 proteins, width 16"
    tensors, metadata = read(out)
    assert json.loads(metadata["ids"]) == list(PROTEINS)
    assert (metadata["backbone"], metadata["pooling"]) == (ESM, "mean")
    expected = torch.stack([features(bare, bare.model, sequence).mean(dim=0) for sequence in PROTEINS.values()])
    torch.testing.assert_close(tensors["embeddings"], expected, atol=1e-5, rtol=1e-4)


def test_residues_are_kept_where_asked_for(bare, fasta, tmp_path):
    embed(ESM, [fasta], tmp_path / "e", residues=True)
    tensors, _ = read(tmp_path / "e")
    for number, sequence in enumerate(PROTEINS.values()):
        torch.testing.assert_close(tensors[str(number)], features(bare, bare.model, sequence), atol=1e-5, rtol=1e-4)


def test_an_adapter_gives_its_own_features_by_its_own_rule(fasta, tmp_path):
    for long, cut in (("truncate", [slice(0, 9)]), ("window", [slice(0, 9), slice(9, 18)])):
        task = task_of(LoRA(on=["all"], rank=2, init="gaussian"), data_of(max_length=9, long=long))
        embed(task, [fasta], tmp_path / "e", residues=True)
        expected = torch.cat([features(task._built, task.backbone, PROTEINS["a"][part]) for part in cut])
        torch.testing.assert_close(read(tmp_path / "e")[0]["0"], expected, atol=1e-5, rtol=1e-4)


def test_what_cannot_be_embedded_is_refused(bare, fasta, tmp_path, monkeypatch):
    other = tmp_path / "other.fasta"
    other.write_text(">b\nMKT\n>bad\nM?\n")
    with pytest.raises(GraftError, match=r"other\.fasta, 'bad': '\?' at position 2 is no amino acid"):
        embed(ESM, [other], tmp_path / "e")
    with pytest.raises(GraftError, match=r"'b' stands in .*mine\.fasta and in .*other\.fasta"):
        embed(ESM, [fasta, other], tmp_path / "e", skip_bad=True)
    assert embed(ESM, [other], tmp_path / "e", skip_bad=True).endswith("1 proteins, width 16, 1 unusable ones left out")
    with pytest.raises(GraftError, match="is a folder; give the name of the file"):
        embed(ESM, [fasta], tmp_path)
    short = dataclasses.replace(bare, max_length=10)
    monkeypatch.setattr(module, "build", lambda name: short)
    with pytest.raises(GraftError, match="'a': 16 residues are more than the 10 allowed"):
        embed(ESM, [fasta], tmp_path / "e2")
    other.write_text(">bad\nM?\n")
    with pytest.raises(GraftError, match=r"can be used \(1 were left out\)"):
        embed(ESM, [other], tmp_path / "e2", skip_bad=True)


def command(capsys, *argv):
    capsys.readouterr()
    code = run([str(argument) for argument in argv], DOMAINS)
    return code, *capsys.readouterr()


def test_the_verb_takes_an_adapter_or_a_backbone(bare, fasta, tmp_path, capsys, monkeypatch):
    spec = LoRA(on=["all"], rank=2)
    fit(SequenceClassification(ESM, spec, pretrained=False), Toy(), tmp_path / "run", accelerator="cpu", max_epochs=1)
    export(tmp_path / "run", tmp_path / "adapter", read_record(tmp_path / "run"), DOMAINS)
    out = tmp_path / "e"
    assert command(capsys, "embed", "--adapter", tmp_path / "adapter", "--out", out, fasta) == (
        *(0, f"{out}: 3 proteins, width 16\n", ""),
    )
    first = read(out)[0]["embeddings"]
    monkeypatch.chdir(tmp_path)
    code, printed, _ = command(capsys, "embed", "--backbone", ESM, "--residues", fasta)
    assert (code, printed) == (0, "embeddings.safetensors: 3 proteins, width 16\n")
    assert set(read(tmp_path / "embeddings.safetensors")[0]) == {"0", "1", "2"}
    assert command(capsys, "embed", "--backbone", ESM, "--domain", "protein", "--out", out, fasta)[0] == 0
    assert not torch.equal(first, read(out)[0]["embeddings"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--backbone", "x", "--domain", "protien"), "Unknown domain 'protien'. Did you mean 'protein'?"),
        (("--backbone", "x", "--domain", "vision"), "Domain 'vision' has no embed."),
        (("--adapter", "x", "--domain", "vision"), "An adapter knows its domain. Leave --domain out."),
        (("--adapter", "/nowhere"), "/nowhere is not an adapter folder"),
        ((), "One of the arguments --adapter --backbone is required."),
        (("--adapter", "x", "--backbone", "y"), "Argument --backbone: not allowed with argument --adapter."),
    ],
)
def test_a_mistake_is_one_line(capsys, fasta, argv, message):
    code, _, err = command(capsys, "embed", *argv, fasta)
    assert code == 2
    assert len(err.splitlines()) == 1
    assert err.startswith(f"graft: {message}")


def test_without_a_domain_that_embeds_one_has_to_be_named(capsys, fasta):
    assert run(["embed", "--backbone", "x", str(fasta)], {}) == 2
    assert "Say which domain 'x' is of with --domain: none embeds." in capsys.readouterr().err
