"""Sub-networks written down another way: thin networks built as such, and full ones with columns of zeros."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torchvision.models.resnet import Bottleneck, ResNet

import surgery

LAYERS, CLASSES = (1, 2, 1, 1), 10


def torchvision_resnext(groups: int, width: int = 4) -> ResNet:
    """Return a small ResNeXt: the hidden channels of a block are planes / 64 * width * groups."""
    return ResNet(Bottleneck, list(LAYERS), CLASSES, groups=groups, width_per_group=width)


def thin_resnext(inclusive: surgery.ConvertedNetwork, k: int, groups: int) -> ResNet:
    """Return sub-network k of an inclusive ResNeXt as a ResNeXt of `groups` branches, filled weight by weight."""
    thin, state = torchvision_resnext(groups).double(), inclusive.state_dict()
    filled = {}
    for key, target in thin.state_dict().items():
        path, _, name = key.rpartition(".")
        own = f"{path}.thin.{k - 1}.{name}"
        source = state[own] if own in state else state[key]
        filled[key] = source[tuple(slice(0, size) for size in target.shape)]
    thin.load_state_dict(filled)
    return thin.eval()


def zeroed(source: nn.Module, k: int, count: int) -> nn.Module:
    """Return the source network with only the first k/K of the hidden channels of every block in use.

    Every convolution that reads hidden channels has zeros for the others: the merge, a dense one between, and the one
    that squeezes. That is sub-network k right after conversion, whose norms are those of the source.
    """
    twin = copy.deepcopy(source)
    for block in surgery.inspect(source, input_size=32).blocks:
        if block.merge is None:
            continue
        hidden = {source.get_submodule(path).out_channels for path in block.convs[: block.convs.index(block.merge)]}
        inside = twin.get_submodule(block.path)
        for path, conv in inside.named_modules():
            is_read = f"{block.path}.{path}" in (block.merge, *block.convs[1:]) or "reduce" in path
            if isinstance(conv, nn.Conv2d) and conv.groups == 1 and is_read:
                assert conv.in_channels in hidden
                conv.weight.data[:, conv.in_channels * k // count :] = 0
    return twin


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the gradients by name."""
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
