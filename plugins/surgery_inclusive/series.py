"""The errors of several sub-networks, as figures show them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from surgery.errors import InvalidOption


@dataclass(frozen=True)
class Series:
    """The errors of several sub-networks.

    Attributes:
        name: What they are; series of the same name share a colour.
        points: (multiply-adds of an image, error), with a third number the standard deviation of the error; a line
            connects them in this order. Errors are shares in [0, 1].
        joint: Whether the sub-networks were trained together, a solid line, or each by itself, a dashed one.

    Raises:
        InvalidOption: If a point is none, or there is none.
    """

    name: str
    points: tuple[tuple[float, ...], ...]
    joint: bool = True

    def __post_init__(self) -> None:
        """Check the points, and keep them as tuples."""
        object.__setattr__(self, "points", tuple(tuple(point) for point in self.points))
        if not self.points:
            raise InvalidOption(f"series {self.name!r}: found no point, expected one or more; leave the series out")
        for point in self.points:
            shares = all(0 <= part <= 1 for part in point[1:])
            if len(point) not in (2, 3) or not 0 < point[0] < math.inf or not shares:
                raise InvalidOption(
                    f"series {self.name!r}: found the point {point}, expected (multiply-adds, error) or "
                    "(multiply-adds, error, deviation), the first above 0 and the others shares from 0 to 1; divide "
                    "percentages by 100"
                )
