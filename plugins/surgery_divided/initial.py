"""First weights of the small networks: drawn by the source's own initialisers, or taken from the source."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from surgery import ConvertedNetwork, Rewriter
from surgery.errors import CheckpointError
from surgery.history import Conversion, Source
from surgery.sources import build, closest_builder, rebuild
from surgery_divided.widths import Width, free_widths, written_by

_SEED_LIMIT = 2**31
_OVERWRITE = ("normal_", "uniform_", "fill_", "zero_", "constant_", "kaiming_uniform_", "bernoulli_", "copy_")
_CHANGE = ("erfinv_", "mul_", "div_", "add_", "sub_", "clamp_")
_KNOWN = frozenset((*_OVERWRITE, *_CHANGE))

_GAINS = (1 / 3, 2 / 3, 1.0, 2.0, 3.0, 4.0, 6.0)
"""What the square of a spread is to a fan in the usual initialisers, those of LeCun, Glorot and He."""

Fill = tuple[Callable[..., Tensor], tuple[Any, ...], dict[str, Any]]
Rule = tuple[str, float]
"""A fan and what the square of a number is to it."""


def fresh_seeds(networks: int) -> list[int]:
    """Return a seed for each network, drawn from the global random state, no two alike."""
    first = int(torch.randint(_SEED_LIMIT, (), device="cpu"))
    return [(first + i) % _SEED_LIMIT for i in range(networks)]


class Initialisers:
    """How the weights of a network are drawn when it is built, to draw those of a thinner one the same way.

    The builder of the source runs once and every in-place operation on a weight is noted. A deviation that follows from
    the shape is recognised by its number, and follows the thinner shape; where it fits several fans of a layer, it is
    taken for the one that fits most layers. A weight that the builder does not make is drawn by the `reset_parameters`
    of its layer, and stays as it is where there is none.

    Args:
        record: Says what the source is.
        names: Names of its parameters.
    """

    def __init__(self, record: Conversion, names: Collection[str]) -> None:
        self._source, self._names = record.source, names
        self._weights: dict[str, _Recipe] = {}
        self._votes: Counter[Rule] = Counter()
        with (watch := _Watch()):
            source = _built(self._source, self._names)
        if source is None:
            return
        for path, module in source.named_modules():
            for name, value in module.named_parameters(path, recurse=False):
                self._weights[name] = _Recipe(watch.steps_of(value), value.detach(), _fans(module))
        self._votes = Counter(rule for recipe in self._weights.values() for rule in recipe.rules())

    def draw(self, network: nn.Module, seed: int) -> None:
        """Draw all weights of `network` anew, in place, and forget the statistics of its norms.

        Args:
            network: Has the names of the source's parameters and other shapes.
            seed: The global random state is left as it was.
        """
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.default_generator.manual_seed(seed)  # that of the CPU alone, where all weights are drawn
            if any(recipe.is_unknown for recipe in self._weights.values()):
                self._build_again()
            for path, module in network.named_modules():
                self._draw_layer(path, module)
                if isinstance(module, nn.modules.batchnorm._NormBase):
                    module.reset_running_stats()

    def _draw_layer(self, path: str, module: nn.Module) -> None:
        own = dict(module.named_parameters(path, recurse=False))
        reset = getattr(module, "reset_parameters", None)
        if not own.keys() <= self._weights.keys() and callable(reset):
            reset()
            return
        for name, value in own.items():
            if name in self._weights:
                value.copy_(self._weights[name].draw(value.shape, _fans(module), self._votes))

    def _build_again(self) -> None:
        """Give weights that are filled in an unknown way other values, those of another source."""
        source = _built(self._source, self._names)
        assert source is not None
        for name, value in source.named_parameters():
            if name in self._weights:
                self._weights[name].value = value.detach()


class _Recipe:
    """How one weight is drawn.

    Args:
        steps: What was done to it, the last overwriting and all behind it; empty where it was made in another way.
        value: What came out.
        fans: What numbers of the steps can depend on.
    """

    def __init__(self, steps: list[Fill], value: Tensor, fans: Mapping[str, float]) -> None:
        self._steps, self.value, self._fans = steps, value, fans

    @property
    def is_unknown(self) -> bool:
        """Whether it is random in a way that was not seen."""
        return not self._steps and bool((self.value != self.value.flatten()[0]).any())

    def rules(self) -> Iterator[Rule]:
        """Yield what the numbers of the steps can follow from."""
        for _, args, kwargs in self._steps:
            for number in (*args, *kwargs.values()):
                yield from _rules(number, self._fans)

    def draw(self, shape: torch.Size, fans: Mapping[str, float], votes: Mapping[Rule, int]) -> Tensor:
        """Return a weight of another shape.

        Args:
            shape: The shape.
            fans: Those of the layer that the weight is for.
            votes: How many numbers of the network each rule fits.
        """
        if not self._steps:
            return self.value[tuple(slice(extent) for extent in shape)]
        value = torch.empty(shape, dtype=self.value.dtype)

        def follow(number: Any) -> Any:
            rules = [rule for rule in _rules(number, self._fans) if rule[0] in fans]
            if not rules:
                return number
            fan, _ = max(rules, key=lambda rule: votes[rule])
            return number * math.sqrt(self._fans[fan] / fans[fan])

        for function, args, kwargs in self._steps:
            function(value, *map(follow, args), **{key: follow(number) for key, number in kwargs.items()})
        return value


class _Watch(TorchFunctionMode):
    """Note the in-place operations that fill tensors, by the storage that they write to."""

    def __init__(self) -> None:
        super().__init__()
        self._steps: dict[int, list[Fill]] = {}
        self._alive: list[Tensor] = []  # so that no storage takes the address of another

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        value = func(*args, **named)
        name = getattr(func, "__name__", "")
        target = args[0] if args else named.get("tensor")
        if name in _KNOWN and isinstance(target, Tensor):
            self._note(func, name, target, args[1:], {key: kept for key, kept in named.items() if kept is not target})
        return value

    def steps_of(self, weight: Tensor) -> list[Fill]:
        """Return what filled a weight; empty where that is not known."""
        return self._steps.get(weight.untyped_storage()._cdata, [])

    def _note(self, func: Any, name: str, target: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        key = target.untyped_storage()._cdata
        if key not in self._steps:
            self._alive.append(target)
        numbers = not any(isinstance(value, Tensor) for value in (*args, *kwargs.values()))
        whole = target.numel() * target.element_size() == target.untyped_storage().nbytes()
        if not numbers or not whole:
            self._steps[key] = []  # filled from other tensors, or in part
        elif name in _OVERWRITE:
            self._steps[key] = [(func, args, kwargs)]
        elif self._steps.setdefault(key, []):
            self._steps[key].append((func, args, kwargs))


def _fans(module: nn.Module) -> dict[str, float]:
    """Return the numbers of inputs and outputs that the spread of a layer's weights can follow."""
    weight = getattr(module, "weight", None)
    if not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear)) or not isinstance(weight, Tensor):
        return {}
    positions = weight[0, 0].numel()
    groups = 1 if isinstance(module, nn.Linear) else module.groups
    inputs, outputs = weight.shape[1] * positions, weight.shape[0] * positions
    return {"in": inputs, "out": outputs, "out of a group": outputs // groups, "both": inputs + outputs}


def _rules(number: Any, fans: Mapping[str, float]) -> Iterator[Rule]:
    """Yield the fans, and the gains, that a number is the root of."""
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        return
    for fan, size in fans.items():
        for gain in _GAINS:
            if math.isclose(number * number * size, gain, rel_tol=1e-9):
                yield fan, gain


def _built(source: Source, names: Collection[str]) -> nn.Module | None:
    """Return what the source's builder makes, or the one nearest to it, which may differ in settings and layers.

    Args:
        source: What the record says of it.
        names: Names of the parameters of the network.
    """
    try:
        return rebuild(source)
    except CheckpointError:
        builder = source.builder or closest_builder(source, names)
    if not builder:
        return None
    with torch.random.fork_rng(devices=[]):
        return build(builder, source)


def sliced_weights(
    network: ConvertedNetwork, widths: Mapping[str, int], networks: int, method: str
) -> list[dict[str, Tensor]]:
    """Return the weights of the small networks as parts of those of `network`.

    Each takes one run of the channels of every width; the runs begin evenly from the first channel to the last that is
    possible, so that together they hold as many different ones as they can.

    Args:
        network: The undivided network; left as it is.
        widths: What `Rule.widths` returned.
        networks: S.
        method: Name of the method, for errors.
    """
    free = {path: width for width in free_widths(network) for path in width.members}
    states = []
    for index in range(networks):
        rewriter = Rewriter(copy.deepcopy(network), method)
        chosen = {path: _run(free[path], path, size, index / (networks - 1), network) for path, size in widths.items()}
        rewriter.scale(chosen, exact=False)
        states.append(rewriter.finish().state_dict())
    return states


def _run(width: Width, path: str, size: int, place: float, network: ConvertedNetwork) -> list[int]:
    whole = written_by(network.get_submodule(path))
    step = width.step * whole // width.size
    start = round(place * (whole - size) / step) * step
    return list(range(start, start + size))
