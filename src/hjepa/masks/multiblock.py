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
UNION_MULTIPLE = 8  # patches: a matrix product likes whole tiles, and a compiled model few shapes


class Masks(NamedTuple):
    """What every image of a batch of B shows and hides. N patches per image, M target blocks, int64."""

    context: Indices  # (B, n) visible patches
    targets: list[Indices]  # per level l, (B, M, m_l) masked cells of that level's grid, a block's in raster order
    union: Indices  # (B, U) every patch of a target block, filled up with other patches; none twice, ascending
    place: Indices  # (B, M, m_0) where in ``union`` the patches of ``targets[0]`` stand
    rows: int  # height of a target block in cells of the coarsest level

    def take(self, images: slice | Indices) -> Masks:
        """The masks of some of the images."""
        targets = [cells[images] for cells in self.targets]
        return Masks(self.context[images], targets, self.union[images], self.place[images], self.rows)


def _hash(key: int, *counters: Indices) -> NDArray[np.uint64]:
    """64 random bits for the broadcast counters: SplitMix64 (Steele et al. 2014) used as a hash."""
    state: NDArray[np.uint64] = np.array(key, np.uint64)
    with np.errstate(over="ignore"):
        for counter in counters:
            state = _mix(state ^ (counter.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)))
    return state


def uniform(key: int, *counters: Indices) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1) for the broadcast counters."""
    return (_hash(key, *counters) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _array(number: int) -> Indices:
    return np.array([number], np.int64)


def _columns(chosen: NDArray[np.bool_]) -> Indices:
    """Where each row of (B, N) is true, ascending: (B, k) if every row is true k times."""
    b, n = chosen.shape
    columns: Indices = np.flatnonzero(chosen).reshape(b, -1) - n * np.arange(b)[:, None]
    return columns


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


class MultiBlockMasking:
    """M target blocks of one size per batch and one context block minus the targets.

    Scale and aspect are drawn independently; a block may touch every edge, so every patch can be context and target.
    All images of a step keep the same number of context patches: the smallest count of the global batch, cut down to a
    multiple of ``masking.context_multiple`` and of a coarse cell's patches, as a random subset of coarse cells, never
    the raster's top. So that one unlucky image does not blind thousands, images with less than
    ``masking.redraw_below`` of the mean context are drawn again; at 0, I-JEPA's behaviour, only those with less than
    ``masking.min_context``.
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
        # Every image keeps so many cells that cutting to the multiple never goes below min_context.
        patches = math.lcm(masking.context_multiple, self.cell**2)
        self.multiple = patches // self.cell**2  # of visible coarse cells
        self.min_cells = math.ceil(masking.min_context / patches) * self.multiple
        self.redraw_below = masking.redraw_below
        self.seed = config.seed
        self._floors: dict[tuple[int, int, int], int] = {}
        largest = max(
            h * w
            for scale in self.target_scale
            for aspect in (*self.target_aspect, 1.0)
            for h, w in [self._block(scale, aspect)]
        )
        if self.coarse**2 - largest < self.min_cells:
            needed = f"masking.min_context={masking.min_context}"
            if patches > self.cell**2:
                needed += f" (in multiples of {patches}, from masking.context_multiple={masking.context_multiple})"
            raise UserError(
                f"masking.target_scale up to {self.target_scale[1]:g} hides {largest} of {self.coarse**2} cells of the "
                f"coarsest level and leaves fewer than {needed} visible patches; "
                "lower one of them, or use fewer levels"
            )

    def _block(self, scale: float, aspect: float) -> tuple[int, int]:
        """Height and width in coarse cells of a block with this share of the area; aspect = height / width."""
        area = scale * self.coarse**2
        side = [round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))]
        return min(max(side[0], 1), self.coarse), min(max(side[1], 1), self.coarse)

    def __call__(self, *, step: int, epochs: int | Indices, samples: Indices) -> Masks:
        """Masks for the global batch of a step.

        Args:
            step: optimiser step; with the seed it decides the block sizes that the batch shares.
            epochs: with the seed and the sample it decides where a sample's blocks lie: one for all, or (B,), for a
                batch may hold the end of one epoch and the start of the next.
            samples: (B,) indices of the samples of the *global* batch, so that ranks and micro-batches agree.
        """
        low_high = np.array([self.target_scale, self.target_aspect, self.context_scale])
        draws = uniform(self.seed, _array(step), np.arange(3))
        scale, aspect, context_scale = low_high[:, 0] + draws * (low_high[:, 1] - low_high[:, 0])
        height, width = self._block(scale, aspect)
        side = self._block(context_scale, 1.0)[0]

        epochs = np.broadcast_to(np.asarray(epochs, np.int64), samples.shape)
        visible, top, left = self._place(epochs, samples, height, width, side)
        targets = [self._cells(top, left, height, width, level) for level in range(self.num_levels)]
        union, place = self.union(targets[0])
        context = self._patches(self._keep(visible, epochs, samples))
        return Masks(context, targets, union, place, height)

    def _keep(self, visible: NDArray[np.bool_], epochs: Indices, samples: Indices) -> Indices:
        """Coarse cells (B, k), ascending: of each image's visible ones as many as all of them have."""
        count = int(visible.sum(1).min()) // self.multiple * self.multiple
        cells = np.arange(visible.shape[1])
        priority = _hash(self.seed ^ 0x5EED, samples[:, None], epochs[:, None], cells)
        priority = (priority & ~np.uint64(0xFFFFF)) | cells.astype(np.uint64)  # no ties: exactly `count` are kept
        priority[~visible] = np.iinfo(np.uint64).max
        limit = np.partition(priority, count - 1, axis=1)[:, count - 1 : count]
        return _columns(priority <= limit)

    def union(self, targets: Indices) -> tuple[Indices, Indices]:
        """``Masks.union`` and ``Masks.place`` of the target blocks' patches (B, M, m_0)."""
        b, n = len(targets), self.grid**2
        image = np.arange(b)[:, None]
        flat = targets.reshape(b, -1) + n * image
        chosen = np.zeros((b, n), bool)
        chosen.ravel()[flat] = True
        count = chosen.sum(1, keepdims=True)
        size = min(-(-int(count.max()) // UNION_MULTIPLE) * UNION_MULTIPLE, n)
        chosen |= np.cumsum(~chosen, axis=1, dtype=np.int32) <= size - count
        union = _columns(chosen)
        place = np.empty(b * n, np.int64)
        place[union + n * image] = np.arange(size)
        return union, place[flat].reshape(targets.shape)

    def _place(
        self, epochs: Indices, samples: Indices, height: int, width: int, side: int
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
            visible[todo], top[todo], left[todo] = self._draw(epochs[todo], samples[todo], attempt, height, width, side)
            enough = self._floor(height, width, side) if attempt < TRIES // 2 else self.min_cells
            todo = todo[visible[todo].sum(1) < enough]
            if not len(todo):
                return visible, top, left
        top[todo], left[todo] = top[todo, :1], left[todo, :1]
        visible[todo] = ~self._inside(top[todo, 0], left[todo, 0], height, width)
        return visible, top, left

    def _draw(
        self, epochs: Indices, samples: Indices, attempt: int, height: int, width: int, side: int
    ) -> tuple[NDArray[np.bool_], Indices, Indices]:
        """One try: visible coarse cells (B, coarse^2) and the corners (B, M) of the target blocks."""
        m, g = self.num_targets, self.coarse
        draw = uniform(self.seed, samples[:, None], epochs[:, None], _array(attempt), np.arange(2 * m + 2))
        top = (draw[:, :m] * (g - height + 1)).astype(np.int64)
        left = (draw[:, m : 2 * m] * (g - width + 1)).astype(np.int64)
        corner = (draw[:, 2 * m :] * (g - side + 1)).astype(np.int64)
        hidden = self._inside(top, left, height, width).any(1)
        return self._inside(corner[:, 0], corner[:, 1], side, side) & ~hidden, top, left

    def _inside(self, top: Indices, left: Indices, height: int, width: int) -> NDArray[np.bool_]:
        """Which coarse cells (..., coarse^2) lie in blocks with these corners (...)."""
        row, column = np.divmod(np.arange(self.coarse**2, dtype=np.uint32), np.uint32(self.coarse))
        row, column = row.astype(np.uint16), column.astype(np.uint16)
        # Without a sign, what lies before the corner wraps around to far behind it.
        below, right = row - top.astype(np.uint16)[..., None], column - left.astype(np.uint16)[..., None]
        inside: NDArray[np.bool_] = (below < height) & (right < width)
        return inside

    def _floor(self, height: int, width: int, side: int) -> int:
        """Visible cells below which a sample is drawn again: a function of the block sizes, not of the batch."""
        if (height, width, side) not in self._floors:
            visible, _, _ = self._draw(np.zeros(512, np.int64), np.arange(512), TRIES, height, width, side)
            floor = math.floor(self.redraw_below * float(visible.sum(1).mean()))
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
