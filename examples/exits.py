"""Classifiers behind some blocks of a plain network: shallow sub-networks, to compare thin ones with."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, fx, nn

import surgery
from surgery import Architecture, Block
from surgery.analysis import analyze
from surgery.models.network import init_classifier
from surgery.network import SurgeryModule


class ShallowExits(nn.Module):
    """A network with K exits: the last is its own classifier, the others stand behind evenly spaced blocks.

    Exit i is behind block ceil(i * blocks / K); with 9 blocks and 8 exits these are all but the first, as in the paper.

    Args:
        network: A plain network, which is left as it is.
        exits: K, at least 1 and at most the number of blocks.
        input_size: As in `surgery.inspect`.

    Attributes:
        trunk: The network, which also returns what the blocks in front of a classifier do.
        heads: The classifiers of the exits 1 to K - 1.
        blocks: Paths of the blocks behind which the exits are; that of the last is where the network ends.
        logits: Of all exits, (B, classes) each, after a training forward, until `ExitsLoss` takes them.

    Raises:
        ValueError: There are not so many blocks, or no classifier.
        TraceError, UnsupportedModel: The network cannot be inspected.

    Shape:
        (B, channels, H, W) to (B, classes), those of the last exit.

    Reference: Lee & Shin, Anytime neural prediction via slicing networks vertically (2018), section 4.1.
    """

    def __init__(self, network: nn.Module, exits: int, input_size: int | tuple[int, int] | None = None) -> None:
        super().__init__()
        network = copy.deepcopy(network)
        architecture, nested = analyze(network, input_size)
        chosen = _evenly(architecture, exits)
        classes = _classes(architecture)
        values = _calls(nested.root, [block.path for block in chosen[:-1]])
        _return(nested.root, values)
        self.trunk = SurgeryModule.assemble(network, nested.root)
        weight = next(network.parameters())
        self.heads = nn.ModuleList(_head(block, classes).to(weight.device, weight.dtype) for block in chosen[:-1])
        self.blocks = tuple(block.path for block in chosen)
        self.logits: tuple[Tensor, ...] = ()
        self._size = architecture.input_size[1:]

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of the last exit; in training keep those of all."""
        *values, last = self.trunk(images)
        if self.training:
            early = (head(value) for head, value in zip(self.heads, values, strict=True))
            self.logits = (*early, last)
        logits: Tensor = last
        return logits

    def alone(self, number: int) -> nn.Module:
        """Return the shallow network that ends at an exit, 1 to K, with copies of the weights.

        Raises:
            ValueError: There is no such exit.
        """
        if not 1 <= number <= len(self.blocks):
            raise ValueError(f"exits: found exit {number}, expected 1 (the shallowest) to {len(self.blocks)}.")
        trunk = copy.deepcopy(self.trunk)
        (end,) = trunk.graph.find_nodes(op="output")
        trunk.graph.output(end.args[0][number - 1])
        trunk.graph.erase_node(end)
        trunk.graph.eliminate_dead_code()
        trunk.recompile()
        trunk.delete_all_unused_submodules()
        if number == len(self.blocks):
            return trunk
        return nn.Sequential(trunk, copy.deepcopy(self.heads[number - 1])).train(self.training)

    def macs(self) -> tuple[int, ...]:
        """Return the multiply-adds of one image up to each exit, with the classifier there alone."""
        return tuple(surgery.cost(self.alone(number + 1), self._size).macs for number in range(len(self.blocks)))


class ExitsLoss:
    """The sum of the losses of all exits, to be minimised by `training.train`.

    Args:
        model: The network.
        loss: Of one exit, such as `nn.CrossEntropyLoss()`.

    Attributes:
        terms: "task" is the loss of the last exit, "exits" the sum of those of the others.
    """

    def __init__(self, model: ShallowExits, loss: nn.Module) -> None:
        self.model, self.loss = model, loss
        self.terms: dict[str, Tensor] = {}

    def __call__(self, output: Tensor, target: Tensor, progress: float) -> Tensor:
        """Return the loss of the last training forward."""
        *early, _ = self.model.logits
        self.model.logits = ()
        self.terms = {"task": self.loss(output, target)}
        if early:
            self.terms["exits"] = torch.stack([self.loss(logits, target) for logits in early]).sum()
        return torch.stack(list(self.terms.values())).sum()


def _evenly(architecture: Architecture, exits: int) -> list[Block]:
    blocks = architecture.blocks
    if not 1 <= exits <= len(blocks):
        raise ValueError(
            f"exits: {architecture.name} has {len(blocks)} blocks, found exits={exits}; expected 1 to {len(blocks)}."
        )
    return [blocks[-(-number * len(blocks) // exits) - 1] for number in range(1, exits + 1)]


def _classes(architecture: Architecture) -> int:
    if architecture.head.classes is None:
        raise ValueError(f"exits: {architecture.name} has no classifier; expected one as its last exit.")
    return architecture.head.classes


def _calls(root: fx.Graph, paths: list[str]) -> list[fx.Node]:
    """Return the nodes that call the blocks."""
    found = {str(node.target): node for node in root.find_nodes(op="call_module")}
    return [found[path] for path in paths]


def _return(root: fx.Graph, values: list[fx.Node]) -> None:
    """Let the graph return `values` in front of what it returns."""
    (end,) = root.find_nodes(op="output")
    end.args = ((*values, end.args[0]),)


def _head(block: Block, classes: int) -> nn.Sequential:
    """Return a classifier that is like the one behind the last block."""
    width = block.channels.output
    # What comes behind the addition has been activated.
    activated = block.join is not None and block.output != block.join
    front = () if activated else (nn.BatchNorm2d(width), nn.ReLU(inplace=True))
    linear = nn.Linear(width, classes)
    init_classifier(linear)
    return nn.Sequential(*front, nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear)
