"""Compute a block once more in the backward pass instead of storing what it computed."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from surgery.taps import in_backward

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def recomputed(block: nn.Module, forward: Callable[..., Tensor], *args: Tensor) -> Tensor:
    """Return `forward(block, *args)` and keep nothing of what it computes on the way until the backward pass.

    Norms move their running statistics once, as they do without.
    """
    value: Tensor
    if torch.compiler.is_compiling():  # understands no contexts
        value = checkpoint(forward, block, *args, use_reentrant=False)
    elif args[0].device.type == "xla":
        value = _recomputed_on_xla(block, forward, *args)
    else:
        contexts = (nullcontext(), still(block))
        value = checkpoint(forward, block, *args, use_reentrant=False, context_fn=lambda: contexts)
    return value


def _recomputed_on_xla(block: nn.Module, forward: Callable[..., Tensor], *args: Tensor) -> Tensor:
    """Return the same on XLA, whose generator and autocast `torch.utils.checkpoint` does not know.

    It looks at its arguments for them, so it gets none.
    """
    xla: Any = importlib.import_module("torch_xla.core.xla_model")
    device = str(args[0].device)
    state = xla.get_rng_state(device)
    cast = torch.autocast("xla", torch.get_autocast_dtype("xla"), enabled=torch.is_autocast_enabled("xla"))

    @contextmanager
    def once_more() -> Iterator[None]:
        later = xla.get_rng_state(device)
        xla.set_rng_state(state, device)
        try:
            with cast, still(block):
                yield
        finally:
            xla.set_rng_state(later, device)

    def run() -> Tensor:
        return forward(block, *(_apart(xla, arg) if in_backward() else arg for arg in args))

    contexts = (nullcontext(), once_more())
    value: Tensor = checkpoint(run, use_reentrant=False, context_fn=lambda: contexts)
    return value


def _apart(xla: Any, value: Any) -> Any:
    """Return a tensor that XLA does not take for the same one: it would join both computations, and store them."""
    if not isinstance(value, Tensor):
        return value
    twin = value.detach().clone()
    xla.optimization_barrier_([twin])
    return twin.requires_grad_(value.requires_grad)


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
