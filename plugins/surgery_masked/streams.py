"""Convolutions of a network with several streams: what reads them, and what all of them share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery_masked import kernels
from surgery_masked.geometry import Geometry, autocast_dtype, runs_eagerly


class StreamConv2d(nn.Module):
    """Apply a convolution whose outputs are divided among the branches, each to the branch's own stream.

    Weight and multiply-adds are those of the convolution it stands for, which applies to one stream.

    Shape:
        (B, C * c, H, W), returns (B, C * d, H', W').
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, conv: nn.Conv2d, branches: int) -> None:
        super().__init__()
        self.register_parameter("weight", cast(nn.Parameter, conv.weight))
        self.register_parameter("bias", cast("nn.Parameter | None", conv.bias))
        self.geometry = Geometry.of(conv)
        self.branches = branches

    def forward(self, streams: Tensor) -> Tensor:
        """Return what the branches make of their streams."""
        if not (runs_eagerly(streams) and self.geometry.is_pointwise(self.weight)):
            return F.conv2d(streams, self.weight, self.bias, *self.geometry, groups=self.branches)
        dtype = autocast_dtype(streams)
        weight = self.weight.view(self.branches, -1, self.weight.shape[1]).to(dtype)
        hidden = kernels.read_streams(streams.to(dtype), weight)
        return hidden if self.bias is None else hidden + self.bias.to(dtype)[:, None, None]

    def pruned(self, keep: Sequence[int]) -> StreamConv2d:
        """Return the convolution of the branches `keep`."""
        index = torch.tensor(list(keep), device=self.weight.device)
        for name, parameter in list(self.named_parameters()):
            value = parameter.detach().unflatten(0, (self.branches, -1))[index].flatten(0, 1)
            self.register_parameter(name, nn.Parameter(value, parameter.requires_grad))
        self.branches = len(index)
        return self

    def extra_repr(self) -> str:
        """Return the sizes for `print(model)`."""
        outputs, inputs, *kernel = self.weight.shape
        return f"{self.branches} x {inputs}, {outputs}, kernel_size={tuple(kernel)}, stride={self.geometry.stride}"


class SharedConv2d(nn.Module):
    """Apply one convolution to every stream.

    Shape:
        (B, S * c, H, W), returns (B, S * c', H', W').
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.register_parameter("weight", cast(nn.Parameter, conv.weight))
        self.register_parameter("bias", cast("nn.Parameter | None", conv.bias))
        self.geometry, self.groups = Geometry.of(conv), conv.groups

    def forward(self, streams: Tensor) -> Tensor:
        """Return the streams behind the convolution."""
        batch, width = streams.shape[0], self.weight.shape[1] * self.groups
        if runs_eagerly(streams) and self._is_pointwise:
            dtype = autocast_dtype(streams)
            weight = self.weight.flatten(1).to(dtype).expand(streams.shape[1] // width, -1, -1)
            outputs = kernels.read_streams(streams.to(dtype), weight, self.geometry.stride[0])
            return outputs if self.bias is None else outputs + self.bias.to(dtype).repeat(len(weight))[:, None, None]
        single = streams.reshape(-1, width, *streams.shape[2:])
        outputs = F.conv2d(single, self.weight, self.bias, *self.geometry, groups=self.groups)
        return outputs.reshape(batch, -1, *outputs.shape[2:])

    @property
    def _is_pointwise(self) -> bool:
        down, right = self.geometry.stride
        still = self.geometry._replace(stride=(1, 1))
        return self.groups == 1 and down == right and still.is_pointwise(self.weight)

    def pruned(self, keep: Sequence[int]) -> SharedConv2d:
        """Return itself: fewer streams are convolved as before."""
        return self

    def extra_repr(self) -> str:
        """Return the sizes for `print(model)`."""
        outputs, inputs, *kernel = self.weight.shape
        return f"{inputs * self.groups}, {outputs}, kernel_size={tuple(kernel)}, stride={self.geometry.stride}"


class MergeWeight(nn.Module):
    """Hold the weight of the convolution that joins the branches, which is applied where the mask is known.

    Shape:
        hidden, not looked at; returns the weight (c, C * d, kh, kw).
    """

    weight: nn.Parameter

    def __init__(self, conv: nn.Conv2d, branches: int) -> None:
        super().__init__()
        self.register_parameter("weight", cast(nn.Parameter, conv.weight))
        self.branches = branches

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the weight."""
        return self.weight

    def pruned(self, keep: Sequence[int]) -> MergeWeight:
        """Return the weight of the branches `keep`."""
        index = torch.tensor(list(keep), device=self.weight.device)
        value = self.weight.detach().unflatten(1, (self.branches, -1))[:, index].flatten(1, 2)
        self.weight = nn.Parameter(value, self.weight.requires_grad)
        self.branches = len(index)
        return self

    def extra_repr(self) -> str:
        """Return the sizes for `print(model)`."""
        outputs, inputs, *kernel = self.weight.shape
        return f"{inputs}, {outputs}, kernel_size={tuple(kernel)}, branches={self.branches}"
