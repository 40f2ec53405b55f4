"""Schedules against their closed forms."""

from __future__ import annotations

import math

import pytest

from hjepa.errors import UserError
from hjepa.utils import (
    CosineScheduler,
    HierarchicalScheduler,
    LinearScheduler,
    create_ema_scheduler,
    create_lr_scheduler,
)


def test_cosine__closed_form_at_the_steps_that_matter() -> None:
    schedule = CosineScheduler(1.0, 0.1, total_steps=101, warmup_steps=20)
    assert schedule(0) == 0.0
    assert schedule(1) == pytest.approx(1 / 20)
    assert schedule(20) == 1.0
    assert schedule(60) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 2)) / 2)
    assert schedule(100) == pytest.approx(0.1)
    assert schedule(10_000) == pytest.approx(0.1), "past the end it must not rise again"


def test_linear__closed_form() -> None:
    schedule = LinearScheduler(1.0, 0.0, total_steps=11)
    assert [schedule(step) for step in (0, 5, 10)] == pytest.approx([1.0, 0.5, 0.0])


def test_ema__flat_in_the_warmup_then_linear_to_the_last_step() -> None:
    schedule = create_ema_scheduler(
        base_momentum=0.996, final_momentum=1.0, epochs=300, steps_per_epoch=1000, warmup_epochs=30
    )
    assert schedule(0) == schedule(30_000) == 0.996
    assert schedule(299_999) == 1.0
    assert schedule.get_epoch_value(165) == pytest.approx(0.998, abs=1e-6)


def test_lr_factory__spec_example() -> None:
    schedule = create_lr_scheduler(
        optimizer_type="adamw",
        base_lr=1.5e-4,
        min_lr=1e-6,
        epochs=300,
        steps_per_epoch=1000,
        warmup_epochs=40,
        schedule_type="cosine",
    )
    assert schedule(0) == 0.0
    assert schedule.get_epoch_value(40) == 1.5e-4
    assert schedule(299_999) == pytest.approx(1e-6)


def test_hierarchical__one_value_per_level() -> None:
    schedule = HierarchicalScheduler(
        [LinearScheduler(1.0, 0.0, total_steps=11), LinearScheduler(4.0, 2.0, total_steps=11)]
    )
    assert schedule(5) == pytest.approx([0.5, 3.0])
    assert schedule.get_level_value(10, 1) == 2.0


def test_warmup__that_never_ends_is_refused() -> None:
    with pytest.raises(UserError, match="warm-up"):
        CosineScheduler(1.0, 0.0, total_steps=10, warmup_steps=10)
