"""The loop with one pass a sub-network: the same gradients with less memory, alone and among processes."""

from __future__ import annotations

import copy
import socket

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import surgery
import surgery_inclusive
from surgery.errors import InvalidOption
from surgery.testing import tiny_networks
from tests.plugins.inclusive.literal import gradients

IMAGES = torch.randn(6, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
TARGET = torch.arange(6)
CRITERION = nn.CrossEntropyLoss()
FORMS = [{}, {"norm": "shared"}, {"sparse": True}]


def inclusive(**options):
    return surgery.convert(tiny_networks()["resnext"]().double(), "inclusive", input_size=32, **options).train()


@pytest.mark.parametrize("options", FORMS[:2])
def test_passes_add_up_to_the_gradients_and_statistics_of_one_forward(options):
    together = inclusive(**options)
    apart = copy.deepcopy(together)
    surgery.Objective(together, CRITERION)(together(IMAGES), TARGET).backward()
    losses = []
    for sub in surgery_inclusive.passes(apart):
        loss = CRITERION(sub(IMAGES), TARGET)
        loss.backward()
        losses.append((sub.subnetwork, loss))
    assert [k for k, _ in losses] == [1, 2, 3, 4]
    expected = gradients(together)
    assert expected.keys() == {name for name, _ in together.named_parameters()}
    for name, gradient in gradients(apart).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-14)
    for name, buffer in apart.named_buffers():
        torch.testing.assert_close(buffer, together.get_buffer(name), rtol=1e-12, atol=1e-14)


def test_the_objective_counts_only_the_subnetwork_of_the_pass():
    model = inclusive(taxonomy={"half": [0] * 5 + [1] * 5})
    objective = surgery.Objective(model, CRITERION)
    for sub in surgery_inclusive.passes(model):
        logits = sub(IMAGES)
        objective(logits, TARGET).backward()
        assert list(objective.terms) == ["task", "taxonomy"]
        assert objective.terms["task"] == CRITERION(logits, TARGET)
    objective(model(IMAGES), TARGET)
    assert list(objective.terms) == ["task", "subnetworks", "taxonomy"]


def test_the_loss_of_a_taxonomy_sums_over_subnetworks_and_levels():
    """Equation 2: the sum over k and d of the criterion, each level with its own labels."""
    levels = {"fifth": [0, 0, 1, 1, 2, 2, 3, 3, 4, 4], "half": [0, 0, 0, 0, 0, 0, 1, 1, 1, 1]}
    model = inclusive(taxonomy=levels, subnetworks=2)
    output = model(IMAGES)
    taps = dict(surgery.taps.taps_of(model))
    literal = sum(CRITERION(taps[f"logits/{k}"], TARGET) for k in (1, 2))
    for name, groups in levels.items():
        coarse = torch.tensor([groups[label] for label in TARGET])
        literal = literal + sum(CRITERION(taps[f"logits/{k}/{name}"], coarse) for k in (1, 2))
    assert [tuple(taps[f"logits/1/{name}"].shape) for name in levels] == [(6, 5), (6, 2)]
    loss = surgery.Objective(model, CRITERION)(output, TARGET)
    torch.testing.assert_close(loss, literal, rtol=1e-12, atol=0)


def test_leaving_the_loop_early_leaves_the_model_as_it_was():
    model = inclusive()
    for sub in surgery_inclusive.passes(model):
        if sub.subnetwork == 2:
            break
    del sub
    model(IMAGES)
    assert [name for name, tap in surgery.taps.taps_of(model).items() if tap is not None] == [
        f"logits/{k}" for k in range(1, 5)
    ]


def test_recomputed_blocks_give_the_same_gradients_and_statistics():
    plain = inclusive()
    recomputed = copy.deepcopy(plain)
    recomputed.set_grad_checkpointing()
    for model in (plain, recomputed):
        surgery.Objective(model, CRITERION)(model(IMAGES), TARGET).backward()
    expected = gradients(plain)
    for name, gradient in gradients(recomputed).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-12, atol=1e-15)
    for name, buffer in recomputed.named_buffers():
        torch.testing.assert_close(buffer, plain.get_buffer(name), rtol=1e-12, atol=1e-15)


def _train(rank, port, queue, options):
    """Take two steps on one half of the batch; the norms, whose statistics would differ, are in eval mode."""
    torch.set_num_threads(1)
    store = distributed.TCPStore("127.0.0.1", port, 2, is_master=rank == 0)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    model = _without_statistics(inclusive(**options))
    wrapped = DistributedDataParallel(model)
    reduced = []
    wrapped.register_comm_hook(reduced, _counting)
    halves = slice(3 * rank, 3 * rank + 3)
    for _ in range(2):
        for sub in surgery_inclusive.passes(wrapped):
            CRITERION(sub(IMAGES[halves]), TARGET[halves]).backward()
        _step(model)
    if rank == 0:
        buckets = len({index for index, _ in reduced})
        queue.put(({name: value.numpy() for name, value in model.state_dict().items()}, len(reduced) / buckets))
    distributed.barrier()
    distributed.destroy_process_group()


def _counting(reduced, bucket):
    reduced.append((bucket.index(), bucket.buffer().numel()))
    return allreduce_hook(distributed.group.WORLD, bucket)


def _without_statistics(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def _step(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(parameter.grad, alpha=0.1)
            parameter.grad = None


def _free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.mark.parametrize("options", FORMS)
def test_two_processes_take_the_steps_of_one_and_reduce_gradients_once_a_step(options):
    alone = _without_statistics(inclusive(**options))
    for _ in range(2):
        for sub in surgery_inclusive.passes(alone):
            CRITERION(sub(IMAGES), TARGET).backward()
        _step(alone)
    context, port = multiprocessing.get_context("spawn"), _free_port()
    queue = context.Queue()
    processes = [context.Process(target=_train, args=(rank, port, queue, options)) for rank in range(2)]
    for process in processes:
        process.start()
    state, per_step = queue.get(timeout=120)
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    assert per_step == 2  # two steps, each reduces every bucket once
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(torch.as_tensor(state[name]), value, rtol=1e-9, atol=1e-12, msg=name)


def test_unknown_subnetworks_are_refused_by_number():
    model = inclusive()
    for k in (0, 5, True, 1.0):
        with pytest.raises(InvalidOption, match=r"expected 1 \(the thinnest\) to 4"), surgery_inclusive.use(model, k):
            pass
