"""Batch norms of nested sub-networks, with the state-dict keys of the norms that they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery_inclusive.selection import Span


class IndependentNorm(nn.BatchNorm2d):
    """Statistics and parameters for every sub-network; the full one has those of the source.

    Args:
        norm: What it stands for; parameters and buffers are taken over.
        widths: Channels of the sub-networks below the full one; each begins with the first of the full one's.

    Shape:
        (B, C_k, H, W) to the same.

    Reference: Lee & Shin, Anytime neural prediction via slicing networks vertically (2018), section 3.1.
    """

    def __init__(self, norm: nn.BatchNorm2d, widths: Sequence[int]) -> None:
        super().__init__(**_settings(norm), device="meta")
        _take_over(self, norm)
        self.thin = nn.ModuleList([narrowed(norm, 0, width) for width in widths])

    def forward(self, input: Tensor, span: Span) -> Tensor:  # type: ignore[override]
        """Return the normalized channels of the sub-network that `span` ends with."""
        k = span[1]
        if k > len(self.thin):
            return super().forward(input)
        value: Tensor = self.thin[k - 1](input)
        return value

    def selected(self, keep: Sequence[int]) -> nn.Module:
        """Return the norm of one sub-network, 0 for the thinnest."""
        (index,) = keep
        return narrowed(self, 0, self.num_features) if index == len(self.thin) else self.thin[index]


class SharedNorm(nn.BatchNorm2d):
    """One norm for all sub-networks, of which each uses the first channels.

    Args:
        norm: What it stands for; parameters and buffers are taken over.
        parts: K, into how many equal parts the channels are divided.

    Shape:
        (B, (stop - start) C / K, H, W) to the same.
    """

    part_batches: Tensor

    def __init__(self, norm: nn.BatchNorm2d, parts: int) -> None:
        super().__init__(**_settings(norm), device="meta")
        _take_over(self, norm)
        self.parts = parts
        # A cumulative average counts for every part by itself: thin sub-networks leave the last ones alone.
        counts = torch.zeros(parts, dtype=torch.long, device=_device(norm))
        if norm.num_batches_tracked is not None:
            counts += norm.num_batches_tracked
        self.register_buffer("part_batches", counts)

    def forward(self, input: Tensor, span: Span) -> Tensor:  # type: ignore[override]
        """Return the normalized channels of the parts in `span`."""
        if self.training and self.track_running_stats and self.momentum is None:
            return self._averaged(input, span)
        if span == (0, self.parts):
            return super().forward(input)
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        return self._normalized(input, span, self.momentum or 0.0)

    def reset_running_stats(self) -> None:
        """Start the statistics anew."""
        super().reset_running_stats()
        if "part_batches" in self._buffers:  # not while the norm is built
            self.part_batches.zero_()

    def selected(self, keep: Sequence[int]) -> nn.Module:
        """Return the norm of one sub-network, 0 for the thinnest."""
        (index,) = keep
        return narrowed(self, 0, self.num_features // self.parts * (index + 1))

    def _averaged(self, input: Tensor, span: Span) -> Tensor:
        start, stop = span
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        self.part_batches[start:stop] += 1
        pieces = input.chunk(stop - start, dim=1)
        parts = range(start, stop)
        values = [
            self._normalized(piece, (j, j + 1), 1 / float(self.part_batches[j]))
            for j, piece in zip(parts, pieces, strict=True)
        ]
        return torch.cat(values, dim=1)

    def _normalized(self, input: Tensor, span: Span, momentum: float) -> Tensor:
        width = self.num_features // self.parts
        first, last = span[0] * width, span[1] * width
        mean, variance, weight, bias = (
            None if tensor is None else tensor[first:last]
            for tensor in (self.running_mean, self.running_var, self.weight, self.bias)
        )
        by_batch = self.training or mean is None
        if self.training and not self.track_running_stats:
            mean = variance = None
        return F.batch_norm(input, mean, variance, weight, bias, by_batch, momentum, self.eps)


def narrowed(norm: nn.BatchNorm2d, first: int, last: int) -> nn.BatchNorm2d:
    """Return a plain norm for the channels `first` to `last` of `norm`, with copies of what it has."""
    twin = nn.BatchNorm2d(**{**_settings(norm), "num_features": last - first}, device="meta")
    for name, parameter in _own(norm._parameters):
        setattr(twin, name, nn.Parameter(parameter.detach()[first:last].clone(), parameter.requires_grad))
    for name, buffer in _own(norm._buffers):
        if name in twin._buffers:
            twin._buffers[name] = buffer[first:last].clone() if buffer.dim() else buffer.clone()
    return twin.train(norm.training)


def _settings(norm: nn.BatchNorm2d) -> dict[str, Any]:
    return {
        "num_features": norm.num_features,
        "eps": norm.eps,
        "momentum": norm.momentum,
        "affine": norm.affine,
        "track_running_stats": norm.track_running_stats,
    }


def _take_over(twin: nn.BatchNorm2d, norm: nn.BatchNorm2d) -> None:
    twin._parameters.update(_own(norm._parameters))
    twin._buffers.update(_own(norm._buffers))
    twin.train(norm.training)


def _own(tensors: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(name, tensor) for name, tensor in tensors.items() if tensor is not None]


def _device(norm: nn.BatchNorm2d) -> torch.device | None:
    tensors = [tensor for tensor in (norm.running_mean, norm.weight) if tensor is not None]
    return tensors[0].device if tensors else None
