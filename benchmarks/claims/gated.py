"""Try the claims of channel selection using Gumbel Softmax on rendered characters.

python benchmarks/claims/gated.py [--seeds 3] [--processes 2]

Each variant of `VARIANTS` is trained from scratch for every seed by the recipe `examples/recipes/gated-glyphs.toml`,
and then examined: a few minutes of a core. A run that was stopped goes on where it was. The result is
`benchmarks/results/claims-gated.json`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import neighbours

# isort: split
import timm
import torch
from sweep import folder, setting, sweep
from torch import Tensor, nn

import surgery
import surgery_gated
from data import Data
from recipe import Component, Recipe
from splits import Split, sample
from training import Epoch, Task, evaluate, set_seed, train

RECIPE = neighbours.ROOT / "examples" / "recipes" / "gated-glyphs.toml"
# What differs from the recipe's method. "plain" is not converted.
LAYERS: dict[str, Mapping[str, Any]] = {
    f"{'dependent' if dependent else 'independent'}, per {loss}, {target}": {
        "dependent": dependent,
        "loss": loss,
        "target": target,
    }
    for target in (0.4, 0.7)
    for loss in ("batch", "gate")
    for dependent in (True, False)
}
# The gates of so short a training need a higher rate: hundreds of them share the gradient of one mean.
CHANNELS: dict[str, Mapping[str, Any]] = {
    f"channels {name}": {"granularity": "channel", "decay": 10.0, **options}
    for name, options in {
        "dependent, per batch, 0.5": {"dependent": True, "loss": "batch", "target": 0.5, "gate_lr": 3.0},
        "independent, per batch, 0.5": {"dependent": False, "loss": "batch", "target": 0.5, "gate_lr": 30.0},
        "independent, per gate, 0.5": {"dependent": False, "loss": "gate", "target": 0.5, "gate_lr": 30.0},
    }.items()
}
VARIANTS: dict[str, Mapping[str, Any]] = {"plain": {}, **LAYERS, **CHANNELS}
RECALIBRATION = 110  # batches, which are one epoch
DRAWN_IMAGES = 2_000  # of the 4,000 of the test part, for the modes that run several times


def main() -> None:
    sweep("gated", RECIPE, VARIANTS, run, __doc__)


def run(name: str, seed: int, train_only: bool) -> dict[str, Any]:
    """Train one network, or take it from the folder of its run, and examine it."""
    torch.set_num_threads(1)
    recipe, data = setting(RECIPE)
    model, epochs = trained(name, seed, recipe, data)
    return {} if train_only else {"train": epochs[-1].terms, **examine(model, data, recipe, seed)}


def trained(name: str, seed: int, recipe: Recipe, data: Data) -> tuple[nn.Module, tuple[Epoch, ...]]:
    """Return the network of one run, in eval mode; training goes on from what the run's folder holds."""
    assert recipe.method is not None
    recipe = replace(recipe, training=replace(recipe.training, seed=seed))
    set_seed(seed)
    model = timm.create_model(recipe.model.name, num_classes=len(data.classes))
    task = nn.CrossEntropyLoss()
    criterion: Any = Task(task)
    if name == "plain":
        recipe = replace(recipe, method=None)
    else:
        method = {**recipe.method.options, **VARIANTS[name]}
        model = surgery.convert(model, "gated", input_size=data.image_size, **method)
        criterion = surgery.Objective(model, task)
        recipe = replace(recipe, method=Component("gated", method))

    def groups(network: nn.Module) -> list[dict[str, Any]]:
        return surgery.param_groups(network, lr=recipe.training.lr, weight_decay=recipe.training.weight_decay)

    epochs = train(
        model, criterion, data, recipe, run_dir=folder("gated", name, seed), groups=groups, label=f"{name} {seed}"
    )
    return model.eval(), epochs


def examine(model: nn.Module, data: Data, recipe: Recipe, seed: int) -> dict[str, Any]:
    """Return what the paper claims of a network, measured on test images."""
    if not isinstance(model, surgery.ConvertedNetwork):
        return {"accuracy": evaluate(model, data.test).accuracy, "macs": surgery.cost(model, data.image_size).macs}
    before = surgery_gated.measure(model, batches(data.test))
    surgery_gated.recalibrate(model, shuffled(data, recipe, seed), RECALIBRATION, mode=surgery_gated.Stochastic())
    usage = surgery_gated.measure(model, batches(data.test))
    some = list(batches(sample(data.test, DRAWN_IMAGES)))
    modes = {
        how: surgery_gated.evaluate(model, some, how, seed=seed) for how in ("always_on", "stochastic", "ensemble")
    }
    return {
        "accuracy": usage.accuracy,
        "accuracy before recalibration": before.accuracy,
        "always on": modes["always_on"].accuracy,
        "stochastic": modes["stochastic"].accuracy,
        "majority vote": modes["ensemble"].accuracy,
        "mean probability": modes["ensemble"].mean_probability,
        "macs": usage.macs,
        "macs share": usage.macs_share,
        "rate": usage.rate,
        "rates": {path: list(rates) for path, rates in usage.rates.items()},
        "probabilities": {path: list(values) for path, values in usage.probabilities.items()},
    }


def batches(split: Split) -> Iterator[tuple[Tensor, Tensor]]:
    for indices in torch.arange(len(split)).split(256):
        yield split.batch(indices), split.targets[indices]


def shuffled(data: Data, recipe: Recipe, seed: int) -> Iterator[Tensor]:
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))
    for indices in order.split(recipe.training.batch_size):
        yield data.train.batch(indices)


if __name__ == "__main__":
    main()
