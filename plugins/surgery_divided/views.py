"""S views of an image for S small networks: one random transform, applied S times, concatenated on channels.

Both forms give what `SplitViews` divides: view i are the channels i*C to (i+1)*C. What is done to a batch of them as a
whole, such as `torchvision.transforms.v2.MixUp`, treats all views of an image alike: they have one mixup coefficient
and one partner. Small networks that should see the same image need neither: hand the image itself to the model.

Reference:
    Zhao et al., 2022, section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from surgery.errors import InvalidOption

Transform = Callable[[Any], Any]


class SeveralViews:
    """A transform of a dataset that applies another one several times to the same image.

    Args:
        transform: A random transform whose result is a tensor, one image of any kind to (C, H, W).
        networks: S, how often it is applied.

    Shape:
        An image as `transform` takes it, to (S*C, H, W).
    """

    def __init__(self, transform: Transform, networks: int) -> None:
        if not callable(transform):
            raise InvalidOption(f"several_views: found {transform!r} as transform, expected a callable")
        self.transform, self.networks = transform, _checked(networks, "several_views")

    def __call__(self, image: Any) -> Tensor:
        """Return the views of `image`, side by side on channels.

        Raises:
            InvalidOption: If the transform returns no image tensor, or images of different sizes.
        """
        return _side_by_side(
            (self.transform(image) for _ in range(self.networks)), "several_views: the transform returned"
        )

    def __repr__(self) -> str:
        """Return the transform and how often it is applied."""
        return f"{type(self).__name__}({self.transform!r}, networks={self.networks})"


class Views(Dataset[tuple[Tensor, Any]]):
    """A dataset that asks another one several times for the same item, whose own random transform makes the views.

    Args:
        dataset: A map-style dataset of pairs (image, target), the image a tensor (C, H, W).
        networks: S, how often each item is asked for.

    Shape:
        Items are pairs of (S*C, H, W) and the target of the item.
    """

    def __init__(self, dataset: Dataset[Any], networks: int) -> None:
        if not isinstance(dataset, Sized):
            raise InvalidOption(
                f"Views: found a {type(dataset).__name__} without a length, expected a map-style dataset; a stream "
                "of images takes a transform made by several_views"
            )
        self.dataset, self.networks = dataset, _checked(networks, "Views")

    def __len__(self) -> int:
        """Return the number of items, that of the dataset."""
        assert isinstance(self.dataset, Sized)
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        """Return the views of item `index`, side by side on channels, and its target.

        Raises:
            InvalidOption: If the item is no pair, its image no tensor, or if sizes or targets differ between the views.
        """
        pairs = [self._pair(index) for _ in range(self.networks)]
        target = pairs[0][1]
        for _, other in pairs[1:]:
            if not _agree(target, other):
                raise InvalidOption(
                    f"Views: item {index} of {type(self.dataset).__name__} has the targets {target!r} and {other!r}, "
                    "expected the same each time; mix targets in the batch, behind the views"
                )
        where = f"Views: the image of item {index} of {type(self.dataset).__name__} is"
        return _side_by_side((image for image, _ in pairs), where), target

    def _pair(self, index: int) -> tuple[Any, Any]:
        item = self.dataset[index]
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise InvalidOption(
                f"Views: item {index} of {type(self.dataset).__name__} is {_described(item)}, expected (image, target)"
            )
        return item[0], item[1]


def several_views(transform: Transform, networks: int) -> SeveralViews:
    """Return a transform that applies `transform` S times to the same image, for a dataset's `transform=`.

    Args:
        transform: A random transform whose result is a tensor (C, H, W).
        networks: S, the number of small networks.

    Raises:
        InvalidOption: If `networks` is no positive integer.
    """
    return SeveralViews(transform, networks)


def _checked(networks: int, where: str) -> int:
    if not isinstance(networks, int) or isinstance(networks, bool) or networks < 1:
        raise InvalidOption(f"{where}: networks is {networks!r}, expected a positive integer, S of the divided network")
    return networks


def _side_by_side(images: Iterable[Any], where: str) -> Tensor:
    views: list[Tensor] = []
    for image in images:
        if not isinstance(image, Tensor) or image.dim() != 3:
            raise InvalidOption(
                f"{where} {_described(image)}, expected an image tensor (C, H, W); end the transform "
                "with torchvision.transforms.v2.ToImage or ToTensor"
            )
        if views and image.shape != views[0].shape:
            raise InvalidOption(
                f"{where} of size {tuple(views[0].shape)} once and {tuple(image.shape)} another time, expected "
                "one size; crop or resize in the transform"
            )
        views.append(image)
    return torch.cat(views)


def _described(value: object) -> str:
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _agree(target: Any, other: Any) -> bool:
    if isinstance(target, Tensor) or isinstance(other, Tensor):
        return isinstance(target, Tensor) and isinstance(other, Tensor) and torch.equal(target, other)
    return bool(torch.as_tensor(target == other).all())
