"""Training checkpoints: one safetensors file with a JSON header, written atomically and read without pickle.

The first process writes it. It holds whole tensors, also of a training that shards them; what is not shared by the
processes, such as the statistics of norms, is that of the first.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from machines import Machine

FORMAT = "surgery-training-2"
MODEL, OPTIMIZER = "model.", "optimizer."


class CheckpointError(RuntimeError):
    """A checkpoint is damaged or belongs to another run."""


@dataclass(frozen=True)
class Checkpoint:
    """What a training run needs to go on.

    Attributes:
        tensors: Weights under "model.<key>" and optimizer state under "optimizer.<parameter index>.<name>".
        scalars: Optimizer state that is no tensor, under the same keys.
        identity: What run this is: recipe, data and method, as JSON values.
        progress: Where the run stands, as JSON values.
    """

    tensors: Mapping[str, Tensor]
    scalars: Mapping[str, Any]
    identity: Mapping[str, Any]
    progress: Mapping[str, Any]


def collect(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    identity: Mapping[str, Any],
    progress: Mapping[str, Any],
    machine: Machine,
) -> Checkpoint:
    """Copy weights and optimizer state to the CPU; all processes do."""
    # a copy of each: tied weights share storage, which safetensors refuses
    tensors = {MODEL + key: machine.whole(value) for key, value in model.state_dict().items()}
    scalars: dict[str, Any] = {}
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            key = f"{OPTIMIZER}{index}.{name}"
            if isinstance(value, Tensor):
                tensors[key] = machine.whole(value)
            else:
                scalars[key] = value
    return Checkpoint(tensors, scalars, identity, progress)


def write(path: Path, checkpoint: Checkpoint) -> None:
    """Write `checkpoint` to `path`, which afterwards is either the old file or the whole new one."""
    header = json.dumps(
        {"scalars": checkpoint.scalars, "identity": checkpoint.identity, "progress": checkpoint.progress}
    )
    metadata = {"format": FORMAT, "json": header, "sha256": _digest(header, checkpoint.tensors)}
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        save_file(dict(checkpoint.tensors), temporary, metadata)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def tidy(path: Path) -> None:
    """Delete what a process that was killed while it wrote `path` has left beside it."""
    for left in path.parent.glob(f"{path.name}.*.tmp"):
        left.unlink(missing_ok=True)


def read(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        CheckpointError: The file is damaged or was not written by `write`.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a dictionary)
    except (SafetensorError, OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"checkpoint {path}: cannot be read ({error}); delete it to start anew.") from error
    if metadata.get("format") != FORMAT:
        found = metadata.get("format", "none")
        message = f"checkpoint {path}: format {found}, expected {FORMAT}; it is from another version, or not from here."
        raise CheckpointError(message)
    if _digest(metadata.get("json", ""), tensors) != metadata.get("sha256"):
        raise CheckpointError(
            f"checkpoint {path}: its checksum does not match; it is damaged, delete it to start anew."
        )
    try:
        header = json.loads(metadata["json"])
        parts = [header[name] for name in ("scalars", "identity", "progress")]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"checkpoint {path}: its header is damaged ({error}); delete it to start anew."
        ) from error
    if not all(isinstance(part, dict) for part in parts):
        raise CheckpointError(f"checkpoint {path}: its header is damaged; delete it to start anew.")
    return Checkpoint(tensors, *parts)


def restore(
    path: Path, checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer, machine: Machine
) -> None:
    """Put weights and optimizer state back; all processes do.

    Raises:
        CheckpointError: The weights have other names or shapes than `model`.
    """
    weights = {k.removeprefix(MODEL): v for k, v in checkpoint.tensors.items() if k.startswith(MODEL)}
    current = model.state_dict()
    _check_weights(path, weights, current)
    model.load_state_dict({key: machine.part(value, current[key]) for key, value in weights.items()})
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**checkpoint.tensors, **checkpoint.scalars}.items():
        if key.startswith(OPTIMIZER):
            number, name = key.removeprefix(OPTIMIZER).split(".", 1)
            parameter = parameters[int(number)]
            lies_like = isinstance(value, Tensor) and value.shape == parameter.shape
            state.setdefault(int(number), {})[name] = machine.part(value, parameter) if lies_like else value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def require_same_run(path: Path, saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Refuse to continue a run with another recipe or other data.

    Raises:
        CheckpointError: Names every value that differs.
    """
    before, now = _flatten(saved), _flatten(current)
    different = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    if different:
        listed = "; ".join(f"{key} was {before.get(key)!r}, is {now.get(key)!r}" for key in different[:5])
        message = f"checkpoint {path}: belongs to another run ({listed}); use another run folder, or start anew."
        raise CheckpointError(message)


def _check_weights(path: Path, saved: Mapping[str, Tensor], model: Mapping[str, Tensor]) -> None:
    lost, new = sorted(set(saved) - set(model)), sorted(set(model) - set(saved))
    shapes = [
        f"{key} {tuple(saved[key].shape)} here {tuple(model[key].shape)}"
        for key in saved.keys() & model.keys()
        if saved[key].shape != model[key].shape
    ]
    if lost or new or shapes:
        message = (
            f"checkpoint {path}: belongs to another network (only in the file: {lost[:3]}; only in the network: "
            f"{new[:3]}; other shapes: {sorted(shapes)[:3]}); use another run folder, or start anew."
        )
        raise CheckpointError(message)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(_flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value})
    return flat


def _digest(header: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    # makes the rename itself durable
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
