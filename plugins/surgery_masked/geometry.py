"""The merging convolution of a block, branch by branch."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Pair = tuple[int, int]


class Geometry(NamedTuple):
    """How a convolution moves over its input.

    Attributes:
        stride: Per dimension.
        padding: Zeros on either side, per dimension.
        dilation: Per dimension.
    """

    stride: Pair
    padding: Pair
    dilation: Pair

    @classmethod
    def of(cls, conv: nn.Conv2d) -> Geometry:
        """Return that of `conv`, whose padding is given in numbers."""
        return cls(cast(Pair, conv.stride), cast(Pair, conv.padding), cast(Pair, conv.dilation))

    def is_pointwise(self, weight: Tensor) -> bool:
        """Return whether every output reads one position, the one that it stands at."""
        return tuple(weight.shape[2:]) == (1, 1) and self.stride == (1, 1) and self.padding == (0, 0)


def by_branch(weight: Tensor, branches: int) -> Tensor:
    """View the weight (c, C * d, kh, kw) of a merging convolution as (C, c, d, kh, kw)."""
    apart: Tensor = weight.unflatten(1, (branches, -1)).transpose(0, 1)
    return apart


def branch_outputs(hidden: Tensor, weight: Tensor, branches: int, geometry: Geometry) -> Tensor:
    """Return what every branch adds to the sum.

    Shape:
        hidden (B, C * d, H, W), weight (c, C * d, kh, kw); returns (B, C, c, H', W').
    """
    apart = by_branch(weight, branches).flatten(0, 1)
    outputs: Tensor = F.conv2d(hidden, apart, None, *geometry, groups=branches).unflatten(1, (branches, -1))
    return outputs


def runs_eagerly(value: Tensor) -> bool:
    """Return whether plain operations are not asked for: by a compiler, an exporter, or a run without data."""
    traced = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    return value.device.type in ("cpu", "cuda") and not traced


def autocast_dtype(value: Tensor) -> torch.dtype:
    """Return the dtype that convolutions of `value` run in."""
    kind = value.device.type
    if kind == "meta" or value.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return value.dtype
    return torch.get_autocast_dtype(kind)
