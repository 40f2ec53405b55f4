"""Histograms made on the device: however many tensors, the host waits once."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from hjepa.utils.backends import Histogram

BINS = 64
MOST = 2**24  # values of one tensor that are counted: float32 counts no further; larger tensors are thinned evenly


def histograms(tensors: Mapping[str, Tensor]) -> dict[str, Histogram]:
    """A histogram per tensor, of any shape; those without a finite value are left out."""
    found: dict[str, Histogram] = {}
    devices = {tensor.device for tensor in tensors.values()}
    for device in devices:
        here = {name: tensor for name, tensor in tensors.items() if tensor.device == device and tensor.numel()}
        if not here:
            continue
        table = torch.stack([_describe(tensor) for tensor in here.values()]).cpu().double().numpy()
        for name, (low, high, total, squares, *counts) in zip(here, table, strict=True):
            if not np.isfinite(low):
                continue
            edges = np.linspace(low, high if high > low else low + 1.0, BINS + 1)
            found[name] = Histogram(np.array(counts), edges, float(low), float(high), float(total), float(squares))
    return {name: found[name] for name in tensors if name in found}


def _describe(tensor: Tensor) -> Tensor:
    """Minimum, maximum, sum, sum of squares, and counts of ``BINS`` equal bins between the first two: (4 + BINS,)."""
    flat = tensor.detach().reshape(-1)
    values = flat[:: -(-flat.numel() // MOST)].float()
    finite = values.isfinite()
    low = values.masked_fill(~finite, torch.inf).amin()
    high = values.masked_fill(~finite, -torch.inf).amax()
    clean = values.masked_fill(~finite, 0.0)
    width = torch.where(high > low, high - low, 1.0)
    # The bounds of histc are host numbers, so the values are brought to [0, 1]; it ignores what lies outside.
    counts = torch.histc(((clean - low) / width).masked_fill(~finite, -1.0), BINS, 0.0, 1.0)
    return torch.cat([torch.stack([low, high, clean.sum(), clean.square().sum()]), counts])


def total_norm(tensors: list[Tensor]) -> Tensor:
    """Euclidean norm of all values together, 0-d, on the device of the first."""
    norms = torch._foreach_norm([tensor.detach().float() for tensor in tensors])
    total: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
    return total
