"""A training recipe: what is in a file of `recipes/`, checked and typed."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

# settings that do not change the numbers of a run, so a run may go on with others
FREE_SETTINGS = ("checkpoint_steps", "workers")
# settings that came later: at their defaults they are left out, so that a run from before can go on
LATER_SETTINGS = ("milestones", "gamma", "start", "warmup_prefix", "mixup")


class RecipeError(ValueError):
    """A recipe file says something that is not understood."""


@dataclass(frozen=True)
class Component:
    """A thing chosen by name, with the keyword arguments it is made with."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Training:
    """How a network is trained: SGD with a linear warm-up, a cosine and a constant end, or with steps down.

    Attributes:
        epochs: All epochs, warm-up and cool-down included.
        lr: Peak of the learning rate; groups of parameters with another rate follow the same curve in proportion.
        final_lr: Where the cosine ends.
        schedule: The curve behind the warm-up: "cosine" falls from `lr` to `final_lr`, "step" multiplies `lr` by
            `gamma` once each of the `milestones` is reached, "constant" stays at `lr`.
        milestones: Completed epochs, rising, for "step" alone.
        gamma: Factor of one step, in (0, 1], for "step" alone.
        warmup_epochs: First epochs, in which the rate rises linearly from `warmup_lr` to `lr`. They replace the start
            of the cosine and do not delay it (timm's convention), except with `warmup_prefix`.
        warmup_prefix: Whether the cosine begins behind the warm-up and runs over the other epochs alone (timm's word).
        cooldown_epochs: Last epochs, at `final_lr`.
        lr_unit: Whether the rate moves once an epoch or with every step.
        amp: Forward pass under bfloat16 autocast.
        augment: Whether the data's augmentation is used.
        mixup: Alpha of the beta distribution that images and labels of a batch are mixed with; 0 leaves them as they
            are.
        drop_last: Whether an incomplete last batch of an epoch is left out.
        checkpoint_steps: Steps between two checkpoints; one is also written at the end of every epoch.
        evaluate_epochs: Epochs between two evaluations on the test part; the last epoch always ends with one.
        workers: Processes that prepare batches; 0 prepares them in the training process.
        start: Which weights of the plain network the converted one begins with: "same", those that the plain network
            began with, or "trained", those that it ended with.
    """

    epochs: int = 10
    batch_size: int = 64
    lr: float = 0.1
    final_lr: float = 0.0
    schedule: Literal["cosine", "constant", "step"] = "cosine"
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    warmup_epochs: int = 0
    warmup_lr: float = 0.0
    cooldown_epochs: int = 0
    lr_unit: Literal["epoch", "step"] = "epoch"
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 0.0
    label_smoothing: float = 0.0
    amp: bool = False
    augment: bool = True
    drop_last: bool = False
    seed: int = 0
    checkpoint_steps: int = 500
    evaluate_epochs: int = 1
    workers: int = 0
    start: Literal["same", "trained"] = "same"
    warmup_prefix: bool = False
    mixup: float = 0.0

    def __post_init__(self) -> None:
        """Check the ranges that the types cannot say."""
        for key in ("epochs", "batch_size", "checkpoint_steps", "evaluate_epochs"):
            _require(getattr(self, key) >= 1, f"training.{key} is {getattr(self, key)}; expected at least 1.")
        _require(self.lr > 0, f"training.lr is {self.lr}; expected more than 0.")
        for key in ("final_lr", "warmup_epochs", "cooldown_epochs", "weight_decay", "workers", "seed", "mixup"):
            _require(getattr(self, key) >= 0, f"training.{key} is {getattr(self, key)}; expected at least 0.")
        _require(
            self.warmup_epochs + self.cooldown_epochs <= self.epochs,
            f"training.epochs is {self.epochs}, less than warmup_epochs + cooldown_epochs; raise it.",
        )
        _require(
            not self.warmup_prefix or self.schedule == "cosine",
            f'training.warmup_prefix belongs to schedule = "cosine", found {self.schedule!r}; leave it out.',
        )
        self._check_steps()

    def _check_steps(self) -> None:
        steps = self.milestones
        if self.schedule != "step":
            unused = not steps and self.gamma == Training.gamma
            message = f'training.milestones and training.gamma belong to schedule = "step", found {self.schedule!r};'
            _require(unused, f"{message} set the schedule, or leave them out.")
            return
        rising = all(before < after for before, after in zip((0, *steps), (*steps, self.epochs), strict=True))
        _require(
            bool(steps) and rising,
            f"training.milestones is {list(steps)}; expected rising epochs, at least one, from 1 to before "
            f"training.epochs = {self.epochs}.",
        )
        _require(0 < self.gamma <= 1, f"training.gamma is {self.gamma}; expected more than 0 and at most 1.")


@dataclass(frozen=True)
class Recipe:
    """One file of `recipes/`: the data, the network, the method and how it is trained."""

    data: Component = Component("digits")
    model: Component = Component("resnext29_8x4d")
    method: Component | None = None
    training: Training = field(default_factory=Training)

    @classmethod
    def from_toml(cls, path: str | Path) -> Recipe:
        """Read a recipe file with the tables [data], [model], [training] and, where there is a method, [method].

        Raises:
            RecipeError: The file is missing or no TOML, or has an unknown table, key or type of value.
        """
        try:
            tables = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise RecipeError(f"recipe {path}: no such file; the shipped ones are in examples/recipes.") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise RecipeError(f"recipe {path}: not a TOML file ({error}).") from error
        try:
            return cls.from_tables(tables)
        except RecipeError as error:
            raise RecipeError(f"recipe {path}: {error}") from error

    @classmethod
    def from_tables(cls, tables: Mapping[str, Any]) -> Recipe:
        """Build a recipe from nested dictionaries, as a TOML file gives them.

        Raises:
            RecipeError: A table or key is unknown, or a value has the wrong type.
        """
        known = ("data", "model", "method", "training")
        unknown = sorted(set(tables) - set(known))
        _require(not unknown, f"unknown tables {unknown}; a recipe has {', '.join(known)}.")
        for name, table in tables.items():
            _require(isinstance(table, dict), f"{name} is {table!r}; expected a table [{name}].")
        parts = {key: _component(key, tables[key]) for key in ("data", "model", "method") if key in tables}
        return cls(**parts, training=_training(tables.get("training", {})))

    def to_tables(self) -> dict[str, Any]:
        """Return the inverse of `from_tables`, every default written out."""
        parts = {"data": self.data, "model": self.model, "method": self.method}
        tables: dict[str, Any] = {k: {"name": v.name, **v.options} for k, v in parts.items() if v is not None}
        training = dataclasses.asdict(self.training)
        return {**tables, "training": {**training, "milestones": list(self.training.milestones)}}

    def identity(self) -> dict[str, Any]:
        """Return the settings that the numbers of a run follow from, as JSON values."""
        tables, default = self.to_tables(), Recipe().to_tables()["training"]
        tables["training"] = {
            key: value
            for key, value in tables["training"].items()
            if key not in FREE_SETTINGS and not (key in LATER_SETTINGS and value == default[key])
        }
        return tables

    def shortened(self, epochs: int) -> Recipe:
        """Return the recipe for so few epochs that there is no warm-up, cool-down or step."""
        changes: dict[str, Any] = {"epochs": epochs, "warmup_epochs": 0, "cooldown_epochs": 0}
        if self.training.schedule == "step":
            changes |= {"schedule": "constant", "milestones": (), "gamma": Training.gamma}
        return dataclasses.replace(self, training=dataclasses.replace(self.training, **changes))


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise RecipeError(message)


def _component(table: str, values: Mapping[str, Any]) -> Component:
    name = values.get("name")
    _require(isinstance(name, str), f"{table}.name is {name!r}; expected a name in quotes.")
    return Component(str(name), {key: value for key, value in values.items() if key != "name"})


def _training(values: Mapping[str, Any]) -> Training:
    types = get_type_hints(Training)
    unknown = sorted(set(values) - set(types))
    _require(not unknown, f"unknown keys {unknown} in [training]; it has {', '.join(types)}.")
    checked: dict[str, Any] = {key: _typed(key, value, types[key]) for key, value in values.items()}
    return Training(**checked)


def _typed(key: str, value: Any, expected: Any) -> object:
    if get_origin(expected) is Literal:
        _require(value in get_args(expected), f"training.{key} is {value!r}; expected one of {get_args(expected)}.")
        return value
    if get_origin(expected) is tuple:
        whole = isinstance(value, list | tuple) and all(type(item) is int for item in value)
        _require(whole, f"training.{key} is {value!r}; expected a list of whole numbers, such as [30, 60, 90].")
        return tuple(value)
    if expected is float and type(value) is int:
        return float(value)
    # `type() is`, since a TOML true would pass as the integer 1
    _require(type(value) is expected, f"training.{key} is {value!r}; expected {expected.__name__}.")
    return value
