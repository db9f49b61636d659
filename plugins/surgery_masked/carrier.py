"""Gradients of streams with several readers, added up without a pass of their own.

The convolution that the branches of a block begin with and its shortcut read the same streams. Autograd would write a
gradient for each and then their sum, three tensors C times as wide as the source's; for one of 64 MiB that took as long
as the convolution's backward pass. So the others leave theirs with the first reader, which adds its own in place.

That reader's backward pass comes later, since the output of the block depends on it. Where it has come first all the
same, the others return their gradients themselves.
"""

from __future__ import annotations

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_CARRIERS = WeakTensorKeyDictionary()


class Carrier:
    """What waits for the reader that returns the gradient of some streams.

    Attributes:
        is_awaited: Whether there is such a reader and its backward pass is still to come.
    """

    def __init__(self) -> None:
        self.is_awaited = False
        self._whole: Tensor | None = None
        self._strided: tuple[Tensor, int] | None = None

    def leave(self, gradient: Tensor, stride: int = 1) -> None:
        """Leave a gradient of the streams that nobody else holds, or of every `stride`-th row and column of them."""
        if stride == 1:
            self._whole = gradient
        else:
            self._strided = (gradient, stride)

    def take(self) -> tuple[Tensor | None, tuple[Tensor, int] | None]:
        """Return what was left: a whole gradient, and one of every so many rows and columns."""
        found = self._whole, self._strided
        self._whole = self._strided = None
        self.is_awaited = False
        return found


def carrier_of(streams: Tensor) -> Carrier:
    """Return the carrier of this very tensor."""
    if streams not in _CARRIERS:
        _CARRIERS[streams] = Carrier()
    found: Carrier = _CARRIERS[streams]
    return found
