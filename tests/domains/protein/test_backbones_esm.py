"""ESM: parity with fair-esm, its files, transformers' folders, sizes, and the encoders of other families."""

from __future__ import annotations

import argparse
import warnings

import esm
import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertTokenizer,
    EsmForMaskedLM,
    EsmModel,
    GPT2Config,
    T5Config,
    T5EncoderModel,
)

from common.attach import attach, probe
from common.errors import GraftError
from common.methods import BitFit, LoRA
from common.roles import resolve
from domains.protein._alphabet import ALPHABET, PAD, encode
from domains.protein.backbones import MASK, build, lm_features, lm_logits, residue_features
from domains.protein.backbones._esm import ESM, EsmSize, read_fair_esm
from tests.domains.protein.nets import SIZES, proteins, tiny

FAIR = esm.data.Alphabet.from_architecture("ESM-1b")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Compute in one thread; toy tensors are too small to share out."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def fair_esm2(layers=3, width=24, heads=4):
    """A random ESM-2 of fair-esm, and a checkpoint of it as fair-esm publishes them."""
    torch.manual_seed(0)
    net = esm.ESM2(num_layers=layers, embed_dim=width, attention_heads=heads, alphabet="ESM-1b").eval()
    _spread(net)
    names = {"layers": layers, "embed_dim": width, "attention_heads": heads}
    model = argparse.Namespace(token_dropout=True, **{f"encoder_{name}": value for name, value in names.items()})
    state = {name: tensor for name, tensor in net.state_dict().items() if not name.startswith("contact_head")}
    prefix = {name: "encoder." if name.startswith("lm_head") else "encoder.sentence_encoder." for name in state}
    return net, {"cfg": {"model": model}, "model": {prefix[n] + n: t for n, t in state.items()}}


def fair_esm1(norm_before, positions=30):
    """A random ESM-1b (norm before) or ESM-1v of fair-esm, and its checkpoint."""
    torch.manual_seed(0)
    arguments = argparse.Namespace(
        arch="roberta_large",
        layers=2,
        embed_dim=16,
        ffn_embed_dim=64,
        attention_heads=4,
        max_positions=positions,
        token_dropout=True,
        emb_layer_norm_before=norm_before,
    )
    net = esm.ProteinBertModel(arguments, FAIR).eval()
    _spread(net)
    state = {name: tensor for name, tensor in net.state_dict().items() if not name.startswith("contact_head")}
    named = {
        f"encoder.{'' if name.startswith('lm_head') else 'sentence_encoder.'}{name}": t for name, t in state.items()
    }
    old = argparse.Namespace(
        arch="roberta_large", **{f"encoder_{k}": v for k, v in vars(arguments).items() if k != "arch"}
    )
    return net, {"args": old, "model": named}


def _spread(net):
    """Draw weights at which every part matters; norms and biases start at ones and zeros."""
    for parameter in net.parameters():
        nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.2)


def upstream(net, sequences):
    """Features and logits of fair-esm for residues, hidden ones as `#`, each protein spelt by fair-esm itself."""
    features, logits = [], []
    for sequence in sequences:
        tokens = [FAIR.get_idx("<mask>" if letter == "#" else letter) for letter in sequence]
        ids = torch.tensor([[FAIR.cls_idx, *tokens, FAIR.eos_idx]])
        with torch.no_grad():
            out = net(ids, repr_layers=[net.num_layers])
        features.append(out["representations"][net.num_layers][0, 1:-1])
        logits.append(out["logits"][0, 1:-1])
    return features, logits


def spelt(sequences):
    rows = [torch.tensor([MASK if letter == "#" else encode(letter)[0] for letter in s]) for s in sequences]
    residues = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    return residues, residues != PAD


SEQUENCES = ("MKT#YXBZUOJACDEFGH", "LLNPQRSVWI", "K")
MAKERS = {"esm2": fair_esm2, "esm1b": lambda: fair_esm1(True), "esm1v": lambda: fair_esm1(False)}


@pytest.mark.parametrize("kind", MAKERS)
def test_a_checkpoint_of_fair_esm_computes_what_fair_esm_does(kind, tmp_path):
    net, checkpoint = MAKERS[kind]()
    torch.save(checkpoint, tmp_path / "net.pt")
    built = build(str(tmp_path / "net.pt"))
    built.model.set_attn_implementation("eager")
    residues, mask = spelt(SEQUENCES)
    with torch.no_grad():
        features = residue_features(built, built.model, residues, mask)
        logits = lm_logits(built, built.model, residues, mask)
    expected = upstream(net, SEQUENCES)
    for row, (wanted, scores) in enumerate(zip(*expected, strict=True)):
        torch.testing.assert_close(features[row, : len(wanted)], wanted, atol=2e-6, rtol=2e-6)
        for place, letter in enumerate(ALPHABET):
            if letter != "J":
                column = scores[:, FAIR.get_idx(letter)]
                torch.testing.assert_close(logits[row, : len(wanted), place], column, atol=2e-5, rtol=2e-6)
    assert built.tokenizer.missing == "J"
    assert (built.width, built.layers) == (features.shape[2], net.num_layers)


def test_frequencies_of_the_checkpoint_are_kept(tmp_path):
    """Half-precision checkpoints were trained with rounded ones."""
    net, checkpoint = fair_esm2()
    usual = net.layers[0].self_attn.rot_emb.inv_freq.clone()
    for layer in net.layers:
        layer.self_attn.rot_emb.inv_freq.mul_(0.9)  # shares its storage with the checkpoint
    torch.save(checkpoint, tmp_path / "net.pt")
    built = build(str(tmp_path / "net.pt"))
    torch.testing.assert_close(built.model.rotary_embeddings.inv_freq, 0.9 * usual)
    with torch.no_grad():
        features = residue_features(built, built.model, *spelt(SEQUENCES[:1]))
    torch.testing.assert_close(features[0], upstream(net, SEQUENCES[:1])[0][0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", MAKERS)
def test_adapters_on_the_attention_of_a_fair_esm_checkpoint_are_alive(kind, tmp_path):
    """In fair-esm's own ESM-1b and ESM-1v they are dead: its attention reads the weights past the layers."""
    torch.save(MAKERS[kind]()[1], tmp_path / "net.pt")
    built = build(str(tmp_path / "net.pt"))
    attached = attach(built.model, LoRA(rank=2, on=["attention"]), built.family)
    probe(attached, lambda: residue_features(built, attached.model, *proteins()))


def test_contact_weights_are_left_out(tmp_path):
    net, checkpoint = fair_esm2()
    contact = {f"encoder.{n}": t for n, t in net.state_dict().items() if n.startswith("contact_head")}
    checkpoint["model"] |= {name.removeprefix("encoder."): tensor for name, tensor in contact.items()}
    torch.save(checkpoint, tmp_path / "net.pt")
    assert not any("contact" in name for name in build(str(tmp_path / "net.pt")).model.state_dict())


class Evil:
    def __reduce__(self):
        return (print, ("run",))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda c: c["model"].pop("encoder.lm_head.bias"), r"does not fit: 1 tensors differ, such as bias \(missing"),
        (lambda c: c["model"].update({"encoder.extra": torch.zeros(1)}), "a tensor 'encoder.extra' that no ESM-2"),
        (lambda c: c["model"].update({"encoder.sentence_encoder.layers.0.self_attn.bias_k": torch.ones(1)}), "bias_k"),
        (lambda c: c.pop("cfg"), "no checkpoint of fair-esm"),
        (lambda c: c.update(args=argparse.Namespace(arch="protein_bert_base")), "architecture 'protein_bert_base'"),
        (lambda c: c.update(evil=Evil()), "cannot be read: it is damaged, or holds more than tensors"),
    ],
)
def test_another_file_is_refused(change, named, tmp_path):
    _, checkpoint = fair_esm2()
    change(checkpoint)
    torch.save(checkpoint, tmp_path / "net.pt")
    with pytest.raises(GraftError, match=named):
        build(str(tmp_path / "net.pt"))


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(GraftError, match="There is no weights file"):
        read_fair_esm(tmp_path / "net.pt")
    with pytest.raises(GraftError, match=r"There is no folder .*transformers, or a \.pt"):
        build("esm2_t6_8M_UR50D", weights=str(tmp_path / "net"))


# ---- transformers


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    EsmForMaskedLM(SIZES["esm2"].config()).save_pretrained(tmp_path / "esm")
    return tmp_path / "esm"


def test_a_folder_of_transformers_gives_its_own_numbers(folder):
    built = build(str(folder))
    net = EsmForMaskedLM.from_pretrained(folder).eval()
    residues, mask = proteins(letters=25)
    with torch.no_grad():
        features = residue_features(built, built.model, residues, mask)
        logits = lm_logits(built, built.model, residues, mask)
        with_start = residue_features(built, built.model, residues, mask, start=True)
        for row, length in enumerate(mask.sum(1).tolist()):
            tokens = [FAIR.get_idx(ALPHABET[index]) for index in residues[row, :length]]
            ids = torch.tensor([[0, *tokens, 2]])
            hidden = net.esm(ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
            torch.testing.assert_close(features[row, :length], hidden[1:-1], atol=1e-6, rtol=1e-6)
            torch.testing.assert_close(with_start[row, : length + 1], hidden[:-1], atol=1e-6, rtol=1e-6)
            wanted = net.lm_head(hidden)[1:-1, [FAIR.get_idx(letter) for letter in ALPHABET[:25]]]
            torch.testing.assert_close(logits[row, :length, :25], wanted, atol=1e-5, rtol=1e-5)
            assert not features[row, length:].any()
            assert not with_start[row, length + 1 :].any()
        assert torch.equal(lm_features(built, built.model, residues, mask), features)
    assert built.max_length is None


def test_an_encoder_without_an_output_layer_has_no_language_model(folder, tmp_path):
    EsmModel.from_pretrained(folder).save_pretrained(tmp_path / "encoder")
    built = build(str(tmp_path / "encoder"))
    assert not built.has_lm
    with pytest.raises(GraftError, match="no output layer of a language model"):
        lm_logits(built, built.model, *proteins())


def test_a_file_that_lacks_weights_is_refused(folder):
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    del state["esm.encoder.layer.1.output.dense.bias"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        GraftError, match=r"lacks 1 of its weights, such as esm\.encoder\.layer\.1\.output\.dense\.bias"
    ):
        build(str(folder))


def test_weights_of_another_size_are_refused(folder):
    with pytest.raises(GraftError, match="has 2 layers of width 16, and the named backbone 6 of width 320"):
        build("esm2_t6_8M_UR50D", weights=str(folder))


def test_no_parameter_is_shared_and_every_one_gets_a_gradient():
    for key in ("esm2", "esm1b"):
        built = tiny(key)
        assert not {p.data_ptr() for p in built.model.parameters()} & {p.data_ptr() for p in built.lm_head.parameters()}
        lm_logits(built, built.model, *proteins()).square().sum().backward()
        for module in (built.model, built.lm_head):
            assert [name for name, p in module.named_parameters() if p.grad is None] == []


def test_a_cut_network_is_its_first_blocks(folder):
    whole, cut = build(str(folder)), build(str(folder), layers=1)
    assert (cut.layers, cut.has_lm, build(str(folder), layers=2).has_lm) == (1, False, True)
    residues, mask = proteins()
    ids, attention = whole.tokenizer.encode(residues, mask)
    with torch.no_grad():
        first = whole.model(ids, attention_mask=attention, output_hidden_states=True).hidden_states[1]
        expected = whole.model.encoder.emb_layer_norm_after(first)
        torch.testing.assert_close(cut.model(ids, attention_mask=attention).last_hidden_state, expected)
    assert build("esm2-graft", pretrained=False, layers=1).has_lm


def test_learned_positions_have_an_end():
    built = tiny("esm1b")
    assert built.max_length == 18  # 20 positions, of which start and stop take two
    residue_features(built, built.model, *proteins((18, 3)))
    with pytest.raises(GraftError, match="takes at most 18 residues, and a protein has 19"):
        residue_features(built, built.model, *proteins((19, 3)))
    assert EsmSize(layers=1, width=8, heads=1, positions=1024).config().max_position_embeddings == 1026


@pytest.mark.parametrize("name", ["esm2_t6_8M_UR50D", "facebook/esm2_t6_8M_UR50D"])
def test_a_published_name_gives_its_architecture(name):
    built = build(name, pretrained=False)
    size = ESM["esm2_t6_8M_UR50D"]
    assert (built.name, built.width, built.layers) == ("facebook/esm2_t6_8M_UR50D", size.width, size.layers)
    inner = size.layers * (12 * size.width**2 + 13 * size.width)  # attention 4, feed-forward 8; biases and norms
    assert sum(p.numel() for p in built.model.parameters()) == inner + 33 * size.width + 2 * size.width


def test_the_hub_is_asked_for_a_published_name_and_its_refusal_worded(monkeypatch):
    asked = []

    def refuse(source, **options):
        asked.append(source)
        raise OSError("We couldn't connect. Check your connection")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", refuse)
    with pytest.raises(GraftError, match=r"could not be had or read \(OSError: We couldn't connect\).*with 'weights'"):
        build("esm2_t6_8M_UR50D")
    assert asked == ["facebook/esm2_t6_8M_UR50D"]


@pytest.mark.parametrize(("given", "near"), [("esm2_t6_8M", "esm2_t6_8M_UR50D"), ("UniRep-256", "unirep-256")])
def test_an_unknown_name_suggests_the_nearest(given, near):
    with pytest.raises(GraftError, match=f"Unknown protein backbone '{given}'. Did you mean '{near}'"):
        build(given)


def test_weights_for_what_brings_its_own_and_for_a_random_start_are_refused(folder):
    with pytest.raises(GraftError, match="brings its own weights"):
        build(str(folder), weights="x")
    with pytest.raises(GraftError, match="pretrained is false"):
        build("unirep-256", weights="x", pretrained=False)


# ---- other families


@pytest.fixture
def bert(tmp_path):
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"LAGVESIKRDTPNQFYMHCWXUBZO"]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=30,
        initializer_range=0.3,
    )
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    BertTokenizer(str(tmp_path / "vocab.txt"), do_lower_case=False).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert", vocabulary


def test_a_bert_of_proteins_gives_its_own_numbers(bert):
    folder, vocabulary = bert
    built = build(str(folder))
    net = BertForMaskedLM.from_pretrained(folder).eval()
    residues, mask = spelt(("MKT#YXJ", "AC"))
    with torch.no_grad():
        logits = lm_logits(built, built.model, residues, mask)
        tokens = [vocabulary.index({"#": "[MASK]", "J": "X"}.get(letter, letter)) for letter in "MKT#YXJ"]
        out = net(torch.tensor([[2, *tokens, 3]]), output_hidden_states=True)
        features = residue_features(built, built.model, residues, mask)[0]
    torch.testing.assert_close(features, out.hidden_states[-1][0, 1:-1], atol=1e-5, rtol=1e-5)
    columns = [vocabulary.index(letter) for letter in ALPHABET[:25]]
    torch.testing.assert_close(logits[0, :, :25], out.logits[0, 1:-1][:, columns], atol=1e-5, rtol=1e-5)
    assert (built.tokenizer.missing, built.max_length) == ("J", 28)
    lm_logits(built, built.model, residues, mask).square().sum().backward()
    unused = [n for module in (built.model, built.lm_head) for n, p in module.named_parameters() if p.grad is None]
    assert unused == []


@pytest.fixture
def t5(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    letters = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {
        f"▁{letter}": 3 + i for i, letter in enumerate("ALGVSREDTIPKFQNYMHWCXUBZO")
    }
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="<unk>"))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(tmp_path / "t5")
    torch.manual_seed(0)
    config = T5Config(vocab_size=28, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    net = T5EncoderModel(config)
    for parameter in net.parameters():
        nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.3)
    net.save_pretrained(tmp_path / "t5")
    return tmp_path / "t5", letters


def test_the_encoder_of_a_t5_gives_its_own_numbers(t5):
    folder, letters = t5
    built = build(str(folder))
    net = T5EncoderModel.from_pretrained(folder).eval()
    residues, mask = spelt(("MKTYXJ", "AC"))
    with torch.no_grad():
        features = residue_features(built, built.model, residues, mask)
        for row, sequence in enumerate(("MKTYXX", "AC")):
            ids = torch.tensor([[*(letters[f"▁{letter}"] for letter in sequence), 1]])
            wanted = net(ids).last_hidden_state[0, :-1]
            torch.testing.assert_close(features[row, : len(sequence)], wanted, atol=1e-5, rtol=1e-5)
    assert not built.has_lm
    assert any(isinstance(module, nn.RMSNorm) for module in built.model.modules())
    with pytest.raises(GraftError, match="no start token that has seen the protein"):
        residue_features(built, built.model, residues, mask, start=True)


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_the_other_families_can_be_cut(family, request):
    folder = request.getfixturevalue(family)[0]
    whole, cut = build(str(folder)), build(str(folder), layers=1)
    assert (whole.layers, cut.layers, cut.has_lm) == (2, 1, False)
    assert len(resolve(cut.model, cut.family).blocks) == 1
    features = residue_features(cut, cut.model, *proteins())
    assert not torch.allclose(features, residue_features(whole, whole.model, *proteins()), atol=1e-2)


@pytest.mark.parametrize("spec", [LoRA(rank=2), BitFit()])
def test_methods_run_on_a_bert(spec, bert):
    built = build(str(bert[0]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attached = attach(built.model, spec, built.family)
    probe(attached, lambda: residue_features(built, attached.model, *proteins()))


def test_another_kind_of_network_is_refused(tmp_path, bert):
    GPT2Config().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(GraftError, match=r"Unknown kind of network in .* 'gpt2'.*Allowed: bert, esm, t5"):
        build(str(tmp_path / "gpt2"))
    config = SIZES["esm2"].config()
    config.vocab_size = 4105
    config.save_pretrained(tmp_path / "dna")
    with pytest.raises(GraftError, match="an ESM network of 4105 symbols that does not spell proteins"):
        build(str(tmp_path / "dna"), pretrained=False)
    (tmp_path / "words.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat"]))
    BertTokenizer(str(tmp_path / "words.txt")).save_pretrained(bert[0])
    with pytest.raises(GraftError, match="does not spell proteins letter by letter: its vocabulary has no A, C"):
        build(str(bert[0]))
