"""Handing out codewords: the gain of a trade, that none is left, and what a taxonomy makes of two classes."""

import itertools

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from surgery.errors import InvalidOption
from surgery_coded import CodingScheme, assign, taxonomy_similarity
from surgery_coded.assignment import swap_gains

# Neighbors share one of the two active branches, opposite words none.
RING = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1], [1, 0, 0, 1]]).bool()


def objective(codewords: NDArray[np.bool_], similarity: NDArray[np.float64]) -> float:
    """The sum as it is defined, pair by pair."""
    pairs = itertools.permutations(range(len(codewords)), 2)
    return sum(similarity[i, j] * int((codewords[i] & codewords[j]).sum()) for i, j in pairs)


def swapped(codewords: NDArray[np.bool_], i: int, j: int) -> NDArray[np.bool_]:
    order = np.arange(len(codewords))
    order[[i, j]] = j, i
    return codewords[order]


def random_case(classes: int, branches: int, active: int, seed: int) -> tuple[CodingScheme, NDArray[np.float64]]:
    draws = np.random.default_rng(seed)
    half = draws.normal(size=(classes, classes))
    scheme = CodingScheme(CodingScheme.search(classes, branches, active, seed + 1).codewords)
    return scheme, half + half.T


def off_diagonal(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return values - np.diag(np.diag(values))


@pytest.mark.parametrize("seed", range(4))
def test_gains_are_what_every_trade_changes(seed: int) -> None:
    scheme, similarity = random_case(9, 7, 3, seed)
    words = scheme.codewords.numpy()
    gains = swap_gains(words.astype(np.float64), off_diagonal(similarity))
    start = objective(words, similarity)
    expected = [[objective(swapped(words, i, j), similarity) - start for j in range(9)] for i in range(9)]
    np.testing.assert_allclose(gains, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("classes", [2, 3, 6, 15])
@pytest.mark.parametrize("seed", range(3))
def test_no_trade_is_left_that_gains(classes: int, seed: int) -> None:
    scheme, similarity = random_case(classes, 8, 3, seed)
    words = assign(scheme, similarity).codewords.numpy()
    reached = objective(words, similarity)
    assert reached >= objective(scheme.codewords.numpy(), similarity)
    for i, j in itertools.combinations(range(classes), 2):
        assert objective(swapped(words, i, j), similarity) <= reached + 1e-9


@pytest.mark.parametrize("seed", range(6))
def test_three_pairs_of_classes_get_the_best_of_all_orders(seed: int) -> None:
    scheme = CodingScheme.search(6, 8, 3, seed)
    similarity = taxonomy_similarity([[0, 1, 2, 0, 1, 2]])
    words = scheme.codewords.numpy()
    best = max(objective(words[list(order)], similarity) for order in itertools.permutations(range(6)))
    assert objective(assign(scheme, similarity).codewords.numpy(), similarity) == best


def test_two_pairs_of_classes_on_a_ring_become_neighbors() -> None:
    """0 and 2 are alike, and 1 and 3, but have opposite words: 0 of the sum. As neighbors 1 + 1 in both directions."""
    similarity = np.zeros((4, 4))
    similarity[[0, 2, 1, 3], [2, 0, 3, 1]] = 1
    assigned = assign(CodingScheme(RING), similarity)
    assert objective(RING.numpy(), similarity) == 0
    assert objective(assigned.codewords.numpy(), similarity) == 4


def test_classes_that_are_all_alike_keep_their_codewords() -> None:
    assert assign(CodingScheme(RING), np.ones((4, 4))) == CodingScheme(RING)
    assert assign(CodingScheme(RING[:1]), np.ones((1, 1))) == CodingScheme(RING[:1])


@pytest.mark.parametrize(
    ("parameters", "sizes", "before", "after"),
    [((100, 20, 8), [5], 3.2, 3.9), ((1000, 32, 16), [100, 10], 8.1, 9.6), ((1000, 32, 8), [100, 10], 2.1, 3.4)],
)
def test_groups_share_more_branches_and_nothing_else_changes(
    parameters: tuple[int, int, int], sizes: list[int], before: float, after: float
) -> None:
    """The finest groups: 20 of 5 classes, 100 of 10. The ceiling, active - min_distance / 2, is 4, 10 and 4."""
    scheme = CodingScheme.search(*parameters)
    similarity = taxonomy_similarity([[k // size for k in range(scheme.classes)] for size in sizes])
    finest = (similarity == len(sizes) ** 2) & ~np.eye(scheme.classes, dtype=bool)
    assigned = assign(scheme, similarity)

    def shared(codewords: torch.Tensor) -> float:
        bits = codewords.numpy().astype(np.float64)
        return float((bits @ bits.T)[finest].mean())

    assert shared(scheme.codewords) <= before
    assert shared(assigned.codewords) >= after
    assert assigned.min_distance == scheme.min_distance
    assert torch.equal(assigned.column_sums, scheme.column_sums)
    assert sorted(assigned.codewords.tolist()) == sorted(scheme.codewords.tolist())


def test_arrays_and_tensors_of_any_type_give_the_same_order() -> None:
    scheme = CodingScheme.search(30, 10, 4)
    similarity = taxonomy_similarity([[k % 6 for k in range(30)]])
    first = assign(scheme, similarity)
    assert first != scheme
    assert first == assign(scheme, similarity)
    assert first == assign(scheme, torch.from_numpy(similarity).to(torch.bfloat16))
    assert first == assign(scheme, similarity.astype(np.int64))


def test_what_rounding_leaves_is_no_asymmetry() -> None:
    scheme, similarity = random_case(12, 8, 3, seed=0)
    assert assign(scheme, similarity * (1 + 1e-7 * np.triu(np.ones((12, 12))))) == assign(scheme, similarity)


def test_the_diagonal_and_the_argument_are_left_alone() -> None:
    scheme, similarity = random_case(12, 8, 3, seed=0)
    odd = similarity.copy()
    np.fill_diagonal(odd, np.nan)
    kept = odd.copy()
    assert assign(scheme, odd) == assign(scheme, similarity)
    np.testing.assert_array_equal(odd, kept)
    tensor = torch.from_numpy(similarity.copy())
    assign(scheme, tensor)
    assert torch.equal(tensor, torch.from_numpy(similarity))


@pytest.mark.parametrize(
    ("similarity", "reason"),
    [
        (np.ones((4, 5)), r"found a similarity of shape \(4, 5\), expected \(4, 4\)"),
        (torch.ones(3, 3), r"found a similarity of shape \(3, 3\), expected \(4, 4\)"),
        (np.diag([1.0, np.inf], 2)[:4, :4] + np.zeros((4, 4)), r"found similarity inf of classes 1 and 3"),
        (np.eye(4, k=1), r"found similarity 1\.0 of classes 0 and 1 but 0\.0 of 1 and 0, expected a symmetric"),
        ("abcd", "with values of <U4, expected a table of real numbers"),
        (None, "with values of object"),
        (np.full((4, 4), "1.0"), "with values of <U3"),
        (np.ones((4, 4), dtype=complex), "with values of complex128"),
        (torch.ones(4, 4, dtype=torch.complex64).conj(), "with values of complex128"),
        ([[1.0], [1.0, 2.0]], "with values of object"),
    ],
)
def test_what_is_no_similarity_is_refused(similarity: NDArray[np.float64] | torch.Tensor, reason: str) -> None:
    with pytest.raises(InvalidOption, match=reason):
        assign(CodingScheme(RING), similarity)


def test_a_scheme_of_another_type_is_refused() -> None:
    with pytest.raises(InvalidOption, match="found a scheme of type str, expected a CodingScheme"):
        assign("5/10", np.ones((4, 4)))  # type: ignore[arg-type]


@pytest.mark.parametrize("largest", [1.7e308, 1e-300])
def test_the_largest_and_smallest_similarities_give_the_same_order(largest: float) -> None:
    scheme, similarity = random_case(12, 8, 3, seed=0)
    extreme = similarity * (largest / np.abs(similarity).max())
    assert assign(scheme, extreme) == assign(scheme, similarity) != scheme


def test_taxonomy_takes_labels_by_value_from_tensors_and_arrays() -> None:
    labels = [[0, 0, 1, 1], [0, 1, 1, 1]]
    expected = taxonomy_similarity(labels).tolist()
    assert expected == [[4, 1, 0, 0], [1, 4, 0, 0], [0, 0, 4, 4], [0, 0, 4, 4]]
    assert taxonomy_similarity([torch.tensor(level) for level in labels]).tolist() == expected
    assert taxonomy_similarity([np.array(level) for level in labels]).tolist() == expected
    assert taxonomy_similarity(torch.tensor(labels)).tolist() == expected  # type: ignore[arg-type]


def test_taxonomy_counts_the_squared_levels_that_two_classes_share() -> None:
    """Cat and dog are mammals (1 level), cat and lynx felines too (2 levels); the oak shares only the root."""
    found = taxonomy_similarity([["animal", "animal", "animal", "plant"], ["feline", "canine", "feline", "tree"]])
    assert found.tolist() == [[4, 1, 4, 0], [1, 4, 1, 0], [4, 1, 4, 0], [0, 0, 0, 4]]
    assert found.dtype == np.float64


def test_labels_may_be_used_again_in_another_group() -> None:
    again, apart = taxonomy_similarity([[0, 0, 1, 1], [0, 1, 0, 1]]), taxonomy_similarity([[0, 0, 1, 1], [0, 1, 2, 3]])
    assert again.tolist() == apart.tolist()


@pytest.mark.parametrize("levels", [[], [[]], [[0, 1], [0]]])
def test_levels_of_different_length_are_refused(levels: list[list[int]]) -> None:
    with pytest.raises(InvalidOption, match=r"found levels of \[.*\] labels"):
        taxonomy_similarity(levels)
