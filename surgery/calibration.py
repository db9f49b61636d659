"""Re-estimate batch-norm statistics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import InvalidOption
from surgery.taps import undisturbed


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
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
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
def _averaging(model: nn.Module, norms: list[nn.modules.batchnorm._BatchNorm]) -> Iterator[None]:
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


def _is_unreached(norm: nn.modules.batchnorm._BatchNorm) -> bool:
    """Return whether the statistics are those of a reset; a module may update them without counting batches."""
    mean, variance, batches = norm.running_mean, norm.running_var, norm.num_batches_tracked
    assert mean is not None
    assert variance is not None
    return not (batches is not None and batches.any()) and not mean.any() and bool((variance == 1).all())
