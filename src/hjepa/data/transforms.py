"""From encoded bytes to the views that the network sees; evaluation and the exported model share one of them.

Everything up to ``normalize`` is uint8 on the CPU: batches are four times smaller than floats on their way to the
device, and the antialiased uint8 resize gives PIL's pixels in a third of its time.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL.PngImagePlugin import PngImageFile
from torch import Tensor

from hjepa.data import jpeg
from hjepa.data.png import decode_unfiltered

ASPECT_RANGE = (3 / 4, 4 / 3)  # width / height of a random crop
CROP_ATTEMPTS = 10


def decode_image(data: bytes, channels: int) -> Tensor:
    """A JPEG or PNG of 8-bit grey or RGB samples as uint8 (channels, H, W).

    ``prepare`` has decoded every image in the same way, so that none of its own can fail here.
    """
    if data.startswith(jpeg.MAGIC):
        array = jpeg.decode_jpeg(data)
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
    height, width = image.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return resize(image[..., top : top + side, left : left + side], image_size, image_size)


def train_view(
    image: Tensor,
    *,
    image_size: int,
    crop_scale: tuple[float, float],
    horizontal_flip: bool,
    rng: np.random.Generator | None,
) -> Tensor:
    """A random resized crop and flip of uint8 (C, H, W); the evaluation view where neither is asked for.

    Args:
        crop_scale: Range of the crop's share of the image's area; (1, 1) turns cropping off.
        rng: From ``view_rng``; None only where ``is_random`` says that nothing is drawn.
    """
    if tuple(crop_scale) == (1.0, 1.0):
        view = eval_view(image, image_size)
    else:
        assert rng is not None
        top, left, height, width = crop_box(image.shape[-2], image.shape[-1], crop_scale, rng)
        view = resize(image[:, top : top + height, left : left + width], image_size, image_size)
    if horizontal_flip:
        assert rng is not None
        if flips(rng):
            view = view.flip(-1)
    return view


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
    side = min(height, width)  # no crop of that area fits a strip this long
    return (height - side) // 2, (width - side) // 2, side, side


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 (B, C, H, W) -> float32 (x / 255 - mean) / std, on the device of ``images``.

    Args:
        mean, std: One number per channel, of pixels in 0..1.
    """
    shift = torch.tensor(mean, dtype=torch.float32, device=images.device).mul_(255).view(-1, 1, 1)
    scale = torch.tensor(std, dtype=torch.float32, device=images.device).mul_(255).view(-1, 1, 1)
    return images.float().sub_(shift).div_(scale)
