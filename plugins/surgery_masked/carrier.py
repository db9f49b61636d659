"""Gradients of streams with several readers, added up without a pass of their own.

The convolution that the branches of a block begin with and its shortcut read the same streams. Autograd would write a
gradient for each and then their sum, three tensors C times as wide as the source's; for one of 64 MiB that took as long
as the convolution's backward pass. So all leave theirs with the first that read them, which adds its own in place.

The first in the forward pass is the last in the backward pass, as the engine goes. Where it has run already, or takes
no part because only some gradients are asked for, the others return theirs themselves.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_CARRIERS = WeakTensorKeyDictionary()


class Carrier:
    """What waits for the reader that returns the gradient of some streams."""

    def __init__(self) -> None:
        self._collector: weakref.ref[Any] | None = None
        self._left: list[tuple[int, Tensor, int]] = []
        self._taken = -1

    @property
    def has_collector(self) -> bool:
        """Whether a reader that is still alive collects."""
        return self._collector is not None and self._collector() is not None

    @property
    def is_awaited(self) -> bool:
        """Whether the collecting reader is still to run in this backward pass."""
        node = self._collector() if self._collector is not None else None
        if node is None or self._taken == _backward_pass():
            return False
        return bool(torch._C._will_engine_execute_node(node))

    def collect(self, result: Tensor) -> None:
        """Let the operation that gave `result` collect."""
        self._collector = weakref.ref(result.grad_fn)

    def leave(self, gradient: Tensor, stride: int = 1) -> None:
        """Leave a gradient of the streams that nobody else holds, or of every `stride`-th row and column of them."""
        self._left.append((_backward_pass(), gradient, stride))

    def take(self) -> list[tuple[Tensor, int]]:
        """Return what was left in this backward pass, each with its stride; those of all rows and columns first."""
        found = [(gradient, stride) for place, gradient, stride in self._left if place == _backward_pass()]
        self._left.clear()
        self._taken = _backward_pass()
        return sorted(found, key=lambda left: left[1])


def carrier_of(streams: Tensor) -> Carrier:
    """Return the carrier of this very tensor."""
    if streams not in _CARRIERS:
        _CARRIERS[streams] = Carrier()
    found: Carrier = _CARRIERS[streams]
    return found


def _backward_pass() -> int:
    number: int = torch._C._current_graph_task_id()
    return number
