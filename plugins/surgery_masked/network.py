"""What is connected in a masked network."""

from __future__ import annotations

from itertools import pairwise

from torch import nn

from surgery import Architecture
from surgery.errors import InvalidOption
from surgery.network import ConvertedNetwork
from surgery.objective import unwrap
from surgery_masked.connections import Connections, used_by
from surgery_masked.joins import Join, Row
from surgery_masked.masks import Masks


def connectivity(model: nn.Module) -> dict[str, Connections]:
    """Return the masks of a masked network by the block whose branches read through them, in the order of the network.

    Raises:
        InvalidOption: If the network has no masks.
        UnsupportedModel: If it is not converted.
    """
    network = unwrap(model)
    masks = masks_of(network)
    real, active = masks.real.detach().cpu(), masks.active.cpu()
    found: dict[str, Connections] = {}
    for chain in chains_of(network):
        for (producer, row), (consumer, _) in pairwise(chain):
            assert row is not None
            found[consumer] = Connections(producer, consumer, real[row.index], active[row.index])
    return found


def used_branches(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return which branches of every masked block lead to the output; all others can be cut away.

    Raises:
        InvalidOption: If the network has no masks.
        UnsupportedModel: If it is not converted.
    """
    return used_by(list(connectivity(model).values()))


def freeze(model: nn.Module) -> None:
    """Let every branch read the K branches with the largest mask entries, for good, in place.

    The recipe of the paper trains on from there with fixed connectivity. What is frozen stays so in checkpoints.

    Raises:
        InvalidOption: If the network has no masks.
        UnsupportedModel: If it is not converted.
    """
    masks_of(unwrap(model)).freeze()


def masks_of(network: nn.Module) -> Masks:
    """Return the module of all masks.

    Raises:
        InvalidOption: If there is none.
    """
    for module in network.children():
        if isinstance(module, Masks):
            return module
    raise InvalidOption(
        f"masked: {type(network).__name__} has no masks; expected a network that was converted by 'masked' and is not "
        "pruned"
    )


def chains_of(network: ConvertedNetwork) -> list[list[tuple[str, Row | None]]]:
    """Return the runs of masked blocks: the path of each with what takes its mask, None for the last."""
    architecture: Architecture = network.meta["architecture"]
    chains: list[list[tuple[str, Row | None]]] = [[]]
    for block in architecture.blocks:
        children = list(network.block(block.path).children())
        if not any(isinstance(child, Join) for child in children):
            continue
        row = next((child for child in children if isinstance(child, Row)), None)
        chains[-1].append((block.path, row))
        if row is None:
            chains.append([])
    return chains[:-1]
