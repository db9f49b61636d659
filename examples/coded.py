"""Train a network and its coded form side by side, cut a one-class network out of it, and show what came of it.

    python examples/coded.py                                        # handwritten digits, a few minutes on two cores
    python examples/coded.py --smoke                                # the same in seconds, to see that everything runs
    python examples/coded.py --recipe examples/recipes/coded-cifar10.toml --data data --device cuda

Stopped at any step and started again, it goes on with the same numbers. Under `runs/<recipe>/` it leaves
`metrics.json`, the figures, and the checkpoints `coded.safetensors` and `binary.safetensors`.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import figures
import surgery
import surgery_coded
from checkpoints import CheckpointError
from data import Data, DataNotFound, first_images, load
from glyphs import FontsUnavailable
from inside import Inside, look_inside
from outliers import outliers_for
from recipe import Component, Recipe, RecipeError
from splits import Split, sample
from training import Epoch, Evaluation, Task, benchmark_ms, evaluate, set_seed, train

Evaluate = Callable[[nn.Module, Split], Evaluation]
RECIPES = Path(__file__).parent / "recipes"
SMOKE_EPOCHS, SMOKE_IMAGES = 1, 256
TIMED_IMAGES, THRESHOLD_IMAGES = 64, 50_000
MISTAKES = (
    surgery.SurgeryError, RecipeError, DataNotFound, CheckpointError, FontsUnavailable, FloatingPointError, ValueError
)  # fmt: skip


@dataclass(frozen=True)
class Networks:
    """The trained networks, in eval mode, and how their training went."""

    plain: nn.Module
    coded: surgery.ConvertedNetwork
    plain_epochs: tuple[Epoch, ...]
    coded_epochs: tuple[Epoch, ...]


@dataclass(frozen=True)
class OneClass:
    """The network for one class, its threshold, and what it gets right."""

    name: str
    network: surgery.ConvertedNetwork
    plan: surgery.PrunePlan
    report: surgery_coded.BinaryReport
    outliers: surgery_coded.BinaryReport | None
    logits: Tensor
    positive: Tensor


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the example; every mistake of the caller ends in one sentence."""
    options = _parse(arguments)
    console = Console()
    try:
        recipe = Recipe.from_toml(options.recipe)
        data = load(recipe.data.name, options.data, **recipe.data.options)
        if options.smoke:
            recipe, data = _smaller(recipe), first_images(data, SMOKE_IMAGES)
        run_dir = options.run_dir or Path("runs") / f"{options.recipe.stem}{'-smoke' if options.smoke else ''}"
        device = _usable(options.device, options.one_class, data)
        networks = train_both(recipe, data, run_dir, resume=not options.restart, device=device)
        run = partial(evaluate, device=device, workers=recipe.training.workers)
        metrics = examine(networks, data, options.one_class, run_dir, console, run)
    except MISTAKES as error:
        raise SystemExit(f"coded.py: {error}") from error
    (run_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    console.print(f"Figures, metrics.json and checkpoints are in {run_dir}/")


def train_both(recipe: Recipe, data: Data, run_dir: Path, *, resume: bool, device: str) -> Networks:
    """Train the plain network and its coded form from the same weights, under the same budget."""
    method = recipe.method or Component("coded")
    set_seed(recipe.training.seed)
    plain = build(recipe, data)
    coded = surgery.convert(copy.deepcopy(plain), method.name, input_size=data.image_size, **method.options)
    loss = nn.CrossEntropyLoss(label_smoothing=recipe.training.label_smoothing)

    def groups(model: nn.Module) -> list[dict[str, Any]]:
        return surgery.param_groups(model, lr=recipe.training.lr, weight_decay=recipe.training.weight_decay)

    kwargs = {"groups": groups, "resume": resume, "device": device}
    before = train(plain, Task(loss), data, recipe, run_dir=run_dir / "plain", label="plain", **kwargs)
    objective = surgery.Objective(coded, loss)
    after = train(coded, objective, data, recipe, run_dir=run_dir / "coded", label="coded", **kwargs)
    return Networks(plain.eval(), coded.eval(), before, after)


def build(recipe: Recipe, data: Data) -> nn.Module:
    """Build the recipe's network, from timm's registry (which holds the networks of `surgery.models` too)."""
    if not timm.is_model(recipe.model.name):
        raise RecipeError(f"[model] name {recipe.model.name!r} is no network of timm; timm.list_models() lists them.")
    return timm.create_model(recipe.model.name, num_classes=len(data.classes), **recipe.model.options)


def examine(
    networks: Networks, data: Data, one_class: int, run_dir: Path, console: Console, run: Evaluate
) -> dict[str, Any]:
    """Measure the networks, print the table, write figures and checkpoints; return the metrics."""
    plain, coded = networks.plain, networks.coded
    baseline, inside = run(plain, data.test), look_inside(coded, data.test)
    accuracy = inside.seen.accuracy
    binary = cut_out(coded, data, one_class, run)
    for network in (plain, coded, binary.network):
        network.cpu()
    images = data.test.batch(torch.arange(min(TIMED_IMAGES, len(data.test))))
    times = benchmark_ms(coded, binary.network, images)
    plain_ms, _ = benchmark_ms(plain, coded, images)
    rows = [
        ("plain", plain, baseline.accuracy, plain_ms),
        ("coded", coded, accuracy, times[0]),
        (f"only {binary.name!r}", binary.network, None, times[1]),
    ]
    sizes = [surgery.cost(model, data.image_size) for _, model, _, _ in rows]
    console.print(_table(rows, sizes))
    for line in (*inside.lines(), _binary_line(binary)):
        console.print(line)
    surgery.save(coded, run_dir / "coded.safetensors")
    surgery.save(binary.network, run_dir / "binary.safetensors")
    _draw(networks, data, inside, binary, run_dir)
    return {
        "accuracy": {"plain": baseline.accuracy, "coded": accuracy},
        **inside.metrics(),
        "binary": {
            "class": binary.name,
            "test": asdict(binary.report),
            "with_outliers": asdict(binary.outliers) if binary.outliers else None,
            "kept_params": binary.plan.kept_params,
            "kept_params_without_projections": binary.plan.kept_params_without_projections,
        },
        "cost": {
            name: {"params": s.params, "macs": s.macs, "ms": ms}
            for (name, _, _, ms), s in zip(rows, sizes, strict=True)
        },
    }


def cut_out(coded: surgery.ConvertedNetwork, data: Data, one_class: int, run: Evaluate) -> OneClass:
    """Cut out the network of one class and choose its threshold on the training part, at most 50,000 images of it."""
    plan = surgery.plan(coded, classes=[one_class])
    network = surgery.prune(coded, plan)
    seen = run(network, sample(data.train, THRESHOLD_IMAGES))
    threshold = surgery_coded.choose_threshold(seen.logits[:, 0], seen.targets == one_class)
    unseen = run(network, data.test)
    logits, positive = unseen.logits[:, 0], unseen.targets == one_class
    foreign = outliers_for(data)
    with_outliers = None
    if foreign is not None:
        others = run(network, foreign).logits[:, 0]
        own = logits[positive]
        mixed = torch.cat([own, others]), torch.cat([torch.ones_like(own), torch.zeros_like(others)]).bool()
        with_outliers = surgery_coded.judge(*mixed, threshold)
    report = surgery_coded.judge(logits, positive, threshold)
    return OneClass(data.classes[one_class], network, plan, report, with_outliers, logits, positive)


def _draw(networks: Networks, data: Data, inside: Inside, binary: OneClass, folder: Path) -> None:
    figures.draw_training(networks.plain_epochs, networks.coded_epochs, folder / "training.png")
    energies = surgery_coded.energy_by_class(inside.seen)
    figures.draw_energies(networks.coded, energies, data.classes, folder / "energies.png")
    figures.draw_binary(binary.logits, binary.positive, binary.report.threshold, binary.name, folder / "binary.png")
    inside.draw(folder)


def _table(rows: Sequence[tuple[str, nn.Module, float | None, float]], sizes: Sequence[surgery.Cost]) -> Table:
    table = Table("network", "accuracy", "parameters", "MACs", f"ms for {TIMED_IMAGES} images", title="Test part")
    for column in table.columns[1:]:
        column.justify = "right"
    for (name, _, accuracy, ms), size in zip(rows, sizes, strict=True):
        share = "" if accuracy is None else f"{100 * accuracy:.2f} %"
        table.add_row(name, share, f"{size.params:,}", f"{size.macs:,}", f"{ms:.2f}")
    return table


def _binary_line(binary: OneClass) -> str:
    plan, report = binary.plan, binary.report
    line = (
        f"only {binary.name!r}: precision {report.precision:.3f}, recall {report.recall:.3f}; parameters kept "
        f"{100 * plan.kept_params:.1f} % ({100 * plan.kept_params_without_projections:.1f} % without projection "
        "shortcuts)"
    )
    if binary.outliers:
        line += f"; against images of no class at all: precision {binary.outliers.precision:.3f}"
    return line


def _usable(device: str, one_class: int, data: Data) -> str:
    """Check before the training what would otherwise fail after it."""
    if not 0 <= one_class < len(data.classes):
        raise ValueError(f"--one-class {one_class}: expected an index from 0 to {len(data.classes) - 1}.")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: torch finds no such device; use --device cpu.")
    return device


def _smaller(recipe: Recipe) -> Recipe:
    training = replace(recipe.training, epochs=SMOKE_EPOCHS, warmup_epochs=0, cooldown_epochs=0)
    return replace(recipe, training=training)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--recipe", type=Path, default=RECIPES / "coded-digits.toml", help="TOML file with the whole set-up"
    )
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of CIFAR or of the image folders")
    parser.add_argument("--run-dir", type=Path, help="where to write; default: runs/<name of the recipe>")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, xla, ...")
    parser.add_argument("--one-class", type=int, default=3, help="index of the class to cut out")
    parser.add_argument("--smoke", action="store_true", help="one epoch on a few images, to see that everything runs")
    parser.add_argument("--restart", action="store_true", help="do not go on from a checkpoint in the run folder")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
