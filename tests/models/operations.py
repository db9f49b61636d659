"""The way in which Zhao et al., 2022, "Divide and Co-training", count the operations of a network."""

from collections.abc import Callable

import torch
from torch import nn

RULES: dict[type[nn.Module], Callable[..., int]] = {
    nn.Conv2d: lambda m, x, y: y.numel() * (m.weight[0].numel() + (m.bias is not None)),
    nn.BatchNorm2d: lambda m, x, y: 2 * x.numel(),
    nn.Linear: lambda m, x, y: m.in_features * m.out_features,
    nn.AvgPool2d: lambda m, x, y: y.numel(),
    nn.AdaptiveAvgPool2d: lambda m, x, y: x.numel() + y.numel(),
}


def operations(model: nn.Module, size: int = 32) -> int:
    """Count MACs of convolutions and classifier, 1 a bias of a convolution, 2 an element normalized.

    A pooled shortcut counts 1 an output; a global pooling, an addition for every input and a division for every output.
    Everything else is free. A network of several networks is counted whole.
    """
    total = 0

    def add(module, inputs, output):
        nonlocal total
        total += RULES[type(module)](module, inputs[0], output)

    hooks = [module.register_forward_hook(add) for module in model.modules() if type(module) in RULES]
    model.eval()(torch.empty(1, 3, size, size, device="meta"))
    for hook in hooks:
        hook.remove()
    return total


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
