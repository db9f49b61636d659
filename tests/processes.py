"""Start several processes that meet in a process group, and collect what they found."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

WORLD = 2
"""Number of processes."""


def launch(work: Callable[..., Any], folder: Path, *, backend: str = "gloo", timeout: float = 600.0) -> list[Any]:
    """Run `work(rank, device)` in every process and return what each returned.

    An exception in one of them ends the others and is raised here with its traceback.
    """
    context = multiprocessing.spawn(_enter, (work, str(folder), backend), nprocs=WORLD, join=False)
    deadline = time.monotonic() + timeout
    try:
        while not context.join(timeout=1.0):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{work.__name__}: found {WORLD} processes running after {timeout:g} s")
    finally:
        for process in context.processes:
            process.kill()
            process.join()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


def _enter(rank: int, work: Callable[..., Any], folder: str, backend: str) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    device = torch.device("cpu") if backend == "gloo" else torch.device("cuda", rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store = dist.FileStore(f"{folder}/store", WORLD)
    dist.init_process_group(backend, store=store, rank=rank, world_size=WORLD)
    torch.save(work(rank, device), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def fail_in_one(rank: int, device: torch.device) -> None:
    """Raise in process 1 while process 0 waits for it."""
    if rank == 1:
        raise ValueError("told to")
    dist.barrier()
