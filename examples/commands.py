"""The command line that the examples of all methods share, and the mistakes that end in one sentence."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch

import surgery
from checkpoints import CheckpointError
from data import Data, DataNotFound, first_images, load
from glyphs import FontsUnavailable
from networks import WeightsUnavailable
from recipe import Recipe, RecipeError

RECIPES = Path(__file__).parent / "recipes"
SMOKE_EPOCHS, SMOKE_IMAGES = 1, 256
MISTAKES = (
    surgery.SurgeryError, RecipeError, DataNotFound, CheckpointError, FontsUnavailable, WeightsUnavailable,
    FloatingPointError, ValueError,
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Setup:
    """What the command line asked for, read and checked."""

    recipe: Recipe
    data: Data
    run_dir: Path
    device: str
    resume: bool
    smoke: bool


def parser(description: str | None, recipe: str) -> argparse.ArgumentParser:
    """Return a parser with the options that all examples have; `recipe` is the name of the default one."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--recipe", type=Path, default=RECIPES / f"{recipe}.toml", help="TOML file with the whole set-up")
    made.add_argument("--data", type=Path, default=Path("data"), help="folder of CIFAR or of the image folders")
    made.add_argument("--run-dir", type=Path, help="where to write; default: runs/<name of the recipe>")
    made.add_argument("--device", default="cpu", help="cpu, cuda, xla, ...")
    made.add_argument("--smoke", action="store_true", help="one epoch on a few images, to see that everything runs")
    made.add_argument("--restart", action="store_true", help="do not go on from a checkpoint in the run folder")
    return made


def prepare(options: argparse.Namespace) -> Setup:
    """Read recipe and data, and check before the training what would otherwise fail after it.

    Raises:
        ValueError: The recipe, the data's options or the device are not understood; see also `MISTAKES`.
    """
    recipe = Recipe.from_toml(options.recipe)
    data = load(recipe.data.name, options.data, **recipe.data.options)
    if options.smoke:
        recipe, data = recipe.shortened(SMOKE_EPOCHS), first_images(data, SMOKE_IMAGES)
    run_dir = options.run_dir or Path("runs") / f"{options.recipe.stem}{'-smoke' if options.smoke else ''}"
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {options.device}: torch finds no such device; use --device cpu.")
    return Setup(recipe, data, run_dir, options.device, not options.restart, options.smoke)
