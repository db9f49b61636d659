"""Gates by their definition: one image, one gate, one channel at a time. Slow, and shares no code with the library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HIDDEN = 16


class Fixed(nn.Module):
    """Stand-in for the head of gates: logits that open exactly those in `decisions` (B, G)."""

    def __init__(self, decisions: Tensor) -> None:
        super().__init__()
        self.register_buffer("logits", torch.stack([1 - decisions, decisions], dim=-1).flatten(0, 1), persistent=False)
        self.images = len(decisions)

    @property
    def weight(self) -> Tensor:
        """One row for each gate, by which gates are counted."""
        return self.logits[: len(self.logits) // self.images]

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (B, G, 2)."""
        return self.logits.unflatten(0, (self.images, -1))


# --- gates ---


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def gumbel_softmax_gates(logits: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """Return gates of logits (G, 2), (draws, G): Gumbel noise on both, softmax at temperature 1, argmax is open."""
    uniform = torch.rand(draws, *logits.shape, generator=generator, dtype=logits.dtype)
    noise = -torch.log(-torch.log(uniform))
    return torch.softmax(logits + noise, dim=-1).argmax(dim=-1)


def soft_gate(margin: Tensor, uniform: Tensor) -> Tensor:
    """Return the relaxed gate for Logistic noise by its inverse distribution function."""
    return 1 / (1 + torch.exp(-(margin + torch.log(uniform / (1 - uniform)))))


def dependent_logits(x: Tensor, weights: Mapping[str, Tensor], training: bool, eps: float = 1e-5) -> Tensor:
    """Return the logits (B, G, 2), each from a bottleneck of its own: mean, linear to 16, norm, ReLU, linear to 2."""
    count = len(weights["bias"])
    pooled = torch.stack([torch.stack([channel.sum() / channel.numel() for channel in image]) for image in x])
    result = []
    for g in range(count):
        units = []
        for u in range(g * HIDDEN, (g + 1) * HIDDEN):
            value = (pooled * weights["reduce.weight"][u]).sum(dim=1) + weights["reduce.bias"][u]
            mean, variance = weights["norm.running_mean"][u], weights["norm.running_var"][u]
            if training:
                mean = value.mean()
                variance = (value - mean).square().mean()
            normed = (value - mean) / torch.sqrt(variance + eps)
            units.append((normed * weights["norm.weight"][u] + weights["norm.bias"][u]).clamp(min=0))
        hidden = torch.stack(units, dim=1)
        result.append(hidden @ weights["weight"][g].T + weights["bias"][g])
    return torch.stack(result, dim=1)


# --- losses ---


def batch_loss(decisions: Sequence[Sequence[float]], target: float, one_sided: bool = False) -> float:
    """Return (t - mean over batch and gates)^2."""
    values = [value for row in decisions for value in row]
    gap = sum(values) / len(values) - target
    return 0.0 if one_sided and gap < 0 else gap**2


def per_gate_loss(decisions: Sequence[Sequence[float]], targets: Sequence[float], one_sided: bool = False) -> float:
    """Return the mean over the gates of (t_g - mean over the batch)^2."""
    total = 0.0
    for g, target in enumerate(targets):
        gap = sum(row[g] for row in decisions) / len(decisions) - target
        total += 0.0 if one_sided and gap < 0 else gap**2
    return total / len(targets)


# --- which channels are open ---


def open_channels(width: int, size: int, decisions: Sequence[float]) -> list[float]:
    """Return 1 or 0 for each channel: the first `size` are open, a decision for each `size` that follow."""
    groups = [1.0, *decisions]
    assert len(groups) == math.ceil(width / size)
    return [groups[channel // size] for channel in range(width)]


def shared_out(decisions: Sequence[float], sizes: Sequence[tuple[int, int]]) -> list[list[float]]:
    """Return the open channels of tensors (width, channels of a gate) that take their gates one after another."""
    tensors, first = [], 0
    for width, size in sizes:
        learned = math.ceil(width / size) - 1
        tensors.append(open_channels(width, size, decisions[first : first + learned]))
        first += learned
    assert first == len(decisions)
    return tensors


# --- multiply-adds, by the formulas of the paper ---


def bottleneck_macs(side: int, stride: int, a_in: float, a_1: float, a_2: float, a_out: float) -> float:
    """Return S^2 (a_in a_1 + 9 a_1 a_2 / s^2 + a_2 a_out / s^2), the stride on the 3x3; a: numbers of open channels."""
    return side**2 * a_in * a_1 + (side // stride) ** 2 * (9 * a_1 * a_2 + a_2 * a_out)


def grouped_bottleneck_macs(side: int, stride: int, a_in: float, a: float, width: int, a_out: float) -> float:
    """The same with a grouped 3x3 whose groups have `width` channels each; a of its channels are open on both sides."""
    return side**2 * a_in * a + (side // stride) ** 2 * (9 * a * width + a * a_out)


def basic_macs(side: int, stride: int, a_in: float, a_1: float, a_out: float) -> float:
    return (side // stride) ** 2 * 9 * (a_in * a_1 + a_1 * a_out)


def inverted_residual_macs(side: int, stride: int, kernel: int, a_in: float, a: float, a_out: float) -> float:
    """Return the multiply-adds of 1x1, depthwise, 1x1."""
    return side**2 * a_in * a + (side // stride) ** 2 * (kernel**2 * a + a * a_out)


def projection_macs(side_out: int, c_in: int, a_sht: float) -> float:
    """Return those of a 1x1 shortcut, which reads every channel."""
    return side_out**2 * c_in * a_sht


RESNET50 = ((3, 64, 56, 1), (4, 128, 56, 2), (6, 256, 28, 2), (3, 512, 14, 2))
"""Blocks, inner width, side of the input, and stride of the first block, of every stage."""


def resnet50_macs(*, gates_open: bool) -> int:
    """Return the multiply-adds of ResNet-50 at 224 x 224 with all channels, or with the first group of every tensor."""
    total = 112**2 * 64 * 3 * 49 + 2048 * 1000
    c_in = 64
    for stage, (blocks, inner, side, first_stride) in enumerate(RESNET50):
        wide, narrow = 16 * 2**stage, 8 * 2**stage
        for index in range(blocks):
            stride = first_stride if index == 0 else 1
            a_in, a, a_out = (c_in, inner, 4 * inner) if gates_open else (wide, narrow, wide)
            total += bottleneck_macs(side, stride, a_in, a, a, a_out)
            if index == 0:
                total += projection_macs(side // stride, c_in, a_out)
            c_in, side = 4 * inner, side // stride
    return int(total)


# --- blocks, layer by layer ---


def normed(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)


def convolved(x: Tensor, conv: nn.Conv2d) -> Tensor:
    return F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def masked(x: Tensor, channels: Sequence[Sequence[float]]) -> Tensor:
    """Return `x` with the channels of each image zeroed that are not open."""
    return x * torch.tensor(channels, dtype=x.dtype)[:, :, None, None]
