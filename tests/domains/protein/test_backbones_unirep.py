"""UniRep: the formula of its step, its published weights, padding, segments, and what it says of wrong files."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from common.errors import GraftError
from domains.protein._alphabet import ALPHABET, encode
from domains.protein.backbones import MASK, _unirep, build, lm_features, lm_logits, residue_features
from domains.protein.backbones._unirep import MLSTM, SEGMENT, Size, UniRep, read_unirep
from tests.domains.protein.nets import proteins, tiny

LETTERS = {letter: number for number, letter in enumerate("MRHKDESTNQCUGPAVIFYWLOX", start=1)}
START = 24
UBIQUITIN = "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG"
LYSOZYME = (
    "KVFGRCELAAAMKRHGLDNYRGYSLGNWVCAAKFESNFNTQATNRNTDGSTDYGILQINSRWWCNDGRTPGSRNLCNIPCSAL"
    "LSSDITASVNCAKKIVSDGNGMNAWVAWRNRCKGTDVQAWIRGCRL"
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Compute in one thread; toy tensors are too small to share out."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def published(width=6, layers=2, seed=0):
    """Random weights in the layout in which they are published."""
    rng = np.random.default_rng(seed)
    arrays = {
        "embedding": rng.normal(size=(26, 10)),
        "dense.w": rng.normal(size=(width, 25)),
        "dense.b": rng.normal(size=25),
    }
    for layer in range(layers):
        inputs = width if layer else 10
        shapes = {"wx": (inputs, 4 * width), "wh": (width, 4 * width), "wmx": (inputs, width), "wmh": (width, width)}
        for name, shape in shapes.items():
            arrays[f"mlstm.{layer}.{name}"] = rng.normal(size=shape)
            arrays[f"mlstm.{layer}.g{name[1:]}"] = rng.normal(size=shape[1])
        arrays[f"mlstm.{layer}.b"] = rng.normal(size=4 * width)
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def reference(arrays, sequence):
    """Hidden states (T, width) in float64, one step after the other, as Alley et al. state the step."""
    arrays = {name: array.astype(np.float64) for name, array in arrays.items()}

    def weight(layer, name):
        w = arrays[f"mlstm.{layer}.w{name}"]
        return w / np.sqrt((w**2).sum(axis=0)) * arrays[f"mlstm.{layer}.g{name}"]

    def sigmoid(z):
        return 1 / (1 + np.exp(-z))

    xs = [arrays["embedding"][index] for index in (START, *(LETTERS[letter] for letter in sequence))]
    for layer in range(sum(name.endswith(".b") and name.startswith("mlstm") for name in arrays)):
        h = c = np.zeros(arrays["dense.w"].shape[0])
        out = []
        for x in xs:
            m = (x @ weight(layer, "mx")) * (h @ weight(layer, "mh"))
            i, f, o, u = np.split(x @ weight(layer, "x") + m @ weight(layer, "h") + arrays[f"mlstm.{layer}.b"], 4)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(u)
            h = sigmoid(o) * np.tanh(c)
            out.append(h)
        xs = out
    return np.stack(xs)


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A size of two layers of 6 units by the name of a published one, and its file."""
    sizes = {"unirep-256": Size(width=6, layers=2)}
    monkeypatch.setattr(_unirep, "SIZES", sizes)
    monkeypatch.setattr("domains.protein.backbones.SIZES", sizes)
    np.savez(tmp_path / "model_weights.npz", **published())
    return tmp_path / "model_weights.npz"


def test_features_and_logits_are_those_of_the_published_step(small):
    built = build("unirep-256", weights=str(small))
    sequence = "MWLXUOKRHC"
    residues = torch.tensor([encode(sequence)])
    mask = torch.ones_like(residues, dtype=torch.bool)
    states = reference(published(), sequence)
    with torch.no_grad():
        features = residue_features(built, built.model, residues, mask)
        logits = lm_logits(built, built.model, residues, mask)
    np.testing.assert_allclose(features[0].numpy(), states[1:], atol=1e-5)
    every = states[:-1] @ published()["dense.w"] + published()["dense.b"]  # of the next symbol; column 0 is id 1
    for letter, column in LETTERS.items():
        np.testing.assert_allclose(logits[0, :, ALPHABET.index(letter)].numpy(), every[:, column - 1], atol=1e-4)


def test_letters_without_a_symbol_are_read_as_x_and_never_predicted(small):
    built = build("unirep-256", weights=str(small))
    assert set(built.tokenizer.missing) == set("ZBJ")
    with torch.no_grad():
        residues = torch.tensor([encode(sequence) for sequence in ("MZK", "MBK", "MJK", "MXK")])
        features = residue_features(built, built.model, residues, residues >= 0)
        logits = lm_logits(built, built.model, residues, residues >= 0)
    assert torch.equal(features, features[3:].expand_as(features))
    chance = logits.softmax(-1)
    assert not chance[..., [ALPHABET.index(letter) for letter in "ZBJ"]].any()
    assert (chance[..., ALPHABET.index("X")] > 0).all()


def test_a_protein_has_the_same_features_alone_and_in_a_padded_batch():
    built = tiny("unirep")
    residues, mask = proteins((2 * SEGMENT + 7, SEGMENT, 3))
    with torch.no_grad():
        batch = residue_features(built, built.model, residues, mask)
        for row, length in enumerate(mask.sum(1).tolist()):
            alone = residue_features(built, built.model, residues[row : row + 1, :length], mask[row : row + 1, :length])
            torch.testing.assert_close(batch[row, :length], alone[0], atol=1e-6, rtol=1e-6)
            assert not batch[row, length:].any()


def test_the_state_stays_as_it_is_at_padding():
    residues, mask = proteins((9, 4))
    ids, attention = tiny("unirep").tokenizer.encode(residues, mask)
    with torch.no_grad():
        states = tiny("unirep").model(ids, attention)
    assert torch.equal(states[1, 5:], states[1, 4].expand_as(states[1, 5:]))


def test_what_comes_later_changes_nothing_before():
    built = tiny("unirep")
    residues, mask = proteins((8, 8))
    changed = residues.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 20
    with torch.no_grad():
        before, after = (lm_logits(built, built.model, r, mask) for r in (residues, changed))
        states = lm_features(built, built.model, residues, mask)[:, 1:]
        assert torch.equal(states, residue_features(built, built.model, residues, mask)[:, :-1])
    assert torch.equal(before[:, :6], after[:, :6])
    assert not torch.equal(before[:, 6:], after[:, 6:])


def test_gradients_are_the_same_whole_or_recomputed():
    residues, mask = proteins((SEGMENT + 9, 4))
    gradients = []
    for recompute in (False, True):
        built = tiny("unirep")
        if recompute:
            built.model.set_grad_checkpointing()
        features = residue_features(built, built.model.train(), residues, mask)
        features.square().sum().backward()
        gradients.append({name: p.grad for name, p in built.model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.any(), name
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_recomputing_keeps_less_in_memory():
    def kept(recompute):
        layer = MLSTM(4, 16)
        layer.checkpointing = recompute
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            layer(torch.randn(4 * SEGMENT, 2, 4)).sum()
        return sum(sizes)

    assert kept(True) < kept(False) / 5


def test_full_fine_tuning_reaches_every_parameter():
    built = tiny("unirep")
    residue_features(built, built.model, *proteins()).square().sum().backward()
    assert [name for name, p in built.model.named_parameters() if p.grad is None] == []


def test_a_cut_network_is_its_first_layers(small):
    whole, cut = (build("unirep-256", weights=str(small), layers=layers) for layers in (None, 1))
    assert (whole.layers, cut.layers, whole.has_lm, cut.has_lm) == (2, 1, True, False)
    ids = torch.randint(1, 24, (2, 5))
    with torch.no_grad():
        expected = whole.model.layers[0](whole.model.embedding(ids.T)).transpose(0, 1)
        assert torch.equal(cut.model(ids, torch.ones_like(ids, dtype=torch.bool)), expected)
    with pytest.raises(GraftError, match="no output layer of a language model"):
        lm_logits(cut, cut.model, *proteins())
    for layers in (0, 3):
        with pytest.raises(GraftError, match=f"layers={layers}: 'unirep-256' has 2 blocks; give 1 to 2"):
            build("unirep-256", pretrained=False, layers=layers)


def test_what_it_cannot_do_is_said():
    built = tiny("unirep")
    residues, mask = proteins()
    with pytest.raises(GraftError, match="has no start token that has seen the protein"):
        residue_features(built, built.model, residues, mask, start=True)
    residues[0, 2] = MASK
    with pytest.raises(GraftError, match="left to right and cannot hide residues"):
        residue_features(built, built.model, residues, mask)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"mlstm.1.wh": None}, r"not laid out as 'unirep-256'.*mlstm\.1\.wh"),
        ({"embedding": np.zeros((26, 9), np.float32)}, r"embedding\.weight is \(26, 9\) in the file and \(26, 10\)"),
        ({"mlstm.0.gx": np.zeros(3, np.float32)}, r"not laid out as 'unirep-256'"),
        ({"embedding": np.array([{}], dtype=object)}, r"no \.npz of plain arrays"),
    ],
)
def test_a_wrong_file_is_refused(change, named, small):
    arrays = published() | change
    np.savez(small, **{name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(GraftError, match=named):
        read_unirep("unirep-256", small)


def test_a_missing_or_damaged_file_is_refused(small):
    small.write_bytes(b"no archive")
    with pytest.raises(GraftError, match=r"no \.npz of plain arrays"):
        read_unirep("unirep-256", small)
    with pytest.raises(GraftError, match="There is no weights file"):
        read_unirep("unirep-256", small.with_name("other.npz"))


def test_under_autocast_the_cell_stays_in_single_precision():
    built = tiny("unirep")
    residues, mask = proteins((30, 12))
    with torch.no_grad():
        exact = residue_features(built, built.model, residues, mask)
        with torch.autocast("cpu", torch.bfloat16):
            half = residue_features(built, built.model, residues, mask)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact, atol=0.02, rtol=0)


@pytest.mark.parametrize("name", list(_unirep.SIZES))
def test_the_number_of_parameters_is_the_formulas(name):
    size = _unirep.SIZES[name]
    with torch.device("meta"):
        model = UniRep(size.width, size.layers)
    inputs = [10, *(size.width,) * (size.layers - 1)]
    expected = 26 * 10 + sum(5 * size.width * (n + size.width) + 4 * size.width for n in inputs)
    assert sum(p.numel() for p in model.parameters()) == expected


@pytest.mark.artifacts
@pytest.mark.parametrize(("name", "most"), [("unirep-256", (2.85, 3.0)), ("unirep-1900", (2.80, 3.0))])
def test_the_published_weights_predict_natural_proteins(name, most):
    """In nats; a uniform guess over the 20 amino acids costs 3.00, and no shuffled protein should cost less."""
    built = build(name)
    for sequence, limit in zip((UBIQUITIN, LYSOZYME), most, strict=True):
        natural = torch.tensor([encode(sequence)])
        shuffled = natural[:, torch.randperm(len(sequence), generator=torch.Generator().manual_seed(0))]
        losses = []
        for residues in (natural, shuffled):
            with torch.no_grad():
                logits = lm_logits(built, built.model, residues, residues >= 0)
            losses.append(float(functional.cross_entropy(logits[0], residues[0])))
        assert losses[0] < limit
        assert losses[0] < losses[1]
