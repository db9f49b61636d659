"""Parts of a tensor along one dimension, as ranges: what is open is mostly contiguous, and ranges copy fast."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

Range = tuple[int, int]


def ranges_of(flags: Tensor) -> tuple[Range, ...]:
    """Return the ranges [start, stop) in which `flags` (n,) is not zero, in order."""
    edges = functional.pad((flags != 0).to(torch.int8), (1, 1)).diff().nonzero()
    return tuple((start, stop) for start, stop in edges.view(-1, 2).tolist())


def length(ranges: Sequence[Range]) -> int:
    """Return how many entries the ranges cover."""
    return sum(stop - start for start, stop in ranges)


def rest(ranges: Sequence[Range], size: int) -> tuple[Range, ...]:
    """Return the ranges that are left of [0, size)."""
    edges = [0, *(edge for bounds in ranges for edge in bounds), size]
    return tuple((start, stop) for start, stop in zip(edges[::2], edges[1::2], strict=True) if start < stop)


def common(first: Sequence[Range], second: Sequence[Range]) -> tuple[Range, ...]:
    """Return the ranges in which both are open."""
    pairs = [(max(a, c), min(b, d)) for a, b in first for c, d in second]
    return tuple((start, stop) for start, stop in pairs if start < stop)


def take_ranges(value: Tensor, dim: int, ranges: Sequence[Range]) -> Tensor:
    """Return the entries in the ranges along `dim`, in the memory format of `value`; a view where it is one range."""
    parts = [value.narrow(dim, start, stop - start) for start, stop in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def add_ranges(value: Tensor, dim: int, ranges: Sequence[Range], added: Tensor) -> None:
    """Add `added`, which has only the entries in the ranges, to `value` in place."""
    parts = added.split([stop - start for start, stop in ranges], dim)
    for (start, stop), part in zip(ranges, parts, strict=True):
        value.narrow(dim, start, stop - start).add_(part)
