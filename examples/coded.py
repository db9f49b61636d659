"""Train a network and its coded form side by side, cut a one-class network out of it, and show what came of it.

    python examples/coded.py                                        # handwritten digits, a few minutes on two cores
    python examples/coded.py --smoke                                # the same in seconds, to see that everything runs
    python examples/coded.py --recipe examples/recipes/coded-cifar10.toml --data data --device cuda

Stopped at any step and started again, it goes on with the same numbers. Under `runs/<recipe>/` it leaves
`metrics.json`, the figures, and the checkpoints `coded.safetensors` and `binary.safetensors`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import figures
import surgery
import surgery_coded
from commands import MISTAKES, Setup, parser, prepare
from data import Data
from inside import Inside, look_inside
from outliers import outliers_for
from pairs import Pair, train_both
from recipe import Component
from splits import Split, sample
from training import Evaluation, benchmark_ms, evaluate

Evaluate = Callable[[nn.Module, Split], Evaluation]
TIMED_IMAGES, THRESHOLD_IMAGES = 64, 50_000


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
        setup = prepare(options)
        _check_class(options.one_class, setup.data)
        metrics = _run(setup, options.one_class, console)
    except MISTAKES as error:
        raise SystemExit(f"coded.py: {error}") from error
    (setup.run_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    console.print(f"Figures, metrics.json and checkpoints are in {setup.run_dir}/")


def _run(setup: Setup, one_class: int, console: Console) -> dict[str, Any]:
    recipe, data, run_dir, machine = setup.recipe, setup.data, setup.run_dir, setup.machine
    method = recipe.method or Component("coded")
    networks = train_both(recipe, data, run_dir, method, resume=setup.resume, machine=machine)
    machine.leave()
    run = partial(evaluate, device=setup.device, workers=recipe.training.workers)
    return examine(networks, data, one_class, run_dir, console, run)


def examine(
    networks: Pair, data: Data, one_class: int, run_dir: Path, console: Console, run: Evaluate
) -> dict[str, Any]:
    """Measure the networks, print the table, write figures and checkpoints; return the metrics."""
    plain, coded = networks.plain, networks.converted
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


def _draw(networks: Pair, data: Data, inside: Inside, binary: OneClass, folder: Path) -> None:
    figures.draw_training(
        networks.plain_epochs,
        networks.converted_epochs,
        folder / "training.png",
        method="coded",
        term="coding",
        label="coding loss x mu",
    )
    energies = surgery_coded.energy_by_class(inside.seen)
    figures.draw_energies(networks.converted, energies, data.classes, folder / "energies.png")
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


def _check_class(one_class: int, data: Data) -> None:
    if not 0 <= one_class < len(data.classes):
        raise ValueError(f"--one-class {one_class}: expected an index from 0 to {len(data.classes) - 1}.")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    made = parser(__doc__, "coded-digits")
    made.add_argument("--one-class", type=int, default=3, help="index of the class to cut out")
    return made.parse_args(arguments)


if __name__ == "__main__":
    main()
