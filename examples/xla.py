"""All that the examples know of torch_xla, so that whatever replaces it has one file to replace."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from machines import Machine


class Xla(Machine):
    """One XLA device, or all devices that this process sees: a TPU, or the CPU with `PJRT_DEVICE=CPU`.

    With torch_xla 2.9 norms move their running variance by the biased variance of a batch, elsewhere by the unbiased.

    Args:
        spmd: Whether the batch is split over all devices, each with all weights (GSPMD). Norms then use the statistics
            of the whole batch, and the numbers are those of one device.

    Raises:
        ValueError: torch_xla is not installed, or finds no device.
    """

    def __init__(self, *, spmd: bool = False) -> None:
        try:
            import torch_xla
            import torch_xla.distributed.spmd as sharding
            import torch_xla.runtime as runtime
        except ImportError as error:
            raise ValueError(
                f"--device xla: torch_xla cannot be imported ({error}); pip install 'surgery[xla]', beside torch 2.9."
            ) from error
        self._xla, self._sharding, self._mesh, self._devices = torch_xla, sharding, None, 1
        if spmd:
            runtime.use_spmd()
            self._devices = runtime.global_runtime_device_count()
            self._mesh = sharding.Mesh(np.arange(self._devices), (self._devices,), ("batch",))
        self.device, self.measuring = torch_xla.device(), torch.device("cpu")
        self.rank, self.processes = 0, 1

    def place(self, model: nn.Module) -> nn.Module:
        """Move `model` to the device, or to all devices."""
        model.to(self.device)
        for tensor in (*model.parameters(), *model.buffers()):
            self._mark(tensor)  # unmarked, they would be compiled for one device first
        return model

    def load(self, batch: Tensor) -> Tensor:
        """Return the batch on the device, or on all devices; a batch that they cannot share evenly is on each."""
        moved = batch.to(self.device)
        self._mark(moved, "batch" if len(batch) % self._devices == 0 else None)
        return moved

    def seed(self, seed: int) -> None:
        """Seed torch and XLA, whose generator takes 32 bits."""
        torch.manual_seed(seed)
        self._xla.manual_seed(seed % 2**32)

    def update(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the optimizer take its step, and run what the step was made of."""
        optimizer.step()
        self._xla.sync()

    def mean(self, values: Tensor) -> list[float]:
        """Return the values, (N,), in one transfer."""
        return values.cpu().tolist()

    def agree(self, number: int) -> int:
        """Return the number."""
        return number

    def whole(self, tensor: Tensor) -> Tensor:
        """Return a copy on the CPU."""
        return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)

    def part(self, tensor: Tensor, like: Tensor) -> Tensor:
        """Return the tensor."""
        return tensor

    def finished(self, model: nn.Module) -> nn.Module:
        """Return the network on the CPU: what is measured runs step by step, and XLA would compile each of them."""
        return model.cpu()

    def leave(self) -> None:
        """Go on: there is but one process."""

    def _mark(self, tensor: Tensor, first: str | None = None) -> None:
        """Under SPMD, split the first dimension over the devices, or let each have the whole tensor."""
        if self._mesh is not None:
            self._sharding.mark_sharding(tensor, self._mesh, (first, *[None] * tensor.dim())[: tensor.dim()])
