"""One small network taught by all: what the ensemble knows, at the cost of its best member.

CE(student, target) + weight * T^2 * KL(softmax(teacher / T) || softmax(student / T)), the mean over the batch, computed
from logarithms and in float32 at least.

Reference:
    Hinton et al., 2015, section 2; the factor T^2 keeps the gradients of both terms in proportion.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sized
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surgery import ConvertedNetwork, param_groups, prune
from surgery.errors import InvalidOption
from surgery.objective import unwrap
from surgery.taps import undisturbed
from surgery_divided.ensemble import ensemble_of
from surgery_divided.loss import at_least_single
from surgery_divided.scores import best_member, evaluating


class Loader(Protocol):
    """Batches of images and targets, any number of times, such as a DataLoader or a list."""

    def __len__(self) -> int:
        """Return the number of batches."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches."""


class Distillation(nn.Module):
    """The criterion of a student: its task loss, and how far it is from the teacher.

    The teacher is held without being registered: the criterion has no parameters, and its mode and device do not touch
    the teacher. That runs in eval mode and without gradient, and is in its own mode again behind it.

    Args:
        teacher: Maps images to logits, such as a divided network to those of its ensemble.
        temperature: T, above 0; at a higher one the wrong classes count more.
        weight: Weight of the divergence, at least 0.
        criterion: The task loss; cross entropy by default.
    """

    def __init__(
        self,
        teacher: nn.Module,
        temperature: float = 1.0,
        weight: float = 1.0,
        *,
        criterion: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if not 0 < temperature < math.inf or not 0 <= weight < math.inf:
            raise InvalidOption(
                f"Distillation: found temperature={temperature!r} and weight={weight!r}, expected finite numbers, the "
                "first above 0, the second at least 0"
            )
        self.temperature, self.weight = temperature, weight
        self.criterion = nn.CrossEntropyLoss() if criterion is None else criterion
        self._teacher = (teacher,)

    def forward(self, logits: Tensor, target: Tensor, images: Tensor) -> Tensor:
        """Return the loss of a batch.

        Args:
            logits: (B, classes) of the student.
            target: What the task loss takes.
            images: What the teacher sees; with S views, each member sees its own.
        """
        (teacher,) = self._teacher
        with torch.no_grad(), evaluating(teacher), undisturbed(teacher):
            taught: Tensor = teacher(images)
        task: Tensor = self.criterion(logits, target)
        return task + self.weight * distance(taught, logits, self.temperature)

    def extra_repr(self) -> str:
        """Return the numbers for `print(criterion)`."""
        return f"temperature={self.temperature}, weight={self.weight}"


def distance(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """Return T^2 * KL(teacher || student), the mean over the batch, in nats.

    Args:
        teacher: (B, classes) logits.
        student: As well.
        temperature: T, which both are divided by.
    """
    taught, said = (at_least_single(logits).div(temperature).log_softmax(-1) for logits in (teacher, student))
    return temperature**2 * F.kl_div(said, taught, reduction="batchmean", log_target=True)


def distil(
    model: nn.Module,
    loader: Loader,
    *,
    member: int | None = None,
    epochs: int = 1,
    lr: float = 0.01,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    temperature: float = 1.0,
    weight: float = 1.0,
) -> ConvertedNetwork:
    """Cut out the best small network and train it to say what the ensemble says; the given model is left untouched.

    SGD with Nesterov momentum and a cosine from `lr` to 0, a step a batch. With S views of each image the student sees
    the one that it saw as a member, the ensemble all. For anything else, cut out a member by `surgery.prune` and train
    it in your own loop with `Distillation`.

    Args:
        model: A divided network, trained.
        loader: Yields images and class indices.
        member: Which one to cut out; by default the most accurate on the images of `loader`.
        epochs: How often the loader is passed through, at least once.
        lr: Learning rate of the first step.
        momentum: Momentum of SGD, above 0.
        weight_decay: Weight decay, see `surgery.param_groups`.
        temperature: See `Distillation`.
        weight: As well.

    Returns:
        The pruned network, trained, in the mode of `model`.

    Raises:
        InvalidOption: If the loader has no batch, or a number cannot be used.
        UnsupportedModel: If `model` is no divided network.
    """
    network = unwrap(model)
    ensemble_of(network)
    criterion = Distillation(network, temperature, weight)
    if not isinstance(loader, Sized):
        raise InvalidOption(
            f"distil: found a {type(loader).__name__}, expected batches that can be passed through several times, such "
            "as a DataLoader or a list"
        )
    if len(loader) < 1 or epochs < 1:
        raise InvalidOption(f"distil: found {len(loader)} batches and epochs={epochs}, expected at least one of each")
    chosen = best_member(network, loader) if member is None else member
    student = prune(network, members=[chosen])
    optimizer = torch.optim.SGD(param_groups(student, lr, weight_decay), lr=lr, momentum=momentum, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
    device = next(student.parameters()).device
    student.train()
    for _ in range(epochs):
        for batch, labels in loader:
            images = batch.to(device)
            optimizer.zero_grad()
            criterion(student(images), labels.to(device), images).backward()
            optimizer.step()
            schedule.step()
    return student.train(network.training)
