"""Blocks that compute once more in the backward pass: the same gradients, statistics moved once."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from surgery.recomputation import recomputed, still
from surgery.testing import ResidualSpec
from tests.stand_ins import rebuilt

IMAGES = torch.randn(3, 4, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Body(nn.Sequential):
    """A convolution and two norms, of which the first is called twice."""

    def __init__(self, momentum=0.1):
        super().__init__(
            nn.Conv2d(4, 4, 3, padding=1, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.BatchNorm2d(4, momentum=momentum),
        )
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self[1](super().forward(x))


class Counting(nn.Module):
    """A module whose buffer is no statistic."""

    def __init__(self):
        super().__init__()
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x):
        self.passes += 1
        return x


class Failing(nn.Module):
    """Fails when it is told to."""

    def __init__(self):
        super().__init__()
        self.fails = False

    def forward(self, x):
        if self.fails:
            raise ValueError("told to")
        return x


def body(momentum=0.1):
    torch.manual_seed(0)
    return Body(momentum).double().train()


def forward(block, x):
    return block(x)


def state(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


def assert_equal_states(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("leaf", [True, False])
def test_gradients_are_those_of_storing_and_statistics_move_once(momentum, leaf):
    plain, again = body(momentum), body(momentum)
    found = []
    for module, run in ((plain, forward), (again, lambda block, x: recomputed(block, forward, x))):
        images = IMAGES.clone().requires_grad_(leaf)
        out = run(module, images)
        out.square().sum().backward()
        found.append((out.detach(), images.grad, [parameter.grad for parameter in module.parameters()]))
    assert torch.equal(found[1][0], found[0][0])
    assert (found[1][1] is None) == (not leaf)
    assert not leaf or torch.equal(found[1][1], found[0][1])
    assert all(torch.equal(a, b) for a, b in zip(found[1][2], found[0][2], strict=True))
    assert_equal_states(state(again), state(plain))
    assert (plain.calls, again.calls) == (1, 2)
    assert int(again[1].num_batches_tracked) == 2  # called twice in a forward, which runs twice
    assert int(again[3].num_batches_tracked) == 1


def test_statistics_that_move_between_forward_and_backward_are_kept():
    """Two forwards, then their backward passes: both move the statistics, recomputing neither."""
    plain, again = body(), body()
    for images in (IMAGES, 2 * IMAGES):
        forward(plain, images)
    outs = [recomputed(again, forward, images) for images in (IMAGES, 2 * IMAGES)]
    after = state(again)
    assert_equal_states(after, state(plain))
    sum(out.sum() for out in outs).backward()
    assert_equal_states(state(again), after)


def test_statistics_stay_the_same_tensors():
    module = body()
    before = {key: value.data_ptr() for key, value in module.named_buffers()}
    buffers = dict(module.named_buffers())
    recomputed(module, forward, IMAGES).sum().backward()
    assert {key: value.data_ptr() for key, value in module.named_buffers()} == before
    assert all(value is buffers[key] for key, value in module.named_buffers())


def test_only_statistics_are_held_still():
    module = nn.Sequential(nn.BatchNorm2d(4), Counting()).double().train()
    before = state(module)
    with still(module):
        module(IMAGES)
        module(IMAGES)
    assert int(module[1].passes) == 2
    after = state(module)
    assert all(torch.equal(after[key], value) for key, value in before.items() if "passes" not in key)


def test_a_norm_without_statistics_is_left_alone():
    module = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)).double().train()
    recomputed(module, forward, IMAGES).square().sum().backward()
    assert module[0].weight.grad is not None
    assert module[1].running_mean is None


def test_an_exception_leaves_the_statistics_as_they_were():
    module = nn.Sequential(body(), Failing()).train()
    buffers = dict(module.named_buffers())
    before = state(module)
    module[1].fails = True
    with pytest.raises(ValueError, match="told to"), still(module):
        module(IMAGES)
    assert_equal_states(state(module), before)
    assert all(value is buffers[key] for key, value in module.named_buffers())


def test_an_exception_in_the_backward_pass_leaves_the_statistics_as_they_were():
    # What comes last is reached only where something behind it is stored.
    module = nn.Sequential(body(), Failing(), nn.Sigmoid()).train()
    out = recomputed(module, forward, IMAGES)
    before = state(module)
    module[1].fails = True
    with pytest.raises(ValueError, match="told to"):
        out.square().sum().backward()
    assert_equal_states(state(module), before)
    module[1].fails = False
    recomputed(module, forward, IMAGES).square().sum().backward()
    assert int(module[0][3].num_batches_tracked) == 2


def test_random_numbers_are_the_same_both_times():
    module = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Dropout(0.5)).double().train()
    found = []
    for run in (forward, lambda block, x: recomputed(block, forward, x)):
        module.zero_grad()
        torch.manual_seed(3)
        run(module, IMAGES).square().sum().backward()
        found.append(module[0].weight.grad.clone())
    assert torch.equal(*found)


@pytest.mark.parametrize("preactivation", [False, True])
def test_blocks_of_a_network_recompute_where_they_are_told_to(preactivation):
    source = ResidualSpec((1, 2), groups=2, preactivation=preactivation).build().double()
    plain = rebuilt(source, 8).train()
    again = copy.deepcopy(plain)
    for block in again.meta["architecture"].blocks:
        again.block(block.path).grad_checkpointing = True
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    calls = []
    for net in (plain, again):
        norm = net.get_submodule("stages.1.1.norms.1")
        handle = norm.register_forward_hook(lambda *_, net=net: calls.append(net is again))
        net(images).square().sum().backward()
        handle.remove()
    assert sorted(calls) == [False, True, True]
    for ours, theirs in zip(again.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-13)
    assert_equal_states(dict(again.named_buffers()), dict(plain.named_buffers()))


@pytest.mark.parametrize("training", [True, False])
def test_blocks_recompute_in_train_mode_with_gradients_only(training):
    net = rebuilt(ResidualSpec((2,)).build(), 8).train(training)
    for block in net.meta["architecture"].blocks:
        net.block(block.path).grad_checkpointing = True
    calls = []
    net.get_submodule("stages.0.1.norms.1").register_forward_hook(lambda *_: calls.append(1))
    images = torch.randn(2, 3, 8, 8)
    with torch.set_grad_enabled(not training):
        out = net(images)
    if not training:
        out.sum().backward()
    assert len(calls) == 1
