"""SIGReg: how far a cloud of vectors is from an isotropic Gaussian (Balestriero & LeCun 2025, LeJEPA)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hjepa.losses.ranks import sum_over_ranks, world_size

NODES, REACH = 17, 3.0  # of the trapezoid rule over t in [0, REACH]


def directions(dim: int, count: int, *, seed: int, step: int, device: torch.device) -> Tensor:
    """Unit vectors (dim, count), uniform on the sphere: a function of (seed, step) alone, the same on every rank.

    They are drawn on the CPU, for a GPU's generator gives other numbers on another GPU, and sent from pinned memory,
    so that the host does not wait for the device.
    """
    drawn = torch.from_numpy(np.random.default_rng((seed, step)).standard_normal((dim, count), np.float32))
    drawn /= drawn.norm(dim=0)
    return drawn.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else drawn.to(device)


def sigreg(z: Tensor, directions: Tensor) -> Tensor:
    """The Epps-Pulley statistic of random projections, averaged over the directions.

    S = mean_m N sum_j w_j e^(-t_j^2/2) [(mean_n cos(t_j a_m.z_n) - e^(-t_j^2/2))^2 + (mean_n sin(t_j a_m.z_n))^2]

    with N vectors z_n over all ranks and w_j the trapezoid rule over [-3, 3]. Vectors are not standardised, so scale
    and mean count too. On N(0, I) its expectation is 1.05 for every N; a cloud of any other shape grows as N.

    Args:
        z: (L, B, K) in float32: L clouds of this rank's B vectors; every rank has as many.
        directions: (K, M) unit vectors.

    Returns:
        (L,) statistics of the clouds of all ranks together.
    """
    count = z.shape[1] * world_size()
    with torch.autocast(z.device.type, enabled=False):
        spacing = REACH / (NODES - 1)
        # Without the first node, t = 0: every characteristic function is 1 there.
        t = torch.arange(1, NODES, device=z.device) * spacing  # (T,)
        gaussian = torch.exp(-t.square() / 2)
        weights = 2 * spacing * gaussian  # twice, for the negative half of the integral is the same
        weights[-1] /= 2
        angles = (z @ directions).unsqueeze(-1) * t  # (L, B, M, T)
        sums = torch.stack([angles.cos().sum(1), angles.sin().sum(1)])
        cosine, sine = (sum_over_ranks(sums) / count).unbind()  # (L, M, T)
        distance = (cosine - gaussian).square() + sine.square()
        return count * (distance @ weights).mean(-1)
