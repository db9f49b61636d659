"""Which class gets which codeword: similar classes share more branches.

With B the codewords as rows and S the similarity, the rows of B are permuted so that sum_ij S_ij <b_i, b_j> grows.
With G = S B and M = B G^T, trading the codewords of i and j gains

    2 (M_ij + M_ji - M_ii - M_jj - S_ij |b_i - b_j|^2),

where S has a zero diagonal. The gains of all trades thus cost one product of a (K, N) with an (N, K) matrix.
"""

from collections.abc import Hashable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from surgery.errors import InvalidOption
from surgery_coded.scheme import CodingScheme

Values = NDArray[np.float64]

_TRADES_PER_ROUND = 32
_ROUNDING = 1e-9  # a gain below this share of the largest possible one may be nothing but rounding


def assign(scheme: CodingScheme, similarity: Tensor | NDArray[np.generic]) -> CodingScheme:
    """Permute the codewords so that classes of large similarity share more branches.

    From the order given, the best trades of two codewords are made until none is left that gains. Minimum distance
    and column sums stay as they are. Whole numbers as similarities give the same order on any machine.

    Args:
        scheme: The scheme whose codewords are handed out anew.
        similarity: Symmetric, higher is closer; the diagonal is not used.

    Shape:
        similarity: (K, K).

    Raises:
        InvalidOption: The similarity has another shape, is not real, not symmetric or not finite; or `scheme` is none.
    """
    if not isinstance(scheme, CodingScheme):
        raise InvalidOption(
            f"assign: found a scheme of type {type(scheme).__name__}, expected a CodingScheme; see CodingScheme.search"
        )
    wanted = _check(similarity, scheme.classes)
    words = scheme.codewords.numpy().astype(np.float64)
    order = np.arange(scheme.classes)
    least = _ROUNDING * float(np.abs(wanted).sum(axis=1).max()) * scheme.active
    improved = True
    while improved:
        improved = False
        for i, j in _best_trades(swap_gains(words[order], wanted)):
            if _gain(words[order], wanted, i, j) > least:  # anew, for the trades before it changed what it gains
                order[[i, j]] = order[[j, i]]
                improved = True
    return CodingScheme(scheme.codewords[torch.from_numpy(order)])


def swap_gains(words: Values, similarity: Values) -> Values:
    """Return how much sum_ij S_ij <b_i, b_j> grows when i and j trade their codewords, for all pairs.

    Shape:
        words: (K, N), of 0 and 1. similarity: (K, K), symmetric with a zero diagonal. Returns (K, K), symmetric.
    """
    meeting = words @ (similarity @ words).T  # M
    own = np.diagonal(meeting)
    weights = words.sum(axis=1)
    distance = weights[:, None] + weights - 2 * (words @ words.T)
    gains: Values = 2 * (meeting + meeting.T - own[:, None] - own - similarity * distance)
    return gains


def taxonomy_similarity(levels: Sequence[Sequence[Hashable] | Tensor | NDArray[np.generic]]) -> Values:
    """Return the squared depth of the deepest common ancestor of any two classes; 0 where only the root is common.

    Args:
        levels: From coarse to fine, the group of each class. Groups are told apart within their coarser group, so
            labels may be used again.

    Shape:
        (K, K); the diagonal holds the squared number of levels.

    Raises:
        InvalidOption: There is no level, or the levels differ in the number of classes.
    """
    # The elements of a tensor are told apart by identity, not by value.
    labels = [level.tolist() if isinstance(level, Tensor | np.ndarray) else level for level in levels]
    sizes = [len(level) for level in labels]
    if not sizes or len(set(sizes)) > 1 or not sizes[0]:
        raise InvalidOption(
            f"taxonomy_similarity: found levels of {sizes} labels, expected at least one level and in each as many "
            f"labels as there are classes; pass one label per class and level"
        )
    groups = [0] * sizes[0]
    depth = np.zeros((sizes[0], sizes[0]))
    for level in labels:
        numbers: dict[Hashable, int] = {}
        groups = [numbers.setdefault(key, len(numbers)) for key in zip(groups, level, strict=True)]
        found = np.array(groups)
        depth += found[:, None] == found
    return depth**2


def _gain(words: Values, similarity: Values, i: int, j: int) -> float:
    change = words[j] - words[i]
    return 2 * float((similarity[i] - similarity[j]) @ (words @ change) - similarity[i, j] * (change @ change))


def _best_trades(gains: Values) -> list[tuple[int, int]]:
    """List the best trades of the classes that gain most, the best first."""
    partner = gains.argmax(axis=1)
    best = gains[np.arange(len(gains)), partner]
    first = np.argsort(-best, kind="stable")[:_TRADES_PER_ROUND]
    return list(zip(first.tolist(), partner[first].tolist(), strict=True))


def _check(similarity: Tensor | NDArray[np.generic], classes: int) -> Values:
    values = _real(similarity)
    if values.shape != (classes, classes):
        raise InvalidOption(
            f"assign: found a similarity of shape {values.shape}, expected ({classes}, {classes}); pass one row and "
            f"one column per class of the scheme"
        )
    np.fill_diagonal(values, 0)
    if not np.isfinite(values).all():
        i, j = np.argwhere(~np.isfinite(values))[0].tolist()
        raise InvalidOption(
            f"assign: found similarity {values[i, j]} of classes {i} and {j}, expected finite numbers; give unknown "
            f"pairs the mean of the others"
        )
    # Sums of what is near the largest float overflow; a power of two takes nothing from the digits.
    scaled: Values = np.ldexp(values, -np.frexp(np.abs(values).max())[1])
    apart = np.abs(scaled - scaled.T)
    if apart.max() > 1e-6 * np.abs(scaled).max():  # what float32 products leave is no asymmetry
        i, j = np.argwhere(apart == apart.max())[0].tolist()
        raise InvalidOption(
            f"assign: found similarity {values[i, j]} of classes {i} and {j} but {values[j, i]} of {j} and {i}, "
            f"expected a symmetric table; pass (s + s.T) / 2"
        )
    return (scaled + scaled.T) / 2


def _real(similarity: Tensor | NDArray[np.generic]) -> Values:
    """Return a copy in float64."""
    if isinstance(similarity, Tensor):  # numpy knows no bfloat16
        similarity = similarity.cpu().to(torch.promote_types(similarity.dtype, torch.float64)).numpy(force=True)
    try:
        values = np.asarray(similarity)
    except ValueError:  # rows of different lengths
        values = np.array(None)
    if values.dtype.kind not in "biuf":
        raise InvalidOption(
            f"assign: found a similarity with values of {values.dtype}, expected a table of real numbers; pass "
            f"an array or a tensor"
        )
    return np.array(values, dtype=np.float64)
