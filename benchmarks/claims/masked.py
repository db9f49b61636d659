"""Try the claims of MaskConnect on rendered characters.

python benchmarks/claims/masked.py [--seeds 3] [--processes 2]

Each variant of `VARIANTS` is trained from scratch for every seed by the recipe `examples/recipes/masked-glyphs.toml`,
and then examined: a few minutes of a core. A run that was stopped goes on where it was. The result is
`benchmarks/results/claims-masked.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import neighbours

# isort: split
import timm
import torch
from sweep import folder, setting, sweep
from torch import nn

import surgery
import surgery_masked
from data import Data
from phases import KEY, Freeze, concentration, converting
from recipe import Component, Recipe
from training import Epoch, Task, evaluate, set_seed, train

RECIPE = neighbours.ROOT / "examples" / "recipes" / "masked-glyphs.toml"
BRANCH: Mapping[str, Any] = {"norm": "branch"}
# What differs from the recipe's method. "plain" is not converted.
VARIANTS: dict[str, Mapping[str, Any]] = {
    "plain": {},
    "full": {"connectivity": "full", "fan_in": None},
    **{f"learned, {k}": {"connectivity": "learned", "fan_in": k} for k in (1, 2, 4)},
    "random, 4": {"connectivity": "random", "fan_in": 4},
    "real-valued to the end": {"connectivity": "real", "fan_in": 4, KEY: None},
    "learned, 4, branch norm": {"connectivity": "learned", "fan_in": 4, **BRANCH},
    "full, branch norm": {"connectivity": "full", "fan_in": None, **BRANCH},
    "random, 1": {"connectivity": "random", "fan_in": 1},
}


def main() -> None:
    sweep("masked", RECIPE, VARIANTS, run, __doc__)


def run(name: str, seed: int, train_only: bool) -> dict[str, Any]:
    """Train one network, or take it from the folder of its run, and examine it."""
    torch.set_num_threads(1)
    recipe, data = setting(RECIPE)
    model, epochs, fixed = trained(name, seed, recipe, data)
    if train_only:
        return {}
    found = {"loss": epochs[-1].loss, "accuracy": epochs[-1].accuracy, **examine(model, data)}
    if fixed == len(epochs):  # behind the measurement, and nothing was trained since
        return {**found, "once fixed": evaluate(model, data.test).accuracy}
    return found if fixed is None else {**found, "phase 1": epochs[fixed - 1].accuracy}


def trained(name: str, seed: int, recipe: Recipe, data: Data) -> tuple[nn.Module, tuple[Epoch, ...], int | None]:
    """Return the network of one run, in eval mode; training goes on from what the run's folder holds.

    Beside it stands what happened in every epoch, and the one after which masks were fixed.
    """
    assert recipe.method is not None
    recipe = replace(recipe, training=replace(recipe.training, seed=seed))
    set_seed(seed)
    model = timm.create_model(recipe.model.name, num_classes=len(data.classes))
    freeze = None
    if name == "plain":
        recipe = replace(recipe, method=None)
    else:
        options = {**recipe.method.options, **VARIANTS[name]}
        method = Component("masked", {key: value for key, value in options.items() if value is not None})
        freeze = Freeze.of(recipe, method)
        model = surgery.convert(model, "masked", input_size=data.image_size, **converting(method).options)
        recipe = replace(recipe, method=method)

    def groups(network: nn.Module) -> list[dict[str, Any]]:
        return surgery.param_groups(network, lr=recipe.training.lr, weight_decay=recipe.training.weight_decay)

    epochs = train(
        model,
        Task(nn.CrossEntropyLoss()),
        data,
        recipe,
        run_dir=folder("masked", name, seed),
        groups=groups,
        label=f"{name} {seed}",
        on_epoch=freeze,
    )
    return model.eval(), epochs, freeze.epochs if freeze else None


def examine(model: nn.Module, data: Data) -> dict[str, Any]:
    """Return what a network costs, what is left of it once it is pruned, and what its masks came to."""
    cost = surgery.cost(model, data.image_size)
    found = {"params": cost.params, "macs": cost.macs}
    if not isinstance(model, surgery.ConvertedNetwork):
        return found
    plan = surgery.plan(model)
    used = surgery_masked.used_branches(model)
    return {
        **found,
        "params once pruned": plan.after.params,
        "macs once pruned": plan.after.macs,
        "kept": plan.kept_params,
        "branches": {path: len(branches) for path, branches in used.items()},
        "concentration": concentration(model),
    }


if __name__ == "__main__":
    main()
