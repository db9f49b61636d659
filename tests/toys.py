"""A small honest method, fake installed packages, and the methods that break one law each."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from importlib import metadata
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import nn

import surgery
from surgery import Cut, Method, NothingConverted, PrunePlan, hookimpl, plugins


class Scale(nn.Module):
    """One learned factor."""

    def __init__(self, start: float = 1.0) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(start))

    def forward(self, x):
        return x * self.factor


@dataclass(frozen=True)
class Toy(Method):
    """Learn how much every residual body matters; a method that keeps every law."""

    name: ClassVar[str] = "toy"
    preserves: ClassVar[str] = "output"

    weight: float = 0.1

    def transform(self, architecture, rewriter):
        blocks = list(architecture.residual_blocks())
        if not blocks:
            raise NothingConverted("toy: no residual block", architecture.refusals)
        for block in blocks:
            rewriter.tap(block.body, f"{block.path}/body", at=block)
            now = rewriter.architecture.block(block.path)
            rewriter.insert(self.scale(), now.body, at=now, role="scale")

    def scale(self):
        return Scale()

    def losses(self, step):
        return {"size": self.weight * torch.stack([body.square().mean() for body in step.taps.values()]).sum()}

    def plan(self, model, block: int = -1, **criteria: Any):
        paths = [found.path for found in model.meta["architecture"].residual_blocks()]
        return PrunePlan.of(model, self.name, [Cut("body", paths[block], (), 1, "asked for")], {"block": block})


def muted(model, criteria) -> Callable:
    """Return the full network with the factor of the planned block at zero."""
    silent = copy.deepcopy(model)
    scales = [module for module in silent.modules() if isinstance(module, Scale)]
    scales[criteria.get("block", -1)].factor.data.zero_()
    return silent


def package(*classes, name="toys", distribution="surgery-toys", version="1.0") -> SimpleNamespace:
    """Return the entry point of an installed package that provides `classes`."""

    class Hooks:
        @hookimpl
        def surgery_register_methods(self):
            return list(classes)

    return point(Hooks, name=name, distribution=distribution, version=version)


def point(load, *, name="toys", distribution="surgery-toys", version="1.0") -> SimpleNamespace:
    """Return an entry point whose `load()` is `load`."""
    return SimpleNamespace(
        name=name, value=f"{name}:plugin", dist=SimpleNamespace(name=distribution, version=version), load=load
    )


def installed(monkeypatch, *points, beside: bool = True) -> None:
    """Let the entry points be found, beside the ones that are really installed or alone."""
    real = metadata.entry_points(group=plugins.GROUP) if beside else ()
    monkeypatch.setattr(plugins, "entry_points", lambda group: [*real, *points])
    # A cache of its own, so that nothing of this is remembered once the patch is undone.
    monkeypatch.setattr(plugins, "providers", cache(plugins.providers.__wrapped__))


class OtherName(Toy):
    """Is not what is installed under its name."""


@dataclass(frozen=True)
class LossyOptions(Toy):
    """Forgets an option."""

    def options(self):
        return {"weight": round(self.weight)}

    @classmethod
    def from_options(cls, options):
        return cls(weight=options["weight"] + 0.5)


BUILT: list[nn.Module] = []
"""Networks that `remembered` built."""


def remembered(build):
    def wrapper():
        BUILT.append(build())
        return BUILT[-1]

    return wrapper


@dataclass(frozen=True)
class Mutates(Toy):
    """Writes to the network that went in."""

    def transform(self, architecture, rewriter):
        super().transform(architecture, rewriter)
        for parameter in BUILT[-1].parameters():
            parameter.data.mul_(0.5)


@dataclass(frozen=True)
class AddsHooks(Toy):
    """Leaves a hook on the network that went in."""

    def transform(self, architecture, rewriter):
        super().transform(architecture, rewriter)
        BUILT[-1].register_forward_pre_hook(lambda module, inputs: None)


@dataclass(frozen=True)
class FalseClaim(Toy):
    """Claims equal outputs and changes them in the last digits."""

    def scale(self):
        return Scale(1 + 1e-6)


@dataclass(frozen=True)
class Unfreezes(Toy):
    """Makes every weight trainable."""

    def transform(self, architecture, rewriter):
        super().transform(architecture, rewriter)
        rewriter.network.requires_grad_(True)


@dataclass(frozen=True)
class DropsWeights(Toy):
    """Keeps the weights of the source, but does not take them from a checkpoint."""

    def transform(self, architecture, rewriter):
        super().transform(architecture, rewriter)
        rewriter.network.register_load_state_dict_pre_hook(lambda module, state, *rest: state.pop("fc.weight", None))


@dataclass(frozen=True)
class NoJson(Toy):
    """Decides on something that JSON cannot hold."""

    def transform(self, architecture, rewriter):
        super().transform(architecture, rewriter)
        rewriter.decide("chosen", lambda: {1, 2})


class Tagged(Scale):
    """A factor of one with a number that is no weight."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def extra_repr(self):
        return str(self.number)


@dataclass(frozen=True)
class Unrecorded(Toy):
    """Draws a number without `decide`, so the record does not hold it."""

    def scale(self):
        return Tagged(int(torch.randint(2**31, ())))


@dataclass(frozen=True)
class ConvertsAnything(Toy):
    """Finds no block and says nothing."""

    def transform(self, architecture, rewriter):
        rewriter.insert(
            Scale(), architecture.head.path.replace(".", "_") if architecture.blocks else "_6", at=None, role="scale"
        )

    def losses(self, step):
        return {}


@dataclass(frozen=True)
class FrozenStatistics(Toy):
    """Stops the running statistics."""

    def transform(self, architecture, rewriter):
        super().transform(architecture, rewriter)
        for module in rewriter.network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.0


@dataclass(frozen=True)
class NotANumber(Toy):
    """Its loss divides zero by zero."""

    def losses(self, step):
        return {"size": step.output.sum() * 0 / torch.zeros(())}


@dataclass(frozen=True)
class NoScalar(Toy):
    """Its loss has one entry per image."""

    def losses(self, step):
        return {"size": step.output.sum(dim=1)}


class Idle(Scale):
    """Holds a parameter that takes no part."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Parameter(torch.ones(3))


@dataclass(frozen=True)
class UnusedParameter(Toy):
    """Adds a parameter that no loss reaches."""

    def scale(self):
        return Idle()


class Leaks(Scale):
    """Fills its tap in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.tap = surgery.Tap("leak")

    def forward(self, x):
        self.tap._slot["value"] = x
        return super().forward(x)


@dataclass(frozen=True)
class LeakyTaps(Toy):
    """Holds on to activations at all times."""

    def scale(self):
        return Leaks()


@dataclass(frozen=True)
class TapClash(Toy):
    """Gives two taps one name."""

    def transform(self, architecture, rewriter):
        for block in architecture.residual_blocks():
            rewriter.tap(block.body, "body", at=block)


class Keeps(Scale):
    """Holds on to its input, with its graph."""

    def forward(self, x):
        self.last = x if self.training else None
        return super().forward(x)


@dataclass(frozen=True)
class KeepsActivations(Toy):
    """Cannot be copied after a training forward."""

    def scale(self):
        return Keeps()


class Counts(Scale):
    """Scales by a number of steps that is in no state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0

    def forward(self, x):
        self.steps += self.training
        return super().forward(x) * (1 + self.steps)


@dataclass(frozen=True)
class ForgetsState(Toy):
    """Keeps state where no checkpoint finds it."""

    def scale(self):
        return Counts()


@dataclass(frozen=True)
class WrongFigures(Toy):
    """Promises more than it removes."""

    def plan(self, model, block: int = -1, **criteria: Any):
        honest = super().plan(model, block)
        return replace(honest, after=replace(honest.after, params=1))


@dataclass(frozen=True)
class PrunesAnother(Toy):
    """Removes another block than it was asked for."""

    def plan(self, model, block: int = -1, **criteria: Any):
        return super().plan(model, 0)


@dataclass(frozen=True)
class PlansNothing(Toy):
    """Promises to remove something and does not."""

    def plan(self, model, block: int = -1, **criteria: Any):
        return PrunePlan.of(model, self.name, [], {"block": block})


class Compiled(Scale):
    """Differs under a compiler."""

    def forward(self, x):
        return super().forward(x) * (2 if torch.compiler.is_compiling() else 1)


@dataclass(frozen=True)
class DiffersCompiled(Toy):
    """Computes something else under torch.compile."""

    def scale(self):
        return Compiled()


class Distributed(Scale):
    """Differs where a process group exists."""

    def forward(self, x):
        return super().forward(x) * (2 if self.training and isinstance(x, torch.Tensor) and _in_ddp() else 1)


def _in_ddp() -> bool:
    return torch.nn.parallel.DistributedDataParallel._get_active_ddp_module() is not None


@dataclass(frozen=True)
class DiffersDistributed(Toy):
    """Computes something else under DDP."""

    def scale(self):
        return Distributed()


class Branches(Scale):
    """Decides in Python by the value of a tensor, where it has one."""

    def forward(self, x):
        return super().forward(x) if x.device.type == "meta" or x.sum() > -1e30 else x


@dataclass(frozen=True)
class CannotExport(Toy):
    """Has control flow that depends on data."""

    def scale(self):
        return Branches()
