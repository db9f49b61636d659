"""Turn the MODEL argument of the command line into a network."""

from __future__ import annotations

import difflib
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import timm
import torch
import torchvision
import typer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

import surgery.models as own_models
from surgery.checkpoint import load
from surgery.cli_files import UnreadableFile
from surgery.errors import CheckpointError, SurgeryError
from surgery.network import ConvertedNetwork

_SHOWN = 4


@dataclass(frozen=True)
class Wanted:
    """What the user asked for.

    Attributes:
        spec: `torchvision:NAME`, `timm:NAME`, a bare NAME, or the path of a checkpoint.
        classes: Number of classes, or None for the network's own.
        in_channels: Channels of the image, or None for the network's own.
        pretrained: Whether the library downloads its weights.
        weights: File with a state dict, or None.
    """

    spec: str
    classes: int | None = None
    in_channels: int | None = None
    pretrained: bool = False
    weights: Path | None = None


def load_model(wanted: Wanted) -> nn.Module:
    """Return the network in eval mode.

    Raises:
        BadParameter: If no network has that name, or the options do not go together.
        UnreadableFile: If a file or a download fails.
    """
    if _is_path(wanted.spec):
        _refuse_options(wanted)
        return read_checkpoint(Path(wanted.spec))
    if wanted.pretrained and wanted.weights:
        raise typer.BadParameter("pass either --pretrained or --weights, found both")
    library, name = resolve_name(wanted.spec)
    model = _from_torchvision(name, wanted) if library == "torchvision" else _from_timm(name, wanted)
    if wanted.weights:
        _load_weights(model, wanted.weights)
    return model.eval()


def read_checkpoint(path: Path) -> ConvertedNetwork:
    """Load what `surgery.save` wrote, in eval mode.

    Raises:
        UnreadableFile: If the file is missing, damaged or foreign.
    """
    if not path.is_file():
        raise UnreadableFile(f"{path}: there is no such file; pass one that `surgery convert` or surgery.save wrote")
    try:
        network = load(path)
    except CheckpointError as error:
        raise UnreadableFile(str(error)) from error
    network.eval()
    return network


def resolve_name(spec: str) -> tuple[str, str]:
    """Return ("torchvision" or "timm", name); a bare name that both know means torchvision's.

    Raises:
        BadParameter: If neither library has a classifier of that name.
    """
    library, colon, name = spec.rpartition(":")
    if colon and library not in ("torchvision", "timm"):
        raise typer.BadParameter(f"{spec!r}: expected torchvision:NAME or timm:NAME", param_hint="MODEL")
    known = {
        "torchvision": set(torchvision.models.list_models(module=torchvision.models)),
        "timm": set(timm.list_models()),
    }
    holders = [holder for holder in ([library] if colon else known) if _has(known[holder], holder, name)]
    if not holders:
        raise typer.BadParameter(_unknown(spec, name, [library] if colon else list(known), known), param_hint="MODEL")
    if not colon:
        hint = f" (timm has one too: timm:{name})" if len(holders) > 1 else ""
        origin = " (from surgery.models)" if name in own_models.LAYOUTS else ""
        typer.echo(f"{name}: {holders[0]}:{name}{origin}{hint}", err=True)
    return holders[0], name


def _has(names: set[str], library: str, name: str) -> bool:
    # timm also takes name.tag, where the tag chooses the weights.
    return name in names or (library == "timm" and name.partition(".")[0] in names)


def _unknown(spec: str, name: str, libraries: list[str], known: Mapping[str, set[str]]) -> str:
    close = [
        f"{library}:{match}"
        for library in libraries
        for match in difflib.get_close_matches(name, sorted(known[library]), 3)
    ]
    hint = (
        f"did you mean {', '.join(close)}?" if close else "see timm.list_models() and torchvision.models.list_models()"
    )
    return f"{spec!r} is neither a file nor a classifier of {' or '.join(libraries)}; {hint}"


def _is_path(spec: str) -> bool:
    return Path(spec).suffix in (".safetensors", ".pt", ".pth") or "/" in spec or Path(spec).is_file()


def _refuse_options(wanted: Wanted) -> None:
    if wanted.classes or wanted.in_channels or wanted.pretrained or wanted.weights:
        raise typer.BadParameter(
            f"{wanted.spec} is a checkpoint, which brings its classes, channels and weights along; leave out "
            "--classes, --in-channels, --pretrained and --weights"
        )


def _from_timm(name: str, wanted: Wanted) -> nn.Module:
    options: dict[str, Any] = {"num_classes": wanted.classes, "in_chans": wanted.in_channels}
    options = {key: value for key, value in options.items() if value is not None}
    try:
        return timm.create_model(name, pretrained=wanted.pretrained, **options)
    except Exception as error:  # the hub client raises classes of several libraries
        if not wanted.pretrained:
            raise
        raise _no_download(f"timm:{name}", error) from error


def _from_torchvision(name: str, wanted: Wanted) -> nn.Module:
    if wanted.in_channels not in (None, 3):
        raise typer.BadParameter(
            f"torchvision's networks take 3 channels, found --in-channels {wanted.in_channels}; use timm:NAME",
            param_hint="--in-channels",
        )
    classes = {} if wanted.classes is None else {"num_classes": wanted.classes}
    model: nn.Module = torchvision.models.get_model(name, weights=None, **classes)
    if wanted.pretrained:
        weights = torchvision.models.get_model_weights(name).DEFAULT
        try:
            state = weights.get_state_dict(progress=False, check_hash=True)
        except Exception as error:  # urllib, ssl and the hash check each raise their own
            raise _no_download(f"torchvision:{name}", error) from error
        _load_all_but_head(model, state)
    return model


def _load_all_but_head(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    fitting = {key: value for key, value in state.items() if key in shapes and shapes[key] == value.shape}
    model.load_state_dict(fitting, strict=False)
    fresh = [key for key in shapes if key not in fitting]
    if fresh:
        typer.echo(f"not pretrained, because the shapes differ: {', '.join(fresh)}", err=True)


def _no_download(name: str, error: Exception) -> UnreadableFile:
    reason = str(error).splitlines()[0] if str(error) else ""
    return UnreadableFile(
        f"{name}: its pretrained weights could not be had ({type(error).__name__}: {reason}); check the connection, or "
        "pass a state dict with --weights FILE"
    )


def _load_weights(model: nn.Module, path: Path) -> None:
    state = {key.removeprefix("module."): value for key, value in _read_state(path).items()}
    own = model.state_dict()
    missing = [key for key in own if key not in state]
    foreign = [key for key in state if key not in own]
    other = [key for key in own if key in state and own[key].shape != state[key].shape]
    if missing or foreign or other:
        found = [("missing", missing), ("unknown", foreign), ("of another shape", other)]
        said = "; ".join(f"{len(keys)} {what}: {', '.join(keys[:_SHOWN])}" for what, keys in found if keys)
        raise SurgeryError(
            f"{path}: does not fit {type(model).__name__} ({said}); pass the --classes it was trained with"
        )
    model.load_state_dict(state)


def _read_state(path: Path) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise UnreadableFile(f"{path}: there is no such file; --weights expects a state dict, .safetensors or .pt")
    try:
        state = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except (SafetensorError, UnpicklingError, zipfile.BadZipFile, RuntimeError, EOFError, OSError, ValueError) as error:
        raise UnreadableFile(f"{path}: cannot be read as a state dict ({str(error).splitlines()[0]})") from error
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UnreadableFile(f"{path}: holds a {type(state).__name__}, expected a state dict: names with tensors")
    return state
