"""The phases of a training with masks: they are learned, and then fixed at an epoch that the recipe names.

    [method]
    name = "masked"
    freeze_epoch = 120   # completed epochs at which the masks are fixed; without it, after the last one
    fan_in = 4           # this and everything else are options of the method

The phases behind it differ in the learning rate alone, which is the schedule's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import nn

import surgery_masked
from recipe import Component, Recipe, RecipeError
from training import Epoch

KEY = "freeze_epoch"


@dataclass(frozen=True)
class Freeze:
    """Fixes the masks at the end of one epoch; to be called by `training.train`.

    The checkpoint of that epoch is written afterwards, so a run that goes on from it has fixed masks.

    Attributes:
        epochs: How many epochs are completed then.
    """

    epochs: int

    @classmethod
    def of(cls, recipe: Recipe, method: Component) -> Self:
        """Read the recipe's epoch; one behind the last means the last.

        Raises:
            RecipeError: It is no whole number of at least 1.
        """
        found = method.options.get(KEY, recipe.training.epochs)
        if type(found) is not int or found < 1:
            raise RecipeError(f"method.{KEY} is {found!r}; expected a whole number of epochs, at least 1.")
        return cls(min(found, recipe.training.epochs))

    def __call__(self, model: nn.Module, epoch: Epoch) -> None:
        """Fix the masks if this was the epoch."""
        if epoch.epoch + 1 == self.epochs:
            surgery_masked.freeze(model)


def converting(method: Component) -> Component:
    """Return the method without what is not an option of it."""
    return Component(method.name, {key: value for key, value in method.options.items() if key != KEY})


def concentration(model: nn.Module) -> float:
    """Return the share of the real-valued masks that is on the active entries, the mean over all branches that read.

    It is K / C where the masks have not moved, and 1 where they have no doubt.
    """
    rows = [(pair.real * pair.active).sum(dim=1) for pair in surgery_masked.connectivity(model).values()]
    return float(torch.cat(rows).mean())
