"""Compute a block once more in the backward pass instead of storing what it computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def recomputed(block: nn.Module, forward: Callable[..., Tensor], *args: Tensor) -> Tensor:
    """Return `forward(block, *args)` and keep nothing of what it computes on the way until the backward pass.

    Norms move their running statistics once, as they do without.
    """
    value: Tensor
    if torch.compiler.is_compiling():  # understands no contexts
        value = checkpoint(forward, block, *args, use_reentrant=False)
    else:
        contexts = (nullcontext(), still(block))
        value = checkpoint(forward, block, *args, use_reentrant=False, context_fn=lambda: contexts)
    return value


@contextmanager
def still(block: nn.Module) -> Iterator[None]:
    """Let the norms of a block compute as in train mode, but leave their running statistics alone."""
    statistics = [
        (module._buffers, name, buffer)
        for module in block.modules()
        for name, buffer in module._buffers.items()
        if name in _STATISTICS and buffer is not None
    ]
    for buffers, name, buffer in statistics:
        buffers[name] = buffer.clone()
    try:
        yield
    finally:
        for buffers, name, buffer in statistics:
            buffers[name] = buffer
