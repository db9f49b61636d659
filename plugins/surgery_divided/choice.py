"""What is measured before small networks are fused, and what was chosen by it."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Runs = Mapping[str, Callable[[], object]]
Measure = Callable[[Runs, torch.device], Mapping[str, float]]
"""Return the milliseconds of each run on a device."""
GROUPED, SEPARATE = "grouped", "separate"
PACKED, WINOGRAD = "packed", "winograd"

_FEWEST, _MOST = 3, 25  # rounds
_SECONDS = 0.04  # of one comparison, where the fewest rounds take less
_SHORTEST = 5e-4  # seconds; what takes less is repeated until it takes that, or the clock would be measured
_MANY_SECONDS, _FEW = 1.0, 2  # rounds, where they took that long
_LONG, _HOPELESS = 0.02, 1.2  # what takes this many seconds, and times those of the fastest, is not timed again


@dataclass(frozen=True)
class Layer:
    """What was chosen for the convolutions that stand at one place in all small networks.

    Attributes:
        path: Of the convolution in each network.
        shape: What it reads, (B, channels, height, width); S times the channels where the networks are joined.
        chosen: "grouped", one convolution with S times the groups, or "separate"; where the networks run one after the
            other, "packed" or "winograd".
        milliseconds: Of both.
    """

    path: str
    shape: tuple[int, ...]
    chosen: str
    milliseconds: Mapping[str, float]


def medians(runs: Runs, device: torch.device) -> dict[str, float]:
    """Return the median milliseconds of each run: in turns, after a warm-up, with all work on the device done.

    A long run that is far behind the fastest one is timed once.
    """
    repeats = {}
    for name, run in runs.items():
        seconds = _seconds(run, 1, device)
        if seconds < _SECONDS:
            seconds = _seconds(run, 1, device)  # the first one of all is slow
        repeats[name] = max(1, math.ceil(_SHORTEST / max(seconds, 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in runs}
    start = time.perf_counter()
    for number in range(_MOST):
        elapsed = time.perf_counter() - start
        if (number >= _FEWEST and elapsed > _SECONDS) or (number >= _FEW and elapsed > _MANY_SECONDS):
            break
        for name in _hopeful(times):
            times[name].append(1e3 * _seconds(runs[name], repeats[name], device) / repeats[name])
    return {name: statistics.median(found) for name, found in times.items()}


def _hopeful(times: Mapping[str, Sequence[float]]) -> list[str]:
    """Return which runs may still turn out to be the fastest, by the milliseconds found so far."""
    least = {name: min(found, default=0.0) for name, found in times.items()}
    limit = max(1e3 * _LONG, _HOPELESS * min(least.values(), default=0.0))
    return [name for name, milliseconds in least.items() if milliseconds <= limit]


def _seconds(run: Callable[[], object], repeats: int, device: torch.device) -> float:
    _settle(device)
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    _settle(device)
    return time.perf_counter() - start


def _settle(device: torch.device) -> None:
    """Wait until a device that works while Python runs on has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type in ("mps", "xpu"):
        torch.accelerator.synchronize(device)


class Chooser:
    """Choose by measurement, for each convolution, how it is computed.

    Args:
        measure: How; layers alike in all that counts for the time are measured once.
        layout: Memory format of what a convolution reads.

    Attributes:
        layers: What was chosen, in the order in which it was asked for.
    """

    def __init__(self, measure: Measure, layout: torch.memory_format) -> None:
        self.measure, self.layout = measure, layout
        self.layers: list[Layer] = []
        self._known: dict[tuple[str, tuple[int, ...]], Mapping[str, float]] = {}

    def choose(self, path: str, grouped: nn.Conv2d, convs: Sequence[nn.Conv2d], shape: tuple[int, ...]) -> str:
        """Return "grouped" or "separate": one convolution with more groups, or one for each network.

        Args:
            path: Where the convolutions stand.
            grouped: The one with S times the groups.
            convs: The S separate ones.
            shape: What each of these reads.
        """
        joined = (shape[0], shape[1] * len(convs), *shape[2:])

        def runs(value: Tensor) -> Runs:
            return {GROUPED: lambda: grouped(value), SEPARATE: lambda: separately(convs, value)}

        return self.faster(path, repr(grouped), joined, grouped.weight, runs)

    def faster(
        self, path: str, kind: str, shape: tuple[int, ...], weight: Tensor, runs: Callable[[Tensor], Runs]
    ) -> str:
        """Return the name of the fastest of several ways to compute a layer.

        Args:
            path: Where the layer stands.
            kind: What it does; layers of one kind that read one shape are measured once.
            shape: What it reads.
            weight: Tells the type and device of that.
            runs: Returns the ways for such a value.
        """
        key = (kind, shape)
        if key not in self._known:
            value = torch.ones(shape, dtype=weight.dtype, device=weight.device).contiguous(memory_format=self.layout)
            self._known[key] = self.measure(runs(value), weight.device)
        times = self._known[key]
        layer = Layer(path, shape, min(times, key=times.__getitem__), times)
        if layer not in self.layers:  # the same one of another network
            self.layers.append(layer)
        return layer.chosen


def separately(convs: Sequence[nn.Conv2d], value: Tensor) -> Tensor:
    """Return what S convolutions make of the channels of each network, one behind the other."""
    pieces = value.chunk(len(convs), 1)
    return torch.cat([conv(piece) for conv, piece in zip(convs, pieces, strict=True)], 1)


def report(layers: Sequence[Layer], candidates: Mapping[str, float], chosen: str) -> str:
    """Return a line for every layer and one for every way to run the whole network; `*` marks what was chosen."""
    lines = [f"{'*' if name == chosen else ' '} {name}: {_ms(ms)}" for name, ms in candidates.items()]
    width = max((len(layer.path) for layer in layers), default=0)
    for layer in layers:
        both = ", ".join(f"{name} {_ms(ms)}" for name, ms in layer.milliseconds.items())
        lines.append(f"  {layer.path:<{width}}  {'x'.join(map(str, layer.shape)):<18} {layer.chosen:<9} ({both})")
    return "\n".join(lines)


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:.3f} ms"
