"""Laws of training: modes, losses, gradients and taps, plain, compiled and distributed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import distributed, nn
from torch._C._distributed_c10d import HashStore
from torch.nn.parallel import DistributedDataParallel

import surgery
from surgery.errors import TapNotFilled
from surgery.taps import taps_of
from surgery.testing.case import (
    Case,
    NotApplicable,
    evaluate,
    fail,
    require,
    require_close,
    require_equal,
    seeded,
    training_loss,
)


def modes(case: Case) -> None:
    """Batch statistics move in train mode alone, and eval mode is deterministic and changes nothing."""
    model = case.converted()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    first = evaluate(model, case.images())
    require_equal(evaluate(model, case.images()), first, "output of a second forward in eval mode")
    moved = [key for key, value in model.state_dict().items() if not torch.equal(value, state[key])]
    require(not moved, f"a forward in eval mode changed {moved[:3]}")
    training_loss(model, case.images(), case.target())
    still = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None
        if torch.equal(module.running_mean, state[f"{name}.running_mean"])
    ]
    require(not still, f"a forward in train mode did not move the statistics of {still[:3]}")


def losses(case: Case) -> None:
    """Every term is a finite scalar, at the start and at the end of training, and they add up to the loss."""
    for progress in (0.0, 1.5, None):
        model = case.converted().train()
        objective = surgery.Objective(model, nn.CrossEntropyLoss())
        loss = objective(model(case.images()), case.target(), progress)
        for name, term in objective.terms.items():
            require(
                math.isfinite(term.item()),
                f"the term {name!r} is {term.item()} at progress {progress}, expected a finite number",
            )
        total = sum(term.item() for term in objective.terms.values())
        require(
            math.isclose(loss.item(), total, rel_tol=1e-5), f"the loss is {loss.item()}, its terms add up to {total}"
        )


def gradients(case: Case) -> None:
    """Every trainable parameter takes part in the loss, and some weight of the source gets a nonzero gradient."""
    model = case.converted()
    training_loss(model, case.images(), case.target()).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    unused = [name for name, gradient in found.items() if gradient is None]
    require(
        not unused,
        f"{unused[:3]} got no gradient, so DistributedDataParallel would stop; use every parameter, or freeze it",
    )
    broken = [name for name, gradient in found.items() if gradient is not None and not gradient.isfinite().all()]
    require(not broken, f"the gradients of {broken[:3]} are not finite")
    reached = [name for name in case.source_keys(model) if name in found and bool(found[name].any())]  # type: ignore[union-attr]
    require(bool(reached), "no weight of the source network got a gradient other than zero")


def taps(case: Case) -> None:
    """Taps are filled by a training forward or inside `record`, and `Objective` empties them."""
    model = case.converted()
    names = list(taps_of(model))
    if not names:
        return
    evaluate(model, case.images())
    _require_empty(model, "a forward in eval mode outside of record")
    with surgery.record(model) as recorded:
        evaluate(model, case.images())
    for name in names:
        require(recorded[name].isfinite().all().item() is True, f"the tap {name!r} holds values that are not finite")
    training_loss(model, case.images(), case.target())
    _require_empty(model, "the loss was computed")
    require(not [key for key in model.state_dict() if "_slot" in key], "a tap is part of the state dict")


def compiles(case: Case) -> None:
    """The network runs under `torch.compile`, in eval mode and with the loss, and computes the same."""
    torch._dynamo.reset()
    model = case.converted()
    compiled = torch.compile(model, backend="eager")
    with seeded(0):
        expected = training_loss(case.converted(), case.images(), case.target())
    with seeded(0):
        found = training_loss(compiled, case.images(), case.target())
    require_close(found.detach(), expected.detach(), "compiled training loss", rtol=1e-5)
    plain = case.converted()
    plain.load_state_dict(model.state_dict())
    require_close(evaluate(compiled, case.images()), evaluate(plain, case.images()), "compiled output", rtol=1e-5)


def distributes(case: Case) -> None:
    """Training steps under DistributedDataParallel, without looking for unused parameters, give the same losses."""
    if not distributed.is_available() or not distributed.is_gloo_available():
        raise NotApplicable("this build of torch has no gloo")
    runs = []
    with _process_group():
        wrapped = DistributedDataParallel(case.converted())
        for model in (case.converted(), wrapped):
            with seeded(0):
                runs.append([_step(model, case) for _ in range(3)])
    require(
        all(math.isclose(a, b, rel_tol=1e-5) for a, b in zip(*runs, strict=True)),
        f"the losses of three steps are {runs[1]} under DistributedDataParallel, {runs[0]} without",
    )


def _step(model: nn.Module, case: Case) -> float:
    loss = training_loss(model, case.images(), case.target())
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad, alpha=1e-3)
                parameter.grad = None
    return loss.item()


@contextmanager
def _process_group() -> Iterator[None]:
    if distributed.is_initialized():
        yield
        return
    distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def _require_empty(model: nn.Module, when: str) -> None:
    left = taps_of(model)
    for name in left:
        try:
            left[name]
        except TapNotFilled:
            continue
        fail(f"the tap {name!r} still holds a value after {when}")
