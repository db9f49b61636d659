"""Which level of a taxonomy each sub-network should predict, so that all of them are right often enough.

Sub-network k predicts the finest level d whose accuracy a[k, d] is at least the wanted one, and no coarser a level than
a smaller sub-network does. Larger ones are right more often on every level and coarser levels are easier, so the first
usually implies the second; measured accuracies need not keep to that. So the choice starts from the full sub-network
and goes down: each one chooses among the levels that are no finer than the choice of the next larger one. Where the two
wishes are at odds, a smaller sub-network gives up detail that it could have had, rather than a larger one its accuracy.

Reference: Lee & Shin, Anytime neural prediction via slicing networks vertically (2018), sections 3.3 and 4.3, figure 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.errors import InvalidOption


@dataclass(frozen=True)
class Choice:
    """The level that a sub-network should predict.

    Attributes:
        subnetwork: Which one, from 1.
        level: Index of the level, 0 for the finest.
        accuracy: That of the sub-network on this level, a share in [0, 1].
        reached: Whether it is at least the wanted one.
    """

    subnetwork: int
    level: int
    accuracy: float
    reached: bool


def choose_levels(accuracy: Tensor, wanted: float | None = None) -> tuple[Choice, ...]:
    """Choose for every sub-network the finest level whose accuracy is at least the wanted one.

    A sub-network that reaches it on no level that it may choose gets the one where it is best, the finest of several.

    Args:
        accuracy: Shares in [0, 1], sub-networks from thin to full, levels from fine to coarse. Shape: (K, D).
        wanted: A share in [0, 1]; default: what the full sub-network reaches on the finest level.

    Returns:
        One choice for each sub-network, from thin to full.

    Raises:
        InvalidOption: If a number is no share, or `accuracy` no table of them.
    """
    _check(accuracy)
    if wanted is not None and not 0 <= wanted <= 1:
        raise InvalidOption(f"choose_levels: found wanted={wanted!r}, expected a share from 0 to 1, or None")
    # In the precision of the table: 0.7 in float32 is below 0.7 in float64.
    least = accuracy[-1, 0] if wanted is None else torch.tensor(wanted, dtype=accuracy.dtype, device=accuracy.device)
    choices: list[Choice] = []
    finest = 0
    for k in range(len(accuracy), 0, -1):
        allowed = accuracy[k - 1, finest:].tolist()
        good = [value >= least.item() for value in allowed]
        best = good.index(True) if any(good) else allowed.index(max(allowed))
        finest += best
        choices.append(Choice(k, finest, allowed[best], good[best]))
    return tuple(reversed(choices))


def worst(choices: Sequence[Choice]) -> Choice:
    """Return the choice of the lowest accuracy, that of the thinnest sub-network among equals.

    Raises:
        InvalidOption: If there is none.
    """
    if not choices:
        raise InvalidOption("worst: found no choice, expected one or more; pass what choose_levels returned")
    return min(choices, key=lambda choice: choice.accuracy)


def _check(accuracy: Tensor) -> None:
    if accuracy.dim() != 2 or not accuracy.numel() or not accuracy.is_floating_point():
        raise InvalidOption(
            f"choose_levels: found accuracies {tuple(accuracy.shape)} of {accuracy.dtype}, expected (sub-networks, "
            "levels) of a floating-point type"
        )
    if not bool(((accuracy >= 0) & (accuracy <= 1)).all()):  # so that NaN is refused, too
        raise InvalidOption(
            f"choose_levels: found accuracies from {accuracy.min():g} to {accuracy.max():g}, expected shares from 0 to "
            "1; divide percentages by 100"
        )
