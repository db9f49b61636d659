"""A hundred characters in twenty coarse groups, rendered from the fonts that matplotlib ships.

Train and test use different faces. Upright and oblique faces of DejaVu (and some faces of different families) share the
drawings of symbols, so faces that share any drawing are kept on the same side: no test character was seen in training.
"""

from __future__ import annotations

from functools import cache, lru_cache
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from warps import warp

GROUPS: dict[str, str] = {
    "digits, first five": "12345",
    "digits, last five": "67890",
    "Latin capitals, round": "CDGQS",
    "Latin capitals, upright": "EFHLT",
    "Latin capitals, diagonal": "AKMNW",
    "Latin small, ascending": "bdfht",
    "Latin small, descending": "gjpqy",
    "Latin small, short": "aemrz",
    "Latin letters of the north": "ÆßØÞŋ",
    "Greek capitals, first": "ΓΔΞΨΩ",
    "Greek capitals, second": "ϠΛΠΣΦ",
    "Greek small, first": "αεμλξ",
    "Greek small, second": "ηπσφω",
    "Cyrillic capitals, first": "БЖИЦЮ",
    "Cyrillic capitals, second": "ДЧШЭЯ",
    "currency": "$¢£¥€",
    "arithmetic": "+÷×=±",
    "mathematical signs": "<>¬~∂",
    "brackets and slashes": "([{/\\",
    "punctuation": "!?&@#",
}
CHARACTERS = "".join(GROUPS.values())
GROUP_SIZE = 5

TRAIN_FACES = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSans-BoldOblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Oblique",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-BoldItalic",
    "STIXGeneral",
    "STIXGeneralItalic",
)
TEST_FACES = (
    "DejaVuSansMono-Bold",
    "DejaVuSansMono-BoldOblique",
    "DejaVuSerif-Italic",
    "STIXGeneralBol",
    "STIXGeneralBolIta",
)

CANVAS = 64  # characters are drawn and warped at this size, then averaged down
FONT_SIZE = 44
BASELINE = 44


class FontsUnavailable(RuntimeError):
    """The fonts that the characters are drawn with are missing or lack a character."""


def characters(groups: int) -> str:
    """Return the characters of the first `groups` coarse groups.

    Raises:
        ValueError: There are not so many groups.
    """
    if not 1 <= groups <= len(GROUPS):
        raise ValueError(f"glyphs: found groups={groups}, expected 1 to {len(GROUPS)}.")
    return CHARACTERS[: GROUP_SIZE * groups]


@cache
def draw_face(face: str) -> Tensor:
    """Draw all characters of one face, unwarped.

    Shape: (100, 1, 64, 64), uint8, white ink on black.

    Raises:
        FontsUnavailable: matplotlib or the font file is missing, or the font lacks one of the characters.
    """
    try:
        from matplotlib import get_data_path
        from matplotlib.ft2font import FT2Font
    except ImportError as error:
        message = "glyphs: matplotlib, whose fonts are drawn, is not installed; install the extra `plots`."
        raise FontsUnavailable(message) from error
    path = Path(get_data_path()) / "fonts" / "ttf" / f"{face}.ttf"
    if not path.is_file():
        raise FontsUnavailable(f"glyphs: {path} does not exist; reinstall matplotlib, which ships this font.")
    charmap = FT2Font(str(path)).get_charmap()
    missing = [character for character in CHARACTERS if ord(character) not in charmap]
    if missing:
        raise FontsUnavailable(f"glyphs: {face} has no drawing of {missing}; install a matplotlib >= 3.8.")
    font = ImageFont.truetype(str(path), FONT_SIZE)
    return torch.stack([_draw(font, character) for character in CHARACTERS])


def _draw(font: ImageFont.FreeTypeFont, character: str) -> Tensor:
    canvas = Image.new("L", (CANVAS, CANVAS))
    left, _, right, _ = font.getbbox(character, anchor="ls")
    ImageDraw.Draw(canvas).text(((CANVAS - left - right) / 2, BASELINE), character, fill=255, font=font, anchor="ls")
    drawn: Tensor = transforms.pil_to_tensor(canvas)
    return drawn


@lru_cache(maxsize=4)
def render(faces: tuple[str, ...], variants: int, seed: int, size: int = 32) -> tuple[Tensor, Tensor]:
    """Draw every character in every face, `variants` times, each with a random affine map.

    Returns:
        Images (F*variants*100, 1, size, size) uint8 and their class indices (F*variants*100,).

    Raises:
        ValueError: The size does not divide that of the canvas, 64.
    """
    if size < 1 or CANVAS % size:
        raise ValueError(f"glyphs: found image_size={size}, expected a divisor of {CANVAS} such as 16 or 32.")
    generator = torch.Generator().manual_seed(seed)
    images = []
    for face in faces:
        drawn = draw_face(face)
        for _ in range(variants):
            warped = warp(drawn, generator, degrees=10.0, shift=0.06, scale=0.12, shear=6.0)
            small = torch.nn.functional.avg_pool2d(warped, CANVAS // size)
            images.append(small.round().to(torch.uint8))
    labels = torch.arange(len(CHARACTERS)).repeat(len(faces) * variants)
    return torch.cat(images), labels
