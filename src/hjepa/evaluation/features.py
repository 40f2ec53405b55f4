"""Frozen features of labelled images: what every protocol of this package judges."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from hjepa.errors import FutileRetryError, UserError

UNLABELLED = -1
PIXELS = "-"  # raw pixels have no level

Images = Tensor | Sequence[Tensor]  # uint8, [B, C, H, W], or B images [C, H, W] of any sizes
Batch = tuple[Images, Tensor | None]  # labels int64 [B]; None or UNLABELLED where an image has none


class Encoder(Protocol):
    """The part of an exported encoder that evaluation uses; an nn.Module has the last two methods."""

    def preprocess(self, images: Any, /) -> Tensor: ...  # uint8 -> float [B, C, S, S]

    def embed(self, x: Tensor, /) -> dict[str, Tensor]: ...  # level ("0", "1", ..., "all") -> [B, D_level]

    def to(self, device: torch.device) -> Any: ...

    def eval(self) -> Any: ...


class Features(NamedTuple):
    """Features of one split: the same N images at every level."""

    tables: dict[str, Tensor]  # level -> float32 [N, D_level], on the CPU
    labels: Tensor  # int64 [N]

    @property
    def labelled(self) -> bool:
        return bool((self.labels >= 0).all())


@torch.inference_mode()
def extract(
    encoder: Encoder, batches: Iterable[Batch], device: torch.device | str, levels: Iterable[str] | None = None
) -> Features:
    """Embed every image once, at all levels in one forward pass.

    Args:
        encoder: Is moved to ``device`` and put into evaluation mode.
        levels: Which of the encoder's levels to keep; None keeps all.

    Raises:
        UserError: for a level the encoder does not have, or when there are no images.
        FutileRetryError: for features that are not finite.
    """
    device = torch.device(device)
    encoder.to(device)
    encoder.eval()
    wanted = None if levels is None else list(levels)
    parts: dict[str, list[Tensor]] = {}
    labels: list[Tensor] = []
    for images, batch_labels in batches:
        embedded = encoder.embed(encoder.preprocess(to_device(images, device)))
        for level in embedded if wanted is None else wanted:
            if level not in embedded:
                raise UserError(f"the encoder has no level {level!r}; choose from {', '.join(embedded)}")
            parts.setdefault(level, []).append(embedded[level].float().cpu())
        labels.append(labels_of(batch_labels, len(images)))
    return joined(parts, labels)


def raw_pixels(batches: Iterable[Batch], size: int) -> Features:
    """The baseline that sees nothing but pixels: [N, C * size * size], values in [0, 1].

    The short side is scaled to ``size`` pixels and the centre kept; images of that size are taken as they are.

    Raises:
        UserError: when there are no images.
    """
    parts: list[Tensor] = []
    labels: list[Tensor] = []
    for images, batch_labels in batches:
        stacks = [images] if isinstance(images, Tensor) else [image[None] for image in images]
        parts += [_square(stack, size).flatten(1) for stack in stacks]
        labels.append(labels_of(batch_labels, len(images)))
    return joined({PIXELS: parts}, labels)


def pixel_pca(train: Features, test: Features, components: int = 64) -> tuple[Features, Features]:
    """The principal components of ``raw_pixels``, fitted on the training images, for both splits.

    Args:
        components: At most so many; an image set cannot have more than it has images or pixels.
    """
    pixels = train.tables[PIXELS]
    mean = pixels.mean(dim=0)
    wanted = min(components, *pixels.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of the random directions that svd_lowrank begins with
        # A few more directions than wanted and four rounds: Halko et al. 2011, section 1.6.
        axes = torch.svd_lowrank(pixels - mean, q=min(wanted + 16, *pixels.shape), niter=4)[2][:, :wanted]
    projected = (Features({PIXELS: (split.tables[PIXELS] - mean) @ axes}, split.labels) for split in (train, test))
    return next(projected), next(projected)


def _square(images: Tensor, size: int) -> Tensor:
    """uint8 [B, C, H, W] -> float [B, C, size, size]."""
    pixels = images.float().div(255)
    height, width = pixels.shape[-2:]
    if (height, width) == (size, size):
        return pixels
    scale = size / min(height, width)
    shape = (max(size, round(height * scale)), max(size, round(width * scale)))
    pixels = F.interpolate(pixels, shape, mode="bilinear", antialias=True, align_corners=False)
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    return pixels[..., top : top + size, left : left + size]


def to_device(images: Images, device: torch.device) -> Images:
    if isinstance(images, Tensor):
        return images.to(device, non_blocking=True)
    return [image.to(device, non_blocking=True) for image in images]


def labels_of(labels: Tensor | None, count: int) -> Tensor:
    return torch.full((count,), UNLABELLED) if labels is None else labels.to("cpu", torch.int64)


def joined(parts: dict[str, list[Tensor]], labels: list[Tensor]) -> Features:
    if not labels:
        raise UserError(
            "no images to evaluate: the split is empty. Prepare the data set with images in it, "
            "or raise evaluation.train_samples and evaluation.test_samples"
        )
    tables = {}
    for level in list(parts):
        tables[level] = torch.cat(parts.pop(level))  # popped, so that only one level is ever held twice
        broken = int((~tables[level].isfinite().all(dim=1)).sum())
        if broken:
            raise FutileRetryError(
                f"the features at level {level} of {broken} of {len(tables[level])} images are not finite: the "
                "weights or the preprocessing statistics are damaged. Export an earlier checkpoint and evaluate that"
            )
    return Features(tables, torch.cat(labels))
