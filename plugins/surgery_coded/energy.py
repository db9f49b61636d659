"""Energies of the branches of a merge convolution, without their outputs.

Branch n of N owns d input channels of the convolution that joins the branches; its output t_n = W_n h_n is C channels
wide, and only the sum over n is ever needed, except for the energy of each t_n. With P_n the patches that the kernel
sees (P x L, P = d * kernel area, L = output positions; for a 1x1 kernel simply h_n),

    E_n = mean(t_n^2) = |W_n P_n|^2 / (C L) = <W_n^T W_n, P_n P_n^T> / (C L),

two P x P Gram matrices in place of a tensor N times larger than the convolution's output. With G_n = W_n^T W_n this is
also the sum of p^T G_n p over the columns p of P_n. Where L is less than P that, or |W_n p|^2, needs less memory.

Precision: the Gram matrices, the energies and the scale are float32 for float16 and bfloat16 inputs, also under
autocast, and of the input's own dtype otherwise.

Reference: Coded ResNeXt (2022), Eq. 2 and 3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import product
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = tuple[int, int]

#: Least mean energy under the square root. Far below any energy of a live block, and its power -3/2, which the gradient
#: contains, is still finite in float32: a block that outputs zero keeps finite gradients. A bound and not a summand,
#: which the ONNX exporter takes for zero and leaves out: 0 / 0 came out where a block outputs zero.
EPS = 1e-20


def branch_energies(
    hidden: Tensor,
    weight: Tensor,
    branches: int,
    *,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
) -> Tensor:
    """Return E(t_n) of every branch, never negative.

    Shape:
        hidden (B, N*d, H, W), weight (C, N*d, kh, kw) of a convolution with groups=1; returns (B, N).

    Reference: Coded ResNeXt (2022), Eq. 2.
    """
    with full_precision(hidden):
        kernel = (weight.shape[2], weight.shape[3])
        columns = branch_columns(hidden, branches, kernel, stride, padding, dilation)
        if columns.shape[3] < columns.shape[2]:
            return column_energies(columns, weight)
        count = weight.shape[0] * columns.shape[3]
        return gram_energies(column_grams(columns), weight_grams(weight, branches), count)


def normalize(energies: Tensor, total: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the scale of every sample and the energies after the outputs were multiplied by it.

    The scale is 1 / sqrt(max(sum_n E_n / total, EPS)); `total` is the number of branches before any were removed
    (default: the number given). The scaled energies sum to `total`, unless all are zero.

    Shape:
        energies (B, N); returns (B,) and (B, N).

    Reference: Coded ResNeXt (2022), Eq. 3; the paper has no EPS.
    """
    scale = (energies.sum(dim=1) / (total or energies.shape[1])).clamp_min(EPS).rsqrt()
    return scale, energies * scale.square().unsqueeze(1)


def join(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gain: Tensor,
    active: Tensor,
    total: int,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
) -> tuple[Tensor, Tensor]:
    """Return the sum of the normalized branches, each times its gain, and the normalized energies.

    `gain` is the factor of a branch after the normalization, 0 for one that is switched off or dropped; a zero in
    `active` takes the branch out of the normalization, which divides by `total`.

    Shape:
        hidden (B, N*d, H, W), weight (C, N*d, kh, kw), bias (C,), gain and active (B, N); returns (B, C, H', W') and
        (B, N).
    """
    pointwise = tuple(weight.shape[2:]) == (1, 1) and stride == (1, 1) and padding == (0, 0)
    if pointwise and _can_fuse(hidden, weight, bias, gain):
        fused: Callable[..., tuple[Tensor, Tensor]] = _PointwiseJoin.apply
        return fused(hidden, weight, bias, gain, active, total)
    if pointwise:
        joined = _join(hidden, weight, bias, gain, active, total)
        return joined.output, joined.energies
    branches = gain.shape[1]
    raw = branch_energies(hidden, weight, branches, stride=stride, padding=padding, dilation=dilation)
    scale, energies = normalize(raw * active, total)
    x = hidden * channel_factors(gain * scale.unsqueeze(1), hidden)
    return F.conv2d(x, weight, bias, stride, padding, dilation), energies


def branch_columns(
    hidden: Tensor,
    branches: int,
    kernel: Pair = (1, 1),
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
) -> Tensor:
    """Return the patches that a kernel sees, per branch, in the accumulation dtype; a view where that is possible.

    Shape:
        hidden (B, N*d, H, W); returns (B, N, d*kh*kw, L) in the order of `weight.flatten(1)`.
    """
    if kernel == (1, 1) and padding == (0, 0):
        seen = hidden[:, :, :: stride[0], :: stride[1]] if stride != (1, 1) else hidden
    else:
        seen = _patches(hidden, kernel, stride, padding, dilation)
    columns: Tensor = seen.to(accumulation_dtype(hidden)).unflatten(1, (branches, -1)).flatten(3)
    return columns


def column_grams(columns: Tensor) -> Tensor:
    """Return P_n P_n^T: (B, N, P, L) to (B, N, P, P)."""
    return torch.matmul(columns, columns.transpose(2, 3))


def weight_grams(weight: Tensor, branches: int) -> Tensor:
    """Return W_n^T W_n in the accumulation dtype: (C, N*d, kh, kw) to (N, P, P)."""
    slices = weight_slices(weight.to(accumulation_dtype(weight)), branches)
    return torch.matmul(slices.transpose(1, 2), slices)


def weight_slices(weight: Tensor, branches: int) -> Tensor:
    """Return every branch's part of a merge weight, as a view where possible: (C, N*d, kh, kw) to (N, C, P)."""
    slices: Tensor = weight.flatten(1).unflatten(1, (branches, -1)).transpose(0, 1)
    return slices


def gram_energies(columns: Tensor, weights: Tensor, count: int) -> Tensor:
    """Return the inner products of the two Gram matrices over `count`: (B, N, P, P) and (N, P, P) to (B, N).

    An inner product of positive semidefinite matrices is not negative; rounding can make it so, hence the clamp.
    """
    products = torch.matmul(columns.flatten(2).transpose(0, 1), weights.flatten(1).unsqueeze(2))
    return products.squeeze(2).t().div(count).clamp_min(0.0)


def column_energies(columns: Tensor, weight: Tensor) -> Tensor:
    """Return the energies column by column: (B, N, P, L) and (C, N*d, kh, kw) to (B, N).

    Of |W_n p|^2 and p^T G_n p that with fewer products is taken; G_n itself costs C P^2.
    """
    batch, branches, reach, positions = columns.shape
    channels = weight.shape[0]
    batched = columns.permute(1, 2, 0, 3).flatten(2)  # (N, P, B*L)
    # Exported programs are to hold for every batch size, so that they must not depend on this choice.
    fewer = not _is_traced() and channels * batch * positions < reach * (batch * positions + channels)
    if fewer:
        squares = torch.bmm(weight_slices(weight.to(columns.dtype), branches), batched).square()
    else:
        squares = torch.bmm(weight_grams(weight, branches), batched) * batched
    totals: Tensor = squares.sum(dim=1).unflatten(1, (-1, positions)).sum(dim=2).t()
    return totals.div(channels * positions).clamp_min(0.0)


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """Return float32 for half-precision tensors and the tensor's own dtype otherwise."""
    return torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.dtype


def autocasts(tensor: Tensor) -> bool:
    """Return whether autocast is on for the tensor's device."""
    kind = tensor.device.type
    return kind != "meta" and torch.is_autocast_enabled(kind)  # the meta device has no autocast and raises


def full_precision(tensor: Tensor) -> AbstractContextManager[object]:
    """Return a context without autocast; an empty one where it is off, since exported graphs record the switch."""
    return torch.autocast(tensor.device.type, enabled=False) if autocasts(tensor) else nullcontext()


class _Joined(NamedTuple):
    output: Tensor  # (B, C, H, W)
    energies: Tensor  # (B, N), normalized
    scale: Tensor  # (B,)
    grams: Tensor  # (N, P, P), of the weight
    patch_grams: Tensor  # (B, N, P, P)


def _join(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gain: Tensor,
    active: Tensor,
    total: int,
) -> _Joined:
    branches = gain.shape[1]
    columns = branch_columns(hidden, branches)
    grams = weight_grams(weight, branches)
    patch_grams = column_grams(columns)
    raw = gram_energies(patch_grams, grams, weight.shape[0] * columns.shape[3])
    scale, energies = normalize(raw * active, total)
    x = hidden * channel_factors(gain * scale.unsqueeze(1), hidden)
    return _Joined(F.conv2d(x, weight, bias), energies, scale, grams, patch_grams)


def channel_factors(factors: Tensor, hidden: Tensor) -> Tensor:
    """Return one factor per channel of `hidden`: (B, N) to (B, N*d, 1, 1)."""
    # In float16 the factor of a dead block is beyond the range, and 0 * inf is not 0.
    if hidden.dtype == torch.float16:
        factors = factors.clamp(max=torch.finfo(torch.float16).max)
    width = hidden.shape[1] // factors.shape[1]
    return factors.to(hidden.dtype)[:, :, None].expand(-1, -1, width).flatten(1)[:, :, None, None]


def _can_fuse(hidden: Tensor, weight: Tensor, bias: Tensor | None, gain: Tensor) -> bool:
    # Compilers, exporters and the counting of operations must see plain operations; compilers also choose themselves
    # what to recompute.
    if _is_traced() or not torch.is_grad_enabled():
        return False
    trained = hidden.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    return trained and not gain.requires_grad


def _is_traced() -> bool:
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None


class _PointwiseJoin(torch.autograd.Function):
    """`_join` of a 1x1 convolution with a backward pass that saves no second copy of the input.

    Autograd would keep x = h * (m s) beside h for each block, and would add the gradient of the weight in two pieces,
    which for the last stages of a ResNeXt-50 are the larger part of the extra cost.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, gain: Tensor, active: Tensor, total: int
    ) -> tuple[Tensor, Tensor]:
        joined = _join(hidden, weight, bias, gain, active, total)
        ctx.save_for_backward(hidden, weight, bias, gain, active, *joined[1:])
        ctx.total = total
        return joined.output, joined.energies

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, grad_energies: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, gain, active, energies, scale, grams, patch_grams = ctx.saved_tensors
        if torch.is_grad_enabled():
            inputs = (hidden, weight, bias, gain, active, ctx.total)
            return _differentiable_backward(inputs, (grad_output, grad_energies), ctx.needs_input_grad[:3])
        factors = gain * scale.unsqueeze(1)
        x = hidden * channel_factors(factors, hidden)
        x_grad, weight_grad, bias_grad = _convolution_backward(grad_output, x, weight, bias, ctx.needs_input_grad)
        columns = branch_columns(hidden, gain.shape[1])
        x_columns = branch_columns(x_grad, gain.shape[1])
        # x is linear in the scale s, so d loss / d s = <d loss / d x, x> / s: one long product for each sample.
        scale_grad = torch.linalg.vecdot(x_grad.flatten(1), x.flatten(1)).to(scale.dtype) / scale
        slope = _energy_slope(grad_energies, scale_grad, energies, scale, ctx.total) * active
        slope = (slope * (2.0 / (weight.shape[0] * columns.shape[3])))[:, :, None, None]
        if ctx.needs_input_grad[1]:
            rows = slope.flatten(1).t().unsqueeze(1)
            moments = torch.matmul(rows, patch_grams.flatten(2).transpose(0, 1)).view(grams.shape)
            weight_grad = _add_energy_gradient(weight_grad, weight, moments)
        hidden_grad = None
        if ctx.needs_input_grad[0]:
            # In place: the gradient of x is ours, and on a CPU a fresh tensor of that size costs more than the product.
            pulled = x_columns.mul_(factors[:, :, None, None]).flatten(0, 1)
            pulled.baddbmm_((slope * grams).flatten(0, 1), columns.flatten(0, 1))
            hidden_grad = pulled.view(hidden.shape).to(hidden.dtype)
        return hidden_grad, weight_grad, bias_grad, None, None, None


def _energy_slope(grad_energies: Tensor, scale_grad: Tensor, energies: Tensor, scale: Tensor, total: int) -> Tensor:
    # d loss / d E_n for e_n = E_n s^2 and s = max(sum E / total, EPS)^(-1/2), with s from the output and from the e_n.
    square = scale.square()
    through_scale = scale_grad * scale * square + 2.0 * square * (grad_energies * energies).sum(dim=1)
    return grad_energies * square.unsqueeze(1) - (0.5 / total * through_scale).unsqueeze(1)


def _convolution_backward(
    grad_output: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, needed: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor | None]:
    # The gradient with respect to x is needed in any case: that of the weight passes through the scale.
    sizes = None if bias is None else list(bias.shape)
    mask = [True, needed[1], bias is not None and needed[2]]
    gradients: tuple[Tensor, Tensor, Tensor | None] = torch.ops.aten.convolution_backward(
        grad_output, x, weight, sizes, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, mask
    )
    return gradients


def _add_energy_gradient(weight_grad: Tensor, weight: Tensor, moments: Tensor) -> Tensor:
    # In place through a strided view: a second tensor of the weight's size would cost more than the product.
    accumulated = weight_grad.to(moments.dtype)
    slices = weight_slices(weight.to(moments.dtype), moments.shape[0])
    weight_slices(accumulated, moments.shape[0]).baddbmm_(slices, moments)
    return accumulated.to(weight.dtype)


def _differentiable_backward(
    inputs: tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, int],
    grads: tuple[Tensor, Tensor],
    needed: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    joined = _join(*inputs)
    wanted = [cast(Tensor, value) for value, need in zip(inputs[:3], needed, strict=True) if need]
    found = iter(torch.autograd.grad((joined.output, joined.energies), wanted, grads, create_graph=True))
    return (*(next(found) if need else None for need in needed), None, None, None)


def _patches(hidden: Tensor, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    # The shifted views of F.unfold, which XLA and exporters lack: (B, c, H, W) to (B, c*kh*kw, H', W').
    padded = F.pad(hidden, (padding[1], padding[1], padding[0], padding[0]))
    rows, columns = ((padded.shape[2 + i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in range(2))
    shifted = []
    for y, x in product(range(kernel[0]), range(kernel[1])):
        top, left = y * dilation[0], x * dilation[1]
        bottom, right = top + stride[0] * (rows - 1) + 1, left + stride[1] * (columns - 1) + 1
        shifted.append(padded[:, :, top : bottom : stride[0], left : right : stride[1]])
    return torch.stack(shifted, dim=2).flatten(1, 2)
