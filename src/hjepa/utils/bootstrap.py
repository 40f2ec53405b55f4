"""Percentile bootstrap over test items (Efron and Tibshirani 1993, section 13.3).

NumPy only, for the registry compares models where there is no torch.

The same seed and number of items always give the same resamples, so that all metrics of a table, and two models judged
on the same test items, are compared item by item.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
CHUNK_ITEMS = 4_000_000  # resampled items held at once: 32 MB of counts, and as much of indices


def intervals(
    per_item: NDArray[Any], *, resamples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> tuple[Array, Array]:
    """Lower and upper end of the interval of each column's mean.

    Args:
        per_item: [M, K], such as 1 where metric k got item m right and 0 where not. NaN where an item was not asked;
            it then counts neither above nor below the line of the mean.

    Returns:
        Two arrays [K]; NaN where a column has no item.

    Raises:
        ValueError: no items, or not two dimensions.
    """
    values = np.asarray(per_item, dtype=np.float64)
    if values.ndim != 2 or not len(values):
        raise ValueError(f"expected the values [M, K] of at least one item, got the shape {list(values.shape)}")
    asked = np.isfinite(values)
    filled = np.where(asked, values, 0.0)
    complete = bool(asked.all())
    means = []
    for counts in _resamples(len(values), resamples, seed):
        drawn = len(values) if complete else counts @ asked.astype(np.float64)
        with np.errstate(invalid="ignore"):  # 0 / 0 where a resample has none of the items asked
            means.append(counts @ filled / drawn)
    tail = (1 - confidence) / 2
    found = np.concatenate(means)  # [resamples, K]
    ends = np.full((2, values.shape[1]), np.nan)
    for k in range(values.shape[1]):
        usable = found[np.isfinite(found[:, k]), k]
        if len(usable):
            ends[:, k] = np.quantile(usable, [tail, 1 - tail])
    return ends[0], ends[1]


def paired_difference(
    a: NDArray[Any], b: NDArray[Any], *, resamples: int = 2000, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float, float]:
    """Mean of ``a - b`` over the same items, with its interval: (difference, low, high).

    Args:
        a, b: [M], what two models scored on the same M items in the same order.

    Raises:
        ValueError: not the same number of items, or none.
    """
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"expected two lists of as many items, got the shapes {list(a.shape)} and {list(b.shape)}")
    difference = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    low, high = intervals(difference[:, None], resamples=resamples, confidence=confidence, seed=seed)
    return float(difference.mean()), float(low[0]), float(high[0])


def _resamples(items: int, resamples: int, seed: int) -> Iterator[Array]:
    """How often each item is drawn, [n, items] at a time, ``resamples`` rows in all."""
    generator = np.random.default_rng(seed)
    rows = max(1, CHUNK_ITEMS // items)
    for start in range(0, resamples, rows):
        count = min(rows, resamples - start)
        drawn = generator.integers(items, size=(count, items))
        drawn += np.arange(count)[:, None] * items
        yield np.bincount(drawn.ravel(), minlength=count * items).reshape(count, items).astype(np.float64)
