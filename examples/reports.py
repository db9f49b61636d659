"""What a training run writes: a CSV line per step, a line or a progress bar for the reader, and timings."""

from __future__ import annotations

import csv
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn


@dataclass(frozen=True)
class Step:
    """One training step; `terms` are the named parts of `loss`."""

    step: int
    epoch: int
    lr: float
    loss: float
    terms: Mapping[str, float]


@dataclass(frozen=True)
class Epoch:
    """One epoch: mean loss and terms over its steps, and the test accuracy where it was measured."""

    epoch: int
    lr: float
    loss: float
    terms: Mapping[str, float]
    accuracy: float | None
    seconds: float

    def __str__(self) -> str:
        terms = "".join(f"  {name} {value:.4f}" for name, value in self.terms.items())
        accuracy = "" if self.accuracy is None else f"  test accuracy {self.accuracy:.2%}"
        return f"epoch {self.epoch + 1}  lr {self.lr:.5f}  loss {self.loss:.4f}{terms}{accuracy}  {self.seconds:.1f} s"


class StepLog:
    """A CSV file with one line per step; numbers are written with all their digits.

    Args:
        path: The file.
        offset: Bytes to keep; what follows was written after the checkpoint that the run goes on from.
    """

    def __init__(self, path: Path, offset: int = 0) -> None:
        """Open the file and cut it to `offset`."""
        self.path = path
        self._file = path.open("a+", encoding="utf-8", newline="")
        self._file.truncate(offset)
        self._file.seek(0)
        self._columns = self._file.readline().strip().split(",") if offset else []
        self._file.seek(0, os.SEEK_END)

    def write(self, step: Step) -> None:
        """Append a line; the first one is preceded by the names of the columns."""
        row = {"step": step.step, "epoch": step.epoch, "lr": step.lr, "loss": step.loss, **step.terms}
        if not self._columns:
            self._columns = list(row)
            self._file.write(",".join(self._columns) + "\n")
        if list(row) != self._columns:
            message = f"{self.path}: step {step.step} has the columns {list(row)}, the file {self._columns}."
            raise ValueError(message)
        self._file.write(",".join(repr(value) for value in row.values()) + "\n")

    def flush(self) -> int:
        """Bring all lines to the disk and return the length of the file in bytes."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_steps(path: Path) -> list[dict[str, float]]:
    """Read a step log, a dictionary from column to number for every step."""
    with path.open(encoding="utf-8", newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


class Reporter:
    """A progress bar on a terminal, a line per epoch elsewhere, nothing where `visible` is false."""

    def __init__(
        self, description: str, total: int, done: int, *, visible: bool, console: Console | None = None
    ) -> None:
        """Prepare the bar; it is shown on entering the context."""
        self._console = console or Console()
        self._lines = visible and not self._console.is_terminal
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(),
        )
        bar = visible and self._console.is_terminal
        self._bar = Progress(*columns, console=self._console, transient=True, disable=not bar)
        self._task = self._bar.add_task(description, total=total, completed=done, state="")
        self._description = description
        self._done, self._start = 0, time.perf_counter()
        self._accuracy = ""

    def __enter__(self) -> Reporter:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def step(self, step: Step, images: int) -> None:
        """Move the bar by one step of `images` samples."""
        self._done += images
        rate = self._done / (time.perf_counter() - self._start)
        self._bar.update(self._task, advance=1, state=f"loss {step.loss:.4f}{self._accuracy}  {rate:.0f} images/s")

    def epoch(self, epoch: Epoch) -> None:
        """Note the end of an epoch."""
        if epoch.accuracy is not None:
            self._accuracy = f"  accuracy {epoch.accuracy:.2%}"
        if self._lines:
            self._console.print(f"{self._description}: {epoch}", highlight=False, soft_wrap=True)


def benchmark_ms(first: nn.Module, second: nn.Module, images: Tensor, repeats: int = 30) -> tuple[float, float]:
    """Measure the inference time of two networks, see `benchmark_all_ms`."""
    times = benchmark_all_ms((first, second), images, repeats)
    return times[0], times[1]


def benchmark_all_ms(models: Sequence[nn.Module], images: Tensor, repeats: int = 30) -> list[float]:
    """Measure the inference time of networks in turns, so that a change of load meets all of them.

    Returns:
        Median milliseconds of one forward pass of `images`, for each network, in eval mode.
    """
    times: list[list[float]] = [[] for _ in models]
    modes = [model.training for model in models]
    with torch.inference_mode():
        for turn in range(-3, repeats):  # three unmeasured turns warm up
            for model, measured in zip(models, times, strict=True):
                elapsed = _time_forward(model.eval(), images)
                if turn >= 0:
                    measured.append(elapsed)
    for model, mode in zip(models, modes, strict=True):
        model.train(mode)
    return [statistics.median(measured) for measured in times]


def _time_forward(model: nn.Module, images: Tensor) -> float:
    start = time.perf_counter()
    model(images)
    if images.is_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3
