"""Batch norms of a network with several streams, with the state-dict keys of the norms they stand for.

The norm behind a merging convolution never sees what it normalizes: that would be C times as wide as in the source.
The convolution is pointwise, so mean and variance of its outputs follow from mean mu and covariance S of the hidden
channels. For a consumer that sums the branches with the mask m, with W the weights of all branches,

    mean_c = sum_k m_k W_k[c] mu_k,        var_c = sum_kl m_k m_l W_k[c] S_kl W_l[c],

and for one branch the same with a single k. Other kernels are convolved once more.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery_masked.geometry import Geometry, branch_outputs, by_branch, runs_eagerly
from surgery_masked.moments import moments

_STATISTICS = ("running_mean", "running_var")


class _Norm(nn.Module):
    """Affine parameters and `copies` sets of running statistics, under the names of a batch norm.

    Attributes:
        momentum: As in `nn.BatchNorm2d`; None for a cumulative average.
        track_running_stats: True, for `surgery.recalibrate_bn`.
    """

    repeated: ClassVar[tuple[str, ...]] = _STATISTICS
    divided: ClassVar[tuple[str, ...]] = ()

    weight: nn.Parameter
    bias: nn.Parameter
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, norm: nn.BatchNorm2d, copies: int) -> None:
        super().__init__()
        self.copies, self.eps, self.momentum, self.track_running_stats = copies, norm.eps, norm.momentum, True
        for name, parameter in norm.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
            if name in self.repeated:
                value = self._spread(name, parameter.detach())
                self.register_parameter(name, nn.Parameter(value, parameter.requires_grad))
        for name, buffer in norm.named_buffers(recurse=False):
            self.register_buffer(name, self._spread(name, buffer))

    @abstractmethod
    def forward(self, *values: Tensor) -> Tensor:
        """Return the normalized streams, or scale and shift for what was not written."""

    def reset_running_stats(self) -> None:
        """Start the statistics anew."""
        self.running_mean.zero_()
        self.running_var.fill_(1)
        self.num_batches_tracked.zero_()

    def coefficients(self, mean: Tensor, variance: Tensor) -> Tensor:
        """Return scale and shift, (2, copies, c), for statistics (copies, c)."""
        scale = self.weight.view(-1, mean.shape[1]) * (variance + self.eps).rsqrt()
        return torch.stack([scale, self.bias.view(-1, mean.shape[1]) - mean * scale])

    def running_coefficients(self) -> Tensor:
        """Return scale and shift for the running statistics."""
        return self.coefficients(self.running_mean.view(self.copies, -1), self.running_var.view(self.copies, -1))

    def batch_coefficients(self, mean: Tensor, variance: Tensor, count: int) -> Tensor:
        """Return scale and shift for the statistics of a batch of `count` values, which the running ones follow."""
        if count:
            self._track(mean, variance, count)
        return self.coefficients(mean, variance)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: int) -> None:
        self.num_batches_tracked.add_(1)
        momentum = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
        unbiased = variance * (count / max(count - 1, 1))
        for running, value in ((self.running_mean, mean), (self.running_var, unbiased)):
            running += momentum * (value.flatten().to(running.dtype) - running)

    def cut(self, copies: Sequence[int]) -> None:
        """Keep only these copies, in place."""
        index = torch.tensor(list(copies))
        for name in self.repeated:
            tensor = getattr(self, name)
            value = tensor.detach().view(self.copies, -1)[index.to(tensor.device)].flatten()
            is_parameter = isinstance(tensor, nn.Parameter)
            setattr(self, name, nn.Parameter(value, tensor.requires_grad) if is_parameter else value)
        self.copies = len(index)

    def _spread(self, name: str, value: Tensor) -> Tensor:
        if name not in self.repeated:
            return value
        return value.repeat(self.copies) / (self.copies if name in self.divided else 1)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Take the entries of the norm that this one stands for, too."""
        for name in self.repeated:
            value = state_dict.get(prefix + name)
            if value is not None and value.shape[0] * self.copies == len(getattr(self, name)):
                state_dict[prefix + name] = self._spread(name, value)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        """Return the sizes for `print(model)`."""
        return f"{len(self.running_mean) // self.copies}, copies={self.copies}, eps={self.eps}"


class StreamNorm(_Norm):
    """Normalize every stream by its own statistics, with one scale and shift for all.

    Shape:
        (B, S * c, H, W), returns the same.
    """

    def forward(self, *values: Tensor) -> Tensor:
        """Return the normalized streams."""
        (streams,) = values
        if self.training:
            self.num_batches_tracked.add_(1)
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None and self.training else self.momentum
        affine = (self.weight.repeat(self.copies), self.bias.repeat(self.copies))
        statistics = (self.running_mean, self.running_var)
        return F.batch_norm(streams, *statistics, *affine, self.training, momentum or 0.0, self.eps)

    def pruned(self, keep: Sequence[int]) -> StreamNorm:
        """Return the norm of the streams `keep`."""
        self.cut(keep)
        return self


class ConsumerNorm(_Norm):
    """Normalize every consumer's sum of branches by its own statistics, with one scale and shift for all.

    Shape:
        weight (c, C * d, kh, kw), hidden (B, C * d, H, W), mask (C', C), or None for one consumer that reads all;
        returns scale and shift, (2, C', c).
    """

    geometry: Geometry
    branches: int

    @classmethod
    def of(cls, norm: nn.BatchNorm2d, consumers: int, geometry: Geometry, branches: int) -> ConsumerNorm:
        """Return the norm of the sums of `branches` branches, which a convolution of this geometry would join."""
        made = cls(norm, consumers)
        made.geometry, made.branches = geometry, branches
        return made

    def forward(self, *values: Tensor) -> Tensor:
        """Return scale and shift, of the batch in train mode."""
        if not self.training:
            return self.running_coefficients()
        weight, hidden, *masks = values
        mask = masks[0] if masks else weight.new_ones(1, self.branches)
        mask = dense(mask, self.branches, weight.dtype)
        if self.geometry.is_pointwise(weight) and runs_eagerly(hidden):
            mean, variance = _sum_statistics(weight, hidden, mask)
            count = hidden.numel() // hidden.shape[1]
        else:
            outputs = branch_outputs(hidden, weight, self.branches, self.geometry)
            sums = torch.einsum("jk,bkchw->bjchw", mask.to(outputs.dtype), outputs).to(mask.dtype)
            variance, mean = torch.var_mean(sums, dim=(0, 3, 4), correction=0)
            count = sums.shape[0] * sums.shape[3] * sums.shape[4]
        return self.batch_coefficients(mean, variance, count)

    def pruned(self, keep: Sequence[int]) -> ConsumerNorm:
        """Return the norm of sums of only the branches `keep`."""
        self.branches = len(keep)
        return self

    def selected(self, keep: Sequence[int]) -> ConsumerNorm:
        """Return the norm of the consumers `keep`."""
        self.cut(keep)
        return self


class BranchNorm(_Norm):
    """Normalize what every branch adds by its own statistics, scale and shift.

    A source's norm of the sum is divided among the branches, so that the sum is the same in eval mode.

    Shape:
        weight (c, C * d, kh, kw), hidden (B, C * d, H, W); returns scale and shift, (2, C, c).
    """

    repeated: ClassVar[tuple[str, ...]] = ("weight", "bias", *_STATISTICS)
    divided: ClassVar[tuple[str, ...]] = ("bias", "running_mean")

    geometry: Geometry

    @classmethod
    def of(cls, norm: nn.BatchNorm2d, branches: int, geometry: Geometry) -> BranchNorm:
        """Return norms for `branches` branches, which a convolution of this geometry would join."""
        made = cls(norm, branches)
        made.geometry = geometry
        return made

    def forward(self, *values: Tensor) -> Tensor:
        """Return scale and shift, of the batch in train mode."""
        if not self.training:
            return self.running_coefficients()
        weight, hidden = values[:2]
        if self.geometry.is_pointwise(weight) and runs_eagerly(hidden):
            mean, covariance = moments(hidden, self.copies)
            apart = by_branch(weight, self.copies).flatten(2).to(mean.dtype)
            mean, variance = torch.bmm(apart, mean.unsqueeze(2)).squeeze(2), ((apart @ covariance) * apart).sum(dim=2)
            variance = variance.clamp(min=0)
            count = hidden.numel() // hidden.shape[1]
        else:
            outputs = branch_outputs(hidden, weight, self.copies, self.geometry).to(self.weight.dtype)
            variance, mean = torch.var_mean(outputs, dim=(0, 3, 4), correction=0)
            count = outputs.shape[0] * outputs.shape[3] * outputs.shape[4]
        return self.batch_coefficients(mean, variance, count)

    def pruned(self, keep: Sequence[int]) -> BranchNorm:
        """Return the norm of the branches `keep`."""
        self.cut(keep)
        return self


def dense(mask: Tensor, branches: int, dtype: torch.dtype) -> Tensor:
    """Return the mask (C', C) of connections that may be given as the branches that each consumer reads, (C', K)."""
    if mask.is_floating_point():
        return mask.to(dtype)
    return F.one_hot(mask, branches).sum(dim=1).to(dtype)


def _sum_statistics(weight: Tensor, hidden: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of every consumer's sums, (C', c) each, see the module's docstring."""
    branches = mask.shape[1]
    mean, covariance = moments(hidden)
    apart = by_branch(weight, branches).flatten(2).to(mean.dtype)  # (C, c, d)
    mask = mask.to(mean.dtype)
    means = torch.bmm(apart, mean.view(branches, -1, 1)).squeeze(2)
    against = torch.bmm(apart, covariance.view(branches, apart.shape[2], -1))  # (C, c, C * d)
    pairs = (against.unflatten(2, (branches, -1)) * apart.transpose(0, 1)).sum(dim=3)  # (C, c, C)
    variance = torch.einsum("jk,kcl,jl->jc", mask, pairs, mask)
    return mask @ means, variance.clamp(min=0)
