"""Which channels of every value of a block are read at all, derived from its graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import fx, nn

from surgery.channels import ChannelMap, PerChannel, channel_map
from surgery.network import BlockModule
from surgery.tracing import upstream
from surgery_gated.modules import ChannelGate
from surgery_gated.program import Step, is_addition, overwrites, program, taps_beside, writes_in_place

Kind = Literal["gate", "convolution", "norm", "channelwise", "addition", "other"]


@dataclass(frozen=True)
class Action:
    """What to do for one node.

    Attributes:
        step: The node.
        kind: How it treats channels.
        wanted: Paths of the gates that all have to let a channel through for anything to read it; a gate is one itself.
        by_channel: Names of its operands that have the same channels.
    """

    step: Step
    kind: Kind
    wanted: tuple[str, ...]
    by_channel: tuple[str, ...]


@dataclass(frozen=True)
class ChannelPlan:
    """A block with channel gates.

    Attributes:
        inputs: Placeholders.
        first: Steps that lead to the decisions.
        actions: The other steps, in order.
        gates: Paths of the gates.
        decisions: Name of the decisions (B, G).
        output: Name of what the block returns.
        taps: Paths of the taps beside that of the decisions.
    """

    inputs: tuple[str, ...]
    first: tuple[Step, ...]
    actions: tuple[Action, ...]
    gates: tuple[str, ...]
    decisions: str
    output: str
    taps: tuple[str, ...]


def channel_plan(block: BlockModule) -> ChannelPlan | None:
    """Return how to compute a block channel by channel, or None where something writes in place to a shared value."""
    nodes = [node for node in block.graph.nodes if node.op not in ("placeholder", "output")]
    calls = {node: block.get_submodule(str(node.target)) for node in nodes if node.op == "call_module"}
    gates = [node for node, module in calls.items() if isinstance(module, ChannelGate)]
    passed = {reader for gate in gates for reader in gate.users if reader.all_input_nodes[0] is gate}
    if not gates or any(overwrites(n, block) or (n in passed and writes_in_place(n, block)) for n in nodes):
        return None
    decisions = gates[0].all_input_nodes[1]
    first = [node for node in nodes if node in upstream(decisions)]
    rest = [node for node in nodes if node not in first]
    output = block.graph.output_node().all_input_nodes[0]
    spaces = channel_map(block)
    wanted = _wanted(spaces, calls, rest)
    steps = program(rest, [output.name])
    return ChannelPlan(
        inputs=tuple(node.name for node in block.graph.find_nodes(op="placeholder")),
        first=program(first, {source.name for node in (*rest, *gates) for source in node.all_input_nodes}),
        actions=tuple(
            Action(step, _kind(node, calls), wanted.get(node, ()), tuple(s.name for s in _alike(spaces, node)))
            for node, step in zip(rest, steps, strict=True)
        ),
        gates=tuple(str(gate.target) for gate in gates),
        decisions=decisions.name,
        output=output.name,
        taps=taps_beside(block, decisions),
    )


def _kind(node: fx.Node, calls: Mapping[fx.Node, nn.Module]) -> Kind:
    module = calls.get(node)
    if isinstance(module, ChannelGate):
        return "gate"
    if isinstance(module, nn.Conv2d):
        return "convolution"
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return "norm"
    if is_addition(node):
        return "addition"
    return "other" if isinstance(module, PerChannel) else "channelwise"


def _wanted(
    spaces: ChannelMap, calls: Mapping[fx.Node, nn.Module], nodes: list[fx.Node]
) -> dict[fx.Node, tuple[str, ...]]:
    """Return by node the gates that all have to let a channel through before anything reads it."""
    wanted: dict[fx.Node, tuple[str, ...]] = {}
    for node in reversed(nodes):
        kind = _kind(node, calls)
        own = (str(node.target),) if kind == "gate" else ()
        by_channel = kind in ("norm", "channelwise", "addition") and bool(_alike(spaces, node))
        if own or by_channel or kind == "convolution":
            behind = {_let_through(spaces, calls, node, reader, wanted) for reader in node.users}
            wanted[node] = own + (behind.pop() if len(behind) == 1 else ())
    return wanted


def _let_through(
    spaces: ChannelMap,
    calls: Mapping[fx.Node, nn.Module],
    node: fx.Node,
    reader: fx.Node,
    wanted: Mapping[fx.Node, tuple[str, ...]],
) -> tuple[str, ...]:
    if _kind(reader, calls) == "gate":
        return wanted[reader] if reader.all_input_nodes[0] is node else ()
    module = calls.get(reader)
    if isinstance(module, nn.Conv2d) and module.groups == 1:
        return ()  # it mixes its channels, also where an addition ties those that it reads to those that it writes
    return wanted.get(reader, ()) if node in _alike(spaces, reader) else ()


def _alike(spaces: ChannelMap, node: fx.Node) -> list[fx.Node]:
    """Return the operands of a node that have its channels, each on its own."""
    own = spaces.nodes.get(("", node.name))
    if own is None:
        return []
    found = {source: spaces.nodes.get(("", source.name)) for source in node.all_input_nodes}
    return [source for source, space in found.items() if space is not None and spaces.find(space) == spaces.find(own)]
