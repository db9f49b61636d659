"""Images that belong to no class of a data set, to see what a one-class network makes of them."""

from __future__ import annotations

import torch

from data import Data, glyphs
from glyphs import FontsUnavailable
from splits import MemorySplit, Split


def outliers_for(data: Data) -> Split | None:
    """Return 1,600 rendered letters and signs at the size and normalization of `data`, or None without the fonts.

    Digits are left out. For `glyphs` itself there is no such set, and None is returned.
    """
    if data.name == "glyphs" or not isinstance(data.test, MemorySplit):
        return None
    try:
        drawn = glyphs(train_variants=1, test_variants=4)
    except FontsUnavailable:
        return None
    assert isinstance(drawn.test, MemorySplit)
    foreign = torch.tensor([not name.isdigit() for name in drawn.classes])[drawn.test.labels]
    images = drawn.test.images[foreign].float()
    size = (data.image_size, data.image_size)
    images = torch.nn.functional.interpolate(images, size, mode="bilinear", antialias=True)
    labels = torch.zeros(len(images), dtype=torch.long)
    return MemorySplit(images.round().to(torch.uint8), labels, data.mean, data.std)
