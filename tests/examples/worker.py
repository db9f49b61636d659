"""Trainings for `test_machines.py`, in processes of their own: python worker.py FOLDER DEVICE STAGE [PARALLEL ...]

Each trains two networks in folders for each way of sharing: "linear" has no norm and is in float64, so that its
numbers do not depend on how a batch is shared; "masked" has norms, and masks whose gradients no wrapper knows of.
XLA, which compiles for long, gets the first alone.

Stages: "whole" trains to the end, also what was interrupted; "stopped" gets SIGTERM in the last process alone, and
"killed" SIGKILL.
"""

import os
import signal
import sys
from pathlib import Path

import timm
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import splits
import surgery
import training
from data import Data
from machines import start
from recipe import Recipe, Training

STOP = 5
RECIPE = Recipe(training=Training(epochs=2, batch_size=8, lr=0.05, checkpoint_steps=2, lr_unit="step", augment=False))


class Doubles(splits.MemorySplit):
    """Images in float64."""

    def batch(self, indices, seed=None):
        return super().batch(indices, seed).double()


def tiny_data(kind):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (44, 3, 8, 8), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 4, (44,), generator=generator)
    parts = [kind(images[s], labels[s], (0.5,) * 3, (0.25,) * 3) for s in (slice(36), slice(36, 44))]
    return Data("tiny", *parts, tuple("abcd"), 8, (0.5,) * 3, (0.25,) * 3)


def linear():
    torch.manual_seed(1)
    layers = nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(216, 4)
    return nn.Sequential(*layers).double(), training.Task(nn.CrossEntropyLoss()), tiny_data(Doubles)


def masked():
    torch.manual_seed(1)
    source = timm.create_model("resnext11_4x4d", num_classes=4)
    model = surgery.convert(source, "masked", fan_in=2, mask_lr=1.0, input_size=8)
    return model, surgery.Objective(model, nn.CrossEntropyLoss()), tiny_data(splits.MemorySplit)


def run(folder, machine, made, stage):
    model, criterion, data = made

    def on_step(step):
        if step.step == STOP and machine.rank == machine.processes - 1 and stage != "whole":
            os.kill(os.getpid(), signal.SIGTERM if stage == "stopped" else signal.SIGKILL)

    training.train(model, criterion, data, RECIPE, run_dir=folder, machine=machine, progress=False, on_step=on_step)
    return machine.finished(model)


def main(folder, device, stage, *parallel):
    makes = {"linear": linear} if device == "xla" else {"linear": linear, "masked": masked}
    for way in parallel or (None,):
        machine = start(device, way)
        for name, make in makes.items():
            place = Path(folder) / f"{way or device}-{name}"
            try:
                trained = run(place, machine, make(), stage)
            except SystemExit as stopped:
                if stage != "stopped" or stopped.code != 128 + signal.SIGTERM:
                    raise
                continue
            if machine.leads:
                torch.save(trained.state_dict(), place / "trained.pt")
    machine.leave()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
