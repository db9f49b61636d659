"""Where channels go in operations that mix them: enough to change a width when weights are drawn or trained anew.

Exact pruning has to leave the channels alone that a group norm or an attention mixes. A thinner copy of the network
has nothing to preserve, so all that counts is whether an operation takes its sizes from what it reads.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx, nn

from surgery.shapes import SIZE

if TYPE_CHECKING:
    from surgery.channels import ChannelMap

_RESHAPES = ("view", "reshape", "expand")
_PERMUTATIONS = ("permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis")
_PRODUCTS = ("matmul", "bmm")
_SUMS = ("mean", "sum", "amax", "max", "std", "var", "norm", *_PRODUCTS)
_READS = ("getattr", "size", "dim", "numel")
_COUNTS = ("num_channels", "num_features", "num_parameters", "channels", "normalized_shape")
_GROUPS = ("num_groups", "groups")


def cut_followed(owner: nn.Module, path: str, width: int, keep: Tensor) -> None:
    """Keep only some of `width` channels of the layer, parameter or buffer at `path` of `owner`."""
    holder, _, name = path.rpartition(".")
    parent = owner.get_submodule(holder)
    old = getattr(parent, name)
    new = _slice_layer(old, width, keep) if isinstance(old, nn.Module) else _slice_tensor(old, width, keep)
    setattr(parent, name, new)


def function_name(node: fx.Node) -> str:
    """Return the name of the function or tensor method that `node` calls."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def readable(channels: ChannelMap, layer: nn.Conv2d | nn.Linear, path: str, source: int | None) -> int:
    """Return the space that a layer reads: `source`, or one that cannot change where its input was not followed."""
    width = layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features
    if source is not None and channels.sizes[channels.find(source)] == width:
        return source
    if source is not None:
        _lose(channels, [source], path, path)
    return channels.new(width, f"{path} reads what is not followed", path)


def follow_layer(channels: ChannelMap, module: nn.Module, path: str, node: fx.Node, source: int) -> int | None:
    """Return where the channels `source` of what `node` reads are after a layer that is no convolution."""
    width = channels.sizes[channels.find(source)]
    if not _carries(node, node.all_input_nodes[0], width) or not _is_per_channel(module, width):
        _lose(channels, [source], f"{path} ({type(module).__name__})", path)
        return None
    if isinstance(module, (nn.GroupNorm, nn.LayerNorm)) or any(width in tensor.shape for tensor in _tensors(module)):
        channels.follow(path, source)
    return source


def follow(channels: ChannelMap, prefix: str, node: fx.Node, spaces: dict[fx.Node, int | None]) -> int | None:
    """Return the space of the channels of a function, tensor method or parameter of a graph."""
    if node.op == "get_attr":
        return _follow_parameter(channels, f"{prefix}{node.target}", node)
    known = {source: space for source in node.all_input_nodes if (space := spaces.get(source)) is not None}
    if not known or _reads_shape(node):
        _hold_sizes(channels, node, spaces)
        return None
    source, space = next(iter(known.items()))
    width = channels.sizes[channels.find(space)]
    others = [other for other in node.all_input_nodes if other not in known]
    sizes = {channels.sizes[channels.find(other)] for other in known.values()}
    if sizes == {width} and not any(_clashes(node, other, width) for other in others):
        for other in known.values():
            channels.union(space, other)
        if _carries(node, source, width):
            return space
        if _sums(node):
            return None
        if part := _folded(node, width):
            # Which channels are folded into one is of no account: what computes them is drawn or trained anew.
            return channels.fold(space, part)
    _lose(channels, known.values(), node.name)
    return None


def _follow_parameter(channels: ChannelMap, path: str, node: fx.Node) -> int | None:
    width = _parameter_width(node.meta.get(SIZE, ()))
    if width == 1:
        return None
    space = channels.new(width)
    channels.follow(path, space)
    return space


def _hold_sizes(channels: ChannelMap, node: fx.Node, spaces: dict[fx.Node, int | None]) -> None:
    """Pin the spaces whose sizes `node` gives to values that are not followed, as heads that are joined again."""
    for source, size in _sizes_read(node):
        space = spaces.get(source)
        if space is not None and channels.sizes[channels.find(space)] == size:
            _lose(channels, [space], node.name)


def _lose(channels: ChannelMap, spaces: Iterable[int], what: str, path: str = "") -> None:
    for space in spaces:
        channels.pin(space, f"{what} fixes how many there are, or cannot be followed", path)


def _reads_shape(node: fx.Node) -> bool:
    """Return whether `node` returns no tensor but what a tensor is like."""
    return SIZE not in node.meta and function_name(node) in _READS


def _sums(node: fx.Node) -> bool:
    """Return whether a dimension that the result of `node` lacks was summed or averaged over."""
    return SIZE in node.meta and function_name(node) in _SUMS


def _carries(node: fx.Node, source: fx.Node, width: int) -> bool:
    """Return whether the result of `node` has the `width` channels of `source`, and would if they were fewer."""
    size, before = node.meta.get(SIZE), source.meta.get(SIZE)
    if size is None or before is None or width not in before:
        return False
    name = function_name(node)
    if node.op != "call_module" and name in _RESHAPES:
        return width in _followed(node)
    if node.op != "call_module" and name not in _PERMUTATIONS and len(size) == len(before):
        return int(size[_axis(before, width)]) == width
    return width in size


def _folded(node: fx.Node, width: int) -> int | None:
    """Return what is left of `width` channels where `node` views them as a fixed number of times as many, or None."""
    if node.op != "call_method" or function_name(node) not in _RESHAPES:
        return None
    entries, size = _entries(node), node.meta.get(SIZE, ())
    for place, entry in enumerate(entries[1:], 1):
        fixed = isinstance(entries[place - 1], int) and isinstance(entry, fx.Node)
        if fixed and size[place - 1] * size[place] == width:
            return int(size[place])
    return None


def _clashes(node: fx.Node, source: fx.Node, width: int) -> bool:
    """Return whether `node` combines `width` channels with as many other values of `source`, which nothing follows."""
    size, other = node.meta.get(SIZE, ()), source.meta.get(SIZE, ())
    if width not in size or function_name(node) in _PRODUCTS:
        return list(other).count(width) > (width in size)
    place = _axis(size, width) - len(size) + len(other)  # where the last dimensions are aligned
    return 0 <= place < len(other) and other[place] == width


def _sizes_read(node: fx.Node) -> list[tuple[fx.Node, int]]:
    """Return the dimensions of a reshaped tensor that are sizes of another, with that tensor."""
    if function_name(node) not in _RESHAPES:
        return []
    found = []
    for entry, size in zip(_entries(node), node.meta.get(SIZE, ()), strict=False):
        while isinstance(entry, fx.Node) and function_name(entry) in (*_READS, "getitem"):
            entry = entry.all_input_nodes[0]
        if isinstance(entry, fx.Node) and SIZE in entry.meta:
            found.append((entry, int(size)))
    return found


def _is_per_channel(module: nn.Module, width: int) -> bool:
    """Return whether `module` has tensors of its own with an entry for each of `width` channels, and no others."""
    own = [tensor for tensor in _tensors(module, recurse=False) if width in tensor.shape]
    return len(own) == len([tensor for tensor in _tensors(module) if width in tensor.shape]) and all(
        list(tensor.shape).count(width) == 1 for tensor in own
    )


def _parameter_width(size: Sequence[int]) -> int:
    """Return how many channels a parameter has: its last dimension of several entries, 1 where two look like it."""
    width = next((int(count) for count in reversed(size) if count > 1), 1)
    return width if list(size).count(width) == 1 else 1


def _slice_layer(module: nn.Module, width: int, keep: Tensor) -> nn.Module:
    """Return a copy of a layer that `_is_per_channel` with only some of its `width` channels.

    What it normalises in groups keeps their size if it can; else there are as many as divide the new width, at most
    those of before.
    """
    tensors = _tensors(module, recurse=False)
    memo: dict[int, object] = {id(tensor): _slice_tensor(tensor, width, keep) for tensor in tensors}
    twin = copy.deepcopy(module, memo)
    for name in set(_COUNTS).intersection(vars(twin)):
        value = vars(twin)[name]
        if isinstance(value, tuple):
            setattr(twin, name, tuple(len(keep) if count == width else count for count in value))
        elif value == width:
            setattr(twin, name, len(keep))
    for name in set(_GROUPS).intersection(vars(twin)):
        setattr(twin, name, _groups(vars(twin)[name], width, len(keep)))
    return twin


def _slice_tensor(tensor: Tensor, width: int, keep: Tensor) -> Tensor:
    """Return only some of `width` channels of a parameter or buffer; one without them is copied."""
    data = tensor.detach().clone()
    if width in data.shape:
        data = torch.index_select(data, list(data.shape).index(width), keep.to(data.device))
    return nn.Parameter(data, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data


def _groups(groups: int, width: int, new: int) -> int:
    if new * groups % width == 0:
        return new * groups // width
    return next(count for count in range(min(groups, new), 0, -1) if new % count == 0)


def _tensors(module: nn.Module, *, recurse: bool = True) -> list[Tensor]:
    return [*module.parameters(recurse), *module.buffers(recurse)]


def _axis(size: Sequence[int], width: int) -> int:
    """Return the dimension of `size` that is `width`: the second if it is, the batch only if no other is."""
    places: tuple[int, ...] = (*range(1, len(size)), 0)
    return next(place for place in places if size[place] == width)


def _entries(node: fx.Node) -> list[object]:
    entries = node.args[1:]
    return list(entries[0]) if len(entries) == 1 and isinstance(entries[0], (tuple, list)) else list(entries)


def _followed(node: fx.Node) -> list[int]:
    """Return the sizes of the dimensions of a reshaped tensor that no number in the code fixes."""
    pairs = zip(_entries(node), node.meta[SIZE], strict=False)
    return [int(count) for entry, count in pairs if isinstance(entry, fx.Node) or entry == -1]
