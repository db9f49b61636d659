"""Laws of conversion: what happens to the network that went in, and what the one that came out can be relied on for."""

from __future__ import annotations

import copy
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import surgery
from surgery.conversion import apply_method, is_kept, prepare, verify_preserved
from surgery.errors import AlreadyConverted, ConformanceError, NothingConverted
from surgery.history import Conversion
from surgery.network import ConvertedNetwork, SurgeryModule
from surgery.testing.case import Case, evaluate, fail, require, require_equal, seeded, training_loss
from surgery.testing.networks import plain_chain


def installed(case: Case) -> None:
    """The method is found by its name, as records refer to it."""
    found = surgery.methods().get(case.method.name)
    name = type(case.method).__name__
    require(
        found is type(case.method),
        f"surgery.methods() holds {found} under this name, expected {name}; add the entry point to pyproject.toml and "
        "install the package, as with pip install -e .",
    )


def options(case: Case) -> None:
    """The options survive JSON: the method rebuilt from them has the same ones."""
    written = json.dumps(case.method.options())
    twin = type(case.method).from_options(json.loads(written))
    again = json.dumps(twin.options())
    require(again == written, f"from_options(options()) has the options {again}, expected {written}")
    for field in dataclasses.fields(case.method):
        kept, found = getattr(case.method, field.name), getattr(twin, field.name)
        require(
            found == kept or not _is_json(kept),
            f"from_options(options()) has {field.name}={found!r}, expected {kept!r}",
        )


def original_untouched(case: Case) -> None:
    """Converting, and training the result, changes nothing in the network that went in."""
    source = case.build()
    norm = next((module for module in source.modules() if isinstance(module, nn.BatchNorm2d)), source)
    norm.eval()
    next(source.parameters()).requires_grad_(False)
    source.register_forward_hook(_hook)
    source.__dict__["a_users_attribute"] = ["kept"]
    before = _snapshot(source)
    converted = case.convert(source)
    _compare_snapshots(before, _snapshot(source), "after conversion")
    training_loss(converted, case.images(), case.target()).backward()
    with torch.no_grad():
        for parameter in converted.parameters():
            parameter.add_(1.0)
    _compare_snapshots(before, _snapshot(source), "after a training step of the converted network")


def preserves(case: Case) -> None:
    """What the method claims to preserve holds in float64."""
    source = case.build().double()
    try:
        verify_preserved(source, case.convert(source), case.method)
    except ConformanceError as error:
        fail(str(error).removeprefix("preserves: "))


def settings_kept(case: Case) -> None:
    """Mode, dtype and frozen weights of the source are those of the converted network."""
    source = case.build().double().eval()
    first, frozen = next(iter(source.named_parameters()))
    frozen.requires_grad_(False)
    converted = case.convert(source)
    training = [name for name, module in converted.named_modules() if module.training]
    require(not training, f"the source is in eval mode, but {training[:3]} came out in train mode")
    wrong = [name for name, tensor in converted.named_parameters() if tensor.dtype != torch.float64]
    require(not wrong, f"the source is in float64, but {wrong[:3]} are not")
    kept = dict(converted.named_parameters())
    require(first not in kept or not kept[first].requires_grad, f"{first} was frozen, but came out trainable")
    evaluate(converted, case.images(2, torch.float64))


def source_weights_load(case: Case) -> None:
    """A checkpoint of the source network loads: nothing of it is unknown, and only what the method added is missing.

    What every branch has its own of gets copies of it, or equal parts of it.
    """
    if case.method.preserved() == "nothing":
        return
    weights = {key: _changed(value) for key, value in case.build().state_dict().items()}
    converted = case.converted()
    missing, unexpected = converted.load_state_dict(weights, strict=False)
    require(
        not unexpected, f"the source checkpoint has keys that the converted network does not know: {unexpected[:3]}"
    )
    lost = [key for key in missing if key in weights]
    require(not lost, f"the source checkpoint holds {lost[:3]}, but they were not loaded")
    state = converted.state_dict()
    stale = [key for key, value in weights.items() if not is_kept(state[key], value)]
    require(not stale, f"the source checkpoint was loaded, but {stale[:3]} have other values")


def twice_refused(case: Case) -> None:
    """The same method is not applied twice."""
    try:
        case.convert(case.converted())
    except AlreadyConverted:
        return
    fail("a second conversion by the same method was accepted, expected AlreadyConverted")


def unsupported_refused(case: Case) -> None:
    """A plain chain of convolutions is refused, with a reason for each place."""
    try:
        case.convert(plain_chain())
    except NothingConverted as error:
        require(
            bool(error.refusals),
            "a plain chain was refused without a reason, expected NothingConverted(headline, refusals)",
        )
        silent = [refusal for refusal in error.refusals if not refusal.path or not refusal.reason]
        require(not silent, f"a plain chain was refused with an empty reason: {silent[:1]}")
    else:
        fail("a plain chain without branches and shortcuts was converted, expected NothingConverted")


def deepcopies(case: Case) -> None:
    """A copy computes the same and shares nothing, also right after a training forward."""
    model = case.converted()
    training_loss(model, case.images(), case.target())
    model(case.images())
    twin = copy.deepcopy(model)
    require_equal(evaluate(twin, case.images()), evaluate(model, case.images()), "output of the copy")
    require(twin.state_dict().keys() == model.state_dict().keys(), "the copy has other state-dict keys")
    shared = {tensor.data_ptr() for tensor in _tensors(model)} & {tensor.data_ptr() for tensor in _tensors(twin)}
    require(not shared, f"the copy shares the memory of {len(shared)} tensors with the original")


def record(case: Case) -> None:
    """The record survives JSON."""
    text = case.record().to_json()
    again = Conversion.from_json(text)
    require(
        again.to_json() == text, "the record read back from JSON differs; options and decisions must be JSON values"
    )
    require(bool(case.record().operations[-1].sites), "the record names no site, expected one for every change")


def replays(case: Case) -> None:
    """The record alone rebuilds the network under any random state: every choice goes through `decide`."""
    model = case.converted()
    operation = Conversion.from_json(case.record().to_json()).operations[-1]
    for seed in range(1, 5):
        with seeded(seed):
            method = type(case.method).from_options(operation.options)
            network = prepare(case.build(), method, operation.input_size)
            twin = apply_method(network, method, decisions=dict(operation.decisions), size=operation.input_size)
        require(
            _structure(twin) == _structure(model),
            f"rebuilt with the random seed {seed}, the network has other graphs or modules",
        )
        twin.load_state_dict(model.state_dict())
        require_equal(
            evaluate(twin, case.images()), evaluate(model, case.images()), f"output rebuilt with the random seed {seed}"
        )


def saves_and_loads(case: Case) -> None:
    """A saved and loaded network computes the same bits, in the mode it was saved in."""
    model = case.converted()
    training_loss(model, case.images(), case.target())  # moves statistics
    twin = saved_and_loaded(case, model)
    require(twin.training, "a network saved in train mode was loaded in eval mode")
    require_equal(evaluate(twin, case.images()), evaluate(model, case.images()), "output of the loaded network")


def saved_and_loaded(case: Case, model: ConvertedNetwork) -> ConvertedNetwork:
    """Return `model` after a way through a file, and require that its state came back."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        surgery.save(model, path, factory=case.build)
        with seeded(1):
            twin = surgery.load(path, factory=case.build)
    state, loaded = model.state_dict(), twin.state_dict()
    require(list(state) == list(loaded), "the loaded network has other state-dict keys")
    for key, value in state.items():
        require_equal(loaded[key], value, f"{key} of the loaded network")
    return twin


def _is_json(value: object) -> bool:
    """Return whether JSON holds `value` as it is; richer values come back in the form that the method gave them."""
    try:
        return bool(json.loads(json.dumps(value)) == value)
    except (TypeError, ValueError):
        return False


def _hook(module: nn.Module, inputs: object, output: object) -> None:
    """Do nothing; a place holder for a user's own hook."""


def _changed(value: Tensor) -> Tensor:
    return value + 1 if value.is_floating_point() else value.clone()


def _tensors(model: nn.Module) -> list[Tensor]:
    return [tensor for tensor in [*model.parameters(), *model.buffers()] if tensor.numel()]


def _structure(network: ConvertedNetwork) -> list[tuple[str, ...]]:
    lines: list[tuple[str, ...]] = []
    for path, module in network.named_modules():
        lines.append((path, type(module).__name__, module.extra_repr()))
        if isinstance(module, SurgeryModule):
            lines += [(path, node.name, str(node.target), str(node.args)) for node in module.graph.nodes]
    return lines


def _snapshot(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return everything that a conversion could change in a network, by kind and name."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    taken: dict[str, dict[str, Any]] = {
        "values": {name: tensor.detach().clone() for name, tensor in tensors},
        "tensors": {name: (id(tensor), tensor.requires_grad, tensor.grad is None) for name, tensor in tensors},
        "modules": {name: id(module) for name, module in model.named_modules()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "hooks": {},
        "attributes": {},
    }
    for path, module in model.named_modules():
        for key, value in vars(module).items():
            if key.endswith("_hooks"):
                taken["hooks"][f"{path}.{key}"] = tuple(id(hook) for hook in value.values()) if value else ()
            elif not key.startswith("_"):
                taken["attributes"][f"{path}.{key}"] = repr(value)
    return taken


def _compare_snapshots(before: dict[str, dict[str, Any]], after: dict[str, dict[str, Any]], when: str) -> None:
    for kind, old in before.items():
        new = after[kind]
        other = sorted(old.keys() ^ new.keys())
        other += [name for name in old if name in new and not _same(old[name], new[name])]
        require(not other, f"{when}, the {kind} of the original differ at {', '.join(other[:3])}")


def _same(old: Any, new: Any) -> bool:
    return torch.equal(old, new) if isinstance(old, Tensor) else bool(old == new)
