"""What the report draws, computed from tensors: feature maps, neighbours, an embedding map, errors by position."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from hjepa.models import HJEPAModel, MaskTensors
from hjepa.utils.pictures import Picture

Images = Tensor | Sequence[Tensor]  # uint8 (n, C, H, W), or n images (C, H, W) of any sizes
SPREAD = 0.01  # the share of values at either end that may be clipped when a component becomes a colour


class DenseEncoder(Protocol):
    """The part of an exported encoder that is used here."""

    @property
    def levels(self) -> list[int]: ...

    def preprocess(self, images: Images, /) -> Tensor: ...  # uint8 -> normalised (n, C, S, S)

    def tokens(self, x: Tensor, level: int = 0) -> Tensor: ...  # (n, cells of the level, D), raster order


@torch.inference_mode()
def pca_maps(encoder: DenseEncoder, images: Images, *, device: torch.device | str = "cpu") -> list[Picture]:
    """The dense features of every level as colours: the first three principal components are red, green and blue.

    The components are those of all cells of all ``images`` together, so a colour means the same in every image of a
    level, and nothing across levels.

    Returns:
        Per level (n, S, S, 3), where S is the side in pixels of what ``encoder.preprocess`` makes of an image.
    """
    x = encoder.preprocess(images).to(device)
    maps = []
    for level in encoder.levels:
        tokens = encoder.tokens(x, level).cpu()  # (n, cells, D)
        count, cells, dim = tokens.shape
        grid = round(cells**0.5)
        colours = _as_bytes(principal_components(tokens.reshape(-1, dim), 3)).view(count, grid, grid, 3)
        large = F.interpolate(colours.permute(0, 3, 1, 2), x.shape[-2:], mode="nearest-exact")
        maps.append(large.permute(0, 2, 3, 1).contiguous().numpy())
    return maps


@torch.inference_mode()
def principal_components(x: Tensor, count: int) -> Tensor:
    """Coordinates (N, count), float64, of the rows of ``x`` (N, D) along their first principal axes.

    The sign of an axis is free; it is chosen so that its largest entry is positive. Axes beyond D are zero.
    """
    centred = x.double() - x.double().mean(0)
    _, axes = torch.linalg.eigh(centred.T @ centred)  # ascending
    axes = axes.flip(1)[:, :count]  # (D, count)
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    found = centred @ (axes * torch.where(largest < 0, -1.0, 1.0))
    return F.pad(found, (0, count - found.shape[1]))


def _as_bytes(x: Tensor) -> Tensor:
    """(N, K) -> uint8, each column scaled so that all but its extremes span 0 to 255; 128 where nothing differs."""
    low, high = np.quantile(x.numpy(), [SPREAD, 1 - SPREAD], axis=0)
    low, high = torch.from_numpy(low), torch.from_numpy(high)
    tiny = 1e-9 * x.abs().amax().clamp(min=1e-12)
    scaled = torch.where(high - low > tiny, (x - low) / (high - low).clamp(min=tiny), 0.5)
    return (scaled.clamp(0, 1) * 255).round().to(torch.uint8)


@torch.inference_mode()
def nearest(train_x: Tensor, test_x: Tensor, k: int) -> Tensor:
    """Rows of ``train_x`` (N, D) most like each row of ``test_x`` (n, D): int64 (n, min(k, N)), the nearest first.

    Likeness is the cosine of features centred on the training mean, as k-NN classification uses it.
    """
    mean = train_x.mean(0)
    likeness = F.normalize(test_x - mean, dim=1) @ F.normalize(train_x - mean, dim=1).T
    return likeness.topk(min(k, len(train_x)), dim=1).indices


def embedding_map(x: Tensor) -> NDArray[np.float64]:
    """(n, 2): the rows of ``x`` (n, D) along their first two principal axes. Labels play no part in it."""
    return principal_components(x, 2).numpy()


@torch.inference_mode()
def position_errors(
    model: HJEPAModel, batches: Iterable[tuple[Tensor, MaskTensors]], *, beta: float = 1.0
) -> list[NDArray[np.float64]]:
    """Where on the image the predictions miss: per level (grid, grid), the mean smooth-L1 error of a cell.

    Args:
        batches: Normalised images (B, C, S, S) and their masks.
        beta: ``loss.smooth_l1_beta``.

    Returns:
        NaN where no mask covered the cell.
    """
    training = model.training
    model.eval()
    grids = [model.context_encoder.grid >> level for level in range(model.num_levels)]
    sums = [torch.zeros(grid**2, dtype=torch.float64) for grid in grids]
    counts = [torch.zeros(grid**2, dtype=torch.float64) for grid in grids]
    for images, masks in batches:
        out = model(images, masks)
        for level, (prediction, target) in enumerate(zip(out.predictions, out.targets, strict=True)):
            error = F.smooth_l1_loss(prediction.float(), target, beta=beta, reduction="none").mean(-1)  # (B, M, m)
            cells = masks.targets[level].flatten().cpu()
            sums[level].index_add_(0, cells, error.flatten().double().cpu())
            counts[level] += torch.bincount(cells, minlength=len(counts[level]))
    model.train(training)
    return [(s / n).view(grid, grid).numpy() for s, n, grid in zip(sums, counts, grids, strict=True)]
