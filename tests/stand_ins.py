"""Small networks and methods that several test modules share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from surgery.conversion import prepare
from surgery.method import Method
from surgery.network import ConvertedNetwork


@dataclass(frozen=True)
class Unchanged(Method):
    """A method that is never run: networks are prepared for it."""

    name: ClassVar[str] = "unchanged"
    preserves: ClassVar[str] = "output"

    def transform(self, architecture, rewriter):
        raise AssertionError("not run")

    def losses(self, step):
        raise AssertionError("not run")

    def plan(self, model, **criteria):
        raise AssertionError("not run")


def rebuilt(model: nn.Module, input_size: int | tuple[int, int] | None = None) -> ConvertedNetwork:
    """Return a copy of `model` as a network of blocks, not edited."""
    return prepare(model, Unchanged(), input_size)
