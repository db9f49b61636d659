"""Convert a network with a method."""

from __future__ import annotations

import copy
import json
import os
import re
from typing import Any

import torch
from torch import Tensor, nn

from surgery.analysis import analyze
from surgery.errors import (
    AlreadyConverted,
    ConformanceError,
    InvalidOption,
    NothingConverted,
    PluginError,
    SurgeryError,
    TransformFailed,
    UnsupportedModel,
)
from surgery.history import Conversion, Operation
from surgery.method import Method
from surgery.network import ConvertedNetwork, assemble
from surgery.plugins import methods, provider_of
from surgery.rewriter import Rewriter
from surgery.sources import describe_source

CONVERSION = "conversion"
ARCHITECTURE = "architecture"
METHODS = "methods"
"""Key in `network.meta`: the methods themselves, so that one defined in a script works without being installed."""
INCOMPLETE = "incomplete"
"""Key in `network.meta` of a network without some of its weights: what it lacks and what to do; it is not saved."""
_COMMA = re.compile(r",(?![^\[]*\])(?![^{]*\})")  # but not within a list or a table
_SPEC = re.compile(r"^(?P<name>[\w-]+)(?:\{(?P<options>.*)\})?$")


def convert(
    model: nn.Module,
    method: str | Method,
    *,
    input_size: int | tuple[int, int] | None = None,
    verify: bool = False,
    **options: Any,
) -> ConvertedNetwork:
    """Return a converted copy of `model`; the model itself is left untouched.

    Args:
        model: A plain torchvision or timm network, or your own; or one that another method has converted.
        method: Name of an installed method, a spec such as `"name{option=2}"`, or a `Method` instance.
        input_size: Side of the image in pixels, or (height, width), that resolutions and MACs refer to.
        verify: Check in float64, on random images, what the method claims to preserve.
        **options: Options of the method, where it is given by name.

    Returns:
        The converted network, in the same mode, on the same device, with the same weights.

    Raises:
        NothingConverted: If no block can be used, with the reason for each.
        InvalidOption: If an option is unknown or cannot be used.
        TraceError, UnsupportedModel: If the network cannot be traced or is wrapped.
        AlreadyConverted: If this method has been applied, or does not stack on what has been.
        TransformFailed: If the method raised anything else.
    """
    chosen = resolve_method(method, options)
    network = prepare(model, chosen, input_size)
    converted = apply_method(network, chosen, size=_pair(input_size))
    if verify:
        verify_preserved(model, converted, chosen)
    return converted


def resolve_method(method: str | Method, options: dict[str, Any]) -> Method:
    """Return the method instance that `convert` was asked for.

    Raises:
        PluginError: If no installed package provides it.
        InvalidOption: If the spec or an option cannot be read.
    """
    if isinstance(method, Method):
        if options:
            raise InvalidOption(f"{method.name}: options {sorted(options)} go into the instance, not into convert")
        method.check_types(vars(method))
        return method
    if not isinstance(method, str):
        raise InvalidOption(
            f"convert: found {method!r}, expected the name of a method, a spec, or an instance of a method"
        )
    name, written = parse_spec(method)
    return method_class(name).from_options({**written, **options})


def method_class(name: str) -> type[Method]:
    """Return the installed method called `name`.

    Raises:
        PluginError: If there is none.
    """
    known = methods()
    if name not in known:
        blocked = "SURGERY_BLOCK_PLUGINS" in os.environ or "SURGERY_PLUGINS" in os.environ
        hint = " (some may be blocked by SURGERY_BLOCK_PLUGINS or SURGERY_PLUGINS)" if blocked else ""
        raise PluginError(f"no installed method is called {name!r}; installed: {', '.join(known) or 'none'}{hint}")
    return known[name]


def parse_spec(spec: str) -> tuple[str, dict[str, Any]]:
    """Read `"name{key=value,table.key=value}"` into the name and its options; values are JSON, else text.

    Raises:
        InvalidOption: If the spec does not have that form.
    """
    match = _SPEC.match(spec.strip())
    if match is None:
        raise InvalidOption(f"method spec {spec!r}: expected a name, or name{{key=value,...}}")
    pairs = [pair for pair in _COMMA.split(match["options"] or "") if pair.strip()]
    return match["name"], parse_options(pairs)


def parse_options(pairs: list[str]) -> dict[str, Any]:
    """Read `["key=value", "table.key=value"]` into options; values are JSON, else text.

    Raises:
        InvalidOption: If a pair has no `=`.
    """
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise InvalidOption(f"option {pair!r}: expected key=value")
        table, _, entry = key.strip().partition(".")
        if entry:
            values = options.setdefault(table, {})
            if not isinstance(values, dict):
                raise InvalidOption(f"option {pair!r}: {table!r} is given as a value and as a table; give one of them")
            values[entry] = _value(value.strip())
        else:
            options[table] = _value(value.strip())
    return options


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return {"None": None, "True": True, "False": False}.get(text, text)


def prepare(model: nn.Module, method: Method, input_size: int | tuple[int, int] | None) -> ConvertedNetwork:
    """Return a copy of `model` as a network of blocks, not yet edited, with the record started."""
    if isinstance(model, ConvertedNetwork):
        if INCOMPLETE in model.meta:
            raise UnsupportedModel(f"convert: found {model.meta[INCOMPLETE]}")
        _refuse_stacking(model, method)
        return copy.deepcopy(model)
    architecture, nested = analyze(model, input_size)
    source = describe_source(model, architecture)
    network = assemble(copy.deepcopy(model), nested)
    network.meta[ARCHITECTURE] = architecture
    network.meta[CONVERSION] = Conversion(source)
    return network


def _refuse_stacking(model: ConvertedNetwork, method: Method) -> None:
    record: Conversion = model.meta[CONVERSION]
    if method.name in record.methods:
        raise AlreadyConverted(
            f"the network is already converted by {method.name!r}; convert the original again instead"
        )
    if any(operation.kind == "prune" for operation in record.operations):
        raise AlreadyConverted("the network is pruned; convert the original, then prune")
    closed = [other.name for other in model.meta[METHODS] if not other.stacks]
    if closed or not method.stacks:
        other = ", ".join(closed) or method.name
        raise AlreadyConverted(
            f"{method.name!r} cannot be applied on top of {', '.join(record.methods)}: {other} does not stack"
        )


def apply_method(
    network: ConvertedNetwork,
    method: Method,
    *,
    decisions: dict[str, Any] | None = None,
    size: tuple[int, int] | None = None,
) -> ConvertedNetwork:
    """Run the method's transform on `network`, in place, and write it into the record.

    Args:
        network: What `prepare` returned.
        method: The method.
        decisions: Choices of an earlier run to be replayed.
        size: (height, width) for the record.
    """
    rewriter = Rewriter(network, method.name, decisions)
    # A replay draws initial weights that the checkpoint replaces: loading must not move the caller's random numbers.
    with torch.random.fork_rng(devices=[], enabled=decisions is not None):
        converted = _transformed(rewriter, method)
    if not rewriter.sites:
        raise NothingConverted(
            f"{method.name}: the transform changed nothing in {converted.meta[ARCHITECTURE].name}",
            converted.meta[ARCHITECTURE].refusals,
        )
    provider = provider_of(type(method))
    operation = Operation(
        "convert",
        method.name,
        method.options(),
        rewriter.decisions,
        tuple(rewriter.sites),
        provider.distribution,
        provider.version,
        size,
    )
    converted.meta[CONVERSION] = converted.meta[CONVERSION].then(operation)
    converted.meta[METHODS] = (*converted.meta.get(METHODS, ()), method)
    return converted


def _transformed(rewriter: Rewriter, method: Method) -> ConvertedNetwork:
    try:
        method.transform(rewriter.architecture, rewriter)
        return rewriter.finish()
    except SurgeryError:
        raise
    except Exception as error:  # a third party's code can raise anything; the caller learns where
        site = rewriter.sites[-1] if rewriter.sites else None
        where = f"after {site.role} at {site.block or '(root)'}" if site else "before its first edit"
        raise TransformFailed(
            f"{method.name}: the transform failed {where}: {type(error).__name__}: {error}"
        ) from error


def verify_preserved(model: nn.Module, converted: ConvertedNetwork, method: Method) -> None:
    """Check the method's claim on two random images in float64.

    Raises:
        ConformanceError: If the claim does not hold, with the largest difference.
    """
    if method.preserved() != "nothing":
        weights = converted.state_dict()
        lost = [
            key for key, value in model.state_dict().items() if key not in weights or not is_kept(weights[key], value)
        ]
        if lost:
            raise ConformanceError(
                f"preserves: {method.name} claims to keep the weights, but changed or lost {lost[:3]}"
            )
    if method.preserved() == "output":
        size = converted.meta[ARCHITECTURE].input_size
        image = torch.rand(2, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            before = copy.deepcopy(model).double().eval()(image.to(next(model.parameters()).device))
            after = copy.deepcopy(converted).double().eval()(image.to(before.device))
        if not torch.equal(before, after):
            worst = (before - after).abs().max().item()
            raise ConformanceError(
                f"preserves: {method.name} claims equal outputs, but they differ by up to {worst:.3g}"
            )


def is_kept(found: Tensor, value: Tensor) -> bool:
    """Return whether a weight is still there: as it was, or in copies or equal parts along its first dimension."""
    if found.shape == value.shape:
        return torch.equal(found, value)
    if not value.dim() or found.shape[1:] != value.shape[1:] or found.shape[0] % value.shape[0]:
        return False
    copies = found.unflatten(0, (-1, value.shape[0])).unbind()
    return any(all(torch.equal(copy, part) for copy in copies) for part in (value, value / len(copies)))


def _pair(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    return (size, size) if isinstance(size, int) else size
