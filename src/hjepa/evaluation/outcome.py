"""What a protocol found, and how images are drawn for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Outcome:
    """One metric of one level."""

    value: float  # from 0 to 1; the mean over seeds where there are several
    per_item: Tensor | None = None  # float32 [M], each test item's share of the value; NaN where it was not asked
    predicted: Tensor | None = None  # int64 [M], the class of each test item; of the first seed
    std: float | None = None  # over the seeds, with n - 1; None for fewer than two


Outcomes = Mapping[str, Outcome]  # by metric


def accuracy(predicted: Tensor, expected: Tensor) -> Outcome:
    """The share of items (int64 [M] both) whose class is predicted."""
    return accuracy_over_seeds([predicted], expected)


def accuracy_over_seeds(predicted: Sequence[Tensor], expected: Tensor) -> Outcome:
    """Mean and spread of the accuracy of one prediction (int64 [M]) per seed."""
    correct = torch.stack([answers == expected for answers in predicted]).double()  # [seeds, M]
    scores = correct.mean(dim=1)
    std = scores.std().item() if len(scores) > 1 else None
    return Outcome(scores.mean().item(), correct.mean(dim=0).float(), predicted[0], std)


def stratified(labels: Tensor, share: float, *, seed: int, at_least: int = 0) -> Tensor:
    """bool [N]: a random ``share`` of the images of each class, rounded, and at least so many of each.

    Args:
        labels: int64 [N].
        at_least: Where a class has fewer images, all of them.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in torch.unique(labels):
        members = (labels == label).nonzero().flatten()
        count = max(at_least, round(share * len(members)))
        chosen[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return chosen


def sample(count: int, limit: int, *, seed: int) -> Tensor:
    """int64 [min(count, limit)], ascending: a random choice of the indices below ``count``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(count, generator=generator)[:limit].sort().values
