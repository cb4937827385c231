"""Selective methods take what they say, and nothing else."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch import nn

from common.attach import attach
from common.errors import GraftError
from common.exchange import export, load
from common.methods import SCT, BitFit, DiffFit, FullFineTune, LastBlocks, LinearProbe, NormBias, NormTuning
from common.run import fit, read_record
from tests import zoo
from tests.toy import DOMAINS, FAMILY, ToyData, ToyTask, toy_backbone


def adapted(spec, model=None, family=FAMILY):
    return attach(model or toy_backbone(), spec, family)


def test_bitfit_takes_every_bias():
    bare = toy_backbone()
    owners = {name.rpartition(".")[0] for name, _ in bare.named_parameters() if name.endswith(".bias")}
    assert set(adapted(BitFit()).plan.targets) == owners


def test_bitfit_without_norms_leaves_the_norms_biases():
    bare = toy_backbone()
    expected = {name for name, module in bare.named_modules() if isinstance(module, (nn.Linear, nn.Conv1d))}
    assert set(adapted(BitFit(norms=False)).plan.targets) == expected


def test_bitfit_passes_over_layers_without_a_bias():
    net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3), nn.LSTM(3, 3))
    assert set(adapted(BitFit(), net, None).plan.targets) == {"1"}
    with pytest.raises(GraftError, match="BitFit finds no bias in Linear"):
        adapted(BitFit(), nn.Linear(3, 3, bias=False), None)


def test_norm_bias_takes_norms_biases_and_slopes():
    net = nn.Sequential(
        nn.Conv2d(2, 3, 1, bias=False),
        nn.InstanceNorm2d(3, affine=True),
        nn.PReLU(3),
        nn.ConvTranspose2d(3, 2, 1),
        nn.RMSNorm(2),
        nn.GroupNorm(1, 2, affine=False),
        nn.ReLU(),
    )
    result = adapted(NormBias(), net, None)
    assert set(result.plan.targets) == {"1", "2", "3", "4"}
    trained = {n.removeprefix("base_model.model.") for n, p in result.model.named_parameters() if p.requires_grad}
    expected = {"1.copied_weight", "1.copied_bias", "2.copied_weight", "3.copied_bias", "4.copied_weight"}
    assert trained == {f"{name}.default" for name in expected}
    with pytest.raises(GraftError, match="NormBias finds no norm, bias or slope to train in Linear"):
        adapted(NormBias(), nn.Linear(3, 3, bias=False), None)


def test_norm_tuning_takes_every_norm_with_parameters():
    net = nn.Sequential(nn.LayerNorm(3), nn.LayerNorm(3, elementwise_affine=False), nn.Linear(3, 3), nn.RMSNorm(3))
    assert set(adapted(NormTuning(), net, None).plan.targets) == {"0", "3"}
    with pytest.raises(GraftError, match="NormTuning finds no norm"):
        adapted(NormTuning(), nn.Sequential(nn.LayerNorm(3, elementwise_affine=False)), None)


def test_diff_fit_scales_the_ends_of_the_branches():
    result = adapted(DiffFit())
    trained = {n.removeprefix("base_model.model.") for n, p in result.model.named_parameters() if p.requires_grad}
    bare = toy_backbone()
    biases = {f"{n.removesuffix('.bias')}.copied_bias.default" for n, _ in bare.named_parameters() if "bias" in n}
    norms = {f"{n}.copied_weight.default" for n, m in bare.named_modules() if "Norm" in type(m).__name__}
    ends = {f"blocks.{i}.{end}.copied_scale.default" for i in (0, 1) for end in ("out", "fc2")}
    assert trained == biases | norms | ends
    with pytest.raises(GraftError, match="Role 'attention_out' matches no module of this zoo backbone"):
        attach(zoo.zoo(2), DiffFit(), zoo.FAMILY)


def test_a_convolution_in_groups_cannot_mix_its_channels():
    with pytest.raises(GraftError, match=r"SCT cannot act on 'blocks.1.grouped' and 2 more: a convolution in groups"):
        attach(zoo.zoo(2), SCT(on=["conv"]), zoo.FAMILY)


# ---- statistics of batch norms -------------------------------------------------------------------------------------


def norms_of(task):
    """The running mean that the task's input is normalised by."""
    layer = task.backbone.get_base_model().input_norm
    return layer.copied_mean["default"], layer.base_layer.running_mean


def test_saved_statistics_train_resume_and_come_along(tmp_path):
    def run(folder, **options):
        task = ToyTask(NormTuning(statistics="saved"))
        fit(task, ToyData(), folder, max_epochs=2, **options)
        return task

    class Die(L.Callback):
        def on_train_batch_start(self, trainer, *args):
            if trainer.global_step == 3:
                raise RuntimeError("killed")

    whole = run(tmp_path / "whole")
    own, frozen = norms_of(whole)
    assert torch.equal(frozen, toy_backbone().input_norm.running_mean)
    assert not torch.allclose(own, frozen, atol=1e-3)
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "run", save_every=1, callbacks=[Die()])
    resumed = run(tmp_path / "run", save_every=1, resume=True)
    assert all(torch.equal(resumed.state_dict()[name], t) for name, t in whole.state_dict().items())

    certificate = export(tmp_path / "whole", tmp_path / "adapter", read_record(tmp_path / "whole"), DOMAINS)
    assert certificate["merge_max_abs_error"] <= 1e-4
    loaded = load(tmp_path / "adapter", DOMAINS)
    assert torch.equal(norms_of(loaded)[0], own)
    batch = whole.example_batch()
    with torch.no_grad():
        torch.testing.assert_close(loaded(batch), whole.eval()(batch))


@pytest.mark.parametrize("method", [BitFit, NormBias, NormTuning])
def test_statistics_that_are_not_there_cannot_be_saved(method):
    with pytest.raises(
        GraftError, match=f"{method.__name__} statistics is 'saved', but it trains no norm of Sequential"
    ):
        adapted(method(statistics="saved"), nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)), None)


def test_recomputed_blocks_would_count_a_batch_twice():
    task = ToyTask(NormTuning(statistics="saved"))
    task.attached = adapted(NormTuning(statistics="saved"))
    with pytest.raises(GraftError, match="gradient_checkpointing with NormTuning would update"):
        task._refuse_double_statistics()
    task.attached = adapted(NormTuning())
    task._refuse_double_statistics()


@pytest.mark.parametrize("k", [1, 2, 3])
def test_last_blocks_count_from_the_output(k):
    result = adapted(LastBlocks(k=k), toy_backbone(depth=3))
    assert list(result.plan.targets) == [f"blocks.{i}" for i in range(3)][-k:]


@pytest.mark.parametrize("k", [0, -1, 3])
def test_a_number_of_blocks_that_is_not_there_is_refused(k):
    with pytest.raises(GraftError, match=f"k={k}: this backbone has 2 blocks; give 1 to 2"):
        adapted(LastBlocks(k=k))


def test_last_blocks_equal_plain_training_of_those_blocks():
    """Two steps of SGD on the copies give the weights that plain partial training gives."""
    x, target = torch.randn(4, 3, 4), torch.randn(4, 3, 8)
    plain = toy_backbone().requires_grad_(False).eval()
    plain.blocks[-1].requires_grad_(True)
    result = adapted(LastBlocks(k=1))
    result.train(False)
    for model in (plain, result.model):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            (model(x) - target).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(result.model(x), plain(x))


def test_the_two_ends_of_the_scale():
    full, probe = adapted(FullFineTune()), adapted(LinearProbe())
    assert all(p.requires_grad for p in full.model.parameters())
    assert not any(p.requires_grad for p in probe.model.parameters())
    assert (full.plan.mode, probe.plan.mode) == ("full", "frozen")
    with probe.grad_mode():
        assert not probe.model(torch.randn(1, 3, 4)).requires_grad
