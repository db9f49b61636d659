"""What several functions of the method expect of their arguments."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from surgery.errors import InvalidOption


def whole_number(value: Any, least: int, where: str, name: str) -> int:
    """Return an integer of any type as an `int`.

    Raises:
        InvalidOption: If `value` is no integer, a bool, or below `least`; the message begins with `where`.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least:
        raise InvalidOption(f"{where}: found {name}={value!r}, expected a whole number of at least {least}")
    return number


def class_indices(targets: Tensor, samples: int, classes: int, where: str) -> Tensor:
    """Return targets (M,) as int64.

    Raises:
        InvalidOption: If they are not `samples` integers from 0 to `classes` - 1; the message begins with `where`.
    """
    if targets.shape != (samples,) or targets.is_floating_point() or targets.dtype == torch.bool:
        raise InvalidOption(
            f"{where}: found targets {tuple(targets.shape)} of {targets.dtype}, expected class indices ({samples},)"
        )
    indices = targets.long()
    if samples and not 0 <= int(indices.min()) <= int(indices.max()) < classes:
        raise InvalidOption(
            f"{where}: found targets from {int(indices.min())} to {int(indices.max())}, expected classes 0 to "
            f"{classes - 1}; leave samples without a class out"
        )
    return indices


def yes_or_no(values: Tensor, where: str, name: str) -> Tensor:
    """Return truth values as bool, in the shape that they have.

    Raises:
        InvalidOption: If one is neither 0 nor 1; the message begins with `where`.
    """
    if values.dtype != torch.bool and not bool(((values == 0) | (values == 1)).all()):
        raise InvalidOption(f"{where}: found values of {name} other than 0 and 1, expected bool; compare, as in y == 3")
    return values.bool()
