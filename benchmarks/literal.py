"""The coded merge as the paper writes it: every branch output is computed, kept, and read several times."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery_coded.energy import EPS
from surgery_coded.modules import CodedConv2d


class LiteralConv2d(nn.Module):
    """What `CodedConv2d` computes, with the N-times larger tensor of branch outputs (B, N, C, H, W)."""

    def __init__(self, coded: CodedConv2d) -> None:
        super().__init__()
        self.weight = coded.weight
        self.codewords, self.ratio, self.branches = coded.codewords, coded.ratio, coded.branches
        self.energy = coded.energy

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        channels = self.weight.shape[0]
        grouped = self.weight.unflatten(1, (self.branches, -1)).transpose(0, 1).flatten(0, 1)
        outputs = F.conv2d(hidden, grouped, groups=self.branches).unflatten(1, (self.branches, channels))
        energies = outputs.square().mean(dim=(2, 3, 4))
        mean = energies.mean(dim=1, keepdim=True) + EPS
        self.energy(energies / mean)
        outputs = outputs * mean.rsqrt()[:, :, None, None, None]
        if mask is not None:
            outputs = outputs * mask[:, :, None, None, None]
        return outputs.sum(dim=1)


def make_literal(model: nn.Module) -> nn.Module:
    """Replace every coded convolution of `model`, in place, by its literal form."""
    for name, module in list(model.named_modules()):
        if isinstance(module, CodedConv2d):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, LiteralConv2d(module).train(module.training))
    return model


def literal_loss(model: nn.Module, target: Tensor) -> Tensor:
    """Return the coding loss of a literal network after a forward pass, summed over its blocks."""
    losses = []
    for module in model.modules():
        if isinstance(module, LiteralConv2d):
            words = module.codewords.float()[target]
            losses.append((module.ratio * module.energy.value - words).pow(4).mean())
            module.energy.clear()
    return torch.stack(losses).sum()
