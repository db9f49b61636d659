"""Train one sub-network after the other within a step, which needs the memory of one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from surgery.objective import unwrap
from surgery_inclusive.heads import Heads
from surgery_inclusive.norms import IndependentNorm
from surgery_inclusive.selection import selected, subnetworks_of


@dataclass(frozen=True, eq=False)
class Pass:
    """One sub-network while it is trained; call it like the model.

    Attributes:
        model: The network, or the wrapper that was given.
        subnetwork: 1 (the thinnest) to K.
    """

    model: nn.Module
    subnetwork: int

    def __call__(self, images: Tensor) -> Tensor:
        """Return the logits (B, classes) of this sub-network."""
        logits: Tensor = self.model(images)
        return logits


def passes(model: nn.Module) -> Iterator[Pass]:
    """Yield the sub-networks one after the other, the full one last; gradients add up to those of the anytime loss.

    Meant for the dense form. In a sparse network one forward trains all sub-networks with the memory of one, and its
    norms, which are shared, follow every pass of this loop.

    Run forward and backward inside of the loop and the optimizer behind it. Under DistributedDataParallel the gradients
    of all passes are averaged among processes once, in the last one.

    Example:
        >>> for sub in surgery_inclusive.passes(model):
        ...     criterion(sub(images), labels).backward()
        >>> optimizer.step()

    Raises:
        InvalidOption: If the network has no sub-networks.
        UnsupportedModel: If it is not converted.
    """
    subnetworks = subnetworks_of(model)
    distributed = isinstance(model, DistributedDataParallel)
    for k in range(1, subnetworks.count + 1):
        is_last = k == subnetworks.count
        waits = model.no_sync() if isinstance(model, DistributedDataParallel) and not is_last else nullcontext()
        with selected(subnetworks, k), waits:
            if distributed and is_last:
                subnetworks.idle = _thin_parameters(model)
            try:
                yield Pass(model, k)
            finally:
                subnetworks.idle = ()


def _thin_parameters(model: nn.Module) -> tuple[nn.Parameter, ...]:
    """Return what the full sub-network has no use for."""
    found: list[nn.Parameter] = []
    for module in unwrap(model).modules():
        if isinstance(module, (IndependentNorm, Heads)):
            found += module.thin.parameters()
        if isinstance(module, Heads):
            found += module.coarse.parameters()
    return tuple(parameter for parameter in found if parameter.requires_grad)
