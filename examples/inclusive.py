"""Train a network and its inclusive form side by side, take out every sub-network, and show what came of it.

    python examples/inclusive.py                                     # handwritten digits, a few minutes on two cores
    python examples/inclusive.py --smoke                             # the same in seconds, to see that everything runs
    python examples/inclusive.py --recipe examples/recipes/inclusive-cifar10.toml --data data --device cuda

The inclusive network trains all its sub-networks together. Where the recipe asks for exits, a third network does the
same with classifiers behind some of its blocks: shallow sub-networks instead of thin ones. All see the same batches.

Stopped at any step and started again, it goes on with the same numbers. Under `runs/<recipe>/` it leaves
`metrics.json`, the operating points in `curve.json`, the figures, and the checkpoints `inclusive.safetensors` and
`subnetwork-1.safetensors` (the thinnest sub-network alone).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import figures
import surgery
import surgery_inclusive.figures as thin_figures
from commands import MISTAKES, Setup, parser, prepare
from exits import ExitsLoss, ShallowExits
from networks import build
from operating import Bench, Row, processor
from pairs import Pair, train_both
from recipe import Component, RecipeError
from subnetworks import Plan, accuracies
from surgery import curves
from surgery_inclusive import anytime
from surgery_inclusive.contributions import branch_norms
from surgery_inclusive.levels import Choice, choose_levels, worst
from surgery_inclusive.series import Series
from surgery_inclusive.taxonomy import FINEST
from training import set_seed, train

REPEATS, SMOKE_REPEATS = 20, 3


@dataclass(frozen=True, eq=False)
class Findings:
    """What was measured.

    Attributes:
        plain: The plain network.
        thin: The sub-networks, each taken out of the whole, from the thinnest to the full one.
        shallow: The exits of the other network, each with what is in front of it, from the first to the last.
        levels: Names of the levels, from fine to coarse.
        accuracy: Of every sub-network on every level. Shape: (K, D).
        choices: The level that every sub-network should predict.
        steps: Milliseconds until each step of an anytime prediction was there.
    """

    plain: Row
    thin: tuple[Row, ...]
    shallow: tuple[Row, ...]
    levels: tuple[str, ...]
    accuracy: Tensor
    choices: tuple[Choice, ...]
    steps: tuple[float, ...]

    @property
    def rows(self) -> tuple[Row, ...]:
        """All operating points."""
        return (self.plain, *self.thin, *self.shallow)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the example; every mistake of the caller ends in one sentence."""
    options = _parse(arguments)
    console = Console()
    try:
        setup = prepare(options)
        metrics = _run(setup, console)
    except MISTAKES as error:
        raise SystemExit(f"inclusive.py: {error}") from error
    (setup.run_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    console.print(f"Figures, checkpoints, metrics.json and curve.json are in {setup.run_dir}/")


def _run(setup: Setup, console: Console) -> dict[str, Any]:
    recipe, data, run_dir = setup.recipe, setup.data, setup.run_dir
    method = recipe.method or Component("inclusive")
    if method.name != "inclusive":
        raise RecipeError(f"[method] name is {method.name!r}; this example is about 'inclusive': recipes/inclusive-*.")
    plan = Plan.of(method, data)
    networks = train_both(recipe, data, run_dir, plan.method, resume=setup.resume, machine=setup.machine)
    exits = train_exits(setup, plan.exits) if plan.exits else None
    setup.machine.leave()
    bench = Bench(data, recipe.training, setup.device, SMOKE_REPEATS if setup.smoke else REPEATS)
    found = examine(networks, exits, plan, bench, run_dir)
    console.print(_table(found, bench))
    for line in _lines(found, bench):
        console.print(line, highlight=False)
    _draw(networks, found, run_dir)
    written = _curves(found, setup, bench)
    curves.write(written, run_dir / "curve.json")
    curves.draw(written, run_dir / "curve.png")
    return _metrics(found, networks)


def train_exits(setup: Setup, count: int) -> ShallowExits:
    """Train the plain network, from the weights that it began with, with exits; in `<run folder>/exits`."""
    recipe, data = setup.recipe, setup.data
    set_seed(recipe.training.seed)
    model = ShallowExits(build(recipe.model, len(data.classes)), count, data.image_size)
    loss = nn.CrossEntropyLoss(label_smoothing=recipe.training.label_smoothing)

    def groups(network: nn.Module) -> list[dict[str, Any]]:
        return surgery.param_groups(network, lr=recipe.training.lr, weight_decay=recipe.training.weight_decay)

    train(
        model,
        ExitsLoss(model, loss),
        data,
        recipe,
        run_dir=setup.run_dir / "exits",
        groups=groups,
        resume=setup.resume,
        machine=setup.machine,
        label="exits",
    )
    trained = setup.machine.finished(model)
    assert isinstance(trained, ShallowExits)
    return trained.eval()


def examine(networks: Pair, exits: ShallowExits | None, plan: Plan, bench: Bench, run_dir: Path) -> Findings:
    """Measure the plain network, every sub-network and every exit, and save checkpoints."""
    model, workers = networks.converted, bench.training.workers
    accuracy = accuracies(model, bench.data.test, device=bench.device, workers=workers)
    count = len(accuracy)
    thin = [surgery.prune(model, subnetwork=k) for k in range(1, count + 1)]
    surgery.save(model, run_dir / "inclusive.safetensors")
    surgery.save(thin[0], run_dir / "subnetwork-1.safetensors")
    rows = [bench.plain(networks.plain, "plain")]
    rows += [_row(bench, network, "sub-network", k) for k, network in enumerate(thin, start=1)]
    if exits is not None:
        shallow = (exits.alone(number) for number in range(1, len(exits.blocks) + 1))
        rows += [_row(bench, network, "exit", number) for number, network in enumerate(shallow, start=1)]
    plain, *rest = bench.timed(rows)
    return Findings(
        plain,
        tuple(rest[:count]),
        tuple(rest[count:]),
        (FINEST, *(plan.taxonomy.levels if plan.taxonomy else ())),
        accuracy,
        choose_levels(accuracy),
        _steps(model, bench),
    )


def _row(bench: Bench, network: nn.Module, what: str, number: int) -> Row:
    row = bench.plain(network.eval(), f"{what} {number}")
    return replace(row, point=replace(row.point, setting={what: number}))


def _steps(model: nn.Module, bench: Bench) -> tuple[float, ...]:
    """Return the milliseconds until each step of an anytime prediction on the CPU, medians."""
    images = bench.data.test.batch(torch.arange(min(bench.timed_images, len(bench.data.test))))
    model.cpu()
    measured = []
    for _ in range(bench.repeats + 1):
        start = time.perf_counter()
        measured.append([1e3 * (time.perf_counter() - start) for _ in anytime(model, images)])
    return tuple(statistics.median(times) for times in zip(*measured[1:], strict=True))  # the first warms up


def _draw(networks: Pair, found: Findings, folder: Path) -> None:
    figures.draw_training(
        networks.plain_epochs,
        networks.converted_epochs,
        folder / "training.png",
        method="inclusive",
        term="subnetworks",
        label="thinner sub-networks",
    )
    lines = [("thin", found.thin, True), ("shallow", found.shallow, True), ("plain", (found.plain,), False)]
    series = [Series(name, _errors(rows), joint) for name, rows, joint in lines if rows]
    thin_figures.draw_errors(series, folder / "errors.png")
    norms = {"plain": branch_norms(networks.plain, input_size=_size(networks))}
    thin_figures.draw_branch_norms({**norms, "inclusive": branch_norms(networks.converted)}, folder / "branches.png")
    if len(found.levels) > 1:
        macs = [row.point.macs for row in found.thin]
        wanted = float(found.accuracy[-1, 0])
        thin_figures.draw_levels(
            found.accuracy, found.choices, macs, folder / "levels.png", found.levels, wanted=wanted
        )


def _errors(rows: Sequence[Row]) -> tuple[tuple[float, float], ...]:
    return tuple((row.point.macs, 1 - row.point.accuracy) for row in rows if row.point.accuracy is not None)


def _size(networks: Pair) -> tuple[int, int]:
    _, height, width = networks.converted.meta["architecture"].input_size
    return height, width


def _curves(found: Findings, setup: Setup, bench: Bench) -> list[curves.Curve]:
    size = setup.data.image_size
    plain = curves.Curve(
        method="",
        network=setup.recipe.model.name,
        data=f"{setup.data.name}, test part",
        points=(found.plain.point,),
        input_size=(setup.data.channels, size, size),
        device=processor(),
        threads=torch.get_num_threads(),
        batch=bench.timed_images,
    )
    written = [plain, replace(plain, method="inclusive", points=tuple(row.point for row in found.thin))]
    if found.shallow:
        shallow = tuple(row.point for row in found.shallow)
        written.append(replace(plain, network=f"{plain.network}, exits", points=shallow))
    return written


def _metrics(found: Findings, networks: Pair) -> dict[str, Any]:
    return {
        "points": [{"name": row.name, **asdict(row.point)} for row in found.rows],
        "levels": dict(zip(found.levels, found.accuracy.T.tolist(), strict=True)),
        "choices": [{**asdict(choice), "level": found.levels[choice.level]} for choice in found.choices],
        "branch norms": {path: norms.tolist() for path, norms in branch_norms(networks.converted).items()},
        "anytime": {"milliseconds": list(found.steps)},
    }


def _table(found: Findings, bench: Bench) -> Table:
    title = f"Test part; times on the CPU for {bench.timed_images} images"
    table = Table("network", "accuracy", "parameters", "MACs", "of plain", "ms", title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in found.rows:
        point = row.point
        table.add_row(
            row.name,
            f"{100 * point.accuracy:.2f} %",
            f"{point.params:,}",
            f"{point.macs:,.0f}",
            f"{100 * point.macs / found.plain.point.macs:.1f} %",
            f"{point.milliseconds:.2f}",
        )
    return table


def _lines(found: Findings, bench: Bench) -> Iterator[str]:
    steps = ", ".join(f"{step:.2f}" for step in found.steps)
    yield f"anytime prediction of {bench.timed_images} images: a better one after {steps} ms"
    if len(found.levels) > 1:
        chosen = ", ".join(
            f"{choice.subnetwork} {found.levels[choice.level]} {100 * choice.accuracy:.1f} %"
            for choice in found.choices
        )
        least = worst(found.choices)
        yield f"level to predict by sub-network, and its accuracy there: {chosen}"
        yield (
            f"worst accuracy over the sub-networks: {100 * float(found.accuracy[:, 0].min()):.1f} % on the classes, "
            f"{100 * least.accuracy:.1f} % on the chosen levels"
        )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    return parser(__doc__, "inclusive-digits").parse_args(arguments)


if __name__ == "__main__":
    main()
