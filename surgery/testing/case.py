"""One method on one network, and what every law needs of them."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

import surgery
from surgery.architecture import Architecture
from surgery.errors import ConformanceError, InvalidOption
from surgery.history import Conversion
from surgery.method import Method
from surgery.network import ConvertedNetwork
from surgery.pruning import PrunePlan
from surgery.testing.networks import Build

Size = int | tuple[int, int] | None
Muted = Callable[[ConvertedNetwork, Mapping[str, Any]], Callable[[Tensor], Tensor]]
"""From the full network and the criteria to a function that computes what the pruned network should, at full cost."""
Settle = Callable[[ConvertedNetwork], object]
"""Gives a converted network, in place, what training would have given it."""


class NotApplicable(Exception):
    """A law says nothing about this method on this network, and why."""


@dataclass(frozen=True, eq=False)
class Case:
    """One method on one network.

    Attributes:
        network: Name of the network.
        build: Builds it, with the same weights each time.
        method: The method.
        input_size: As in `surgery.convert`.
        criteria: Of pruning; None for a plan without criteria.
        muted: See `Muted`; None where the method has no such form.
        settle: See `Settle`; None where pruning does not depend on training.
    """

    network: str
    build: Build
    method: Method
    input_size: Size = 32
    criteria: Mapping[str, Any] | None = None
    muted: Muted | None = None
    settle: Settle | None = None

    def convert(self, model: nn.Module) -> ConvertedNetwork:
        """Convert `model` with the method."""
        return surgery.convert(model, self.method, input_size=self.input_size)

    def converted(self) -> ConvertedNetwork:
        """Return a fresh copy of the converted network."""
        return copy.deepcopy(self._converted)

    def settled(self) -> ConvertedNetwork:
        """Return a fresh copy of the converted network, as training leaves it."""
        model = self.converted()
        if self.settle is not None:
            self.settle(model)
        return model

    def plan(self, model: ConvertedNetwork) -> PrunePlan:
        """Plan with the criteria; images among them follow the dtype of the network.

        Raises:
            NotApplicable: If none were given and the method needs some.
        """
        if self.criteria is not None:
            dtype = next(model.parameters()).dtype
            return surgery.plan(model, **{name: _following(value, dtype) for name, value in self.criteria.items()})
        try:
            return surgery.plan(model)
        except InvalidOption as error:
            raise NotApplicable(f"pass criteria= to check pruning; {error}") from error

    def images(self, batch: int = 4, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the same random images each time, (batch, channels, height, width)."""
        architecture: Architecture = self._converted.meta["architecture"]
        generator = torch.Generator().manual_seed(0)
        return torch.randn(batch, *architecture.input_size, generator=generator, dtype=torch.float64).to(dtype)

    def target(self, batch: int = 4) -> Tensor:
        """Return class indices, (batch,)."""
        return torch.arange(batch) % (self._converted.meta["architecture"].head.classes or 2)

    def record(self) -> Conversion:
        """Return what was done to the network."""
        record: Conversion = self._converted.meta["conversion"]
        return record

    def source_keys(self, model: nn.Module) -> list[str]:
        """Return the names of those parameters of `model` that the source network has too; all, where it has none."""
        known = {name for name, _ in self.build().named_parameters()}
        names = [name for name, _ in model.named_parameters()]
        return [name for name in names if name in known] or names

    @cached_property
    def exported(self) -> Mapping[str, tuple[nn.Module, ExportedProgram]]:
        """The network in eval mode, "full" and, where it can be planned, "pruned", with what `torch.export` captures.

        Capturing takes long, so the laws share it.
        """
        model = self.settled().eval()
        variants: dict[str, nn.Module] = {"full": model}
        with suppress(NotApplicable):
            variants["pruned"] = surgery.prune(model, self.plan(model)).eval()
        return {name: (each, torch.export.export(each, (self.images(),))) for name, each in variants.items()}

    @cached_property
    def _converted(self) -> ConvertedNetwork:
        return self.convert(self.build())


def _following(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def fail(message: str) -> NoReturn:
    """Say that a law is broken."""
    raise ConformanceError(message)


def require(holds: bool, message: str) -> None:
    """Say that a law is broken unless `holds`."""
    if not holds:
        fail(message)


def require_equal(found: Tensor, expected: Tensor, what: str) -> None:
    """Require two tensors to be bit-identical."""
    if found.shape != expected.shape:
        fail(f"{what}: found shape {tuple(found.shape)}, expected {tuple(expected.shape)}")
    if not torch.equal(found, expected):
        worst = (found.double() - expected.double()).abs().max().item()
        fail(f"{what}: found values that differ by up to {worst:.3g}, expected bit-identical ones")


def require_close(found: Tensor, expected: Tensor, what: str, *, rtol: float) -> None:
    """Require two tensors to agree to `rtol` of the larger of their values."""
    if found.shape != expected.shape:
        fail(f"{what}: found shape {tuple(found.shape)}, expected {tuple(expected.shape)}")
    worst = (found - expected).abs().max().item()
    scale = expected.abs().max().item()
    require(
        worst <= rtol * scale,
        f"{what}: values of up to {scale:.3g} differ by up to {worst:.3g}, expected {rtol:g} of it",
    )


def evaluate(model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Return the output of `model` in eval mode, without gradients; the mode it had is restored."""
    modes = {module: module.training for module in model.modules()} if isinstance(model, nn.Module) else {}
    if isinstance(model, nn.Module):
        model.eval()
    with torch.no_grad():
        output = model(images)
    for module, training in modes.items():
        module.training = training
    return output


def training_loss(model: Any, images: Tensor, target: Tensor, progress: float | None = None) -> Tensor:
    """Return the total loss of one training forward of a model, wrapped or not, with cross entropy as the task."""
    model.train()
    objective = surgery.Objective(model, nn.CrossEntropyLoss())
    loss: Tensor = objective(model(images), target, progress)
    return loss


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run with all global random states started at `seed`, and put them back."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
