"""Sums over all ranks that gradients flow through."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Ranks that share a batch; asked anew each time, for a loss may be made before its process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of ``x`` over all ranks, a new tensor. Every rank must go on with the same computation.

    Then every rank's gradient of the sum is the same, and what the ranks' losses together send back through it is the
    world size times that, without another message. Averaged over ranks, as DistributedDataParallel and FSDP average,
    parameters get the gradient of the loss of the global batch.
    """
    if world_size() == 1:
        return x
    total: Tensor = _SumOverRanks.apply(x)
    return total


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * world_size()
