"""What closed gates save: time against multiply-adds, for layers that are skipped and for channels that are cut.

python benchmarks/gated.py [--rounds 40] [--threads 2] [--device cpu] [--channels-last]

Every gate computes its decision as always; then a random one of a given rate replaces it. All columns run in turns in
one process. With t_full and m_full the time and the multiply-adds of the same network with every gate open, the share
of the promise that was reached is (1 - t / t_full) / (1 - m / m_full), round by round.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torchvision
from harness import interleave, ratios, summary, write
from torch import Tensor, nn

import surgery
from surgery_gated import Gates, gated_blocks
from surgery_gated.macs import network_macs

SIDE = 160
GOAL = 0.9
PATTERNS = 5  # random decisions of one rate, used in turns

Decisions = dict[str, Tensor]


class Scripted(nn.Module):
    """Compute the logits of gates, then replace them by what was decided beforehand."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head
        self.opened = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        self.head(x)
        return torch.stack([1 - self.opened, self.opened], dim=-1)


@dataclass(frozen=True)
class Study:
    """A gated network with scripted gates, and the images that it sees."""

    model: surgery.ConvertedNetwork
    gates: dict[str, Gates]
    counts: dict[str, int]
    images: Tensor

    @classmethod
    def of(cls, source: nn.Module, granularity: str, images: Tensor) -> Study:
        model = surgery.convert(source, "gated", granularity=granularity, input_size=SIDE).to(images.device).eval()
        gates = {block.path: found for block, found in gated_blocks(model)}
        counts = {path: found.count for path, found in gates.items()}
        for found in gates.values():
            found.head = Scripted(found.head).eval()
        return cls(model, gates, counts, images)

    def patterns(self, keep: float) -> list[Decisions]:
        """Return random decisions (B, G) by block, of which exactly the share `keep` is open."""
        batch, total = len(self.images), len(self.images) * sum(self.counts.values())
        found = []
        for seed in range(PATTERNS):
            order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
            flat = torch.zeros(total)
            flat[order[: round(keep * total)]] = 1
            parts = flat.to(self.images.device).split([batch * count for count in self.counts.values()])
            found.append({path: part.view(batch, -1) for path, part in zip(self.counts, parts, strict=True)})
        return found

    def macs(self, patterns: Sequence[Decisions]) -> list[float]:
        """Return the multiply-adds of one image, the mean over the batch, under each pattern."""
        return [float(network_macs(self.model, decisions).mean()) for decisions in patterns]

    def run(self, patterns: Sequence[Decisions], *, skipping: bool = True) -> Callable[[], None]:
        """Return a forward pass that takes one pattern after the other."""
        turn = 0

        def call() -> None:
            nonlocal turn
            for path, gates in self.gates.items():
                gates.skipping = skipping
                gates.head.opened = patterns[turn % PATTERNS][path]
            turn += 1
            with torch.inference_mode():
                self.model(self.images)
            synchronise(self.images.device)

        return call


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    result = {
        "what": f"{SIDE} px, {options.device}{', channels last' if options.channels_last else ''}, float32",
        "threads": options.threads,
        "goal": GOAL,
        "layers": measure("resnext50_32x4d", "layer", options.batch, (1.0, 0.75, 0.5, 0.25), options),
        "channels": measure("resnet50", "channel", 1, (1.0, 0.75, 0.5), options),
    }
    print(json.dumps(result, indent=2))
    places = ("" if options.device == "cpu" else f"-{options.device}") + ("-nhwc" if options.channels_last else "")
    print(write(f"gated-skipping{places}", result))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--channels-last", action="store_true")
    return parser.parse_args()


def measure(
    name: str, granularity: str, batch: int, keeps: Sequence[float], options: argparse.Namespace
) -> dict[str, Any]:
    """Time a network at several rates of open gates, skipping and multiplying, beside its source."""
    torch.manual_seed(0)
    form = torch.channels_last if options.channels_last else torch.contiguous_format
    source = torchvision.models.get_model(name, weights=None).eval().to(options.device, memory_format=form)
    images = torch.randn(batch, 3, SIDE, SIDE, device=options.device).contiguous(memory_format=form)
    study = Study.of(source, granularity, images)
    patterns = {keep: study.patterns(keep) for keep in keeps}
    runs: dict[str, Callable[[], None]] = {"source": plain(source, images)}
    runs |= {label(keep): study.run(found) for keep, found in patterns.items()}
    runs["50 %, multiplied"] = study.run(patterns[0.5], skipping=False)
    times = interleave(runs, repeats=options.rounds, warmup=PATTERNS)
    macs = {keep: study.macs(found) for keep, found in patterns.items()}
    return {
        "network": f"{name}, batch {batch}, random {granularity} gates on {len(study.gates)} blocks",
        "source": summary(times["source"]),
        "full / source": ratios(times, label(1.0), "source"),
        **{label(keep): at_rate(keep, times, macs) for keep in keeps},
        "50 %, multiplied": summary(times["50 %, multiplied"]),
        "50 % / 50 %, multiplied": ratios(times, label(0.5), "50 %, multiplied"),
    }


def plain(source: nn.Module, images: Tensor) -> Callable[[], None]:
    def call() -> None:
        with torch.inference_mode():
            source(images)
        synchronise(images.device)

    return call


def at_rate(keep: float, times: dict[str, list[float]], macs: dict[float, list[float]]) -> dict[str, Any]:
    """Return the time at one rate of open gates, what its multiply-adds promise, and how much of that came true."""
    full = macs[1.0][0]
    found = {**summary(times[label(keep)]), "gmacs": statistics.mean(macs[keep]) / 1e9}
    if keep == 1:
        return found
    promises = [1 - spent / full for spent in macs[keep]]
    bases = {"every gate open": times[label(1.0)], "source": times["source"]}
    reached = {name: shares(times[label(keep)], base, promises) for name, base in bases.items()}
    return {
        **found,
        "time": ratios(times, label(keep), label(1.0)),
        "promised": statistics.mean(promises),
        "reached": reached,
        "goal met": reached["every gate open"]["median"] >= GOAL,
    }


def shares(times: list[float], base: list[float], promises: list[float]) -> dict[str, float]:
    """Return median and quartiles of the share of the promise that each round reached, and that of the medians."""
    found = [
        (1 - time / other) / promises[turn % PATTERNS]
        for turn, (time, other) in enumerate(zip(times, base, strict=True))
    ]
    low, middle, high = statistics.quantiles(found, n=4)
    medians = (1 - statistics.median(times) / statistics.median(base)) / statistics.mean(promises)
    return {"median": middle, "q1": low, "q3": high, "of medians": medians}


def label(keep: float) -> str:
    return f"{keep:.0%}".replace("%", " %")


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
