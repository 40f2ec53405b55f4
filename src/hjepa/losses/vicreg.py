"""The variance and covariance terms of VICReg (Bardes, Ponce & LeCun 2022, eqs. 1 to 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from hjepa.errors import UserError
from hjepa.losses.ranks import sum_over_ranks, world_size

STD, EPSILON = 1.0, 1e-4  # gamma and epsilon of eq. 1
COVARIANCE = 1 / 25  # weight of the covariance term in units of the variance term's, as in the paper


def vicreg(z: Tensor) -> Tensor:
    """mean_d max(0, 1 - sqrt(Var z_d + epsilon)) + (1/25) sum_(d != e) Cov(z_d, z_e)^2 / K.

    Mean and (unbiased) covariance are those of the vectors of all ranks. There is no invariance term: every vector
    stands for another image.

    Args:
        z: (L, B, K) in float32: L clouds of this rank's B vectors; every rank has as many.

    Returns:
        (L,) terms.
    """
    count = z.shape[1] * world_size()
    if count < 2:
        raise UserError(
            "loss.regularizer.name=vicreg needs at least 2 images in a micro-batch, got 1; "
            "lower training.accumulation_steps or raise training.batch_size"
        )
    with torch.autocast(z.device.type, enabled=False):
        # Constant: around the mean of the whole batch, the covariance has no slope in the mean.
        mean = sum_over_ranks(z.detach().sum(1, keepdim=True)) / count
        centred = z - mean
        covariance = sum_over_ranks(centred.mT @ centred) / (count - 1)  # (L, K, K)
        variance = covariance.diagonal(dim1=1, dim2=2)  # (L, K)
        hinge = torch.relu(STD - torch.sqrt(variance + EPSILON)).mean(1)
        correlated = (covariance - variance.diag_embed()).square().sum((1, 2)) / z.shape[2]
        return hinge + COVARIANCE * correlated
