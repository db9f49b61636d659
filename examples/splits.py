"""Labelled images read a batch at a time, augmented or not."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torchvision import datasets
from torchvision.transforms import v2

from warps import Augment, erase, seeded

Triple = tuple[float, float, float]


class Split(ABC):
    """Labelled images that are read by index, a batch at a time."""

    @property
    @abstractmethod
    def targets(self) -> Tensor:
        """Class indices of all samples, (N,) int64."""

    @abstractmethod
    def batch(self, indices: Tensor, seed: int | None = None) -> Tensor:
        """Return the normalised float images (B, 3, H, W) of `indices`; a seed asks for augmentation, drawn from it."""

    def __len__(self) -> int:
        return len(self.targets)


@dataclass(frozen=True, eq=False)
class MemorySplit(Split):
    """Images held as one uint8 tensor (N, 3, H, W)."""

    images: Tensor
    labels: Tensor
    mean: Triple
    std: Triple
    augment: Augment | None = None
    erasing: v2.RandomErasing | None = None

    @property
    def targets(self) -> Tensor:
        return self.labels

    def batch(self, indices: Tensor, seed: int | None = None) -> Tensor:
        images = self.images[indices]
        if seed is not None and self.augment is not None:
            images = self.augment(images, seed)
        mean, std = (torch.tensor(value).view(3, 1, 1) for value in (self.mean, self.std))
        normalised = (images.float() / 255 - mean) / std
        if seed is None or self.erasing is None:
            return normalised
        return erase(normalised, self.erasing, seed + 1)  # with the same one it would repeat the draws of `augment`


@dataclass(frozen=True, eq=False)
class FolderSplit(Split):
    """Images decoded from files when they are asked for."""

    folder: datasets.ImageFolder
    plain: Callable[[object], Tensor]
    augmented: Callable[[object], Tensor]

    @cached_property
    def targets(self) -> Tensor:
        return torch.tensor(self.folder.targets)

    def batch(self, indices: Tensor, seed: int | None = None) -> Tensor:
        files = [self.folder.samples[index][0] for index in indices.tolist()]
        if seed is None:
            return torch.stack([self.plain(self.folder.loader(file)) for file in files])
        with seeded(seed):
            return torch.stack([self.augmented(self.folder.loader(file)) for file in files])


def statistics(images: Tensor) -> tuple[Triple, Triple]:
    """Return mean and standard deviation of each channel of uint8 images (N, 3, H, W), for values in [0, 1]."""
    # counts of the 256 values give exact statistics without a float copy of the whole set
    values = torch.arange(256, dtype=torch.float64) / 255
    mean, std = [], []
    for channel in range(3):
        part = torch.bincount(images[:, channel].flatten(), minlength=256) / images[:, channel].numel()
        mean.append(float((part * values).sum()))
        std.append(float((part * (values - mean[-1]).square()).sum().sqrt()))
    return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])


@dataclass(frozen=True, eq=False)
class Chosen(Split):
    """Some of the images of another split."""

    whole: Split
    indices: Tensor

    @property
    def targets(self) -> Tensor:
        return self.whole.targets[self.indices]

    def batch(self, indices: Tensor, seed: int | None = None) -> Tensor:
        return self.whole.batch(self.indices[indices], seed)


def sample(split: Split, count: int) -> Split:
    """Return `count` images of `split`, drawn once and for all, or the whole split where it has no more."""
    if len(split) <= count:
        return split
    drawn = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))[:count]
    return Chosen(split, drawn)
