"""Re-estimate batch-norm statistics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from surgery.errors import InvalidOption
from surgery.taps import undisturbed


@runtime_checkable
class RunningNorm(Protocol):
    """A module that keeps running statistics as `nn.BatchNorm2d` does: a batch norm, or what a method put in its place.

    Attributes:
        momentum: Weight of a batch in the statistics; None for a cumulative average.
        track_running_stats: Whether it keeps them.
        running_mean: What a batch moves in train mode.
        running_var: As well.
        num_batches_tracked: Counts the batches.
    """

    momentum: float | None
    track_running_stats: bool
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def reset_running_stats(self) -> None:
        """Start the statistics anew."""

    def buffers(self, recurse: bool = True) -> Iterator[Tensor]:
        """As every module."""

    def train(self, mode: bool = True) -> nn.Module:
        """As every module."""


@torch.no_grad()
def recalibrate_bn(model: nn.Module, loader: Iterable[Any], batches: int = 200) -> int:
    """Re-estimate the running statistics of every batch norm as the plain average over batches, in place.

    Nothing else changes: no weight, no mode, no recorded tap, and no other layer is in train mode meanwhile. A norm
    that no batch reached keeps its statistics.

    Args:
        model: A network, converted or not.
        loader: Yields image batches (B, C, H, W), or tuples that begin with one.
        batches: At most so many are used.

    Returns:
        Number of batches used.

    Raises:
        InvalidOption: If the loader yields no batch.
    """
    norms = [module for module in model.modules() if isinstance(module, RunningNorm)]
    norms = [norm for norm in norms if norm.track_running_stats]
    statistics = {norm: [buffer.clone() for buffer in norm.buffers(recurse=False)] for norm in norms}
    device = next(model.parameters()).device
    used = 0
    try:
        with undisturbed(model), _averaging(model, norms):
            for batch in islice(loader, batches):
                images: Tensor = batch[0] if isinstance(batch, (tuple, list)) else batch
                model(images.to(device))
                used += 1
    finally:
        for norm in norms:
            if not used or _is_unreached(norm):
                for buffer, value in zip(norm.buffers(recurse=False), statistics[norm], strict=True):
                    buffer.copy_(value)
    if not used:
        raise InvalidOption("recalibrate_bn: the loader yielded no batch; the statistics are left as they were")
    return used


@contextmanager
def _averaging(model: nn.Module, norms: Sequence[RunningNorm]) -> Iterator[None]:
    """Let the norms start a cumulative average and everything else run as in eval mode."""
    modes = {module: module.training for module in model.modules()}
    momenta = {norm: norm.momentum for norm in norms}
    try:
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # cumulative average
            norm.train()
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        for norm, momentum in momenta.items():
            norm.momentum = momentum


def _is_unreached(norm: RunningNorm) -> bool:
    """Return whether the statistics are those of a reset; a module may update them without counting batches."""
    mean, variance, batches = norm.running_mean, norm.running_var, norm.num_batches_tracked
    assert mean is not None
    assert variance is not None
    return not (batches is not None and batches.any()) and not mean.any() and bool((variance == 1).all())
