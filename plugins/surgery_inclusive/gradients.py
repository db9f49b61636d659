"""Let parameters take part in a backward pass that does not need them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class _Reach(torch.autograd.Function):
    """Pass a value on; the parameters beside it get gradients of zero."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return gradient, *(torch.zeros_like(parameter) for parameter in ctx.saved_tensors)


def reach(value: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    """Return `value`, whose gradient gives each of `parameters` a gradient of zero.

    DistributedDataParallel waits for the gradient of every parameter, also of those that this pass left out.
    """
    passed: Tensor = _Reach.apply(value, *parameters)  # type: ignore[no-untyped-call]
    return passed
