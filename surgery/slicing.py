"""Cut channels out of convolution, normalisation and linear weights, and keep the coupled ones together."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from surgery.architecture import Block
from surgery.channels import ChannelMap, ChannelReader, PerChannel, Scatter, Select, Use, channel_map
from surgery.errors import RewriteError
from surgery.network import ConvertedNetwork, SurgeryModule
from surgery.widths import cut_followed

M = TypeVar("M", bound=nn.Module)


@runtime_checkable
class Prunable(Protocol):
    """A module that a method inserted and that knows what it becomes when branches of its block go away."""

    def pruned(self, keep: Sequence[int]) -> nn.Module:
        """Return the module for the branches `keep` of those it has now."""


@runtime_checkable
class Selectable(Protocol):
    """A module that a method inserted, made of parts of which a plan can keep some: norms, mask entries, heads."""

    def selected(self, keep: Sequence[int]) -> nn.Module:
        """Return the module for the parts `keep` of those it has now."""


def slice_module(module: nn.Module, inputs: Tensor | None, outputs: Tensor | None) -> nn.Module:
    """Return a copy of `module` with only some of its channels; everything else about it is kept.

    Args:
        module: Conv2d (grouped or not), a batch or instance norm, Linear, or what core and methods insert that can be
            cut.
        inputs: Indices of the input channels to keep, or None for all. A grouped convolution keeps whole groups.
        outputs: Indices of the output channels to keep, or None for all.

    Raises:
        RewriteError: If the module cannot be sliced that way.
    """
    if parametrize.is_parametrized(module):
        raise RewriteError(
            f"{type(module).__name__} has parametrized weights; remove the parametrization before its channels are cut"
        )
    if isinstance(module, nn.Conv2d):
        return _slice_conv(module, inputs, outputs)
    if isinstance(module, nn.Linear):
        twin = _with_tensors(module, weight=_cut(module.weight, outputs, inputs), bias=_cut(module.bias, outputs))
        twin.out_features, twin.in_features = twin.weight.shape
        return twin
    if isinstance(module, nn.modules.batchnorm._NormBase):
        names = ("weight", "bias", "running_mean", "running_var")
        norm = _with_tensors(module, **{name: _cut(getattr(module, name), outputs) for name in names})
        norm.num_features = module.num_features if outputs is None else len(outputs)
        return norm
    if isinstance(module, PerChannel):
        return module if outputs is None else module.sliced(outputs)
    if isinstance(module, ChannelReader):
        return module if inputs is None else module.reading(inputs)
    if isinstance(module, (Select, Scatter)):
        index = module.index if inputs is outputs is None else module.index[outputs if inputs is None else inputs]
        return Select(index) if isinstance(module, Select) else Scatter(index, module.width)
    raise RewriteError(f"{type(module).__name__} cannot be sliced; expected Conv2d, a batch norm or Linear")


def keep_branches(owner: SurgeryModule, block: Block, branches: Sequence[int], of: int | None = None) -> Block:
    """Cut all but `branches` out of the block that `owner` computes, in place, and describe its new widths.

    Raises:
        RewriteError: If the channels of the branches are coupled to something outside of them.
    """
    ranges = block.partition(of or block.cardinality)
    kept = sorted(set(branches))
    if not kept or kept[0] < 0 or kept[-1] >= len(ranges):
        raise RewriteError(
            f"{block.path}: expected indices of its {len(ranges)} branches, at least one, found {list(branches)}"
        )
    indices = torch.cat([torch.arange(ranges[n].start, ranges[n].stop) for n in kept])
    channels, hidden = _entering_merge(owner, block)
    for name, module in list(owner.named_modules()):
        if isinstance(module, Prunable):
            owner.set_submodule(name, module.pruned(kept))
    cut_spaces(owner, channels, {hidden: indices}, block.path, allow=("pruned",))
    return replace(
        block,
        channels=replace(block.channels, hidden=len(indices)),
        cardinality=len(kept) * block.cardinality // len(ranges),
    )


def check_branches(owner: SurgeryModule, block: Block) -> None:
    """Check that the branches of the block that `owner` computes can be cut apart, without cutting.

    Raises:
        RewriteError: If they cannot, with what holds them together.
    """
    channels, hidden = _entering_merge(owner, block)
    first = block.branches[0]
    if channels.sizes[channels.find(hidden)] != block.channels.hidden:
        raise RewriteError(f"{block.path}: other channels enter {block.merge} than those of {block.spatial}")
    _coupled(owner, channels, {hidden: torch.arange(first.stop)}, block.path, allow=("pruned",))


def _entering_merge(owner: SurgeryModule, block: Block) -> tuple[ChannelMap, int]:
    if block.merge is None:
        raise RewriteError(f"{block.path}: no convolution joins its branches, so they cannot be cut apart")
    channels = channel_map(owner)
    call = next(iter(owner.graph.find_nodes(op="call_module", target=block.merge.removeprefix(f"{block.path}."))))
    source = call.all_input_nodes[0].name
    if ("", source) not in channels.nodes:
        raise RewriteError(f"{block.path}: {source}, which {block.merge} reads, has no channels that can be followed")
    return channels, channels.nodes["", source]


def cut_widths(
    network: ConvertedNetwork, widths: Mapping[str, int | Sequence[int]], *, exact: bool = True
) -> list[str]:
    """Cut the outputs of the named convolutions to these channels, or their first ones, with everything coupled.

    Args:
        network: Changed in place.
        widths: Convolution path -> number of channels, or indices.
        exact: See `channel_map`.

    Returns:
        Paths of the modules that were sliced.

    Raises:
        RewriteError: If a path is no convolution, a group is pinned, or coupled convolutions get different widths.
    """
    channels = channel_map(network, exact=exact)
    written = {use.path: channels.find(use.writes) for use in channels.uses if use.writes is not None}
    keep: dict[int, Tensor] = {}
    for path, width in widths.items():
        if path not in written:
            raise RewriteError(
                f"{path}: expected a convolution or linear layer of the network, found none of that path"
            )
        space = written[path]
        wanted = torch.arange(max(width, 0)) if isinstance(width, int) else torch.tensor(width)
        if space in keep and not torch.equal(keep[space], wanted):
            raise RewriteError(
                f"{path}: found {len(wanted)} channels to keep, expected the same {len(keep[space])} as for what it is "
                "coupled to"
            )
        if (
            not 0 < len(wanted) <= channels.sizes[space]
            or not 0 <= int(wanted.min()) <= int(wanted.max()) < channels.sizes[space]
        ):
            raise RewriteError(f"{path}: expected 1 to {channels.sizes[space]} of its channels to keep, found {width}")
        keep[space] = wanted
    return cut_spaces(network, channels, keep, type(network).__name__)


def cut_spaces(
    owner: SurgeryModule, channels: ChannelMap, keep: Mapping[int, Tensor], where: str, allow: Sequence[str] = ()
) -> list[str]:
    """Keep only some channels of some spaces and slice every module that uses them.

    Returns:
        Paths of the modules that were sliced.

    Raises:
        RewriteError: If a space, or one coupled to it by a grouped convolution, cannot change.
    """
    kept, prunable = _coupled(owner, channels, keep, where, allow)
    sliced = []
    for use in channels.uses:
        if use.path not in prunable and _slice_use(owner, channels, use, kept):
            sliced.append(use.path)
    return sliced


def _coupled(
    owner: SurgeryModule, channels: ChannelMap, keep: Mapping[int, Tensor], where: str, allow: Sequence[str]
) -> tuple[dict[int, Tensor], set[str]]:
    """Return what stays of every coupled space, and the paths of the modules that cut themselves."""
    kept = {channels.find(space): indices for space, indices in keep.items()}
    _follow_links(channels, kept, where)
    prunable = {name for name, module in owner.named_modules() if isinstance(module, Prunable)} if allow else set()
    held = [pin.reason for space in kept for pin in channels.pins_of(space) if pin.path not in prunable]
    if held:
        raise RewriteError(f"{where}: these channels cannot be cut: {held[0]}")
    return kept, prunable


def _follow_links(channels: ChannelMap, kept: dict[int, Tensor], where: str) -> None:
    pending = True
    while pending:
        pending = False
        for link in channels.links:
            ends = (channels.find(link.reads), channels.find(link.writes))
            for known, other in (ends, ends[::-1]):
                if known in kept and other not in kept:
                    kept[other] = _whole_groups(channels, kept[known], known, other, link.groups, where)
                    pending = True


def _whole_groups(channels: ChannelMap, indices: Tensor, known: int, other: int, groups: int, where: str) -> Tensor:
    width, other_width = channels.sizes[known] // groups, channels.sizes[other] // groups
    whole = torch.unique(indices // width)
    if len(whole) * width != len(indices):
        raise RewriteError(
            f"{where}: a convolution with {groups} groups of {width} channels can only lose whole groups"
        )
    members: Tensor = whole[:, None] * other_width + torch.arange(other_width)
    return members.flatten()


def _slice_use(owner: SurgeryModule, channels: ChannelMap, use: Use, kept: Mapping[int, Tensor]) -> bool:
    reads = kept.get(channels.find(use.reads)) if use.reads is not None else None
    writes = kept.get(channels.find(use.writes)) if use.writes is not None else None
    if reads is None and writes is None:
        return False
    if use.mixes and use.writes is not None and writes is not None:
        cut_followed(owner, use.path, channels.sizes[channels.find(use.writes)], writes)
    else:
        owner.set_submodule(use.path, slice_module(owner.get_submodule(use.path), reads, writes))
    return True


def _slice_conv(conv: nn.Conv2d, inputs: Tensor | None, outputs: Tensor | None) -> nn.Conv2d:
    if conv.groups == 1:
        twin = _with_tensors(conv, weight=_cut(conv.weight, outputs, inputs), bias=_cut(conv.bias, outputs))
        twin.out_channels, twin.in_channels = twin.weight.shape[:2]
        return twin
    kept = _groups(conv, outputs, conv.out_channels)
    read = kept if inputs is None else _groups(conv, inputs, conv.in_channels)
    if not torch.equal(read, kept):
        raise RewriteError(
            f"a convolution keeps the same groups on both sides, found {read.tolist()} to read and {kept.tolist()} to "
            "write"
        )
    twin = _with_tensors(conv, weight=_cut(conv.weight, outputs), bias=_cut(conv.bias, outputs))
    twin.out_channels = twin.weight.shape[0]
    twin.groups = len(kept)
    twin.in_channels = conv.in_channels // conv.groups * twin.groups
    return twin


def _groups(conv: nn.Conv2d, channels: Tensor | None, size: int) -> Tensor:
    """Return the groups that `channels` of the `size` on one side make up."""
    width = size // conv.groups
    groups = torch.arange(conv.groups) if channels is None else channels[::width] // width
    whole = (groups[:, None] * width + torch.arange(width)).flatten()
    if channels is not None and not torch.equal(whole, channels):
        raise RewriteError(f"a convolution with {conv.groups} groups of {width} channels can only lose whole groups")
    return groups


def _cut(tensor: Tensor | None, first: Tensor | None, second: Tensor | None = None) -> Tensor | None:
    if tensor is None:
        return None
    data = tensor.detach()
    if first is not None:
        data = data.index_select(0, first.to(data.device))
    if second is not None:
        data = data.index_select(1, second.to(data.device))
    return nn.Parameter(data, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data


def _with_tensors(module: M, **tensors: Tensor | None) -> M:
    memo: dict[int, object] = {}
    for name, tensor in tensors.items():
        old = getattr(module, name)
        if old is not None and tensor is not None:
            memo[id(old)] = tensor
    return copy.deepcopy(module, memo)
