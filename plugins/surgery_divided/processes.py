"""The small networks in processes of their own: training and inference where only the predictions are exchanged.

Each process computes the whole loss from all predictions. Those of others are constants to it, so the gradient with
respect to the member that it owns is that of a training in one process, and no gradient ever travels.

Reference:
    Zhao et al., 2022, section 3.1.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from surgery import ConvertedNetwork
from surgery.conversion import INCOMPLETE
from surgery.errors import InvalidOption, SurgeryError, UnsupportedModel
from surgery.objective import unwrap
from surgery_divided.ensemble import Ensemble, ensemble_of, members


@dataclass(frozen=True)
class Peers:
    """The processes that own the members, member i the one of rank i.

    Attributes:
        group: Their group, or None for that of all processes. A copy of a network stays in the group.
    """

    group: dist.ProcessGroup | None

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return itself: a group of processes cannot be copied."""
        return self

    @property
    def rank(self) -> int:
        """Rank of this process in the group."""
        return dist.get_rank(self.group)

    def gathered(self, own: Tensor) -> list[Tensor]:
        """Return the tensors of all processes in the order of ranks; all have one shape, and no gradient."""
        own = own.detach().contiguous()
        received = [torch.empty_like(own) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(received, own, self.group)
        return received

    def overwrite(self, tensor: Tensor, owner: int) -> None:
        """Give `tensor` the values that it has in the process `owner`, in place."""
        # Ranks may keep their weights in different memory formats; a broadcast would mix up the order.
        values = tensor.detach().clone(memory_format=torch.contiguous_format)
        dist.broadcast(values, group=self.group, group_src=owner)
        with torch.no_grad():
            tensor.copy_(values)


class Elsewhere(nn.Module):
    """Stand for a member that another process owns; it has no weights, and nobody reads what it returns."""

    def forward(self, view: Tensor) -> Tensor:
        """Return an empty tensor."""
        return view.new_empty(0)


class Exchanged(nn.Module):
    """Join the logits of members that are in several processes: its own with gradient, those of others without.

    Args:
        ensemble: Joins the logits, once all are there.
        peers: The processes.

    Shape:
        S tensors, of which that of the own member is read, (B, classes), to (B, classes).
    """

    def __init__(self, ensemble: Ensemble, peers: Peers) -> None:
        super().__init__()
        self.ensemble, self.peers = ensemble, peers
        self.compared = False

    def forward(self, *logits: Tensor) -> Tensor:
        """Exchange the logits and return those of the ensemble.

        Raises:
            InvalidOption: If the processes have batches of different sizes.
            SurgeryError: In a run without data, as planning and conversion make.
        """
        if logits[0].is_meta:
            raise SurgeryError(
                "distribute: found a run without data, which only a whole network allows; call "
                "surgery_divided.gather(model) in all processes and use what it returns"
            )
        own = logits[self.peers.rank]
        self._compare(own)
        everyone = self.peers.gathered(own)
        everyone[self.peers.rank] = own
        joined: Tensor = self.ensemble(*everyone)
        return joined

    def _compare(self, own: Tensor) -> None:
        """Refuse different sizes, which would end the exchange in a hang or in nonsense."""
        if self.compared and own.device.type != "cpu":  # reading the sizes would make an accelerator wait each time
            return
        sizes = [tuple(size.tolist()) for size in self.peers.gathered(torch.tensor(own.shape, device=own.device))]
        if len(set(sizes)) > 1:
            raise InvalidOption(
                f"distribute: found logits {', '.join(map(str, sizes))} in the processes by rank, expected one "
                "size; give all of them the same images in the same order"
            )
        self.compared = True


def distribute(model: nn.Module, group: dist.ProcessGroup | None = None) -> ConvertedNetwork:
    """Return the part of a divided network that this process owns: the member with the number of its rank.

    What is returned trains and predicts like the whole network, in the usual loop with `surgery.Objective` and
    `surgery.param_groups`, as long as each process does the same: a forward is a meeting of all of them, so also an
    evaluation takes place in all or in none. All processes need the same images and targets in the same order, mixup
    included; augmentation may differ, so that each process makes only the view of its own member, (B, C, H, W). Batch
    norm sees what it would see in one process. Dropout draws from the random state of each process, so it is not
    repeatable across the two ways of training. Do not wrap it in DistributedDataParallel over the same group.

    Weights in `state_dict()` and the optimizer are those of the own member; `gather` brings all together, which
    `surgery.save`, pruning and `surgery.cost` need. Distribute before the move to a device, and that holds one member
    only.

    Args:
        model: A divided network of S members, in every process; it stays as it is.
        group: S processes, by default all; member i goes to rank i. Its backend has to gather on the model's device.

    Raises:
        UnsupportedModel: If `model` is no divided network.
        InvalidOption: If the group has more or fewer processes than the network members, or this process is not in it.
        SurgeryError: If torch.distributed is not initialised, or the network is distributed already.
    """
    all_members = members(model)
    network = unwrap(model)
    if any(isinstance(module, Exchanged) for module in model.modules()):
        raise SurgeryError("distribute: found a distributed network, expected a whole one; it can be used as it is")
    if not (dist.is_available() and dist.is_initialized()):
        raise SurgeryError("distribute: found no process group; call torch.distributed.init_process_group first")
    peers = Peers(group)
    size = dist.get_world_size(group)
    if peers.rank < 0 or size != len(all_members):
        found = f"{size} processes" if peers.rank >= 0 else "a process outside of the group"
        raise InvalidOption(
            f"distribute: found {found}, expected {len(all_members)}, one for each small network; pass group= or "
            "convert with as many networks as there are processes"
        )
    ensemble = ensemble_of(network)
    stands = {id(member): Elsewhere() for member in all_members if member is not all_members[peers.rank]}
    # What the memo holds is not copied: no second copy of foreign members ever exists.
    memo: dict[int, Any] = {**stands, id(ensemble): Exchanged(copy.deepcopy(ensemble), peers)}
    mine = _in_mode(copy.deepcopy(network, memo), network.training)
    mine.meta[INCOMPLETE] = (
        "the small network of one process, expected all of them; call surgery_divided.gather(model) in all processes "
        "and use what it returns"
    )
    return mine


def gather(model: nn.Module) -> ConvertedNetwork:
    """Return the whole network with the weights that every process has now; all processes have to call it.

    Args:
        model: What `distribute` returned; it stays as it is.

    Returns:
        The network with all members, on the device and in the mode of `model`, the same in every process. Which weights
        are frozen is taken from the own member.

    Raises:
        UnsupportedModel: If `model` is no distributed network.
    """
    exchanged = next((module for module in model.modules() if isinstance(module, Exchanged)), None)
    if exchanged is None or not isinstance(model, ConvertedNetwork):
        raise UnsupportedModel(f"gather: expected what distribute returned, found a {type(model).__name__}")
    (own,) = members(model)
    stands = [module for module in model.modules() if isinstance(module, Elsewhere)]
    memo: dict[int, Any] = {id(stand): copy.deepcopy(own) for stand in stands}
    memo[id(exchanged)] = copy.deepcopy(exchanged.ensemble)
    whole = copy.deepcopy(model, memo)
    del whole.meta[INCOMPLETE]
    for owner, member in enumerate(members(whole)):
        for tensor in (*member.parameters(), *member.buffers()):
            exchanged.peers.overwrite(tensor, owner)
    return whole


def _in_mode(network: ConvertedNetwork, training: bool) -> ConvertedNetwork:
    """Give the modules that `distribute` put in the mode of the network; those of the network may differ on purpose."""
    for module in network.modules():
        if isinstance(module, (Elsewhere, Exchanged)):
            module.training = training
    return network
