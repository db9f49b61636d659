"""Several views of every training image: what a divided network is trained on.

[method]
name = "divided"
views = true  # each small network sees an augmentation of its own; without it, or with false, all see the same
networks = 2  # this and everything else are options of the method

The first view is what a plain network sees. The test part has one view, which all small networks share.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from batches import derive_seed
from data import Data
from recipe import Component, RecipeError
from splits import FolderSplit, Split
from surgery_divided import Divided, several_views

VIEWS, NETWORKS = "views", "networks"


@dataclass(frozen=True)
class Plan:
    """What a recipe's [method] table asks for.

    Attributes:
        method: With nothing but options of the method.
        networks: Their number.
        views: Whether each has its own view.
    """

    method: Component
    networks: int
    views: bool

    @classmethod
    def of(cls, method: Component) -> Self:
        """Read the table.

        Raises:
            RecipeError: `views` is neither true nor false.
        """
        options = dict(method.options)
        views = options.pop(VIEWS, False)
        if type(views) is not bool:
            raise RecipeError(f"method.{VIEWS} is {views!r}; expected true or false.")
        return cls(Component(method.name, options), options.get(NETWORKS, Divided.networks), views)

    def seen(self, data: Data) -> Data:
        """Return the data as the divided network sees it."""
        return several(data, self.networks) if self.views else data


@dataclass(frozen=True, eq=False)
class ViewsSplit(Split):
    """The images of another split, augmented several times and put side by side on channels: (B, S*3, H, W)."""

    whole: Split
    networks: int

    @property
    def targets(self) -> Tensor:
        return self.whole.targets

    def batch(self, indices: Tensor, seed: int | None = None) -> Tensor:
        if seed is None:
            return self.whole.batch(indices)
        seeds = [seed, *(derive_seed("view", seed, view) for view in range(1, self.networks))]
        return torch.cat([self.whole.batch(indices, drawn) for drawn in seeds], dim=1)


def several(data: Data, networks: int) -> Data:
    """Return the data with so many views of every training image."""
    train = data.train
    if isinstance(train, FolderSplit):  # every file is decoded once, not once a view
        seen: Split = dataclasses.replace(train, augmented=several_views(train.augmented, networks))
    else:
        seen = ViewsSplit(train, networks)
    return dataclasses.replace(data, train=seen)
