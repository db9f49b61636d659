"""Laws of the activation losses: numbers worked out by hand, gradients, several processes, XLA."""

from __future__ import annotations

import copy
import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import surgery
from surgery.errors import InvalidOption
from surgery.testing import tiny_networks
from surgery_gated import gated_blocks, network_macs
from surgery_gated.loss import batch_activation, gate_targets, global_mean, open_share, per_gate, target_at
from surgery_gated.method import Gated
from tests.plugins.gated import oracle

TIGHT = {"rtol": 1e-10, "atol": 1e-13}
# Six images, four gates.
ROWS = [[1, 0, 1, 1], [0, 0, 1, 1], [1, 0, 1, 0], [1, 0, 1, 1], [0, 1, 1, 0], [1, 0, 1, 1]]


def rates(rows=ROWS):
    return torch.tensor(rows, dtype=torch.float64).mean(dim=0)


def tiny(name="wide resnet", **options):
    return surgery.convert(tiny_networks()[name]().double(), "gated", input_size=32, **options).train()


def images(batch=4):
    return torch.randn(batch, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def trained(model, batch=4, progress=None):
    """Return the terms of one training forward, and the decisions that it took, by block."""
    taken = {}
    hooks = [
        gates.register_forward_hook(lambda _, inputs, output, path=block.path: taken.update({path: output.detach()}))
        for block, gates in gated_blocks(model)
    ]
    objective = surgery.Objective(model, nn.CrossEntropyLoss())
    loss = objective(model(images(batch)), torch.arange(batch), progress)
    for hook in hooks:
        hook.remove()
    assert loss.item() == pytest.approx(float(sum(objective.terms.values())), rel=1e-12)
    return objective.terms, taken


# --- by hand ---


def test_loss_per_batch_worked_by_hand():
    """15 of 24 gates are open: 0.625. Target 0.5: 0.125^2 = 1/64; target 0.75: (-0.125)^2 too, one-sided 0."""
    mean = rates().mean()
    assert mean == 0.625
    assert batch_activation(mean, 0.5) == 1 / 64
    assert batch_activation(mean, 0.75) == 1 / 64
    assert batch_activation(mean, 0.5, one_sided=True) == 1 / 64
    assert batch_activation(mean, 0.75, one_sided=True) == 0


def test_loss_per_gate_worked_by_hand():
    """Rates 0.75, 0.25, 1, 0.5 of four images; targets 0.5, 0.5, 1, 0: gaps 0.25, -0.25, 0, 0.5.

    Squares 1/16, 1/16, 0, 4/16: mean 6/64. One-sided the second counts nothing: 5/64.
    """
    found = torch.tensor([[1, 0, 1, 1], [1, 0, 1, 0], [1, 1, 1, 1], [0, 0, 1, 0]], dtype=torch.float64).mean(dim=0)
    targets = torch.tensor([0.5, 0.5, 1.0, 0.0], dtype=torch.float64)
    assert per_gate(found, targets) == 6 / 64
    assert per_gate(found, targets, one_sided=True) == 5 / 64


@pytest.mark.parametrize("one_sided", [False, True])
@pytest.mark.parametrize("target", [0.0, 0.3, 0.625, 0.7, 1.0])
def test_losses_equal_the_literal_sums(target, one_sided):
    found = batch_activation(rates().mean(), target, one_sided=one_sided)
    torch.testing.assert_close(float(found), oracle.batch_loss(ROWS, target, one_sided), **TIGHT)
    each = [target, 0.1, 0.9, 0.5]
    found = per_gate(rates(), torch.tensor(each, dtype=torch.float64), one_sided=one_sided)
    torch.testing.assert_close(float(found), oracle.per_gate_loss(ROWS, each, one_sided), **TIGHT)


def test_one_sided_losses_do_not_pull_up():
    for one_sided, expected in ((False, [-0.25, 0.25]), (True, [0.0, 0.25])):
        found = torch.tensor([0.25, 0.75], dtype=torch.float64, requires_grad=True)
        per_gate(found, torch.full((2,), 0.5, dtype=torch.float64), one_sided=one_sided).backward()
        assert found.grad.tolist() == expected


def test_rates_and_targets_of_different_numbers_are_refused():
    with pytest.raises(InvalidOption, match=r"rates \(4,\) and targets \(3,\).*pass one target for each gate"):
        per_gate(torch.ones(4), torch.ones(3))


def test_the_target_falls_in_a_line_from_one():
    """Over 4 epochs from 1 to 0.5: after 1 epoch 0.875, after 3 epochs 0.625, then it stays."""
    expected = {0.0: 1.0, 1.0: 0.875, 2.0: 0.75, 3.0: 0.625, 4.0: 0.5, 9.0: 0.5, None: 0.5}
    assert {progress: target_at(0.5, 4.0, progress) for progress in expected} == expected
    assert [target_at(0.3, 0.0, progress) for progress in (0.0, 1.0, None)] == [0.3] * 3


# --- through the objective ---


def test_terms_of_the_objective_are_the_task_and_the_activation():
    terms, _ = trained(tiny())
    assert list(terms) == ["task", "activation"]


@pytest.mark.parametrize("weight", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("one_sided", [False, True])
@pytest.mark.parametrize("target", [0.2, 0.95])
def test_layer_loss_is_that_of_the_decisions_that_were_taken(target, one_sided, weight):
    """The mean over batch and gates counts every block the same, whatever it costs."""
    model = tiny(target=target, one_sided=one_sided, weight=weight)
    terms, taken = trained(model, 6)
    rows = torch.cat(list(taken.values()), dim=1).tolist()
    expected = weight * oracle.batch_loss(rows, target, one_sided)
    torch.testing.assert_close(float(terms["activation"]), expected, **TIGHT)


@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_loss_per_gate_is_that_of_the_decisions_that_were_taken(granularity):
    """A block beats its stage; layer3 is in no mapping, layer1 has the target 1: neither has gates."""
    target = {"layer2": 0.3, "layer2.0": 0.6, "layer3": 1.0}
    model = surgery.convert(
        tiny_networks()["wide resnet"]().double(),
        Gated(granularity=granularity, target=target, loss="gate", weight=3.0),
        input_size=32,
    ).train()
    terms, taken = trained(model, 6)
    assert list(taken) == ["layer2.0"]
    expected = 3.0 * oracle.per_gate_loss(taken["layer2.0"].tolist(), [0.6] * taken["layer2.0"].shape[1])
    torch.testing.assert_close(float(terms["activation"]), expected, **TIGHT)


def test_every_gate_has_the_target_of_its_block():
    decisions = {"a": torch.zeros(2, 1), "b": torch.zeros(2, 3)}
    assert gate_targets(decisions, {"a": 0.25, "b": 0.75, "c": 0.1}).tolist() == [0.25, 0.75, 0.75, 0.75]


@pytest.mark.parametrize("loss", ["batch", "gate"])
def test_annealing_reaches_the_loss(loss):
    """Over 10 epochs to 0.2; after 5 epochs the target is 0.6."""
    for progress, target in ((0.0, 1.0), (5.0, 0.6), (10.0, 0.2), (None, 0.2)):
        terms, taken = trained(tiny(target=0.2, anneal=10.0, loss=loss), progress=progress)
        rows = torch.cat(list(taken.values()), dim=1).tolist()
        literal = oracle.batch_loss(rows, target)
        if loss == "gate":
            literal = oracle.per_gate_loss(rows, [target] * len(rows[0]))
        torch.testing.assert_close(float(terms["activation"]), literal, **TIGHT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"loss": "gate"}, {"granularity": "channel"}], ids=str)
def test_means_of_decisions_of_few_bits_are_taken_in_float32(options, dtype):
    """A mean of 8 bits would be off by up to 2^-9 of itself, and 2 (mean - t) is the gradient."""
    model = tiny(target=0.9, dependent=False, **options).to(dtype)
    with torch.no_grad():
        for _, gates in gated_blocks(model):
            gates.head.logits.zero_()
    taken = {}
    for block, gates in gated_blocks(model):
        gates.register_forward_hook(lambda _, inputs, output, path=block.path: taken.update({path: output.detach()}))
    objective = surgery.Objective(model, nn.CrossEntropyLoss())
    objective(model(images(37).to(dtype)).float(), torch.arange(37) % 10)
    assert {values.dtype for values in taken.values()} == {dtype}
    taken = {path: values.double() for path, values in taken.items()}
    rows = torch.cat(list(taken.values()), dim=1).tolist()
    expected = oracle.batch_loss(rows, 0.9)
    if "loss" in options:
        expected = oracle.per_gate_loss(rows, [0.9] * len(rows[0]))
    if "granularity" in options:
        expected = float((0.9 - share_of(tiny(**options), taken)) ** 2)
    assert float(objective.terms["activation"]) == pytest.approx(expected, rel=1e-5)


def share_of(model, taken):
    """Return the share of the gated multiply-adds, by the whole network's."""
    ends = [network_macs(model, {path: values * 0 + end for path, values in taken.items()}) for end in (0.0, 1.0)]
    return ((network_macs(model, taken) - ends[0]) / (ends[1] - ends[0])).mean()


@pytest.mark.parametrize("dependent", [True, False])
def test_channel_loss_weighs_gates_by_their_multiply_adds(dependent):
    terms, taken = trained(tiny(granularity="channel", dependent=dependent, target=0.4, weight=2.0), 6)
    expected = 2.0 * (0.4 - share_of(tiny(granularity="channel"), taken)) ** 2
    torch.testing.assert_close(terms["activation"], expected, **TIGHT)


def test_channel_loss_of_one_block_worked_by_hand():
    """Gates of 8 channels in a basic block of 16 channels at 32 x 32: three tensors of two groups, gates z1, z2, z3.

    In units of 9 * 1024 multiply-adds: a_in a_1 + a_1 a_out with a = 8 or 16; all open 512, all closed 128.
    z = (1, 0, 0): 16 * 8 + 8 * 8 = 192, share 64/384 = 1/6. z = (0, 1, 1): 8 * 16 + 16 * 16 = 384, share 2/3.
    Their mean 5/12 is 1/12 above the target 1/3: the loss is 1/144. Counting gates it would be (1/2 - 1/3)^2.
    """
    model = tiny(granularity="channel", dependent=False, group_size=8, target={"layer1": 0.3}, loss="gate")
    decisions = torch.tensor([[1, 0, 0], [0, 1, 1]], dtype=torch.float64)
    share = open_share(model, {"layer1.0": decisions})
    torch.testing.assert_close(share, torch.tensor([1 / 6, 2 / 3], dtype=torch.float64), **TIGHT)
    torch.testing.assert_close(float(batch_activation(global_mean(share), 1 / 3)), 1 / 144, **TIGHT)


def test_gradient_of_the_channel_loss_equals_finite_differences_in_the_decisions():
    model = tiny("timm resnext", granularity="channel")
    decisions = {b.path: torch.rand(3, gates.count, dtype=torch.float64) for b, gates in gated_blocks(model)}
    for values in decisions.values():
        values.requires_grad_()

    def loss(moved=None):
        return batch_activation(global_mean(open_share(model, decisions | (moved or {}))), 0.2)

    gradients = dict(zip(decisions, torch.autograd.grad(loss(), list(decisions.values())), strict=True))
    for path, values in decisions.items():
        for image, gate in ((0, 0), (2, values.shape[1] // 2), (1, values.shape[1] - 1)):
            step = torch.zeros_like(values)
            step[image, gate] = 1e-4
            with torch.no_grad():
                above, below = loss({path: values + step}), loss({path: values - step})
            torch.testing.assert_close(gradients[path][image, gate], (above - below) / 2e-4, rtol=1e-6, atol=0)
            assert gradients[path][image, gate] != 0


@pytest.mark.parametrize(
    "options", [{}, {"granularity": "channel"}, {"granularity": "channel", "dependent": False}], ids=str
)
def test_the_activation_loss_closes_gates_by_gradient_descent(options):
    """A weight of 100 leaves the task no say: after some steps fewer are open than at the start."""
    model = tiny(target=0.1, weight=100.0, gate_lr=20.0, **options)
    optimizer = torch.optim.SGD(surgery.param_groups(model, lr=0.05, weight_decay=0.0))

    def chance():
        """Mean probability of all gates, for the images that reach them."""
        found = []
        hooks = [
            gates.register_forward_pre_hook(lambda gates, inputs: found.append(gates.probabilities(*inputs)))
            for _, gates in gated_blocks(model)
        ]
        with torch.no_grad():
            copy.deepcopy(model).eval()(images(8))
        for hook in hooks:
            hook.remove()
        return float(torch.cat(found, dim=1).mean())

    before = chance()
    for _ in range(5):
        loss = surgery.Objective(model, nn.CrossEntropyLoss())(model(images(8)), torch.arange(8))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert chance() < before - 0.01


# --- several processes ---


def test_the_mean_of_one_process_is_the_mean():
    values = torch.rand(5, 3, dtype=torch.float64)
    assert torch.equal(global_mean(values), values.mean(dim=0))


PROCESS = """
import sys, pathlib, torch, surgery
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from surgery.testing import tiny_networks
from surgery_gated import gated_blocks

torch.set_num_threads(1)
rank, folder = int(sys.argv[1]), pathlib.Path(sys.argv[2])
if rank < 2:
    store = distributed.FileStore(str(folder / "store"), 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
x, noise, cases = torch.load(folder / "batch.pt")
own = (slice(0, 3), slice(3, 8), slice(0, 8))[rank]


class NoTask(nn.Module):
    def forward(self, output, target):
        return output.sum() * 0


found = []
for options in cases:
    torch.manual_seed(0)
    model = surgery.convert(tiny_networks()["wide resnet"]().double(), "gated", input_size=32, **options).train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    torch.manual_seed(1)
    for _, gates in gated_blocks(model):  # in front of the wrapper, which hands the weights of rank 0 to all
        with torch.no_grad():
            for parameter in gates.parameters():
                parameter.add_(torch.randn_like(parameter))
    wrapped = DistributedDataParallel(model) if rank < 2 else model
    drawn = iter([noise[own, : gates.count] for _, gates in gated_blocks(model)])
    torch.rand_like = lambda margin: next(drawn)  # an image has the same noise in every process
    loss = surgery.Objective(wrapped, NoTask())(wrapped(x[own]), None)
    loss.backward()
    found.append((loss.detach(), {name: value.grad for name, value in model.named_parameters()}))
torch.save(found, folder / f"{rank}.pt")
if rank < 2:
    distributed.destroy_process_group()
"""
DISTRIBUTED = (
    {"target": 0.1},
    {"target": 0.1, "loss": "gate"},
    {"target": 0.1, "granularity": "channel"},
    {"target": 0.6, "granularity": "channel", "dependent": False, "loss": "gate", "one_sided": True},
)


def test_two_processes_with_batches_of_three_and_five_find_the_loss_and_gradients_of_one_with_eight(tmp_path):
    """The gradients are the averages that DistributedDataParallel takes; norms are frozen, so that no images mix."""
    noise = torch.rand(8, 64, dtype=torch.float64)
    torch.save((images(8), noise, DISTRIBUTED), tmp_path / "batch.pt")
    workers = [
        subprocess.Popen([sys.executable, "-W", "error", "-c", PROCESS, str(rank), str(tmp_path)]) for rank in range(3)
    ]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0, 0]
    first, second, alone = (torch.load(tmp_path / f"{rank}.pt") for rank in range(3))
    for one, other, (loss, gradients) in zip(first, second, alone, strict=True):
        assert loss > 1e-4
        torch.testing.assert_close(one[0], loss, rtol=1e-12, atol=0)
        torch.testing.assert_close(other[0], loss, rtol=1e-12, atol=0)
        torch.testing.assert_close(one[1], gradients, rtol=1e-10, atol=1e-16)
        torch.testing.assert_close(other[1], gradients, rtol=1e-10, atol=1e-16)
        assert max(float(value.abs().max()) for value in gradients.values()) > 1e-4


# --- XLA ---


XLA = """
import copy, torch, surgery, torch_xla
from torch import nn
from surgery.testing import ResidualSpec
from surgery_gated import gated_blocks

device = torch_xla.device()
print(device.type)
x, labels = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.arange(4)
for options in ({}, {"granularity": "channel"}):
    source = ResidualSpec((1,), kind="basic", width=8).build()
    model = surgery.convert(source, "gated", input_size=16, target=0.2, weight=2.0, **options)
    noise = [torch.rand(4, gates.count) for _ in range(2) for _, gates in gated_blocks(model)]
    losses = {}
    for name, place in (("cpu", torch.device("cpu")), ("xla", device)):
        network = copy.deepcopy(model).to(place).train()
        drawn = iter([value.to(place) for value in noise])
        keep, torch.rand_like = torch.rand_like, lambda margin: next(drawn)
        criterion = surgery.Objective(network, nn.CrossEntropyLoss())
        optimizer = torch.optim.SGD(surgery.param_groups(network, lr=0.05, weight_decay=1e-4))
        losses[name] = []
        for _ in range(2):
            loss = criterion(network(x.to(place)), labels.to(place))
            optimizer.zero_grad(); loss.backward(); optimizer.step()
            torch_xla.sync()
            losses[name] += [float(loss.detach().cpu()), float(criterion.terms["activation"].cpu())]
        torch.rand_like = keep
        head = [gates for _, gates in gated_blocks(network)][0]
        own = head(torch.randn(64, head.head.reduce.in_features, 4, 4).to(place))
        assert set(own.detach().cpu().unique().tolist()) <= {0.0, 1.0}
    torch.testing.assert_close(torch.tensor(losses["xla"]), torch.tensor(losses["cpu"]), rtol=1e-4, atol=1e-5)
    assert losses["cpu"][0] != losses["cpu"][2]
"""


@pytest.mark.skipif(
    importlib.util.find_spec("torch_xla") is None, reason="torch_xla has no release for this Python or torch"
)
def test_two_training_steps_on_xla_equal_those_on_the_cpu():
    environment = {**os.environ, "PJRT_DEVICE": "CPU", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", XLA]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("xla")
