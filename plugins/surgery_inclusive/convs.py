"""Convolutions of which a sub-network uses the first channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery.channels import Select
from surgery_inclusive.kernels import paired, runs_here
from surgery_inclusive.selection import Span


class SlicedConv2d(nn.Conv2d):
    """A convolution whose inputs, outputs, or groups are divided into K equal parts, of which a span is used.

    Args:
        conv: What it stands for; the parameters are taken over.
        parts: K.
        reads: Whether the input holds the parts of the span alone.
        writes: Whether the output does.

    Shape:
        (B, C_in, H, W) to (B, C_out, H', W'); of what is divided, (stop - start) / K of the channels.
    """

    def __init__(self, conv: nn.Conv2d, parts: int, *, reads: bool, writes: bool) -> None:
        super().__init__(**_settings(conv), device="meta")
        self._parameters.update(conv._parameters)
        self.parts, self.reads, self.writes = parts, reads, writes

    def forward(self, input: Tensor, span: Span) -> Tensor:  # type: ignore[override]
        """Return the outputs of the parts in `span`."""
        weight, bias, groups = (self.weight, self.bias, self.groups) if span == (0, self.parts) else self._part(*span)
        if self.training and max(self.kernel_size) > 1 and runs_here(input):
            weight, groups = paired(weight, groups)
        return F.conv2d(input, weight, bias, self.stride, self.padding, self.dilation, groups)

    def selected(self, keep: Sequence[int]) -> nn.Module:
        """Return the convolution of one sub-network, 0 for the thinnest."""
        (index,) = keep
        weight, bias, groups = self._part(0, index + 1)
        inputs, outputs = weight.shape[1] * groups, weight.shape[0]
        settings = {**_settings(self), "in_channels": inputs, "out_channels": outputs, "groups": groups}
        twin = nn.Conv2d(**settings, device="meta")
        twin.weight = nn.Parameter(weight.detach().clone(), self.weight.requires_grad)
        if bias is not None and self.bias is not None:
            twin.bias = nn.Parameter(bias.detach().clone(), self.bias.requires_grad)
        return twin.train(self.training)

    def _part(self, start: int, stop: int) -> tuple[Tensor, Tensor | None, int]:
        weight, bias, groups = self.weight, self.bias, self.groups
        if self.writes:
            rows = slice(start * self.out_channels // self.parts, stop * self.out_channels // self.parts)
            weight, bias = weight[rows], None if bias is None else bias[rows]
        if groups > 1:
            return weight, bias, groups // self.parts * (stop - start)
        if self.reads:
            width = self.in_channels // self.parts
            weight = weight[:, start * width : stop * width]
        return weight, bias, groups


class FirstChannels(nn.Module):
    """Hand on the channels that a sub-network uses of a value that all of them share.

    Args:
        width: C, of the value.
        parts: K, into how many equal parts it is divided.

    Attributes:
        mixes_channels: True: what comes out has channels of its own, for `surgery.channels`.

    Shape:
        (B, C, H, W) to (B, k C / K, H, W).
    """

    mixes_channels = True

    def __init__(self, width: int, parts: int) -> None:
        super().__init__()
        self.width, self.parts = width, parts

    def forward(self, value: Tensor, span: Span) -> Tensor:
        """Return the first channels."""
        return value if span[1] == self.parts else value[:, : self.width // self.parts * span[1]]

    def selected(self, keep: Sequence[int]) -> nn.Module:
        """Return what one sub-network reads, 0 for the thinnest."""
        (index,) = keep
        return Select(torch.arange(self.width // self.parts * (index + 1)))


class NestedAppend(nn.Module):
    """Append zero channels inside of each part, where the source appends them to the whole.

    Args:
        inputs: Channels of the source's input.
        outputs: Channels of its output.
        parts: K, into how many parts both are divided.

    Shape:
        (B, n inputs / K, H, W) to (B, n outputs / K, H, W), for any number n of parts.

    Reference: Lee & Shin (2018), appendix B, shortcut of type A; that the zeros go into each part is not in the paper,
    but needed for y_k to depend on x_1..x_k alone.
    """

    mixes_channels = True

    def __init__(self, inputs: int, outputs: int, parts: int) -> None:
        super().__init__()
        self.inputs, self.outputs, self.parts = inputs, outputs, parts

    def forward(self, value: Tensor) -> Tensor:
        """Return the wider value."""
        extra = (self.outputs - self.inputs) // self.parts
        parts = value.unflatten(1, (-1, self.inputs // self.parts))
        return F.pad(parts, (0, 0, 0, 0, 0, extra)).flatten(1, 2)


def _settings(conv: nn.Conv2d) -> dict[str, Any]:
    return {
        "in_channels": conv.in_channels,
        "out_channels": conv.out_channels,
        "kernel_size": conv.kernel_size,
        "stride": conv.stride,
        "padding": conv.padding,
        "dilation": conv.dilation,
        "groups": conv.groups,
        "bias": conv.bias is not None,
        "padding_mode": conv.padding_mode,
    }
