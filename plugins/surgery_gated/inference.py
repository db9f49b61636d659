"""How a network with gates answers: by a threshold, with all gates open, by one draw, or by a vote of several draws.

`batches` stands for any iterable of (images, targets), such as a DataLoader. The networks run in eval mode, without
gradients, where their parameters are; modes, gates and taps are left as they were found.

Reference: Herrmann, Bowen & Zabih, Channel selection using Gumbel Softmax (2020), supplement, sections 3 and 4.3.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from numbers import Integral
from statistics import fmean, stdev
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

import surgery
from surgery import ConvertedNetwork
from surgery.errors import InvalidOption
from surgery.taps import undisturbed
from surgery_gated.gates import AlwaysOn, Gates, Mode, Stochastic, Threshold
from surgery_gated.transform import gated_blocks

How = Literal["threshold", "always_on", "stochastic", "ensemble"]


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a network with gates says of B images.

    Attributes:
        how: How it was asked.
        classes: Its decision (B, top) int64, best first. "stochastic": that of the first run, as a network that draws
            its gates answers by one draw. "ensemble": the vote of the runs, see `vote`.
        mean_classes: Decision (B, top) by `probabilities`; equals `classes` where there is one run.
        probabilities: Softmax (B, K) in at least float32, the mean over the runs.
        runs: Logits (R, B, K) of every run; R = 1 for "threshold" and "always_on".
    """

    how: How
    classes: Tensor
    mean_classes: Tensor
    probabilities: Tensor
    runs: Tensor

    @property
    def run_classes(self) -> Tensor:
        """The decision of every run by itself, (R, B, top)."""
        return _best(self.runs, self.classes.shape[1])


@dataclass(frozen=True)
class Accuracy:
    """How often a network with gates is right: the target is among the `top` classes of its decision.

    Attributes:
        how: How it was asked.
        images: Number of images.
        top: Number of classes of a decision.
        accuracy: Share of the images. "stochastic": the mean of `runs`. "ensemble": that of the vote.
        deviation: Standard deviation of `runs`, with R - 1 in the denominator; 0 for one run.
        mean_probability: Share of the images for the decision by the mean probabilities of the runs.
        runs: Share of the images for every run by itself.
    """

    how: How
    images: int
    top: int
    accuracy: float
    deviation: float
    mean_probability: float
    runs: tuple[float, ...]


def gates_in(model: nn.Module, where: str) -> list[Gates]:
    """Return the gates of a network, in the order of its blocks.

    Raises:
        InvalidOption: If it has none; the message begins with `where`.
    """
    gates = [gates for _, gates in gated_blocks(model)] if isinstance(model, ConvertedNetwork) else []
    if not gates:
        found = type(model).__name__
        raise InvalidOption(f"{where}: found no gate in this {found}; convert it first, or unwrap it (model.module)")
    return gates


def set_inference(model: nn.Module, mode: Mode) -> None:
    """Let all gates decide by `mode` in eval mode, from now on.

    Raises:
        InvalidOption: If the network has no gates, or `mode` is no mode.
    """
    gates = gates_in(model, "set_inference")
    if not isinstance(mode, Mode):
        raise InvalidOption(f"set_inference: found {mode!r}, expected Threshold(tau), AlwaysOn() or Stochastic()")
    for module in gates:
        module.mode = mode


@contextmanager
def inference(model: nn.Module, mode: Mode) -> Iterator[None]:
    """Let all gates decide by `mode` in eval mode inside of this context; each has its own mode back behind it.

    Raises:
        InvalidOption: If the network has no gates, or `mode` is no mode.
    """
    before = [(module, module.mode) for module in gates_in(model, "inference")]
    try:
        set_inference(model, mode)
        yield
    finally:
        for module, own in before:
            module.mode = own


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Let a network run in eval mode inside of this context; every module has its own mode back behind it."""
    before = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in before:
            module.training = training


@torch.no_grad()
def predict(
    model: nn.Module,
    images: Tensor,
    how: How = "threshold",
    *,
    tau: float = 0.5,
    runs: int = 5,
    top: int = 1,
    seed: int | None = None,
) -> Prediction:
    """Ask a network with gates about a batch of images.

    Args:
        model: The network, in any mode.
        images: The batch; it is moved to the device of the model.
        how: "threshold": gates are open where their probability exceeds `tau`. "always_on": all are open. "stochastic":
            they are drawn, in `runs` runs that stand by themselves. "ensemble": the same runs, which vote.
        tau: For "threshold" only.
        runs: For "stochastic" and "ensemble" only.
        top: Number of classes of a decision.
        seed: Of the draws, which then leave the global random state as it was; default: they come from it.

    Shape:
        images (B, C, H, W).

    Raises:
        InvalidOption: If the network has no gates, `how` is unknown, a number is out of range, or `seed` is given for a
            device that is neither CPU nor CUDA.
    """
    mode, runs = _asked(how, tau, runs, top)
    device = next(gates_in(model, "predict")[0].parameters()).device
    with inference(model, mode), evaluating(model), undisturbed(model), _seeded(seed, device):
        images = images.to(device)
        logits = torch.stack([model(images) for _ in range(runs)])
    if top > logits.shape[-1]:
        raise InvalidOption(f"predict: found top={top}, expected at most {logits.shape[-1]}, the number of classes")
    probabilities = _mean_probabilities(logits)
    decided = vote(logits, top) if how == "ensemble" else _best(logits[0], top)
    mean_classes = _best(probabilities, top) if runs > 1 else decided  # a softmax can make ties of what is none
    return Prediction(how, decided, mean_classes, probabilities, logits)


def vote(logits: Tensor, top: int = 1) -> Tensor:
    """Return the classes that are most frequent among the `top` best of each run, most frequent first.

    For `top` = 1 that is the majority of the runs; for 5 runs and `top` = 5, the five most frequent of 25. Ties are
    broken by the mean probability over the runs, then by the smaller class index.

    Args:
        logits: Outputs of every run.
        top: Number of classes to return.

    Shape:
        logits (R, B, K); returns (B, top) int64.
    """
    probabilities = _mean_probabilities(logits)
    votes = torch.zeros_like(probabilities)
    for best in _best(logits, top):
        votes = votes.scatter(1, best, votes.gather(1, best) + 1)  # a run names no class twice
    by_probability = probabilities.argsort(dim=1, descending=True, stable=True)
    by_votes = votes.gather(1, by_probability).argsort(dim=1, descending=True, stable=True)
    return by_probability.gather(1, by_votes)[:, :top]


def evaluate(
    model: nn.Module,
    batches: Iterable[Any],
    how: How = "threshold",
    *,
    tau: float = 0.5,
    runs: int = 5,
    top: int = 1,
    seed: int | None = None,
) -> Accuracy:
    """Count how often a network with gates is right.

    Args:
        model: The network, in any mode.
        batches: Yields (images, targets): (B, C, H, W) and (B,) class indices.
        how: As in `predict`.
        tau: For "threshold" only.
        runs: For "stochastic" and "ensemble" only.
        top: An image counts if its target is among so many classes.
        seed: Of the draws; they also depend on how the images are divided into batches.

    Raises:
        InvalidOption: As `predict`, or if there is no image.
    """
    repeats = _asked(how, tau, runs, top)[1]
    seeds = None if seed is None else torch.Generator().manual_seed(seed)
    images, hits, by_mean, by_run = 0, 0, 0, torch.zeros(repeats, dtype=torch.int64)
    for batch, targets in batches:
        own = None if seeds is None else int(torch.randint(2**62, (), generator=seeds))
        found = predict(model, batch, how, tau=tau, runs=runs, top=top, seed=own)
        truth = targets.to(found.classes.device)[:, None]
        images += len(batch)
        hits += int((found.classes == truth).sum())
        by_mean += int((found.mean_classes == truth).sum())
        by_run += (found.run_classes == truth).sum(dim=(1, 2)).cpu()
    if not images:
        raise InvalidOption("evaluate: found no image, expected batches of images and targets")
    shares = (by_run.double() / images).tolist()
    accuracy = fmean(shares) if how == "stochastic" else hits / images
    deviation = stdev(shares) if repeats > 1 else 0.0
    return Accuracy(how, images, top, accuracy, deviation, by_mean / images, tuple(shares))


def recalibrate(model: nn.Module, loader: Iterable[Any], batches: int = 210, *, mode: Mode | None = None) -> int:
    """Re-estimate the batch-norm statistics of a network with gates, in place, for the way in which its gates decide.

    What training gathered are averages over draws of gates that were still changing; behind a threshold other layers
    and channels are open, and those statistics no longer fit. The authors re-estimate before every evaluation, over
    about 210 training batches with gates that are drawn, and say that it matters a lot. Nothing is skipped meanwhile: a
    body sees all images, as in training, also those it is closed for.

    Args:
        model: The network, in any mode.
        loader: Yields training batches: images, or tuples that begin with them.
        batches: At most so many are used; the number of those that were is returned.
        mode: How the gates decide meanwhile, `Stochastic()` for the authors' way; default: their current mode.

    Raises:
        InvalidOption: If the network has no gates, `mode` is no mode, or there is no batch.
    """
    before = [(module, module.skipping) for module in gates_in(model, "recalibrate")]
    try:
        for module, _ in before:
            module.skipping = False
        with nullcontext() if mode is None else inference(model, mode):
            return surgery.recalibrate_bn(model, loader, batches)
    finally:
        for module, skipping in before:
            module.skipping = skipping


def _asked(how: How, tau: float, runs: int, top: int) -> tuple[Mode, int]:
    """Return the mode of the gates and the number of runs."""
    if how not in get_args(How):
        raise InvalidOption(f"predict: found how={how!r}, expected one of {', '.join(get_args(How))}")
    for name, value in (("runs", runs), ("top", top)):
        if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
            raise InvalidOption(f"predict: found {name}={value!r}, expected a whole number of at least 1")
    if how == "always_on":
        return AlwaysOn(), 1
    return (Threshold(tau), 1) if how == "threshold" else (Stochastic(), runs)


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    if seed is not None and device.type not in ("cpu", "cuda"):
        raise InvalidOption(f"predict: found seed={seed} on {device}, expected none there; seed the device yourself")
    own = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=own, enabled=seed is not None):
        if seed is not None:
            # torch.manual_seed would reseed every device, also those whose state is not forked.
            for generator in (torch.default_generator, *(torch.cuda.default_generators[d.index] for d in own)):
                generator.manual_seed(seed)
        yield


def _mean_probabilities(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=-1).mean(dim=0)


def _best(scores: Tensor, top: int) -> Tensor:
    """Return the indices of the `top` largest of the last dimension; of equal ones the first."""
    return scores.argsort(dim=-1, descending=True, stable=True)[..., :top]
