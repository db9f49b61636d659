"""A plain network and a converted one, trained side by side under the same budget."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

import surgery
from data import Data
from machines import Machine
from networks import build
from recipe import Component, Recipe
from training import Epoch, Task, set_seed, train


@dataclass(frozen=True)
class Pair:
    """The trained networks, in eval mode, and how their training went."""

    plain: nn.Module
    converted: surgery.ConvertedNetwork
    plain_epochs: tuple[Epoch, ...]
    converted_epochs: tuple[Epoch, ...]


def train_both(
    recipe: Recipe,
    data: Data,
    run_dir: Path,
    method: Component,
    *,
    resume: bool,
    machine: Machine,
    seen: Data | None = None,
    on_epoch: Callable[[nn.Module, Epoch], None] | None = None,
) -> Pair:
    """Train the plain network in `run_dir/plain`, and the one converted from it in `run_dir/<method>`.

    Every process of the machine gets both, whole, where they are to be measured.

    Args:
        recipe: `recipe.training.start` says which weights of the plain network the converted one begins with.
        data: Both see the same batches, unless `seen` says otherwise.
        run_dir: Folder of the run.
        method: What to convert with.
        resume: Whether to go on from the checkpoints in the folders.
        machine: What to train on.
        seen: What the converted network is trained and tested on, where it is not `data`.
        on_epoch: Called with the converted network at the end of each of its epochs.
    """
    set_seed(recipe.training.seed)
    plain = build(recipe.model, len(data.classes))

    def convert() -> surgery.ConvertedNetwork:
        return surgery.convert(copy.deepcopy(plain), method.name, input_size=data.image_size, **method.options)

    def groups(model: nn.Module) -> list[dict[str, Any]]:
        return surgery.param_groups(model, lr=recipe.training.lr, weight_decay=recipe.training.weight_decay)

    loss = nn.CrossEntropyLoss(label_smoothing=recipe.training.label_smoothing)
    kwargs: dict[str, Any] = {"groups": groups, "resume": resume, "machine": machine}
    from_start = convert() if recipe.training.start == "same" else None
    before = train(plain, Task(loss), data, recipe, run_dir=run_dir / "plain", label="plain", **kwargs)
    plain = machine.finished(plain)
    if from_start is None:
        # where training left the generator depends on where it was resumed
        set_seed(recipe.training.seed)
    converted = from_start or convert()
    objective = surgery.Objective(converted, loss)
    kwargs["on_epoch"] = on_epoch
    after = train(
        converted, objective, seen or data, recipe, run_dir=run_dir / method.name, label=method.name, **kwargs
    )
    return Pair(plain.eval(), machine.finished(converted).eval(), before, after)
