"""Where the channel gates of a block go.

The convolutions of the residual branch pass tensors on: the block's input, one between each two, and the output.
Tensors that a depthwise or grouped convolution connects keep or lose their channels together, so one decision acts on
all of them: the expansion gate of an inverted residual acts before and after the depthwise convolution.

    tensors      input -> conv -> inner -> depthwise -> inner -> conv -> output
    tied         {input}          {inner,               inner}           {output}
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from surgery import Architecture, Block, Refusal, Rewriter
from surgery.channels import ChannelMap, channel_map
from surgery.tracing import upstream
from surgery_gated.groups import GroupSizes, columns, gates_of, group_sizes


@dataclass(frozen=True)
class Place:
    """A tensor to be gated.

    Attributes:
        role: "input", "inner", "output" or "projection".
        width: Its number of channels.
        node: Name of the node that has it.
        reader: Path of the only convolution that sees it gated; None where everything does.
    """

    role: str
    width: int
    node: str
    reader: str | None = None


@dataclass(frozen=True)
class Gate:
    """Gates of one tensor or of several that are tied.

    Attributes:
        role: What they are for.
        places: The tensors they act on.
        columns: Which gate opens each channel of each.
    """

    role: str
    places: tuple[Place, ...]
    columns: tuple[Tensor, ...]


@dataclass(frozen=True)
class Layout:
    """All channel gates of a block: `count` learned ones."""

    gates: tuple[Gate, ...]
    count: int


def layout(architecture: Architecture, block: Block, rewriter: Rewriter, group_size: int | None) -> Layout | Refusal:
    """Return which channel gates a block gets, or why it can have none."""
    reason = _why_not(block, rewriter)
    if reason:
        return Refusal(block.path, reason, "use granularity='layer', or another network")
    sizes = group_sizes(architecture, block, group_size)
    gates: list[Gate] = []
    count = 0
    for tied, units in _tied(block, rewriter):
        for role in dict.fromkeys(place.role for place in tied):
            gate, learned = _gate(role, tied, units, sizes, count)
            gates += [gate] if learned else []
            count += learned
    if not count:
        return Refusal(block.path, "every tensor of it is a single group, which is always open", "pass group_size=")
    return Layout(tuple(gates), count)


def _gate(role: str, tied: tuple[Place, ...], units: int | None, sizes: GroupSizes, first: int) -> tuple[Gate, int]:
    size = {"input": sizes.input, "inner": sizes.inner}.get(role, sizes.output)
    own = next(place.width for place in tied if place.role == role)
    parts = [units or place.width for place in tied]
    opened = [columns(place.width, size, part, first, own) for place, part in zip(tied, parts, strict=True)]
    return Gate(role, tied, tuple(opened)), gates_of(own, size, units or own)


def _tied(block: Block, rewriter: Rewriter) -> Iterator[tuple[tuple[Place, ...], int | None]]:
    """Yield the tensors that keep their channels together, and into how many parts those fall; None for all."""
    places = _places(block, rewriter)
    group = [places[0]]
    units: list[int] = []
    for place, path in zip(places[1:], block.convs, strict=True):
        groups = _conv(rewriter, path).groups
        if groups > 1:
            group.append(place)
            units.append(groups)
            continue
        yield tuple(group), math.gcd(*units) if units else None
        group, units = [place], []
    yield tuple(group), math.gcd(*units) if units else None
    projection = _projection(block)
    if projection:
        yield (projection,), None


def _places(block: Block, rewriter: Rewriter) -> list[Place]:
    """Return the tensors of the residual branch, in order."""
    convs = [_conv(rewriter, path) for path in block.convs]
    places = [Place("input", convs[0].in_channels, rewriter.input_of(block.convs[0]), block.convs[0])]
    for path, conv in zip(block.convs, convs, strict=True):
        role = "output" if path == block.convs[-1] else "inner"
        places.append(Place(role, conv.out_channels, _behind(block, rewriter, path)))
    return places


def _behind(block: Block, rewriter: Rewriter, conv: str) -> str:
    """Return the last node behind a convolution that all that reads its result reads: its norm and activation are past.

    An attention would read the channels of closed gates otherwise, and answer another way once they are cut.
    """
    graph = rewriter.network.block(block.path).graph
    node = next(node for node in graph.nodes if node.name == rewriter.call_of(conv))
    paths = {f"{block.path}.{inner.target}": inner for inner in graph.find_nodes(op="call_module")}
    stops = {paths[path] for path in block.convs} | {graph.output_node()}
    while len(node.users) == 1:
        user = next(iter(node.users))
        if user in stops or len(user.all_input_nodes) > 1:
            break
        node = user
    return str(node.name)


def _projection(block: Block) -> Place | None:
    if not block.projected or block.shortcut is None:
        return None
    return Place("projection", block.channels.output, block.shortcut)


def _conv(rewriter: Rewriter, path: str) -> nn.Conv2d:
    conv = rewriter.module(path)
    assert isinstance(conv, nn.Conv2d)
    return conv


def _why_not(block: Block, rewriter: Rewriter) -> str:
    """Return what keeps the channels of a block from being cut, or ""."""
    for path in block.convs:
        kind = type(rewriter.module(path))
        if kind.forward is not nn.Conv2d.forward:
            return f"{path} is a {kind.__name__}, expected a plain Conv2d"
    channels = channel_map(rewriter.network.block(block.path))
    projection = _projection(block)
    places = _places(block, rewriter)
    beside = _beside(block, rewriter, places[-1].node)
    if beside:
        return f"{beside} computes beside the convolutions of its body, expected one after the other"
    for place in [*places, *([projection] if projection else [])]:
        reason = _held(channels, place)
        if reason:
            return reason
    return ""


def _beside(block: Block, rewriter: Rewriter, output: str) -> str:
    """Return a convolution of the body that is neither before nor behind the gated output, or ""."""
    owner = rewriter.network.block(block.path)
    nodes = {node.name: node for node in owner.graph.nodes}
    before, body = upstream(nodes[output]), upstream(nodes[block.body])
    for node in body - before:
        conv = node.op == "call_module" and isinstance(owner.get_submodule(str(node.target)), nn.Conv2d)
        if conv and nodes[output] not in upstream(node):
            return f"{block.path}.{node.target}"
    return ""


def _held(channels: ChannelMap, place: Place) -> str:
    if ("", place.node) not in channels.nodes:
        return f"the channels of {place.node} cannot be followed"
    space = channels.nodes["", place.node]
    width = channels.sizes[channels.find(space)]
    if width != place.width:
        return f"{place.node} has {width} channels, expected the {place.width} of its convolution"
    return next((f"{place.node}: {pin.reason}" for pin in channels.pins_of(space) if not pin.boundary), "")
