"""Convolutions whose weight has many zero blocks, on the CPU.

Output block k of a triangular pointwise convolution reads the first channels x_{:k} of the input with the matrix W_k:

    y_k = W_k x_{:k},        dl/dx_{:k} += W_k^T dl/dy_k,        dl/dW_k = sum_b dl/dy_k x_{:k}^T.

Every x_{:k} and y_k is a range of rows of one matrix for each image, so the products read and write in place, where a
convolution for each block would copy its input and its output, and fill a whole gradient with zeros. Products with few
rows are slow, since the other operand is rearranged anew for each; y is therefore summed up over column blocks: every
x_j is read once, for all the rows that it goes to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK_BYTES = 2 << 20
"""Of the images that one call takes, for each thread: as much as a core's second-level cache, or a little more."""

_SMALL = 49
"""Positions up to which the maps of all images are copied into one matrix, whose product is faster by more."""

_FAST = 8
"""Channels from which on oneDNN's grouped convolutions need no help; with one each they are depthwise, and fast."""


def runs_here(value: Tensor) -> bool:
    """Return whether the kernels can take a value: an ordinary one on the CPU, and nobody records the operations."""
    traced = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    changed = _is_transformed() or torch.is_autocast_enabled("cpu")
    plain = type(value) is Tensor and value.device.type == "cpu" and value.dim() == 4 and value.numel() > 0
    return plain and value.dtype in (torch.float32, torch.float64) and not traced and not changed


def triangular_pointwise(value: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Return the convolutions, each of the first channels, behind one another.

    Args:
        value: The input.
        weights: Each reads at least as many channels as the one before, the last one all.

    Shape:
        value (B, C, H, W), weights (D, C_k, 1, 1); returns (B, K D, H, W).
    """
    return _triangular(value, *weights)


def pointwise_sum(parts: Sequence[Tensor], weight: Tensor) -> Tensor:
    """Return the convolution of several values that stand for one, side by side, without gradients.

    Shape:
        parts (B, C_j, H, W), weight (D, C_1 + ... + C_J, 1, 1); returns (B, D, H, W).
    """
    matrices = [part.flatten(2) for part in parts]
    columns = weight.flatten(1).split([part.shape[1] for part in parts], dim=1)
    result = parts[0].new_empty(len(parts[0]), len(weight), *parts[0].shape[2:])
    rows = result.flatten(2)
    size = max(1, _CHUNK_BYTES * torch.get_num_threads() // (weight.shape[1] * rows.shape[2] * rows.element_size()))
    for start in range(0, len(rows), size):
        out = rows[start : start + size]
        for j, (matrix, column) in enumerate(zip(matrices, columns, strict=True)):
            read = matrix[start : start + size]
            if j:
                out.baddbmm_(column.expand(len(read), *column.shape), read)
            else:
                torch.bmm(column.expand(len(read), *column.shape), read, out=out)
    return result


def paired(weight: Tensor, groups: int) -> tuple[Tensor, int]:
    """Join the groups of a convolution until each reads `_FAST` channels, with zeros between those that are joined.

    oneDNN takes longer for the gradients of narrow groups than for those of the zeros.

    Shape:
        weight (G d, c, h, w) for G groups; returns (G d, j c, h, w) for G / j groups.
    """
    width = weight.shape[1]
    joined = _FAST // width if 1 < width < _FAST and _FAST % width == 0 else 1
    if joined == 1 or groups % joined:
        return weight, groups
    apart = weight.unflatten(0, (groups // joined, joined, -1))  # (G / j, j, d, c, h, w)
    empty = torch.zeros_like(apart)
    rows = [torch.cat([apart[:, i] if i == j else empty[:, j] for j in range(joined)], dim=2) for i in range(joined)]
    return torch.stack(rows, dim=1).flatten(0, 2), groups // joined


class _Layout(Enum):
    """How (B, C, H, W) becomes matrices (N, C, P)."""

    IMAGES = "a view, one matrix an image"
    MERGED = "a copy, one matrix"
    CHANNELS_LAST = "a view, one matrix with contiguous columns for each image, or for all where maps are small"


class _Range(NamedTuple):
    start: int
    length: int


class _Product(NamedTuple):
    """`matrix` times the rows `source` becomes the rows `goal`, or is added to them."""

    matrix: Tensor
    source: _Range
    goal: _Range
    adds: bool


class _Triangular(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(value, *weights)
        ctx.layout = _layout(value)
        blocks = [weight.flatten(1) for weight in weights]
        return _multiplied(_by_columns(blocks), value, len(blocks) * len(blocks[0]), ctx.layout)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        value, *weights = ctx.saved_tensors
        batched = _is_transformed() or torch._C._functorch.is_legacy_batchedtensor(gradient)
        if torch.is_grad_enabled() or batched:
            return _differentiable(ctx, gradient, value, weights)
        blocks = [weight.flatten(1) for weight in weights]
        to_value = None
        if ctx.needs_input_grad[0]:
            to_value = _multiplied(_pulled_back(blocks), gradient, value.shape[1], ctx.layout)
        to_weights: list[Tensor | None] = [None] * len(weights)
        if any(ctx.needs_input_grad[1:]):
            found = _to_weights(gradient, value, blocks, ctx.layout)
            to_weights = [to.view_as(weight) for to, weight in zip(found, weights, strict=True)]
        return to_value, *to_weights


_triangular: Callable[..., Tensor] = _Triangular.apply


def _by_columns(blocks: list[Tensor]) -> list[_Product]:
    """Return the products of a triangular weight, for each range of columns that the same blocks read."""
    rows, height, width = len(blocks[0]), len(blocks) * len(blocks[0]), blocks[-1].shape[1]
    whole = blocks[0].new_empty(height, width)  # nothing is read above the diagonal
    products, start = [], 0
    for k, block in enumerate(blocks):
        whole[k * rows : (k + 1) * rows, : block.shape[1]] = block
        goal, source = _Range(k * rows, height - k * rows), _Range(start, block.shape[1] - start)
        if source.length:
            matrix = whole.narrow(0, *goal).narrow(1, *source)
            products.append(_Product(matrix, source, goal, adds=start > 0))
        start = block.shape[1]
    return products


def _pulled_back(blocks: list[Tensor]) -> list[_Product]:
    """Return the products for the gradient of the input; the last block reaches all of it."""
    found = [_Product(w.mT, rows, columns, adds=True) for w, rows, columns in _ranges(blocks)]
    return [found[-1]._replace(adds=False), *found[:-1]]


def _ranges(blocks: list[Tensor]) -> Iterator[tuple[Tensor, _Range, _Range]]:
    """Yield each block with the rows that it writes and those that it reads."""
    for k, block in enumerate(blocks):
        yield block, _Range(k * len(block), len(block)), _Range(0, block.shape[1])


def _multiplied(products: list[_Product], value: Tensor, channels: int, layout: _Layout) -> Tensor:
    source = _matrices(value, layout)
    result = _room(value, channels, layout)
    merged = layout is _Layout.MERGED
    goal = result.new_empty(1, channels, source.shape[2]) if merged else _matrices(result, layout)
    for read, written in _chunks(source, goal):
        for matrix, rows, target, adds in products:
            matrices, out = matrix.expand(len(read), *matrix.shape), written.narrow(1, *target)
            if adds:
                out.baddbmm_(matrices, read.narrow(1, *rows))
            else:
                torch.bmm(matrices, read.narrow(1, *rows), out=out)
    if merged:
        result.copy_(goal.view(channels, len(value), *value.shape[2:]).transpose(0, 1))
    return result


def _to_weights(gradient: Tensor, value: Tensor, blocks: list[Tensor], layout: _Layout) -> list[Tensor]:
    found = [torch.zeros_like(block) for block in blocks]
    for read, pulled in _chunks(_matrices(value, layout), _matrices(gradient, layout)):
        for total, (_, rows, columns) in zip(found, _ranges(blocks), strict=True):
            total.addbmm_(pulled.narrow(1, *rows), read.narrow(1, *columns).mT)
    return found


def _differentiable(ctx: Any, gradient: Tensor, value: Tensor, weights: list[Tensor]) -> tuple[Any, ...]:
    """Return the gradients as something that can be differentiated again, or batched."""
    inputs = [value, *weights]
    needed = list(ctx.needs_input_grad)
    wanted = [tensor for tensor, is_needed in zip(inputs, needed, strict=True) if is_needed]
    with torch.enable_grad():
        output = torch.cat([F.conv2d(value.narrow(1, 0, w.shape[1]), w) for w in weights], dim=1)
        found = iter(torch.autograd.grad(output, wanted, gradient, create_graph=True))
    to_value, *to_weights = [next(found) if is_needed else None for is_needed in needed]
    return to_value, *to_weights


def _layout(value: Tensor) -> _Layout:
    if value.stride(1) == 1 and value.shape[1] > 1:
        return _Layout.CHANNELS_LAST
    return _Layout.MERGED if value.shape[2] * value.shape[3] <= _SMALL else _Layout.IMAGES


def _matrices(value: Tensor, layout: _Layout) -> Tensor:
    is_small = value.shape[2] * value.shape[3] <= _SMALL
    if layout is _Layout.IMAGES or (layout is _Layout.CHANNELS_LAST and not is_small):
        return value.flatten(2)
    return value.transpose(0, 1).reshape(1, value.shape[1], -1)


def _room(value: Tensor, channels: int, layout: _Layout) -> Tensor:
    last = layout is _Layout.CHANNELS_LAST
    return torch.empty(
        (len(value), channels, *value.shape[2:]),
        dtype=value.dtype,
        device=value.device,
        memory_format=torch.channels_last if last else torch.contiguous_format,
    )


def _chunks(source: Tensor, goal: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield both for a few matrices at a time."""
    size = max(1, _CHUNK_BYTES * torch.get_num_threads() // (source[0].numel() * source.element_size()))
    for start in range(0, len(source), size):
        yield source[start : start + size], goal[start : start + size]


def _is_transformed() -> bool:
    return torch._C._are_functorch_transforms_active()
