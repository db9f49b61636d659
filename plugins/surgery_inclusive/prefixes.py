"""What anytime prediction has read so far."""

from __future__ import annotations

import torch
from torch import Tensor

from surgery.errors import InvalidOption


class PrefixCache:
    """The first sub-features of a value as they came, uncopied: nothing may overwrite them.

    A copy of a cache, or a pickled one, is empty.
    """

    def __init__(self) -> None:
        self._parts: list[Tensor] = []
        self._stop = 0

    def add(self, part: Tensor, start: int, stop: int) -> list[Tensor]:
        """Add the sub-features `start` to `stop` and return all so far, in order; 0 begins anew.

        Shape:
            part (B, (stop - start) n, ...).

        Raises:
            InvalidOption: If `part` does not continue what is there, or carries gradients.
        """
        if torch.is_grad_enabled() and part.requires_grad:
            raise InvalidOption(
                "PrefixCache: found sub-features that carry gradients, expected none in anytime prediction; run it "
                "under torch.no_grad()"
            )
        if start == 0:
            self.clear()  # first, so that its memory can be taken again
        self._check(part, start)
        self._parts.append(part)
        self._stop = stop
        return list(self._parts)

    def keep(self, rows: Tensor) -> None:
        """Go on with these images of the batch only: indices, or a mask."""
        self._parts = [part[rows] for part in self._parts]

    def clear(self) -> None:
        """Forget everything."""
        self._parts, self._stop = [], 0

    def __reduce__(self) -> tuple[type[PrefixCache], tuple[()]]:
        return PrefixCache, ()

    def _check(self, part: Tensor, start: int) -> None:
        if start != self._stop:
            raise InvalidOption(
                f"PrefixCache: found sub-features from {start} on where {self._stop} have been read, expected the next "
                "one; run the sub-networks from the first to the last, without a gap"
            )
        first = self._parts[0] if self._parts else part
        if (len(part), *part.shape[2:]) != (len(first), *first.shape[2:]):
            raise InvalidOption(
                f"PrefixCache: found sub-features of shape {tuple(part.shape)} behind some of shape "
                f"{tuple(first.shape)}, expected the same images; begin anew with the first sub-network"
            )
