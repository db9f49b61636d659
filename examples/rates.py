"""How often the gates were open at the end of every epoch, in a file that goes on with a resumed run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import nn

from batches import labelled_batches
from machines import Machine
from splits import Split
from surgery_gated.gates import Stochastic
from surgery_gated.inference import inference
from surgery_gated.usage import measure
from training import Epoch


class RateLog:
    """A JSON file with one entry an epoch: what `measure` found on some training images.

    The gates are drawn as in training. An epoch that is trained again, since the run stopped before its checkpoint,
    replaces its entry and those behind it.

    Args:
        path: The file; after each epoch it is either the old one or the whole new one.
        images: What is measured on, without augmentation.
        machine: What trains; all its processes measure, the first writes.
    """

    def __init__(self, path: Path, images: Split, machine: Machine) -> None:
        """Store the arguments; nothing is read yet."""
        self.path, self.images, self.machine = path, images, machine

    def __call__(self, model: nn.Module, epoch: Epoch) -> None:
        """Measure, and write the entry of this epoch; to be called by `training.train`."""
        with inference(model, Stochastic()):
            usage = measure(model, labelled_batches(self.images))
        if not self.machine.leads:
            return
        number = epoch.epoch + 1
        kept = [entry for entry in self.read() if entry["epoch"] < number]
        temporary = self.path.with_name(f"{self.path.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps([*kept, {"epoch": number, **usage.to_dict()}]) + "\n", encoding="utf-8")
        os.replace(temporary, self.path)

    def read(self) -> list[dict[str, Any]]:
        """Return the entries of all epochs so far.

        Raises:
            ValueError: The file is damaged.
        """
        if not self.path.exists():
            return []
        try:
            entries: list[dict[str, Any]] = json.loads(self.path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(
                f"{self.path}: no JSON ({error}); delete it to go on without the epochs so far."
            ) from error
        return entries
