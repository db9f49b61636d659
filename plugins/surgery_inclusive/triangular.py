"""Convolutions whose k-th outputs read the first k parts of the input: the weight is lower block-triangular."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery.errors import InvalidOption
from surgery_inclusive.kernels import pointwise_sum, runs_here, triangular_pointwise
from surgery_inclusive.prefixes import PrefixCache
from surgery_inclusive.selection import Span

_ROWS = 32
"""Output channels from which on a 3x3 convolution of its own pays on a CPU, where it copies its input. Narrower ones
are joined, with zeros in place of what the triangle leaves out."""


class TriangularConv2d(nn.Module):
    """A convolution with y_k = sum_{j <= k} W_kj x_j + b_k, for K equal parts of the input and of the output.

    Args:
        weights: Row block k = (W_k1, ..., W_kk) for k = 1 to K.
        bias: Of all outputs, or None.
        stride: Of the convolution.
        padding: Of the convolution.
        dilation: Of the convolution.

    Attributes:
        mixes_channels: True: what comes out has channels of its own, for `surgery.channels`.

    Shape:
        weights (D, k C, h, w), bias (K D); the input (B, K C, H, W) becomes (B, K D, H', W').

    Reference: Lee & Shin (2018), section 3.2, the convolution that computes a.
    """

    mixes_channels = True

    def __init__(
        self,
        weights: Sequence[nn.Parameter],
        bias: nn.Parameter | None,
        *,
        stride: tuple[int, int],
        padding: str | tuple[int, int],
        dilation: tuple[int, int],
    ) -> None:
        super().__init__()
        self.weights = nn.ParameterList(weights)
        self.bias = bias
        self.stride, self.padding, self.dilation = stride, padding, dilation
        self.in_channels, self.kernel_size = weights[-1].shape[1], _pair(weights[-1].shape[2:])
        self.out_channels = len(weights) * len(weights[0])

    @classmethod
    def of(cls, conv: nn.Conv2d, subnetworks: int) -> Self:
        """Return the convolution with copies of the lower blocks of the weight of a dense one.

        Raises:
            InvalidOption: If `conv` is grouped, pads with other values than zeros, or cannot be divided.
        """
        if conv.groups > 1 or conv.padding_mode != "zeros":
            raise InvalidOption(
                f"TriangularConv2d: found groups={conv.groups} and padding_mode={conv.padding_mode!r}, expected a "
                "dense convolution that pads with zeros"
            )
        if subnetworks < 1 or conv.in_channels % subnetworks or conv.out_channels % subnetworks:
            raise InvalidOption(
                f"TriangularConv2d: found {conv.in_channels} input and {conv.out_channels} output channels, expected "
                f"multiples of subnetworks={subnetworks}; choose a number that divides both"
            )
        rows, columns = conv.out_channels // subnetworks, conv.in_channels // subnetworks
        weights = [
            _copied(conv.weight, conv.weight[k * rows : (k + 1) * rows, : (k + 1) * columns])
            for k in range(subnetworks)
        ]
        bias = None if conv.bias is None else _copied(conv.bias, conv.bias)
        padding = conv.padding if isinstance(conv.padding, str) else _pair(conv.padding)
        twin = cls(weights, bias, stride=_pair(conv.stride), padding=padding, dilation=_pair(conv.dilation))
        return twin.train(conv.training)

    def forward(self, input: Tensor) -> Tensor:
        """Return the outputs of all parts."""
        return self._outputs(self._read(input), 0, len(self.weights))

    def extra_repr(self) -> str:
        """Return the sizes, as a dense convolution shows them."""
        sizes = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        return f"{sizes}, padding={self.padding}, parts={len(self.weights)}, bias={self.bias is not None}"

    def _outputs(self, value: Tensor, start: int, stop: int) -> Tensor:
        """Return the outputs of the parts `start` to `stop`, for the first `stop` parts of what `_read` returns."""
        weights = list(self.weights)[start:stop]
        bias = self._bias(start, stop)
        if not runs_here(value) or len(value) == 1:  # the first channels of one image are contiguous: no copies
            return self._apart(value, weights, bias)
        if self._is_pointwise():
            outputs = triangular_pointwise(value, weights)
            return outputs if bias is None else outputs + bias[:, None, None]
        # The zeros that join blocks would carry what is not finite from one part to another: only in training.
        return self._apart(value, _joined(weights) if self.training else weights, bias)

    def _is_pointwise(self) -> bool:
        return self.kernel_size == (1, 1) and self.padding == (0, 0)

    def _read(self, value: Tensor) -> Tensor:
        """Return the positions of the input that a pointwise convolution reads; all, for another."""
        if not self._is_pointwise() or self.stride == (1, 1):
            return value
        down, across = self.stride
        return value[:, :, ::down, ::across]

    def _bias(self, start: int, stop: int) -> Tensor | None:
        rows = len(self.weights[0])
        return None if self.bias is None else self.bias[start * rows : stop * rows]

    def _apart(self, value: Tensor, weights: Sequence[Tensor], bias: Tensor | None) -> Tensor:
        """Return the outputs of one convolution for each row block."""
        stride = (1, 1) if self._is_pointwise() else self.stride
        biases = [None] * len(weights) if bias is None else bias.split([len(weight) for weight in weights])
        parts = [
            F.conv2d(value[:, : weight.shape[1]], weight, shift, stride, self.padding, self.dilation)
            for weight, shift in zip(weights, biases, strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class NestedTriangularConv2d(TriangularConv2d):
    """A triangular convolution of which a span of the parts is computed.

    Attributes:
        cache: The inputs read so far, while anytime prediction runs.
        remembering: Whether inputs are kept for the next span; `anytime` sets it.

    Shape:
        The first span is (0, k): (B, k C, H, W) to (B, k D, H', W'). One that begins with s > 0 gets the parts s to t
        alone, (B, (t - s) C, H, W), finds the ones before in the cache, and returns (B, (t - s) D, H', W').
    """

    def __init__(
        self,
        weights: Sequence[nn.Parameter],
        bias: nn.Parameter | None,
        *,
        stride: tuple[int, int],
        padding: str | tuple[int, int],
        dilation: tuple[int, int],
    ) -> None:
        super().__init__(weights, bias, stride=stride, padding=padding, dilation=dilation)
        self.cache = PrefixCache()
        self.remembering = False

    def forward(self, input: Tensor, span: Span) -> Tensor:  # type: ignore[override]
        """Return the outputs of the parts in `span`.

        Raises:
            InvalidOption: If the span does not go on where the one before stopped.
        """
        start, stop = span
        read = self._read(input)
        if not (start or self._remembers(stop)):
            return self._outputs(read, start, stop)
        parts = self.cache.add(read.contiguous() if self._is_pointwise() else read, start, stop)
        if stop - start > 1 or not self._is_summed(parts[0]):
            return self._outputs(torch.cat(parts, dim=1), start, stop)
        outputs, bias = pointwise_sum(parts, self.weights[start]), self._bias(start, stop)
        return outputs if bias is None else outputs + bias[:, None, None]

    def _is_summed(self, value: Tensor) -> bool:
        """Return whether the outputs are worked out from the parts of the input one by one."""
        return self._is_pointwise() and runs_here(value) and not torch.is_grad_enabled()

    def selected(self, keep: Sequence[int]) -> nn.Module:
        """Return the convolution of one sub-network by itself, 0 for the thinnest."""
        (index,) = keep
        weights = [_copied(weight, weight) for weight in list(self.weights)[: index + 1]]
        bias = None if self.bias is None else _copied(self.bias, self.bias[: len(weights) * len(weights[0])])
        if len(weights) == 1:
            return self._dense(weights[0], bias)
        twin = TriangularConv2d(weights, bias, stride=self.stride, padding=self.padding, dilation=self.dilation)
        return twin.train(self.training)

    def _remembers(self, stop: int) -> bool:
        recorded = self.training or torch.is_grad_enabled()
        return self.remembering and not recorded and stop < len(self.weights)

    def _dense(self, weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Conv2d:
        twin = nn.Conv2d(
            weight.shape[1],
            weight.shape[0],
            self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            bias=bias is not None,
            device="meta",
        )
        twin.weight, twin.bias = weight, bias
        return twin.train(self.training)


def _pair(sizes: Sequence[int]) -> tuple[int, int]:
    first, second = sizes
    return first, second


def _copied(parameter: Tensor, part: Tensor) -> nn.Parameter:
    return nn.Parameter(part.detach().clone(memory_format=torch.contiguous_format), parameter.requires_grad)


def _joined(weights: Sequence[Tensor]) -> list[Tensor]:
    """Join row blocks until they have `_ROWS` rows, or all: the same number in each."""
    rows, count = len(weights[0]), len(weights)
    size = next((size for size in range(1, count) if count % size == 0 and size * rows >= _ROWS), count)
    return [_padded(weights[k : k + size]) for k in range(0, count, size)]


def _padded(weights: Sequence[Tensor]) -> Tensor:
    if len(weights) == 1:
        return weights[0]
    width = weights[-1].shape[1]
    return torch.cat([F.pad(weight, (0, 0, 0, 0, 0, width - weight.shape[1])) for weight in weights])
