"""Save and load converted networks: one safetensors file whose header holds the JSON record. No pickle anywhere."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from surgery.conversion import ARCHITECTURE, CONVERSION, INCOMPLETE, apply_method, method_class, prepare
from surgery.errors import CheckpointError, PluginError, SurgeryError
from surgery.history import CURE, Conversion, Operation, Source, parse_json, read_fields
from surgery.network import ConvertedNetwork
from surgery.pruning import PrunePlan, apply_plan
from surgery.sources import Factory, find_builder, rebuild, refuse_size
from surgery.storage import read_file, write_file
from surgery.tracing import refuse_wrapped

_RECORD, _STATE = "surgery.record", "surgery.state"


@dataclass(frozen=True)
class _State:
    """What a network has besides its weights.

    Attributes:
        mode: That of the network.
        evaluating: Modules that are in eval mode while the network is in train mode.
        frozen: Parameters without gradient.
        aliases: Tied name -> the name that the tensor is stored under.
    """

    mode: Literal["train", "eval"]
    evaluating: tuple[str, ...]
    frozen: tuple[str, ...]
    aliases: Mapping[str, str]

    @classmethod
    def of(cls, model: ConvertedNetwork, aliases: Mapping[str, str]) -> Self:
        frozen = tuple(name for name, parameter in model.named_parameters() if not parameter.requires_grad)
        evaluating = tuple(name for name, module in model.named_modules() if not module.training)
        everything = sum(1 for _ in model.named_modules())
        is_whole = len(evaluating) == everything
        return cls("eval" if is_whole else "train", () if is_whole else evaluating, frozen, aliases)

    @classmethod
    def from_json(cls, text: str) -> Self:
        try:
            return read_fields(cls, parse_json(text))
        except ValueError as error:
            raise CheckpointError(f"the state of the network is incomplete or edited ({error}); {CURE}") from error


def save(model: nn.Module, path: str | os.PathLike[str], *, factory: Factory | None = None) -> None:
    """Write a converted network to one file: weights, and the record that rebuilds its graph.

    The file is written beside `path` and moved into place, so that `path` is either the old file or the whole new one.

    Args:
        model: A converted network, pruned or not.
        path: File to write, by convention `*.safetensors`.
        factory: Builds the unconverted network, where no torchvision or timm builder does; `load` needs it again.

    Raises:
        CheckpointError: If the model is not converted or not whole, or could not be rebuilt from the file.
        UnsupportedModel: If the model is sharded.
    """
    if not isinstance(model, ConvertedNetwork):
        raise CheckpointError(
            f"{type(model).__name__} is not a converted network, so there is no record to save; use "
            "torch.save(model.state_dict(), "
            "path), or unwrap it (model.module, model._orig_mod) if it is wrapped"
        )
    refuse_wrapped(model)
    if INCOMPLETE in model.meta:
        raise CheckpointError(f"save: found {model.meta[INCOMPLETE]}")
    record = _rebuildable(model.meta[CONVERSION], factory)
    tensors, aliases = _tensors(model)
    state = json.dumps(asdict(_State.of(model, aliases)))
    write_file(Path(path), tensors, {_RECORD: record.to_json(), _STATE: state})


def load(path: str | os.PathLike[str], factory: Factory | None = None) -> ConvertedNetwork:
    """Rebuild a converted network from a file that `save` wrote, on the CPU, in the mode it was saved in.

    Args:
        path: The file.
        factory: Builds the unconverted network, where no torchvision or timm builder does.

    Raises:
        CheckpointError: If the file is missing, damaged, edited, foreign or newer, or does not fit the rebuilt network.
        PluginError: If the plugin of a method in the record is not installed.
    """
    metadata, tensors = read_file(Path(path), (_RECORD, _STATE))
    try:
        record, state = Conversion.from_json(metadata[_RECORD]), _State.from_json(metadata[_STATE])
        with torch.random.fork_rng(devices=[]):
            network = _restored(rebuild(record.source, factory), record, tensors, state)
    except PluginError as error:
        raise PluginError(f"{path}: {error}") from error
    except SurgeryError as error:
        raise CheckpointError(f"{path}: {error}") from error
    network.meta[CONVERSION] = record
    return network


def revert(model: nn.Module, factory: Factory | None = None) -> nn.Module:
    """Return the source network with the weights that it has now: bit-identical to the original right after conversion.

    Args:
        model: A converted network whose method keeps the weights of the source.
        factory: Builds the unconverted network, where no torchvision or timm builder does.

    Raises:
        SurgeryError: If the conversion or a pruning changed shapes or dropped weights, so that no way back exists.
    """
    if not isinstance(model, ConvertedNetwork):
        raise SurgeryError(f"{type(model).__name__} is not a converted network; there is nothing to revert")
    source = rebuild(model.meta[CONVERSION].source, factory)
    weights = model.state_dict()
    for key, value in source.state_dict().items():
        if key not in weights or weights[key].shape != value.shape:
            found = "nothing" if key not in weights else f"shape {tuple(weights[key].shape)}"
            raise SurgeryError(
                f"{key}: the source has shape {tuple(value.shape)}, the converted network {found}; it cannot be "
                "reverted: keep the original, which conversion left untouched"
            )
    source.load_state_dict({key: weights[key].clone() for key in source.state_dict()}, assign=True)
    return source.train(model.training)


def _rebuildable(record: Conversion, factory: Factory | None) -> Conversion:
    """Return the record with the builder of the source found out, or check the user's."""
    source = record.source
    if factory is not None:
        rebuild(source, factory)
        return replace(record, source=replace(source, builder=""))
    builder = find_builder(source)
    if not builder:
        raise CheckpointError(
            f"no torchvision or timm builder makes this {source.class_name}, so the file could not be loaded; pass "
            "factory=, "
            "a function without arguments that builds the unconverted network, here and to load"
        )
    return replace(record, source=replace(source, builder=builder))


def _tensors(model: ConvertedNetwork) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the state dict without tied copies, and a map from each tied name to the name that is kept."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    # Ties are the same object: addresses are 0 for every tensor of an XLA device.
    for name, tensor in model.state_dict(keep_vars=True).items():
        kept = first.setdefault(id(tensor), name)
        if kept != name:
            aliases[name] = kept
        else:
            tensors[name] = tensor.detach().cpu().contiguous()
    return tensors, aliases


def _restored(model: nn.Module, record: Conversion, tensors: Mapping[str, Tensor], state: _State) -> ConvertedNetwork:
    try:
        for operation in record.operations:
            model = _redo(model, operation)
        network = _converted(model, "ends")
        _refuse_other_source(network, record.source)
        _restore(network, {**tensors, **_tied(tensors, state.aliases)}, state)
    except (CheckpointError, PluginError):
        raise
    except Exception as error:  # a record that was edited may ask anything of torch, timm and the methods
        raise CheckpointError(
            "the record does not describe a network that this version can rebuild "
            f"({type(error).__name__}: {error}); {CURE}"
        ) from error
    return network


def _refuse_other_source(network: ConvertedNetwork, source: Source) -> None:
    found: Source = network.meta[CONVERSION].source
    if (found.classes, found.in_channels) != (source.classes, source.in_channels):
        raise CheckpointError(
            f"the record is one of {source.classes} classes and {source.in_channels} channels, found a network of "
            f"{found.classes} and {found.in_channels}; {CURE}"
        )


def _converted(model: nn.Module, where: str) -> ConvertedNetwork:
    if not isinstance(model, ConvertedNetwork):
        raise CheckpointError(f"the record {where} without a conversion, expected one first; {CURE}")
    return model


def _redo(model: nn.Module, operation: Operation) -> ConvertedNetwork:
    if operation.kind == "classifier":
        return _reset(_converted(model, "begins"), operation.options)
    if operation.kind == "prune":
        return apply_plan(_converted(model, "begins"), PrunePlan.from_dict(operation.options))
    try:
        method = method_class(operation.method).from_options(operation.options)
    except PluginError as error:
        raise PluginError(
            f"{error}; the file needs {operation.distribution or 'the package that provides it'} "
            f"{operation.version}: install it"
        ) from error
    network = prepare(model, method, operation.input_size)
    return apply_method(network, method, decisions=dict(operation.decisions), size=operation.input_size)


def _reset(network: ConvertedNetwork, options: Mapping[str, Any]) -> ConvertedNetwork:
    classes, head = options["num_classes"], network.meta[ARCHITECTURE].head
    if head.path is not None and head.classes:
        weights = sum(parameter.numel() for parameter in network.get_submodule(head.path).parameters())
        refuse_size(f"{head.path}: the classifier", weights // head.classes * classes)
    network.reset_classifier(classes, *options["args"], **options["kwargs"])
    return network


def _tied(tensors: Mapping[str, Tensor], aliases: Mapping[str, str]) -> dict[str, Tensor]:
    wrong = sorted(name for name, kept in aliases.items() if name in tensors or kept not in tensors)
    if wrong:
        raise CheckpointError(
            f"the state of the network ties {wrong[:3]}, expected names without a tensor of their own, tied to some "
            f"that have one; {CURE}"
        )
    return {name: tensors[kept] for name, kept in aliases.items()}


def _restore(network: ConvertedNetwork, weights: Mapping[str, Tensor], state: _State) -> None:
    expected = network.state_dict(keep_vars=True)
    _refuse_misfits(weights, expected)
    # In place, so that tied weights stay tied; each tensor takes the dtype it was stored with.
    for name, tensor in expected.items():
        tensor.data = weights[name]
    for name, module in network.named_modules():
        key = f"{name}._extra_state" if name else "_extra_state"
        if key in weights:  # torch made it for the state dict; the module has to be told
            module.set_extra_state(weights[key])
    _refuse_changes(weights, network.state_dict())
    _set_modes(network, state)


def _refuse_misfits(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    unknown, lost = sorted(weights.keys() - expected.keys()), sorted(expected.keys() - weights.keys())
    both = sorted(weights.keys() & expected.keys())
    shapes = [key for key in both if weights[key].shape != expected[key].shape]
    kinds = [key for key in both if _kind(weights[key]) != _kind(expected[key])]
    if unknown or lost or shapes or kinds:
        raise CheckpointError(
            f"the weights do not fit the rebuilt network: unknown {unknown[:3]}, missing {lost[:3]}, other shape "
            f"{shapes[:3]}, other type {kinds[:3]}; "
            "the file was written by another version of the method or of the network's library: install that one, or "
            "save the model again"
        )


def _kind(tensor: Tensor) -> str:
    return "floating point" if tensor.is_floating_point() else str(tensor.dtype)


def _refuse_changes(weights: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Refuse a network that does not hold what the file does, such as one with ties where the file has none."""
    changed = [name for name, tensor in weights.items() if not _same(tensor, found[name])]
    if changed:
        raise CheckpointError(
            f"the rebuilt network does not keep the stored {changed[:3]}, expected it to hold every tensor as it is; "
            f"the file was edited, or factory= builds a network with other ties: pass the one of save, or {CURE}"
        )


def _same(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a, b) or torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))  # NaN


def _set_modes(network: ConvertedNetwork, state: _State) -> None:
    parameters, modules = dict(network.named_parameters()), dict(network.named_modules())
    unknown = sorted({*state.frozen} - parameters.keys()) + sorted({*state.evaluating} - modules.keys())
    if unknown:
        raise CheckpointError(
            f"the state of the network names {unknown[:3]}, expected modules and parameters that it has; {CURE}"
        )
    for name, parameter in parameters.items():
        parameter.requires_grad_(name not in state.frozen)
    network.train(state.mode == "train")
    for name in state.evaluating:
        modules[name].training = False
