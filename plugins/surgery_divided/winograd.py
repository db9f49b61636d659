"""3x3 convolutions with a quarter of the multiplications, by overlapping tiles in a basis where they are products.

    Y = A^T [(G w G^T) * (B^T x B)] A

x: a tile of 6 x 6 values of one channel, every 4 rows and columns; w: weights; Y: the 4 x 4 results; *: elementwise,
and summed over channels.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from surgery_divided.choice import PACKED, WINOGRAD, Chooser, Runs
from surgery_divided.folding import SHAPE, layers_of, module_of
from surgery_divided.packed import PackedConv2d, is_plain_inference, state_of

_LAYOUT = torch.channels_last
_TYPES = (torch.float32, torch.float64)
_STEP, _TILE = 4, 6
_FEWEST = 16  # channels; with fewer, the changes of the basis take longer than a convolution
_TILES_AT_ONCE = 128  # what they become is 36 / 16 as large, and has to stay in the cache

# fmt: off
_B_T = ((4.0,  0.0, -5.0,  0.0, 1.0, 0.0),
        (0.0, -4.0, -4.0,  1.0, 1.0, 0.0),
        (0.0,  4.0, -4.0, -1.0, 1.0, 0.0),
        (0.0, -2.0, -1.0,  2.0, 1.0, 0.0),
        (0.0,  2.0, -1.0, -2.0, 1.0, 0.0),
        (0.0,  4.0,  0.0, -5.0, 0.0, 1.0))
_G = (( 1 / 4,       0,      0),
      (-1 / 6,  -1 / 6, -1 / 6),
      (-1 / 6,   1 / 6, -1 / 6),
      (1 / 24,  1 / 12,  1 / 6),
      (1 / 24, -1 / 12,  1 / 6),
      (     0,       0,      1))
_A_T = ((1.0, 1.0,  1.0, 1.0,  1.0, 0.0),
        (0.0, 1.0, -1.0, 2.0, -2.0, 0.0),
        (0.0, 1.0,  1.0, 4.0,  4.0, 0.0),
        (0.0, 1.0, -1.0, 8.0, -8.0, 1.0))
# fmt: on
_CONSTANT = 7  # of the 36: its column of A^T (x) A^T has ones only, so what is added there is added to every result


class WinogradConv2d(nn.Module):
    """A 3x3 convolution for inference, and the addition and ReLU that follow it, by products of tiles: F(4x4, 3x3).

    It transforms its weight for the first image that it sees, which takes four times the memory of the weight, and is
    neither saved nor copied. Float32 results differ from those of a convolution by about 1e-5 of the largest one.
    Wherever that does not apply (heights and widths that are no multiples of 4, other types and devices, gradients,
    compilers, exporters), it is the packed convolution.

    Args:
        conv: One for which `can_transform` holds; its weights are shared, not copied.

    Reference:
        Lavin & Gray, Fast algorithms for convolutional neural networks, 2016, section 4.3.
    """

    def __init__(self, conv: PackedConv2d) -> None:
        super().__init__()
        self.packed = copy.copy(conv)  # without the memory of what that has packed
        self._transformed: tuple[tuple[int, int], _Matrices] | None = None

    def forward(self, value: Tensor, other: Tensor | None = None) -> Tensor:
        """Return the convolution of a value, plus the other one, rectified.

        Shape:
            (B, C, H, W), and (B, D, H, W) like the result.
        """
        if not self._is_apt(value, other):
            result: Tensor = self.packed(value, other)
            return result
        value = value.contiguous(memory_format=_LAYOUT)
        shape = (len(value), len(self.packed.weight), *value.shape[2:])
        result = torch.empty(shape, dtype=value.dtype, memory_format=_LAYOUT)
        if other is not None and self._may_overwrite(other):
            result = other = other.contiguous(memory_format=_LAYOUT)
        matrices = self._matrices()
        for part in _parts(value):
            self._compute(matrices, value[part], None if other is None else other[part], result[part])
        return result

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the transformed weight, as the packed convolution does with its own."""
        return {**self.__dict__, "_transformed": None}

    def _apply(self, fn: Any, recurse: bool = True) -> WinogradConv2d:
        self._transformed = None
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call,no-any-return]

    def _is_apt(self, value: Tensor, other: Tensor | None) -> bool:
        weight, bias = self.packed.weight, self.packed.bias
        others = [tensor for tensor in (weight, bias, other) if tensor is not None]
        # Before all else: a size is none while a graph is traced.
        if not is_plain_inference(value, *others) or value.dim() != 4 or value.numel() == 0:
            return False
        if value.dtype not in _TYPES or value.shape[1] != weight.shape[1] or not fits(value.shape):
            return False
        if other is not None and other.shape != (len(value), len(weight), *value.shape[2:]):
            return False
        return all(tensor.device.type == "cpu" and tensor.dtype == value.dtype for tensor in (value, *others))

    def _may_overwrite(self, other: Tensor) -> bool:
        # Outside of inference mode, torch refuses to write to what was made in it.
        return self.packed.overwrites and (torch.is_inference_mode_enabled() or not other.is_inference())

    def _compute(self, matrices: _Matrices, value: Tensor, other: Tensor | None, result: Tensor) -> None:
        padded = F.pad(value.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
        tiles = padded.unfold(1, _TILE, _STEP).unfold(2, _TILE, _STEP).permute(4, 5, 0, 1, 2, 3)
        values = (matrices.forth @ tiles.reshape(_TILE**2, -1)).view(_TILE**2, -1, value.shape[1])
        products = torch.bmm(values, matrices.weight)  # (36, tiles, D)
        if self.packed.bias is not None:
            products[_CONSTANT] += self.packed.bias
        onto = _tiled(result)
        found = (matrices.back @ products.flatten(1)).view(onto.shape)
        if other is not None:
            torch.add(found, _tiled(other), out=onto)
            if self.packed.rectifies:
                result.relu_()
        elif self.packed.rectifies:
            torch.clamp_min(found, 0, out=onto)
        else:
            onto.copy_(found)

    def _matrices(self) -> _Matrices:
        key = state_of(self.packed.weight)
        if self._transformed is None or self._transformed[0] != key:
            with torch.inference_mode(mode=False), torch.no_grad():
                self._transformed = key, _Matrices(self.packed.weight.detach())
        return self._transformed[1]


class _Matrices:
    """What a convolution multiplies tiles by.

    Attributes:
        weight: The weight in the basis of the products, (36, C, D).
        forth: The change of a tile to that basis, (36, 36).
        back: The change of the products to results, (16, 36).
    """

    def __init__(self, weight: Tensor) -> None:
        # In float64, and only then rounded: G has sixths.
        to, of, result = (torch.tensor(matrix, dtype=torch.float64) for matrix in (_B_T, _G, _A_T))
        tiles = torch.einsum("pi,dcij,qj->pqcd", of, weight.double(), of)
        self.weight = tiles.flatten(0, 1).to(weight.dtype).contiguous()
        self.forth = torch.kron(to, to).to(weight.dtype)
        self.back = torch.kron(result, result).to(weight.dtype)


def _parts(value: Tensor) -> list[slice]:
    """Return images to be computed at once: few enough for the cache, enough for a product to be worth its weights."""
    tiles = value.shape[2] * value.shape[3] // _STEP**2
    images = max(1, _TILES_AT_ONCE // tiles)
    return [slice(start, start + images) for start in range(0, len(value), images)]


def _tiled(value: Tensor) -> Tensor:
    """Return a view (4, 4, B, H/4, W/4, D) of (B, D, H, W)."""
    rows: Tensor = value.permute(0, 2, 3, 1).unflatten(2, (-1, _STEP)).unflatten(1, (-1, _STEP))
    return rows.permute(2, 4, 0, 1, 3, 5)


def can_transform(conv: PackedConv2d) -> bool:
    """Return whether a convolution is a 3x3 one that keeps the size."""
    sizes = (conv.stride, conv.padding, conv.dilation)
    return conv.weight.shape[2:] == (3, 3) and conv.groups == 1 and all(size == [1, 1] for size in sizes)


def fits(shape: Sequence[int]) -> bool:
    """Return whether images (B, C, H, W) consist of whole tiles."""
    return shape[2] % _STEP == 0 and shape[3] % _STEP == 0


def transformed(network: fx.GraphModule, chooser: Chooser) -> fx.GraphModule:
    """Return a network in which convolutions are `WinogradConv2d` where that was faster.

    Args:
        network: As `packed.packed` returns it; its weights are shared, its graph stays as it is.
        chooser: Asked for every convolution that could be one.
    """
    graph, layers = fx.Graph(), layers_of(network)
    graph.output(graph.graph_copy(network.graph, {}))
    for node in graph.nodes:
        layer = module_of(node, layers)
        if isinstance(layer, PackedConv2d) and can_transform(layer) and min(layer.weight.shape[:2]) >= _FEWEST:
            shape = node.args[0].meta[SHAPE]
            if fits(shape):
                layers[node.target] = _faster(str(node.target), layer, shape, chooser)
    return fx.GraphModule(layers, graph).eval()


def _faster(path: str, conv: PackedConv2d, shape: tuple[int, ...], chooser: Chooser) -> PackedConv2d | WinogradConv2d:
    by_tiles = WinogradConv2d(conv)

    def runs(value: Tensor) -> Runs:
        other = [torch.ones_like(conv(value))] if conv.adds else []
        return {PACKED: lambda: conv(value, *other), WINOGRAD: lambda: by_tiles(value, *other)}

    kind = f"{conv}, overwrites={conv.overwrites}"
    chosen = chooser.faster(path.removesuffix("_packed"), kind, shape, conv.weight, runs)
    return by_tiles if chosen == WINOGRAD else conv
