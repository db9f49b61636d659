"""How large a converted network is, whole and without its projection shortcuts."""

from __future__ import annotations

from dataclasses import dataclass

from surgery.architecture import Architecture, Block
from surgery.network import ConvertedNetwork
from surgery.shapes import MACS
from surgery.tracing import upstream


@dataclass(frozen=True)
class Figures:
    """Size of a network.

    Attributes:
        params: Number of parameters.
        macs: Multiply-adds of one image, convolutions and linear layers.
        projection_params: Parameters of the projection shortcuts among them.
        projection_macs: Multiply-adds of the projection shortcuts among them.
    """

    params: int
    macs: int
    projection_params: int
    projection_macs: int


def figures(network: ConvertedNetwork) -> Figures:
    """Return the size of a converted network, from what its architecture and its graphs carry."""
    architecture: Architecture = network.meta["architecture"]
    projections = [part for block in architecture.blocks if block.projected for part in _projection(network, block)]
    return Figures(
        params=sum(parameter.numel() for parameter in network.parameters()),
        macs=architecture.macs,
        projection_params=sum(params for params, _ in projections),
        projection_macs=sum(macs for _, macs in projections),
    )


def _projection(network: ConvertedNetwork, block: Block) -> list[tuple[int, int]]:
    owner = network.block(block.path)
    nodes = {node.name: node for node in owner.graph.nodes}
    if block.shortcut not in nodes or block.body not in nodes:
        return []
    only = upstream(nodes[block.shortcut]) - upstream(nodes[block.body])
    return [
        (sum(p.numel() for p in owner.get_submodule(str(node.target)).parameters()), int(node.meta.get(MACS, 0)))
        for node in only
        if node.op == "call_module"
    ]
