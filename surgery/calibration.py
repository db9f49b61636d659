"""Re-estimate batch-norm statistics."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import InvalidOption


@torch.no_grad()
def recalibrate_bn(model: nn.Module, loader: Iterable[Any], batches: int = 200) -> int:
    """Re-estimate the running statistics of every batch norm as the plain average over batches, in place.

    Nothing else changes: no weight, no mode, and no other layer is in train mode meanwhile.

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
    modes = {module: module.training for module in model.modules()}
    momenta = {norm: norm.momentum for norm in norms}
    device = next(model.parameters()).device
    used = 0
    try:
        model.eval()
        for batch in islice(loader, batches):
            images: Tensor = batch[0] if isinstance(batch, (tuple, list)) else batch
            if not used:
                _start(norms)
            model(images.to(device))
            used += 1
    finally:
        for module, training in modes.items():
            module.training = training
        for norm, momentum in momenta.items():
            norm.momentum = momentum
    if not used:
        raise InvalidOption("recalibrate_bn: the loader yielded no batch; the statistics are left as they were")
    return used


def _start(norms: list[nn.modules.batchnorm._BatchNorm]) -> None:
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # type: ignore[assignment]  # cumulative average
        norm.train()
