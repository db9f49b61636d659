"""Parts of a tensor along one dimension, as ranges: what is open is mostly contiguous, and ranges copy fast."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

Range = tuple[int, int]

_FEW = 4  # more and, on average, shorter ranges than that are copied faster entry by entry


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


def scattered(ranges: Sequence[Range]) -> bool:
    """Return whether what is open lies in many short pieces."""
    return len(ranges) > _FEW and length(ranges) < _FEW * len(ranges)


def take_ranges(value: Tensor, dim: int, ranges: Sequence[Range]) -> Tensor:
    """Return the entries in the ranges along `dim`; a view where it is one range."""
    if scattered(ranges):
        return value.index_select(dim, _index(ranges, value))
    parts = [value.narrow(dim, start, stop - start) for start, stop in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def add_ranges(value: Tensor, dim: int, ranges: Sequence[Range], added: Tensor) -> None:
    """Add `added`, which has only the entries in the ranges, to `value` in place."""
    if scattered(ranges):
        value.index_add_(dim, _index(ranges, value), added.to(value.dtype))
        return
    parts = added.split([stop - start for start, stop in ranges], dim)
    for (start, stop), part in zip(ranges, parts, strict=True):
        value.narrow(dim, start, stop - start).add_(part)


def _index(ranges: Sequence[Range], value: Tensor) -> Tensor:
    return torch.tensor([entry for start, stop in ranges for entry in range(start, stop)], device=value.device)
