"""Try the claims of the paper on slicing networks vertically, on rendered characters.

python benchmarks/claims/inclusive.py [--seeds 3] [--processes 2]

Each variant of `VARIANTS` is trained from scratch for every seed by the recipe
`examples/recipes/inclusive-glyphs.toml`, and then examined: minutes of a core. A run that was stopped goes on where it
was. The result is `benchmarks/results/claims-inclusive.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import neighbours

# isort: split
import timm
import torch
from sweep import folder, setting, sweep
from torch import nn

import surgery
from data import Data
from exits import ExitsLoss, ShallowExits
from recipe import Component, Recipe
from subnetworks import Plan, accuracies
from surgery_inclusive import subnetwork_macs
from surgery_inclusive.contributions import branch_norms
from surgery_inclusive.levels import choose_levels, worst
from training import Criterion, Epoch, Task, evaluate, set_seed, train

RECIPE = neighbours.ROOT / "examples" / "recipes" / "inclusive-glyphs.toml"

Kind = Literal["plain", "joint", "thin", "exits", "shallow"]


@dataclass(frozen=True)
class Variant:
    """What is trained.

    Attributes:
        kind: "plain" is not converted, "joint" trains all sub-networks of a converted one, "thin" one of them alone;
            "exits" trains all exits of the plain network, "shallow" one of them alone.
        number: Which sub-network or exit, from 1, where it is one alone.
        options: What differs from the recipe's method; None leaves an option out.
    """

    kind: Kind
    number: int = 0
    options: Mapping[str, Any] | None = None


FINE: Mapping[str, Any] = {"taxonomy": None}
VARIANTS: dict[str, Variant] = {
    "joint, independent": Variant("joint", options=FINE),
    "plain": Variant("plain"),
    "joint, shared": Variant("joint", options={**FINE, "norm": "shared"}),
    "shallow, joint": Variant("exits"),
    **{f"thin {k}": Variant("thin", k, FINE) for k in (1, 2, 3)},
    **{f"shallow {i}": Variant("shallow", i) for i in (1, 2, 3)},
    "joint, taxonomy": Variant("joint"),
    "sparse": Variant("joint", options={**FINE, "sparse": True}),
    "sparse, taxonomy": Variant("joint", options={"sparse": True}),
}


def main() -> None:
    sweep("inclusive", RECIPE, VARIANTS, run, __doc__)


def run(name: str, seed: int, train_only: bool) -> dict[str, Any]:
    """Train one network, or take it from the folder of its run, and examine it."""
    torch.set_num_threads(1)
    recipe, data = setting(RECIPE)
    model, epochs = trained(name, seed, recipe, data)
    if train_only:
        return {}
    return {
        "loss": epochs[-1].terms["task"],
        "accuracy": epochs[-1].accuracy,
        **examine(VARIANTS[name].kind, model, data),
    }


def trained(name: str, seed: int, recipe: Recipe, data: Data) -> tuple[nn.Module, tuple[Epoch, ...]]:
    """Return the network of one run, in eval mode, and its epochs; training goes on from what its folder holds."""
    assert recipe.method is not None
    variant = VARIANTS[name]
    options = {**recipe.method.options, **(variant.options or {})}
    method = Component("inclusive", {key: value for key, value in options.items() if value is not None})
    recipe = replace(recipe, method=method, training=replace(recipe.training, seed=seed))
    model, criterion = built(variant, recipe, data)

    def groups(network: nn.Module) -> list[dict[str, Any]]:
        return surgery.param_groups(network, lr=recipe.training.lr, weight_decay=recipe.training.weight_decay)

    epochs = train(
        model,
        criterion,
        data,
        recipe,
        run_dir=folder("inclusive", name, seed),
        groups=groups,
        label=f"{name} {seed}",
    )
    return model.eval(), epochs


def built(variant: Variant, recipe: Recipe, data: Data) -> tuple[nn.Module, Criterion]:
    """Return a fresh network and what it is trained for; all begin with the same weights, as far as they go."""
    assert recipe.method is not None
    plan, loss = Plan.of(recipe.method, data), nn.CrossEntropyLoss()
    set_seed(recipe.training.seed)
    plain = timm.create_model(recipe.model.name, num_classes=len(data.classes))
    if variant.kind == "plain":
        return plain, Task(loss)
    if variant.kind in ("exits", "shallow"):
        exits = ShallowExits(plain, plan.exits, data.image_size)
        return (exits, ExitsLoss(exits, loss)) if variant.kind == "exits" else (exits.alone(variant.number), Task(loss))
    converted = surgery.convert(plain, plan.method.name, input_size=data.image_size, **plan.method.options)
    if variant.kind == "joint":
        return converted, surgery.Objective(converted, loss)
    return surgery.prune(converted, subnetwork=variant.number), Task(loss)


def examine(kind: Kind, model: nn.Module, data: Data) -> dict[str, Any]:
    """Return what was found of every network that was trained: one, or all that were trained together."""
    if kind == "joint":
        return examine_joint(model, data)
    if isinstance(model, ShallowExits):
        networks: list[nn.Module] = [model.alone(number + 1).eval() for number in range(len(model.blocks))]
    else:
        networks = [model]
    found = {
        "accuracies": [evaluate(network, data.test).accuracy for network in networks],
        "macs": [surgery.cost(network, data.image_size).macs for network in networks],
        "params": [parameters(network) for network in networks],
    }
    return {**found, "norms": norms(model, data)} if kind == "plain" else found


def examine_joint(model: nn.Module, data: Data) -> dict[str, Any]:
    """Return what was found of every sub-network, on every level, and how much each branch contributes."""
    levels = accuracies(model, data.test)
    choices = choose_levels(levels)
    thin = [surgery.prune(model, subnetwork=k + 1) for k in range(len(levels))]
    return {
        "accuracies": levels[:, 0].tolist(),
        "levels": levels.tolist(),
        "chosen": [choice.level for choice in choices],
        "worst": worst(choices).accuracy,
        "macs": list(subnetwork_macs(model, data.image_size)),
        "params": [parameters(network) for network in thin],
        "norms": norms(model, data),
    }


def norms(model: nn.Module, data: Data) -> dict[str, list[float]]:
    return {path: found.tolist() for path, found in branch_norms(model, input_size=data.image_size).items()}


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


if __name__ == "__main__":
    main()
