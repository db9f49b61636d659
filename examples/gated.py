"""Train a network and its gated form side by side, prune what the gates closed, and show what came of it.

    python examples/gated.py                                        # handwritten digits, a few minutes on two cores
    python examples/gated.py --smoke                                # the same in seconds, to see that everything runs
    python examples/gated.py --recipe examples/recipes/gated-imagenet.toml --data data --device cuda

Stopped at any step and started again, it goes on with the same numbers. Under `runs/<recipe>/` it leaves
`metrics.json`, the operating points in `curve.json`, the gates of every epoch in `rates.json`, the figures, and the
checkpoints `gated.safetensors`, `pruned.safetensors` (what is closed on all training images is gone) and, where gates
depend on the image, `static.safetensors` (every gate is fixed to what it does most often).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import figures
import surgery
import surgery_gated.figures as gate_figures
from commands import MISTAKES, Setup, parser, prepare
from operating import Bench, Row, processor
from pairs import Pair, train_both
from rates import RateLog
from recipe import Component, RecipeError
from splits import sample
from surgery import curves
from surgery_gated.gates import Threshold
from surgery_gated.inference import set_inference
from surgery_gated.transform import gated_blocks
from surgery_gated.usage import Usage

TAUS = (0.2, 0.35, 0.5, 0.65, 0.8)
RATE_IMAGES, REPEATS = 512, 20


@dataclass(frozen=True, eq=False)
class Findings:
    """What was measured.

    Attributes:
        rows: Operating points by the curve that they are on.
        usage: What the gates did at the threshold that is pruned at.
        plans: What was pruned, or why nothing could be.
    """

    rows: dict[str, list[Row]]
    usage: Usage
    plans: dict[str, surgery.PrunePlan | surgery.PruneError]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the example; every mistake of the caller ends in one sentence."""
    options = _parse(arguments)
    console = Console()
    try:
        Threshold(options.tau)  # refuses what is no probability, before anything is trained
        setup = prepare(options)
        metrics = _run(setup, options.tau, console)
    except MISTAKES as error:
        raise SystemExit(f"gated.py: {error}") from error
    (setup.run_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    console.print(f"Figures, checkpoints, metrics.json, curve.json and rates.json are in {setup.run_dir}/")


def _run(setup: Setup, tau: float, console: Console) -> dict[str, Any]:
    recipe, data, run_dir, machine = setup.recipe, setup.data, setup.run_dir, setup.machine
    method = recipe.method or Component("gated")
    if method.name != "gated":
        raise RecipeError(f"[method] name is {method.name!r}; this example is about 'gated', see recipes/gated-*.toml.")
    rates = RateLog(run_dir / "rates.json", sample(data.train, RATE_IMAGES), machine)
    networks = train_both(recipe, data, run_dir, method, resume=setup.resume, machine=machine, on_epoch=rates)
    machine.leave()
    bench = Bench(data, recipe.training, setup.device, 3 if setup.smoke else REPEATS)
    found = examine(networks, bench, tau, run_dir)
    console.print(_table(found, bench))
    for line in _lines(found, tau):
        console.print(line, highlight=False)
    _draw(networks, found, rates, run_dir)
    written = _curves(found, setup, bench)
    curves.write(written, run_dir / "curve.json")
    # an ensemble costs several times as much as the network: it would squeeze everything else into a corner
    curves.draw([curve for curve in written if "ensemble" not in curve.network], run_dir / "curve.png")
    return _metrics(found, tau)


def examine(networks: Pair, bench: Bench, tau: float, run_dir: Path) -> Findings:
    """Measure the networks in every mode, prune at `tau`, and save checkpoints."""
    gated = networks.converted
    single, *ensembles = bench.drawn(gated)
    measured = list(bench.gated(gated, sorted({*TAUS, tau})))
    rows = {"plain": [bench.plain(networks.plain, "plain")], "gated": [row for row, _ in measured]}
    rows |= {"gates drawn": [single], "ensemble": ensembles}
    # once more, for the batch-norm statistics that the saved and the pruned network have
    _, usage = bench.in_mode(gated, Threshold(tau), "", {})
    set_inference(gated, Threshold(tau))
    surgery.save(gated, run_dir / "gated.safetensors")
    plans: dict[str, surgery.PrunePlan | surgery.PruneError] = {}
    for name, criteria in _criteria(gated, bench, tau).items():
        try:
            plans[name] = plan = surgery.plan(gated, **criteria)
            rows[name] = [_prune(gated, plan, bench, tau, run_dir / f"{name}.safetensors")]
        except surgery.PruneError as error:
            plans[name] = error
    times = iter(bench.timed([row for part in rows.values() for row in part]))
    return Findings({name: [next(times) for _ in part] for name, part in rows.items()}, usage, plans)


def _criteria(gated: surgery.ConvertedNetwork, bench: Bench, tau: float) -> dict[str, dict[str, Any]]:
    """Return what to prune by: gates that depend on the image can also be fixed by what they do most often."""
    if not any(gates.dependent for _, gates in gated_blocks(gated)):
        return {"pruned": {"tau": tau}}
    seen = {"tau": tau, "images": bench.seen()}
    return {"pruned": seen, "static": {**seen, "static": True}}


def _prune(gated: surgery.ConvertedNetwork, plan: surgery.PrunePlan, bench: Bench, tau: float, path: Path) -> Row:
    pruned = surgery.prune(gated, plan)
    row = bench.pruned(pruned, tau, f"{path.stem}, tau {tau:g}")
    surgery.save(pruned, path)
    return row


def _draw(networks: Pair, found: Findings, rates: RateLog, folder: Path) -> None:
    figures.draw_training(
        networks.plain_epochs,
        networks.converted_epochs,
        folder / "training.png",
        method="gated",
        term="activation",
        label="activation loss x weight",
    )
    entries = rates.read()
    if entries:
        epochs = [entry["epoch"] for entry in entries]
        gate_figures.draw_rates([entry["rates"] for entry in entries], folder / "rates.png", epochs=epochs)
    gate_figures.draw_polarization(found.usage, folder / "polarization.png")
    gate_figures.draw_layer_rates(found.usage, folder / "layer_rates.png")


def _curves(found: Findings, setup: Setup, bench: Bench) -> list[curves.Curve]:
    size = setup.data.image_size
    whole = curves.Curve(
        method="",
        network=setup.recipe.model.name,
        data=f"{setup.data.name}, test part",
        points=[row.point for row in found.rows["plain"]],
        input_size=(setup.data.channels, size, size),
        device=processor(),
        threads=torch.get_num_threads(),
        batch=bench.timed_images,
    )
    others = [
        replace(
            whole,
            method="gated",
            network=whole.network if name == "gated" else f"{whole.network}, {name}",
            points=[row.point for row in part],
        )
        for name, part in found.rows.items()
        if name != "plain"
    ]
    return [whole, *others]


def _metrics(found: Findings, tau: float) -> dict[str, Any]:
    pruned: dict[str, Any] = {}
    for name, plan in found.plans.items():
        if isinstance(plan, surgery.PrunePlan):
            pruned[name] = {"kept_params": plan.kept_params, "cuts": [str(cut) for cut in plan.cuts]}
        else:
            pruned[name] = {"refused": str(plan)}
    points = [{"name": row.name, **asdict(row.point)} for part in found.rows.values() for row in part]
    return {"tau": tau, "points": points, "usage": found.usage.to_dict(), "pruned": pruned}


def _table(found: Findings, bench: Bench) -> Table:
    title = f"Test part; times on the CPU for {bench.timed_images} images"
    table = Table("network", "accuracy", "mean MACs", "of plain", "ms", title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    full = found.rows["plain"][0].point.macs
    for row in (row for part in found.rows.values() for row in part):
        point = row.point
        deviation = "" if point.deviation is None else f" ± {100 * point.deviation:.2f}"
        accuracy = f"{100 * point.accuracy:.2f}{deviation} %"
        share = f"{100 * point.macs / full:.1f} %"
        table.add_row(row.name, accuracy, f"{point.macs:,.0f}", share, f"{point.milliseconds:.2f}")
    return table


def _lines(found: Findings, tau: float) -> Iterator[str]:
    usage, settled = found.usage, found.usage.polarization()
    yield (
        f"gates at tau {tau:g}: open for {100 * usage.rate:.1f} % of the images; of {settled.gates} gates "
        f"{100 * settled.on:.0f} % are always on, {100 * settled.off:.0f} % always off, "
        f"within {100 * settled.tolerance:.0f} % of the images"
    )
    for name, plan in found.plans.items():
        if isinstance(plan, surgery.PrunePlan):
            yield f"{name}: {len(plan.cuts)} cuts, {100 * plan.kept_params:.1f} % of the parameters kept"
        else:
            yield f"{name}: nothing could be pruned: {plan}"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    made = parser(__doc__, "gated-digits")
    made.add_argument("--tau", type=float, default=0.5, help="threshold on P(open) that is pruned at")
    return made.parse_args(arguments)


if __name__ == "__main__":
    main()
