"""The wide part of a masked network, a few images at a time.

Between two blocks a masked network holds C streams where its source holds one. With h_k the hidden channels of branch
k, W_k its slice of the merging convolution, g and b the scale and shift of a normalization, s_k the shortcuts and m the
mask,

    Z_j = g_j * sum_k m_jk W_k h_k + b_j + a sum_k m_jk s_k,        x_j = Z_j, or ReLU(Z_j).

Only x_j is written: W_k h_k exists for a few images, which fit into the cache of the processor, and is worked out again
in the backward pass. With D = dl/dZ, the C' x C products of D and Y = W h, one table for every output channel c,

    T_c[j, k] = sum_p D_jcp Y_kcp,

give both the gradient of the scale, sum_k m_jk T_c[j, k], and that of the mask for all of its entries, sampled or not,
sum_c g_jc T_c[j, k], to which the shortcuts add a <D_j, s_k>.

On a GPU all images are taken at once: there is no cache to fit, and every call costs a launch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from surgery_masked.carrier import Carrier, carrier_of
from surgery_masked.memory import chunks, empty


class Mix(NamedTuple):
    """How the streams are joined.

    Attributes:
        shortcut: a, the factor of the shortcuts.
        rectify: Whether ReLU follows.
    """

    shortcut: float
    rectify: bool


def read_streams(streams: Tensor, weight: Tensor, stride: int = 1) -> Tensor:
    """Apply one pointwise convolution to each stream.

    Args:
        streams: The streams.
        weight: Of the convolutions.
        stride: Of every convolution, in both directions.

    Shape:
        streams (B, C * c, H, W), weight (C, d, c); returns (B, C * d, ceil(H / stride), ceil(W / stride)).
    """
    carrier = carrier_of(streams) if _is_followed(streams) else None
    collects = carrier is not None and not carrier.has_collector
    read: Callable[..., Tensor] = _Read.apply
    hidden = read(streams, weight, stride, carrier, collects)
    if carrier is not None and collects:
        carrier.collect(hidden)
    return hidden


def join(
    hidden: Tensor, shortcut: Tensor | None, weight: Tensor, scale: Tensor, shift: Tensor, mask: Tensor, mix: Mix
) -> Tensor:
    """Return the streams of the consumers, see the module's docstring.

    Shape:
        hidden (B, C * d, H, W), shortcut (B, C * c, H, W), or (B, c, H, W) for one that all branches share, weight
        (C, c, d), scale and shift (C', c), mask (C', C); returns (B, C' * c, H, W).
    """
    carrier = carrier_of(shortcut) if shortcut is not None and _is_followed(shortcut) else None
    joined: Callable[..., Tensor] = _Join.apply
    return joined(hidden, shortcut, weight, scale, shift, mask, mix, carrier)


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, streams: Tensor, weight: Tensor, stride: int, carrier: Carrier | None, collects: bool
    ) -> Tensor:
        streams = streams.contiguous()
        ctx.save_for_backward(streams, weight)
        ctx.stride, ctx.carrier, ctx.collects = stride, carrier, collects
        branches, width, _ = weight.shape
        positions = (-(-side // stride) for side in streams.shape[2:])
        hidden = streams.new_empty(len(streams), branches * width, *positions)
        for out, part in chunks(streams, hidden, streams):
            rows = _rows(_thinned(part, stride), branches)
            torch.bmm(_repeat(weight, len(part)), rows, out=_rows(out, branches))
        return hidden

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        streams, weight = ctx.saved_tensors
        gradient = gradient.contiguous()
        to_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        for grad, part in chunks(streams, gradient, streams):
            rows = _rows(_thinned(part, ctx.stride), len(weight))
            to_weight += _summed(torch.bmm(_rows(grad, len(weight)), rows.mT), len(weight))
        to_streams = _to_streams(ctx, gradient, streams, weight) if ctx.needs_input_grad[0] else None
        return to_streams, to_weight, None, None, None


def _to_streams(ctx: Any, gradient: Tensor, streams: Tensor, weight: Tensor) -> Tensor | None:
    """Return the gradient of the streams, with what others left; None where it is left for another one."""
    carrier, stride = ctx.carrier, ctx.stride
    left = carrier.take() if ctx.collects else []
    whole = left.pop(0)[0] if left and left[0][1] == 1 else None
    if stride == 1:
        own = _pulled_back(gradient, streams, weight, whole)
    else:
        thin = _pulled_back(gradient, streams, weight, None)
        if carrier is not None and carrier.is_awaited:
            carrier.leave(thin, stride)
            return None
        own = torch.zeros_like(streams) if whole is None else whole
        left.append((thin, stride))
    for value, skipped in left:
        own[:, :, ::skipped, ::skipped].add_(value)
    if carrier is not None and carrier.is_awaited:
        carrier.leave(own)
        return None
    return own


def _pulled_back(gradient: Tensor, streams: Tensor, weight: Tensor, onto: Tensor | None) -> Tensor:
    """Return the gradient at the positions that were read, added to one that is there in place."""
    branches = len(weight)
    out = empty(streams, (len(streams), streams.shape[1], *gradient.shape[2:])) if onto is None else onto
    for grad, part in chunks(streams, gradient, out):
        weights, rows, goal = _repeat(weight.mT, len(part)), _rows(grad, branches), _rows(part, branches)
        if onto is None:
            torch.bmm(weights, rows, out=goal)
        else:
            torch.baddbmm(goal, weights, rows, out=goal)
    return out


def _thinned(value: Tensor, stride: int) -> Tensor:
    """Return every `stride`-th row and column."""
    return value if stride == 1 else value[:, :, ::stride, ::stride].contiguous()


def _is_followed(value: Tensor) -> bool:
    return value.requires_grad and torch.is_grad_enabled()


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        shortcut: Tensor | None,
        weight: Tensor,
        scale: Tensor,
        shift: Tensor,
        mask: Tensor,
        mix: Mix,
        carrier: Carrier | None,
    ) -> Tensor:
        consumers, branches = mask.shape
        hidden = hidden.contiguous()
        shortcut = None if shortcut is None else shortcut.contiguous()
        joined = empty(hidden, (len(hidden), consumers * weight.shape[1], *hidden.shape[2:]))
        offset = shift.unsqueeze(-1)
        for out, part, through in chunks(joined, joined, hidden, shortcut):
            images = len(part)
            outputs = torch.bmm(_repeat(weight, images), _rows(part, branches))
            mixed = torch.bmm(_repeat(mask, images), outputs.view(images, branches, -1))
            wide = out.view(images, consumers, weight.shape[1], -1)
            torch.addcmul(offset, mixed.view_as(wide), scale.unsqueeze(-1), out=wide)
            if through is not None:
                _add_shortcut(wide, through, mask, mix.shortcut)
            if mix.rectify:
                wide.clamp_min_(0)
        ctx.mix, ctx.carrier = mix, carrier
        ctx.save_for_backward(hidden, shortcut, weight, scale, mask, joined if mix.rectify else None)
        return joined

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        hidden, shortcut, weight, scale, mask, joined = ctx.saved_tensors
        sums = _Sums.zeros(weight, mask)
        to_hidden = torch.empty_like(hidden)
        wanted = shortcut is not None and ctx.needs_input_grad[1]
        to_shortcut = empty(shortcut, shortcut.shape) if wanted else None
        learns = ctx.needs_input_grad[5]
        gradient = gradient.contiguous()
        tensors = (gradient, hidden, shortcut, joined, to_hidden, to_shortcut)
        for grad, part, through, result, out, out_through in chunks(gradient, *tensors):
            if result is not None:
                grad = torch.ops.aten.threshold_backward(grad, result, 0)
            wide = grad.view(len(part), *scale.shape, -1)
            if through is not None and learns:
                _to_mask(sums.shortcuts, wide, through)
            if out_through is not None:
                _to_shortcut(out_through, wide, mask, ctx.mix.shortcut)
            _to_hidden(out, sums, wide * scale.unsqueeze(-1), part, weight, mask)
            sums.shift.add_(wide.sum(dim=(0, 3)))
            outputs = torch.bmm(_repeat(weight, len(part)), _rows(part, mask.shape[1]))
            _tables(sums.tables, wide, outputs.view(len(part), mask.shape[1], weight.shape[1], -1))
        exact = sums.tables.dtype
        to_mask = torch.einsum("cjk,jc->jk", sums.tables, scale.to(exact)) + ctx.mix.shortcut * sums.shortcuts
        to_scale = torch.einsum("cjk,jk->jc", sums.tables, mask.to(exact))
        if to_shortcut is not None and ctx.carrier is not None and ctx.carrier.is_awaited:
            ctx.carrier.leave(to_shortcut)
            to_shortcut = None
        to_mask = to_mask if learns else None
        return to_hidden, to_shortcut, sums.weight, to_scale, sums.shift, to_mask, None, None


class _Sums(NamedTuple):
    """What the backward pass adds up over the images."""

    weight: Tensor  # (C, c, d)
    shift: Tensor  # (C', c)
    tables: Tensor  # (c, C', C)
    shortcuts: Tensor  # (C', C)

    @classmethod
    def zeros(cls, weight: Tensor, mask: Tensor) -> _Sums:
        channels, dtype = weight.shape[1], torch.promote_types(weight.dtype, torch.float32)
        sizes = (weight.shape, (mask.shape[0], channels), (channels, *mask.shape), mask.shape)
        return cls(*(weight.new_zeros(size, dtype=dtype) for size in sizes))


def _add_shortcut(wide: Tensor, through: Tensor, mask: Tensor, factor: float) -> None:
    """Add the shortcuts that the mask selects to the sums (n, C', c, P), in place."""
    images, consumers, channels, positions = wide.shape
    if _is_shared(through, channels, mask):
        counts = factor * mask.sum(dim=1)
        wide.addcmul_(through.view(images, 1, channels, positions), counts.view(1, consumers, 1, 1))
        return
    flat = wide.view(images, consumers, -1)
    torch.baddbmm(flat, _repeat(mask, images), _rows(through, mask.shape[1], flat=True), alpha=factor, out=flat)


def _to_shortcut(out: Tensor, wide: Tensor, mask: Tensor, factor: float) -> None:
    images, consumers, channels, _ = wide.shape
    if _is_shared(out, channels, mask):
        counts = factor * mask.sum(dim=1)
        torch.sum(wide * counts.view(1, consumers, 1, 1), dim=1, out=out.view(images, channels, -1))
        return
    weights = _repeat(factor * mask.mT, images)
    torch.bmm(weights, wide.view(images, consumers, -1), out=_rows(out, mask.shape[1], flat=True))


def _to_mask(total: Tensor, wide: Tensor, through: Tensor) -> None:
    """Add the products of the gradients (n, C', c, P) with the shortcuts."""
    images, consumers, channels, _ = wide.shape
    flat = wide.reshape(images, consumers, -1)
    if _is_shared(through, channels, total):
        total.add_(torch.bmm(flat, through.reshape(images, -1, 1)).sum(dim=0))
    else:
        total.add_(torch.bmm(flat, _rows(through, total.shape[1], flat=True).mT).sum(dim=0))


def _to_hidden(out: Tensor, sums: _Sums, scaled: Tensor, part: Tensor, weight: Tensor, mask: Tensor) -> None:
    images, branches = len(part), mask.shape[1]
    mixed = torch.bmm(_repeat(mask.mT, images), scaled.view(images, mask.shape[0], -1))
    to_outputs = mixed.view(images * branches, weight.shape[1], -1)
    sums.weight.add_(_summed(torch.bmm(to_outputs, _rows(part, branches).mT), branches))
    torch.bmm(_repeat(weight.mT, images), to_outputs, out=_rows(out, branches))


def _tables(total: Tensor, wide: Tensor, outputs: Tensor) -> None:
    """Add T_c, see the module's docstring, over the images."""
    for gradient, output in zip(wide, outputs, strict=True):
        total.add_(torch.bmm(gradient.transpose(0, 1), output.permute(1, 2, 0)))


def _is_shared(through: Tensor, channels: int, mask: Tensor) -> bool:
    return through.shape[1] == channels and mask.shape[1] > 1


def _rows(value: Tensor, branches: int, flat: bool = False) -> Tensor:
    """View (n, C * c, H, W) as (n * C, c, P), or as (n, C, c * P)."""
    images = len(value)
    return (
        value.reshape(images, branches, -1) if flat else value.view(images * branches, value.shape[1] // branches, -1)
    )


def _repeat(matrices: Tensor, images: int) -> Tensor:
    """Return the matrices (C, r, s), or one (r, s), once for every image."""
    if matrices.dim() == 2:
        return matrices.expand(images, *matrices.shape)
    return matrices.expand(images, *matrices.shape).flatten(0, 1)


def _summed(products: Tensor, branches: int) -> Tensor:
    return products.view(-1, branches, *products.shape[1:]).sum(dim=0)
