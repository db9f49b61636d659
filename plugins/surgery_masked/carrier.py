"""Gradients of streams with several readers, added up without a pass of their own.

The convolution that the branches of a block begin with and its shortcut read the same streams. Autograd would write a
gradient for each and then their sum, three tensors C times as wide as the source's; for one of 64 MiB that took as long
as the convolution's backward pass. So all leave theirs with the first that read them, which adds its own in place.

The first in the forward pass is the last in the backward pass, as the engine goes. Where it has come earlier all the
same, the others return their gradients themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_CARRIERS = WeakTensorKeyDictionary()


class Carrier:
    """What waits for the reader that returns the gradient of some streams.

    Attributes:
        is_awaited: Whether that reader's backward pass is still to come.
    """

    def __init__(self) -> None:
        self.is_awaited = True
        self._left: list[tuple[int, Tensor, int]] = []

    def leave(self, gradient: Tensor, stride: int = 1) -> None:
        """Leave a gradient of the streams that nobody else holds, or of every `stride`-th row and column of them."""
        self._left.append((_backward_pass(), gradient, stride))

    def take(self) -> list[tuple[Tensor, int]]:
        """Return what was left in this backward pass, each with its stride; those of all rows and columns first."""
        found = [(gradient, stride) for place, gradient, stride in self._left if place == _backward_pass()]
        self._left.clear()
        self.is_awaited = False
        return sorted(found, key=lambda left: left[1])


def carrier_of(streams: Tensor) -> tuple[Carrier, bool]:
    """Return the carrier of this very tensor, and whether nobody has asked for it before."""
    known = streams in _CARRIERS
    if not known:
        _CARRIERS[streams] = Carrier()
    found: Carrier = _CARRIERS[streams]
    return found, not known


def _backward_pass() -> int:
    number: int = torch._C._current_graph_task_id()
    return number
