"""The training side: one criterion for the task and all methods, and the parameter groups that methods ask for."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from surgery.conversion import CONVERSION, METHODS
from surgery.errors import InvalidOption, UnsupportedModel
from surgery.history import Conversion
from surgery.method import Method, ParameterRule, Step
from surgery.network import ConvertedNetwork
from surgery.taps import consume

_WEIGHTS_WITHOUT_DECAY = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


class Objective(nn.Module):
    """Task loss plus the terms of every method in the model.

    The model is held without being registered: the objective has no parameters of its own, and `.eval()` on it does not
    touch the model. Each call consumes the taps of one training forward.

    Args:
        model: A converted network, or a DDP, FSDP or compiled wrapper around one.
        criterion: The task loss, called as `criterion(output, target)`.

    Attributes:
        terms: Detached terms of the last call by name, "task" first; for logging.
    """

    def __init__(self, model: nn.Module, criterion: nn.Module) -> None:
        super().__init__()
        self.criterion = criterion
        self.terms: Mapping[str, Tensor] = OrderedDict()
        self._model = (unwrap(model),)
        self._methods = methods_of(self._model[0])

    def forward(self, output: Tensor, target: Tensor, progress: float | None = None) -> Tensor:
        """Return the total loss.

        Args:
            output: (B, classes) logits of the last training forward.
            target: What the criterion takes.
            progress: Completed epochs as a float, for schedules; None stands for the end of training.

        Raises:
            TapNotFilled: If no training forward has run since the last call.
            InvalidOption: If two methods own the task term, or a term is no scalar.
        """
        model = self._model[0]
        step = Step(model, output, target, consume(model), self.criterion, progress)
        terms: OrderedDict[str, Tensor] = OrderedDict()
        for method in self._methods:
            for name, value in method.losses(step).items():
                if name in terms:
                    raise InvalidOption(
                        f"two methods of {', '.join(m.name for m in self._methods)} define the term {name!r}"
                    )
                if value.dim() != 0:
                    raise InvalidOption(
                        f"{method.name}: the term {name!r} has shape {tuple(value.shape)}, expected a scalar"
                    )
                terms[name] = value
        if "task" not in terms:
            terms["task"] = self.criterion(output, target)
        terms.move_to_end("task", last=False)
        self.terms = OrderedDict((name, value.detach()) for name, value in terms.items())
        total: Tensor = torch.stack(list(terms.values())).sum()
        tied = isinstance(output, Tensor) and output.requires_grad
        return _Tied.apply(total, output) if tied else total  # type: ignore[no-untyped-call]


class _Tied(torch.autograd.Function):
    """Pass a loss on; the output gets a gradient of zero.

    FSDP begins the backward pass of a network at its output, also of one whose loss is made of taps alone: without this
    it would leave the gradients of all processes as they are, and add up those of all steps.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, output: Tensor) -> Tensor:
        ctx.like = {"size": output.shape, "dtype": output.dtype, "device": output.device}
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, torch.zeros(**ctx.like)


def unwrap(model: nn.Module) -> ConvertedNetwork:
    """Return the converted network inside DDP, FSDP or compile wrappers.

    Raises:
        UnsupportedModel: If there is none.
    """
    inner: Any = model
    while not isinstance(inner, ConvertedNetwork):
        if isinstance(inner, (DistributedDataParallel, DataParallel)):
            inner = inner.module
        elif isinstance(inner, torch._dynamo.eval_frame.OptimizedModule):
            inner = inner._orig_mod
        elif isinstance(getattr(inner, "module", None), nn.Module):  # FSDP1 and similar wrappers
            inner = inner.module
        else:
            raise UnsupportedModel(
                f"expected a converted network, found {type(inner).__name__}; call surgery.convert(model, method) first"
            )
    return inner


def methods_of(model: ConvertedNetwork) -> tuple[Method, ...]:
    """Return the methods whose losses and plans the network still supports: none once it is pruned."""
    record: Conversion = model.meta[CONVERSION]
    if any(operation.kind == "prune" for operation in record.operations):
        return ()
    methods: tuple[Method, ...] = model.meta[METHODS]
    return methods


def param_groups(model: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Return parameter groups for a torch optimizer.

    Weights of norms, biases and what the network lists in `no_weight_decay()` are not decayed; on top of that each
    method sets the learning rate and the decay of its own parameters. Frozen parameters are left out.

    Args:
        model: A converted network, wrapped or not, or a plain one.
        lr: Learning rate.
        weight_decay: Weight decay.

    Returns:
        Groups with the keys `params`, `lr`, `weight_decay` and `name`; every trainable parameter is in exactly one.
    """
    try:
        network: nn.Module = unwrap(model)
        rules = [rule for method in methods_of(unwrap(model)) for rule in method.parameter_rules(unwrap(model))]
    except UnsupportedModel:
        network, rules = model, []
    plain = _undecayed(network)
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        rate, decay = _treatment(name, rules, lr, 0.0 if name in plain else weight_decay)
        label = f"lr{rate:g}_wd{decay:g}"
        group = groups.setdefault((rate, decay), {"params": [], "lr": rate, "weight_decay": decay, "name": label})
        group["params"].append(parameter)
    return list(groups.values())


def _undecayed(network: nn.Module) -> set[str]:
    listed = getattr(network, "no_weight_decay", set)
    names = set(listed()) if callable(listed) else set()
    for path, module in network.named_modules():
        prefix = f"{path}." if path else ""
        for name, _ in module.named_parameters(recurse=False):
            if name == "bias" or isinstance(module, _WEIGHTS_WITHOUT_DECAY):
                names.add(prefix + name)
    return names


def _treatment(name: str, rules: list[ParameterRule], lr: float, decay: float) -> tuple[float, float]:
    for rule in rules:
        if name in rule.names:
            return lr * rule.lr_scale, rule.decay_scale * decay if rule.weight_decay is None else rule.weight_decay
    return lr, decay
