"""Every method on XLA's CPU backend: trained as on the CPU in one program, saved, resumed and pruned there.

The laws run in child processes, this file as a script, because a process has one kind of XLA device for good.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import surgery
import surgery_inclusive
from surgery.network import BlockModule
from surgery.taps import in_backward
from surgery.testing.networks import unsettle
from surgery_gated import gated_blocks

STEPS, BATCH, SIDE, CLASSES = 3, 6, 8, 5
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
IS_THERE = pytest.mark.skipif(
    importlib.util.find_spec("torch_xla") is None, reason="torch_xla has no release for this Python or torch"
)


@dataclass(frozen=True)
class Case:
    """One method with its options, and what it is pruned by.

    Attributes:
        views: How many views of an image the network gets, side by side.
        recomputes: Whether blocks are computed once more in the backward pass.
        programs: How many are compiled, one in each of the first steps.
    """

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    criteria: Mapping[str, Any] = field(default_factory=dict)
    views: int = 1
    recomputes: bool = False
    programs: int = 1

    def network(self) -> surgery.ConvertedNetwork:
        torch.manual_seed(0)
        model = unsettle(timm.create_model("resnext11_4x4d", num_classes=CLASSES))
        network = surgery.convert(model.double(), self.method, input_size=SIDE, **self.options)
        for module in network.modules():
            if isinstance(module, BlockModule):
                module.grad_checkpointing = self.recomputes
        return network

    def images(self) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.randn(BATCH, 3 * self.views, SIDE, SIDE, generator=generator, dtype=torch.float64)


CASES = {
    "coded": Case("coded", criteria={"classes": [1, 4]}),
    # XLA takes equal numbers for one: a target that comes by another constant, such as 0.5, makes another program.
    "gated layers": Case(
        "gated", {"anneal": 2.0, "target": 0.55}, {"images": torch.ones(1, 3, SIDE, SIDE, dtype=torch.float64)}
    ),
    "gated channels": Case("gated", {"granularity": "channel", "dependent": False}),
    "masked": Case("masked", programs=2),  # no gradient of a mask in the first step
    "inclusive dense": Case("inclusive", {"subnetworks": 2}, {"subnetwork": 1}),
    "inclusive sparse": Case("inclusive", {"subnetworks": 2, "sparse": True}, {"subnetwork": 1}),
    "divided": Case("divided", criteria={"members": [1]}, views=2),
    "recomputed": Case("gated", recomputes=True),
}


@IS_THERE
def test_every_method_trains_saves_resumes_and_prunes_on_xla_as_on_the_cpu(tmp_path):
    run("one", tmp_path)


@IS_THERE
def test_every_method_trains_on_two_devices_as_on_one(tmp_path):
    run("two", tmp_path)


def run(devices: str, folder: Path) -> None:
    # Without LLVM's optimizations programs compile five times as fast, and run long enough.
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
    count = {"one": "1", "two": "2"}[devices]
    settings = {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": count, "XLA_FLAGS": flags, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", __file__, devices, str(folder)]
    environment = {**os.environ, **settings}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=1200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n") == [*CASES, ""]


# --- what the child processes run ---


class Training:
    """A copy of a network on a device, with its objective and its optimizer."""

    def __init__(self, network: surgery.ConvertedNetwork, device: torch.device) -> None:
        self.device = device
        self.network = copy.deepcopy(network).to(device).train()
        self.objective = surgery.Objective(self.network, nn.CrossEntropyLoss())
        self.optimizer = torch.optim.SGD(surgery.param_groups(self.network, lr=0.05, weight_decay=1e-4), momentum=0.9)
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:  # torch makes them in the first step, which would be another program
                self.optimizer.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter)}

    def step(self, index: int, images: Tensor, labels: Tensor) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] *= 0.9
        loss = self.objective(self.network(images), labels, progress=index + 0.5)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def tensors(self) -> list[Tensor]:
        momenta = [values["momentum_buffer"] for values in self.optimizer.state.values()]
        return [*self.network.parameters(), *self.network.buffers(), *momenta]

    def state(self) -> dict[str, Any]:
        state = {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}
        return tree_map_only(Tensor, lambda tensor: tensor.cpu(), state)

    def load(self, state: Mapping[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        for buffer in self.network.buffers():
            if not buffer.dim():  # XLA takes equal numbers from the host for one value, which is another program
                buffer += 0

    @torch.no_grad()
    def outputs(self, images: Tensor) -> Tensor:
        return self.network.eval()(images)


@contextmanager
def draws_kept(kept: list[Tensor]) -> Iterator[None]:
    """Append all random numbers that the methods draw in the forward pass."""

    def keep(draw):
        def kept_draw(*args):
            values = draw(*args)
            if not in_backward():
                kept.append(values)
            return values

        return kept_draw

    with (
        mock.patch.object(torch, "rand_like", keep(torch.rand_like)),
        mock.patch.object(Tensor, "bernoulli", keep(Tensor.bernoulli)),
    ):
        yield


@contextmanager
def draws_replayed(kept: list[Tensor]) -> Iterator[None]:
    """Draw these numbers, all of them."""
    left = [values.cpu() for values in kept]

    def replay(*_):
        return left.pop(0)

    with mock.patch.object(torch, "rand_like", replay), mock.patch.object(Tensor, "bernoulli", replay):
        yield
    assert not left


def counts() -> dict[str, int]:
    """Return how many programs were compiled, tensors fetched, and operations run on the host, since the last call."""
    from torch_xla.debug import metrics

    data = {name: metrics.metric_data(name) for name in ("CompileTime", "TransferFromDeviceTime")}
    found = {name: samples[0] for name, samples in data.items() if samples}
    found |= {name: metrics.counter_value(name) for name in metrics.counter_names() if name.startswith("aten::")}
    metrics.clear_all()
    return found


@dataclass(frozen=True)
class Trained:
    """What a training on XLA left, and what it was before the last step.

    Attributes:
        batch: Images and labels on the device.
        seed: State of the generator.
    """

    training: Training
    batch: tuple[Tensor, Tensor]
    loss: float
    state: dict[str, Any]
    seed: int


def trained(case: Case, place: Callable[[Tensor, str | None], Tensor]) -> Trained:
    """Train on XLA with the losses of the CPU, in one program that never waits for the host.

    Args:
        case: What is trained.
        place: Puts a tensor on the device, or on all devices: parts of its "batch", or copies of it.
    """
    import torch_xla
    from torch_xla.core import xla_model

    network, images, labels = case.network(), case.images(), torch.arange(BATCH) % CLASSES
    training, batch = Training(network, torch_xla.device()), (place(images, "batch"), place(labels, "batch"))
    for tensor in training.tensors():
        place(tensor, None)
    losses, drawn = [], []
    torch_xla.sync()
    counts()
    for index in range(STEPS):
        if index == STEPS - 1:
            state, seed = training.state(), xla_model.get_rng_state()
            counts()
        with draws_kept(drawn):
            losses.append(training.step(index, *batch))
        torch_xla.sync()
        assert counts() == ({"CompileTime": 1} if index < case.programs else {}), f"step {index}"
    with draws_replayed(drawn):
        reference = Training(replace(case, recomputes=False).network(), torch.device("cpu"))
        expected = torch.stack([reference.step(index, images, labels) for index in range(STEPS)])
    torch.testing.assert_close(torch.stack(losses).cpu(), expected, **CLOSE)
    assert len(expected.unique()) == STEPS
    learned = [weight.detach().cpu() for weight in training.network.parameters()]
    torch.testing.assert_close(learned, [weight.detach() for weight in reference.network.parameters()], **CLOSE)
    return Trained(training, batch, float(losses[-1]), state, seed)


def resumed(case: Case, before: Trained) -> None:
    """Take the last step once more, in a network that was built anew: the same loss to the last digit."""
    import torch_xla
    from torch_xla.core import xla_model

    again = Training(case.network(), torch_xla.device())
    again.load(before.state)
    torch_xla.sync()
    xla_model.set_rng_state(before.seed)
    counts()
    drawn: list[Tensor] = []  # alive, as in the training, or it were another program
    with draws_kept(drawn):
        loss = again.step(STEPS - 1, *before.batch)
    torch_xla.sync()
    assert counts() == {}
    assert float(loss) == before.loss


def saved(case: Case, training: Training, path: Path) -> surgery.ConvertedNetwork:
    """Save from XLA, load on the CPU, be the same network; nothing in it waits for the host."""
    import torch_xla

    images = case.images()
    there = images.to(training.device)
    torch_xla.sync()
    counts()
    found = training.outputs(there)
    assert counts() == {}
    surgery.save(training.network, path)
    loaded = surgery.load(path)
    assert next(loaded.parameters()).device.type == "cpu"
    with torch.no_grad():
        torch.testing.assert_close(found.cpu(), loaded(images), **CLOSE)
        if case.method == "inclusive":
            both = [list(surgery_inclusive.anytime(*pair)) for pair in ((training.network, there), (loaded, images))]
            torch.testing.assert_close(torch.stack(both[0]).cpu(), torch.stack(both[1]), **CLOSE)
    return loaded


@torch.no_grad()
def pruned(case: Case, training: Training, loaded: surgery.ConvertedNetwork) -> None:
    """Prune on XLA what is pruned on the CPU."""
    outputs = []
    for network in (training.network, loaded):
        for _, gates in gated_blocks(network) if case.method == "gated" else ():
            if not gates.dependent:
                gates.head.logits[::2] = torch.tensor([1.0, -1.0], dtype=torch.float64)
        device = next(network.parameters()).device
        small = surgery.prune(network, **tree_map_only(Tensor, partial(Tensor.to, device=device), case.criteria))
        assert {tensor.device.type for tensor in (*small.parameters(), *small.buffers())} == {device.type}
        outputs.append(small(case.images()[:, :3].to(device)).cpu())
    torch.testing.assert_close(*outputs, **CLOSE)


def one(case: Case, folder: Path) -> None:
    import torch_xla

    found = trained(case, lambda tensor, _: tensor.to(torch_xla.device()))
    resumed(case, found)
    loaded = saved(case, found.training, folder / "network.safetensors")
    if not case.recomputes:
        pruned(case, found.training, loaded)


def two(case: Case, folder: Path) -> None:
    import numpy as np
    import torch_xla
    from torch_xla import runtime
    from torch_xla.distributed import spmd

    if not runtime.is_spmd():
        runtime.use_spmd()
    assert runtime.global_runtime_device_count() == 2
    mesh = spmd.Mesh(np.arange(2), (2,), ("batch",))

    def place(tensor: Tensor, first: str | None) -> Tensor:
        there = tensor.to(torch_xla.device())
        # What is not marked is copied too, but the second step would be another program.
        spmd.mark_sharding(there, mesh, (first, *[None] * (tensor.dim() - 1))[: tensor.dim()])
        return there

    found = trained(case, place)
    specs = [torch_xla._XLAC._get_xla_sharding_spec(t) for t in (found.batch[1], *found.training.tensors())]
    assert specs[0] == "{devices=[2]0,1}"
    assert set(specs[1:]) == {"{replicated}"}


def main(devices: str, folder: str) -> None:
    torch.set_num_threads(1)
    for name, case in CASES.items():
        try:
            {"one": one, "two": two}[devices](case, Path(folder))
        except BaseException as error:
            error.add_note(f"in the case {name!r}")
            raise
        print(name, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
