"""Which branch reads which, as plain data: what is left of a masked network once its weights are taken away.

A chain is a run of blocks of which each reads the branches of the one before it through a mask; its first block reads
one stream, and all branches of its last block are joined into one.

Reference: Ahmed & Torresani, MaskConnect: connectivity learning by gradient descent (2018), sections 2.2 and 3.1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Connections:
    """What the branches of one block read of those of the block before it.

    Attributes:
        producer: Path of the block that is read.
        consumer: Path of the block that reads.
        real: The learned mask, in [0, 1], its rows sum to 1, on the CPU. Shape: (branches of the consumer, branches of
            the producer).
        active: Whether the branch of the row reads that of the column in eval mode, in the shape of `real`.
    """

    producer: str
    consumer: str
    real: Tensor
    active: Tensor


def chains(connections: Sequence[Connections]) -> list[tuple[Connections, ...]]:
    """Return the connections chain by chain, from one in network order that may hold several."""
    by_end: dict[str, tuple[Connections, ...]] = {}
    for pair in connections:
        by_end[pair.consumer] = (*by_end.pop(pair.producer, ()), pair)
    return list(by_end.values())


def used_by(connections: Sequence[Connections]) -> dict[str, tuple[int, ...]]:
    """Return by path, in network order, the branches of every block that anything surviving reads.

    All branches of the last block of a chain survive. Before it, a branch survives where a surviving one reads it.
    """
    used: dict[str, tuple[int, ...]] = {}
    for chain in reversed(chains(connections)):
        used[chain[-1].consumer] = tuple(range(len(chain[-1].active)))
        for pair in reversed(chain):
            read = pair.active[list(used[pair.consumer])].any(dim=0)
            used[pair.producer] = tuple(read.nonzero().flatten().tolist())
    return dict(reversed(used.items()))


def active_counts(connections: Sequence[Connections]) -> list[tuple[str, int]]:
    """Return every block and how many of its branches are used, by depth."""
    return [(block, len(used)) for block, used in used_by(connections).items()]


def listed(connections: Sequence[Connections] | Mapping[str, Connections]) -> list[Connections]:
    """Return the connections of a network that may be given by path."""
    return list(connections.values() if isinstance(connections, Mapping) else connections)
