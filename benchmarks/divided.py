"""What inference with several small networks costs, against the one network that they were made of.

python benchmarks/divided.py [--threads 2] [--pairs 12] [--device cuda] [--batch 8]

One forward of the undivided network, of the same by the means that make the fused one faster, of the divided network
as converted, whose members run one after the other, of `surgery_divided.fuse`, and of `surgery_divided.concurrent`. All
of them run in turns in one process, and are compared round by round.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
import torch
import torchvision
from harness import interleave, ratios, summary, write
from torch import fx, nn

import surgery
from surgery_divided.choice import Chooser, medians
from surgery_divided.concurrent import concurrent
from surgery_divided.folding import folded
from surgery_divided.fused import Fused, fuse
from surgery_divided.packed import can_pack, packed
from surgery_divided.winograd import transformed

UNDIVIDED, SAME_MEANS = "undivided", "undivided, by the same means"
GOALS = {"cpu": "fused / undivided <= 1.05 at the larger batch", "cuda": "fused / undivided <= 1.2 at batch 1"}


@dataclass(frozen=True)
class Case:
    """One network, and how it is run.

    Attributes:
        name: What stands in the table.
        build: Builds it.
        size: Side of the images in pixels.
        batch: Images of a forward; one image is tried too.
    """

    name: str
    build: Callable[[], nn.Module]
    size: int
    batch: int


CASES = (
    Case("WRN-16-8", lambda: timm.create_model("wrn_16_8", num_classes=100), 32, 16),
    Case("ResNet-50", torchvision.models.resnet50, 224, 8),
)


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    rows = []
    for case in CASES:
        if options.case not in (None, case.name):
            continue
        source = case.build().eval()
        for networks in options.networks:
            divided = surgery.convert(source, "divided", networks=networks, input_size=case.size).eval()
            for batch in sorted({1, options.batch or case.batch}):
                row = measured(source, divided, torch.randn(batch, 3, case.size, case.size), options)
                rows.append({"network": case.name, "size": case.size, "networks": networks, "batch": batch, **row})
                print(rows[-1]["report"])
                print({key: value for key, value in rows[-1].items() if key != "report"})
    if not options.dry:
        where = f"{options.threads}-threads" if options.device == "cpu" else options.device
        print(write(f"divided-{where}", {"rows": rows, "goal": GOALS[options.device], "device": options.device}))


@torch.no_grad()
def measured(
    source: nn.Module, divided: nn.Module, images: torch.Tensor, options: argparse.Namespace
) -> dict[str, Any]:
    """Return times of one forward of all ways, and what was chosen for the fused one."""
    device, networks = options.device, len(divided.members)
    source, divided, images = source.to(device), divided.to(device), images.to(device)
    with ExitStack() as stack:
        fused = fuse(divided, images)
        together = stack.enter_context(concurrent(divided, [device] * networks))
        ways: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
            UNDIVIDED: source,
            SAME_MEANS: by_the_same_means(source, images),
            "sequential": divided,
            "fused": fused,
            "concurrent": together,
        }
        check(divided(images), fused, together, images)
        times = interleave({name: forward(way, images) for name, way in ways.items()}, repeats=options.pairs)
    return {
        "macs": {UNDIVIDED: surgery.cost(source, images.shape[-1]).macs, "divided": surgery.cost(divided).macs},
        "ms": {name: summary(seconds) for name, seconds in times.items()},
        "ratios": {name: ratios(times, name, UNDIVIDED) for name in ways if name != UNDIVIDED},
        "fused / undivided, by the same means": ratios(times, "fused", SAME_MEANS),
        "chosen": fused.chosen,
        "candidates_ms": fused.milliseconds,
        "layers": [layer.chosen for layer in fused.layers],
        "report": fused.report(),
    }


def by_the_same_means(source: nn.Module, images: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the undivided network with folded norms, in the way that is fastest for it; its input comes as ever."""
    plain = folded(fx.symbolic_trace(source), images)
    networks = [copy.deepcopy(plain), plain.to(memory_format=torch.channels_last)]
    if can_pack(images):
        networks.append(packed(plain))
        networks.append(transformed(networks[-1], Chooser(medians, torch.channels_last)))
    layouts = [torch.contiguous_format, *[torch.channels_last] * 3]

    def run(network: nn.Module, layout: torch.memory_format, batch: torch.Tensor) -> torch.Tensor:
        return network(batch.contiguous(memory_format=layout))

    ways = [partial(run, network, layout) for network, layout in zip(networks, layouts, strict=False)]
    times = medians({str(number): partial(way, images) for number, way in enumerate(ways)}, images.device)
    return ways[int(min(times, key=times.__getitem__))]


def check(expected: torch.Tensor, fused: Fused, together: Callable[..., torch.Tensor], images: torch.Tensor) -> None:
    """Fail where the ways that are compared do not compute the same."""
    for found in (fused(images), together(images)):
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max()))


def forward(way: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad():
            way(images)
        if images.is_cuda:
            torch.cuda.synchronize()

    return run


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--batch", type=int, help="images of the larger batch; default: each network's own")
    parser.add_argument("--networks", type=int, nargs="+", default=[2, 4], help="S")
    parser.add_argument("--case", choices=[case.name for case in CASES], help="only this one")
    parser.add_argument("--dry", action="store_true", help="leave the result file alone")
    return parser.parse_args()


if __name__ == "__main__":
    main()
