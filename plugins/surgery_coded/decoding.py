"""Read classes off the energies of the blocks, before the network has finished."""

from __future__ import annotations

import torch
from torch import Tensor

import surgery
from surgery import ConvertedNetwork
from surgery_coded.loss import decode
from surgery_coded.pruner import coded_blocks


@torch.no_grad()
def early_decode(model: ConvertedNetwork, images: Tensor) -> dict[str, Tensor]:
    """Return the prediction of every coded block: the class whose codeword is nearest to the energies.

    Args:
        model: A coded network, in eval mode.
        images: (B, 3, H, W).

    Returns:
        Block path -> (B,) class indices, in the order of the network.

    Reference: Coded ResNeXt (2022), Eq. 7.
    """
    with surgery.record(model) as taps:
        model(images)
    return {block.path: decode(taps[module.energy.name], module.codewords) for block, module in coded_blocks(model)}
