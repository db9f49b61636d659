"""Try the claims of Coded ResNeXt on rendered characters.

python benchmarks/claims/coded.py [--seeds 3] [--processes 2]

Each variant of `VARIANTS` is trained from scratch for every seed by the recipe `examples/recipes/coded-glyphs.toml`,
and then examined: three minutes and one of a core. A run that was stopped goes on where it was. The result is
`benchmarks/results/claims-coded.json`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

import neighbours

# isort: split
import timm
import torch
from sweep import folder, setting, sweep
from torch import Tensor, nn

import surgery
import surgery_coded
from data import Data
from recipe import Component, Recipe
from splits import Split, sample
from surgery_coded import analysis, calibration, probes
from surgery_coded.pruner import coded_blocks
from training import Epoch, Task, evaluate, set_seed, train

RECIPE = neighbours.ROOT / "examples" / "recipes" / "coded-glyphs.toml"
# What differs from the recipe's method. "plain" is not converted.
SWEEP: dict[str, Mapping[str, Any]] = {
    "mu 0": {"mu": 0.0},
    "mu 2": {"mu": 2.0},
    "coded": {},
    "mu 14": {"mu": 14.0},
    "p_drop 0": {"p_drop": 0.0},
    "p_drop 0.2": {"p_drop": 0.2},
}
VARIANTS: dict[str, Mapping[str, Any]] = {
    "plain": {},
    **SWEEP,
    # Without a coding loss it does not matter which class has which codeword.
    **{f"{name}, similar": {**options, "assigned": True} for name, options in SWEEP.items() if name != "mu 0"},
    "masked gradient": {"gradient": "masked"},
}
BINARY_CLASSES = 10  # the first ones: of CIFAR-100 and ImageNet the paper shows as many
THRESHOLD_IMAGES, REMOVAL_IMAGES = 2_000, 2_000


def main() -> None:
    sweep("coded", RECIPE, VARIANTS, run, __doc__)


def run(name: str, seed: int, train_only: bool) -> dict[str, Any]:
    """Train one network, or take it from the folder of its run, and examine it."""
    torch.set_num_threads(1)
    recipe, data = setting(RECIPE)
    model, epochs = trained(name, seed, recipe, data)
    return {} if train_only else {"train": epochs[-1].terms, **examine(name, model, data, seed)}


def trained(name: str, seed: int, recipe: Recipe, data: Data) -> tuple[nn.Module, tuple[Epoch, ...]]:
    """Return the network of one run, in eval mode; training goes on from what the run's folder holds."""
    assert recipe.method is not None
    variant = dict(VARIANTS[name])
    recipe = replace(recipe, training=replace(recipe.training, seed=seed))
    set_seed(seed)
    model = timm.create_model(recipe.model.name, num_classes=len(data.classes))
    task = nn.CrossEntropyLoss()
    criterion: Any = Task(task)
    if name == "plain":
        recipe = replace(recipe, method=None)
    else:
        method = {**recipe.method.options, **variant}
        if method.pop("assigned", False):
            method["scheme"] = similar_classes_share(method["scheme"], data)
        model = surgery.convert(model, "coded", input_size=data.image_size, **method)
        criterion = surgery.Objective(model, task)
        recipe = replace(recipe, method=Component("coded", {**recipe.method.options, **VARIANTS[name]}))

    def groups(network: nn.Module) -> list[dict[str, Any]]:
        return surgery.param_groups(network, lr=recipe.training.lr, weight_decay=recipe.training.weight_decay)

    epochs = train(
        model, criterion, data, recipe, run_dir=folder("coded", name, seed), groups=groups, label=f"{name} {seed}"
    )
    return model.eval(), epochs


def examine(name: str, model: nn.Module, data: Data, seed: int) -> dict[str, Any]:
    """Return what the paper claims of a network, measured on test images."""
    if not isinstance(model, surgery.ConvertedNetwork):
        return {"accuracy": evaluate(model, data.test).accuracy}
    found = analysis.collect(model, batches(data.test))
    blocks = list(found.decoded) if name == "coded" else [last_of_stage(found.decoded, "layer2")]
    agreed = analysis.agreement(found.decoded, found.logits, found.targets)
    some = list(batches(sample(data.test, REMOVAL_IMAGES)))
    result = {
        "accuracy": found.accuracy,
        "decoders": found.decoder_accuracy,
        "removal": [removal(model, some, block, seed) for block in blocks],
        "binary": binary(model, data, seed),
        "agreement": [
            {"images": count, "share": count / len(found.targets), "accuracy": accuracy if count else None}
            for count, accuracy in zip(agreed.count.tolist(), agreed.accuracy.tolist(), strict=True)
        ],
    }
    if name == "coded":
        result["calibration"] = {
            f"{share}": calibration.calibration_table(
                found.logits, found.targets, found.decoded, train_share=share, seed=seed
            ).means
            for share in (0.25, 0.5)
        }
    return result


def batches(split: Split) -> Iterator[tuple[Tensor, Tensor]]:
    for indices in torch.arange(len(split)).split(256):
        yield split.batch(indices), split.targets[indices]


def last_of_stage(blocks: Mapping[str, Tensor], stage: str) -> str:
    return [block for block in blocks if block.startswith(f"{stage}.")][-1]


def removal(model: surgery.ConvertedNetwork, images: list[tuple[Tensor, Tensor]], block: str, seed: int) -> Any:
    """Remove none, half and all of the active branches of a block, and as many inactive ones, then all of those."""
    module = {found.path: module for found, module in coded_blocks(model)}[block]
    active, branches = int(module.codewords[0].sum()), module.branches
    counts = sorted({0, active // 2, active, branches - active})
    return asdict(probes.removal_accuracy(model, images, block, counts, seed=seed))


def binary(model: surgery.ConvertedNetwork, data: Data, seed: int) -> dict[str, float]:
    """Return mean precision and recall of the first one-class networks against nine negatives per positive."""
    reports = analysis.binary_reports(
        model,
        batches(sample(data.train, THRESHOLD_IMAGES)),
        batches(data.test),
        range(BINARY_CLASSES),
        negatives=9,
        seed=seed,
    )
    means = {key: [getattr(report, key) for report in reports.values()] for key in ("precision", "recall", "f1")}
    return {key: sum(values) / len(values) for key, values in means.items()}


def similar_classes_share(ratios: Mapping[str, str], data: Data) -> dict[str, surgery_coded.CodingScheme]:
    """Return the schemes of those ratios, with the codewords dealt out so that a coarse group shares branches."""
    assert data.groups is not None
    similarity = surgery_coded.taxonomy_similarity([data.groups])
    schemes = {}
    for stage, ratio in ratios.items():
        active, branches = map(int, ratio.split("/"))
        found = surgery_coded.CodingScheme.search(len(data.classes), branches, active)
        schemes[stage] = surgery_coded.assign(found, similarity)
    return schemes


if __name__ == "__main__":
    main()
