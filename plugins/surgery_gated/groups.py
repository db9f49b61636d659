"""How many channels one gate opens.

The granularities of the paper keep the work behind a gate roughly constant: in ResNet-50 a gate opens 16, 32, 64 or
128 channels of the block inputs, outputs and projections of the four stages, and half of that inside the blocks, which
is a 16th of the block's output width and an 8th of its inner width. MobileNetV2 has a table of its own; other networks
get the fractions. The first group of every tensor is always open, so that no path dies.

Reference: Herrmann, Bowen & Zabih, Channel selection using Gumbel Softmax (2020), supplement 1.1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from surgery import Architecture, Block

_PER_TENSOR, _PER_INNER = 16, 8
# Output channels of an inverted residual -> channels of a gate at its input, inside, and at its output.
_MOBILENET_V2 = {
    16: (8, 16, 8),
    24: (8, 24, 8),
    32: (8, 24, 16),
    64: (8, 32, 16),
    96: (16, 48, 32),
    160: (16, 64, 32),
    320: (32, 64, 64),
}


@dataclass(frozen=True)
class GroupSizes:
    """Channels of one gate in a block.

    Attributes:
        input: Of the block's input, on the residual branch.
        inner: Between its convolutions.
        output: Of its output, and of the projection shortcut.
    """

    input: int
    inner: int
    output: int


def group_sizes(architecture: Architecture, block: Block, asked: int | None) -> GroupSizes:
    """Return how many channels one gate opens in `block`; `asked` for all of them, or the paper's rule for None."""
    if asked is not None:
        return GroupSizes(asked, asked, asked)
    channels = block.channels
    blocks = architecture.blocks
    if all(other.kind == "depthwise" and other.channels.output in _MOBILENET_V2 for other in blocks):
        return GroupSizes(*_MOBILENET_V2[channels.output])
    wide = max(1, channels.output // _PER_TENSOR)
    return GroupSizes(wide, max(1, channels.hidden // _PER_INNER), wide)


def gates_of(width: int, size: int, units: int) -> int:
    """Return how many gates a tensor has beside its first group, which is always open.

    Args:
        width: Number of channels.
        size: Channels of a gate; the last one may have fewer.
        units: Into how many equal, indivisible parts the channels fall: the groups of a convolution, or all of them.
    """
    return -(-units // _units_of_a_gate(width, size, units)) - 1


def columns(width: int, size: int, units: int, first: int, of: int) -> Tensor:
    """Return which gate opens each channel, (width,); -1 for the first group.

    Args:
        width: Number of channels of the tensor.
        size: Channels of a gate, of a tensor of `of` channels.
        units: Into how many equal, indivisible parts the channels fall.
        first: Index of the first gate.
        of: Width that `size` refers to; another one where a grouped convolution changes the width.
    """
    unit = torch.arange(width) * units // width
    gate = unit // _units_of_a_gate(of, size, units)
    return torch.where(gate == 0, -1, gate - 1 + first)


def _units_of_a_gate(width: int, size: int, units: int) -> int:
    return max(1, -(-size * units // width))
