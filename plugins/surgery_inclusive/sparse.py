"""Divide the features of a network, too, so that each part is computed from itself and the parts before it."""

from __future__ import annotations

import copy
from math import gcd

import torch
from torch import nn

from surgery import Architecture, Refusal, Rewriter
from surgery.channels import ChannelMap, Pin, channel_map
from surgery.errors import InvalidOption, NothingConverted
from surgery.models import AppendChannels
from surgery_inclusive.convs import NestedAppend, SlicedConv2d
from surgery_inclusive.norms import SharedNorm
from surgery_inclusive.placement import CURE, is_plain, norm_paths, refuse_count
from surgery_inclusive.taxonomy import Taxonomy
from surgery_inclusive.transform import Edit
from surgery_inclusive.triangular import NestedTriangularConv2d

_CURE = f"{CURE}, or try the dense form"


def nest_sparse(architecture: Architecture, rewriter: Rewriter, count: int, *, taxonomy: Taxonomy | None) -> None:
    """Let the k-th part of all features depend on the first k parts alone.

    The merge of every block becomes a grouped convolution, all other dense ones lower block-triangular; what is dropped
    of the weights is lost. Norms are shared.

    Raises:
        NothingConverted: If a layer mixes channels in another way, with the reason.
        InvalidOption: If channels cannot be divided into `count`.

    Reference: Lee & Shin (2018), section 3.2.
    """
    norms = norm_paths(rewriter.network, architecture)
    edit = Edit(rewriter, architecture, count, sparse=True)
    if not architecture.blocks:
        raise NothingConverted(f"inclusive: no block of {architecture.name} was recognised", architecture.refusals)
    refuse_count([block for block in architecture.blocks if block.merge is not None], count)
    channels = channel_map(rewriter.network)
    _check(rewriter, architecture, channels, count, edit.head)
    edit.start(norms[0] if norms else None)
    merges = {block.merge for block in architecture.blocks}
    image = channels.find(0)
    for use in channels.uses:
        module = rewriter.module(use.path)
        if isinstance(module, nn.Conv2d):
            reads = use.reads is None or channels.find(use.reads) != image
            divided = _divided(module, count, reads=reads, merges=use.path in merges)
            if isinstance(divided, NestedTriangularConv2d):
                edit.protect(use.path)  # anytime prediction reads its input again
            edit.replace(use.path, divided, "conv")
    for path, module in list(rewriter.network.named_modules()):
        if isinstance(module, AppendChannels):
            edit.rewriter.replace(path, NestedAppend(module.inputs, module.outputs, count), role="append")
    for path in norms:
        norm = rewriter.module(path)
        assert isinstance(norm, nn.BatchNorm2d)
        edit.norm(path, SharedNorm(norm, count))
    edit.heads(taxonomy)


def _divided(conv: nn.Conv2d, count: int, *, reads: bool, merges: bool) -> nn.Module:
    if not reads or conv.groups > 1:
        return SlicedConv2d(conv, count, reads=reads, writes=True)
    if merges:
        return SlicedConv2d(_grouped(conv, count), count, reads=True, writes=True)
    triangular: nn.Module = NestedTriangularConv2d.of(conv, count)
    return triangular


def _grouped(conv: nn.Conv2d, groups: int) -> nn.Conv2d:
    """Return a grouped convolution with the diagonal blocks of the weight of a dense one."""
    rows, columns = conv.out_channels // groups, conv.in_channels // groups
    blocks = [conv.weight.detach()[g * rows : (g + 1) * rows, g * columns : (g + 1) * columns] for g in range(groups)]
    twin = copy.copy(conv)
    twin._parameters = {**conv._parameters, "weight": nn.Parameter(torch.cat(blocks), conv.weight.requires_grad)}
    twin.groups = groups
    return twin


def _check(rewriter: Rewriter, architecture: Architecture, channels: ChannelMap, count: int, head: str) -> None:
    refusals = [
        Refusal(pin.path or "(root)", pin.reason, _CURE)
        for pin in channels.pins
        if not pin.boundary and not _is_append(rewriter, pin)
    ]
    for use in channels.uses:
        module = rewriter.module(use.path)
        plain = isinstance(module, nn.Conv2d) and is_plain(module)
        if not plain and not isinstance(module, nn.modules.batchnorm._NormBase) and use.path != head:
            refusals.append(Refusal(use.path, f"a {type(module).__name__} reads or writes features", _CURE))
    if refusals:
        raise NothingConverted(f"inclusive: the features of {architecture.name} cannot be divided", tuple(refusals))
    _check_widths(rewriter, channels, count, head)


def _check_widths(rewriter: Rewriter, channels: ChannelMap, count: int, head: str) -> None:
    """Refuse a number of sub-networks that some layer cannot be divided by, and say which all can be divided by."""
    image = channels.find(0)
    sizes: dict[str, int] = {}
    for use in channels.uses:
        spaces = [channels.find(space) for space in (use.reads, use.writes) if space is not None]
        module = rewriter.module(use.path)
        groups = [module.groups] if isinstance(module, nn.Conv2d) and module.groups > 1 else []
        if use.path != head:
            sizes[use.path] = gcd(*(channels.sizes[space] for space in spaces if space != image), *groups)
    common = gcd(*sizes.values())
    if common % count:
        path, size = next((path, size) for path, size in sizes.items() if size % count)
        allowed = ", ".join(str(n) for n in range(2, common + 1) if common % n == 0)
        cure = f"pass subnetworks= one of {allowed}" if allowed else "nothing divides all layers: use the dense form"
        raise InvalidOption(
            f"inclusive: {path}: found channels or groups in multiples of {size}, expected multiples of {count}, the "
            f"number of sub-networks; {cure}"
        )


def _is_append(rewriter: Rewriter, pin: Pin) -> bool:
    return bool(pin.path) and isinstance(rewriter.module(pin.path), AppendChannels)
