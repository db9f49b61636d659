"""The widths of a network that can change, each with all convolutions that share it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx, nn

from surgery import ConvertedNetwork
from surgery.channels import ChannelMap, channel_map
from surgery.network import SurgeryModule
from surgery.shapes import SIZE


@dataclass(frozen=True)
class Width:
    """A number of channels that several layers share.

    Attributes:
        path: One of the convolutions or linear layers that write these channels; the others follow it.
        size: How many there are.
        step: They come in groups of so many, because of grouped convolutions.
        pooled: Whether they have no positions, as inside of a squeeze-excite.
        members: Paths of all layers that write them, or that write channels tied to them by grouped convolutions.
    """

    path: str
    size: int
    step: int
    pooled: bool
    members: tuple[str, ...]


def free_widths(network: ConvertedNetwork) -> tuple[Width, ...]:
    """Return the widths of `network` that can change, in the order of the network."""
    channels = channel_map(network, exact=False)
    places = dict(_calls(network))
    written: dict[int, list[str]] = {}
    for use in channels.uses:
        if use.writes is not None and use.path in places and use.reads is not None:
            written.setdefault(channels.find(use.writes), []).append(use.path)
    found = []
    for spaces in _tied(channels, written):
        first = next(space for space in spaces if space in written)
        if not any(channels.pins_of(space) for space in spaces):
            paths = tuple(path for space in spaces for path in written.get(space, ()))
            pooled = all(_is_pooled(places[path]) for path in written[first])
            found.append(Width(written[first][0], channels.sizes[first], _step(channels, first), pooled, paths))
    return tuple(found)


def written_by(layer: nn.Module) -> int:
    """Return how many channels a convolution or linear layer writes."""
    assert isinstance(layer, (nn.Conv2d, nn.Linear))
    return layer.out_channels if isinstance(layer, nn.Conv2d) else layer.out_features


def _calls(network: SurgeryModule, prefix: str = "") -> Iterator[tuple[str, fx.Node]]:
    for node in network.graph.find_nodes(op="call_module"):
        target = str(node.target)
        yield f"{prefix}{target}", node
        module = network.get_submodule(target)
        if isinstance(module, SurgeryModule):
            yield from _calls(module, f"{prefix}{target}.")


def _tied(channels: ChannelMap, written: dict[int, list[str]]) -> list[list[int]]:
    """Return the spaces that lose whole groups together, those that a layer writes first, each in one list."""
    lists: dict[int, list[int]] = {space: [space] for space in written}
    for link in channels.links:
        one, two = (channels.find(space) for space in (link.reads, link.writes))
        first, second = lists.setdefault(one, [one]), lists.setdefault(two, [two])
        if first is not second:
            first += second
            lists.update((space, first) for space in second)
    unique = {id(spaces): spaces for spaces in lists.values()}
    return [spaces for spaces in unique.values() if any(space in written for space in spaces)]


def _step(channels: ChannelMap, space: int) -> int:
    size = channels.sizes[space]
    linked = [link for link in channels.links if space in (channels.find(link.reads), channels.find(link.writes))]
    return math.lcm(*(size // link.groups for link in linked))


def _is_pooled(node: fx.Node) -> bool:
    size = node.meta.get(SIZE, ())
    return len(size) < 4 or tuple(size[2:]) == (1, 1)
