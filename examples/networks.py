"""The network that a recipe names: timm's and torchvision's, fresh, pretrained, or with weights from a file.

    [model]
    name = "resnet110"               # timm's registry, which holds the networks of `surgery.models` too
    name = "torchvision:resnet50"    # torchvision's
    weights = "IMAGENET1K_V1"        # one of torchvision's own sets of weights, downloaded
    weights = "weights/resnet50.pth" # a state dict in a file: .pth, .pt or .safetensors, also a checkpoint of a run
    pretrained = true                # timm's weights for the name, downloaded

Everything else in the table is an option of the library's builder.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import timm
import torch
import torchvision
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

import checkpoints
import surgery.models  # noqa: F401  (registers its networks with timm)
from recipe import Component, RecipeError

TORCHVISION = "torchvision:"
SUFFIXES = (".pth", ".pt", ".safetensors")


class WeightsUnavailable(RuntimeError):
    """Weights that a recipe asks for cannot be downloaded, read, or put into the network."""


def build(model: Component, classes: int) -> nn.Module:
    """Build the network of a recipe's [model] table for so many classes.

    Raises:
        RecipeError: The name or an option is not known.
        WeightsUnavailable: The weights cannot be had or do not fit.
    """
    options = dict(model.options)
    weights, pretrained = options.pop("weights", None), options.pop("pretrained", False)
    if weights and pretrained:
        raise RecipeError('[model] has both "weights" and "pretrained"; keep one of them.')
    try:
        network = _fresh(model.name, classes, options)
    except TypeError as error:
        raise RecipeError(f"[model] {model.name} does not take these options ({error}); change the table.") from error
    if pretrained:
        return _pretrained(model.name, classes, options)
    if weights:
        _fit(network, _state_of(model.name, str(weights)), classes, f"[model] {model.name} with {weights}")
    return network


def _fresh(name: str, classes: int, options: Mapping[str, Any]) -> nn.Module:
    if name.startswith(TORCHVISION):
        plain = name.removeprefix(TORCHVISION)
        if plain not in torchvision.models.list_models(module=torchvision.models):
            raise RecipeError(
                f"[model] name {name!r} is no classifier of torchvision; torchvision.models.list_models() lists them."
            )
        return torchvision.models.get_model(plain, weights=None, num_classes=classes, **options)
    if not timm.is_model(name):
        raise RecipeError(f"[model] name {name!r} is no network of timm; timm.list_models() lists them.")
    return timm.create_model(name, num_classes=classes, **options)


def _pretrained(name: str, classes: int, options: Mapping[str, Any]) -> nn.Module:
    if name.startswith(TORCHVISION):
        raise RecipeError(f'[model] {name} takes weights = "DEFAULT" or another of its sets, not pretrained = true.')
    try:
        return timm.create_model(name, pretrained=True, num_classes=classes, **options)
    except Exception as error:  # the hub client raises classes of several libraries
        raise _no_download(name, "pretrained weights of timm", error) from error


def _state_of(name: str, weights: str) -> Mapping[str, Tensor]:
    if Path(weights).suffix in SUFFIXES:
        return _read(Path(weights))
    if not name.startswith(TORCHVISION):
        raise RecipeError(f"[model] weights = {weights!r} is no file that ends with {', '.join(SUFFIXES)}; name one.")
    known = torchvision.models.get_model_weights(name.removeprefix(TORCHVISION))
    if weights not in known.__members__:
        raise RecipeError(f"[model] weights = {weights!r}; {name} has {', '.join(known.__members__)}, or name a file.")
    try:
        return known[weights].get_state_dict(progress=False, check_hash=True)
    except Exception as error:  # urllib, ssl and the check of the hash each raise their own
        raise _no_download(name, f"weights {weights}", error) from error


def _no_download(name: str, what: str, error: Exception) -> WeightsUnavailable:
    reason = str(error).splitlines()[0].split(". ")[0] if str(error) else "no reason given"
    return WeightsUnavailable(
        f"{name}: the {what} could not be downloaded ({type(error).__name__}: {reason}); get them on a machine with a "
        'connection and set [model] weights = "<path of the .pth or .safetensors file>" in the recipe, or leave them '
        "out to train from scratch."
    )


def _read(path: Path) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise WeightsUnavailable(
            f"[model] weights: {path} does not exist; put a state dict there, or name another file in the recipe."
        )
    try:
        safe = path.suffix == ".safetensors"
        state = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise WeightsUnavailable(f"[model] weights: {path} is no readable state dict ({reason}).") from error
    for key in ("state_dict", "model"):
        if isinstance(state.get(key), Mapping):
            state = state[key]
    # a checkpoint of a training run holds the state of the optimizer beside the weights
    own = {key.removeprefix(checkpoints.MODEL): v for key, v in state.items() if key.startswith(checkpoints.MODEL)}
    return own or state


def _fit(network: nn.Module, state: Mapping[str, Tensor], classes: int, where: str) -> None:
    """Load `state`; a classifier for another number of classes keeps its fresh weights."""
    own = network.state_dict()
    other = {key for key in own.keys() & state.keys() if own[key].shape != state[key].shape}
    head = {key for key in other if own[key].shape[0] == classes and own[key].shape[1:] == state[key].shape[1:]}
    missing, foreign = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or foreign or other - head:
        raise WeightsUnavailable(
            f"{where}: these are weights of another network (missing: {missing[:3]}; unknown: {foreign[:3]}; another "
            f"shape: {sorted(other - head)[:3]}); change [model] in the recipe."
        )
    if head:
        print(f"{where}: the classifier is for another number of classes and starts anew")
    network.load_state_dict({**state, **{key: own[key] for key in head}})
