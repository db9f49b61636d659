"""What recipes say about nested sub-networks beside the options of the method, and how right each of them is.

[method]
name = "inclusive"
taxonomy = "groups"  # the coarse groups that come with the data; a table is an option of the method
exits = 4            # also train a network with so many exits, for comparison; without it, or with 0, there is none
subnetworks = 4      # this and everything else are options of the method
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

import surgery
from batches import labelled_batches
from data import Data
from recipe import Component, RecipeError
from splits import Split
from surgery.objective import methods_of, unwrap
from surgery_inclusive import Inclusive
from surgery_inclusive.taxonomy import FINEST, Taxonomy

EXITS, TAXONOMY, GROUPS = "exits", "taxonomy", "groups"


@dataclass(frozen=True)
class Plan:
    """What a recipe's [method] table asks for.

    Attributes:
        method: With nothing but options of the method.
        exits: Of the network with shallow exits; 0 for none.
        taxonomy: Coarse levels of the classes, if any.
    """

    method: Component
    exits: int
    taxonomy: Taxonomy | None

    @classmethod
    def of(cls, method: Component, data: Data) -> Self:
        """Read the table.

        Raises:
            RecipeError: The number of exits is none, or the data has no groups.
            InvalidOption: The taxonomy contradicts itself.
        """
        options = dict(method.options)
        exits = options.pop(EXITS, 0)
        if type(exits) is not int or exits < 0:
            raise RecipeError(f"method.{EXITS} is {exits!r}; expected a whole number, 0 for no network with exits.")
        asked = options.pop(TAXONOMY, None)
        taxonomy = None if asked is None else Taxonomy.of(groups_of(data) if asked == GROUPS else asked)
        if taxonomy is not None:
            options[TAXONOMY] = taxonomy.to_option()
        return cls(Component(method.name, options), exits, taxonomy)


def groups_of(data: Data) -> dict[str, Any]:
    """Return the coarse groups of the data as an option of the method.

    Raises:
        RecipeError: It has none.
    """
    if data.groups is None or data.group_names is None:
        raise RecipeError(
            f'method.{TAXONOMY} is "{GROUPS}", but the data {data.name} has none; use glyphs or cifar100, or write a '
            "table [method.taxonomy] with the group of every class."
        )
    return {"group": {"groups": list(data.groups), "names": list(data.group_names)}}


@torch.no_grad()
def accuracies(model: nn.Module, split: Split, *, device: str = "cpu", workers: int = 0) -> Tensor:
    """Return the share of images that each sub-network is right about, on each level of its taxonomy.

    Shape:
        (K, D), float64: sub-networks from thin to full, levels from fine to coarse.
    """
    method = next(method for method in methods_of(unwrap(model)) if isinstance(method, Inclusive))
    taxonomy = None if method.taxonomy is None else Taxonomy.of(method.taxonomy)
    levels = (FINEST, *(taxonomy.levels if taxonomy else ()))
    hits = torch.zeros(method.subnetworks, len(levels), dtype=torch.float64)
    model.eval()
    for images, classes in labelled_batches(split, workers=workers):
        with surgery.record(model) as taps:
            model(images.to(device))
        for depth, level in enumerate(levels):
            labels = taxonomy.labels(classes, level) if taxonomy else classes
            for k in range(method.subnetworks):
                name = f"logits/{k + 1}" if depth == 0 else f"logits/{k + 1}/{level}"
                hits[k, depth] += (taps[name].argmax(dim=1).cpu() == labels).sum()
    return hits / len(split)
