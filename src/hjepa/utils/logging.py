"""One logger for every place that metrics go to, and the progress line a person reads."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol


class MetricSink(Protocol):
    """Somewhere metrics go: never blocks and never raises for the sake of a remote end."""

    def log(self, metrics: Mapping[str, float], step: int) -> None: ...


class MetricsLogger:
    """TensorBoard, Weights & Biases and any number of sinks behind one call.

    A backend that is switched on but not installed is reported once and left out; training goes on.

    Args:
        experiment_name: Name of the run in the backends.
        log_dir: Folder of the TensorBoard event files.
        config: Logged with the run.
        sinks: Further receivers, such as the MLflow stream.
    """

    def __init__(
        self,
        experiment_name: str,
        log_dir: str | Path,
        config: Mapping[str, Any] | None = None,
        use_wandb: bool = False,
        use_tensorboard: bool = True,
        wandb_project: str = "h-jepa",
        sinks: Sequence[MetricSink] = (),
    ):
        self.log_dir = Path(log_dir)
        self.sinks = list(sinks)
        self._tensorboard: Any = None
        self._wandb: Any = None
        if use_tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                warn(f"TensorBoard is not available ({error}); its curves are left out")
            else:
                self._tensorboard = SummaryWriter(str(self.log_dir / experiment_name))
        if use_wandb:
            try:
                import wandb
            except ImportError as error:
                warn(f"Weights & Biases is not available ({error}); its curves are left out")
            else:
                self._wandb = wandb.init(project=wandb_project, name=experiment_name, config=dict(config or {}))

    def log_metrics(self, metrics: Mapping[str, float], step: int, prefix: str = "") -> None:
        """Send scalars; ``step`` is the x axis (training uses images seen)."""
        named = {prefix + key: float(value) for key, value in metrics.items()}
        if self._tensorboard:
            for key, value in named.items():
                self._tensorboard.add_scalar(key, value, step)
        if self._wandb:
            self._wandb.log(named, step=step)
        for sink in self.sinks:
            sink.log(named, step)

    def finish(self) -> None:
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()

    def __enter__(self) -> MetricsLogger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish()


class ProgressTracker:
    """Rate and remaining time, over the last ``window_seconds``."""

    def __init__(self, total_steps: int, start_step: int = 0, window_seconds: float = 30.0):
        self.total_steps = total_steps
        self.window_seconds = window_seconds
        self._start = time.monotonic()
        self._marks = [(self._start, start_step)]

    def step(self, step: int) -> None:
        """Note that ``step`` optimiser steps have been taken."""
        now = time.monotonic()
        self._marks.append((now, step))
        while len(self._marks) > 2 and now - self._marks[1][0] > self.window_seconds:
            self._marks.pop(0)

    def steps_per_second(self) -> float:
        (t0, s0), (t1, s1) = self._marks[0], self._marks[-1]
        return (s1 - s0) / (t1 - t0) if t1 > t0 else 0.0

    def get_eta(self) -> float | None:
        """Seconds to go, or None while nothing is known."""
        rate = self.steps_per_second()
        return (self.total_steps - self._marks[-1][1]) / rate if rate > 0 else None

    def get_elapsed_time(self) -> float:
        return time.monotonic() - self._start


def format_seconds(seconds: float | None) -> str:
    """65 -> ``1:05``, 3700 -> ``1:01:40``."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def say(message: str) -> None:
    """A progress line for the person or the pod's log."""
    print(message, flush=True)


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr, flush=True)


def append_json_line(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(value) + "\n")
