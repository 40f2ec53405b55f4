"""Schedules against their closed forms."""

from __future__ import annotations

import math

import pytest

from hjepa.errors import UserError
from hjepa.utils.scheduler import (
    CosineScheduler,
    EMAScheduler,
    HierarchicalScheduler,
    LinearScheduler,
    create_ema_scheduler,
    create_hierarchical_scheduler,
    create_lr_scheduler,
    create_weight_decay_scheduler,
)


def test_cosine__closed_form_at_the_steps_that_matter() -> None:
    schedule = CosineScheduler(1.0, 0.1, total_steps=101, warmup_steps=20)
    assert schedule(0) == 0.0
    assert schedule(1) == pytest.approx(1 / 20)
    assert schedule(20) == 1.0
    assert schedule(60) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 2)) / 2)
    assert schedule(80) == pytest.approx(0.1 + 0.9 * (1 + math.cos(0.75 * math.pi)) / 2)
    assert schedule(100) == pytest.approx(0.1)
    assert schedule(10_000) == pytest.approx(0.1), "past the end it must not rise again"


def test_linear__closed_form() -> None:
    schedule = LinearScheduler(1.0, 0.0, total_steps=16, warmup_steps=5)
    assert [schedule(step) for step in (0, 1, 5, 10, 15, 99)] == pytest.approx([0.0, 0.2, 1.0, 0.5, 0.0, 0.0])


def test_warmup__may_start_above_zero() -> None:
    schedule = CosineScheduler(1.0, 0.0, total_steps=21, warmup_steps=10, warmup_start=0.2)
    assert [schedule(step) for step in (0, 5, 10)] == pytest.approx([0.2, 0.6, 1.0])


def test_ema__flat_in_the_warmup_then_linear_to_the_last_step() -> None:
    schedule = EMAScheduler(0.9, 1.0, total_steps=16, warmup_steps=5)
    assert [schedule(step) for step in (0, 1, 5, 10, 15, 99)] == pytest.approx([0.9, 0.9, 0.9, 0.95, 1.0, 1.0])


def test_factories__the_example_of_the_specification() -> None:
    from hjepa.utils import create_ema_scheduler, create_lr_scheduler

    lr_scheduler = create_lr_scheduler(
        optimizer_type='adamw',
        base_lr=1.5e-4,
        min_lr=1e-6,
        epochs=300,
        steps_per_epoch=1000,
        warmup_epochs=40,
        schedule_type='cosine',
    )  # fmt: skip

    ema_scheduler = create_ema_scheduler(
        base_momentum=0.996,
        final_momentum=1.0,
        epochs=300,
        steps_per_epoch=1000,
        warmup_epochs=30,
    )

    assert lr_scheduler(0) == 0.0
    assert lr_scheduler(1) == pytest.approx(1.5e-4 / 40_000)
    assert lr_scheduler(40_000) == lr_scheduler.get_epoch_value(40) == 1.5e-4
    assert lr_scheduler(299_999) == lr_scheduler(10**9) == pytest.approx(1e-6)
    assert ema_scheduler(0) == ema_scheduler(30_000) == 0.996
    assert ema_scheduler(299_999) == 1.0
    assert ema_scheduler.get_epoch_value(165) == pytest.approx(0.998, abs=1e-6)


def test_factories__fractional_steps_per_epoch() -> None:
    # 64 images in batches of 12 are 5 1/3 steps; 3 epochs of them are exactly 16 steps.
    schedule = create_lr_scheduler(
        base_lr=1.0, min_lr=0.0, epochs=3, steps_per_epoch=64 / 12, warmup_epochs=0.75, schedule_type="linear"
    )
    assert (schedule.total_steps, schedule.warmup_steps) == (16, 4)
    # The first step of epoch 1 is the one whose first image belongs to it: step 6, as steps 0 .. 5 begin in epoch 0.
    assert schedule.get_epoch_value(1) == schedule(6)
    assert schedule.get_epoch_value(3) == schedule(16) == schedule(15) == 0.0


def test_epoch_value__is_not_a_step_late_where_the_product_rounds_up() -> None:
    assert 15 * (50 / 3) > 250, "the case that this test is about"
    schedule = LinearScheduler(1.0, 0.0, total_steps=1001, steps_per_epoch=50 / 3)
    assert schedule.get_epoch_value(15) == schedule(250)


def test_weight_decay__half_a_cosine_without_warmup() -> None:
    schedule = create_weight_decay_scheduler(0.04, 0.4, epochs=10, steps_per_epoch=10.1)
    assert schedule(0) == pytest.approx(0.04)
    assert schedule(50) == pytest.approx(0.22)
    assert schedule(100) == schedule(1000) == pytest.approx(0.4)
    constant = create_weight_decay_scheduler(base=0.05, final=0.05, epochs=1, steps_per_epoch=3)
    assert {constant(step) for step in range(5)} == {0.05}


def test_hierarchical__one_value_per_level() -> None:
    schedule = HierarchicalScheduler(
        [LinearScheduler(1.0, 0.0, total_steps=11), LinearScheduler(4.0, 2.0, total_steps=11)]
    )
    assert schedule(5) == pytest.approx([0.5, 3.0])
    assert schedule.get_level_value(10, 1) == 2.0
    assert schedule.get_epoch_value(5) == schedule(5)
    with pytest.raises(UserError, match="expected 0 to 1, got 2"):
        schedule.get_level_value(0, 2)
    with pytest.raises(UserError, match="at least one level"):
        HierarchicalScheduler([])


def test_hierarchical_factory__equals_one_factory_call_per_level() -> None:
    both = create_hierarchical_scheduler(
        base_values=[1.0, 0.5], final_values=[0.0, 0.1], epochs=4, steps_per_epoch=2.5, warmup_epochs=[0, 2]
    )
    fine = create_lr_scheduler(base_lr=1.0, min_lr=0.0, epochs=4, steps_per_epoch=2.5)
    coarse = create_lr_scheduler(base_lr=0.5, min_lr=0.1, epochs=4, steps_per_epoch=2.5, warmup_epochs=2)
    assert [both(step) for step in range(12)] == [[fine(step), coarse(step)] for step in range(12)]
    shared = create_hierarchical_scheduler(
        base_values=[1.0, 0.5], final_values=[0.0, 0.1], epochs=4, steps_per_epoch=2.5, warmup_epochs=2
    )
    assert shared(0) == [0.0, 0.0]
    with pytest.raises(UserError, match="2 base_values, 1 final_values"):
        create_hierarchical_scheduler(base_values=[1, 2], final_values=[0], epochs=1, steps_per_epoch=1)


@pytest.mark.parametrize("warmup", [10, 11, -1])
def test_warmup__that_never_ends_is_refused(warmup: int) -> None:
    with pytest.raises(UserError, match="warm-up"):
        CosineScheduler(1.0, 0.0, total_steps=10, warmup_steps=warmup)
    with pytest.raises(UserError, match=f"lr of sgd.*10 epochs.*warmup_epochs={warmup}"):
        create_lr_scheduler(
            optimizer_type="sgd", base_lr=1, min_lr=0, epochs=10, steps_per_epoch=7, warmup_epochs=warmup
        )
    with pytest.raises(UserError, match=f"EMA momentum.*warmup_epochs={warmup}"):
        create_ema_scheduler(base_momentum=0.9, final_momentum=1, epochs=10, steps_per_epoch=7, warmup_epochs=warmup)


def test_warmup__shorter_than_the_schedule_never_rounds_to_all_of_it() -> None:
    schedule = create_lr_scheduler(base_lr=1.0, min_lr=0.25, epochs=1, steps_per_epoch=4, warmup_epochs=0.9)
    assert [schedule(step) for step in range(5)] == pytest.approx([0, 1 / 3, 2 / 3, 0.25, 0.25])


@pytest.mark.parametrize(("epochs", "steps_per_epoch"), [(0, 5), (5, 0), (-1, 2)])
def test_schedule__without_steps_is_refused(epochs: float, steps_per_epoch: float) -> None:
    with pytest.raises(UserError, match="above 0"):
        create_weight_decay_scheduler(1, 0, epochs, steps_per_epoch)


def test_shape__unknown_is_refused() -> None:
    with pytest.raises(UserError, match=r"lr of adamw: expected one of cosine, linear, got 'step'"):
        create_lr_scheduler(base_lr=1, min_lr=0, epochs=1, steps_per_epoch=1, schedule_type="step")  # type: ignore[arg-type]
