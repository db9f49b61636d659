"""The figures of the example, drawn with matplotlib into PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

import surgery
from training import Epoch

BLUE, ORANGE, GREY = "#2a6fbb", "#d9822b", "#8a8f98"
STYLE = {"axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left", "font.size": 10}


def draw_training(
    plain: Sequence[Epoch], converted: Sequence[Epoch], path: Path, *, method: str, term: str, label: str
) -> None:
    """Draw test accuracy and losses of both networks over the epochs; `term` is the loss that the method adds."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.4), layout="constrained")
        accuracy, loss = figure.subplots(1, 2)
        for epochs, name, colour in ((plain, "plain", GREY), (converted, method, BLUE)):
            known = [(epoch.epoch + 1, epoch.accuracy) for epoch in epochs if epoch.accuracy is not None]
            accuracy.plot(*zip(*known, strict=True), color=colour, label=name, marker="o", markersize=3)
            task = [epoch.terms["task"] for epoch in epochs]
            loss.plot([e.epoch + 1 for e in epochs], task, color=colour, label=f"{name}, task", marker=".")
        terms = [epoch.terms[term] for epoch in converted]
        loss.plot([e.epoch + 1 for e in converted], terms, color=ORANGE, label=f"{method}, {label}", marker=".")
        accuracy.set(title="Test accuracy", xlabel="epoch", ylim=(None, 1.0))
        loss.set(title="Training loss", xlabel="epoch", yscale="log")
        for axes in (accuracy, loss):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        accuracy.legend(frameon=False, loc="lower right")
        loss.legend(frameon=False)
        figure.savefig(path, dpi=150)


def draw_energies(
    coded: surgery.ConvertedNetwork, energies: Mapping[str, Tensor], classes: Sequence[str], path: Path
) -> None:
    """Draw the codewords and the mean energies of branch and class, for the last coded block of each stage."""
    last = {block.stage: block for block in coded.meta["architecture"].blocks if block.path in energies}
    rows = min(len(classes), 20)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8, 3.6 * len(last)), layout="constrained")
        grid = figure.subplots(len(last), 2, squeeze=False)
        for axes, block in zip(grid, last.values(), strict=True):
            module = coded.get_submodule(block.merge)
            share = (energies[block.path] * module.ratio)[:rows]
            pictures = ((module.codewords[:rows].float(), "codewords"), (share, "ratio x mean energy on test images"))
            for axis, (picture, title) in zip(axes, pictures, strict=True):
                image = axis.imshow(picture, cmap="Blues", vmin=0, vmax=1.2, aspect="auto")
                axis.set(
                    title=f"{block.path}: {title}", xlabel="branch", yticks=range(rows), yticklabels=classes[:rows]
                )
            figure.colorbar(image, ax=list(axes), shrink=0.8)
        figure.savefig(path, dpi=150)


def draw_binary(logits: Tensor, positive: Tensor, threshold: float, name: str, path: Path) -> None:
    """Draw the outputs of the one-class network for test images of the class and for all others."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6, 3.4), layout="constrained")
        axes = figure.subplots()
        edges = torch.linspace(float(logits.min()), float(logits.max()), 41).tolist()
        for chosen, label, colour in ((~positive, "other classes", GREY), (positive, f"class {name!r}", BLUE)):
            axes.hist(logits[chosen].tolist(), bins=edges, color=colour, alpha=0.8, label=label, density=True)
        axes.axvline(threshold, color=ORANGE, label="threshold, chosen on training images")
        axes.set(title=f"Output of the network cut out for {name!r}", xlabel="logit", ylabel="density of test images")
        axes.legend(frameon=False)
        figure.savefig(path, dpi=150)
