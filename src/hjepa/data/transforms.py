"""From encoded bytes to the views that the network sees; evaluation and the exported model share one of them.

Everything up to ``normalize`` is uint8 on the CPU: batches are four times smaller than floats on their way to the
device, and the antialiased uint8 resize gives PIL's pixels in a third of its time.
"""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL.PngImagePlugin import PngImageFile
from torch import Tensor

from hjepa.data import jpeg
from hjepa.data.png import decode_unfiltered

ASPECT_RANGE = (3 / 4, 4 / 3)  # width / height of a random crop
CROP_ATTEMPTS = 10


def size_of(data: bytes) -> tuple[int, int]:
    """Height and width of a JPEG or PNG."""
    if data.startswith(jpeg.MAGIC):
        return jpeg.size_of_jpeg(data)
    width, height = struct.unpack_from(">II", data, 16)  # the header is the first chunk
    return height, width


def decode_image(data: bytes, channels: int, *, rows: int | None = None) -> Tensor:
    """A JPEG or PNG of 8-bit grey or RGB samples as uint8 (channels, H, W).

    ``prepare`` has decoded every image in the same way, so that none of its own can fail here.

    Args:
        rows: How many of the first rows are needed; the picture may end anywhere below them.
    """
    if data.startswith(jpeg.MAGIC):
        array = jpeg.decode_jpeg(data, rows=rows)
    else:
        # The plugin itself: ``Image.open`` would try formats and refuse sizes that ``prepare`` has let through.
        unfiltered = decode_unfiltered(data)
        array = np.array(PngImageFile(io.BytesIO(data))) if unfiltered is None else unfiltered
    pixels = torch.from_numpy(array)  # (H, W) or (H, W, 3)
    return to_channels(pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1), channels)


def to_channels(image: Tensor, channels: int) -> Tensor:
    """Grey <-> RGB for uint8 (..., C, H, W), with the luma weights of ITU-R 601 in 16-bit fixed point, as PIL has."""
    present = image.shape[-3]
    if present == channels:
        return image
    if present == 1:
        return image.expand(*image.shape[:-3], channels, *image.shape[-2:])
    red, green, blue = image.to(torch.int32).unbind(-3)
    luma = (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16
    return luma.to(torch.uint8).unsqueeze(-3)


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """Antialiased bilinear resize of uint8 (C, H, W) or (B, C, H, W)."""
    if image.shape[-2:] == (height, width):
        return image
    batch = image if image.ndim == 4 else image[None]
    resized = F.interpolate(batch, (height, width), mode="bilinear", antialias=True)
    return resized if image.ndim == 4 else resized[0]


def eval_view(image: Tensor, image_size: int) -> Tensor:
    """The centre square, resized: the short side becomes ``image_size`` and the rest of the long side is cut off.

    Cutting first gives the same picture as resizing first, without ever making a long strip longer.

    Args:
        image: uint8 (C, H, W) or (B, C, H, W), on the CPU.

    Returns:
        uint8 (C, S, S) or (B, C, S, S).
    """
    top, left, side, _ = centre_square(*image.shape[-2:])
    return resize(image[..., top : top + side, left : left + side], image_size, image_size)


def centre_square(height: int, width: int) -> tuple[int, int, int, int]:
    """(top, left, height, width)."""
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side


class View(NamedTuple):
    """A part of an image, in its pixels, and whether it is mirrored."""

    top: int
    left: int
    height: int
    width: int
    mirrored: bool

    def cut(self, image: Tensor, image_size: int) -> Tensor:
        """uint8 (C, H, W) on the CPU, of which rows below the part may be missing -> uint8 (C, S, S)."""
        part = image[:, self.top : self.top + self.height, self.left : self.left + self.width]
        view = resize(part, image_size, image_size)
        return view.flip(-1) if self.mirrored else view


def draw_view(
    height: int,
    width: int,
    *,
    crop_scale: tuple[float, float],
    horizontal_flip: bool,
    rng: np.random.Generator | None,
) -> View:
    """A random resized crop and flip; the evaluation view where neither is asked for.

    Args:
        crop_scale: Range of the crop's share of the image's area; (1, 1) turns cropping off.
        rng: From ``view_rng``; None only where ``is_random`` says that nothing is drawn.
    """
    if tuple(crop_scale) == (1.0, 1.0):
        box = centre_square(height, width)
    else:
        assert rng is not None
        box = crop_box(height, width, crop_scale, rng)
    mirrored = False
    if horizontal_flip:
        assert rng is not None
        mirrored = flips(rng)
    return View(*box, mirrored)


def train_view(
    image: Tensor,
    *,
    image_size: int,
    crop_scale: tuple[float, float],
    horizontal_flip: bool,
    rng: np.random.Generator | None,
) -> Tensor:
    """The view of uint8 (C, H, W) that ``draw_view`` draws, which has the other arguments: uint8 (C, S, S)."""
    view = draw_view(*image.shape[-2:], crop_scale=crop_scale, horizontal_flip=horizontal_flip, rng=rng)
    return view.cut(image, image_size)


def flips(rng: np.random.Generator) -> bool:
    return bool(rng.random() < 0.5)


def is_random(crop_scale: tuple[float, float], horizontal_flip: bool) -> bool:
    return horizontal_flip or tuple(crop_scale) != (1.0, 1.0)


def view_rng(seed: int, epoch: int, sample: int) -> np.random.Generator:
    """The randomness of one image's view: a function of these three numbers and of nothing that ran before."""
    return np.random.default_rng((seed, epoch, sample))


def crop_box(
    height: int, width: int, scale: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a crop with a uniform share of the area and a log-uniform aspect ratio."""
    for _ in range(CROP_ATTEMPTS):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ASPECT_RANGE[0]), math.log(ASPECT_RANGE[1])))
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(rng.integers(height - crop_height + 1))
            left = int(rng.integers(width - crop_width + 1))
            return top, left, crop_height, crop_width
    return centre_square(height, width)  # no crop of that area fits a strip this long


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 (B, C, H, W) -> float32 (x / 255 - mean) / std, on the device of ``images``.

    Args:
        mean, std: One number per channel, of pixels in 0..1.
    """
    shift = torch.tensor(mean, dtype=torch.float32, device=images.device).mul_(255).view(-1, 1, 1)
    scale = torch.tensor(std, dtype=torch.float32, device=images.device).mul_(255).view(-1, 1, 1)
    return images.float().sub_(shift).div_(scale)
