"""Gradients of tensors that no wrapper knows of, averaged over the processes of a distributed run.

DistributedDataParallel and FSDP exchange the gradients of parameters while a backward pass runs. All processes have to
start their exchanges in one order, so this one starts when the backward pass is through, behind all others.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor


def average_gradient(leaf: Tensor) -> None:
    """Let every backward pass that reaches `leaf` end with `leaf.grad` as its mean over all processes.

    What an earlier backward pass left is the same in all of them already, so that its mean is itself.
    """
    if _processes() > 1:
        leaf.register_post_accumulate_grad_hook(_queue)


def process_mean(gradient: Tensor) -> Tensor:
    """Return the mean over all processes; overwrites `gradient`."""
    if _processes() == 1:
        return gradient
    dist.all_reduce(gradient)
    return gradient / _processes()


def _queue(leaf: Tensor) -> None:
    torch.autograd.Variable._execution_engine.queue_callback(partial(_average, leaf))


def _average(leaf: Tensor) -> None:
    if leaf.grad is not None:
        leaf.grad = process_mean(leaf.grad)


def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
