"""Schedules as pure functions of the optimiser step: nothing to save, nothing to restore.

A schedule is a callable ``s(step) -> float`` for steps 0 .. total-1; the value is set *before* the step is taken. Past
the end it keeps its last value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

from hjepa.errors import UserError

Schedule = Callable[[int], float]


class _Warmed:
    """Shared arithmetic: a warm-up phase, then progress 0 -> 1 that reaches 1 at the last step."""

    def __init__(self, *, total_steps: int, warmup_steps: int, steps_per_epoch: float):
        if total_steps < 1:
            raise UserError(f"a schedule needs at least one step, got {total_steps}")
        if not 0 <= warmup_steps < total_steps:
            raise UserError(
                f"the warm-up of {warmup_steps} steps must end before the schedule's {total_steps} steps do"
            )
        self.total_steps = total_steps
        self.warmup_steps = warmup_steps
        self.steps_per_epoch = steps_per_epoch

    def progress(self, step: int) -> float:
        span = self.total_steps - 1 - self.warmup_steps
        return min(max((step - self.warmup_steps) / span, 0.0), 1.0) if span > 0 else 1.0

    def __call__(self, step: int) -> float:
        raise NotImplementedError

    def get_epoch_value(self, epoch: float) -> float:
        """The value at the first step of an epoch."""
        return self(math.ceil(epoch * self.steps_per_epoch))


class CosineScheduler(_Warmed):
    """Linear warm-up from ``warmup_start``, then half a cosine ``base`` -> ``final`` (Loshchilov & Hutter 2017)."""

    def __init__(
        self,
        base: float,
        final: float,
        *,
        total_steps: int,
        warmup_steps: int = 0,
        warmup_start: float = 0.0,
        steps_per_epoch: float = 1,
    ):
        super().__init__(total_steps=total_steps, warmup_steps=warmup_steps, steps_per_epoch=steps_per_epoch)
        self.base, self.final, self.warmup_start = base, final, warmup_start

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return self.warmup_start + (self.base - self.warmup_start) * step / self.warmup_steps
        return self.final + (self.base - self.final) * (1 + math.cos(math.pi * self.progress(step))) / 2


class LinearScheduler(_Warmed):
    """Linear warm-up from ``warmup_start``, then a straight line from ``base`` to ``final``."""

    def __init__(
        self,
        base: float,
        final: float,
        *,
        total_steps: int,
        warmup_steps: int = 0,
        warmup_start: float = 0.0,
        steps_per_epoch: float = 1,
    ):
        super().__init__(total_steps=total_steps, warmup_steps=warmup_steps, steps_per_epoch=steps_per_epoch)
        self.base, self.final, self.warmup_start = base, final, warmup_start

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return self.warmup_start + (self.base - self.warmup_start) * step / self.warmup_steps
        return self.base + (self.final - self.base) * self.progress(step)


class EMAScheduler(_Warmed):
    """Momentum of the target encoder: flat at ``base`` during the warm-up, then linear to ``final``."""

    def __init__(
        self, base: float, final: float, *, total_steps: int, warmup_steps: int = 0, steps_per_epoch: float = 1
    ):
        super().__init__(total_steps=total_steps, warmup_steps=warmup_steps, steps_per_epoch=steps_per_epoch)
        self.base, self.final = base, final

    def __call__(self, step: int) -> float:
        return self.base + (self.final - self.base) * self.progress(step)


class HierarchicalScheduler:
    """One schedule per level of the hierarchy."""

    def __init__(self, schedulers: Sequence[Schedule]):
        self.schedulers = list(schedulers)

    def __call__(self, step: int) -> list[float]:
        return [scheduler(step) for scheduler in self.schedulers]

    def get_level_value(self, step: int, level: int) -> float:
        return self.schedulers[level](step)


def create_lr_scheduler(
    *,
    optimizer_type: str = "adamw",
    base_lr: float,
    min_lr: float,
    epochs: float,
    steps_per_epoch: float,
    warmup_epochs: float = 0,
    schedule_type: Literal["cosine", "linear"] = "cosine",
) -> CosineScheduler | LinearScheduler:
    """Learning rate over ``epochs``; ``optimizer_type`` is named in the error of a schedule that cannot be."""
    kinds: dict[str, type[CosineScheduler | LinearScheduler]] = {"cosine": CosineScheduler, "linear": LinearScheduler}
    if schedule_type not in kinds:
        raise UserError(f"schedule of {optimizer_type}: expected one of {', '.join(kinds)}, got {schedule_type!r}")
    return kinds[schedule_type](
        base_lr,
        min_lr,
        total_steps=_steps(epochs, steps_per_epoch),
        warmup_steps=min(round(warmup_epochs * steps_per_epoch), _steps(epochs, steps_per_epoch) - 1),
        steps_per_epoch=steps_per_epoch,
    )


def _steps(epochs: float, steps_per_epoch: float) -> int:
    """Steps that cover all images; a tiny excess is rounding, not another step."""
    return max(1, math.ceil(epochs * steps_per_epoch - 1e-6))


def create_ema_scheduler(
    *,
    base_momentum: float,
    final_momentum: float,
    epochs: float,
    steps_per_epoch: float,
    warmup_epochs: float = 0,
) -> EMAScheduler:
    """Momentum over ``epochs``."""
    return EMAScheduler(
        base_momentum,
        final_momentum,
        total_steps=_steps(epochs, steps_per_epoch),
        warmup_steps=min(round(warmup_epochs * steps_per_epoch), _steps(epochs, steps_per_epoch) - 1),
        steps_per_epoch=steps_per_epoch,
    )
