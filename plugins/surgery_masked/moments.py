"""Mean and covariance of hidden channels, from which the batch statistics of everything linear behind them follow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def moments(hidden: Tensor, branches: int = 1) -> tuple[Tensor, Tensor]:
    """Return mean and covariance of the channels over batch and positions, the latter within each branch.

    Shape:
        hidden (B, C * d, H, W); returns (C, d) and (C, d, d) in at least float32.
    """
    found: Callable[..., tuple[Tensor, Tensor]] = _Moments.apply
    return found(hidden, branches)


class _Moments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, branches: int) -> tuple[Tensor, Tensor]:
        exact = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        images, channels = exact.shape[:2]
        count = exact.numel() // channels
        mean = exact.mean(dim=(0, 2, 3)).view(branches, -1)
        rows = exact.reshape(images * branches, channels // branches, -1)
        second = torch.bmm(rows, rows.mT).unflatten(0, (images, branches)).sum(dim=0) / count
        ctx.save_for_backward(hidden, mean)
        ctx.count = count
        return mean, second - mean.unsqueeze(2) * mean.unsqueeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_mean: Tensor, to_covariance: Tensor) -> tuple[Tensor, None]:
        hidden, mean = ctx.saved_tensors
        branches = mean.shape[0]
        both = (to_covariance + to_covariance.mT) / ctx.count
        offset = to_mean.unsqueeze(2) / ctx.count - torch.bmm(both, mean.unsqueeze(2))
        images = len(hidden)
        rows = hidden.to(mean.dtype).reshape(images * branches, mean.shape[1], -1)
        gradient = torch.baddbmm(offset.repeat(images, 1, 1), both.repeat(images, 1, 1), rows)
        return gradient.view_as(hidden).to(hidden.dtype), None
