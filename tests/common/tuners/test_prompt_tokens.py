"""Prompts in the blocks of token encoders, against networks into which they are put by hand."""

from __future__ import annotations

import pytest
import timm
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn import functional

from common.attach import attach
from common.errors import GraftError
from common.images.backbones import FAMILIES, tokens
from common.methods import VPTDeep, VPTShallow
from common.tuners import PromptTokensConfig
from tests.nets import build_net, images

LENGTH = 3
EACH = pytest.mark.parametrize("spec", [VPTShallow(length=LENGTH), VPTDeep(length=LENGTH)], ids=["shallow", "deep"])


def prompted(key, spec):
    """A tiny network with prompts, and the bare one."""
    bare, built = build_net(key), build_net(key)
    attached = attach(built.model, spec, built.family)
    attached.train(False)
    return bare.model, attached.model


def prompts_of(model):
    return [p.detach() for name, p in model.named_parameters() if "tprompt_" in name]


def through_blocks(model, x, prompts, run):
    """Run blocks with the prompts behind the first token, as the paper draws them, new ones in each block if any."""
    rows = prompts[0].expand(len(x), -1, -1)
    for place, block in enumerate(model.blocks):
        if len(prompts) > 1:
            rows = prompts[place].expand(len(x), -1, -1)
        out = run(block, torch.cat((x[:, :1], rows, x[:, 1:]), dim=1))
        x = torch.cat((out[:, :1], out[:, 1 + LENGTH :]), dim=1)
        rows = out[:, 1 : 1 + LENGTH]
    return x


@EACH
@pytest.mark.parametrize("key", ["vit", "deit", "siglip"])
@torch.no_grad()
def test_a_vit_computes_what_it_does_with_prompts_put_in_by_hand(key, spec):
    bare, model = prompted(key, spec)
    x = bare.norm_pre(bare.patch_drop(bare._pos_embed(bare.patch_embed(images(key)))))
    expected = bare.norm(through_blocks(bare, x, prompts_of(model), lambda block, x: block(x)))
    found = model.forward_features(images(key))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found, bare.forward_features(images(key)), atol=1e-2)


@EACH
@pytest.mark.parametrize("key", ["eva02", "eva02-fused", "dinov3"])
@torch.no_grad()
def test_prompts_of_a_rotary_vit_are_not_rotated_like_its_class_token(key, spec):
    bare, model = prompted(key, spec)
    for block in bare.blocks:  # timm leaves so many tokens at the front unrotated
        block.attn.num_prefix_tokens += LENGTH
        if block.gamma_1 is not None:  # DINO starts them so near zero that nothing could be seen
            block.gamma_1.fill_(1)
    for layer in model.base_model.model.blocks:
        if layer.base_layer.gamma_1 is not None:
            layer.base_layer.gamma_1.fill_(1)
    x, rope = bare._pos_embed(bare.patch_embed(images(key)))
    x = bare.norm_pre(x)
    expected = bare.norm(through_blocks(bare, x, prompts_of(model), lambda block, x: block(x, rope=rope)))
    torch.testing.assert_close(model.forward_features(images(key)), expected, atol=1e-5, rtol=1e-5)


@EACH
@torch.no_grad()
def test_the_relative_bias_of_a_beit_is_zero_for_prompts(spec):
    bare, model = prompted("beit", spec)
    for layer, block in zip(model.base_model.model.blocks, bare.blocks, strict=True):
        table = block.attn.relative_position_bias_table
        table.copy_(torch.randn(table.shape, generator=torch.Generator().manual_seed(0)))
        layer.base_layer.attn.relative_position_bias_table.copy_(table)
        own = block.attn._get_rel_pos_bias()  # (1, H, T, T), the class token first
        rows = torch.cat((own[:, :, :1], own.new_zeros(*own.shape[:2], LENGTH, own.shape[3]), own[:, :, 1:]), dim=2)
        zeros = rows.new_zeros(*rows.shape[:3], LENGTH)
        bias = torch.cat((rows[..., :1], zeros, rows[..., 1:]), dim=3)
        block.attn._get_rel_pos_bias = lambda bias=bias: bias
    x = bare.patch_embed(images("beit"))
    x = torch.cat((bare.cls_token.expand(len(x), -1, -1), x), dim=1)
    expected = bare.norm(through_blocks(bare, x, prompts_of(model), lambda block, x: block(x)))
    torch.testing.assert_close(model.forward_features(images("beit")), expected, atol=1e-5, rtol=1e-5)


@EACH
@pytest.mark.parametrize("key", ["vit", "eva02", "beit"])
def test_gradients_are_the_same_with_checkpointing(key, spec):
    gradients = []
    for recompute in (False, True):
        built = build_net(key)
        built.model.set_grad_checkpointing(recompute)
        attached = attach(built.model, spec, built.family)
        attached.train(True)
        torch.manual_seed(0)
        out = [tokens(attached.model, images(key) * scale) for scale in (1.0, 0.5)]  # twice before one backward pass
        (out[0] * out[1]).square().mean().backward()
        gradients.append([p.grad for p in attached.model.parameters() if p.requires_grad])
    assert len(gradients[0]) == (1 if isinstance(spec, VPTShallow) else len(built.model.blocks))
    for plain, recomputed in zip(*gradients, strict=True):
        assert plain.any()
        torch.testing.assert_close(recomputed, plain)


def test_training_drops_prompts_and_evaluation_does_not():
    _, model = prompted("vit", VPTDeep(length=LENGTH, dropout=0.5))
    with torch.no_grad():
        assert torch.equal(model(images("vit")), model(images("vit")))
        model.train()
        assert not torch.equal(model(images("vit")), model(images("vit")))


def test_prompts_start_within_the_bound_and_by_the_seed_alone():
    _, model = prompted("vit", VPTDeep(length=50))
    drawn = torch.stack(prompts_of(model))
    bound = (3 / drawn.shape[-1]) ** 0.5
    assert bound * 0.98 < drawn.abs().max() <= bound
    assert abs(float(drawn.mean())) < 0.02


# ---- what PEFT does with adapters


class Attend(nn.Module):
    """A block that attends with a mask, and returns a second thing beside its tokens."""

    def __init__(self, width=8, heads=2):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x, mask=None, angles=None):
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if angles is not None:
            q, k = (rotate(part, *angles) for part in (q, k))
        if mask is not None and mask.ndim == 2:
            mask = mask[:, None, None, :]
        x = x + self.out(functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))
        return x, "kept"


def rotate(x, cosines, sines):
    left, right = x.chunk(2, dim=-1)
    return x * cosines + torch.cat((-right, left), dim=-1) * sines


def angles_of(positions, size):
    steps = 10000.0 ** -(torch.arange(0, size, 2) / size)
    angles = torch.outer(torch.as_tensor(positions, dtype=torch.float32), steps).repeat(1, 2)
    return angles.cos(), angles.sin()


class Net(nn.Module):
    def __init__(self, between=None):
        super().__init__()
        self.blocks = nn.ModuleList(Attend() for _ in range(3))
        self.between = between or (lambda x: x)

    def forward(self, x, mask=None, angles=None):
        for block in self.blocks:
            x, extra = block(self.between(x), mask, angles=angles)
            assert extra == "kept"
        return x


def net(**kwargs):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net(**kwargs)


def config(**settings):
    names = [f"blocks.{place}" for place in range(3)]
    return PromptTokensConfig(
        target_modules=r"blocks\.\d", length=LENGTH, width=8, blocks=names, mask=["mask", 0], **settings
    )


def x(batch=2, count=5, seed=1):
    return torch.randn(batch, count, 8, generator=torch.Generator().manual_seed(seed))


def run(model, *args, **kwargs):
    with torch.no_grad():
        return model.eval()(*args, **kwargs)


def wrapped(adapter="default", seed=0, **settings):
    torch.manual_seed(seed)
    return get_peft_model(net(), config(**settings), adapter_name=adapter)


BOTH = pytest.mark.parametrize("deep", [True, False], ids=["deep", "shallow"])
LENGTHS = torch.tensor([5, 2])
SEEN = torch.arange(5) < LENGTHS.unsqueeze(1)  # (2, 5)
MASKS = {
    "none": None,
    "2d": SEEN,
    "bool": SEEN[:, None, None, :].expand(2, 1, 5, 5),
    "one-row": SEEN[:, None, None, :],
    "float": torch.zeros(2, 1, 5, 5).masked_fill(~SEEN[:, None, None, :], float("-inf")),
}


@BOTH
@pytest.mark.parametrize("kind", list(MASKS))
def test_a_mask_holds_for_the_tokens_and_lets_prompts_be_seen(kind, deep):
    """Each example alone, cut to its length and with the prompts in front, gives what the padded batch does."""
    model = wrapped(deep=deep)
    found = run(model, x(), MASKS[kind])
    prompts = prompts_of(model)
    for row, length in enumerate([5, 5] if kind == "none" else LENGTHS.tolist()):
        hidden = x()[row : row + 1, :length]
        rows = prompts[0][None]
        for place, block in enumerate(net().blocks):
            rows = prompts[place][None] if deep else rows
            with torch.no_grad():
                out, _ = block(torch.cat((rows, hidden), dim=1))
            rows, hidden = out[:, :LENGTH], out[:, LENGTH:]
        torch.testing.assert_close(found[row : row + 1, :length], hidden, atol=1e-5, rtol=1e-5)


@BOTH
@pytest.mark.parametrize("count", [2, 4, 9])
def test_rotary_prompts_stand_before_the_sequence(deep, count):
    model = wrapped(deep=deep, rotary=["angles", "pair"])
    found = run(model, x(count=count), angles=angles_of(range(count), 4))
    prompts, hidden = prompts_of(model), x(count=count)
    rows = prompts[0].expand(2, -1, -1)
    for place, block in enumerate(net().blocks):
        rows = prompts[place].expand(2, -1, -1) if deep else rows
        with torch.no_grad():
            out, _ = block(torch.cat((rows, hidden), dim=1), angles=angles_of(range(LENGTH + count), 4))
        rows, hidden = out[:, :LENGTH], out[:, LENGTH:]
    torch.testing.assert_close(found, hidden, atol=1e-5, rtol=1e-5)


def test_a_single_token_has_no_rotary_step_to_read_off():
    with pytest.raises(GraftError, match="need at least two tokens"):
        run(wrapped(rotary=["angles", "pair"]), x(count=1), angles=angles_of([0], 4))


def test_prompts_that_cannot_go_along_are_an_error():
    model = get_peft_model(net(between=lambda x: 1 * x), config(deep=False))
    with pytest.raises(GraftError, match=r"changes its tokens between two blocks.*VPTDeep"):
        run(model, x())


@BOTH
def test_one_of_several_adapters_runs_and_any_can_be_deleted(deep, tmp_path):
    model = wrapped("one", seed=1, deep=deep)
    torch.manual_seed(2)
    model.add_adapter("two", config(deep=deep))
    outputs = {}
    for name, seed in (("one", 1), ("two", 2)):
        model.set_adapter(name)
        outputs[name] = run(model, x())
        torch.testing.assert_close(outputs[name], run(wrapped(name, seed=seed, deep=deep), x()))
        trained = [n for n, p in model.named_parameters() if p.requires_grad]
        assert len(trained) == (3 if deep else 1)
        assert all(n.endswith(name) for n in trained)
    assert not torch.allclose(outputs["one"], outputs["two"], atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(run(model, x()), run(net().requires_grad_(False), x()))
    model.delete_adapter("one")
    assert torch.equal(run(model, x()), outputs["two"])
    model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    assert torch.equal(run(PeftModel.from_pretrained(net(), str(tmp_path / "two")), x()), outputs["two"])


def test_two_active_adapters_are_refused():
    model = wrapped("one")
    model.add_adapter("two", config())
    model.base_model.set_adapter(["one", "two"])
    with pytest.raises(ValueError, match="One adapter can be active at a time"):
        run(model, x())


@BOTH
def test_half_precision_and_autocast(deep):
    full = run(wrapped(deep=deep), x(), MASKS["bool"])
    torch.manual_seed(0)
    half = get_peft_model(net().bfloat16(), config(deep=deep))
    assert {p.dtype for n, p in half.named_parameters() if "tprompt_" in n} == {torch.float32}
    found = run(half, x().bfloat16(), MASKS["bool"])
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), full, atol=0.1, rtol=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(run(wrapped(deep=deep), x(), MASKS["bool"]), full, atol=0.1, rtol=0.1)


def test_merging_is_refused():
    with pytest.raises(
        NotImplementedError, match="run through the blocks as tokens and are no change of their weights"
    ):
        wrapped().merge_adapter()


def test_a_vit_whose_attention_is_another_is_refused():
    model = timm.create_model("test_vit", num_classes=0)
    for block in model.blocks:
        block.attn = nn.Identity()
    with pytest.raises(GraftError, match=r"VPTDeep cannot act on this vit backbone: 'blocks.0' holds no attention_out"):
        attach(model, VPTDeep(), FAMILIES["VisionTransformer"])
