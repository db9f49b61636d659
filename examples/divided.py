"""Train a network and its divided form side by side, join the small networks in several ways, and show what came of it.

    python examples/divided.py                                       # handwritten digits, a few minutes on two cores
    python examples/divided.py --smoke                               # the same in seconds, to see that everything runs
    python examples/divided.py --recipe examples/recipes/divided-cifar100.toml --data data --device cuda

The divided network is several small ones that are trained together, each on its own view of every image. The plain
network has the same images in the same order, one view of each, and the same rates.

Stopped at any step and started again, it goes on with the same numbers. Under `runs/<recipe>/` it leaves
`metrics.json`, the operating points in `curve.json`, the figures, what was chosen to run the small networks together in
`fused.txt`, and the checkpoints `divided.safetensors` and `member.safetensors` (the best small network alone).
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import figures
import surgery
import surgery_divided
from commands import MISTAKES, Setup, parser, prepare
from operating import Bench, Row, processor
from pairs import Pair, train_both
from recipe import Component, RecipeError
from surgery import curves
from training import Epoch
from views import Plan

REPEATS, SMOKE_REPEATS = 20, 3


@dataclass(frozen=True, eq=False)
class Findings:
    """What was measured.

    Attributes:
        plain: The undivided network.
        members: The first small network, the first two, ..., all of them, one after the other.
        fused: All of them, run together.
        scores: How right the small networks are alone and joined.
        difference: Largest difference between a logit of the fused network and of the one that it stands for.
    """

    plain: Row
    members: tuple[Row, ...]
    fused: Row
    scores: surgery_divided.Accuracies
    difference: float

    @property
    def rows(self) -> tuple[Row, ...]:
        """All operating points."""
        return (self.plain, *self.members, self.fused)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the example; every mistake of the caller ends in one sentence."""
    options = _parse(arguments)
    console = Console()
    try:
        setup = prepare(options)
        metrics = _run(setup, console)
    except MISTAKES as error:
        raise SystemExit(f"divided.py: {error}") from error
    (setup.run_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    console.print(f"Figures, checkpoints, fused.txt, metrics.json and curve.json are in {setup.run_dir}/")


def _run(setup: Setup, console: Console) -> dict[str, Any]:
    recipe, data, run_dir = setup.recipe, setup.data, setup.run_dir
    method = recipe.method or Component("divided")
    if method.name != "divided":
        raise RecipeError(f"[method] name is {method.name!r}; this example is about 'divided': recipes/divided-*.toml.")
    plan = Plan.of(method)
    networks = train_both(
        recipe, data, run_dir, plan.method, resume=setup.resume, machine=setup.machine, seen=plan.seen(data)
    )
    setup.machine.leave()
    bench = Bench(data, recipe.training, setup.device, SMOKE_REPEATS if setup.smoke else REPEATS)
    found = examine(networks, bench, run_dir)
    console.print(_table(found, bench))
    for line in _lines(found):
        console.print(line, highlight=False)
    _draw(networks, found, run_dir)
    written = _curves(found, setup, bench)
    curves.write(written, run_dir / "curve.json")
    curves.draw(written, run_dir / "curve.png")
    return _metrics(found)


def examine(networks: Pair, bench: Bench, run_dir: Path) -> Findings:
    """Measure the undivided network and the small ones, alone, joined and fused, and save checkpoints."""
    model = networks.converted
    count = len(surgery_divided.members(model))
    scores = surgery_divided.accuracies(model, bench.test())
    best = max(range(count), key=lambda i: scores.members[i])
    surgery.save(model, run_dir / "divided.safetensors")
    surgery.save(surgery.prune(model, members=[best]), run_dir / "member.safetensors")
    some = [surgery.prune(model, members=list(range(k))).eval() for k in range(1, count)]
    rows = [bench.plain(networks.plain, "undivided")]
    rows += [_row(bench.plain(network, f"{k} of {count}"), k) for k, network in enumerate([*some, model], 1)]
    images = bench.data.test.batch(torch.arange(min(bench.timed_images, len(bench.data.test))))
    fused = surgery_divided.fuse(model.cpu(), images)
    (run_dir / "fused.txt").write_text(fused.report() + "\n", encoding="utf-8")
    with torch.no_grad():
        difference = float((fused(images) - model(images)).abs().max())
    # it computes the same, so that it is neither counted nor classified with again
    whole = rows[-1]
    point = replace(whole.point, setting={**whole.point.setting, "fused": True})
    plain, *rest = bench.timed([*rows, Row(f"{whole.name}, fused", point, fused)])
    return Findings(plain, tuple(rest[:count]), rest[count], scores, difference)


def _row(row: Row, members: int) -> Row:
    return replace(row, point=replace(row.point, setting={"members": members}))


def _draw(networks: Pair, found: Findings, folder: Path) -> None:
    count = len(found.members)
    if all("cotraining" in epoch.terms for epoch in networks.converted_epochs):
        figures.draw_training(
            networks.plain_epochs,
            [_mean(epoch, count) for epoch in networks.converted_epochs],
            folder / "training.png",
            method="divided",
            term="cotraining",
            label="co-training",
        )
    with mpl.rc_context(figures.STYLE):
        figure = Figure(figsize=(6, 3.4), layout="constrained")
        axes = figure.subplots()
        scores = found.scores
        names = ["undivided", "networks alone", "their average", *(f"joined, {_words(m)}" for m in scores.ensembles)]
        rows = [
            [found.plain.point.accuracy],
            scores.members,
            [scores.average],
            *([v] for v in scores.ensembles.values()),
        ]
        colours = [figures.GREY, figures.ORANGE, figures.ORANGE, *([figures.BLUE] * len(scores.ensembles))]
        for height, (values, colour) in enumerate(zip(rows, colours, strict=True)):
            axes.plot([100 * value for value in values], [height] * len(values), "o", color=colour)
        axes.set(title="Test accuracy in %", yticks=range(len(names)), yticklabels=names)
        axes.invert_yaxis()
        axes.grid(axis="y", alpha=0.3)
        figure.savefig(folder / "members.png", dpi=150)


def _mean(epoch: Epoch, count: int) -> Epoch:
    """Return the epoch with the mean task loss of the small networks for its sum, to compare with the undivided one."""
    return replace(epoch, terms={**epoch.terms, "task": epoch.terms["task"] / count})


def _words(manner: str) -> str:
    return manner.replace("_", " of ")


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
    divided = replace(plain, method="divided", points=tuple(row.point for row in found.members))
    return [plain, divided, replace(divided, network=f"{plain.network}, fused", points=(found.fused.point,))]


def _metrics(found: Findings) -> dict[str, Any]:
    return {
        "points": [{"name": row.name, **asdict(row.point)} for row in found.rows],
        "scores": {
            **asdict(found.scores),
            "average": found.scores.average,
            "agreed": None if math.isnan(found.scores.agreed) else found.scores.agreed,
        },
        "fused": {"difference": found.difference},
    }


def _table(found: Findings, bench: Bench) -> Table:
    title = f"Test part; times on the CPU for {bench.timed_images} images"
    table = Table("network", "accuracy", "parameters", "MACs", "of undivided", "ms", title=title)
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


def _lines(found: Findings) -> Iterator[str]:
    scores = found.scores
    alone = ", ".join(f"{100 * accuracy:.2f} %" for accuracy in scores.members)
    yield f"the networks alone: {alone}; their average: {100 * scores.average:.2f} %"
    joined = ", ".join(f"{_words(manner)} {100 * accuracy:.2f} %" for manner, accuracy in scores.ensembles.items())
    yield f"joined by {joined}"
    yield f"all say the same of {100 * scores.agreement:.1f} % of the images" + (
        "" if math.isnan(scores.agreed) else f", and are right about {100 * scores.agreed:.1f} % of these"
    )
    yield f"fused, no logit differs by more than {found.difference:.1e}"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    return parser(__doc__, "divided-digits").parse_args(arguments)


if __name__ == "__main__":
    main()
