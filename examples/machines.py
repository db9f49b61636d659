"""What a training runs on: a device, several processes, or XLA. A training loop asks one class for all that differs.

    python examples/coded.py --device cuda                                       # one process
    torchrun --nproc-per-node=2 examples/coded.py --device cuda                  # DistributedDataParallel, nccl
    torchrun --nproc-per-node=2 examples/coded.py                                # the same on CPUs, gloo
    torchrun --nproc-per-node=2 examples/coded.py --device cuda --parallel fsdp  # FSDP2: every process has a part of it
    python examples/coded.py --device xla                                        # one XLA device, see `xla.py`
    python examples/coded.py --device xla --parallel spmd                        # all of them, one process

Every process learns from its part of the batch; norms use the statistics of that part, except under SPMD.
"""

from __future__ import annotations

import copy
import os
from abc import ABC, abstractmethod
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import surgery

Parallel = Literal["ddp", "fsdp", "spmd"]
PARALLEL: tuple[Parallel, ...] = ("ddp", "fsdp", "spmd")


class Machine(ABC):
    """What a training loop asks of the hardware.

    Attributes:
        device: Where this process trains.
        measuring: Where a trained network is measured.
        rank: Number of this process; the first, 0, writes files and goes on after the training.
        processes: How many there are.
    """

    device: torch.device
    measuring: torch.device
    rank: int
    processes: int

    @property
    def leads(self) -> bool:
        """Whether this is the first process."""
        return self.rank == 0

    @abstractmethod
    def place(self, model: nn.Module) -> nn.Module:
        """Move `model` to the device, and return what computes its forward passes in training.

        The parameters may be others afterwards, so an optimizer is made behind this.
        """

    @abstractmethod
    def load(self, batch: Tensor) -> Tensor:
        """Return this process's samples on the device."""

    @abstractmethod
    def seed(self, seed: int) -> None:
        """Seed the generators of the device, and the global one of torch."""

    @abstractmethod
    def update(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the optimizer take its step; whatever has to be done at the end of a step is done."""

    @abstractmethod
    def mean(self, values: Tensor) -> list[float]:
        """Return the mean of each value, (N,), over all processes."""

    @abstractmethod
    def agree(self, number: int) -> int:
        """Return the largest of the numbers that the processes pass; also lets them wait for each other."""

    @abstractmethod
    def whole(self, tensor: Tensor) -> Tensor:
        """Return a copy on the CPU of a tensor that may lie in parts on several processes; all of them ask for it."""

    @abstractmethod
    def part(self, tensor: Tensor, like: Tensor) -> Tensor:
        """Return of a whole tensor what lies here of `like`: the inverse of `whole`."""

    @abstractmethod
    def finished(self, model: nn.Module) -> nn.Module:
        """Return a network that was placed, whole and in its own class, on `measuring`; all processes ask for it."""

    @abstractmethod
    def leave(self) -> None:
        """Go on alone: every process but the first ends here.

        Raises:
            SystemExit: In every process but the first.
        """


class Processes(Machine):
    """The CPU or a GPU in each of one or more processes, as `torchrun` starts them.

    Args:
        device: "cpu", "cuda" or another device of torch; under torchrun "cuda" means one GPU for each process.
        parallel: "ddp", or "fsdp" for weights, gradients and optimizer state in parts.
        compiler: Backend of `torch.compile`, such as "inductor"; None runs eagerly.

    Raises:
        ValueError: There is no such device, or but one process to shard over.
    """

    def __init__(self, device: str = "cpu", parallel: Parallel = "ddp", compiler: str | None = None) -> None:
        self.device = self.measuring = _device(device)
        self._parallel, self._compiler = parallel, compiler
        self._originals: dict[nn.Module, nn.Module] = {}
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ and not dist.is_initialized():
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        self._grouped = dist.is_initialized()
        self.rank, self.processes = (dist.get_rank(), dist.get_world_size()) if self._grouped else (0, 1)
        if parallel == "fsdp" and not self._grouped:
            raise ValueError("--parallel fsdp: found one process; start it with torchrun --nproc-per-node=2, or more.")

    def place(self, model: nn.Module) -> nn.Module:
        """Move `model` to the device, and return what computes its forward passes in training."""
        if self._grouped and self._parallel == "fsdp":
            self._originals[model] = copy.deepcopy(model).cpu()  # where it takes no room from what is trained
        runner = model.to(self.device)
        if self._grouped and self._parallel == "fsdp":
            mesh = dist.init_device_mesh(self.device.type, (self.processes,))
            for unit in (*_units(model), model):
                fully_shard(unit, mesh=mesh)
        elif self._grouped:
            runner = DistributedDataParallel(model, device_ids=None if self.device.index is None else [self.device])
        return runner if self._compiler is None else torch.compile(runner, backend=self._compiler)

    def load(self, batch: Tensor) -> Tensor:
        """Return this process's samples on the device."""
        return batch.to(self.device, non_blocking=True)

    def seed(self, seed: int) -> None:
        """Seed the generators of all devices."""
        torch.manual_seed(seed)

    def update(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the optimizer take its step."""
        optimizer.step()

    def mean(self, values: Tensor) -> list[float]:
        """Return the mean of each value, (N,), over all processes."""
        if self._grouped:
            values = values.double()
            dist.all_reduce(values)
            values /= self.processes
        return values.tolist()

    def agree(self, number: int) -> int:
        """Return the largest of the numbers that the processes pass."""
        if not self._grouped:
            return number
        shared = torch.tensor(number, device=self.device)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return int(shared)

    def whole(self, tensor: Tensor) -> Tensor:
        """Return a copy on the CPU of a tensor that may lie in parts on several processes."""
        here = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        return here.detach().cpu().clone(memory_format=torch.contiguous_format)

    def part(self, tensor: Tensor, like: Tensor) -> Tensor:
        """Return of a whole tensor what lies here of `like`."""
        if isinstance(like, DTensor):
            return distribute_tensor(tensor.to(self.device), like.device_mesh, like.placements)
        return tensor

    def finished(self, model: nn.Module) -> nn.Module:
        """Return a network that was placed, whole and in its own class."""
        original = self._originals.pop(model, None)
        if original is None:
            return model
        original.load_state_dict({name: self.whole(value) for name, value in model.state_dict().items()})
        return original.to(self.measuring)

    def leave(self) -> None:
        """Close the process group; every process but the first ends here."""
        if self._grouped:
            dist.barrier()
            dist.destroy_process_group()
            self._grouped = False
        if not self.leads:
            raise SystemExit(0)


def start(device: str, parallel: Parallel | None = None, compiler: str | None = None) -> Machine:
    """Return what the command line of an example asks for.

    Args:
        device: "cpu", "cuda", "cuda:1", "xla", ...
        parallel: How several processes or XLA devices share the work; None for the usual way, `DistributedDataParallel`
            under torchrun and one device of XLA.
        compiler: Backend of `torch.compile`, or None.

    Raises:
        ValueError: There is no such device, or it does not do that.
    """
    if device == "xla":
        if compiler is not None or parallel not in (None, "spmd") or "RANK" in os.environ:
            raise ValueError(
                "--device xla: found --compile, --parallel ddp, --parallel fsdp or torchrun; expected none: XLA "
                "compiles by itself, and one process drives all its devices, with --parallel spmd."
            )
        from xla import Xla  # nothing else imports torch_xla

        return Xla(spmd=parallel == "spmd")
    if parallel == "spmd":
        raise ValueError(f"--parallel spmd: found --device {device}; it is a way of XLA, add --device xla.")
    return Processes(device, parallel or "ddp", compiler)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}; use cpu, cuda or xla.") from error
    if device.type != "cuda":
        return device
    if device.index is not None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(f"--device {name}: found several processes on one GPU; use --device cuda, one for each.")
    index = int(os.environ.get("LOCAL_RANK", "0")) if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: torch finds no such device; use --device cpu.")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _units(model: nn.Module) -> list[nn.Module]:
    """Return what is gathered at a time: the blocks, where they are known."""
    try:
        found = model.meta["architecture"] if isinstance(model, surgery.ConvertedNetwork) else surgery.inspect(model)
    except surgery.SurgeryError:
        return []
    return [model.get_submodule(block.path) for block in found.blocks]
