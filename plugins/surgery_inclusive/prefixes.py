"""What anytime prediction has read so far."""

from __future__ import annotations

import torch
from torch import Tensor

from surgery.errors import InvalidOption


class PrefixCache:
    """The first sub-features of a value, which grow from step to step; a copy of it, or a pickled one, is empty."""

    def __init__(self) -> None:
        self._buffer: Tensor | None = None
        self._stop = 0

    def extend(self, part: Tensor, start: int, stop: int, total: int) -> Tensor:
        """Add sub-features and return all of them so far, as a view that the next call leaves as it is.

        Args:
            part: The sub-features `start` to `stop`.
            start: How many are there already; 0 begins anew.
            stop: How many there are afterwards.
            total: How many there can be.

        Shape:
            part (B, (stop - start) n, ...); returns (B, stop n, ...).

        Raises:
            InvalidOption: If `part` does not continue what is there, or carries gradients.
        """
        if not 0 <= start < stop <= total or part.shape[1] % (stop - start):
            raise InvalidOption(
                f"PrefixCache: found {part.shape[1]} channels for the sub-features {start} to {stop} of {total}, "
                "expected a span within them and equally many channels for each"
            )
        if torch.is_grad_enabled() and part.requires_grad:
            raise InvalidOption(
                "PrefixCache: found sub-features that carry gradients, expected none in anytime prediction; run it "
                "under torch.no_grad()"
            )
        width = part.shape[1] // (stop - start)
        if start == 0:
            self.clear()  # first, so that its memory can be taken again
            self._buffer = _empty(part, width * total)
        buffer = self._continued(part, start, width * total)
        buffer[:, width * start : width * stop].copy_(part)
        self._stop = stop
        return buffer[:, : width * stop]

    def keep(self, rows: Tensor) -> None:
        """Go on with these images of the batch only: indices, or a mask."""
        if self._buffer is not None:
            self._buffer = self._buffer[rows]

    def clear(self) -> None:
        """Forget everything."""
        self._buffer, self._stop = None, 0

    def __reduce__(self) -> tuple[type[PrefixCache], tuple[()]]:
        return PrefixCache, ()

    def _continued(self, part: Tensor, start: int, channels: int) -> Tensor:
        """Return the buffer, after a check that `part` fits behind what it holds."""
        buffer = self._buffer
        if buffer is None or start != self._stop:
            raise InvalidOption(
                f"PrefixCache: found sub-features from {start} on where {self._stop} have been read, expected the next "
                "one; run the sub-networks from the first to the last, without a gap"
            )
        expected, found = (len(buffer), channels, *buffer.shape[2:]), (len(part), buffer.shape[1], *part.shape[2:])
        if expected != found:
            raise InvalidOption(
                f"PrefixCache: found sub-features of shape {tuple(part.shape)} behind a buffer of shape "
                f"{tuple(buffer.shape)}, expected the same images; begin anew with the first sub-network"
            )
        return buffer


def _empty(part: Tensor, channels: int) -> Tensor:
    size = (len(part), channels, *part.shape[2:])
    last = part.dim() == 4 and not part.is_contiguous() and part.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.empty(size, dtype=part.dtype, device=part.device, memory_format=layout)
