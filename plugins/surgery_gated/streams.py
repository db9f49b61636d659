"""Which channels of the streams that blocks add to are closed by everything that writes them.

A stream is what the outputs of a stage's blocks share: a channel of it can go where every block that writes it, and the
projection, has it closed, since it is zero then everywhere behind the stage's entry.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from surgery import Architecture, Block, ConvertedNetwork
from surgery.channels import ChannelMap, channel_map
from surgery.network import BlockModule, SurgeryModule
from surgery.taps import Tap
from surgery_gated.macs import gates_met
from surgery_gated.modules import ChannelGate


@dataclass(frozen=True)
class Streams:
    """What goes from the streams.

    Attributes:
        keep: Path of one of the convolutions that write a stream -> the channels of it that stay.
        entering: Block path -> channels that stay of what the block reads.
        leaving: Block path -> channels that stay of what it returns.
    """

    keep: Mapping[str, Tensor]
    entering: Mapping[str, Tensor]
    leaving: Mapping[str, Tensor]


def closed_streams(model: ConvertedNetwork, opened: Mapping[str, Tensor], round_to: int | None) -> Streams:
    """Return which channels stay of every stream.

    Args:
        model: A network with channel gates.
        opened: Path of each gated convolution that writes a stream -> which channels of it are open, (C,) bool.
        round_to: Keep a multiple of so many channels.
    """
    architecture: Architecture = model.meta["architecture"]
    channels = channel_map(model)
    writers = _writers(channels, model)
    kept: dict[int, Tensor] = {}
    keep: dict[str, Tensor] = {}
    for space, paths in writers.items():
        if all(path in opened for path in paths) and not _is_held(model, architecture, channels, space):
            union = torch.stack([opened[path] for path in paths]).any(dim=0)
            if not union.all():
                kept[space] = keep[paths[0]] = _at_least(union, round_to).nonzero().flatten()
    sides: list[dict[str, Tensor]] = [{}, {}]
    for block in architecture.blocks:
        for side, node in zip(sides, (block.input, block.body), strict=True):
            found = channels.nodes.get((f"{block.path}.", node))
            if found is not None and channels.find(found) in kept:
                side[block.path] = kept[channels.find(found)]
    return Streams(keep, *sides)


def _writers(channels: ChannelMap, model: ConvertedNetwork) -> dict[int, list[str]]:
    """Return the convolutions that write each space."""
    writers: dict[int, list[str]] = {}
    for use in channels.uses:
        if use.reads is not None and use.writes is not None and isinstance(model.get_submodule(use.path), nn.Conv2d):
            writers.setdefault(channels.find(use.writes), []).append(use.path)
    return writers


def _is_held(model: ConvertedNetwork, architecture: Architecture, channels: ChannelMap, space: int) -> bool:
    """Return whether a closed channel of a stream is read as something else than zero, or cannot be cut."""
    links = [channels.find(side) for link in channels.links for side in (link.reads, link.writes)]
    if channels.pins_of(space) or space in links:
        return True
    uses = [use for use in channels.uses if use.writes is not None and channels.find(use.writes) == space]
    return any(_revives(model, architecture, use.path) for use in uses) or _is_shifted(model, channels, space)


def _is_shifted(model: ConvertedNetwork, channels: ChannelMap, space: int) -> bool:
    """Return whether something without weights makes another value of the zeros of a stream, as a sigmoid does."""
    for (prefix, name), found in channels.nodes.items():
        if channels.find(found) == space:
            owner = model.block(prefix.removesuffix(".")) if prefix else model
            node = next(node for node in owner.graph.nodes if node.name == name)
            if len(node.all_input_nodes) == 1 and _of_zero(owner, node):
                return True
    return False


def _of_zero(owner: SurgeryModule, node: fx.Node) -> bool:
    """Return whether a node with one input makes something else than zero of zero, or cannot be asked."""
    zero = torch.zeros(1, 1, 1, 1)
    args = fx.node.map_arg(node.args, lambda _: zero)
    if node.op == "call_module":
        module = owner.get_submodule(str(node.target))
        if isinstance(module, (BlockModule, Tap, ChannelGate)) or any(True for _ in module.parameters()):
            return False
        return bool(copy.deepcopy(module).cpu().eval()(zero).any())
    try:
        target: Any = getattr(Tensor, str(node.target)) if node.op == "call_method" else node.target
        return bool(target(*args, **node.kwargs).any())
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
        return True


def _revives(model: ConvertedNetwork, architecture: Architecture, path: str) -> bool:
    """Return whether a module makes something of a zero, with no gate behind it that closes the channel again."""
    if not isinstance(model.get_submodule(path), nn.modules.batchnorm._NormBase):
        return False
    block = next((block for block in architecture.blocks if path.startswith(f"{block.path}.")), None)
    if block is None:
        return True
    return not _is_closed_behind(model, block, path)


def _is_closed_behind(model: ConvertedNetwork, block: Block, path: str) -> bool:
    module = model.block(block.path)
    calls = {node: module.get_submodule(str(node.target)) for node in module.graph.find_nodes(op="call_module")}
    node = next(node for node in calls if f"{block.path}.{node.target}" == path)
    return any(gate.role in ("output", "projection") for gate in gates_met(node, calls, block.join, forwards=True))


def _at_least(keep: Tensor, round_to: int | None) -> Tensor:
    """Return `keep` with so many more of the channels that their number is a multiple of `round_to`; those are zero."""
    if round_to is None:
        return keep
    missing = -int(keep.sum()) % round_to
    more = (~keep).nonzero().flatten()[:missing]
    return torch.ones_like(keep) if len(more) < missing else keep.index_fill(0, more, True)
