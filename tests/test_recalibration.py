"""Re-estimating batch-norm statistics: the plain average over batches, and nothing else."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch import nn

import surgery
from surgery.errors import InvalidOption
from surgery.taps import Tap
from surgery.testing import tiny_networks

RESNEXT = tiny_networks()["resnext"]


def constant(value: float, batch: int = 2) -> torch.Tensor:
    return torch.full((batch, 1, 2, 2), value)


def test_statistics_are_the_plain_average_over_batches():
    """Batches of the constants 1, 2 and 6: the mean of the means is 3, and within each the variance is 0."""
    model = nn.Sequential(nn.BatchNorm2d(1))
    assert surgery.recalibrate_bn(model, [constant(1.0), constant(2.0), constant(6.0)]) == 3
    assert torch.equal(model[0].running_mean, torch.tensor([3.0]))
    assert torch.equal(model[0].running_var, torch.tensor([0.0]))


def test_variance_is_the_unbiased_one_of_each_batch():
    """Four values 0, 0, 2, 2: mean 1, sum of squared differences 4, over 3."""
    model = nn.Sequential(nn.BatchNorm2d(1))
    surgery.recalibrate_bn(model, [torch.tensor([0.0, 0.0, 2.0, 2.0]).reshape(1, 1, 2, 2)])
    torch.testing.assert_close(model[0].running_var, torch.tensor([4 / 3]), rtol=1e-6, atol=0)


def test_at_most_so_many_batches_are_used_and_tuples_begin_with_the_images():
    model = nn.Sequential(nn.BatchNorm2d(1))
    batches = [(constant(value), torch.zeros(2)) for value in (2.0, 4.0, 100.0)]
    assert surgery.recalibrate_bn(model, iter(batches), batches=2) == 2
    assert torch.equal(model[0].running_mean, torch.tensor([3.0]))


def test_loader_without_a_batch_is_refused_and_changes_nothing():
    model = nn.Sequential(nn.BatchNorm2d(1))
    model[0].running_mean.fill_(7.0)
    with pytest.raises(InvalidOption, match="the loader yielded no batch; the statistics are left as they were"):
        surgery.recalibrate_bn(model, [])
    assert torch.equal(model[0].running_mean, torch.tensor([7.0]))
    assert model.training


@pytest.mark.parametrize("train", [True, False])
def test_nothing_but_statistics_changes(train):
    model = surgery.convert(RESNEXT(), "coded", input_size=32).train(train)
    model.layer1.train(not train)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = {name: module.training for name, module in model.named_modules()}
    surgery.recalibrate_bn(model, [torch.randn(4, 3, 32, 32) for _ in range(2)])
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    statistics = {key for key in before if key.rpartition(".")[2] in ("running_mean", "running_var")}
    assert statistics <= moved
    assert {key.rpartition(".")[2] for key in moved - statistics} <= {"num_batches_tracked"}
    assert {name: module.training for name, module in model.named_modules()} == modes
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {norm.momentum for norm in norms} == {0.1}
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_dropout_is_off_meanwhile():
    """With dropout the norm behind it would see zeros, and its mean would not be the input's 5."""
    model = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm2d(1)).train()
    surgery.recalibrate_bn(model, [constant(5.0)])
    assert torch.equal(model[1].running_mean, torch.tensor([5.0]))


def test_statistics_match_one_pass_of_cumulative_averages():
    """An independent loop: every norm in train mode with momentum 1 / batches seen, all else in eval mode."""
    model = surgery.convert(RESNEXT().double(), "coded", input_size=32)
    twin = surgery.convert(RESNEXT().double(), "coded", input_size=32)
    batches = [torch.randn(3, 3, 32, 32, dtype=torch.float64) for _ in range(3)]
    surgery.recalibrate_bn(model, batches)
    twin.eval()
    for number, batch in enumerate(batches, start=1):
        for norm in (module for module in twin.modules() if isinstance(module, nn.BatchNorm2d)):
            norm.train()
            norm.momentum = 1 / number
        with torch.no_grad():
            twin(batch)
    for key, value in twin.state_dict().items():
        if "running" in key:
            torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-12, atol=1e-14)


def test_an_error_of_the_model_leaves_modes_and_momentum_as_they_were():
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Conv2d(7, 1, 1))
    with pytest.raises(RuntimeError):
        surgery.recalibrate_bn(model, [constant(1.0)])
    assert model.training
    assert model[0].momentum == 0.1


class Shortcut(nn.Module):
    """Two norms, of which one runs, and a tap."""

    def __init__(self):
        super().__init__()
        self.used, self.idle = nn.BatchNorm2d(1), nn.BatchNorm2d(1)
        self.tap = Tap("seen")

    def forward(self, x):
        return self.tap(self.used(x))


@pytest.mark.parametrize("batches", [[constant(3.0)], [torch.zeros(1, 7, 1, 1)]], ids=["works", "fails"])
def test_a_norm_that_no_batch_reaches_keeps_its_statistics(batches):
    model = Shortcut()
    surgery.recalibrate_bn(model, [constant(1.0), constant(2.0)])
    model.idle.running_mean.fill_(7.0)
    model.idle.num_batches_tracked.fill_(5)
    before = copy.deepcopy(model.idle.state_dict())
    with contextlib.suppress(RuntimeError, ValueError):
        surgery.recalibrate_bn(model, batches)
    assert all(torch.equal(value, before[key]) for key, value in model.idle.state_dict().items())


def test_an_error_before_the_first_batch_is_through_leaves_the_statistics_as_they_were():
    model = Shortcut()
    model.used.running_mean.fill_(7.0)
    with pytest.raises(RuntimeError):
        surgery.recalibrate_bn(model, [torch.zeros(2, 7, 1, 1)])
    assert torch.equal(model.used.running_mean, torch.tensor([7.0]))


def test_taps_keep_what_they_recorded():
    """Inside `record` the tap shows the value of the user's forward, not that of the last batch."""
    model = Shortcut().eval()
    with surgery.record(model) as taps:
        expected = model(constant(4.0))
        surgery.recalibrate_bn(model, [constant(9.0)])
        assert taps["seen"] is expected
        again = model(constant(4.0))
    assert taps["seen"] is again
