"""Mean and covariance of hidden channels, from which the batch statistics of everything linear behind them follow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from surgery_masked.memory import chunks


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
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        hidden, count = hidden.contiguous(), hidden.numel() // hidden.shape[1]
        mean = hidden.mean(dim=(0, 2, 3), dtype=dtype)
        width = hidden.shape[1] // branches
        covariance = mean.new_zeros(branches, width, width)
        for (part,) in chunks(hidden, hidden):
            # Centred first: a difference of squares has no digits left where the mean is large.
            rows = (part - mean[:, None, None]).view(len(part) * branches, width, -1)
            covariance += torch.bmm(rows, rows.mT).unflatten(0, (-1, branches)).sum(dim=0)
        mean = mean.view(branches, width)
        ctx.save_for_backward(hidden, mean)
        ctx.count = count
        return mean, covariance / count

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
