"""Try the claims of SplitNet on rendered characters: one network against several small ones of as many parameters.

python benchmarks/claims/divided.py [--seeds 3] [--processes 2]

Each variant of `VARIANTS` is trained from scratch for every seed by the recipe `examples/recipes/divided-glyphs.toml`,
and then examined: a few minutes of a core. A run that was stopped goes on where it was. The result is
`benchmarks/results/claims-divided.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import neighbours

# isort: split
import timm
import torch
from sweep import folder, setting, sweep
from torch import nn

import surgery
import surgery_divided
from batches import labelled_batches
from data import Data
from recipe import Component, Recipe
from training import Criterion, Epoch, Task, set_seed, train
from views import Plan

RECIPE = neighbours.ROOT / "examples" / "recipes" / "divided-glyphs.toml"
PLAIN = "plain"
ONE_VIEW: Mapping[str, Any] = {"views": False}
ALONE: Mapping[str, Any] = {"cotraining": 0.0}
# What each of them changes in the recipe's method, in the order of importance.
CHANGES: dict[str, Mapping[str, Any]] = {
    "": {},
    ", one view": ONE_VIEW,
    ", no co-training": ALONE,
    ", neither": {**ONE_VIEW, **ALONE},
}
# What differs from the recipe's method. "plain" is not converted.
VARIANTS: dict[str, Mapping[str, Any]] = {
    PLAIN: {},
    **{
        f"{networks} networks{name}": {"networks": networks, **options}
        for name, options in CHANGES.items()
        for networks in (2, 4)
    },
}


def main() -> None:
    sweep("divided", RECIPE, VARIANTS, run, __doc__)


def run(name: str, seed: int, train_only: bool) -> dict[str, Any]:
    """Train one network, or take it from the folder of its run, and examine it."""
    torch.set_num_threads(1)
    recipe, data = setting(RECIPE)
    model, epochs = trained(name, seed, recipe, data)
    if train_only:
        return {}
    return {"train": epochs[-1].terms, "accuracy": epochs[-1].accuracy, **examine(model, data)}


def trained(name: str, seed: int, recipe: Recipe, data: Data) -> tuple[nn.Module, tuple[Epoch, ...]]:
    """Return the network of one run, in eval mode, and its epochs; training goes on from what its folder holds."""
    assert recipe.method is not None
    method = Component("divided", {**recipe.method.options, **VARIANTS[name]})
    training = replace(recipe.training, seed=seed)
    if name == PLAIN:
        asked, model, seen = replace(recipe, method=None, training=training), fresh(recipe, seed, data), data
        criterion: Criterion = Task(nn.CrossEntropyLoss())
    else:
        asked, plan = replace(recipe, method=method, training=training), Plan.of(method)
        source = fresh(recipe, seed, data)
        set_seed(seed)
        model = surgery.convert(source, "divided", input_size=data.image_size, **plan.method.options)
        criterion, seen = surgery.Objective(model, nn.CrossEntropyLoss()), plan.seen(data)

    def groups(network: nn.Module) -> list[dict[str, Any]]:
        return surgery.param_groups(network, lr=training.lr, weight_decay=training.weight_decay)

    epochs = train(
        model, criterion, seen, asked, run_dir=folder("divided", name, seed), groups=groups, label=f"{name} {seed}"
    )
    return model.eval(), epochs


def fresh(recipe: Recipe, seed: int, data: Data) -> nn.Module:
    """Return the undivided network before its training."""
    set_seed(seed)
    network: nn.Module = timm.create_model(recipe.model.name, num_classes=len(data.classes))
    return network


def examine(model: nn.Module, data: Data) -> dict[str, Any]:
    """Return what a network costs, and how right its small networks are alone and joined in every manner."""
    cost = surgery.cost(model, data.image_size)
    found = {"params": cost.params, "macs": cost.macs}
    if not isinstance(model, surgery.ConvertedNetwork):
        return found
    scores = surgery_divided.accuracies(model, labelled_batches(data.test))
    return {**found, **asdict(scores), "average": scores.average}


if __name__ == "__main__":
    main()
