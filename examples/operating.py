"""Operating points of a gated network: accuracy, multiply-adds and time for each way in which its gates can decide."""

from __future__ import annotations

import copy
import platform
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

import surgery
from batches import Batches, labelled_batches
from data import Data
from recipe import Training
from reports import benchmark_all_ms
from splits import sample
from surgery.curves import Point
from surgery_gated.gates import AlwaysOn, Mode, Stochastic, Threshold
from surgery_gated.inference import evaluate as evaluate_gated
from surgery_gated.inference import inference, recalibrate
from surgery_gated.transform import gated_blocks
from surgery_gated.usage import Usage, measure
from training import evaluate, set_seed

RUNS = 5  # with gates that are drawn; the paper's number
RECALIBRATION_BATCHES = 210  # the authors' number
PLAN_IMAGES = 10_000
LARGE, TIMED_IMAGES, TIMED_LARGE_IMAGES = 128, 64, 8  # pixels a side from which on fewer images are timed


class InMode(nn.Module):
    """A gated network whose gates decide in one mode, whatever their own is."""

    def __init__(self, model: surgery.ConvertedNetwork, mode: Mode) -> None:
        super().__init__()
        self.model, self.mode = model, mode
        self.train(model.training)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        with inference(self.model, self.mode):
            return self.model(images)


@dataclass(frozen=True, eq=False)
class Row:
    """One operating point.

    Attributes:
        name: What stands in the table.
        point: What was measured.
        network: What runs there.
        passes: How many forward passes of `network` make a prediction.
    """

    name: str
    point: Point
    network: nn.Module
    passes: int = 1


@dataclass(frozen=True, eq=False)
class Bench:
    """What networks are measured on.

    Attributes:
        data: The test part is classified; the training part gives batch-norm statistics, and shows what stays closed.
        training: How batches are made and read.
        device: Where the networks run, except while they are timed.
        repeats: How often each is timed.
    """

    data: Data
    training: Training
    device: str
    repeats: int

    def test(self) -> Iterable[tuple[Tensor, Tensor]]:
        """Return the batches of the test part."""
        return labelled_batches(self.data.test, workers=self.training.workers)

    def seen(self) -> Iterable[tuple[Tensor, Tensor]]:
        """Return batches of at most `PLAN_IMAGES` training images, without augmentation."""
        return labelled_batches(sample(self.data.train, PLAN_IMAGES), workers=self.training.workers)

    def plain(self, model: nn.Module, name: str) -> Row:
        """Measure a network without gates."""
        seen = evaluate(model, self.data.test, device=self.device, workers=self.training.workers)
        macs = surgery.cost(model, self.data.image_size).macs
        return Row(name, Point(setting={}, macs=macs, params=_params(model), accuracy=seen.accuracy), model)

    def gated(self, model: surgery.ConvertedNetwork, taus: Iterable[float]) -> Iterator[tuple[Row, Usage]]:
        """Measure a network with all gates open, and behind every threshold."""
        yield self.in_mode(model, AlwaysOn(), "all open", {"gates": "open"})
        for tau in taus:
            yield self.in_mode(model, Threshold(tau), f"tau {tau:g}", {"tau": tau})

    def drawn(self, model: surgery.ConvertedNetwork) -> Iterator[Row]:
        """Measure a network whose gates are drawn: single runs, and two ways to join `RUNS` of them."""
        single, usage = self.in_mode(model, Stochastic(), "drawn", {"gates": "drawn"})
        seed = self.training.seed if self.device.startswith(("cpu", "cuda")) else None
        found = evaluate_gated(model, self.test(), "ensemble", runs=RUNS, seed=seed)
        accuracy = sum(found.runs) / len(found.runs)
        yield replace(single, point=replace(single.point, accuracy=accuracy, deviation=found.deviation))
        for by, accuracy in (("majority", found.accuracy), ("mean", found.mean_probability)):
            setting = {"gates": "drawn", "runs": RUNS, "joined": by}
            point = replace(single.point, setting=setting, macs=RUNS * usage.macs, accuracy=accuracy)
            yield Row(f"ensemble, {by}", point, single.network, RUNS)

    def pruned(self, model: surgery.ConvertedNetwork, tau: float, name: str) -> Row:
        """Measure what `surgery.prune` left at a threshold, with batch-norm statistics of its own."""
        setting: dict[str, object] = {"tau": tau}
        if any(gated_blocks(model)):
            return self.in_mode(model, Threshold(tau), name, setting)[0]
        surgery.recalibrate_bn(model, self._recalibration(), RECALIBRATION_BATCHES)
        row = self.plain(model, name)
        return replace(row, point=replace(row.point, setting=setting))

    def in_mode(
        self, model: surgery.ConvertedNetwork, mode: Mode, name: str, setting: dict[str, object]
    ) -> tuple[Row, Usage]:
        """Measure a network in one mode, with batch-norm statistics for that mode, which it keeps."""
        set_seed(self.training.seed)  # of gates that are drawn
        recalibrate(model, self._recalibration(), RECALIBRATION_BATCHES, mode=mode)
        with inference(model, mode):
            usage = measure(model, self.test())
        point = Point(setting=setting, macs=usage.macs, params=_params(model), accuracy=usage.accuracy)
        # A copy: the next mode estimates the norms anew.
        return Row(name, point, InMode(copy.deepcopy(model), mode)), usage

    def timed(self, rows: Sequence[Row]) -> list[Row]:
        """Return the rows with milliseconds, measured in turns on the CPU."""
        images = self.data.test.batch(torch.arange(min(self.timed_images, len(self.data.test))))
        networks = list(dict.fromkeys(row.network for row in rows))
        measured = benchmark_all_ms([network.cpu() for network in networks], images, self.repeats)
        times = dict(zip(networks, measured, strict=True))
        return [replace(r, point=replace(r.point, milliseconds=r.passes * times[r.network])) for r in rows]

    @property
    def timed_images(self) -> int:
        """Number of images of the forward pass that is timed."""
        return TIMED_IMAGES if self.data.image_size < LARGE else TIMED_LARGE_IMAGES

    def _recalibration(self) -> Iterable[tuple[Tensor, Tensor]]:
        t = self.training
        batches = Batches(self.data.train, t.batch_size, t.seed, augment=t.augment, drop_last=t.drop_last)
        return batches.loader(0, min(RECALIBRATION_BATCHES, batches.per_epoch), t.workers)


def processor() -> str:
    """Return the name of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
