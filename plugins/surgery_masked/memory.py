"""Tensors that are C times as wide as those of the source network: memory for them, and a few images at a time.

A fresh block of that size comes from the operating system every time, page by page: for 64 MiB the page faults took
30 ms, twice as long as all that is computed for what goes there. Of huge pages there are 512 times fewer.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

_CHUNK_BYTES = 2 << 20
"""Of one wide tensor. Two of them are alive at a time: as much as a core's second-level cache, or a little more."""

_HUGE = 4 << 20  # bytes, from which on it pays
_ADVICE: int | None = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux only


def empty(like: Tensor, size: Sequence[int]) -> Tensor:
    """Return a tensor of this size, with dtype and device of `like` and any values; on a Linux CPU in huge pages."""
    count = math.prod(size)
    length = count * like.element_size()
    if like.device.type != "cpu" or _ADVICE is None or length < _HUGE:
        return like.new_empty(size)
    block = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages
        block.madvise(_ADVICE)
    return torch.frombuffer(block, dtype=like.dtype, count=count).view(size)


def chunks(wide: Tensor, *tensors: Tensor | None) -> Iterator[list[Any]]:
    """Yield the tensors for a few images at a time, as many as fit of `wide`."""
    size = len(wide)
    if wide.device.type == "cpu" and size:
        size = max(1, _CHUNK_BYTES * size // max(1, wide.numel() * wide.element_size()))
    for start in range(0, len(wide), max(1, size)):
        yield [None if tensor is None else tensor[start : start + size] for tensor in tensors]
