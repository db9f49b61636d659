"""Which branches are used follows from the active connections, backwards through every chain."""

from __future__ import annotations

import itertools

import pytest
import torch

from surgery_masked.connections import Connections, active_counts, chains, used_by


def pair(producer, consumer, *rows, branches=3):
    """Return the connections whose branch j reads the branches `rows[j]`."""
    active = torch.zeros(len(rows), branches, dtype=torch.bool)
    for j, read in enumerate(rows):
        active[j, list(read)] = True
    return Connections(producer, consumer, active.double() / active.sum(dim=1, keepdim=True), active)


CHAIN = [pair("a", "b", [1], [0], [1]), pair("b", "c", [0], [0], [2])]


def test_a_branch_that_only_an_unused_branch_reads_is_unused():
    """C = 3, K = 1: c reads b0, b0 and b2, so b1 goes; a0 is read by b1 alone and goes with it, a2 by nobody."""
    assert used_by(CHAIN) == {"a": (1,), "b": (0, 2), "c": (0, 1, 2)}


def test_every_chain_ends_in_a_block_whose_branches_are_all_used():
    """A second chain x -> y behind the first: y reads x0 and x2 twice over, so x1 goes; c stays whole."""
    both = [*CHAIN, pair("x", "y", [0, 2], [2, 0], [0, 2])]
    expected = [("a", (1,)), ("b", (0, 2)), ("c", (0, 1, 2)), ("x", (0, 2)), ("y", (0, 1, 2))]
    assert list(used_by(both).items()) == expected
    assert [[one.consumer for one in chain] for chain in chains(both)] == [["b", "c"], ["y"]]


def test_counts_are_by_depth():
    assert active_counts(CHAIN) == [("a", 1), ("b", 2), ("c", 3)]


def test_nothing_connected_is_nothing_used():
    assert used_by([]) == {}
    assert active_counts([]) == []


@pytest.mark.parametrize(("branches", "fan_in"), [(2, 1), (4, 1), (4, 3), (4, 4)])
def test_used_branches_are_those_on_a_path_to_the_last_block(branches, fan_in):
    """Every path of one branch a block is walked through; a branch is used where a path of active entries starts."""
    draws = torch.rand(3, branches, branches).argsort(dim=-1)[..., :fan_in].tolist()
    names = ["a", "b", "c", "d"]
    connections = [pair(*names[i : i + 2], *rows, branches=branches) for i, rows in enumerate(draws)]
    expected = {name: set() for name in names}
    for path in itertools.product(range(branches), repeat=4):
        for start in range(4):
            if all(path[i] in draws[i][path[i + 1]] for i in range(start, 3)):
                expected[names[start]].add(path[start])
    assert used_by(connections) == {name: tuple(sorted(used)) for name, used in expected.items()}
