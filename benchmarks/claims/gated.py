"""Try the claims of channel selection using Gumbel Softmax on rendered characters.

python benchmarks/claims/gated.py [--seeds 3] [--processes 2]

Each variant of `VARIANTS` is trained from scratch for every seed by the recipe `examples/recipes/gated-glyphs.toml`,
and then examined: a few minutes of a core. A run that was stopped goes on where it was. The result is
`benchmarks/results/claims-gated.json`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

import neighbours

# isort: split
import timm
import torch
from harness import write
from torch import Tensor, nn

import surgery
import surgery_gated
from data import Data, load
from recipe import Component, Recipe
from splits import Split, sample
from training import Epoch, Task, evaluate, set_seed, train

RECIPE = neighbours.ROOT / "examples" / "recipes" / "gated-glyphs.toml"
RUNS = neighbours.ROOT / "runs" / "claims-gated"
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
    options = parse()
    jobs = [(name, seed, options.train_only) for name in VARIANTS for seed in range(options.seeds)]
    with ProcessPoolExecutor(options.processes, get_context("spawn")) as pool:
        done = list(pool.map(run, *zip(*jobs, strict=True)))
    if options.train_only:
        return
    recipe, data = setting()
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in VARIANTS}
    for (name, seed, _), result in zip(jobs, done, strict=True):
        found[name].append({"seed": seed, **result})
    what = f"{len(data.classes)} rendered characters, {recipe.model.name}, {recipe.training.epochs} epochs"
    print(write("claims-gated", {"what": what, "recipe": recipe.to_tables(), "variants": found}))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=1, help="runs at the same time, one thread each")
    parser.add_argument("--train-only", action="store_true", help="train what is missing and leave the examination")
    return parser.parse_args()


def setting() -> tuple[Recipe, Data]:
    recipe = Recipe.from_toml(RECIPE)
    return recipe, load(recipe.data.name, **recipe.data.options)


def run(name: str, seed: int, train_only: bool) -> dict[str, Any]:
    """Train one network, or take it from the folder of its run, and examine it."""
    torch.set_num_threads(1)
    recipe, data = setting()
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

    folder = RUNS / f"{name.replace(', ', '-').replace(' ', '_')}-{seed}"
    epochs = train(model, criterion, data, recipe, run_dir=folder, groups=groups, label=f"{name} {seed}")
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
