"""A picture of some training images, spread over the set, to see at a glance what will be learnt from."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

if TYPE_CHECKING:
    from hjepa.data.parts import Thumbnail

ROWS, COLUMNS = 6, 10
SIDE, GAP, CAPTION = 96, 6, 12  # pixels
LONGEST_NAME = 15  # characters below a thumbnail
PAPER, INK = 255, 70


def shown(count: int) -> set[int]:
    """Which of ``count`` images are on the sheet: evenly spread, so that they are the same whoever prepares which."""
    wanted = min(count, ROWS * COLUMNS)
    return {i * count // wanted for i in range(wanted)}


def thumbnail(pixels: NDArray[np.uint8]) -> bytes:
    """The whole image as a PNG of at most ``SIDE`` pixels a side; small images are enlarged by whole pixels."""
    image = Image.fromarray(pixels)
    factor = SIDE // max(image.size)
    if factor > 1:
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    else:
        image.thumbnail((SIDE, SIDE), Image.Resampling.BOX)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def draw(thumbnails: Sequence[Thumbnail], classes: Sequence[str]) -> bytes:
    """The sheet as a PNG, with the class below each image where there is one."""
    caption = CAPTION if classes else 0
    rows = max(1, -(-len(thumbnails) // COLUMNS))
    sheet = Image.new("RGB", (COLUMNS * (SIDE + GAP) + GAP, rows * (SIDE + caption + GAP) + GAP), (PAPER,) * 3)
    pen = ImageDraw.Draw(sheet)
    for place, item in enumerate(sorted(thumbnails, key=lambda item: item.number)):
        left = GAP + place % COLUMNS * (SIDE + GAP)
        top = GAP + place // COLUMNS * (SIDE + caption + GAP)
        image = Image.open(io.BytesIO(item.png))
        sheet.paste(image, (left + (SIDE - image.width) // 2, top + (SIDE - image.height) // 2))
        if classes and item.label is not None:
            # The built-in font has Latin-1 alone.
            name = classes[item.label].encode("latin-1", "replace").decode("latin-1")
            cut = name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 2]}.."
            pen.text((left + SIDE // 2, top + SIDE), cut, fill=(INK,) * 3, anchor="ma", font_size=10)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()
