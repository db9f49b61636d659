"""Every method on six networks as torchvision and timm build them: python benchmarks/matrix.py [--only SUBSTRING]

Each cell converts with no options, trains a step, copies, trains under DistributedDataParallel and `torch.compile`,
prunes, saves, loads in a fresh process, and exports what was pruned. A cell in the result file is not run again.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnxruntime
import timm
import torch
import torchvision
from harness import RESULTS, write
from torch import Tensor, distributed, nn
from torch._C._distributed_c10d import HashStore
from torch.nn.parallel import DistributedDataParallel

import surgery
from surgery import ConvertedNetwork
from surgery.errors import SurgeryError
from surgery.testing import unsettle
from surgery.testing.case import evaluate, require, require_close, require_equal, seeded, training_loss

sys.path.append(str(Path(__file__).parents[1]))
from tests.methods import NAMES, images, pruning  # the tests prune in the same way

SIZE = 64
BACKEND = "aot_eager"  # captures forward and backward; what a compiler makes of them is its own affair
NETWORKS = {
    "torchvision": ("resnext50_32x4d", "mobilenet_v2", "wide_resnet50_2"),
    "timm": ("resnext50_32x4d", "mobilenetv2_100", "wide_resnet50_2"),
}


@dataclass(eq=False)
class Cell:
    """One method on one network.

    Attributes:
        method: Its name.
        library: "torchvision" or "timm".
        network: Name of the builder.
        folder: Where its files go.
        models: "full" once it is converted, "pruned" once it is pruned.
    """

    method: str
    library: str
    network: str
    folder: Path
    models: dict[str, ConvertedNetwork] = field(default_factory=dict)

    def fresh(self) -> ConvertedNetwork:
        return copy.deepcopy(self.models["full"])


def convert(cell: Cell) -> str:
    torch.manual_seed(0)
    builder = torchvision.models.get_model if cell.library == "torchvision" else timm.create_model
    source = unsettle(builder(cell.network))
    cell.models["full"] = surgery.convert(source, cell.method, input_size=SIZE)
    return f"{parameters(cell.models['full']) / 1e6:.2f} M parameters"


def train(cell: Cell) -> str:
    model = cell.fresh()
    optimizer = torch.optim.SGD(surgery.param_groups(model, lr=0.01, weight_decay=1e-4), momentum=0.9)
    loss = step_loss(model)
    loss.backward()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer.step()
    moved = sum(not torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    require(math.isfinite(loss.item()), f"the loss is {loss.item()}")
    return f"loss {loss.item():.2f}, {moved} of {len(before)} parameters moved"


def deepcopy(cell: Cell) -> str:
    model = cell.fresh()
    step_loss(model)
    require_equal(evaluate(copy.deepcopy(model), images(SIZE)), evaluate(model, images(SIZE)), "output of the copy")
    return ""


def ddp(cell: Cell) -> str:
    with process_group():
        losses = [backward(model) for model in (cell.fresh(), DistributedDataParallel(cell.fresh()))]
    require(
        math.isclose(*losses, rel_tol=1e-5), f"the losses are {losses[1]} under DistributedDataParallel and {losses}"
    )
    return ""


def compiled(cell: Cell) -> str:
    torch._dynamo.reset()
    model = cell.fresh()
    program = torch.compile(model, backend=BACKEND)
    losses = [backward(each) for each in (cell.fresh(), program)]
    require(math.isclose(*losses, rel_tol=1e-4), f"the loss is {losses[1]} compiled, {losses[0]} in eager mode")
    model.zero_grad(set_to_none=True)
    require_close(evaluate(program, images(SIZE)), evaluate(model, images(SIZE)), "compiled output", rtol=1e-4)
    torch._dynamo.reset()
    return ""


def prune(cell: Cell) -> str:
    asked, model = pruning(cell.method, SIZE), cell.models["full"]
    if asked.settle is not None:
        asked.settle(model)
    pruned = surgery.prune(model.eval(), **asked.criteria)
    kept = parameters(pruned) / parameters(model)
    require(kept < 1, "pruning left all parameters")
    cell.models["pruned"] = pruned.eval()
    expected = evaluate(asked.muted(model, asked.criteria), images(SIZE))
    require_close(evaluate(pruned, images(SIZE)), expected, "output of the pruned network", rtol=1e-4)
    return f"{100 * kept:.1f} % of the parameters kept"


def save(cell: Cell) -> str:
    for name, model in cell.models.items():
        surgery.save(model, cell.folder / f"{name}.safetensors")
        torch.save(evaluate(model, images(SIZE)), cell.folder / f"{name}.pt")
    return f"{(cell.folder / 'pruned.safetensors').stat().st_size / 2**20:.0f} MiB pruned"


def load(cell: Cell) -> str:
    """Load both files in a process that knows nothing else."""
    command = [sys.executable, __file__, "--load", str(cell.folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    require(done.returncode == 0, (done.stderr.strip().splitlines() or ["no message"])[-1])
    return ""


def export(cell: Cell) -> str:
    model = cell.models["pruned"]
    program = torch.export.export(model, (images(SIZE),)).module()
    require_close(evaluate(program.forward, images(SIZE)), evaluate(model, images(SIZE)), "exported network", rtol=1e-4)
    return ""


def onnx(cell: Cell) -> str:
    model, path = cell.models["pruned"], cell.folder / "pruned.onnx"
    torch.onnx.export(model, (images(SIZE),), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    [found] = session.run(None, {session.get_inputs()[0].name: images(SIZE).numpy()})
    require_close(torch.from_numpy(found), evaluate(model, images(SIZE)), "ONNX file", rtol=1e-4)
    return ""


STEPS: Mapping[str, Callable[[Cell], str]] = {
    "convert": convert,
    "train step": train,
    "deepcopy": deepcopy,
    "DDP": ddp,
    "compile": compiled,
    "prune": prune,
    "save": save,
    "load in a fresh process": load,
    "torch.export, pruned": export,
    "ONNX, pruned": onnx,
}
AFTER_PRUNING = list(STEPS)[list(STEPS).index("prune") + 1 :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="run only the cells whose name contains this")
    parser.add_argument("--name", default="matrix", help="of the result file")
    parser.add_argument("--load", type=Path, help="folder of saved networks and outputs to compare, as the cells do")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if arguments.load is not None:
        same(arguments.load)
        return
    path = RESULTS / f"{arguments.name}.json"
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"] if path.exists() else {}
    for name, method, library, network in all_cells():
        if arguments.only in name and name not in cells:
            steps = run(method, library, network)
            cells[name] = {"method": method, "library": library, "network": network, "steps": steps}
            write(arguments.name, {"what": f"{SIZE} px, compiled with {BACKEND}", "cells": cells})
            print(name, {step: row["outcome"] for step, row in steps.items()}, flush=True)


def all_cells() -> Iterator[tuple[str, str, str, str]]:
    for method in NAMES:
        for library, networks in NETWORKS.items():
            for network in networks:
                yield f"{method} {library} {network}", method, library, network


def run(method: str, library: str, network: str) -> dict[str, dict[str, Any]]:
    """Return the outcome, a note and the seconds of every step."""
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        cell = Cell(method, library, network, Path(folder))
        for name, step in STEPS.items():
            needed = "pruned" if name in AFTER_PRUNING else "full"
            if name != "convert" and needed not in cell.models:
                continue
            start = time.perf_counter()
            outcome, note = attempt(step, cell)
            rows[name] = {"outcome": outcome, "note": note, "seconds": round(time.perf_counter() - start, 2)}
    return rows


def attempt(step: Callable[[Cell], str], cell: Cell) -> tuple[str, str]:
    try:
        return "ok", step(cell)
    except AssertionError as error:
        return "failed", str(error)
    except SurgeryError as error:
        return "refused", str(error)
    except Exception as error:
        return "failed", f"{type(error).__name__}: {error}"


def same(folder: Path) -> None:
    for name in ("full", "pruned"):
        model = surgery.load(folder / f"{name}.safetensors")
        expected = torch.load(folder / f"{name}.pt", weights_only=True)
        require_equal(evaluate(model, images(SIZE)), expected, f"output of the loaded {name} network")


def step_loss(model: nn.Module) -> Tensor:
    with seeded(0):
        return training_loss(model, images(SIZE), torch.arange(4))


def backward(model: nn.Module) -> float:
    """Return the loss after a backward pass in which every parameter took part."""
    loss = step_loss(model)
    loss.backward()
    unused = [
        name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None
    ]
    require(not unused, f"{unused[:3]} got no gradient")
    return loss.item()


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@contextmanager
def process_group() -> Iterator[None]:
    distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
