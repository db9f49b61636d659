"""Channel gates beside Torch-Pruning, on the same trained network and at equal multiply-adds.

python benchmarks/gated_pruning.py [--seeds 3] [--processes 2] [--smoke]     (needs pip install ".[bench]" for the peer)

Both sides start from the plain networks of `benchmarks/claims/gated.py` and get six epochs more:

- gated: independent channel gates are trained for `GATE_EPOCHS` epochs, with all weights. What is closed at tau = 0.5
  is cut, and the rest fine-tuned for `TUNE_EPOCHS` epochs. Should a path be closed from end to end, tau is lowered by
  steps of 0.05 until none is; the result holds the one that was used.
- Torch-Pruning: `BasePruner` with `GroupMagnitudeImportance(p=2)`, which is what its README shows where there is no
  sparse training, cuts at once: with global ranking, and the same share everywhere. The ratio is searched until the
  multiply-adds are those of the gated network. All `GATE_EPOCHS + TUNE_EPOCHS` epochs are fine-tuning.

Optimizer, weight decay, batch size and augmentation are the same, and so are the batches of the first four epochs; the
rate falls along cosines to the same end. Torch-Pruning has a single one over all its epochs, with the peak and the
warm-up of the plain training, so it loses nothing on a restart. Gates have the same in fewer epochs; the fine-tuning
behind them begins at the rate where Torch-Pruning's cosine stands by then. As a reference, the plain network is trained
for as many epochs in the same way as Torch-Pruning's. Batch norms are re-estimated behind every cut.

On two cores at 20 s for an epoch of the plain network all of it takes 18 minutes, two of them for the times. A run
that was stopped goes on where it was. The result is `benchmarks/results/gated-pruning.json`; `--smoke` tries everything
on few images, a minute for a seed, and only prints.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "claims"))
import neighbours

# isort: split
import timm
import torch
from claims.gated import RECIPE, shuffled, trained
from harness import interleave, ratios, summary, write
from sweep import setting
from torch import Tensor, nn
from torch_pruned import TOLERANCE, matched

import surgery
from data import Data, load
from recipe import Component, Recipe
from surgery.errors import PruneError
from training import Task, evaluate, learning_rate, set_seed, train

RUNS = neighbours.ROOT / "runs" / "gated-pruning"
SMOKE_RUNS = RUNS.with_name("gated-pruning-smoke")
TARGETS = (0.5, 0.3)
GATE_EPOCHS, TUNE_EPOCHS = 4, 2  # gates of short trainings settle late; what they leave needs little tuning
# A high rate of the gates, since hundreds of them share the gradient of one mean.
GATES: Mapping[str, Any] = {
    "granularity": "channel",
    "dependent": False,
    "loss": "batch",
    "one_sided": False,
    "weight": 2.0,
    "decay": 10.0,
    "gate_lr": 30.0,
}
SMOKE_GATE_LR = 2000.0  # closes gates within a few steps
TAUS = tuple(step / 20 for step in range(10, 0, -1))
PEERS: Mapping[str, bool] = {"torch-pruning": True, "torch-pruning, uniform": False}  # whether ranking is global
CALLS = {64: 1, 1: 8}  # batch size -> forward passes that are timed together
ROUNDS, SMOKE_ROUNDS = 25, 3
RECALIBRATION = 110  # batches, which are one epoch


@dataclass(frozen=True)
class Study:
    """One plain network that is pruned to one level; without a target it is only trained on."""

    seed: int
    target: float | None
    smoke: bool

    @property
    def folder(self) -> Path:
        return (SMOKE_RUNS if self.smoke else RUNS) / f"{self.target or 'plain'}-{self.seed}"

    def setting(self) -> tuple[Recipe, Data]:
        """Return the recipe for this seed, and its data."""
        recipe, data = reduced() if self.smoke else setting(RECIPE)
        return replace(recipe, training=replace(recipe.training, seed=self.seed), method=None), data


@dataclass(frozen=True)
class Candidate:
    """A pruned network that waits for its fine-tuning, and what it was pruned by."""

    network: nn.Module
    how: Component
    recipe: Recipe


def main() -> None:
    options = parse()
    if find_spec("torch_pruning") is None:
        sys.exit('benchmarks/gated_pruning.py: found no torch_pruning, the peer; install it by pip install ".[bench]"')
    targets = (*TARGETS, None)
    studies = [Study(seed, target, options.smoke) for target in targets for seed in range(options.seeds)]
    with ProcessPoolExecutor(options.processes, get_context("spawn")) as pool:
        references = list(pool.map(reference, studies[-options.seeds :]))
        done = list(pool.map(run, studies))
    torch.set_num_threads(1)
    result = {
        **heading(studies[0]),
        "plain": references,
        "plain, trained on": [found["plain"] for found in done[-options.seeds :]],
        "levels": {
            str(target): {
                side: [found[side] for found, study in zip(done, studies, strict=True) if study.target == target]
                for side in ("gated", *PEERS)
            }
            for target in TARGETS
        },
        "times": [times(seed, smoke=options.smoke) for seed in range(options.seeds)],
    }
    print(json.dumps(result, indent=2) if options.smoke else write("gated-pruning", result))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=1, help="runs at the same time, one thread each")
    parser.add_argument("--smoke", action="store_true", help="few images and untrained networks; nothing is written")
    return parser.parse_args()


def reduced() -> tuple[Recipe, Data]:
    """Return the setting on few images."""
    recipe = Recipe.from_toml(neighbours.ROOT / "examples" / "recipes" / "gated-glyphs.toml")
    return recipe, load(recipe.data.name, **{**recipe.data.options, "train_variants": 1, "test_variants": 1})


def heading(study: Study) -> dict[str, Any]:
    """Return what was compared, and on which budget."""
    recipe, data = study.setting()
    return {
        "what": f"{len(data.classes)} rendered characters, {recipe.model.name}, {recipe.training.epochs} epochs plain",
        "recipe": recipe.to_tables(),
        "gates": dict(GATES),
        "budget": {"gates": GATE_EPOCHS, "tuning": TUNE_EPOCHS, "torch-pruning": GATE_EPOCHS + TUNE_EPOCHS},
        "tolerance": TOLERANCE,
    }


def plain(study: Study, recipe: Recipe, data: Data) -> nn.Module:
    """Return the network that all sides start from."""
    if not study.smoke:
        return trained("plain", study.seed, replace(recipe, method=Component("gated")), data)[0]
    set_seed(study.seed)
    return timm.create_model(recipe.model.name, num_classes=len(data.classes)).eval()


def reference(study: Study) -> dict[str, Any]:
    """Examine the plain network, after its training where that is missing."""
    torch.set_num_threads(1)
    recipe, data = study.setting()
    network = plain(study, recipe, data)
    return {"seed": study.seed, "accuracy": evaluate(network, data.test).accuracy, **cost(network, data)}


def run(study: Study) -> dict[str, dict[str, Any]]:
    """Prune and fine-tune by every side, or take that from the folders of the runs, and examine the networks."""
    torch.set_num_threads(1)
    recipe, data = study.setting()
    found: dict[str, dict[str, Any]] = {}
    for side, candidate in candidates(study, recipe, data):
        network = candidate.network
        used = surgery.recalibrate_bn(network, shuffled(data, recipe, study.seed), RECALIBRATION)
        before = evaluate(network, data.test).accuracy
        fit(network, candidate, data, study.folder / slug(side))
        found[side] = {
            "seed": study.seed,
            "by": {"name": candidate.how.name, **candidate.how.options},
            "recalibrated on": used,
            "accuracy before tuning": before,
            "accuracy": evaluate(network, data.test).accuracy,
            **cost(network, data),
        }
        print(f"{study.folder.name} {side}: {found[side]}", flush=True)
    return found


def candidates(study: Study, recipe: Recipe, data: Data) -> Iterator[tuple[str, Candidate]]:
    """Yield every side's network as it was cut; the gated one comes first, since the others take its multiply-adds."""
    source = plain(study, recipe, data)
    whole = replace(recipe, training=replace(recipe.training, epochs=GATE_EPOCHS + TUNE_EPOCHS))
    if study.target is None:
        yield "plain", Candidate(source, Component("plain"), whole)
        return
    gated = gate(study, source, recipe, data)
    yield "gated", gated
    macs = surgery.cost(gated.network, data.image_size).macs
    for name, ranks in PEERS.items():
        network, options = matched(source, macs, data.image_size, global_pruning=ranks)
        yield name, Candidate(network, Component("torch-pruning", options), whole)


def gate(study: Study, source: nn.Module, recipe: Recipe, data: Data) -> Candidate:
    """Train gates on the plain network and cut what they close."""
    options = {**GATES, "target": study.target, **({"gate_lr": SMOKE_GATE_LR} if study.smoke else {})}
    training = recipe.training
    tuned_from = learning_rate(replace(training, epochs=GATE_EPOCHS + TUNE_EPOCHS), GATE_EPOCHS)
    gating = replace(recipe, training=replace(training, epochs=GATE_EPOCHS), method=Component("gated", options))
    # another seed, or the first batches would come again
    later = {"epochs": TUNE_EPOCHS, "lr": tuned_from, "warmup_epochs": 0, "seed": 1000 + study.seed}
    model = surgery.convert(source, "gated", input_size=data.image_size, **options)
    fit(model, Candidate(model, Component("gated", options), gating), data, study.folder / "gates")
    network, tau = cut(model.eval())
    tuning = replace(recipe, training=replace(training, **later))
    return Candidate(network, Component("gated", {**options, "tau": tau}), tuning)


def cut(model: surgery.ConvertedNetwork) -> tuple[nn.Module, float]:
    """Return the network without what its gates close, and the highest tau that leaves every path open."""
    for tau in TAUS:
        try:
            return surgery.prune(model, tau=tau), tau
        except PruneError:
            if tau == TAUS[-1]:
                raise
    raise AssertionError("there is at least one tau")


def fit(network: nn.Module, candidate: Candidate, data: Data, folder: Path) -> None:
    """Train the network in place and leave it in eval mode; training goes on from what the folder holds."""
    # with what it was pruned by, a run goes on only with a network that was cut alike
    recipe = replace(candidate.recipe, method=candidate.how)
    task = nn.CrossEntropyLoss()
    criterion: Any = surgery.Objective(network, task) if candidate.recipe.method else Task(task)

    def groups(model: nn.Module) -> list[dict[str, Any]]:
        return surgery.param_groups(model, lr=recipe.training.lr, weight_decay=recipe.training.weight_decay)

    label = f"{folder.parent.name} {folder.name}"
    train(network, criterion, data, recipe, run_dir=folder, groups=groups, label=label)
    network.eval()


def slug(side: str) -> str:
    return side.replace(", ", "-")


def cost(network: nn.Module, data: Data) -> dict[str, int]:
    found = surgery.cost(network, data.image_size)
    return {"macs": found.macs, "params": found.params}


def times(seed: int, *, smoke: bool) -> dict[str, Any]:
    """Time the networks of a seed in turns, beside the plain one."""
    networks: dict[str, nn.Module] = {}
    for target in TARGETS:
        study = Study(seed, target, smoke)
        recipe, data = study.setting()
        networks["plain"] = plain(study, recipe, data)
        for side, candidate in candidates(study, recipe, data):
            fit(candidate.network, candidate, data, study.folder / slug(side))
            networks[f"{side} {target}"] = candidate.network
    rounds = SMOKE_ROUNDS if smoke else ROUNDS
    images = {batch: data.test.batch(torch.arange(batch)) for batch in CALLS}
    return {"seed": seed, **{f"batch {batch}": timed(networks, images[batch], rounds) for batch in CALLS}}


def timed(networks: Mapping[str, nn.Module], images: Tensor, rounds: int) -> dict[str, Any]:
    calls = CALLS[len(images)]
    runs = {name: partial(forward, network.eval(), images, calls) for name, network in networks.items()}
    found = {
        name: [all_calls / calls for all_calls in seconds] for name, seconds in interleave(runs, repeats=rounds).items()
    }

    def at(target: str, side: str) -> dict[str, Any]:
        name = f"{side} {target}"
        peers = {f"/ {peer}": ratios(found, name, f"{peer} {target}") for peer in PEERS if side == "gated"}
        return {**summary(found[name]), "/ plain": ratios(found, name, "plain"), **peers}

    levels = {str(target): {side: at(str(target), side) for side in ("gated", *PEERS)} for target in TARGETS}
    return {"plain": summary(found["plain"]), "levels": levels}


def forward(network: nn.Module, images: Tensor, calls: int) -> None:
    with torch.inference_mode():
        for _ in range(calls):
            network(images)


if __name__ == "__main__":
    main()
