"""Roles are found by name and type together, and never by a part of a name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from common.errors import GraftError
from common.roles import GROUPS, NORMS, ROLES, Family, Pattern, has_affine, resolve
from tests.toy import FAMILY, toy_backbone

LINEAR = (nn.Linear,)


def family(parts=None, **roles):
    return Family(name="fam", block=r"blocks\.\d+", roles={k: tuple(v) for k, v in roles.items()}, parts=parts or {})


class Net(nn.Module):
    """Modules given by their dotted names."""

    def __init__(self, **modules):
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)


def test_every_module_of_the_toy_has_its_role():
    roles = resolve(toy_backbone(depth=3), FAMILY)
    expected = {"embed": "stem", "mix": "stem", "norm": "norm", "input_norm": None}
    for block in range(3):
        expected |= {f"blocks.{block}.{name}": role for name, role in _BLOCK.items()}
    expected["input_norm"] = "norm"
    assert dict(roles.role_of) == expected
    assert list(roles.role_of) == [name for name, _ in toy_backbone(depth=3).named_modules() if name in expected]
    assert roles.count() == {
        "stem": 2,
        "attention_qkv": 3,
        "attention_out": 3,
        "ffn_in": 3,
        "ffn_out": 3,
        "norm": 8,
    }


_BLOCK = {
    "norm1": "norm",
    "norm2": "norm",
    "qkv": "attention_qkv",
    "out": "attention_out",
    "fc1": "ffn_in",
    "fc2": "ffn_out",
}


def test_blocks_stand_in_forward_order_beyond_ten():
    assert resolve(toy_backbone(depth=12), FAMILY).blocks == tuple(f"blocks.{i}" for i in range(12))


@pytest.mark.parametrize("impostor", [nn.Identity(), nn.Sequential(nn.Linear(2, 2)), nn.Conv1d(2, 2, 1)])
def test_a_matching_name_with_another_type_is_not_taken(impostor):
    net = Net(proj=impostor, other=nn.Linear(2, 2))
    roles = resolve(net, family(attention_out=[Pattern("proj", LINEAR)], ffn_in=[Pattern("other", LINEAR)]))
    assert dict(roles.role_of) == {"other": "ffn_in"}


def test_a_matching_type_under_another_name_is_not_taken():
    net = Net(proj=nn.Linear(2, 2), patch_proj=nn.Linear(2, 2), proj2=nn.Linear(2, 2), deep=Net(proj=nn.Linear(2, 2)))
    assert list(resolve(net, family(attention_out=[Pattern("proj", LINEAR)])).role_of) == ["proj"]


def test_a_subclass_of_an_allowed_type_is_taken():
    net = Net(proj=nn.modules.linear.NonDynamicallyQuantizableLinear(2, 2))
    assert list(resolve(net, family(attention_out=[Pattern("proj", LINEAR)])).role_of) == ["proj"]


def test_a_pattern_may_have_a_further_condition():
    net = Net(a=nn.Linear(2, 2), b=nn.Linear(2, 4))
    wide = Pattern("[ab]", LINEAR, where=lambda module: module.out_features > 2)
    assert list(resolve(net, family(ffn_in=[wide])).role_of) == ["b"]


@pytest.mark.parametrize("kind", NORMS)
def test_norms_without_parameters_are_left_out(kind):
    def build(affine):
        first = (1, 4) if kind is nn.GroupNorm else (4,)
        option = "elementwise_affine" if kind in (nn.LayerNorm, nn.RMSNorm) else "affine"
        return kind(*first, **{option: affine})

    assert has_affine(build(True))
    assert not has_affine(build(False))
    net = Net(norm1=build(True), norm2=build(False))
    assert list(resolve(net, family(norm=[Pattern(r"norm\d", NORMS)])).role_of) == ["norm1"]


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_is_the_union_of_its_roles(group):
    roles = resolve(toy_backbone(), FAMILY)
    expected = {name: role for name, role in roles.role_of.items() if role in GROUPS[group]}
    assert roles.select([group]) == expected
    assert roles.select([r for r in GROUPS[group] if r in roles.count()]) == expected


def test_all_never_takes_head_norm_stem_or_embedding():
    assert not {"head", "norm", "stem", "embed"} & set(GROUPS["all"])
    assert set(resolve(toy_backbone(), FAMILY).select(["all"]).values()) <= set(GROUPS["all"])


def test_recurrent_layers_are_weights_that_all_takes():
    net = Net(gates=nn.Linear(2, 8), norm=nn.LayerNorm(2))
    roles = resolve(net, family(recurrent=[Pattern("gates", LINEAR)], norm=[Pattern("norm", NORMS)]))
    assert roles.select(["all"]) == roles.select(["recurrent"]) == {"gates": "recurrent"}


def test_roles_may_overlap_and_come_in_the_models_order():
    roles = resolve(toy_backbone(), FAMILY)
    assert roles.select(["ffn", "attention", "ffn_in"]) == roles.select(["attention", "ffn"]) == roles.select(["all"])


@pytest.mark.parametrize(
    ("given", "near"), [("atention", "attention"), ("ffn-out", "ffn_out"), ("Norm", "norm"), ("al", "all")]
)
def test_an_unknown_role_names_the_nearest(given, near):
    with pytest.raises(GraftError, match=f"'{given}'.*'{near}'.*Allowed") as caught:
        resolve(toy_backbone(), FAMILY).select([given])
    assert all(role in str(caught.value) for role in (*ROLES, *GROUPS))


@pytest.mark.parametrize("role", ["conv", "head", "embed"])
def test_a_role_that_matches_nothing_is_refused_with_what_there_is(role):
    roles = resolve(toy_backbone(), FAMILY)
    with pytest.raises(GraftError, match=f"'{role}' matches no module of this toy") as caught:
        roles.select(["attention", role])
    for name, number in roles.count().items():
        assert f"{name} ({number})" in str(caught.value)


def test_an_empty_choice_is_refused():
    with pytest.raises(GraftError, match=r"'on' is empty.*attention"):
        resolve(toy_backbone(), FAMILY).select([])


def test_two_roles_for_one_module_are_refused():
    with pytest.raises(GraftError, match=r"'proj' carries two roles \(ffn_in, conv\)"):
        resolve(Net(proj=nn.Linear(2, 2)), family(ffn_in=[Pattern("proj", LINEAR)], conv=[Pattern("p.*", LINEAR)]))


def test_two_patterns_of_one_role_may_meet():
    roles = resolve(Net(proj=nn.Linear(2, 2)), family(conv=[Pattern("proj", LINEAR), Pattern("p.*", LINEAR)]))
    assert dict(roles.role_of) == {"proj": "conv"}


def test_a_family_that_does_not_fit_is_refused():
    with pytest.raises(GraftError, match=r"'toy' matches no module of Net.*target_modules"):
        resolve(Net(x=nn.Conv2d(1, 1, 1)), FAMILY)


def test_a_family_with_an_unknown_role_is_refused():
    with pytest.raises(GraftError, match=r"'convolution'.*'conv'"):
        family(convolution=[Pattern("x", LINEAR)])


def test_the_model_is_not_changed():
    model = toy_backbone()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    resolve(model, FAMILY)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


# ---- narrowed down


def layers(**names):
    """Blocks of an attention and a feed-forward layer; `bare` blocks have the feed-forward layer alone."""
    return nn.ModuleList(
        Net(fc=nn.Linear(2, 2), **({} if bare else {"attn": nn.Linear(2, 2)})) for bare in names["bare"]
    )


def two_halves(encoder=(False,) * 3, decoder=(False,) * 2):
    """An encoder and a decoder, and a layer outside of every block."""
    return Net(
        embed=nn.Embedding(2, 2),
        encoder=Net(stem=nn.Linear(2, 2), layers=layers(bare=encoder)),
        decoder=Net(layers=layers(bare=decoder)),
    )


HALVES = Family(
    name="halves",
    block=r"(encoder|decoder)\.layers\.\d+",
    roles={
        "stem": (Pattern(r"encoder\.stem", LINEAR),),
        "attention_out": (Pattern(r".*\.attn", LINEAR),),
        "ffn_out": (Pattern(r".*\.fc", LINEAR),),
        "embed": (Pattern("embed", (nn.Embedding,)),),
    },
    parts={"encoder": "encoder", "decoder": r"decoder\..*", "adapter": "adapter"},
)


def chosen(*on, **nets):
    """The chosen modules as `e0.attn` for `encoder.layers.0.attn`."""
    names = resolve(two_halves(**nets), HALVES).select(on)
    return [name.replace("encoder.layers.", "e").replace("decoder.layers.", "d") for name in names]


@pytest.mark.parametrize(
    ("on", "expected"),
    [
        ("attention@first:1", ["e0.attn"]),
        ("attention@last:3", ["e2.attn", "d0.attn", "d1.attn"]),
        ("attention@first:5", ["e0.attn", "e1.attn", "e2.attn", "d0.attn", "d1.attn"]),
        ("ffn_out@encoder", ["e0.fc", "e1.fc", "e2.fc"]),
        ("attention@decoder", ["d0.attn", "d1.attn"]),  # the part's pattern may name what is in it
        ("attention@encoder@last:1", ["e2.attn"]),
        ("attention@decoder@last:2", ["d0.attn", "d1.attn"]),
        ("attention@first:4@decoder", ["d0.attn"]),
        ("all@first:2@last:1", ["e1.fc", "e1.attn"]),
        ("stem@encoder", ["encoder.stem"]),
    ],
)
def test_a_role_is_narrowed_down(on, expected):
    assert chosen(on) == expected


def test_each_item_is_narrowed_down_alone_and_they_may_overlap():
    assert chosen("attention@first:1", "ffn@decoder@last:1") == ["e0.attn", "d1.fc"]
    assert chosen("attention", "attention@last:1", "attention@decoder") == chosen("attention")


def test_blocks_are_counted_where_they_hold_the_role():
    """As in networks of which some blocks have attention and others have none."""
    nets = {"encoder": (True, False, True, False), "decoder": (True,)}
    assert chosen("attention@last:1", **nets) == ["e3.attn"]
    assert chosen("attention@first:2", **nets) == ["e1.attn", "e3.attn"]
    assert chosen("ffn@last:1", **nets) == ["d0.fc"]


def test_blocks_are_counted_by_depth_beyond_ten():
    roles = resolve(toy_backbone(depth=12), FAMILY)
    assert list(roles.select(["attention_out@last:3"])) == [f"blocks.{i}.out" for i in (9, 10, 11)]
    assert list(roles.select(["attention_out@first:3"])) == [f"blocks.{i}.out" for i in range(3)]
    assert list(roles.select(["attention_out@first:2"])) == ["blocks.0.out", "blocks.1.out"]  # not 10 and 11


def test_a_block_may_carry_the_role_itself():
    net = Net(blocks=nn.ModuleList(nn.Linear(2, 2) for _ in range(3)))
    roles = resolve(net, family(conv=[Pattern(r"blocks\.\d+", LINEAR)]))
    assert list(roles.select(["conv@last:2"])) == ["blocks.1", "blocks.2"]


def test_parts_that_the_model_has_are_kept_by_name():
    assert resolve(two_halves(), HALVES).parts.keys() == {"encoder", "decoder"}
    assert resolve(two_halves(), HALVES).parts["encoder"] == ("encoder",)
    assert resolve(toy_backbone(), FAMILY).parts == {}


@pytest.mark.parametrize(
    ("on", "words"),
    [
        ("atention@last:1", "Unknown role 'atention'.*'attention'"),
        ("@last:1", "Unknown role ''"),
        ("conv@decoder", "Role 'conv' matches no module of this halves backbone"),
        ("attention@decodr", r"'attention@decodr' asks for 'decodr' of this halves .*Did you mean 'decoder'\?"),
        ("attention@adapter", "asks for 'adapter'.*Allowed: decoder, encoder, first:N, last:N"),
        ("attention@", "asks for '' of this halves backbone"),
        ("attention@lst:2", "asks for 'lst:2' of this halves .*last:N"),
        ("stem@decoder", "'stem@decoder' matches no module of this halves backbone: nothing .* in its decoder"),
        ("attention@last:1@encoder", "nothing of the role is left in its encoder"),
        (
            "attention@last:6",
            "the last '6' blocks, and 5 blocks .* hold such modules; give .* from 1 to 5, as in 'last:1'",
        ),
        ("attention@decoder@first:3", "the first '3' blocks, and 2 blocks .* from 1 to 2"),
        ("attention@last:0", "the last '0' blocks"),
        ("attention@last:-1", "the last '-1' blocks"),
        ("attention@last:two", "the last 'two' blocks"),
        ("attention@last", "the last '' blocks.*as in 'last:1'"),
        ("stem@last:1", "no block of this halves backbone holds such modules. Leave '@last:1' out"),
    ],
)
def test_what_cannot_be_narrowed_down_says_why(on, words):
    with pytest.raises(GraftError, match=words):
        chosen(on)


def test_a_backbone_without_blocks_or_parts_says_so():
    roles = resolve(Net(proj=nn.Linear(2, 2)), family(conv=[Pattern("proj", LINEAR)]))
    with pytest.raises(GraftError, match="no block of this fam backbone holds such modules"):
        roles.select(["conv@first:1"])
    with pytest.raises(GraftError, match=r"asks for 'encoder' of this fam backbone\. Allowed: first:N, last:N\."):
        roles.select(["conv@encoder"])


def test_a_part_needs_a_plain_name():
    with pytest.raises(GraftError, match="Part 'last:1' of family 'fam'"):
        family(parts={"last:1": "x"})


# ---- queries, keys and values


def split():
    """Two blocks with a layer for each, and one that computes all three."""
    net = nn.ModuleDict(
        {
            "blocks": nn.ModuleList(
                nn.ModuleDict({name: nn.Linear(2, 2) for name in ("query", "key", "value", "out")}) for _ in range(2)
            ).append(nn.ModuleDict({"all": nn.Linear(2, 6), "out": nn.Linear(2, 2)}))
        }
    )
    roles = {
        "attention_qkv": (Pattern(r"blocks\.\d\.(query|key|value|all)", LINEAR),),
        "attention_out": (Pattern(r"blocks\.\d\.out", LINEAR),),
    }
    singles = {f"attention_{name[0]}": rf"blocks\.\d\.{name}" for name in ("query", "key", "value")}
    return resolve(
        net, Family(name="fam", block=r"blocks\.\d", roles=roles, projections=singles, fused=r"blocks\.\d\.all")
    )


@pytest.mark.parametrize(
    ("on", "chosen", "thirds"),
    [
        (["attention_q"], ["0.query", "1.query", "2.all"], {"2.all": (0,)}),
        (["attention_v", "attention_q"], ["0.query", "0.value", "1.query", "1.value", "2.all"], {"2.all": (0, 2)}),
        (["attention_k@first:1"], ["0.key"], {}),
        (["attention_k@last:1", "attention_out"], ["0.out", "1.out", "2.all", "2.out"], {"2.all": (1,)}),
        (["attention_q", "attention_k", "attention_v"], None, {}),
        (["attention_v", "attention_qkv@last:1"], ["0.value", "1.value", "2.all"], {}),
        (["attention_v", "all"], "all", {}),
    ],
)
def test_queries_keys_and_values_are_chosen_alone(on, chosen, thirds):
    roles = split()
    found = [name.removeprefix("blocks.") for name in roles.select(on)]
    every = [name.removeprefix("blocks.") for name in roles.role_of]
    assert found == {None: [name for name in every if "out" not in name], "all": every}.get(
        chosen if not isinstance(chosen, list) else "", chosen
    )
    assert {name.removeprefix("blocks."): some for name, some in roles.thirds(on).items()} == thirds
    assert set(roles.select(on).values()) <= {"attention_qkv", "attention_out"}


def test_a_network_that_does_not_say_has_no_queries():
    net = Net(proj=nn.Linear(2, 2))
    with pytest.raises(GraftError, match="Role 'attention_q' matches no module of this fam backbone"):
        resolve(net, family(attention_qkv=[Pattern("proj", LINEAR)])).select(["attention_q"])


def test_a_mistyped_share_is_answered_with_the_right_one():
    with pytest.raises(GraftError, match="Did you mean 'attention_v'"):
        split().select(["attention_w"])
