"""The command line that the examples of all methods share, and the mistakes that end in one sentence."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import surgery
from checkpoints import CheckpointError
from data import Data, DataNotFound, first_images, load
from glyphs import FontsUnavailable
from machines import PARALLEL, Machine, start
from networks import WeightsUnavailable
from recipe import Recipe, RecipeError
from training import CHECKPOINT

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
    machine: Machine
    resume: bool
    smoke: bool

    @property
    def device(self) -> str:
        """Where trained networks are measured."""
        return str(self.machine.measuring)


def parser(description: str | None, recipe: str) -> argparse.ArgumentParser:
    """Return a parser with the options that all examples have; `recipe` is the name of the default one."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--recipe", type=Path, default=RECIPES / f"{recipe}.toml", help="TOML file with the whole set-up")
    made.add_argument("--data", type=Path, default=Path("data"), help="folder of CIFAR or of the image folders")
    made.add_argument("--run-dir", type=Path, help="where to write; default: runs/<name of the recipe>")
    made.add_argument("--device", default="cpu", help="cpu, cuda, xla, ...; under torchrun, of every process")
    made.add_argument("--parallel", choices=PARALLEL, help="under torchrun ddp, the default, or fsdp; with xla, spmd")
    made.add_argument(
        "--compile", nargs="?", const="inductor", metavar="BACKEND", help="torch.compile; inductor without a name"
    )
    made.add_argument("--amp", action="store_true", help="forward passes in bfloat16, whatever the recipe says")
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
    if options.amp:
        recipe = replace(recipe, training=replace(recipe.training, amp=True))
    machine = start(options.device, options.parallel, options.compile)
    if options.restart and machine.leads:  # of all its trainings, or a run that is stopped would go on with old ones
        for left in run_dir.glob(f"*/{CHECKPOINT}"):
            left.unlink()
    machine.agree(0)
    return Setup(recipe, data, run_dir, machine, not options.restart, options.smoke)
