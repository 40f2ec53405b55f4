"""Masks: where they may lie, how often, and that they are a function of their inputs."""

from __future__ import annotations

import numpy as np
import pytest

from hjepa.config import Config, load_config
from hjepa.errors import UserError
from hjepa.masks import MultiBlockMasking


def config(size: int, patch: int, levels: int, *overrides: str) -> Config:
    text = f"data: {{image_size: {size}}}\nmodel: {{patch_size: {patch}, num_levels: {levels}}}\n"
    return load_config(text, overrides)


@pytest.mark.parametrize(("size", "patch", "levels"), [(224, 16, 1), (224, 16, 2), (256, 16, 3), (28, 7, 2)])
def test_masks__cells_are_wholly_masked_or_wholly_visible(size: int, patch: int, levels: int) -> None:
    masking = MultiBlockMasking(config(size, patch, levels))
    grid = size // patch
    for step in range(20):
        masks = masking(step=step, epoch=0, samples=np.arange(32))
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


def test_masks__same_inputs_same_masks_and_a_sample_does_not_depend_on_its_neighbours() -> None:
    masking = MultiBlockMasking(config(224, 16, 2))
    a = masking(step=7, epoch=2, samples=np.arange(64))
    b = MultiBlockMasking(config(224, 16, 2))(step=7, epoch=2, samples=np.arange(64))
    assert np.array_equal(a.context, b.context)
    assert all(np.array_equal(x, y) for x, y in zip(a.targets, b.targets, strict=True))
    alone = masking(step=7, epoch=2, samples=np.array([13]))
    assert np.array_equal(alone.targets[0][0], a.targets[0][13])
    assert set(a.context[13]) <= set(alone.context[0])
    other = masking(step=7, epoch=3, samples=np.arange(64))
    assert not np.array_equal(a.targets[0], other.targets[0])


def test_masks__every_patch_is_context_and_target_and_mirror_images_are_equally_likely() -> None:
    masking = MultiBlockMasking(config(224, 16, 1))
    context, target, draws = np.zeros(196), np.zeros(196), 0
    for step in range(200):
        masks = masking(step=step, epoch=step, samples=np.arange(64))
        np.add.at(context, masks.context.ravel(), 1)
        np.add.at(target, masks.targets[0].ravel(), 1)
        draws += 64
    context, target = context.reshape(14, 14) / draws, target.reshape(14, 14) / draws
    for rate in (context, target):
        assert rate.min() > 0.02, "a patch that is never visited is never learned"
        assert np.abs(rate - rate[::-1]).max() < 0.08
        assert np.abs(rate - rate[:, ::-1]).max() < 0.08
    # Expected rate of a corner: the block's corner must fall on it, 1 in (14-h+1)(14-w+1), for each of 4 blocks.
    expected = 0.0
    for step in range(200):
        masks = masking(step=step, epoch=0, samples=np.arange(1))
        rows, columns = np.divmod(masks.targets[0][0, 0], 14)
        expected += 4 / ((15 - len(set(rows))) * (15 - len(set(columns)))) / 200
    corners = [target[0, 0], target[0, 13], target[13, 0], target[13, 13]]
    assert np.mean(corners) == pytest.approx(expected, rel=0.1)


def test_masks__scale_and_aspect_are_independent() -> None:
    masking = MultiBlockMasking(config(1024, 16, 1))
    area, aspect = [], []
    for step in range(400):
        rows, columns = np.divmod(masking(step=step, epoch=0, samples=np.arange(1)).targets[0][0, 0], 64)
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        area.append(height * width / 4096)
        aspect.append(height / width)
    assert abs(np.corrcoef(area, aspect)[0, 1]) < 0.15
    assert min(area) > 0.14
    assert max(area) < 0.21
    assert min(aspect) < 0.85
    assert max(aspect) > 1.35


def test_masks__too_little_context_is_drawn_again() -> None:
    masking = MultiBlockMasking(config(28, 7, 2, "masking.num_targets=4", "data.channels=1"))
    for step in range(20):
        masks = masking(step=step, epoch=0, samples=np.arange(500))
        assert masks.context.shape[1] >= 4


def test_masks__impossible_context_is_refused_with_the_keys_to_change() -> None:
    with pytest.raises(UserError, match=r"masking.target_scale.*masking.min_context"):
        MultiBlockMasking(config(28, 7, 2, "masking.target_scale=[0.9, 1.0]"))
