"""The training loop.

restore or start -> for each batch: set lr and momentum from the step -> masks -> forward -> loss -> backward -> clip
-> optimiser step -> target update -> now and then: log, measure, save. Everything random is a pure function of
(seed, step), so a resumed run is the run that was interrupted.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hjepa import distributed
from hjepa.config import Config, dump_yaml, flatten
from hjepa.distributed import World
from hjepa.errors import FutileRetryError, PreemptedError, UserError
from hjepa.losses import HierarchicalLoss
from hjepa.masks import Masks, MultiBlockMasking
from hjepa.models import HJEPAModel
from hjepa.utils.checkpoint import CheckpointManager, SavedCheckpoint, read_checkpoint
from hjepa.utils.collapse import CollapseMonitor
from hjepa.utils.logging import MetricsLogger, ProgressTracker, format_seconds, say, warn
from hjepa.utils.scheduler import create_ema_scheduler, create_lr_scheduler

MAX_SKIPPED = 5  # non-finite steps in a row before training gives up
MAX_SKIPPED_FP16 = 50  # there the loss scale has to come down first, by halves
LINEAGE = ("seed", "model.", "masking.", "loss.", "training.", "data.image_size", "data.channels", "data.crop_scale")
ELASTIC = ("training.device", "training.accumulation_steps", "training.use_amp")  # may change on resume

Probe = Callable[[nn.Module], dict[str, float]]


class Batch(Protocol):
    """One rank's share of one global batch."""

    @property
    def step(self) -> int: ...

    @property
    def epoch(self) -> int: ...

    @property
    def images(self) -> Tensor: ...  # (b, C, S, S) uint8

    @property
    def global_samples(self) -> NDArray[np.int64]: ...  # (B,) of the whole global batch


class Loader(Protocol):
    """Batches as a pure function of the step."""

    @property
    def num_samples(self) -> int: ...

    def batches(self, start_step: int, stop_step: int) -> Iterable[Batch]: ...

    def normalize(self, images: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class TrainingResult:
    """Where a finished run ended."""

    checkpoint: Path
    step: int
    epoch: int
    images_seen: int
    metrics: dict[str, float]


class HJEPATrainer:
    """Trains an HJEPAModel.

    Args:
        model: On any device; moved to ``device``.
        train_loader: Deterministic batches, see ``Loader``.
        val_loader: Images whose loss is reported whenever the representation is measured, or None.
        optimizer: Over the model's trainable parameters.
        loss_fn: Per-level predictions and targets -> loss and detached losses per level.
        masking_fn: Masks of the global batch of a step.
        config: The whole tree.
        device: ``cpu``, ``cuda``, ``cuda:1``, or ``auto``.
        resume_checkpoint: A checkpoint's path, ``"auto"`` for the newest good one in the checkpoint folder, or None.
        logger: Where metrics go; the default writes what ``config.logging`` asks for.
        probe: Measures the target encoder between epochs, for instance ``{"collapse/rankme": ...}``.
        on_saved: Called after each checkpoint is durable, off the training thread.
    """

    def __init__(
        self,
        model: HJEPAModel,
        train_loader: Loader,
        val_loader: Loader | None,
        optimizer: torch.optim.Optimizer,
        loss_fn: HierarchicalLoss,
        masking_fn: MultiBlockMasking,
        config: Config,
        device: str | torch.device = "cuda",
        resume_checkpoint: str | Path | None = None,
        *,
        logger: MetricsLogger | None = None,
        probe: Probe | None = None,
        on_saved: Callable[[SavedCheckpoint], None] | None = None,
    ):
        self.config = config
        self.world = World.from_environment()
        self.device = distributed.pick_device(str(device), self.world)
        distributed.init(self.world, self.device)
        self.core = model.to(self.device)
        self.model: nn.Module = model
        if self.world.size > 1:
            self.model = nn.parallel.DistributedDataParallel(model)
        self.train_loader, self.val_loader = train_loader, val_loader
        self.optimizer = optimizer
        self.loss_fn = loss_fn.to(self.device)
        self.masking_fn = masking_fn
        self.probe = probe
        self.resume_checkpoint = resume_checkpoint

        training, batch = config.training, config.training.batch_size
        if batch % self.world.size or (batch // self.world.size) % training.accumulation_steps:
            raise UserError(
                f"training.batch_size={batch} does not divide over {self.world.size} ranks with "
                f"training.accumulation_steps={training.accumulation_steps}"
            )
        samples = train_loader.num_samples
        self.steps_per_epoch = samples / batch
        self.total_steps = -(-training.epochs * samples // batch)
        self.lr_schedule = create_lr_scheduler(
            optimizer_type=training.optimizer,
            base_lr=training.lr,
            min_lr=training.min_lr,
            epochs=training.epochs,
            steps_per_epoch=self.steps_per_epoch,
            warmup_epochs=training.warmup_epochs,
        )
        ema = config.model.ema
        self.momentum_schedule = create_ema_scheduler(
            base_momentum=ema.momentum,
            final_momentum=ema.momentum_end,
            epochs=training.epochs,
            steps_per_epoch=self.steps_per_epoch,
            warmup_epochs=ema.momentum_warmup_epochs,
        )
        dtype = distributed.amp_dtype(self.device) if training.use_amp else None
        self.amp_dtype = dtype
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)
        self.collapse = CollapseMonitor(config.collapse)
        self.checkpoints = CheckpointManager(
            config.checkpoint.checkpoint_dir,
            keep_best_n=config.checkpoint.keep_best_n,
            save_frequency=config.checkpoint.save_frequency,
            metric_name=config.checkpoint.metric,
            mode=config.checkpoint.mode,
            on_saved=on_saved,
        )
        self.logger = logger or MetricsLogger(
            config.logging.experiment_name,
            config.logging.log_dir,
            config.model_dump(mode="json"),
            use_wandb=config.logging.wandb.enabled and self.world.is_main,
            use_tensorboard=config.logging.tensorboard.enabled and self.world.is_main,
            wandb_project=config.logging.wandb.project,
        )
        self.step = 0  # optimiser steps taken
        self.skipped = 0  # non-finite steps in a row
        self.metrics: dict[str, float] = {}  # the newest value of everything logged
        self.measured: dict[str, float] = {}  # what the probe found at this very step
        # Since the last log line: loss, gradient norm and losses of the levels, summed, and the steps in the sum.
        self.sums = torch.zeros(self.core.num_levels + 2, device=self.device)
        self.counted = 0
        self._saved_step: int | None = None
        self._signal: int | None = None

    # -- the loop ----------------------------------------------------------------------------------------------------

    def train(self) -> TrainingResult:
        """Train to the end, from the start or from the checkpoint to resume.

        Raises:
            PreemptedError: SIGTERM came; the state is saved. SIGINT saves it too and is a KeyboardInterrupt.
            FutileRetryError: the representation collapsed or the numerics diverged.
        """
        self._restore()
        self._describe()
        with self._signals(), self.logger:
            self._stop_if_collapsed()
            self._loop()
            self.checkpoints.wait()
        distributed.close()
        latest = self.checkpoints.get_latest_checkpoint()
        assert latest is not None, "a run of at least one step ends with a checkpoint"
        return TrainingResult(latest, self.step, self._epoch(self.step), self.images_seen, dict(self.metrics))

    def _loop(self) -> None:
        progress = ProgressTracker(self.total_steps, self.step)
        frequency = self.config.logging.log_frequency
        waited = 0.0
        self.model.train()
        batches = iter(self.train_loader.batches(self.step, self.total_steps))
        while self.step < self.total_steps:
            started = time.monotonic()
            batch = next(batches)
            waited += time.monotonic() - started
            lr, momentum = self.lr_schedule(self.step), self.momentum_schedule(self.step)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            measured = self._train_step(batch, momentum)
            self.step += 1
            if measured is not None:
                self.sums += measured
                self.counted += 1
            if self.step % frequency == 0 or self.step == self.total_steps:
                progress.step(self.step)
                self._log(lr, momentum, progress, waited)
                waited = 0.0
            if self._epoch(self.step) > self._epoch(self.step - 1) or self.step == self.total_steps:
                self._end_of_epoch()
            if self._signal is not None and self.step < self.total_steps:
                self._stop()

    def _train_step(self, batch: Batch, momentum: float) -> Tensor | None:
        """One optimiser step; returns (loss, gradient norm, loss per level) on the device, None if it was skipped."""
        masks = self.masking_fn(step=batch.step, epoch=batch.epoch, samples=batch.global_samples)
        images = batch.images.to(self.device, non_blocking=True)
        own = self.world.slice(len(batch.global_samples))
        chunks = np.array_split(np.arange(own.start, own.stop), self.config.training.accumulation_steps)
        losses = torch.zeros(self.core.num_levels + 1, device=self.device)
        for i, chunk in enumerate(chunks):
            share = len(chunk) / (own.stop - own.start)
            with self._no_sync_until(i == len(chunks) - 1):
                loss, levels = self._loss(images[chunk[0] - own.start : chunk[-1] + 1 - own.start], masks, chunk)
                self.scaler.scale(loss * share).backward()
            losses += share * torch.cat([loss.detach()[None], levels])
        self.scaler.unscale_(self.optimizer)
        limit = self.config.training.clip_grad or math.inf
        norm = nn.utils.clip_grad_norm_(self.core.parameters(), limit)
        if not torch.isfinite(norm + losses[0]):
            self._skip(losses[0], norm)
            return None
        self.skipped = 0
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.core.update_target(momentum)
        return torch.cat([losses[:1], norm[None], losses[1:]])

    def _loss(self, images: Tensor, masks: Masks, chunk: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Loss () and detached losses per level (L,) of the images of ``chunk``, positions in the global batch."""

        def to_device(index: NDArray[np.int64]) -> Tensor:
            return torch.from_numpy(index[chunk]).to(self.device, non_blocking=True)

        context, targets = to_device(masks.context), [to_device(cells) for cells in masks.targets]
        with torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None):
            out = self.model(self.train_loader.normalize(images), context, targets)
        loss, levels = self.loss_fn(out.predictions, out.targets)
        return loss, levels

    def _no_sync_until(self, last: bool) -> AbstractContextManager[None]:
        if isinstance(self.model, nn.parallel.DistributedDataParallel) and not last:
            return self.model.no_sync()
        return nullcontext()

    def _skip(self, loss: Tensor, norm: Tensor) -> None:
        """A non-finite step changes nothing; too many of them end the run."""
        self.scaler.update()  # lowers the scale: unscale_() has seen what was not finite
        self.optimizer.zero_grad(set_to_none=True)
        self.skipped += 1
        warn(f"step {self.step}: loss {loss.item():g}, gradient norm {norm.item():g}; the step is skipped")
        if self.skipped > (MAX_SKIPPED_FP16 if self.scaler.is_enabled() else MAX_SKIPPED):
            raise FutileRetryError(
                f"{self.skipped} steps in a row had a loss or gradient that is not finite, up to step {self.step}. "
                "Lower training.lr, or turn training.use_amp off, and resume from the last checkpoint."
            )

    # -- between steps -----------------------------------------------------------------------------------------------

    @property
    def images_seen(self) -> int:
        return self.step * self.config.training.batch_size

    def _epoch(self, step: int) -> int:
        """Epochs completed after ``step`` steps."""
        return step * self.config.training.batch_size // self.train_loader.num_samples

    def _log(self, lr: float, momentum: float, progress: ProgressTracker, waited: float) -> None:
        if self.counted == 0:
            return  # every step since the last line was skipped, and said so
        loss, norm, *levels = (self.sums / self.counted).tolist()
        self.sums.zero_()
        self.counted = 0
        rate = progress.steps_per_second() * self.config.training.batch_size
        window = self.config.logging.log_frequency / max(progress.steps_per_second(), 1e-9)
        wait = min(waited / window, 1.0)
        metrics = {"train/loss": loss, "optim/grad_norm": norm, "optim/lr": lr, "optim/ema_momentum": momentum}
        metrics |= {f"train/loss_level_{level}": value for level, value in enumerate(levels)}
        metrics |= {"perf/images_per_second": rate, "perf/data_wait_share": wait}
        self.metrics |= metrics
        if not self.world.is_main:
            return
        self.logger.log_metrics(metrics, self.images_seen)
        parts = " ".join(f"L{level} {value:.4f}" for level, value in enumerate(levels))
        epoch = min(self.step / self.steps_per_epoch, self.config.training.epochs)
        say(
            f"epoch {epoch:.2f}/{self.config.training.epochs}  step {self.step}/{self.total_steps}  loss {loss:.4f} "
            f"({parts})  lr {lr:.2e}  {rate:.0f} images/s  data wait {wait:.0%}  "
            f"ETA {format_seconds(progress.get_eta())}"
        )

    def _end_of_epoch(self) -> None:
        """Measure the representation, act on collapse, save."""
        before, now = self._epoch(self.step - 1), self._epoch(self.step)
        last = self.step == self.total_steps

        def due(frequency: int) -> bool:  # one step may cover several epochs of a small data set
            return last or now // frequency > before // frequency

        save = due(self.config.checkpoint.save_frequency)
        # What is saved is measured too: a checkpoint without a metric cannot be the best one.
        if save or due(self.config.collapse.frequency):
            if self.val_loader is not None:
                self._validate(self.val_loader)
            if self.probe is not None and self.world.is_main:
                self._measure()
        if save:
            self._save()
        self._stop_if_collapsed()
        self.measured = {}

    @torch.no_grad()
    def _validate(self, loader: Loader) -> None:
        """Mean loss over the validation images, with the same masks every time. It watches, it never selects."""
        self.model.eval()
        losses = []
        for batch in loader.batches(0, -(-loader.num_samples // self.config.training.batch_size)):
            masks = self.masking_fn(step=batch.step, epoch=0, samples=batch.global_samples)
            own = self.world.slice(len(batch.global_samples))
            loss, _ = self._loss(batch.images.to(self.device), masks, np.arange(own.start, own.stop))
            losses.append(loss)
        self.model.train()
        found = {"val/loss": float(torch.stack(losses).mean())}
        self.measured |= found
        if self.world.is_main:
            self.logger.log_metrics(found, self.images_seen)

    def _measure(self) -> None:
        assert self.probe is not None
        self.core.target_encoder.eval()
        with torch.inference_mode():
            found = self.probe(self.core.target_encoder)
        self.model.train()
        self.measured |= found
        self.logger.log_metrics(found, self.images_seen)
        say("  " + "  ".join(f"{name} {value:.4g}" for name, value in found.items()))
        watched = {
            name.removeprefix("collapse/"): value for name, value in found.items() if name.startswith("collapse/")
        }
        diagnosis = self.collapse.update(watched) if watched else None
        if diagnosis:
            warn(diagnosis)

    def _stop_if_collapsed(self) -> None:
        """Checked after a restart too: a retry must not train on from a collapsed state."""
        if not self.collapse.must_stop:
            return
        self._save()
        self.checkpoints.wait()
        raise FutileRetryError(
            f"{self.collapse.diagnosis}, up to step {self.step}. Training is stopped as collapse.action=stop asks. "
            "A faster target (lower model.ema.momentum), a smaller training.lr or larger masks usually help; start "
            "again with another name of the run."
        )

    def _save(self) -> None:
        """Once per step: a second save would lose what was measured before the first."""
        if not self.world.is_main or self._saved_step == self.step:
            return
        self._saved_step = self.step
        self.checkpoints.save_checkpoint(
            epoch=self._epoch(self.step),
            model=self.model,
            optimizer=self.optimizer,
            scaler=self.scaler if self.scaler.is_enabled() else None,
            metrics=self.metrics | self.measured,
            step=self.step,
            state={
                "config": dump_yaml(self.config),
                "lineage": self.lineage,
                "images_seen": self.images_seen,
                "sums": self.sums,
                "counted": self.counted,
                "skipped": self.skipped,
                "strikes": self.collapse.strikes,
                "rng": torch.get_rng_state(),
                "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            },
        )

    def _restore(self) -> None:
        path = self.resume_checkpoint
        if path == "auto":
            path = self.checkpoints.find_resumable(warn)
        if path is None:
            return
        self._require_same_lineage(Path(path))
        content = self.checkpoints.load_checkpoint(path, self.core, self.optimizer, self.scaler)
        state: Mapping[str, Any] = content["state"]
        self.step = content["step"]
        self.metrics = dict(content["metrics"])
        self.skipped, self.collapse.strikes = state["skipped"], state["strikes"]
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        self.sums.copy_(state["sums"])
        self.counted = state["counted"]
        self._saved_step = self.step
        say(f"resumed from {path} at step {self.step} of {self.total_steps}")

    @property
    def lineage(self) -> dict[str, Any]:
        """Everything that decides where the next step leads; a checkpoint of another lineage cannot be resumed."""
        settings = {key: value for key, value in flatten(self.config).items() if key.startswith(LINEAGE)}
        return {key: value for key, value in settings.items() if key not in ELASTIC} | {
            "images": self.train_loader.num_samples
        }

    def _require_same_lineage(self, path: Path) -> None:
        theirs, ours = read_checkpoint(path)["state"]["lineage"], self.lineage
        different = [
            f"{key}: {theirs.get(key)} there, {ours.get(key)} here"
            for key in sorted({*theirs, *ours})
            if theirs.get(key) != ours.get(key)
        ]
        if different:
            raise UserError(
                f"{path} was trained with other settings, and going on would mix two experiments. "
                "Use the settings it was trained with, or another name of the run.\n  " + "\n  ".join(different)
            )

    def _describe(self) -> None:
        if not self.world.is_main:
            return
        trained = sum(p.numel() for p in self.core.parameters() if p.requires_grad)
        precision = str(self.amp_dtype or torch.float32).removeprefix("torch.")
        say(
            f"training {trained / 1e6:.2f} M parameters on {self.device} in {precision}, {self.world.size} rank(s), "
            f"{torch.get_num_threads()} threads: {self.total_steps} steps of {self.config.training.batch_size} images, "
            f"{self.core.num_levels} levels"
        )

    # -- signals -----------------------------------------------------------------------------------------------------

    def _signals(self) -> AbstractContextManager[None]:
        return _Handlers(self)

    def _stop(self) -> None:
        assert self._signal is not None
        self._save()
        self.checkpoints.wait()
        if self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        name = signal.Signals(self._signal).name
        raise PreemptedError(
            f"{name} at step {self.step} of {self.total_steps}: the state is saved, the run can be resumed"
        )


class _Handlers(AbstractContextManager[None]):
    """SIGTERM and SIGINT end training at the next step boundary instead of in the middle of one."""

    def __init__(self, trainer: HJEPATrainer):
        self.trainer = trainer
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> None:
        def note(number: int, frame: FrameType | None) -> None:
            self.trainer._signal = number

        for number in (signal.SIGTERM, signal.SIGINT):
            self.previous[number] = signal.signal(number, note)

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
