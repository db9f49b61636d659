"""Read classes off the energies of the blocks, before the network has finished."""

from __future__ import annotations

import torch
from torch import Tensor

import surgery
from surgery import ConvertedNetwork
from surgery.errors import InvalidOption
from surgery_coded.loss import decode
from surgery_coded.pruner import check_coded, coded_blocks


@torch.no_grad()
def early_decode(model: ConvertedNetwork, images: Tensor) -> dict[str, Tensor]:
    """Return the prediction of every coded block: the class whose codeword is nearest to the energies.

    Args:
        model: A coded network, in eval mode.
        images: (B, 3, H, W).

    Returns:
        Block path -> (B,) class indices, in the order of the network.

    Raises:
        InvalidOption: If the model is not coded, is pruned or in train mode, or has another classifier than its
            schemes.

    Reference: Coded ResNeXt (2022), Eq. 7.
    """
    check_whole(model, "early_decode")
    with surgery.record(model) as taps:
        model(images)
    return {block.path: decode(taps[module.energy.name], module.codewords) for block, module in coded_blocks(model)}


def check_whole(model: ConvertedNetwork, where: str) -> None:
    """Refuse what has no early decoders: a network that is not coded, was cut, or is in train mode.

    Raises:
        InvalidOption: In these cases; the message begins with `where`.
    """
    check_coded(model, where)
    if model.training:
        raise InvalidOption(f"{where}: the network is in train mode, where branches are dropped; call .eval() first")
    classes = model.meta["architecture"].head.classes
    for block, module in coded_blocks(model):
        if module.codewords.shape[0] != classes or module.branches != module.total_branches:
            raise InvalidOption(
                f"{where}: {block.path} has {module.branches} of {module.total_branches} branches and "
                "codewords of "
                f"{module.codewords.shape[0]} classes, the network {classes} outputs; decode the network before it "
                "was cut"
            )
