"""Raise the minimum distance of a scheme by moves that leave all its row and column sums as they are.

A move takes rows i, j and columns a, b with i holding a but not b and j holding b but not a, and trades them. Balance
can therefore never be lost, and the number of branches needs no structure.
"""

import random

import numpy as np

from surgery_coded.words import Matrix, below

# A worsening by `delta` is accepted with probability 2 ** (-_COLDNESS * delta): exact in floating point.
_COLDNESS = 8


def anneal(start: Matrix, distance: int, moves: int, rng: random.Random) -> Matrix | None:
    """Search for rows at pairwise distance >= `distance`, with the row and column sums of `start`.

    Args:
        start: The scheme to begin with, shape (K, N).
        distance: The even distance to reach.
        moves: Moves tried before giving up.
        rng: Source of randomness.

    Returns:
        The new scheme, or None where the moves did not suffice.
    """
    table = _Table(start, distance)
    stalled, best = 0, table.penalty
    for _ in range(moves):
        if table.penalty == 0:
            return table.columns.T.astype(bool)
        _try_move(table, rng)
        stalled += 1
        if table.penalty < best:
            stalled, best = 0, table.penalty
        if stalled > moves // 3:
            break
    return table.columns.T.astype(bool) if table.penalty == 0 else None


class _Table:
    """The bits, all pairwise overlaps, and how far they exceed what the distance allows."""

    def __init__(self, start: Matrix, distance: int) -> None:
        classes = len(start)
        weight = int(start[0].sum())
        excess = np.maximum(np.arange(weight + 2) - (weight - distance // 2), 0)
        self.cost = (excess * excess).astype(np.int32)
        self.columns = np.ascontiguousarray(start.T).astype(np.int8)  # (N, K)
        bits = start.astype(np.float32)
        self.overlap = (bits @ bits.T).astype(np.int8)  # (K, K)
        np.fill_diagonal(self.overlap, 0)
        self.row_cost = np.array([int(self.cost[self.overlap[row]].sum()) for row in range(classes)])
        self.violating = np.flatnonzero(self.row_cost)
        self.penalty = int(self.row_cost.sum()) // 2

    def trade(self, i: int, j: int, a: int, b: int) -> None:
        """Apply the move: row i trades column a for b, row j trades b for a."""
        self.columns[a, i], self.columns[b, i] = 0, 1
        self.columns[a, j], self.columns[b, j] = 1, 0


def _try_move(table: _Table, rng: random.Random) -> None:
    classes = table.columns.shape[1]
    wanted = table.violating if rng.random() < 0.75 else np.arange(classes)
    i = int(wanted[below(len(wanted), rng)])
    j = below(classes, rng)
    difference = table.columns[:, i] - table.columns[:, j]
    only_i = np.flatnonzero(difference > 0)
    if not len(only_i):
        return
    only_j = np.flatnonzero(difference < 0)
    a, b = int(only_i[below(len(only_i), rng)]), int(only_j[below(len(only_j), rng)])

    change = table.columns[b] - table.columns[a]
    change[i] = change[j] = 0  # the overlap of i and j stays
    overlap_i, overlap_j = table.overlap[i] + change, table.overlap[j] - change
    change_i = table.cost[overlap_i] - table.cost[table.overlap[i]]
    change_j = table.cost[overlap_j] - table.cost[table.overlap[j]]
    per_row = change_i + change_j
    delta = int(per_row.sum())
    if delta > 0 and rng.random() >= 2.0 ** (-_COLDNESS * delta):
        return
    table.trade(i, j, a, b)
    for row, overlap in ((i, overlap_i), (j, overlap_j)):
        table.overlap[row] = overlap
        table.overlap[:, row] = overlap
    per_row[i], per_row[j] = int(change_i.sum()), int(change_j.sum())
    table.row_cost += per_row
    table.violating = np.flatnonzero(table.row_cost)
    table.penalty += delta
