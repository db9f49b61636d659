"""Train a network and its masked form side by side, cut away the branches that nothing reads, and show what came of it.

    python examples/masked.py                                        # handwritten digits, a few minutes on two cores
    python examples/masked.py --smoke                                # the same in seconds, to see that everything runs
    python examples/masked.py --recipe examples/recipes/masked-cifar100.toml --data data --device cuda

The masked network learns its masks together with its weights; then they are fixed, and the weights are trained on, at a
rate that falls in steps: the four phases of the paper. The plain network has the same batches and rates.

Stopped at any step and started again, it goes on with the same numbers. Under `runs/<recipe>/` it leaves
`metrics.json`, the operating points in `curve.json`, the figures, and the checkpoints `masked.safetensors` (its masks
are fixed) and `pruned.safetensors` (what no surviving branch reads is gone).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.table import Table

import figures
import surgery
import surgery_masked
import surgery_masked.figures as mask_figures
from commands import MISTAKES, Setup, parser, prepare
from operating import Bench, Row, processor
from pairs import Pair, train_both
from phases import Freeze, concentration, converting
from recipe import Component, RecipeError
from surgery import curves

REPEATS, SMOKE_REPEATS = 20, 3


@dataclass(frozen=True, eq=False)
class Findings:
    """What was measured.

    Attributes:
        plain: The plain network.
        masked: The masked one with fixed masks, and what is left of it once it is pruned.
        plan: What was pruned.
        branches: Those of every masked block that are read, by path.
        concentration: Share of the real-valued masks that is on the connections that were fixed.
    """

    plain: Row
    masked: tuple[Row, Row]
    plan: surgery.PrunePlan
    branches: dict[str, tuple[int, ...]]
    concentration: float

    @property
    def rows(self) -> tuple[Row, ...]:
        """All operating points."""
        return (self.plain, *self.masked)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the example; every mistake of the caller ends in one sentence."""
    options = _parse(arguments)
    console = Console()
    try:
        setup = prepare(options)
        metrics = _run(setup, console)
    except MISTAKES as error:
        raise SystemExit(f"masked.py: {error}") from error
    (setup.run_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    console.print(f"Figures, checkpoints, metrics.json and curve.json are in {setup.run_dir}/")


def _run(setup: Setup, console: Console) -> dict[str, Any]:
    recipe, data, run_dir, machine = setup.recipe, setup.data, setup.run_dir, setup.machine
    method = recipe.method or Component("masked")
    if method.name != "masked":
        raise RecipeError(f"[method] name is {method.name!r}; this example is about 'masked': recipes/masked-*.toml.")
    freeze = Freeze.of(recipe, method)
    networks = train_both(
        recipe, data, run_dir, converting(method), resume=setup.resume, machine=machine, on_epoch=freeze
    )
    machine.leave()
    bench = Bench(data, recipe.training, setup.device, SMOKE_REPEATS if setup.smoke else REPEATS)
    found = examine(networks, bench, run_dir)
    console.print(_table(found, bench))
    for line in _lines(networks, found, freeze):
        console.print(line, highlight=False)
    _draw(networks, freeze, run_dir)
    written = _curves(found, setup, bench)
    curves.write(written, run_dir / "curve.json")
    curves.draw(written, run_dir / "curve.png")
    return _metrics(networks, found, freeze)


def examine(networks: Pair, bench: Bench, run_dir: Path) -> Findings:
    """Measure both networks, prune the masked one, and save checkpoints."""
    masked = networks.converted
    rows = [bench.plain(networks.plain, "plain"), bench.plain(masked, "masked, all branches")]
    surgery.save(masked, run_dir / "masked.safetensors")
    plan = surgery.plan(masked)
    pruned = surgery.prune(masked, plan)
    rows.append(bench.plain(pruned, "masked, pruned"))
    surgery.save(pruned, run_dir / "pruned.safetensors")
    plain, *rest = bench.timed(rows)
    found = tuple(
        replace(row, point=replace(row.point, setting={"branches": kept}))
        for row, kept in zip(rest, ("all", "used"), strict=True)
    )
    return Findings(plain, (found[0], found[1]), plan, surgery_masked.used_branches(masked), concentration(masked))


def _draw(networks: Pair, freeze: Freeze, folder: Path) -> None:
    connections = surgery_masked.connectivity(networks.converted)
    mask_figures.draw_connections(connections, folder / "connections.png")
    mask_figures.draw_active({"masked": connections}, folder / "active.png")
    mask_figures.draw_masks(connections, folder / "masks.png")
    _draw_training(networks, freeze, folder / "training.png")


def _draw_training(networks: Pair, freeze: Freeze, path: Path) -> None:
    """Draw test accuracy and loss of both networks over the epochs, and where the masks were fixed."""
    with mpl.rc_context(figures.STYLE):
        figure = Figure(figsize=(9, 3.4), layout="constrained")
        accuracy, loss = figure.subplots(1, 2)
        for epochs, name, colour in (
            (networks.plain_epochs, "plain", figures.GREY),
            (networks.converted_epochs, "masked", figures.BLUE),
        ):
            known = [(epoch.epoch + 1, epoch.accuracy) for epoch in epochs if epoch.accuracy is not None]
            accuracy.plot(*zip(*known, strict=True), color=colour, label=name, marker="o", markersize=3)
            loss.plot([e.epoch + 1 for e in epochs], [e.loss for e in epochs], color=colour, label=name, marker=".")
        accuracy.set(title="Test accuracy", xlabel="epoch", ylim=(None, 1.0))
        loss.set(title="Training loss", xlabel="epoch", yscale="log")
        for axes in (accuracy, loss):
            axes.axvline(freeze.epochs, color=figures.ORANGE, linestyle=":", label="masks are fixed")
            axes.set_xlim(0.5, len(networks.plain_epochs) + 0.5)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.legend(frameon=False)
        figure.savefig(path, dpi=150)


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
    return [plain, replace(plain, method="masked", points=tuple(row.point for row in found.masked))]


def _metrics(networks: Pair, found: Findings, freeze: Freeze) -> dict[str, Any]:
    return {
        "points": [{"name": row.name, **asdict(row.point)} for row in found.rows],
        "freeze_epoch": freeze.epochs,
        "accuracy when frozen": networks.converted_epochs[freeze.epochs - 1].accuracy,
        "concentration": found.concentration,
        "used branches": {path: list(used) for path, used in found.branches.items()},
        "pruned": {"kept_params": found.plan.kept_params, "cuts": [str(cut) for cut in found.plan.cuts]},
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


def _lines(networks: Pair, found: Findings, freeze: Freeze) -> Iterator[str]:
    accuracy = networks.converted_epochs[freeze.epochs - 1].accuracy
    measured = "" if accuracy is None else f"; test accuracy there {100 * accuracy:.2f} %"
    yield f"masks fixed after epoch {freeze.epochs} of {len(networks.converted_epochs)}{measured}"
    yield (
        f"the connections that were fixed hold {100 * found.concentration:.1f} % of the real-valued masks; "
        "before training they are all equal"
    )
    # all branches of the last block are joined
    counts = ", ".join(f"{path} {len(used)}" for path, used in found.branches.items())
    yield f"branches that are read, of {max(map(len, found.branches.values()))}: {counts}"
    yield f"pruned: {len(found.plan.cuts)} cuts, {100 * found.plan.kept_params:.1f} % of the parameters kept"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    return parser(__doc__, "masked-digits").parse_args(arguments)


if __name__ == "__main__":
    main()
