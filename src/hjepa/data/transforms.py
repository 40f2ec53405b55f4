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
from numpy.typing import ArrayLike, NDArray
from PIL.PngImagePlugin import PngImageFile
from torch import Tensor

from hjepa.data import jpeg
from hjepa.data.png import decode_unfiltered

ASPECT_RANGE = (3 / 4, 4 / 3)  # width / height of a random crop
CROP_ATTEMPTS = 10
DRAWS = 2 * CROP_ATTEMPTS + 3  # of one view: area and aspect ratio of each attempt, then the place, then the flip


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
    batch = image if image.ndim == 4 else _batch_of_one(image)
    resized = F.interpolate(batch, (height, width), mode="bilinear", antialias=True)
    return resized if image.ndim == 4 else resized[0]


def _batch_of_one(image: Tensor) -> Tensor:
    """(C, H, W) -> (1, C, H, W), with strides that show where the channels come last in memory.

    ``image[None]`` hides it, and the resize would put the channels apart, which takes half as long again.
    """
    _, rows, _ = image.stride()
    return image.as_strided((1, *image.shape), (image.shape[1] * rows, *image.stride()))


def empty_views(count: int, channels: int, image_size: int) -> Tensor:
    """uint8 (B, C, S, S) with the channels last in memory, as decoders give them and the resize is fastest."""
    shape = (count, channels, image_size, image_size)
    return torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last)


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
    draws: Sequence[float],
) -> View:
    """A random resized crop and flip; the evaluation view where neither is asked for.

    Args:
        crop_scale: Range of the crop's share of the image's area; (1, 1) turns cropping off.
        draws: A row of ``view_draws``.
    """
    cropped = tuple(crop_scale) != (1.0, 1.0)
    box = crop_box(height, width, crop_scale, draws) if cropped else centre_square(height, width)
    return View(*box, horizontal_flip and draws[-1] < 0.5)


def train_view(
    image: Tensor,
    *,
    image_size: int,
    crop_scale: tuple[float, float],
    horizontal_flip: bool,
    draws: Sequence[float],
) -> Tensor:
    """The view of uint8 (C, H, W) that ``draw_view`` draws, which has the other arguments: uint8 (C, S, S)."""
    view = draw_view(*image.shape[-2:], crop_scale=crop_scale, horizontal_flip=horizontal_flip, draws=draws)
    return view.cut(image, image_size)


def view_draws(seed: int, epochs: ArrayLike, samples: ArrayLike) -> NDArray[np.float64]:
    """The randomness of views: a function of seed, epoch and sample, and of nothing that ran before.

    SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014), started anew for
    each view from a hash of the three numbers. It takes a batch at once, where a generator of NumPy's for each image
    would cost as much as a tenth of its resizing.

    Args:
        epochs, samples: (B,), or one number each.

    Returns:
        (B, DRAWS), uniform in [0, 1).
    """
    numbers = np.broadcast_arrays(*(np.atleast_1d(np.asarray(value, dtype=np.uint64)) for value in (epochs, samples)))
    state = np.full(len(numbers[0]), seed % 2**64, dtype=np.uint64)
    for each in numbers:
        state = _mixed(_mixed(state + _GOLDEN) ^ each)
    words = _mixed(state[:, None] + np.arange(1, DRAWS + 1, dtype=np.uint64) * _GOLDEN)
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mixed(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser, a bijection of 64-bit words."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def crop_box(height: int, width: int, scale: tuple[float, float], draws: Sequence[float]) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a crop with a uniform share of the area and a log-uniform aspect ratio."""
    low, high = (math.log(ratio) for ratio in ASPECT_RANGE)
    for attempt in range(CROP_ATTEMPTS):
        share, shape = draws[2 * attempt : 2 * attempt + 2]
        area = height * width * (scale[0] + (scale[1] - scale[0]) * share)
        aspect = math.exp(low + (high - low) * shape)
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(draws[-3] * (height - crop_height + 1))
            left = int(draws[-2] * (width - crop_width + 1))
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
