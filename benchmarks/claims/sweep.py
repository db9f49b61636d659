"""What the trials of all methods share: which runs there are, how they are carried out, and where results go."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import neighbours

# isort: split
from harness import write

from data import Data, load
from recipe import Recipe

Run = Callable[[str, int, bool], dict[str, Any]]


def sweep(method: str, recipe_file: Path, variants: Iterable[str], run: Run, doc: str | None) -> None:
    """Carry out every variant for every seed, as the command line says, and write what they found.

    Args:
        method: Name of the method; the result is `claims-<method>.json`.
        recipe_file: What all runs are trained by.
        variants: Their names.
        run: Called with a variant, a seed, and whether to train only; returns JSON values. A function of a module,
            since it runs in other processes.
        doc: Help text.
    """
    options = parse(doc)
    jobs = [(name, seed, options.train_only) for name in variants for seed in range(options.seeds)]
    with ProcessPoolExecutor(options.processes, get_context("spawn")) as pool:
        done = list(pool.map(run, *zip(*jobs, strict=True)))
    if options.train_only:
        return
    recipe, data = setting(recipe_file)
    found: dict[str, list[dict[str, Any]]] = {}
    for (name, seed, _), result in zip(jobs, done, strict=True):
        found.setdefault(name, []).append({"seed": seed, **result})
    what = f"{len(data.classes)} rendered characters, {recipe.model.name}, {recipe.training.epochs} epochs"
    print(write(f"claims-{method}", {"what": what, "recipe": recipe.to_tables(), "variants": found}))


def parse(doc: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=1, help="runs at the same time, one thread each")
    parser.add_argument("--train-only", action="store_true", help="train what is missing and leave the examination")
    return parser.parse_args()


def setting(recipe_file: Path) -> tuple[Recipe, Data]:
    recipe = Recipe.from_toml(recipe_file)
    return recipe, load(recipe.data.name, **recipe.data.options)


def folder(method: str, name: str, seed: int) -> Path:
    """Return where a run leaves its checkpoint."""
    return neighbours.ROOT / "runs" / f"claims-{method}" / f"{name.replace(', ', '-').replace(' ', '_')}-{seed}"
