"""What each of several processes runs: the training of every method, in every wrapper."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import timm.models.resnet as timm_resnet
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import surgery
import surgery_inclusive
import surgery_masked
from surgery.network import ConvertedNetwork
from surgery.testing import tiny_networks
from surgery_gated import gated_blocks
from surgery_gated.gates import DependentHead
from surgery_gated.loss import global_mean
from surgery_masked.averaging import average_gradient
from tests.processes import WORLD

IMAGES, STEPS, SIZE = 8, 3, 16
TAXONOMY = {"half": [0] * 5 + [1] * 5}
FULL = StateDictOptions(full_state_dict=True)


@dataclass(frozen=True)
class Form:
    """One way to train one method.

    Attributes:
        network: Name of a tiny network, or "drop path".
        method: Name of the method.
        options: Its options.
        recomputed: Whether blocks are computed once more in the backward pass.
        closed: Whether gates start closed, instead of each by its own noise.
        freezes: Whether the masks are frozen behind the first step.
        passes: Whether sub-networks are trained one after the other.
    """

    network: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    recomputed: bool = False
    closed: bool = False
    freezes: bool = False
    passes: bool = False


EQUAL = {
    "gated layers": Form("wide resnet", "gated", {"target": 0.1}),
    "gated layers, per gate": Form("wide resnet", "gated", {"target": 0.1, "loss": "gate", "anneal": 2.0}),
    "gated channels": Form("wide resnet", "gated", {"target": 0.1, "granularity": "channel"}),
    "gated channels, one-sided": Form(
        "wide resnet",
        "gated",
        {"target": 0.6, "granularity": "channel", "dependent": False, "loss": "gate", "one_sided": True},
    ),
    "coded": Form("resnext", "coded", {"mu": 6.0, "p_drop": 0.0}),
    "coded, masked gradients": Form("resnext", "coded", {"p_drop": 0.0, "gradient": "masked"}),
    "inclusive": Form("resnext", "inclusive", {"taxonomy": TAXONOMY}),
    "inclusive, one pass a sub-network": Form("resnext", "inclusive", passes=True),
    "inclusive sparse": Form("resnext", "inclusive", {"sparse": True}),
    "masked": Form("resnext", "masked"),
    "masked, recomputed": Form("resnext", "masked", {"norm": "branch", "recompute": True}),
    "masked real": Form("resnext", "masked", {"connectivity": "real"}),
    "divided": Form("wide resnet", "divided"),
}
"""Forms whose losses and weights do not depend on the number of processes."""

ANY = {
    "gated layers, closed": Form("wide resnet", "gated", closed=True),
    "gated channels, closed, recomputed": Form(
        "wide resnet", "gated", {"granularity": "channel"}, closed=True, recomputed=True
    ),
    "gated, drop path": Form("drop path", "gated"),
    "coded, recomputed": Form("resnext", "coded", recomputed=True),
    "coded, masked gradients, recomputed": Form("resnext", "coded", {"gradient": "masked"}, recomputed=True),
    "coded, drop path": Form("drop path", "coded"),
    "inclusive, recomputed": Form("resnext", "inclusive", recomputed=True),
    "inclusive, drop path": Form("drop path", "inclusive"),
    "inclusive sparse, recomputed": Form("resnext", "inclusive", {"sparse": True}, recomputed=True),
    "masked, frozen": Form("resnext", "masked", freezes=True),
    "masked full, recomputed": Form("resnext", "masked", {"connectivity": "full"}, recomputed=True),
    "divided, recomputed": Form("wide resnet", "divided", recomputed=True),
    "divided, drop path": Form("drop path", "divided"),
}
"""Forms that train as users do: norms gather statistics, and every process draws for itself."""

METHODS = ("gated layers", "coded", "inclusive", "masked", "divided")
"""One form of each method."""


def share(rank: int | None) -> slice:
    """Return which images a process has: an equal part, or all of them."""
    return slice(0, IMAGES) if rank is None else slice(rank * IMAGES // WORLD, (rank + 1) * IMAGES // WORLD)


def build(form: Form, device: torch.device | str = "cpu", *, still: bool = True) -> ConvertedNetwork:
    """Return a converted network in train mode, the same in every process; its norms stand still if asked to."""
    torch.manual_seed(0)
    source = _drop_path() if form.network == "drop path" else tiny_networks()[form.network]()
    model = surgery.convert(source.double(), form.method, input_size=SIZE, **form.options).train()
    _open_gates(model, form)
    if form.recomputed:
        model.set_grad_checkpointing()
    for module in model.modules():
        if still and "running_mean" in module._buffers:
            module.eval()
    return model.to(device)


def _drop_path() -> nn.Module:
    return timm_resnet.ResNet(
        timm_resnet.Bottleneck,
        layers=(1, 1, 2, 1),
        channels=(16, 32, 64, 64),
        num_classes=10,
        cardinality=8,
        base_width=32,
        drop_path_rate=0.1,
    )


@torch.no_grad()
def _open_gates(model: ConvertedNetwork, form: Form) -> None:
    """Let gates be closed for good, or depend on the image and on the gate: fresh ones do not."""
    for _, gates in gated_blocks(model) if form.method == "gated" else ():
        dependent = isinstance(gates.head, DependentHead)
        bias = gates.head.bias if dependent else gates.head.logits
        if form.closed:
            bias.copy_(torch.tensor([20.0, -20.0]))
        for parameter in [bias] if form.closed else gates.parameters():
            parameter.add_(torch.randn_like(parameter))


def wrap(model: ConvertedNetwork, kind: str) -> nn.Module:
    """Return the network in a wrapper of torch, each of its blocks sharded by itself for "fsdp"."""
    if kind == "ddp":
        return DistributedDataParallel(model)
    for block in model.meta["architecture"].blocks:  # a divided network has none
        fully_shard(model.get_submodule(block.path))
    return fully_shard(model)


def train(model: nn.Module, form: Form, rank: int | None, *, same_draws: bool = True) -> list[dict[str, float]]:
    """Take steps on the images of a process, or on all, and return the terms of every loss."""
    device = next(model.parameters()).device
    own, images, target = share(rank), *(tensor.to(device) for tensor in batch())
    optimizer = torch.optim.SGD(surgery.param_groups(model, lr=0.05, weight_decay=1e-3), momentum=0.9)
    objective = surgery.Objective(model, nn.CrossEntropyLoss())
    found: list[dict[str, float]] = []
    for step in range(STEPS):
        torch.manual_seed(STEPS * own.start + step)
        with _drawn_for_all(own, step) if same_draws else nullcontext():
            terms = _backward(model, form, objective, images[own], target[own], float(step))
        optimizer.step()
        optimizer.zero_grad()
        found.append({name: value.item() for name, value in terms.items()})
        if form.freezes and step == 0:
            surgery_masked.freeze(model)
    return found


def _backward(
    model: nn.Module, form: Form, objective: surgery.Objective, images: Tensor, target: Tensor, progress: float
) -> Mapping[str, Tensor]:
    if not form.passes:
        objective(model(images), target, progress).backward()
        return objective.terms
    terms = {}
    for sub in surgery_inclusive.passes(model):
        objective(sub(images), target, progress).backward()
        terms[f"task/{sub.subnetwork}"] = objective.terms["task"]
    return terms


def batch() -> tuple[Tensor, Tensor]:
    """Return the images and the labels of a whole batch."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(IMAGES, 3, SIZE, SIZE, dtype=torch.float64, generator=generator)
    return images, torch.tensor([0, 3, 5, 9, 2, 2, 7, 1])


@contextmanager
def _drawn_for_all(own: slice, step: int) -> Iterator[None]:
    """Let gates draw for the whole batch and take what belongs to the images of the process."""
    generator, original = torch.Generator().manual_seed(step), torch.rand_like

    def drawn(like: Tensor) -> Tensor:
        whole = torch.rand(IMAGES, *like.shape[1:], dtype=like.dtype, generator=generator)
        return whole[own].to(like.device)

    torch.rand_like = drawn
    try:
        yield
    finally:
        torch.rand_like = original


def train_everything(rank: int, device: torch.device) -> dict[str, Any]:
    """Train all forms in all wrappers."""
    return {
        "ddp": {name: _trained(form, "ddp", rank, device) for name, form in EQUAL.items()},
        "fsdp": {name: _trained(form, "fsdp", rank, device) for name, form in EQUAL.items()},
        "evaluated": {name: _evaluated(EQUAL[name], rank, device) for name in METHODS},
        "any": {name: _trained_freely(form, rank, device) for name, form in ANY.items()},
        "compiled": {name: _compiled(EQUAL[name], rank, device) for name in METHODS},
        "means": [_mean(rank, device, cut) for cut in CUTS],
        "leaf": _leaf(rank, device),
    }


def _trained(form: Form, kind: str, rank: int, device: torch.device) -> dict[str, Any]:
    wrapped = wrap(build(form, device), kind)
    terms = train(wrapped, form, rank)
    return {"terms": terms, "weights": _on_cpu(get_model_state_dict(wrapped, options=FULL))}


def _evaluated(form: Form, rank: int, device: torch.device) -> dict[str, Any]:
    """Train and evaluate a sharded network, and give another one its weights, which process 0 has alone."""
    wrapped, other = (wrap(build(form, device), "fsdp") for _ in range(2))
    train(wrapped, form, rank)
    output = predict(wrapped)
    weights = get_model_state_dict(wrapped, options=replace(FULL, cpu_offload=True))
    given = dict(weights)  # which becomes a dict of shards
    set_model_state_dict(other, given, options=replace(FULL, broadcast_from_rank0=True))
    return {"output": output, "weights": weights, "other": _on_cpu(get_model_state_dict(other, options=FULL))}


@torch.no_grad()
def predict(model: nn.Module) -> Tensor:
    """Return the logits of the whole batch in eval mode."""
    images = batch()[0].to(next(model.parameters()).device)
    logits: Tensor = model.eval()(images)
    return logits.cpu()


def _trained_freely(form: Form, rank: int, device: torch.device) -> dict[str, Any]:
    wrapped = wrap(build(form, device, still=False), "ddp")
    terms = train(wrapped, form, rank, same_draws=False)
    return {"terms": terms, "weights": _on_cpu(dict(wrapped.module.named_parameters()))}


def _compiled(form: Form, rank: int, device: torch.device) -> list[Any]:
    plain = wrap(build(form, device), "ddp")
    compiled = torch.compile(wrap(build(form, device), "ddp"), backend="aot_eager")
    return [train(model, form, rank, same_draws=False) for model in (plain, compiled)]


def _mean(rank: int, device: torch.device, cut: int) -> tuple[Tensor, Tensor]:
    """Return a loss of a global mean, and its gradient as DistributedDataParallel would average it."""
    inputs, weight = uneven()
    inputs = inputs.to(device)[:cut] if rank == 0 else inputs.to(device)[cut:]
    weight = weight.to(device).requires_grad_()
    loss = bent(global_mean(inputs * weight))
    loss.backward()
    dist.all_reduce(weight.grad)
    return loss.detach().cpu(), weight.grad.cpu() / WORLD


CUTS = (4, 3, 8)
"""How many of the images process 0 has."""


def uneven() -> tuple[Tensor, Tensor]:
    """Return what images contribute to a mean, and a weight."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(IMAGES, 5, dtype=torch.float64, generator=generator), torch.arange(1, 6, dtype=torch.float64)


def bent(mean: Tensor) -> Tensor:
    """Return a loss that is not linear in a mean over the batch."""
    return (mean - 0.3).pow(3).sum()


def _leaf(rank: int, device: torch.device) -> list[Tensor]:
    """Return the gradient of a tensor that no wrapper knows of, behind each of two backward passes."""
    leaf = torch.ones(3, dtype=torch.float64, device=device, requires_grad=True)
    average_gradient(leaf)
    loss = (leaf.pow(3) * torch.arange(3, device=device) * (1 + rank)).sum()
    found = []
    for _ in range(2):
        loss.backward(retain_graph=True)
        found.append(leaf.grad.cpu().clone())
    return found


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
