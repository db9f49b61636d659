"""Memory for tensors that are C times as wide as those of the source network.

A fresh block of that size comes from the operating system every time, page by page: for 64 MiB the page faults took
30 ms, twice as long as all that is computed for what goes there. Of huge pages there are 512 times fewer.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

_HUGE = 4 << 20  # bytes, from which on it pays
_ADVICE: int | None = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux only


def empty(like: Tensor, size: Sequence[int]) -> Tensor:
    """Return a tensor of this size, with dtype and device of `like` and any values; on a Linux CPU in huge pages."""
    count = math.prod(size)
    length = count * like.element_size()
    if like.device.type != "cpu" or _ADVICE is None or length < _HUGE:
        return like.new_empty(size)
    block = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    block.madvise(_ADVICE)
    return torch.frombuffer(block, dtype=like.dtype, count=count).view(size)
