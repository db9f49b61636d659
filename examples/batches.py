"""Batches as a pure function of the step, so that a run can go on at any step as if it had never stopped."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from splits import Split
from warps import seeded


def derive_seed(*parts: int | str) -> int:
    """Hash `parts` into a seed of 63 bits; neighbouring parts give unrelated seeds."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass(frozen=True)
class Mixing:
    """How the images of a batch are mixed with each other, and their labels with them.

    Attributes:
        alpha: Of the beta distribution that the coefficient of a batch is drawn from.
        classes: How many there are.

    Reference: Zhang et al. 2018. The partner of a sample is its neighbour in the batch, which is shuffled.
    """

    alpha: float
    classes: int

    def __call__(self, images: Tensor, targets: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Return mixed images and probabilities (B, classes); views side by side on channels are mixed alike."""
        with seeded(seed):
            mixed, labels = v2.MixUp(alpha=self.alpha, num_classes=self.classes)(images, targets)
        return mixed, labels


class Batches(Dataset[tuple[Tensor, Tensor]]):
    """All batches of a training run: item `step` follows from (seed, step) alone.

    Args:
        split: The training part.
        batch_size: Samples in a batch, over all ranks together.
        seed: Of the permutations and the augmentation.
        augment: Whether the split augments.
        drop_last: Whether an incomplete last batch of an epoch is left out.
        rank, world: This process takes every `world`-th sample of a batch, from `rank` on. All take equally many, so
            that the mean over the processes is the mean over the batch: up to `world` - 1 samples of an incomplete
            batch are left out.
        mixing: What is done to the batch behind its augmentation.

    Raises:
        ValueError: There is no full batch, or `world` processes cannot share one evenly.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        seed: int,
        *,
        augment: bool = True,
        drop_last: bool = False,
        rank: int = 0,
        world: int = 1,
        mixing: Mixing | None = None,
    ) -> None:
        """Store the arguments; nothing is read yet."""
        if len(split) < batch_size and drop_last:
            raise ValueError(f"batches: {len(split)} samples do not fill a batch of {batch_size}; lower batch_size.")
        if batch_size % world:
            raise ValueError(f"batches: {world} processes cannot share {batch_size} samples; change batch_size.")
        self.split, self.batch_size, self.seed, self.augment = split, batch_size, seed, augment
        self.rank, self.world, self.mixing = rank, world, mixing
        full, rest = divmod(len(split), batch_size)
        self.per_epoch = full if drop_last or rest < world else full + 1
        self._shuffled: tuple[int, Tensor] | None = None

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        """Return images and class indices of a step, counted from the start of the run; if mixed, probabilities."""
        indices = self.indices(step)
        seed = derive_seed("augment", self.seed, step, self.rank) if self.augment else None
        images, targets = self.split.batch(indices, seed), self.split.targets[indices]
        if self.mixing is None:
            return images, targets
        return self.mixing(images, targets, derive_seed("mixup", self.seed, step, self.rank))

    def indices(self, step: int) -> Tensor:
        """Return the indices of the samples of a step."""
        epoch, position = divmod(step, self.per_epoch)
        if self._shuffled is None or self._shuffled[0] != epoch:
            generator = torch.Generator().manual_seed(derive_seed("shuffle", self.seed, epoch))
            self._shuffled = epoch, torch.randperm(len(self.split), generator=generator)
        chosen = self._shuffled[1][position * self.batch_size : (position + 1) * self.batch_size]
        return chosen[: len(chosen) // self.world * self.world][self.rank :: self.world]

    def loader(self, start: int, stop: int, workers: int) -> DataLoader[tuple[Tensor, Tensor]]:
        """Return a loader of the steps from `start` to before `stop`."""
        return DataLoader(self, batch_size=None, sampler=range(start, stop), num_workers=workers)


@dataclass(frozen=True, eq=False)
class _Whole(Dataset[Tensor]):
    """The images of a split in order, a batch at a time."""

    split: Split
    chunks: tuple[Tensor, ...]

    def __getitem__(self, index: int) -> Tensor:
        return self.split.batch(self.chunks[index])

    def __len__(self) -> int:
        return len(self.chunks)


def whole_batches(split: Split, batch_size: int, workers: int) -> DataLoader[Tensor]:
    """Return a loader of all images of `split` in order, without augmentation and without the global generator."""
    chunks = torch.arange(len(split)).split(batch_size)
    return DataLoader(_Whole(split, chunks), batch_size=None, num_workers=workers, generator=torch.Generator())


@dataclass(frozen=True, eq=False)
class _Labelled(Dataset[tuple[Tensor, Tensor]]):
    """Images and class indices of a split in order, a batch at a time."""

    images: _Whole

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.images.split.targets[self.images.chunks[index]]

    def __len__(self) -> int:
        return len(self.images)


def labelled_batches(split: Split, batch_size: int = 256, workers: int = 0) -> DataLoader[tuple[Tensor, Tensor]]:
    """Return what `whole_batches` does, with the class indices."""
    chunks = torch.arange(len(split)).split(batch_size)
    whole = _Labelled(_Whole(split, chunks))
    return DataLoader(whole, batch_size=None, num_workers=workers, generator=torch.Generator())
