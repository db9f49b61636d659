"""Which sub-networks a forward pass runs.

A span (start, stop) goes through the graph beside the image and tells every converted layer what to compute: (0, k) is
sub-network k, and (k - 1, k) is what it has more than the one before, in a sparse network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from surgery import ConvertedNetwork
from surgery.errors import InvalidOption, UnsupportedModel
from surgery.objective import unwrap
from surgery_inclusive.gradients import reach

Span = tuple[int, int]


class Subnetworks(nn.Module):
    """Decide which sub-networks the network runs: all in training, one in inference.

    A dense network runs its graph once for each, a sparse one once for all. In eval mode all run where something is to
    be learned about each: inside `surgery.record`, and while norms gather statistics.

    Args:
        count: K, how many there are.
        sparse: Whether one pass computes all of them.
        heads: Path of the classifiers.
        norm: Path of a batch norm, or None where there is none.

    Attributes:
        span: What the next pass computes.
        chosen: The only sub-network to run, 1 to K, or None.
        idle: Parameters that the next forward does not use but is to give a gradient of zero.
        macs: Multiply-adds of the sub-networks by (height, width), where they were counted before.
        repeats_network: True.

    Shape:
        Any image to a span.
    """

    repeats_network = True

    def __init__(self, count: int, *, sparse: bool, heads: str, norm: str | None) -> None:
        super().__init__()
        self.count, self.sparse, self.heads, self.norm = count, sparse, heads, norm
        self.span: Span = (0, count)
        self.chosen: int | None = None
        self.idle: tuple[nn.Parameter, ...] = ()
        self.macs: dict[tuple[int, ...], tuple[int, ...]] = {}

    def forward(self, image: Tensor) -> Span:
        """Return the span; the image is not looked at."""
        return self.span

    def repeat(self, network: ConvertedNetwork, forward: Callable[..., Tensor], *args: Tensor) -> Tensor:
        """Return the logits of the last sub-network that runs.

        Raises:
            UnsupportedModel: If the norms were exchanged after the conversion.
        """
        if self.norm is not None and isinstance(network.get_submodule(self.norm), nn.SyncBatchNorm):
            raise UnsupportedModel(
                f"inclusive: {self.norm} has become a SyncBatchNorm, which knows of no sub-networks; leave the norms "
                "as the conversion made them"
            )
        self._clear(network)
        if self.chosen is not None or self.sparse or not self._all_run(network):
            output = forward(*args)
        else:
            output = self._each(forward, *args)
        return reach(output, self.idle) if self.idle else output

    def _clear(self, network: ConvertedNetwork) -> None:
        """Forget the logits of an earlier forward."""
        heads: Any = network.get_submodule(self.heads)
        heads.clear()

    def _each(self, forward: Callable[..., Tensor], *args: Tensor) -> Tensor:
        try:
            for k in range(1, self.count):
                self.span = (0, k)
                forward(*args)
        finally:
            self.span = (0, self.count)
        return forward(*args)

    def _all_run(self, network: ConvertedNetwork) -> bool:
        if network.training or (self.norm is not None and network.get_submodule(self.norm).training):
            return True
        return bool(network.get_submodule(self.heads).recording)

    def extra_repr(self) -> str:
        """Return the number for `print(model)`."""
        return f"{self.count}, sparse={self.sparse}"


def subnetworks_of(model: nn.Module) -> Subnetworks:
    """Return the module that decides which sub-networks run.

    Raises:
        InvalidOption: If the network has no sub-networks.
        UnsupportedModel: If it is not converted.
    """
    network = unwrap(model)
    for module in network.children():
        if isinstance(module, Subnetworks):
            return module
    raise InvalidOption(
        f"inclusive: {type(network).__name__} has no sub-networks; expected a network that was converted by "
        "'inclusive' and is not pruned"
    )


def check_subnetwork(subnetworks: Subnetworks, k: int) -> int:
    """Return `k` if there is such a sub-network.

    Raises:
        InvalidOption: If there is none.
    """
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= subnetworks.count:
        raise InvalidOption(
            f"inclusive: found sub-network {k!r}, expected 1 (the thinnest) to {subnetworks.count}; "
            "pass one of these numbers"
        )
    return k


@contextmanager
def use(model: nn.Module, subnetwork: int) -> Iterator[None]:
    """Run only one sub-network inside of the block, in eval and in train mode.

    Args:
        model: An inclusive network, wrapped or not.
        subnetwork: 1 (the thinnest) to K.

    Raises:
        InvalidOption: If there is no such sub-network.
    """
    subnetworks = subnetworks_of(model)
    with selected(subnetworks, check_subnetwork(subnetworks, subnetwork)):
        yield


@contextmanager
def selected(subnetworks: Subnetworks, k: int, start: int = 0) -> Iterator[None]:
    """Let `subnetworks` run the `k`-th alone, from part `start` on, and put back what was chosen before."""
    before = subnetworks.chosen, subnetworks.span
    subnetworks.chosen, subnetworks.span = k, (start, k)
    try:
        yield
    finally:
        subnetworks.chosen, subnetworks.span = before
