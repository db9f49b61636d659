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
from surgery.taps import in_backward
from surgery_coded import energy
from surgery_coded.energy import Pair


class Words:
    """The codewords of the samples of one forward pass, (B, N); empty until its labels are known."""

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def read(self, like: Tensor) -> Tensor:
        """Return the words for a gradient of shape (B, N) or (B, N*d, H, W).

        Raises:
            SurgeryError: If no labels have been given for the forward pass.
        """
        if self.value is None or self.value.shape[0] != like.shape[0]:
            raise SurgeryError(
                "coded: gradient='masked' needs the labels before the backward pass; call surgery.Objective on the "
                "output of every forward pass first"
            )
        words = self.value.to(like.dtype)
        if like.dim() == 2:
            return words
        return words.repeat_interleave(like.shape[1] // words.shape[1], dim=1)[:, :, None, None]


class GradientMask:
    """Hands the labels of a forward pass to its backward pass: one object for each pair, so that passes may interleave.

    Where a block is computed anew during the backward pass (reentrant checkpointing), the labels given last are taken.
    """

    def __init__(self) -> None:
        self._next, self._last = Words(), Words()

    def __deepcopy__(self, memo: dict[int, Any]) -> GradientMask:
        """Return an empty one: the words belong to one forward pass of one network."""
        twin = GradientMask()
        memo[id(self)] = twin
        return twin

    @property
    def words(self) -> Words:
        """What the forward pass that is under way is to keep for its backward pass."""
        return self._last if in_backward() else self._next

    def fill(self, words: Tensor) -> None:
        """Give the last forward pass the codewords of its samples, (B, N)."""
        self._next.value = words
        self._last, self._next = self._next, Words()


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
        UnsupportedModel: See `mask_gradient`.
    """
    stride, padding, dilation = geometry
    raw = energy.branch_energies(hidden, weight, gain.shape[1], stride=stride, padding=padding, dilation=dilation)
    scale, energies = energy.normalize(mask_gradient(raw, mask) * active, total)
    x = mask_gradient(hidden, mask) * energy.channel_factors(gain * scale.unsqueeze(1), hidden)
    output: Tensor = _MaskedConvolution.apply(x, weight, bias, geometry, mask.words)  # type: ignore[no-untyped-call]
    return output, energies


def mask_gradient(value: Tensor, mask: GradientMask) -> Tensor:
    """Return `value`, whose gradient becomes zero in the inactive branches of each sample.

    Shape:
        value (B, N) or (B, N*d, H, W), the same.

    Raises:
        UnsupportedModel: If torch.compile traces it, which would bake the labels in; without `fullgraph=True` it then
            runs the block uncompiled.
    """
    if torch.compiler.is_compiling():
        raise UnsupportedModel("coded: gradient='masked' does not run under torch.compile; train it uncompiled")
    masked: Tensor = _Masked.apply(value, mask.words)  # type: ignore[no-untyped-call]
    return masked


class _Masked(torch.autograd.Function):
    """The identity, with a masked gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, words: Words) -> Tensor:
        ctx.words = words
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.words.read(grad), None


class _MaskedConvolution(torch.autograd.Function):
    """A convolution whose weight learns from the active branches of each sample only."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple[Pair, Pair, Pair], words: Words
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.geometry, ctx.words = geometry, words
        return F.conv2d(x, weight, bias, *geometry)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        words = ctx.words.read(x)
        stride, padding, dilation = (list(pair) for pair in ctx.geometry)
        sizes = None if bias is None else list(bias.shape)
        needed = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], bias is not None and ctx.needs_input_grad[2]]
        # The gradient of the weight is a sum over samples of what they read, so masking x masks it; that of x follows
        # from the output's gradient and the weight alone, and the normalization needs it whole.
        gradients: tuple[Tensor | None, ...] = torch.ops.aten.convolution_backward(
            grad, x * words, weight, sizes, stride, padding, dilation, False, [0, 0], 1, needed
        )
        return (*gradients, None, None)
