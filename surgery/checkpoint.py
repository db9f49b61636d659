"""Save and load converted networks: one safetensors file whose header holds the JSON record. No pickle anywhere."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from surgery.conversion import CONVERSION, INCOMPLETE, apply_method, method_class, prepare
from surgery.errors import CheckpointError, PluginError, SurgeryError
from surgery.history import Conversion, Operation
from surgery.network import ConvertedNetwork
from surgery.pruning import PrunePlan, apply_plan
from surgery.sources import Factory, find_builder, rebuild

_RECORD, _STATE, _DIGEST = "surgery.record", "surgery.state", "surgery.sha256"


def save(model: nn.Module, path: str | os.PathLike[str], *, factory: Factory | None = None) -> None:
    """Write a converted network to one file: weights, and the record that rebuilds its graph.

    The file is written beside `path` and moved into place, so that `path` is either the old file or the whole new one.

    Args:
        model: A converted network, pruned or not.
        path: File to write, by convention `*.safetensors`.
        factory: Builds the unconverted network, where no torchvision or timm builder does; `load` needs it again.

    Raises:
        CheckpointError: If the model is not converted or not whole, or could not be rebuilt from the file.
    """
    if not isinstance(model, ConvertedNetwork):
        raise CheckpointError(
            f"{type(model).__name__} is not a converted network, so there is no record to save; use "
            "torch.save(model.state_dict(), "
            "path), or unwrap it (model.module, model._orig_mod) if it is wrapped"
        )
    if INCOMPLETE in model.meta:
        raise CheckpointError(f"save: found {model.meta[INCOMPLETE]}")
    record = _rebuildable(model.meta[CONVERSION], factory)
    tensors, aliases = _tensors(model)
    metadata = {_RECORD: record.to_json(), _STATE: json.dumps(_state(model, aliases))}
    metadata[_DIGEST] = _digest(metadata, tensors)
    _write(Path(path), save_tensors(tensors, metadata))


def load(path: str | os.PathLike[str], factory: Factory | None = None) -> ConvertedNetwork:
    """Rebuild a converted network from a file that `save` wrote, on the CPU, in the mode it was saved in.

    Args:
        path: The file.
        factory: Builds the unconverted network, where no torchvision or timm builder does.

    Raises:
        CheckpointError: If the file is missing, damaged, edited, foreign or newer, or does not fit the rebuilt network.
        PluginError: If the plugin of a method in the record is not installed.
    """
    metadata, tensors = _read(Path(path))
    record = Conversion.from_json(metadata[_RECORD])
    state = json.loads(metadata[_STATE])
    try:
        network = _replay(record, factory)
        _restore(network, tensors, state)
    except CheckpointError as error:
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


def _state(model: ConvertedNetwork, aliases: dict[str, str]) -> dict[str, Any]:
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    evaluating = [name for name, module in model.named_modules() if not module.training]
    everything = sum(1 for _ in model.named_modules())
    mode = "eval" if len(evaluating) == everything else "train"
    return {"mode": mode, "evaluating": [] if mode == "eval" else evaluating, "frozen": frozen, "aliases": aliases}


def _digest(metadata: dict[str, str], tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    digest.update(metadata[_RECORD].encode())
    digest.update(metadata[_STATE].encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()


def _write(path: Path, data: bytes) -> None:
    if path.is_dir() or not path.parent.is_dir():
        raise CheckpointError(f"{path}: cannot be written; expected the path of a file in an existing folder")
    handle, temporary = tempfile.mkstemp(dir=path.parent or Path(), prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    metadata = _header(path, data)
    missing = [key for key in (_RECORD, _STATE, _DIGEST) if not isinstance(metadata.get(key), str)]
    if missing:
        raise CheckpointError(
            f"{path}: a safetensors file without {', '.join(missing)}; it was not written by surgery.save"
        )
    try:
        tensors = load_tensors(data)
    except Exception as error:  # safetensors raises its own class for every kind of damage
        raise CheckpointError(
            f"{path}: truncated or damaged ({error}); restore it from a backup or save it again"
        ) from error
    if _digest(metadata, tensors) != metadata[_DIGEST]:
        raise CheckpointError(f"{path}: its checksum does not match, so it was edited or damaged; save the model again")
    return metadata, tensors


def _header(path: Path, data: bytes) -> dict[str, str]:
    try:
        (length,) = struct.unpack("<Q", data[:8])
        if length > len(data) - 8:
            raise ValueError(f"its header claims {length} bytes, the file has {len(data)}")
        header = json.loads(data[8 : 8 + length])
        metadata = header.get("__metadata__", {})
        return metadata if isinstance(metadata, dict) else {}
    except (struct.error, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: not a safetensors file, or truncated ({error}); pass a file written by surgery.save"
        ) from error


def _replay(record: Conversion, factory: Factory | None) -> ConvertedNetwork:
    network: ConvertedNetwork | None = None
    with torch.random.fork_rng(devices=[]):
        model = rebuild(record.source, factory)
        for operation in record.operations:
            network = _redo(model if network is None else network, operation)
    if network is None:
        raise CheckpointError("the record holds no conversion; the file is damaged")
    return network


def _redo(model: nn.Module, operation: Operation) -> ConvertedNetwork:
    if operation.kind == "classifier":
        assert isinstance(model, ConvertedNetwork)
        options = operation.options
        model.reset_classifier(options["num_classes"], *options["args"], **options["kwargs"])
        return model
    if operation.kind == "prune":
        assert isinstance(model, ConvertedNetwork)
        return apply_plan(model, PrunePlan.from_dict(operation.options))
    try:
        method = method_class(operation.method).from_options(operation.options)
    except PluginError as error:
        raise PluginError(
            f"{error}; the file needs {operation.distribution or 'the package that provides it'} "
            f"{operation.version}: install it"
        ) from error
    network = prepare(model, method, operation.input_size)
    return apply_method(network, method, decisions=dict(operation.decisions), size=operation.input_size)


def _restore(network: ConvertedNetwork, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    weights = {**tensors, **{name: tensors[kept] for name, kept in state["aliases"].items()}}
    expected = network.state_dict()
    unknown, lost = sorted(weights.keys() - expected.keys()), sorted(expected.keys() - weights.keys())
    shapes = [key for key in weights.keys() & expected.keys() if weights[key].shape != expected[key].shape]
    if unknown or lost or shapes:
        raise CheckpointError(
            f"the weights do not fit the rebuilt network: unknown {unknown[:3]}, missing {lost[:3]}, other shape "
            f"{shapes[:3]}; "
            "the file was written by another version of the method or of the network's library"
        )
    # In place, so that tied weights stay tied; each tensor takes the dtype it was stored with.
    for name, tensor in network.state_dict(keep_vars=True).items():
        tensor.data = weights[name]
    for name, module in network.named_modules():
        key = f"{name}._extra_state" if name else "_extra_state"
        if key in weights:  # torch made it for the state dict; the module has to be told
            module.set_extra_state(weights[key])
    frozen, evaluating = set(state["frozen"]), set(state["evaluating"])
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name not in frozen)
    network.train(state["mode"] == "train")
    for name, module in network.named_modules():
        if name in evaluating:
            module.training = False
