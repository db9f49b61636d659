"""Multiply-adds as a function of which gates are open.

With f the share of a tensor's channels that are open, a dense convolution of M multiply-adds costs M f_read f_written,
and a grouped or depthwise one M f, since its two sides are gated together. Summed over the convolutions of a bottleneck
that is the formula of the paper,

    S^2 (a_in a_1 + 9 a_1 a_2 / s^2 + a_2 a_out / s^2) + S_out^2 C_in a_sht

with a the numbers of open channels. The body of a closed layer costs nothing. The layers inside a squeeze-excite are
counted by what they read; what computes the gates themselves is not counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from surgery import Architecture, Block, ConvertedNetwork
from surgery.errors import InvalidOption
from surgery.network import BlockModule
from surgery.shapes import MACS
from surgery.tracing import upstream
from surgery_gated.gates import Gates
from surgery_gated.modules import ChannelGate, LayerGate
from surgery_gated.program import Plans

_KNOWN = Plans()


@dataclass(frozen=True)
class ConvMacs:
    """One convolution of a block: its path, its multiply-adds, and the gates on what it reads and writes."""

    path: str
    macs: int
    reads: tuple[ChannelGate, ...]
    writes: tuple[ChannelGate, ...]
    grouped: bool

    def of(self, decisions: Tensor) -> Tensor:
        """Return the multiply-adds for decisions (B, G), (B,)."""
        if self.grouped:
            return self.macs * _open(self.writes or self.reads, decisions)
        return self.macs * _open(self.reads, decisions) * _open(self.writes, decisions)


@dataclass(frozen=True)
class BlockMacs:
    """One block: its number of gates, what is spent in any case, its gated body, and its gated convolutions."""

    count: int
    constant: int
    body: int
    convs: tuple[ConvMacs, ...]

    def of(self, decisions: Tensor) -> Tensor:
        """Return the multiply-adds for decisions (B, G), (B,)."""
        total = decisions.new_full((decisions.shape[0],), self.constant)
        if self.body:
            total = total + self.body * decisions[:, 0]
        for conv in self.convs:
            total = total + conv.of(decisions)
        return total


def block_macs(model: ConvertedNetwork, block: str, decisions: Tensor) -> Tensor:
    """Return the multiply-adds of one block for each image.

    Args:
        model: A network with gates.
        block: Path of a gated block.
        decisions: Which gates of it are open, (B, G) of zeros and ones; gradients flow through them.

    Shape:
        Returns (B,), in at least float32.

    Raises:
        InvalidOption: If there is no such block, or `decisions` has another shape.
    """
    known = known_macs(model, block)
    if decisions.dim() != 2 or decisions.shape[1] != known.count:
        raise InvalidOption(f"{block}: decisions have the shape {tuple(decisions.shape)}, expected (B, {known.count})")
    return known.of(decisions.to(torch.promote_types(decisions.dtype, torch.float32)))


def known_macs(model: ConvertedNetwork, block: str) -> BlockMacs:
    """Return what the multiply-adds of a gated block are made of."""
    architecture: Architecture = model.meta["architecture"]
    place = architecture.block(block)
    return _KNOWN.get(model.block(block), lambda module: _read(module, place))


def network_macs(model: ConvertedNetwork, decisions: Mapping[str, Tensor]) -> Tensor:
    """Return the multiply-adds of the whole network for each image, (B,); `decisions` (B, G) by block path.

    Stem, classifier, shortcuts and blocks without gates are included.
    """
    if not decisions:
        raise InvalidOption("network_macs: found no decisions, expected those of every gated block by path")
    architecture: Architecture = model.meta["architecture"]
    ungated = architecture.macs - sum(architecture.block(path).macs for path in decisions)
    return ungated + torch.stack([block_macs(model, path, values) for path, values in decisions.items()]).sum(dim=0)


def _read(block: BlockModule, place: Block) -> BlockMacs:
    calls = {node: block.get_submodule(str(node.target)) for node in block.graph.find_nodes(op="call_module")}
    spent = {node: int(node.meta.get(MACS, 0)) for node in block.graph.nodes if not isinstance(calls.get(node), Gates)}
    total = sum(spent.values())
    for node, module in calls.items():
        if isinstance(module, LayerGate):
            body = sum(spent.get(inner, 0) for inner in _only_for(node))
            return BlockMacs(1, total - body, body, ())
    convs = tuple(
        ConvMacs(
            f"{place.path}.{node.target}",
            spent[node],
            gates_met(node.all_input_nodes[0], calls, place.join, forwards=False),
            gates_met(node, calls, place.join, forwards=True),
            module.groups > 1,
        )
        for node, module in calls.items()
        if isinstance(module, nn.Conv2d)
    )
    count = next((module.count for module in calls.values() if isinstance(module, ChannelGate)), 0)
    return BlockMacs(count, total - sum(conv.macs for conv in convs), 0, convs)


def _only_for(gate: fx.Node) -> set[fx.Node]:
    """Return what is computed for the gated body alone, and not for its shortcut or its decisions as well."""
    body, *others = gate.all_input_nodes
    others += [source for user in gate.users for source in user.all_input_nodes if source is not gate]
    return upstream(body) - upstream(*others)


def gates_met(
    start: fx.Node, calls: Mapping[fx.Node, nn.Module], join: str | None, *, forwards: bool
) -> tuple[ChannelGate, ...]:
    """Return the gates between a convolution and the next ones, or from what it reads back to those before it."""
    found: dict[ChannelGate, None] = {}
    pending = list(start.users) if forwards else [start]
    while pending:
        node = pending.pop()
        module = calls.get(node)
        if isinstance(module, (nn.Conv2d, Gates)) or node.name == join:
            continue
        if isinstance(module, ChannelGate):
            found[module] = None
        pending += list(node.users) if forwards else node.all_input_nodes
    return tuple(found)


def _open(gates: tuple[ChannelGate, ...], decisions: Tensor) -> Tensor:
    """Return the share of channels that are open under all of `gates`, (B,)."""
    if not gates:
        return decisions.new_ones(decisions.shape[0])
    mask = gates[0].mask(decisions)
    for gate in gates[1:]:
        mask = mask * gate.mask(decisions)
    return mask.mean(dim=1)
