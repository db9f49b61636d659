"""Recognise by name the torchvision or timm builder of a network, so that a checkpoint can rebuild it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Iterator
from functools import cache
from inspect import signature
from typing import Any

import timm
import torch
import torchvision
from torch import nn
from torch.overrides import TorchFunctionMode

from surgery.architecture import Architecture
from surgery.errors import CheckpointError, SurgeryError
from surgery.history import Source

LARGEST = 2**31
"""Parameters of the largest network that is built for a record: twice those of the largest convolutional ones."""
Factory = Callable[[], nn.Module]


def describe_source(model: nn.Module, architecture: Architecture) -> Source:
    """Return what has to be known about a network to build it again."""
    config = getattr(model, "pretrained_cfg", None)
    name = config.get("architecture", "") if isinstance(config, dict) else ""
    tag = config.get("tag") if isinstance(config, dict) else None
    cls = type(model)
    return Source(
        class_name=f"{cls.__module__}.{cls.__qualname__}",
        fingerprint=fingerprint(model),
        builder=f"timm:{name}{f'.{tag}' if tag else ''}" if name else "",
        classes=architecture.head.classes,
        in_channels=architecture.input_size[0],
    )


def fingerprint(model: nn.Module) -> str:
    """Return a hash over the modules of `model`, their settings, and the names and shapes of weights and buffers."""
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        settings = sorted((key, value) for key, value in vars(module).items() if _is_setting(key, value))
        digest.update(f"{name}:{type(module).__qualname__}:{module.extra_repr()}:{settings}\n".encode())
    for name, tensor in model.state_dict(keep_vars=True).items():
        digest.update(f"{name}:{tuple(tensor.shape)}\n".encode())
    return digest.hexdigest()


def _is_setting(name: str, value: object) -> bool:
    # Rates of dropout and the like are plain attributes that no extra_repr shows.
    if name.startswith("_") or name in ("training", "grad_checkpointing"):
        return False
    items = value if isinstance(value, (tuple, list)) else (value,)
    return all(item is None or isinstance(item, (bool, int, float, str)) for item in items)


def rebuild(source: Source, factory: Factory | None = None) -> nn.Module:
    """Build the network that `source` describes, with fresh weights; the global random state is left as it was.

    Args:
        source: What a record says about the network.
        factory: Builds it, where no torchvision or timm builder does.

    Raises:
        CheckpointError: If nothing builds that network, or `factory` builds another one.
    """
    with torch.random.fork_rng(devices=[]):
        if factory is not None:
            if isinstance(factory, nn.Module) or not callable(factory):
                raise CheckpointError(
                    f"factory is a {type(factory).__name__}, expected a function without arguments that builds the "
                    "network"
                )
            return _checked(factory(), source)
        model = _rebuilt(source)
    if model is not None:
        return model
    raise CheckpointError(
        f"no torchvision or timm builder makes this {source.class_name}; pass factory=, a function without arguments "
        "that builds the unconverted network"
    )


def _rebuilt(source: Source) -> nn.Module | None:
    """Build what the record names; first without data, so that nothing large is made for a record that was edited."""
    try:
        builder = source.builder or find_builder(source)
        if not builder:
            return None
        _checked(_hollow(builder, source), source)
        return _checked(build(builder, source), source)
    except SurgeryError:
        raise
    except Exception as error:  # the libraries raise anything where the sizes make no network
        raise CheckpointError(
            f"{source.builder or source.class_name} cannot be built for {source.classes} classes and "
            f"{source.in_channels} channels ({type(error).__name__}: {error}); restore the file from a backup, or pass "
            "factory=, a function without arguments that builds the unconverted network"
        ) from error


def find_builder(source: Source) -> str:
    """Return the builder that makes this very network, such as "torchvision:resnet50", or "" if none does."""
    with torch.random.fork_rng(devices=[]):
        return next(
            (name for name in _candidates(source) if fingerprint(_hollow(name, source)) == source.fingerprint), ""
        )


def closest_builder(source: Source, names: Collection[str]) -> str:
    """Return the torchvision builder of a network of the same class that shares most parameter names with it.

    Args:
        source: What is known of the network; one whose class torchvision does not have has no builder.
        names: Names of its parameters.
    """
    wanted = frozenset(names)

    def common(name: str) -> tuple[int, int]:
        made = {parameter for parameter, _ in _hollow(name, source).named_parameters()}
        return len(made & wanted), -len(made)

    with torch.random.fork_rng(devices=[]):
        return max(_candidates(source), key=common, default="")


def _checked(model: nn.Module, source: Source) -> nn.Module:
    if fingerprint(model) != source.fingerprint:
        raise CheckpointError(
            f"built a {type(model).__name__} that differs from the {source.class_name} of the record (other "
            "modules, settings or "
            "shapes); pass factory=, the function, with the arguments, that built the original"
        )
    return model


def _candidates(source: Source) -> Iterator[str]:
    if source.builder:
        yield source.builder
    module = source.class_name.rpartition(".")[0]
    if module.startswith("torchvision.models."):
        for name in _torchvision_models():
            if torchvision.models.get_model_builder(name).__module__ == module:
                yield f"torchvision:{name}"


def _hollow(name: str, source: Source) -> nn.Module:
    """Build a candidate without data where its initialisers allow that."""
    try:
        with _Hollow():
            model = build(name, source)
    except (NotImplementedError, RuntimeError):  # an initialiser that reads a value
        model = build(name, source)
    refuse_size(name, sum(parameter.numel() for parameter in model.parameters()))
    return model


def refuse_size(what: str, parameters: int) -> None:
    """Refuse a network, or a part of one, that is larger than any that a record is about.

    Raises:
        CheckpointError: If it has more than `LARGEST` parameters.
    """
    if parameters > LARGEST:
        raise CheckpointError(
            f"{what} would have {parameters:,} parameters, expected at most {LARGEST:,}; restore the file from a "
            "backup, or pass factory= if there is such a network"
        )


class _Hollow(TorchFunctionMode):
    """Let layers be made without data, but not the few numbers that a builder computes with tensors."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        return func(*args, **({**named, "device": "meta"} if func is torch.empty else named))


def build(builder: str, source: Source) -> nn.Module:
    """Return what a builder makes for as many classes and channels; the network may differ from the source's.

    Raises:
        CheckpointError: If the installed torchvision and timm do not have that builder.
    """
    library, _, name = builder.partition(":")
    classes: dict[str, Any] = {} if source.classes is None else {"num_classes": source.classes}
    # timm reads more than a name and a tag as a place to fetch a network from.
    if library == "timm" and re.fullmatch(r"\w+(\.\w+)?", name) and timm.is_model(name):
        timm_model: nn.Module = timm.create_model(name, in_chans=source.in_channels, **classes)
        return timm_model
    if library == "torchvision" and name in _torchvision_models():
        torchvision_model: nn.Module = torchvision.models.get_model(name, weights=None, **classes)
        return torchvision_model
    raise CheckpointError(
        f"the record names the builder {builder!r}, which the installed torchvision and timm do not have; install "
        "those that do, or pass factory=, a function without arguments that builds the unconverted network"
    )


@cache
def _torchvision_models() -> tuple[str, ...]:
    """Return the builders that download nothing; those of detectors and the like fetch weights of their backbones."""
    builders = {name: torchvision.models.get_model_builder(name) for name in torchvision.models.list_models()}
    return tuple(name for name, call in builders.items() if "weights_backbone" not in signature(call).parameters)
