"""The variant without a coding loss: a branch learns only from the samples of its own classes.

The output is that of the coded convolution. Going back, the gradient of every branch output t_n of a sample of class k
is multiplied by w_{k,n}, so that inactive branches pass no gradient on, neither to their part of the weight nor to
what they read nor through the normalization. The labels are not known in the forward pass; the mask is filled in
between, by the method's `losses`.

Reference: Coded ResNeXt (2022), appendix E: gradients "directed to the subNNs that according to the coding scheme
should remain inactive" are zeroed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from surgery.errors import SurgeryError, UnsupportedModel
from surgery_coded import energy
from surgery_coded.energy import Pair


class GradientMask:
    """The codewords of the samples of the last forward pass, (B, N), set between forward and backward."""

    def __init__(self) -> None:
        self.words: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> GradientMask:
        """Return an empty one: the words belong to one forward pass of one network."""
        twin = GradientMask()
        memo[id(self)] = twin
        return twin

    def read(self, like: Tensor) -> Tensor:
        """Return the words for a gradient of shape (B, N) or (B, N*d, H, W).

        Raises:
            SurgeryError: If no labels have been given since the forward pass.
        """
        if self.words is None or self.words.shape[0] != like.shape[0]:
            raise SurgeryError(
                "coded: gradient='masked' needs the labels before the backward pass; call surgery.Objective on the "
                "output first"
            )
        words = self.words.to(like.dtype)
        if like.dim() == 2:
            return words
        return words.repeat_interleave(like.shape[1] // words.shape[1], dim=1)[:, :, None, None]


def masked_join(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gain: Tensor,
    active: Tensor,
    total: int,
    geometry: tuple[Pair, Pair, Pair],
    mask: GradientMask,
) -> tuple[Tensor, Tensor]:
    """Return the output of the coded convolution and its normalized energies, with masked gradients.

    Shape:
        hidden (B, N*d, H, W), weight (C, N*d, kh, kw), gain and active (B, N); returns (B, C, H', W') and (B, N).

    Raises:
        UnsupportedModel: Under torch.compile, which would bake the labels in.
    """
    if torch.compiler.is_compiling():
        raise UnsupportedModel("coded: gradient='masked' does not run under torch.compile; train it uncompiled")
    stride, padding, dilation = geometry
    raw = energy.branch_energies(hidden, weight, gain.shape[1], stride=stride, padding=padding, dilation=dilation)
    scale, energies = energy.normalize(mask_gradient(raw, mask) * active, total)
    x = mask_gradient(hidden, mask) * energy.channel_factors(gain * scale.unsqueeze(1), hidden)
    output: Tensor = _MaskedConvolution.apply(x, weight, bias, geometry, mask)  # type: ignore[no-untyped-call]
    return output, energies


def mask_gradient(value: Tensor, mask: GradientMask) -> Tensor:
    """Return `value`, whose gradient becomes zero in the inactive branches of each sample.

    Shape:
        value (B, N) or (B, N*d, H, W), the same.
    """
    masked: Tensor = _Masked.apply(value, mask)  # type: ignore[no-untyped-call]
    return masked


class _Masked(torch.autograd.Function):
    """The identity, with a masked gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, mask: GradientMask) -> Tensor:
        ctx.mask = mask
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.mask.read(grad), None


class _MaskedConvolution(torch.autograd.Function):
    """A convolution whose weight learns from the active branches of each sample only."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple[Pair, Pair, Pair], mask: GradientMask
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.geometry, ctx.mask = geometry, mask
        return F.conv2d(x, weight, bias, *geometry)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        words = ctx.mask.read(x)
        stride, padding, dilation = (list(pair) for pair in ctx.geometry)
        sizes = None if bias is None else list(bias.shape)
        needed = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], bias is not None and ctx.needs_input_grad[2]]
        # The gradient of the weight is a sum over samples of what they read, so masking x masks it; that of x follows
        # from the output's gradient and the weight alone, and the normalization needs it whole.
        gradients: tuple[Tensor | None, ...] = torch.ops.aten.convolution_backward(
            grad, x * words, weight, sizes, stride, padding, dilation, False, [0, 0], 1, needed
        )
        return (*gradients, None, None)
