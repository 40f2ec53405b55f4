"""What features are worth without a label: spectrum, spread, and how little a crop changes them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from hjepa.config import EvaluationConfig
from hjepa.data.transforms import train_view, view_draws
from hjepa.errors import UserError
from hjepa.evaluation.features import Batch, Encoder
from hjepa.utils.collapse import effective_rank, embedding_std

IMAGES, PAIRED_IMAGES = 5000, 2000  # at most so many are judged, and compared with each other


def measure(z: Tensor, views: Tensor | None = None) -> dict[str, float]:
    """All measures of the features ``z`` [n, D], and of ``views`` [m, q, D] where given, by name.

    ``rankme``, ``std``, ``alpha_req``, ``uniformity``, and of views ``alignment`` and ``lidar``. A measure that does
    not exist, such as the exponent of a spectrum of two values, is left out.
    """
    found = {
        "rankme": effective_rank(z[:IMAGES]),
        "std": embedding_std(z[:IMAGES]),
        "alpha_req": alpha_req(z[:IMAGES]),
        "uniformity": uniformity(z[:PAIRED_IMAGES]),
    }
    if views is not None:
        found |= {"alignment": alignment(views), "lidar": lidar(views)}
    return {name: value for name, value in found.items() if math.isfinite(value)}


def alpha_req(z: Tensor) -> float:
    """The exponent a of the eigenvalues i^-a of the covariance of ``z`` (Agrawal et al. 2022, section 3.1).

    Eigenvalues that rounding to float32 explains are left out. NaN for fewer than three others.
    """
    z = z.double()
    centred = z - z.mean(dim=0)
    gram = centred @ centred.T if len(z) <= z.shape[1] else centred.T @ centred
    spectrum = torch.linalg.eigvalsh(gram).flip(0) / len(z)
    return power_law(spectrum[spectrum > spectrum[0] * len(gram) * torch.finfo(torch.float32).eps])


def power_law(spectrum: Tensor) -> float:
    """The exponent a of values [k] ~ i^-a, largest first: least squares of log value against log i."""
    if len(spectrum) < 3 or spectrum[-1] <= 0:
        return math.nan
    ranks = torch.arange(1, len(spectrum) + 1, dtype=torch.float64).log()
    ranks -= ranks.mean()
    return float(-(ranks @ spectrum.double().log()) / ranks.square().sum())


def uniformity(z: Tensor) -> float:
    """log of the mean of exp(-2 |x - y|^2) over pairs of normalised features (Wang and Isola 2020, section 4.1.2).

    0 where all are alike; the smaller, the more evenly they cover the sphere. NaN for fewer than two.
    """
    if len(z) < 2:
        return math.nan
    unit = F.normalize(z.double(), dim=1)
    return float(torch.pdist(unit).square().mul(-2).exp().mean().log())


def alignment(views: Tensor) -> float:
    """Mean of |x - y|^2 over pairs of normalised views [n, q, D] of one image (Wang and Isola 2020, section 4.1.1)."""
    unit = F.normalize(views.double(), dim=2)
    count = unit.shape[1]
    # Of unit vectors: the sum of |x - y|^2 over ordered pairs is 2 q^2 - 2 |sum x|^2.
    return float((2 * count**2 - 2 * unit.sum(dim=1).square().sum(dim=1)).mean() / (count * (count - 1)))


def lidar(views: Tensor, delta: float = 1e-4) -> float:
    """LiDAR (Thilak et al. 2024, section 4): the effective rank of the linear discriminants of [n, q, D].

    Each image is a class and its views are the members. ``delta`` is added to the within-class covariance. 0 where
    all images look alike.
    """
    views = views.double()
    centres = views.mean(dim=1)
    between = centres - centres.mean(dim=0)
    within = (views - centres[:, None]).flatten(0, 1)
    covariance = within.T @ within / len(within) + delta * torch.eye(views.shape[2], dtype=views.dtype)
    root = torch.linalg.cholesky(covariance)
    whitened = torch.linalg.solve_triangular(root, between.T, upper=False)  # [D, n]
    spectrum = torch.linalg.svdvals(whitened).square()
    total = spectrum.sum()
    if total <= 0:
        return 0.0
    share = spectrum / total
    return float(torch.exp(-torch.special.xlogy(share, share).sum()))


@torch.inference_mode()
def embed_views(
    encoder: Encoder, batches: Iterable[Batch], *, config: EvaluationConfig, device: torch.device | str
) -> dict[str, Tensor]:
    """Level -> float32 [n, views, D], on the CPU: random resized crops of the first n = ``view_images`` images.

    A crop has the size of its image's short side. It depends on the first seed, the image's position and the view's
    number, and on nothing else.

    Raises:
        UserError: when there are no images.
    """
    device = torch.device(device)
    encoder.to(device)
    encoder.eval()
    parts: dict[str, list[Tensor]] = {}
    for crops in _batched(_crops(batches, config)):
        for level, rows in encoder.embed(encoder.preprocess([crop.to(device) for crop in crops])).items():
            parts.setdefault(level, []).append(rows.float().cpu())
    if not parts:
        raise UserError("no images to make views of: the split is empty. Prepare the data set with images in it")
    return {level: torch.cat(rows).view(-1, config.views, rows[0].shape[1]) for level, rows in parts.items()}


def _crops(batches: Iterable[Batch], config: EvaluationConfig) -> Iterator[Tensor]:
    """All views of the first image, then those of the second, and so on."""
    pictures = (picture for batch, _ in batches for picture in batch)
    for number, picture in enumerate(itertools.islice(pictures, config.view_images)):
        side = min(picture.shape[-2:])
        for view in range(config.views):
            draws = view_draws(config.seeds[0], view, number)[0].tolist()
            yield train_view(
                picture.cpu(), image_size=side, crop_scale=config.view_scale, horizontal_flip=False, draws=draws
            )


def _batched(crops: Iterator[Tensor], size: int = 256) -> Iterator[list[Tensor]]:
    while batch := list(itertools.islice(crops, size)):
        yield batch


def spearman(points: Sequence[Mapping[str, float]], x: str = "rankme", y: str = "knn_top1") -> float | None:
    """Rank correlation of two measures over a run's checkpoints; None for fewer than three, or if one never changes."""
    if len(points) < 3:
        return None
    a, b = (_ranks(np.array([point[name] for point in points], dtype=np.float64)) for name in (x, y))
    a, b = a - a.mean(), b - b.mean()
    norm = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / norm if norm else None


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks from 0 of the values; equal ones share the mean of theirs."""
    below, not_above = (values[:, None] > values).sum(axis=1), (values[:, None] >= values).sum(axis=1)
    ranks: NDArray[np.float64] = (below + not_above - 1) / 2
    return ranks
