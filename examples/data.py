"""Image data for the examples: handwritten digits, rendered characters, CIFAR and image folders.

Nothing is downloaded. `digits` comes with scikit-learn and `glyphs` is drawn from matplotlib's fonts; the others are
read from disk through torchvision.
"""

from __future__ import annotations

import dataclasses
import inspect
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from timm.data import create_transform
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torchvision import datasets
from torchvision.transforms import v2

import glyphs as drawing
from splits import FolderSplit, MemorySplit, Split, Triple, statistics
from warps import Augment, crop_flip_randaugment, shift_and_rotate, square_erasing


class DataNotFound(FileNotFoundError):
    """The files of a data set are not where they were looked for."""


@dataclass(frozen=True, eq=False)
class Data:
    """A data set with its train and test part.

    Attributes:
        classes: Class names, in the order of the class indices.
        image_size: Side of a training image in pixels; images have three channels.
        mean, std: What the images are normalised with, per channel, for values in [0, 1].
        groups: For every class the index of its coarse group, where the data has such groups.
        group_names: Names of the coarse groups.
    """

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]
    image_size: int
    mean: Triple
    std: Triple
    groups: tuple[int, ...] | None = None
    group_names: tuple[str, ...] | None = None
    channels: int = 3


def load(name: str, root: str | Path = "data", **options: object) -> Data:
    """Load a data set by name.

    Args:
        name: "digits", "glyphs", "cifar10", "cifar100" or "imagefolder".
        root: Folder that holds the files of the three that are read from disk.
        **options: The keyword arguments of the function of that name.

    Raises:
        ValueError: There is no such data set, or it has no such option.
        DataNotFound: The files are not there; the message says what to place where.
    """
    loaders: dict[str, Callable[..., Data]] = {
        "digits": digits, "glyphs": glyphs, "cifar10": cifar10, "cifar100": cifar100, "imagefolder": imagefolder
    }  # fmt: skip
    if name not in loaders:
        raise ValueError(f"data: no data set is called {name!r}; choose one of {', '.join(loaders)}.")
    known = inspect.signature(loaders[name]).parameters
    unknown = sorted(set(options) - set(known) | ({"root"} & set(options)))
    if unknown:
        allowed = ", ".join(key for key in known if key != "root")
        raise ValueError(f"data {name}: unknown options {', '.join(unknown)}; it has {allowed}.")
    return loaders[name](**options, **({"root": Path(root)} if "root" in known else {}))


def digits(*, image_size: int = 16, degrees: float = 10.0, shift: float = 0.08) -> Data:
    """Load scikit-learn's 1797 scans of handwritten digits, enlarged from 8x8; 1437 train, 360 test, stratified."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    source = load_digits()
    scans = torch.tensor(source.images, dtype=torch.float32)[:, None] * (255 / 16)
    size = (image_size, image_size)
    images = torch.nn.functional.interpolate(scans, size, mode="bilinear", align_corners=False)
    images = images.round().to(torch.uint8).expand(-1, 3, -1, -1)
    labels = torch.tensor(source.target)
    train, test = train_test_split(torch.arange(len(labels)).numpy(), test_size=360, stratify=labels, random_state=0)
    classes = tuple(str(digit) for digit in range(10))
    parts = (images[train], labels[train]), (images[test], labels[test])
    return _in_memory("digits", parts, classes, shift_and_rotate(degrees, shift))


def glyphs(
    *,
    train_variants: int = 20,
    test_variants: int = 8,
    seed: int = 0,
    degrees: float = 8.0,
    shift: float = 0.05,
    image_size: int = 32,
    groups: int = 20,
) -> Data:
    """Draw 100 characters in 20 coarse groups; no face, and no drawing of a character, is in both parts.

    Args:
        train_variants: Random affine variants of each character in each of the 11 training faces.
        test_variants: The same for the 5 test faces.
        seed: Of these variants.
        degrees: Largest rotation of the training augmentation, on top of the variants.
        shift: Its largest translation, as a part of the side.
        image_size: Side of an image in pixels, a divisor of 64.
        groups: How many of the coarse groups, five characters each: the first ones.

    Raises:
        ValueError: The side does not divide 64, or there are not so many groups.
        FontsUnavailable: matplotlib or one of its fonts is missing.
    """
    chosen = drawing.characters(groups)
    parts = tuple(
        _draw(faces, variants, 2 * seed + part, image_size, len(chosen))
        for part, (faces, variants) in enumerate(
            ((drawing.TRAIN_FACES, train_variants), (drawing.TEST_FACES, test_variants))
        )
    )
    members = tuple(index // drawing.GROUP_SIZE for index in range(len(chosen)))
    names = tuple(drawing.GROUPS)[:groups]
    return _in_memory("glyphs", parts, tuple(chosen), shift_and_rotate(degrees, shift), members, names)


def _draw(faces: tuple[str, ...], variants: int, seed: int, size: int, classes: int) -> Part:
    grey, labels = drawing.render(faces, variants, seed, size)
    wanted = labels < classes
    # a view: the three equal channels take the memory of one
    return grey[wanted].expand(-1, 3, -1, -1), labels[wanted]


def cifar10(
    root: Path,
    *,
    randaugment: tuple[int, int] | list[int] = (3, 4),
    autoaugment: bool = False,
    erasing: float = 0.0,
    erasing_area: tuple[float, float] | list[float] = (0.125, 0.2),
) -> Data:
    """Read CIFAR-10 from `root`.

    `randaugment` is (layers, magnitude), (0, 0) for crop and flip alone; `erasing` is the probability of erasing a
    square of the normalised image, `erasing_area` the range of its part of the image.
    """
    parts, classes = _read_cifar(datasets.CIFAR10, "CIFAR-10", root)
    augment = crop_flip_randaugment(32, *randaugment, autoaugment=autoaugment)
    return _in_memory("cifar10", parts, classes, augment, erasing=square_erasing(erasing, erasing_area))


def cifar100(
    root: Path,
    *,
    randaugment: tuple[int, int] | list[int] = (1, 2),
    autoaugment: bool = False,
    erasing: float = 0.0,
    erasing_area: tuple[float, float] | list[float] = (0.0625, 0.1),
) -> Data:
    """Read CIFAR-100 with its 20 coarse groups from `root`; the options are as for `cifar10`."""
    parts, classes = _read_cifar(datasets.CIFAR100, "CIFAR-100", root)
    folder = root / datasets.CIFAR100.base_folder
    with (folder / "train").open("rb") as train, (folder / "meta").open("rb") as meta:
        # torchvision has just compared these files with the official checksums
        entry = pickle.load(train, encoding="latin1")
        names = pickle.load(meta, encoding="latin1")["coarse_label_names"]
    coarse = dict(zip(entry["fine_labels"], entry["coarse_labels"], strict=True))
    groups = tuple(coarse[fine] for fine in range(len(classes)))
    augment = crop_flip_randaugment(32, *randaugment, autoaugment=autoaugment)
    erased = square_erasing(erasing, erasing_area)
    return _in_memory("cifar100", parts, classes, augment, groups, tuple(names), erased)


def imagefolder(
    root: Path,
    *,
    train_size: int = 224,
    test_size: int = 224,
    crop: float = 0.875,
    auto_augment: str | None = None,
    erasing: float = 0.0,
    erasing_mode: str = "pixel",
    erasing_count: int = 1,
    erasing_area: tuple[float, float] | list[float] | None = None,
    train_scale: tuple[float, float] | list[float] = (0.08, 1.0),
    train_interpolation: str = "bilinear",
) -> Data:
    """Read `root/train/<class>/*` and `root/val/<class>/*`, cropped at random for training and in the centre for test.

    Args:
        root: The folder with `train` and `val`.
        train_size: Side of a training image.
        test_size: Side of a test image.
        crop: Part of the shorter side that the centre crop keeps.
        auto_augment: A policy in timm's notation, such as "rand-m7-mstd0.5-inc1".
        erasing: Probability of random erasing.
        erasing_mode: What is put there, in timm's words: "const", "rand" or "pixel".
        erasing_count: Largest number of rectangles.
        erasing_area: Smallest and largest part of the image; with it one square is erased, and the mean put there,
            instead of timm's rectangles.
        train_scale: Smallest and largest part of the image that a random crop keeps.
        train_interpolation: Of the random crop: "bilinear", "bicubic" or "random" (one of the two).

    Raises:
        DataNotFound: A folder is missing or empty, or the two parts have other classes.
    """
    folders = [_read_folder(root, part) for part in ("train", "val")]
    if folders[0].classes != folders[1].classes:
        odd = sorted(set(folders[0].classes) ^ set(folders[1].classes))[:3]
        raise DataNotFound(f"imagefolder: {root}/train and {root}/val hold different classes, such as {odd}.")
    mean, std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    plain = create_transform(test_size, is_training=False, interpolation="bicubic", crop_pct=crop, mean=mean, std=std)
    augmented = create_transform(
        train_size,
        is_training=True,
        auto_augment=auto_augment,
        scale=(train_scale[0], train_scale[1]),
        interpolation=train_interpolation,
        re_prob=0.0 if erasing_area else erasing,
        re_mode=erasing_mode,
        re_count=erasing_count,
        mean=mean,
        std=std,
    )
    if erasing_area and erasing:
        augmented = v2.Compose([augmented, square_erasing(erasing, erasing_area)])
    train, test = (FolderSplit(folder, plain, augmented) for folder in folders)
    return Data("imagefolder", train, test, tuple(folders[0].classes), train_size, mean, std)


def first_images(data: Data, count: int) -> Data:
    """Return the first `count` images of both parts; data that is read from disk stays whole."""
    parts = [
        dataclasses.replace(split, images=split.images[:count], labels=split.labels[:count])
        if isinstance(split, MemorySplit)
        else split
        for split in (data.train, data.test)
    ]
    return dataclasses.replace(data, train=parts[0], test=parts[1])


Part = tuple[Tensor, Tensor]


def _in_memory(
    name: str,
    parts: tuple[Part, Part],
    classes: tuple[str, ...],
    augment: Augment,
    groups: tuple[int, ...] | None = None,
    group_names: tuple[str, ...] | None = None,
    erasing: v2.RandomErasing | None = None,
) -> Data:
    mean, std = statistics(parts[0][0])
    train = MemorySplit(*parts[0], mean, std, augment, erasing)
    test = MemorySplit(*parts[1], mean, std)
    return Data(name, train, test, classes, train.images.shape[-1], mean, std, groups, group_names)


def _read_cifar(kind: type[datasets.CIFAR10], title: str, root: Path) -> tuple[tuple[Part, Part], tuple[str, ...]]:
    try:
        train, test = kind(str(root), train=True), kind(str(root), train=False)
    except RuntimeError as error:
        folder = root / kind.base_folder
        found = "holds files that fail torchvision's checksums" if folder.is_dir() else "does not exist"
        files = ", ".join(file for file, _ in [*kind.train_list, *kind.test_list])
        message = (
            f"{title}: {folder.absolute()} {found}; expected {files} and {kind.meta['filename']}. Get "
            f'"{title} python version" ({kind.filename}) from the data set\'s home page '
            f'("The {title} dataset", University of Toronto) and unpack it with: tar -xzf {kind.filename} -C {root}'
        )
        raise DataNotFound(message) from error
    first, second = (
        (torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets))
        for part in (train, test)
    )
    return (first, second), tuple(train.classes)


def _read_folder(root: Path, part: str) -> datasets.ImageFolder:
    try:
        return datasets.ImageFolder(str(root / part))
    except FileNotFoundError as error:
        message = (
            f"imagefolder: {(root / part).absolute()} is missing or has an empty class; expected one folder of images "
            f"per class in {root}/train and in {root}/val. For ImageNet unpack ILSVRC2012_img_train.tar and "
            "ILSVRC2012_img_val.tar (image-net.org, after registration) and sort the validation images into "
            "folders named like those of train."
        )
        raise DataNotFound(message) from error
