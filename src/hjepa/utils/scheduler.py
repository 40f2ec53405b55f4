"""Schedules as pure functions of the optimiser step: nothing to save, nothing to restore.

A schedule is a callable ``s(step) -> float`` for steps 0 .. total-1; the value is set *before* the step is taken. Past
the end it keeps its last value. ``s.get_epoch_value(epoch)`` is its value at the first step of an epoch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

from hjepa.errors import UserError

ROUNDING = 1e-6  # of a step: what epochs x steps_per_epoch may exceed a whole number by


class Schedule(ABC):
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

    @abstractmethod
    def __call__(self, step: int) -> float: ...

    def get_epoch_value(self, epoch: float) -> float:
        """The value at the first step of an epoch."""
        return self(math.ceil(epoch * self.steps_per_epoch - ROUNDING))


class _Decay(Schedule):
    """Linear warm-up from ``warmup_start`` to ``base``, then ``base`` -> ``final`` along a shape."""

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
        return self.final + (self.base - self.final) * self.remaining(self.progress(step))

    @staticmethod
    @abstractmethod
    def remaining(progress: float) -> float:
        """The share of the way from ``base`` to ``final`` that is left: 1 at progress 0, 0 at progress 1."""


class CosineScheduler(_Decay):
    """Linear warm-up, then half a cosine from ``base`` to ``final`` (Loshchilov & Hutter 2017, eq. 5)."""

    @staticmethod
    def remaining(progress: float) -> float:
        return (1 + math.cos(math.pi * progress)) / 2


class LinearScheduler(_Decay):
    """Linear warm-up, then a straight line from ``base`` to ``final``."""

    @staticmethod
    def remaining(progress: float) -> float:
        return 1 - progress


class EMAScheduler(Schedule):
    """Momentum of the target encoder: flat at ``base`` during the warm-up, then linear to ``final``."""

    def __init__(
        self, base: float, final: float, *, total_steps: int, warmup_steps: int = 0, steps_per_epoch: float = 1
    ):
        super().__init__(total_steps=total_steps, warmup_steps=warmup_steps, steps_per_epoch=steps_per_epoch)
        self.base, self.final = base, final

    def __call__(self, step: int) -> float:
        return self.base + (self.final - self.base) * self.progress(step)


class HierarchicalScheduler:
    """One schedule per level of the hierarchy, the finest first."""

    def __init__(self, schedulers: Sequence[Schedule]):
        if not schedulers:
            raise UserError("a hierarchical schedule needs a schedule for at least one level, got none")
        self.schedulers = list(schedulers)

    def __call__(self, step: int) -> list[float]:
        return [scheduler(step) for scheduler in self.schedulers]

    def get_epoch_value(self, epoch: float) -> list[float]:
        """The values at the first step of an epoch."""
        return [scheduler.get_epoch_value(epoch) for scheduler in self.schedulers]

    def get_level_value(self, step: int, level: int) -> float:
        if not 0 <= level < len(self.schedulers):
            raise UserError(f"level: expected 0 to {len(self.schedulers) - 1}, got {level}")
        return self.schedulers[level](step)


Shape = Literal["cosine", "linear"]
SHAPES: dict[str, type[CosineScheduler | LinearScheduler]] = {"cosine": CosineScheduler, "linear": LinearScheduler}


def create_lr_scheduler(
    *,
    optimizer_type: str = "adamw",
    base_lr: float,
    min_lr: float,
    epochs: float,
    steps_per_epoch: float,
    warmup_epochs: float = 0,
    schedule_type: Shape = "cosine",
) -> CosineScheduler | LinearScheduler:
    """Learning rate over ``epochs``, rising from 0 during ``warmup_epochs``.

    ``steps_per_epoch`` may be a fraction. ``optimizer_type`` is only named in errors.

    Raises:
        UserError: an unknown shape, or a warm-up that does not end before the schedule does.
    """
    return _create(schedule_type, base_lr, min_lr, epochs, steps_per_epoch, warmup_epochs, f"lr of {optimizer_type}")


def create_ema_scheduler(
    *,
    base_momentum: float,
    final_momentum: float,
    epochs: float,
    steps_per_epoch: float,
    warmup_epochs: float = 0,
) -> EMAScheduler:
    """Momentum over ``epochs``, flat during ``warmup_epochs``."""
    return EMAScheduler(
        base_momentum,
        final_momentum,
        total_steps=_total_steps(epochs, steps_per_epoch),
        warmup_steps=_warmup_steps(warmup_epochs, epochs, steps_per_epoch, "EMA momentum"),
        steps_per_epoch=steps_per_epoch,
    )


def create_weight_decay_scheduler(
    base: float, final: float, epochs: float, steps_per_epoch: float
) -> CosineScheduler | LinearScheduler:
    """Weight decay over ``epochs``: half a cosine without warm-up; constant where ``final`` is ``base``."""
    return _create("cosine", base, final, epochs, steps_per_epoch, 0, "weight decay")


def create_hierarchical_scheduler(
    *,
    base_values: Sequence[float],
    final_values: Sequence[float],
    epochs: float,
    steps_per_epoch: float,
    warmup_epochs: float | Sequence[float] = 0,
    schedule_type: Shape = "cosine",
) -> HierarchicalScheduler:
    """One schedule per level, from ``base_values[level]`` to ``final_values[level]``.

    ``warmup_epochs`` is one number for all levels or one per level.
    """
    levels = len(base_values)
    warmups = [warmup_epochs] * levels if isinstance(warmup_epochs, (int, float)) else list(warmup_epochs)
    if not len(final_values) == len(warmups) == levels:
        raise UserError(
            f"hierarchical schedule: expected as many values for every argument, got {levels} base_values, "
            f"{len(final_values)} final_values and {len(warmups)} warmup_epochs"
        )
    return HierarchicalScheduler(
        [
            _create(schedule_type, base, final, epochs, steps_per_epoch, warmup, f"level {level}")
            for level, (base, final, warmup) in enumerate(zip(base_values, final_values, warmups, strict=True))
        ]
    )


def _create(
    shape: str, base: float, final: float, epochs: float, steps_per_epoch: float, warmup_epochs: float, what: str
) -> CosineScheduler | LinearScheduler:
    if shape not in SHAPES:
        raise UserError(f"schedule of {what}: expected one of {', '.join(SHAPES)}, got {shape!r}")
    return SHAPES[shape](
        base,
        final,
        total_steps=_total_steps(epochs, steps_per_epoch),
        warmup_steps=_warmup_steps(warmup_epochs, epochs, steps_per_epoch, what),
        steps_per_epoch=steps_per_epoch,
    )


def _total_steps(epochs: float, steps_per_epoch: float) -> int:
    """Steps that cover all images; a tiny excess is rounding, not another step."""
    if not (epochs > 0 and steps_per_epoch > 0):
        raise UserError(
            f"a schedule needs epochs and steps_per_epoch above 0, got epochs={epochs:g} and "
            f"steps_per_epoch={steps_per_epoch:g}"
        )
    return max(1, math.ceil(epochs * steps_per_epoch - ROUNDING))


def _warmup_steps(warmup_epochs: float, epochs: float, steps_per_epoch: float, what: str) -> int:
    if not 0 <= warmup_epochs < epochs:
        raise UserError(
            f"schedule of {what}: the warm-up must end before the {epochs:g} epochs of the schedule do, "
            f"got warmup_epochs={warmup_epochs:g}"
        )
    # A warm-up that is shorter than the schedule can still round to all of its steps; the last one is not warm-up.
    return min(round(warmup_epochs * steps_per_epoch), _total_steps(epochs, steps_per_epoch) - 1)
