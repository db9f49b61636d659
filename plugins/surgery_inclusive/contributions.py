"""How much every branch contributes to the output of its block.

Reference: Lee & Shin, Anytime neural prediction via slicing networks vertically (2018), section 4.1, figure 3b.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import surgery
from surgery import Block
from surgery.errors import InvalidOption


def branch_norms(
    model: nn.Module, *, branches: int | None = None, input_size: int | tuple[int, int] | None = None
) -> dict[str, Tensor]:
    """Return the l1 norm of the weights that each branch of each block enters the merging convolution with.

    Args:
        model: A plain or a converted network.
        branches: Into how many equal parts the channels that are merged are divided; default: the branches of the
            block, which for a plain convolution are its channels.
        input_size: As in `surgery.inspect`.

    Returns:
        Norms by path of the block, in order, on the CPU; blocks without a merging convolution are left out. Shape: (C,)
        each.

    Raises:
        InvalidOption: If no block has a merging convolution, or `branches` does not divide the branches of one.
        TraceError, UnsupportedModel: If the network cannot be inspected.
    """
    architecture = surgery.inspect(model, input_size)
    found = {block.path: _norms(model, block, branches) for block in architecture.blocks if block.merge is not None}
    if not found:
        raise InvalidOption(
            f"branch_norms: found no block of {architecture.name} whose branches are merged by a convolution, expected "
            "one or more; pass a network of bottleneck blocks, such as resnext50_32x4d"
        )
    return found


def _norms(model: nn.Module, block: Block, branches: int | None) -> Tensor:
    assert block.merge is not None
    weight = model.get_submodule(block.merge).get_parameter("weight").detach()  # (O, I / G, h, w)
    # Merged in G groups, a channel enters the outputs of its group alone.
    by_group = weight.unflatten(0, (block.channels.hidden // weight.shape[1], -1))  # (G, O / G, I / G, h, w)
    by_channel = by_group.abs().sum(dim=(1, 3, 4)).flatten()  # (I,)
    parts = block.partition(block.cardinality if branches is None else branches)
    return torch.stack([by_channel[part.start : part.stop].sum() for part in parts]).cpu()
