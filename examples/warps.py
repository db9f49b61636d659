"""Random changes of images whose randomness is given by the caller, so that a batch can be made again exactly."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

Augment = Callable[[Tensor, int], Tensor]  # uint8 images (B, C, H, W) and a seed -> images of the same kind


def warp(
    images: Tensor, generator: torch.Generator, *, degrees: float, shift: float, scale: float, shear: float
) -> Tensor:
    """Give every image its own affine map, drawn uniformly from symmetric ranges.

    Args:
        images: (B, C, H, W), any dtype; outside of an image there is zero.
        generator: The only source of randomness.
        degrees: Largest rotation.
        shift: Largest translation, as a part of the side.
        scale: Largest change of size; 0.1 means 0.9 to 1.1 times.
        shear: Largest horizontal shear in degrees.

    Returns:
        The warped images as float, in the range of the input.
    """
    count = len(images)
    draw = torch.rand(5, count, generator=generator) * 2 - 1
    angle = draw[0] * math.radians(degrees)
    slant = torch.tan(draw[1] * math.radians(shear))
    size = 1 / (1 + draw[2] * scale)
    cos, sin = angle.cos() * size, angle.sin() * size
    # grid_sample's coordinates run over [-1, 1], so a shift by the whole side is 2
    rows = [cos, cos * slant - sin, 2 * shift * draw[3], sin, sin * slant + cos, 2 * shift * draw[4]]
    theta = torch.stack(rows, dim=1).view(count, 2, 3)
    grid = torch.nn.functional.affine_grid(theta, list(images.shape), align_corners=False)
    return torch.nn.functional.grid_sample(images.float(), grid, align_corners=False)


def shift_and_rotate(degrees: float, shift: float) -> Augment:
    """Make the augmentation for small characters: a little rotation, translation and scaling, no flips."""

    def augment(images: Tensor, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return warp(images, generator, degrees=degrees, shift=shift, scale=0.1, shear=0.0).round().to(torch.uint8)

    return augment


def crop_flip_randaugment(size: int, layers: int, magnitude: int, *, autoaugment: bool = False) -> Augment:
    """Make the CIFAR augmentation: pad by four and crop, flip, then a policy, drawn for every image apart.

    Args:
        size: Side of the images.
        layers, magnitude: N and M of RandAugment (Cubuk et al. 2020); no layers for none.
        autoaugment: Whether AutoAugment's policy for CIFAR (Cubuk et al. 2019) comes on top.
    """
    steps: list[torch.nn.Module] = [v2.RandomCrop(size, padding=4), v2.RandomHorizontalFlip()]
    if layers:
        steps.append(v2.RandAugment(num_ops=layers, magnitude=magnitude))
    if autoaugment:
        steps.append(v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10))
    transform = v2.Compose(steps)

    def augment(images: Tensor, seed: int) -> Tensor:
        with seeded(seed):
            # on a small image Pillow takes half the time of tensor operations (0.4 and 0.7 ms)
            return torch.stack([v2.functional.pil_to_tensor(transform(v2.functional.to_pil_image(x))) for x in images])

    return augment


def square_erasing(probability: float, area: Sequence[float]) -> v2.RandomErasing | None:
    """Make random erasing of one square, to be applied to a normalised image, whose mean is put there.

    Args:
        probability: Of erasing anything; 0 makes None.
        area: Smallest and largest part of the image.

    Raises:
        ValueError: The probability or an area is not within [0, 1].

    Reference: Zhong et al. 2020.
    """
    smallest, largest = area
    if not probability:
        return None
    return v2.RandomErasing(p=probability, scale=(smallest, largest), ratio=(1.0, 1.0))


def erase(images: Tensor, erasing: v2.RandomErasing, seed: int) -> Tensor:
    """Erase a part of each of the images (B, C, H, W), drawn for every image apart."""
    with seeded(seed):
        return torch.stack([erasing(image) for image in images])


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the CPU generators of torch, numpy and Python within the block, and put them back after it.

    torchvision's and timm's transforms draw from the global generators. `torch.manual_seed` would also reseed the
    accelerators, whose dropout masks would then repeat; the default CPU generator alone is touched here.
    """
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
