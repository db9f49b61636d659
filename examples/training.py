"""An ordinary PyTorch training loop that can be stopped at any step and goes on with the same numbers.

Every random draw of a step follows from (seed, step): the batch and its augmentation (`batches.py`), and the global
generators, which are seeded anew before each forward pass. A resumed run therefore needs no generator state, prepares
the same batches with any number of workers, and repeats an uninterrupted one digit for digit on the same machine;
on CUDA only under `torch.use_deterministic_algorithms`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import checkpoints
from batches import Batches, Mixing, derive_seed, whole_batches
from data import Data
from interruption import stop, stop_signals
from machines import Machine, Processes
from recipe import Component, Recipe, RecipeError, Training
from reports import Epoch, Reporter, Step, StepLog, benchmark_ms, read_steps
from splits import Split

__all__ = [
    "Component", "Criterion", "Epoch", "Evaluation", "Recipe", "RecipeError", "Step", "Task", "Training",
    "benchmark_ms", "evaluate", "learning_rate", "read_steps", "set_seed", "train",
]  # fmt: skip

CHECKPOINT, STEPS = "training.safetensors", "steps.csv"

Groups = Callable[[nn.Module], list[dict[str, Any]]]


class Criterion(Protocol):
    """What `train` minimises; `surgery.Objective` is one."""

    @property
    def terms(self) -> Mapping[str, Tensor]:
        """The named parts of the last loss."""

    def __call__(self, output: Tensor, target: Tensor, progress: float) -> Tensor:
        """Return the loss; `progress` counts completed epochs."""


class Task:
    """Makes a `Criterion` of a plain loss, which knows of no progress and no terms."""

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Take the loss, for instance `nn.CrossEntropyLoss()`."""
        self._loss = loss
        self.terms: dict[str, Tensor] = {}

    def __call__(self, output: Tensor, target: Tensor, progress: float) -> Tensor:
        """Return the plain loss."""
        loss = self._loss(output, target)
        self.terms = {"task": loss}
        return loss


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Logits (N, K) and class indices (N,) of a split, on the CPU, and the accuracy in [0, 1]."""

    accuracy: float
    logits: Tensor
    targets: Tensor


@dataclass
class _State:
    """Where a run stands: completed steps, sums over the current epoch, completed epochs, bytes of the step log."""

    step: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    epochs: list[dict[str, Any]] = field(default_factory=list)
    log_bytes: int = 0


def set_seed(seed: int) -> None:
    """Seed the global generators of torch, before a network is built."""
    torch.manual_seed(seed)


def learning_rate(training: Training, epoch: float) -> float:
    """Return the learning rate after `epoch` epochs; the cosine is Loshchilov & Hutter 2017, eq. (5), no restarts."""
    if training.lr_unit == "epoch":
        epoch = math.floor(epoch)
    if epoch < training.warmup_epochs:
        return training.warmup_lr + (training.lr - training.warmup_lr) * epoch / training.warmup_epochs
    if training.schedule == "constant":
        return training.lr
    if training.schedule == "step":
        return training.lr * training.gamma ** sum(milestone <= epoch for milestone in training.milestones)
    start = training.warmup_epochs if training.warmup_prefix else 0
    part = min((epoch - start) / max(training.epochs - training.cooldown_epochs - start, 1), 1.0)
    return training.final_lr + (training.lr - training.final_lr) * (1 + math.cos(math.pi * part)) / 2


def evaluate(
    model: nn.Module,
    split: Split,
    *,
    batch_size: int = 256,
    device: str | torch.device = "cpu",
    amp: bool = False,
    workers: int = 0,
) -> Evaluation:
    """Classify a whole split without augmentation; the network keeps its train or eval mode."""
    mode, logits = model.training, []
    batches = whole_batches(split, batch_size, workers)
    model.eval()
    with torch.no_grad():
        for images in batches:
            with _autocast(device, amp):
                output = model(images.to(device))
            logits.append(output.float().cpu())
    model.train(mode)
    joined = torch.cat(logits)
    return Evaluation(float((joined.argmax(1) == split.targets).double().mean()), joined, split.targets)


def train(
    model: nn.Module,
    criterion: Criterion,
    data: Data,
    recipe: Recipe,
    *,
    run_dir: str | Path,
    groups: Groups | None = None,
    resume: bool = True,
    machine: Machine | None = None,
    progress: bool = True,
    label: str = "train",
    on_step: Callable[[Step], None] | None = None,
    on_epoch: Callable[[nn.Module, Epoch], None] | None = None,
) -> tuple[Epoch, ...]:
    """Train `model` in place as `recipe.training` says.

    Args:
        model: The network; it is moved to the machine's device first. `machine.finished` gives it back.
        criterion: Called as `criterion(output, target, progress)`; wrap a plain loss in `Task`.
        data: Its training part is learned, its test part evaluated.
        recipe: The whole recipe; a checkpoint of another one is refused.
        run_dir: Folder for the checkpoint and `steps.csv`.
        groups: Makes the parameter groups once the network is on the device, for instance with
            `surgery.param_groups`; without it all parameters decay by `weight_decay`.
        resume: Whether to go on from the checkpoint in `run_dir`; otherwise the run starts anew over it.
        machine: What to train on; None for the CPU, or for all processes of a process group.
        progress: Whether to show a bar on a terminal and a line per epoch elsewhere.
        label: What the bar or the lines begin with.
        on_step: Called after every step.
        on_epoch: Called with the network at the end of every epoch, before the checkpoint: a run that goes on has
            either called it for an epoch, or calls it again with the same network. All processes call it.

    Returns:
        What happened in every epoch, those before a resume included.

    Raises:
        CheckpointError: The checkpoint in `run_dir` is damaged or belongs to another run.
        FloatingPointError: The loss is infinite or not a number; the checkpoint is still the one before.
        SystemExit, KeyboardInterrupt: The run was told to stop, and has written a checkpoint.
    """
    machine = machine or Processes()
    run = _Run(model, criterion, data, recipe, Path(run_dir), groups, machine)
    state, started = run.start(resume=resume), time.perf_counter()
    with ExitStack() as stack:
        log = stack.enter_context(closing(StepLog(run.folder / STEPS, state.log_bytes))) if machine.leads else None
        # before the signal handlers, which worker processes would inherit
        loader = iter(run.batches.loader(state.step, run.total, recipe.training.workers))
        signals = stack.enter_context(stop_signals())
        reporter = stack.enter_context(Reporter(label, run.total, state.step, visible=progress and machine.leads))
        for images, targets in loader:
            step = run.step(state.step, images, targets)
            _count(state, step)
            if log:
                log.write(step)
            reporter.step(step, len(targets))
            finished = state.step % run.batches.per_epoch == 0
            if finished:
                epoch = run.finish_epoch(state, step, time.perf_counter() - started)
                reporter.epoch(epoch)
                if on_epoch:
                    on_epoch(model, epoch)
                started = time.perf_counter()
            # a signal reaches the processes between different steps
            told = machine.agree(signals[0] if signals else 0)
            if finished or told or state.step % recipe.training.checkpoint_steps == 0:
                run.save(state, log)
            if told:
                stop(told)
            if on_step:
                on_step(step)
    return tuple(Epoch(**epoch) for epoch in state.epochs)


class _Run:
    """What stays the same during a run, and the work on it."""

    def __init__(
        self,
        model: nn.Module,
        criterion: Criterion,
        data: Data,
        recipe: Recipe,
        folder: Path,
        groups: Groups | None,
        machine: Machine,
    ) -> None:
        self.training, self.folder, self.machine = recipe.training, folder, machine
        self.model, self.criterion, self.data = model, criterion, data
        self.runner = machine.place(model)
        t = self.training
        made = groups(model) if groups else [{"params": [p for p in model.parameters() if p.requires_grad]}]
        self.optimizer = torch.optim.SGD(
            made, lr=t.lr, momentum=t.momentum, nesterov=t.nesterov, weight_decay=t.weight_decay
        )
        self._rates = [group["lr"] for group in self.optimizer.param_groups]
        self.batches = Batches(
            data.train,
            t.batch_size,
            t.seed,
            augment=t.augment,
            drop_last=t.drop_last,
            rank=machine.rank,
            world=machine.processes,
            mixing=Mixing(t.mixup, len(data.classes)) if t.mixup else None,
        )
        self.total = t.epochs * self.batches.per_epoch
        self._identity = {
            "recipe": recipe.identity(),
            "data": {"name": data.name, "train": len(data.train), "test": len(data.test)},
        }
        if machine.processes > 1:  # their number decides what is drawn and what norms see
            self._identity["processes"] = machine.processes

    def start(self, *, resume: bool) -> _State:
        """Make the folder and restore what the checkpoint in it holds."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path, log = self.folder / CHECKPOINT, self.folder / STEPS
        if self.machine.leads:
            checkpoints.tidy(path)
            if not resume:
                path.unlink(missing_ok=True)
        self.machine.agree(0)
        if not path.exists():
            return _State()
        checkpoint = checkpoints.read(path)
        checkpoints.require_same_run(path, checkpoint.identity, self._identity)
        checkpoints.restore(path, checkpoint, self.model, self.optimizer, self.machine)
        state = _State(**checkpoint.progress)
        if self.machine.leads and (not log.exists() or log.stat().st_size < state.log_bytes):
            message = f"checkpoint {path}: {log.name} beside it is missing or shortened; delete both to start anew."
            raise checkpoints.CheckpointError(message)
        return state

    def step(self, index: int, images: Tensor, targets: Tensor) -> Step:
        """Do one optimizer step."""
        done = index / self.batches.per_epoch
        rate = learning_rate(self.training, done)
        for group, base in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = base * (rate / self.training.lr)
        self.runner.train()
        self.machine.seed(derive_seed("step", self.training.seed, index, self.machine.rank))
        images, targets = self.machine.load(images), self.machine.load(targets)
        with _autocast(self.machine.device, self.training.amp):
            loss = self.criterion(self.runner(images), targets, done)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        terms = self.criterion.terms
        values = torch.stack([value.detach() for value in (loss, *terms.values())])
        self.machine.update(self.optimizer)
        total, *parts = self.machine.mean(values)
        if not math.isfinite(total):
            raise FloatingPointError(f"training: the loss is {total} at step {index}; lower training.lr.")
        return Step(index, index // self.batches.per_epoch, rate, total, dict(zip(terms, parts, strict=True)))

    def finish_epoch(self, state: _State, step: Step, seconds: float) -> Epoch:
        """Evaluate where it is time to, and add the epoch to the history."""
        last = state.step == self.total
        accuracy = None
        if last or (step.epoch + 1) % self.training.evaluate_epochs == 0:
            t = self.training
            evaluated = evaluate(self.model, self.data.test, device=self.machine.device, amp=t.amp, workers=t.workers)
            accuracy = evaluated.accuracy
        means = {name: value / self.batches.per_epoch for name, value in state.sums.items()}
        terms = {name.removeprefix("term "): mean for name, mean in means.items() if name != "loss"}
        epoch = Epoch(step.epoch, step.lr, means["loss"], terms, accuracy, seconds)
        state.sums = {}
        state.epochs.append(asdict(epoch))
        return epoch

    def save(self, state: _State, log: StepLog | None) -> None:
        """Write the checkpoint of what has been logged; all processes give what they have of it, the first writes."""
        if log:
            state.log_bytes = log.flush()
        made = checkpoints.collect(self.model, self.optimizer, self._identity, asdict(state), self.machine)
        if log:
            checkpoints.write(self.folder / CHECKPOINT, made)


def _count(state: _State, step: Step) -> None:
    state.step += 1
    for name, value in {"loss": step.loss, **{f"term {k}": v for k, v in step.terms.items()}}.items():
        state.sums[name] = state.sums.get(name, 0.0) + value


def _autocast(device: str | torch.device, amp: bool) -> torch.autocast:
    return torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=amp)
