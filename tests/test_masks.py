"""Masks: where they may lie, how often, and that they are a function of their inputs."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from hjepa.config import Config, load_config
from hjepa.errors import UserError
from hjepa.masks import Masks, MultiBlockMasking


def config(size: int, patch: int, levels: int, *overrides: str) -> Config:
    text = f"data: {{image_size: {size}}}\nmodel: {{patch_size: {patch}, num_levels: {levels}}}\n"
    return load_config(text, overrides)


def assert_equal(a: Masks, b: Masks) -> None:
    for x, y in zip([a.context, *a.targets, a.union, a.place], [b.context, *b.targets, b.union, b.place], strict=True):
        assert np.array_equal(x, y)
    assert a.rows == b.rows


GRIDS = [(224, 16, 1), (224, 16, 2), (256, 16, 3), (28, 7, 2), (32, 4, 1)]


@pytest.mark.parametrize(("size", "patch", "levels"), GRIDS)
def test_masks__cells_are_wholly_masked_or_wholly_visible(size: int, patch: int, levels: int) -> None:
    masking = MultiBlockMasking(config(size, patch, levels))
    grid = size // patch
    for step in range(20):
        masks = masking(step=step, epochs=0, samples=np.arange(32))
        for b in range(32):
            context, hidden = set(masks.context[b]), set(masks.targets[0][b].ravel())
            assert len(context) == masks.context.shape[1]
            assert not context & hidden
            for level in range(levels):
                cell, side = 2**level, grid // 2**level
                for block in range(4):
                    patches = set(masks.targets[0][b, block])
                    merged = {(p // grid // cell) * side + p % grid // cell for p in patches}
                    assert merged == set(masks.targets[level][b, block])
                    assert len(merged) * cell**2 == len(patches)


@pytest.mark.parametrize(("size", "patch", "levels"), GRIDS)
def test_masks__union_holds_every_target_once_and_place_finds_it(size: int, patch: int, levels: int) -> None:
    masking = MultiBlockMasking(config(size, patch, levels))
    n = (size // patch) ** 2
    for step in range(20):
        masks = masking(step=step, epochs=0, samples=np.arange(32))
        found = np.take_along_axis(masks.union, masks.place.reshape(32, -1), 1).reshape(masks.place.shape)
        assert np.array_equal(found, masks.targets[0])
        assert all(len(set(patches)) == len(patches) for patches in masks.union.tolist())
        needed = max(len(set(patches)) for patches in masks.targets[0].reshape(32, -1).tolist())
        assert masks.union.shape[1] == min(-(-needed // 8) * 8, n)
        assert masks.union.min() >= 0
        assert masks.union.max() < n
        rows = masks.targets[-1] // (size // patch // 2 ** (levels - 1))
        assert masks.rows == np.ptp(rows, axis=2).max() + 1
        for cells in masks.targets:  # raster order
            assert (np.diff(cells, axis=2) > 0).all()


def test_masks__same_inputs_same_masks_and_a_sample_does_not_depend_on_its_neighbours() -> None:
    masking = MultiBlockMasking(config(224, 16, 2))
    a = masking(step=7, epochs=2, samples=np.arange(64))
    assert_equal(a, MultiBlockMasking(config(224, 16, 2))(step=7, epochs=2, samples=np.arange(64)))
    alone = masking(step=7, epochs=2, samples=np.array([13]))
    assert np.array_equal(alone.targets[0][0], a.targets[0][13])
    assert set(a.context[13]) <= set(alone.context[0])
    assert not np.array_equal(a.targets[0], masking(step=7, epochs=3, samples=np.arange(64)).targets[0])
    other_seed = MultiBlockMasking(config(224, 16, 2, "seed=1"))(step=7, epochs=2, samples=np.arange(64))
    assert a.targets[0].shape != other_seed.targets[0].shape or not np.array_equal(a.targets[0], other_seed.targets[0])


def test_masks__in_a_batch_that_straddles_epochs_each_sample_has_the_mask_of_its_own() -> None:
    masking = MultiBlockMasking(config(224, 16, 2))
    samples, epochs = np.array([5, 9, 2, 5, 9]), np.array([4, 4, 4, 5, 5])
    mixed = masking(step=3, epochs=epochs, samples=samples)
    for epoch in (4, 5):
        whole = masking(step=3, epochs=epoch, samples=samples)
        own = epochs == epoch
        assert np.array_equal(mixed.targets[0][own], whole.targets[0][own])
    assert not np.array_equal(mixed.targets[0][0], mixed.targets[0][3])
    alone = masking(step=3, epochs=5, samples=samples[3:4])
    assert set(mixed.context[3]) <= set(alone.context[0])


def test_masks__take_is_the_masks_of_some_images() -> None:
    masks = MultiBlockMasking(config(224, 16, 2))(step=0, epochs=0, samples=np.arange(8))
    assert_equal(masks.take(slice(2, 5)), masks.take(np.array([2, 3, 4])))
    assert np.array_equal(masks.take(slice(2, 5)).targets[1], masks.targets[1][2:5])
    assert_equal(masks.take(slice(None)), masks)


# -- how often a patch is visited ------------------------------------------------------------------------------------


def cover(grid: int, length: int) -> NDArray[np.float64]:
    """Of all places of a run of ``length`` on a line of ``grid``, the share that covers each position."""
    places = range(grid - length + 1)
    return np.array([sum(t <= r < t + length for t in places) for r in range(grid)]) / len(places)


@pytest.mark.parametrize("levels", [1, 2])
def test_masks__every_patch_is_target_at_the_rate_of_the_closed_form(levels: int) -> None:
    """Blocks lie uniformly: a patch is covered by the product of its row's and its column's share, 4 blocks each.

    Drawing crowded images again lowers the rate of a corner by some percent, hence the tolerance.
    """
    masking = MultiBlockMasking(config(224, 16, levels))
    cell = 2 ** (levels - 1)
    visits, expected, steps, batch = np.zeros(196), np.zeros((14, 14)), 200, 128
    for step in range(steps):
        masks = masking(step=step, epochs=0, samples=np.arange(batch) + step * batch)
        np.add.at(visits, masks.targets[0].ravel(), 1 / (steps * batch))
        height, width = masks.rows, masks.targets[-1].shape[2] // masks.rows
        share = 4 * np.outer(cover(14 // cell, height), cover(14 // cell, width))
        expected += np.kron(share, np.ones((cell, cell))) / steps
    assert expected.min() > 0.04
    np.testing.assert_allclose(visits.reshape(14, 14), expected, rtol=0.11)
    np.testing.assert_allclose(visits.mean(), expected.mean(), rtol=1e-9)


def simulated(grid: int, steps: int, batch: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Context and target rates of the method, image by image, as one would explain it; one level."""
    rng = np.random.default_rng(0)
    context, target = np.zeros((grid, grid)), np.zeros((grid, grid))

    def image(height: int, width: int, side: int) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        visible, hits = np.zeros((grid, grid), bool), np.zeros((grid, grid), np.int64)
        top, left = rng.integers(0, grid - side + 1, 2)
        visible[top : top + side, left : left + side] = True
        for _ in range(4):
            top, left = rng.integers(0, grid - height + 1), rng.integers(0, grid - width + 1)
            hits[top : top + height, left : left + width] += 1
        return visible & (hits == 0), hits

    for _ in range(steps):
        scale, aspect, area = rng.uniform((0.15, 0.75, 0.85), (0.2, 1.5, 1.0))
        height, width = round(math.sqrt(scale * aspect) * grid), round(math.sqrt(scale / aspect) * grid)
        side = round(math.sqrt(area) * grid)
        floor = 0.75 * np.mean([image(height, width, side)[0].sum() for _ in range(batch)])
        drawn = []
        while len(drawn) < batch:
            visible, hits = image(height, width, side)
            if visible.sum() >= math.floor(floor):
                drawn.append((visible, hits))
        fewest = min(visible.sum() for visible, _ in drawn)
        for visible, hits in drawn:
            context.flat[rng.permutation(np.flatnonzero(visible))[:fewest]] += 1 / (steps * batch)
            target += hits / (steps * batch)
    return context, target


def symmetric(rate: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean over the mirror images; height and width are not exchangeable."""
    rate = rate + rate[::-1]
    return (rate + rate[:, ::-1]) / 4


def test_masks__every_patch_is_visited_at_the_rate_of_an_independent_simulation() -> None:
    masking = MultiBlockMasking(config(224, 16, 1))
    steps, batch = 160, 64
    context, target = np.zeros(196), np.zeros(196)
    for step in range(steps):
        masks = masking(step=step, epochs=step, samples=np.arange(batch))
        np.add.at(context, masks.context.ravel(), 1 / (steps * batch))
        np.add.at(target, masks.targets[0].ravel(), 1 / (steps * batch))
    for found, expected in zip((context, target), simulated(14, steps, batch), strict=True):
        found = found.reshape(14, 14)
        assert found.min() > 0.03, "a patch that is never visited is never learned"
        np.testing.assert_allclose(symmetric(found), symmetric(expected), rtol=0.15, atol=0.01)
        np.testing.assert_allclose(found, symmetric(found), rtol=0.25, atol=0.02)


def test_masks__scale_and_aspect_are_independent() -> None:
    masking = MultiBlockMasking(config(1024, 16, 1))
    area, aspect = [], []
    for step in range(400):
        rows, columns = np.divmod(masking(step=step, epochs=0, samples=np.arange(1)).targets[0][0, 0], 64)
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        area.append(height * width / 4096)
        aspect.append(height / width)
    assert abs(np.corrcoef(area, aspect)[0, 1]) < 0.15
    assert min(area) > 0.14
    assert max(area) < 0.21
    assert min(aspect) < 0.85
    assert max(aspect) > 1.35


# -- how much context ------------------------------------------------------------------------------------------------


def test_masks__every_image_keeps_the_least_context() -> None:
    masking = MultiBlockMasking(config(28, 7, 2, "masking.num_targets=4", "data.channels=1"))
    for step in range(20):
        masks = masking(step=step, epochs=0, samples=np.arange(500))
        assert masks.context.shape[1] >= 4
    masking = MultiBlockMasking(config(224, 16, 1, "masking.min_context=60"))
    for step in range(20):
        masks = masking(step=step, epochs=0, samples=np.arange(64))
        assert masks.context.shape[1] >= 60


def test_masks__redrawing_spares_the_batch_its_unluckiest_images() -> None:
    """Without it the sampler is I-JEPA's: the whole batch is cut to whatever the first draws left."""
    anew, once = (MultiBlockMasking(config(224, 16, 1, f"masking.redraw_below={share}")) for share in (0.75, 0.0))
    kept: dict[str, list[int]] = {"anew": [], "once": []}
    for step in range(30):
        draw = {"step": step, "epochs": 0, "samples": np.arange(128)}
        first, second = once(**draw), anew(**draw)  # type: ignore[arg-type]
        kept["once"].append(first.context.shape[1])
        kept["anew"].append(second.context.shape[1])
        same = (first.targets[0] == second.targets[0]).all((1, 2))
        assert 0.5 < same.mean() < 1
    assert np.mean(kept["once"]) < 60
    assert np.mean(kept["anew"]) > 65


@pytest.mark.parametrize(
    ("levels", "multiple", "step"), [(1, 8, 8), (1, 10, 10), (2, 8, 8), (2, 6, 12), (2, 2, 4), (2, 1, 4)]
)
def test_masks__context_is_a_multiple_of_patches_in_whole_cells(levels: int, multiple: int, step: int) -> None:
    free = MultiBlockMasking(config(224, 16, levels))
    masking = MultiBlockMasking(config(224, 16, levels, f"masking.context_multiple={multiple}"))
    cell, lengths = 2 ** (levels - 1), set()
    for number in range(30):
        masks = masking(step=number, epochs=0, samples=np.arange(16))
        lengths.add(masks.context.shape[1])
        row, column = np.divmod(masks.context, 14)
        cells = row // cell * 14 + column // cell
        assert all(np.unique(c, return_counts=True)[1].min() == cell**2 for c in cells), "a cell is seen whole"
        whole = free(step=number, epochs=0, samples=np.arange(16))
        assert np.array_equal(masks.targets[0], whole.targets[0])
        assert masks.context.shape[1] == whole.context.shape[1] // step * step
    assert all(length % step == 0 for length in lengths)


def test_masks__the_multiple_never_cuts_below_the_least_context() -> None:
    masking = MultiBlockMasking(config(32, 4, 1, "masking.min_context=20", "masking.context_multiple=16"))
    for step in range(30):
        assert masking(step=step, epochs=0, samples=np.arange(256)).context.shape[1] >= 32


def test_masks__impossible_context_is_refused_with_the_keys_to_change() -> None:
    with pytest.raises(UserError, match=r"masking.target_scale.*masking.min_context"):
        MultiBlockMasking(config(28, 7, 2, "masking.target_scale=[0.9, 1.0]"))
    with pytest.raises(UserError, match=r"masking.context_multiple=64"):
        MultiBlockMasking(config(32, 4, 1, "masking.context_multiple=64"))
