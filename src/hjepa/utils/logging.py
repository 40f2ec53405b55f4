"""One logger for every place that metrics go to, and the progress line a person reads."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TextIO

import numpy as np

from hjepa.config import Config
from hjepa.errors import UserError
from hjepa.words import print_line

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hjepa.utils.backends import Backend, Courier
    from hjepa.utils.system import SystemMonitor

# torch is imported where it is needed: the command line and the light steps log without it.

FINISH_SECONDS = 30.0
CHATTY = (
    "asyncio",
    "boto3",
    "botocore",
    "fsspec",
    "matplotlib",
    "mlflow",
    "PIL",
    "s3transfer",
    "tensorboard",
    "urllib3",
)


class MetricSink(Protocol):
    """Somewhere metrics go: never blocks and never raises for the sake of a remote end.

    It may also have ``log_image(name, image, step)`` for (H, W, 3) uint8 arrays and
    ``log_histogram(name, counts, edges, step)`` for (n,) counts between (n + 1,) edges.
    """

    def log(self, metrics: Mapping[str, float], step: int) -> None: ...


class MetricsLogger:
    """TensorBoard, Weights & Biases and any number of sinks behind one call.

    Nothing here ends or holds up a training run. A backend that is switched on but cannot start, and one that fails
    later (a full disk, a dead service, a sink that raises), is reported once, with its error, and left out from then
    on; the others go on. TensorBoard and Weights & Biases have a thread each, sinks are called at once. Steps are the x
    axis; training uses images seen. Values may be numbers or 0-d tensors, which are read when they are logged.

    Args:
        experiment_name: Name of the run in the backends.
        log_dir: Folder of what they write.
        config: Logged with the run.
        sinks: Further receivers, such as the MLflow stream; whoever made them closes them.
    """

    def __init__(
        self,
        experiment_name: str,
        log_dir: str | Path,
        config: Config | Mapping[str, Any] | None = None,
        use_wandb: bool = False,
        use_tensorboard: bool = True,
        wandb_project: str = "h-jepa",
        sinks: Sequence[MetricSink] = (),
    ):
        self.log_dir = Path(log_dir)
        self.sinks = list(sinks)
        self._couriers: list[Courier] = []
        self._sums: dict[str, tuple[Any, float]] = {}  # weighted sum and weight
        self._watched: tuple[nn.Module, int] | None = None
        self._calls = 0
        self._monitor: SystemMonitor | None = None
        self._waited, self._waited_since = 0.0, time.monotonic()
        settings = config.model_dump(mode="json") if isinstance(config, Config) else dict(config or {})
        if use_tensorboard:
            self._start("TensorBoard", lambda: _tensorboard(self.log_dir / experiment_name, settings))
        if use_wandb:
            self._start("Weights & Biases", lambda: _wandb(self.log_dir, wandb_project, experiment_name, settings))

    def _start(self, name: str, make: Callable[[], Backend]) -> None:
        from hjepa.utils.backends import Courier

        try:
            self._couriers.append(Courier(make(), warn))
        except ImportError as error:
            warn(f"{name} is not installed ({error}); it is left out")
        except Exception as error:  # noqa: BLE001 - whatever a tracker raises, training goes on without it
            warn(f"{name} does not start ({type(error).__name__}: {error}); it is left out")

    @property
    def listening(self) -> bool:
        """Whether anything logged arrives anywhere."""
        return bool(self.sinks) or any(courier.open for courier in self._couriers)

    def _send(self, method: str, *args: Any) -> None:
        for courier in self._couriers:
            courier.send(method, *args)

    def _send_to_sinks(self, method: str, *args: Any) -> None:
        for sink in list(self.sinks):
            if not hasattr(sink, method):
                continue
            try:
                getattr(sink, method)(*args)
            except Exception as error:  # noqa: BLE001 - whatever a sink raises, training goes on without it
                self.sinks.remove(sink)
                warn(f"{type(sink).__name__} is left out from here on ({type(error).__name__}: {error})")

    # -- scalars -----------------------------------------------------------------------------------------------------

    def log_metrics(self, metrics: Mapping[str, float | Tensor], step: int, prefix: str = "") -> None:
        """Send scalars, NaN included.

        Raises:
            ValueError: a value is not a single number.
        """
        if self.listening:
            self._log_metrics(metrics, step, prefix)
        self._calls += 1
        if self._watched and self._calls % self._watched[1] == 0:
            self.log_model_weights(self._watched[0], step)
            self.log_model_gradients(self._watched[0], step)

    def _log_metrics(self, metrics: Mapping[str, float | Tensor], step: int, prefix: str = "") -> None:
        named = {prefix + key: value for key, value in _numbers(metrics).items()}
        self._send("metrics", named, step)
        self._send_to_sinks("log", named, step)

    def log_hierarchical_losses(
        self,
        losses: Sequence[float | Tensor] | Mapping[Any, float | Tensor],
        step: int,
        prefix: str = "train/loss_",
    ) -> None:
        """Log the losses of the levels, in order or by number, as ``<prefix>level_0`` and so on; other keys stay."""
        items = losses.items() if isinstance(losses, Mapping) else enumerate(losses)
        named = {f"level_{key}" if isinstance(key, int) else str(key): value for key, value in items}
        self.log_metrics(named, step, prefix)

    def accumulate_metrics(self, metrics: Mapping[str, float | Tensor], weight: float = 1.0) -> None:
        """Add to the means of ``log_accumulated_metrics``; tensors stay on their device, and nothing is read."""
        for name, value in metrics.items():
            total, weights = self._sums.get(name, (0.0, 0.0))
            number = value.detach() if hasattr(value, "detach") else value
            self._sums[name] = (total + number * weight, weights + weight)

    def log_accumulated_metrics(self, step: int, prefix: str = "") -> dict[str, float]:
        """Log the weighted means since the last call, start over, and return them, without prefix."""
        means = _numbers({name: total / weight for name, (total, weight) in self._sums.items() if weight})
        self._sums = {}
        if means:
            self.log_metrics(means, step, prefix)
        return means

    def add_data_wait(self, seconds: float) -> None:
        """Note that training waited for data; ``log_system_metrics`` tells the share."""
        self._waited += seconds

    def log_system_metrics(self, step: int, data_wait: float | None = None) -> None:
        """Log what the CPU, the memory and, where there is one, the GPU are doing, means since the last call.

        Args:
            data_wait: share of the time spent waiting for data; by default what ``add_data_wait`` has been told.
        """
        if not self.listening:
            return
        if self._monitor is None:
            from hjepa.utils.system import SystemMonitor

            self._monitor = SystemMonitor()
        found = self._monitor.read()
        now = time.monotonic()
        if data_wait is None and self._waited:
            data_wait = min(1.0, self._waited / max(now - self._waited_since, 1e-9))
        if data_wait is not None:
            found["system/data_wait_share"] = data_wait
        self._waited, self._waited_since = 0.0, now
        self._log_metrics(found, step)

    # -- pictures ----------------------------------------------------------------------------------------------------

    def log_image(self, name: str, image: Any, step: int) -> None:
        """Log one image: (C, H, W), (H, W, C) or (H, W), C of 1 or 3, uint8 or floats in [0, 1]."""
        if not self.listening:
            return
        from hjepa.utils.pictures import as_picture

        picture = as_picture(image)
        self._send("image", name, picture, step)
        self._send_to_sinks("log_image", name, picture, step)

    def log_images(self, name: str, images: Any, step: int) -> None:
        """Log images of one size, a batch or a sequence, as one picture in rows and columns, small ones enlarged."""
        if not self.listening:
            return
        from hjepa.utils.pictures import image_grid

        self.log_image(name, image_grid(images), step)

    def log_prediction_comparison(
        self,
        predictions: Sequence[Any],
        targets: Sequence[Any],
        step: int,
        *,
        images: Any = None,
        cells: Sequence[Any] | None = None,
        grid: int | None = None,
        name: str = "predictions",
    ) -> None:
        """Log how near the predictions are to their targets, as numbers and, given the images, as pictures.

        Per level l the mean cosine similarity and the squared error as a share of the targets' mean square
        (``<name>/cosine_level_l``, ``<name>/error_level_l``); with ``cells`` the share of predictions whose nearest
        target, among all given, is their own (``<name>/nearest_is_own_level_l``). The pictures are ``<name>/maps``,
        both by position, and ``<name>/neighbours``, masked cells filled with the pixels of the cells whose targets are
        nearest. A few images are enough: all pairs of cells are compared, on the CPU.

        Args:
            predictions: per level l, (B, M, m_l, D).
            targets: the same shapes.
            images: (B, C, S, S), uint8 or floats in [0, 1].
            cells: per level l, (B, M, m_l) cells of that level.
            grid: patches along a side.
        """
        if not self.listening:
            return
        from hjepa.utils import pictures

        pairs = [(pictures.as_array(p), pictures.as_array(t)) for p, t in zip(predictions, targets, strict=True)]
        compared = [pictures.compare(p, t) for p, t in pairs]
        found: dict[str, float] = {}
        for level, comparison in enumerate(compared):
            found[f"cosine_level_{level}"] = float(comparison.cosine.mean())
            found[f"error_level_{level}"] = float(comparison.error.mean())
        if cells is not None:
            where = [pictures.as_array(c) for c in cells]
            neighbours = [pictures.nearest_neighbours(p, t, c) for (p, t), c in zip(pairs, where, strict=True)]
            for level, nearest in enumerate(neighbours):
                found[f"nearest_is_own_level_{level}"] = nearest.own_share
            if images is not None and grid is not None:
                pixels = pictures.as_pictures(images)
                self.log_image(f"{name}/maps", pictures.comparison_picture(pixels, where, compared, grid), step)
                self.log_image(f"{name}/neighbours", pictures.neighbour_picture(pixels, where, neighbours, grid), step)
        self._log_metrics(found, step, f"{name}/")

    def log_embeddings(
        self, name: str, embeddings: Any, step: int, labels: Sequence[Any] | None = None, images: Any = None
    ) -> None:
        """Log vectors (n, D) with their labels (n) and images (n, C, H, W): TensorBoard's projector, a wandb table."""
        from hjepa.utils.pictures import as_array, as_pictures

        if not any(courier.open for courier in self._couriers):
            return
        vectors = as_array(embeddings).astype(np.float32)
        for what, length in (("labels", labels), ("images", images)):
            if length is not None and len(length) != len(vectors):
                raise ValueError(f"log_embeddings: {len(vectors)} vectors, but {len(length)} {what}")
        texts = None if labels is None else [str(label) for label in as_array(labels).tolist()]
        self._send("embeddings", name, vectors, step, texts, None if images is None else as_pictures(images))

    # -- histograms --------------------------------------------------------------------------------------------------

    def log_histogram(self, name: str, values: Any, step: int) -> None:
        """Log how values (any shape) are spread, in equal bins; those that are not finite are left out."""
        if not self.listening:
            return
        import torch

        tensor = values if isinstance(values, torch.Tensor) else torch.as_tensor(np.asarray(values))
        self._log_histograms({name: tensor}, step)

    def _log_histograms(self, tensors: Mapping[str, Tensor], step: int) -> None:
        from hjepa.utils.histograms import histograms

        found = histograms(tensors)
        self._send("histograms", found, step)
        for name, histogram in found.items():
            self._send_to_sinks("log_histogram", name, histogram.counts, histogram.edges, step)

    def log_model_gradients(self, model: nn.Module, step: int) -> None:
        """Log a histogram per gradient and the norm of all, of those that are there: before they are set to None.

        Of a sharded model, this rank's part of each gradient, and no norm.
        """
        self._log_parameters("gradients", model, step, gradients=True)

    def log_model_weights(self, model: nn.Module, step: int) -> None:
        """Log a histogram per trainable weight and the norm of all. Of a sharded model, this rank's part, no norm."""
        self._log_parameters("weights", model, step, gradients=False)

    def _log_parameters(self, kind: str, model: nn.Module, step: int, *, gradients: bool) -> None:
        if not self.listening:
            return
        from hjepa.utils.histograms import total_norm

        tensors: dict[str, Any] = {}
        for name, parameter in model.named_parameters():
            tensor = parameter.grad if gradients else parameter
            if parameter.requires_grad and tensor is not None:
                tensors[f"{kind}/{_plain_name(name)}"] = tensor.detach()
        if not tensors:
            return
        sharded = any(hasattr(tensor, "to_local") for tensor in tensors.values())
        local = {n: tensor.to_local() if hasattr(tensor, "to_local") else tensor for n, tensor in tensors.items()}
        self._log_histograms(local, step)
        if not sharded:
            self._log_metrics({f"{kind}/norm": total_norm(list(local.values()))}, step)

    def watch_model(self, model: nn.Module, frequency: int = 100) -> None:
        """Log weights, and gradients where there are any at that moment, at every ``frequency``-th ``log_metrics``."""
        if frequency < 1:
            raise ValueError(f"watch_model: frequency must be at least 1, got {frequency}")
        self._watched = (model, frequency)

    # -- the end -----------------------------------------------------------------------------------------------------

    def finish(self, timeout_seconds: float = FINISH_SECONDS) -> None:
        """Let the backends write what is left, for so long and no longer. What is logged later goes to the sinks."""
        couriers, self._couriers = self._couriers, []
        for courier in couriers:
            courier.close_soon()
        deadline = time.monotonic() + timeout_seconds
        for courier in couriers:
            courier.join(deadline, timeout_seconds)

    def __enter__(self) -> MetricsLogger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish()


def _tensorboard(folder: Path, config: Mapping[str, Any]) -> Backend:
    from hjepa.utils.backends import TensorBoard

    return TensorBoard(folder, config)


def _wandb(folder: Path, project: str, name: str, config: Mapping[str, Any]) -> Backend:
    from hjepa.utils.backends import WeightsAndBiases

    return WeightsAndBiases(folder, project, name, config)


def _numbers(metrics: Mapping[str, float | Tensor]) -> dict[str, float]:
    """Tensors and numbers as numbers; the host waits once per kind of tensor, not once per metric."""
    found: dict[str, float] = {}
    kinds: dict[Any, list[str]] = {}
    for name in metrics:
        value: Any = metrics[name]
        if hasattr(value, "detach"):
            kinds.setdefault((value.device, value.dtype), []).append(name)
        else:
            found[name] = float(value)
    if kinds:
        import torch

        for names in kinds.values():
            tensors: list[Any] = [metrics[name] for name in names]
            for name, tensor in zip(names, tensors, strict=True):
                if tensor.numel() != 1:
                    raise ValueError(f"metric {name}: expected one number, got a tensor of shape {tuple(tensor.shape)}")
            values = torch.stack([tensor.detach().reshape(()) for tensor in tensors]).tolist()
            found |= {name: float(value) for name, value in zip(names, values, strict=True)}
    return {name: found[name] for name in metrics}


def _plain_name(name: str) -> str:
    """The name that a parameter has without the wrappers of DistributedDataParallel and torch.compile."""
    return ".".join(part for part in name.split(".") if part not in ("module", "_orig_mod"))


# -- progress --------------------------------------------------------------------------------------------------------


class EpochSummary(NamedTuple):
    """What one epoch took."""

    epoch: int
    steps: int
    seconds: float
    images_per_second: float | None


class ProgressTracker:
    """Rate and remaining time, over the last ``window_seconds``."""

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        window_seconds: float = 30.0,
        *,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.total_steps = total_steps
        self.window_seconds = window_seconds
        self._clock = clock
        self._start = clock()
        self._marks = [(self._start, start_step)]
        self._epoch, self._epoch_start = 0, self._marks[0]

    def start_epoch(self, epoch: int) -> None:
        """Note that ``epoch`` begins now, at the step last told."""
        self._epoch, self._epoch_start = epoch, (self._clock(), self._marks[-1][1])

    def step(self, step: int) -> None:
        """Note that ``step`` optimiser steps have been taken."""
        now = self._clock()
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
        """Seconds since this was made."""
        return self._clock() - self._start

    def epoch_summary(self, batch_size: int | None = None) -> EpochSummary:
        """The epoch since ``start_epoch``, up to now; images per second for batches of ``batch_size`` images."""
        seconds = self._clock() - self._epoch_start[0]
        steps = self._marks[-1][1] - self._epoch_start[1]
        rate = steps * batch_size / seconds if batch_size is not None and seconds > 0 else None
        return EpochSummary(self._epoch, steps, seconds, rate)


class ProgressLine:
    """Progress for a person: a bar on a terminal, a plain line per ``show`` in a pod's log or a file.

    Close it, or use it as a context manager, before other output is written past ``say`` and ``warn``.

    Args:
        total_steps: The end of the bar.
        start_step: Where it begins.
        shown: False for the ranks that stay silent.
    """

    def __init__(self, total_steps: int, start_step: int = 0, *, shown: bool = True):
        self._shown = shown
        self._bar: Any = None
        if shown and _on_terminal():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total_steps,
                initial=start_step,
                bar_format="{percentage:3.0f}% |{bar:12}| {desc}",
                dynamic_ncols=True,
                file=sys.stderr,
            )
            _open_bars.append(self._bar)

    def advance(self, step: int) -> None:
        """Move the bar, at any step; it is drawn a few times a second at most. In a pod nothing happens."""
        if self._bar is not None and step > self._bar.n:
            self._bar.update(step - self._bar.n)

    def show(self, *fields: str) -> None:
        """Show the facts of this moment, the most important first.

        A terminal that is too narrow for all loses those before the last one, which should be the remaining time.
        """
        if self._bar is None:
            if self._shown:
                say("  ".join(fields))
            return
        left = list(fields)
        room = (self._bar.dynamic_ncols(self._bar.fp)[0] or 80) - len("100% |123456789012| ") - 1
        while len(left) > 2 and len("  ".join(left)) > room:
            del left[-2]
        self._bar.set_description_str("  ".join(left))

    def close(self) -> None:
        """Leave the bar as it is and go to the next line."""
        if self._bar is not None:
            _open_bars.remove(self._bar)
            self._bar.close()
            self._bar = None

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_open_bars: list[Any] = []


def _on_terminal() -> bool:
    return sys.stderr.isatty() and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def format_seconds(seconds: float | None) -> str:
    """65 -> ``1:05``, 3700 -> ``1:01:40``."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def say(message: str) -> None:
    """A progress line for the person or the pod's log."""
    _write(message, sys.stdout)


def warn(message: str) -> None:
    _write(f"warning: {message}", sys.stderr)


def _write(message: str, stream: TextIO) -> None:
    """A line above the progress bar, if there is one."""
    if _open_bars:
        from tqdm import tqdm

        tqdm.write(message, file=stream)
        stream.flush()
    else:
        print_line(message, stream)


def append_json_line(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(value) + "\n")


# -- Python's logging ------------------------------------------------------------------------------------------------


class _AboveTheBar(logging.Handler):
    """Records to standard error, wherever that leads at the moment."""

    def emit(self, record: logging.LogRecord) -> None:
        _write(self.format(record), sys.stderr)


class _LogFile(logging.FileHandler):
    """Told apart from handlers that others have added."""


def setup_logging(level: str = "INFO", log_file: str | Path | None = None) -> None:
    """Show what libraries and this package log, as time, level and message; a second call replaces the first.

    Libraries that log a lot are heard from WARNING on.

    Args:
        level: DEBUG, INFO, WARNING, ERROR or CRITICAL.
        log_file: Also append to this file; its folder is made.

    Raises:
        UserError: no such level, or the file cannot be written.
    """
    levels = logging.getLevelNamesMapping()
    if level.upper() not in levels:
        raise UserError(f"logging level {level!r}: expected one of DEBUG, INFO, WARNING, ERROR, CRITICAL")
    handlers: list[logging.Handler] = [_AboveTheBar()]
    if log_file is not None:
        try:
            Path(log_file).parent.mkdir(parents=True, exist_ok=True)
            handlers.append(_LogFile(log_file, encoding="utf-8"))
        except OSError as error:
            raise UserError(f"cannot write the log file {log_file}: {error}") from None
    root = logging.getLogger()
    for handler in root.handlers[:]:
        if isinstance(handler, (_AboveTheBar, _LogFile)):
            root.removeHandler(handler)
            handler.close()
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-8s %(message)s", "%Y-%m-%d %H:%M:%S"))
        root.addHandler(handler)
    root.setLevel(levels[level.upper()])
    for name in CHATTY:
        logging.getLogger(name).setLevel(max(logging.WARNING, levels[level.upper()]))
