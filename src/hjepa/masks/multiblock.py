"""Multi-block masks (I-JEPA, Assran et al. 2023, section 3) on the cells of the coarsest level.

Every draw is a pure function of (seed, epoch, sample) or, for what the whole batch shares, of (seed, step): no state to
save, no worker or rank to agree with. Blocks are made of whole cells of the coarsest level, so a cell of any level is
wholly masked or wholly visible. The code is vectorised over the batch and runs in NumPy.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hjepa.config import Config
from hjepa.errors import UserError

Indices = NDArray[np.int64]
TRIES = 16
KEPT_SHARE = 0.75  # of the mean visible cells; a sample with fewer is drawn again, for the whole batch is cut to it


class Masks(NamedTuple):
    """context: (B, n) patches; targets: per level l, (B, M, m_l) cells of that level's grid, raster order."""

    context: Indices
    targets: list[Indices]


def uniform(key: int, *counters: Indices) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1) for the broadcast counters: SplitMix64 (Steele et al. 2014) used as a hash."""
    state: NDArray[np.uint64] = np.array(key, np.uint64)
    with np.errstate(over="ignore"):
        for counter in counters:
            state = _mix(state ^ (counter.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _array(number: int) -> Indices:
    return np.array([number], np.int64)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class MultiBlockMasking:
    """M target blocks of one size per batch and one context block minus the targets.

    Scale and aspect are drawn independently; a block may touch every edge, so every patch can be context and target.
    All images of a step keep the same number of context patches: the smallest count of the global batch, as a random
    subset of cells, never the raster's top. So that one unlucky image does not blind thousands, images with much less
    context than the mean are drawn again.
    """

    def __init__(self, config: Config):
        masking = config.masking
        self.cell = 2 ** (config.model.num_levels - 1)  # patches along a side of the coarsest level's cells
        self.grid = config.grid_size
        self.coarse = self.grid // self.cell
        self.num_levels = config.model.num_levels
        self.num_targets = masking.num_targets
        self.target_scale, self.target_aspect = masking.target_scale, masking.target_aspect
        self.context_scale = masking.context_scale
        self.min_cells = math.ceil(masking.min_context / self.cell**2)
        self.seed = config.seed
        self._floors: dict[tuple[int, int, int], int] = {}
        largest = max(
            h * w
            for scale in self.target_scale
            for aspect in (*self.target_aspect, 1.0)
            for h, w in [self._block(scale, aspect)]
        )
        if self.coarse**2 - largest < self.min_cells:
            raise UserError(
                f"masking.target_scale up to {self.target_scale[1]:g} hides {largest} of {self.coarse**2} cells of the "
                f"coarsest level and leaves fewer than masking.min_context={masking.min_context} visible patches; "
                "lower one of them, or use fewer levels"
            )

    def _block(self, scale: float, aspect: float) -> tuple[int, int]:
        """Height and width in coarse cells of a block with this share of the area; aspect = height / width."""
        area = scale * self.coarse**2
        side = [round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))]
        return min(max(side[0], 1), self.coarse), min(max(side[1], 1), self.coarse)

    def __call__(self, *, step: int, epoch: int, samples: Indices) -> Masks:
        """Masks for the global batch of a step.

        Args:
            step: optimiser step; with the seed it decides the block sizes that the batch shares.
            epoch: with the seed and the sample it decides where the blocks lie.
            samples: (B,) indices of the samples of the *global* batch, so that ranks and micro-batches agree.
        """
        low_high = np.array([self.target_scale, self.target_aspect, self.context_scale])
        draws = uniform(self.seed, _array(step), np.arange(3))
        scale, aspect, context_scale = low_high[:, 0] + draws * (low_high[:, 1] - low_high[:, 0])
        height, width = self._block(scale, aspect)
        side = self._block(context_scale, 1.0)[0]

        visible, top, left = self._place(epoch, samples, height, width, side)
        keep = int(visible.sum(1).min())
        priority = uniform(self.seed ^ 0x5EED, samples[:, None], _array(epoch), np.arange(self.coarse**2))
        cells = np.sort(np.argsort(np.where(visible, priority, 2.0), axis=1)[:, :keep], axis=1)
        return Masks(
            context=self._patches(cells),
            targets=[self._cells(top, left, height, width, level) for level in range(self.num_levels)],
        )

    def _place(
        self, epoch: int, samples: Indices, height: int, width: int, side: int
    ) -> tuple[NDArray[np.bool_], Indices, Indices]:
        """Visible coarse cells (B, coarse^2) and the corners (B, M) of the target blocks.

        Samples left with too little context are drawn again; what is still short after TRIES stacks its target
        blocks on the first one, which always leaves enough.
        """
        b, m = len(samples), self.num_targets
        top, left = np.empty((b, m), np.int64), np.empty((b, m), np.int64)
        visible = np.empty((b, self.coarse**2), bool)
        todo = np.arange(b)
        for attempt in range(TRIES):
            visible[todo], top[todo], left[todo] = self._draw(epoch, samples[todo], attempt, height, width, side)
            enough = self._floor(height, width, side) if attempt < TRIES // 2 else self.min_cells
            todo = todo[visible[todo].sum(1) < enough]
            if not len(todo):
                return visible, top, left
        top[todo], left[todo] = top[todo, :1], left[todo, :1]
        visible[todo] = ~self._inside(top[todo, 0], left[todo, 0], height, width)
        return visible, top, left

    def _draw(
        self, epoch: int, samples: Indices, attempt: int, height: int, width: int, side: int
    ) -> tuple[NDArray[np.bool_], Indices, Indices]:
        """One try: visible coarse cells (B, coarse^2) and the corners (B, M) of the target blocks."""
        m, g = self.num_targets, self.coarse
        draw = uniform(self.seed, samples[:, None], _array(epoch), _array(attempt), np.arange(2 * m + 2))
        top = (draw[:, :m] * (g - height + 1)).astype(np.int64)
        left = (draw[:, m : 2 * m] * (g - width + 1)).astype(np.int64)
        corner = (draw[:, 2 * m :] * (g - side + 1)).astype(np.int64)
        hidden = self._inside(top, left, height, width).any(1)
        return self._inside(corner[:, 0], corner[:, 1], side, side) & ~hidden, top, left

    def _inside(self, top: Indices, left: Indices, height: int, width: int) -> NDArray[np.bool_]:
        """Which coarse cells (..., coarse^2) lie in blocks with these corners (...)."""
        row, column = np.divmod(np.arange(self.coarse**2), self.coarse)
        top, left = top[..., None], left[..., None]
        return (row >= top) & (row < top + height) & (column >= left) & (column < left + width)

    def _floor(self, height: int, width: int, side: int) -> int:
        """Visible cells below which a sample is drawn again: a function of the block sizes, not of the batch."""
        if (height, width, side) not in self._floors:
            visible, _, _ = self._draw(0, np.arange(512), TRIES, height, width, side)
            floor = math.floor(KEPT_SHARE * float(visible.sum(1).mean()))
            self._floors[height, width, side] = max(floor, self.min_cells)
        return self._floors[height, width, side]

    def _patches(self, cells: Indices) -> Indices:
        """Coarse cells (B, k) -> their patches (B, k * cell^2)."""
        row, column = np.divmod(cells, self.coarse)
        return self._raster(row * self.cell, column * self.cell, self.cell, self.cell, self.grid).reshape(
            len(cells), -1
        )

    def _cells(self, top: Indices, left: Indices, height: int, width: int, level: int) -> Indices:
        """Cells (B, M, m_l) on the grid of ``level`` of blocks given in coarse cells."""
        factor = self.cell // 2**level
        return self._raster(top * factor, left * factor, height * factor, width * factor, self.grid // 2**level)

    @staticmethod
    def _raster(top: Indices, left: Indices, height: int, width: int, grid: int) -> Indices:
        """Raster indices (..., height*width) of blocks on a ``grid x grid`` grid."""
        row, column = np.divmod(np.arange(height * width), width)
        return (top[..., None] + row) * grid + left[..., None] + column
