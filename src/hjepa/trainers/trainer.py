"""The training loop.

restore or start -> for each batch: set the schedules from the step -> train step -> now and then: log, measure, save.
Everything random is a pure function of (seed, step), so a resumed run is the run that was interrupted.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hjepa import distributed
from hjepa.config import Config, differences, dump_yaml, lineage
from hjepa.distributed import World
from hjepa.errors import FutileRetryError, HjepaError, PreemptedError, UserError
from hjepa.losses import HierarchicalLoss
from hjepa.masks import MultiBlockMasking
from hjepa.models import HierarchicalEncoder, HJEPAModel, MaskTensors
from hjepa.trainers import incidents, parallel
from hjepa.trainers.optim import set_hyperparameters
from hjepa.trainers.readout import Readout
from hjepa.trainers.step import LOSS, NORM, SKIPPED, STOP, TrainStep, move, rows_of
from hjepa.utils.checkpoint import CheckpointManager, SavedCheckpoint, good_checkpoints, read_checkpoint
from hjepa.utils.collapse import CollapseMonitor, collapse_of_levels
from hjepa.utils.logging import MetricsLogger, ProgressLine, ProgressTracker, format_seconds, say, warn
from hjepa.utils.scheduler import create_ema_scheduler, create_lr_scheduler, create_weight_decay_scheduler
from hjepa.words import counted

MAX_OVERFLOWS = 50  # float16 steps in a row that are skipped while the loss scale comes down, by halves
ORDER, RANDOM = "order of the images", "random"

Probe = Callable[[nn.Module], dict[str, float]]


class Batch(Protocol):
    """One rank's share of one global batch."""

    @property
    def step(self) -> int: ...

    @property
    def images(self) -> Tensor: ...  # (b, C, S, S) uint8

    @property
    def samples(self) -> NDArray[np.int64]: ...  # (b,) numbers of the images

    @property
    def masks(self) -> Any: ...  # Masks of the images, with tensors


class Loader(Protocol):
    """Batches as a pure function of the step."""

    @property
    def num_samples(self) -> int: ...

    @property
    def batch_size(self) -> int: ...  # over all ranks

    def batches(self, start_step: int, stop_step: int, masking_fn: Any = None) -> Iterable[Batch]: ...

    def normalize(self, images: Tensor) -> Tensor: ...


class Schedules(NamedTuple):
    """What the step's number decides."""

    lr: float
    weight_decay: float
    momentum: float


@dataclass(frozen=True)
class TrainingResult:
    """Where a finished run ended."""

    checkpoint: Path
    step: int
    epoch: int
    images_seen: int
    metrics: dict[str, float]


class _RewoundError(Exception):
    """The state is that of an earlier step; its batches have to be asked for anew."""


class HJEPATrainer:
    """Trains an HJEPAModel on one device, or on one of several ranks that torchrun has started.

    Args:
        model: On any device; moved to ``device``.
        train_loader: Deterministic batches, see ``Loader``; ``hjepa.data.create_dataloaders`` makes one.
        val_loader: Images whose loss is reported whenever the representation is measured, or None.
        optimizer: Over the model's trainable parameters.
        loss_fn: Predictions, targets and embeddings per level -> loss and its detached parts.
        masking_fn: Masks of the global batch of a step; it runs in the loader's workers.
        config: The whole tree.
        device: ``cpu``, ``cuda``, ``cuda:1``, or ``auto``.
        resume_checkpoint: A checkpoint's path, ``"auto"`` for the newest good one in the checkpoint folder, or None.
        logger: Where metrics go; the default writes what ``config.logging`` asks for. Only the main rank logs.
        probe: Measures the target encoder between epochs, for instance ``{"collapse/rankme": ...}``; the default
            measures collapse on the training loader's first images.
        on_saved: Called after each checkpoint is durable, off the training thread, on the main rank.
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
        training = config.training
        self.config = config
        self.world = World.from_environment()
        self.device = distributed.pick_device(str(device), self.world)
        self._require_sizes(train_loader)
        distributed.init(self.world, self.device)
        self.train_loader, self.val_loader = train_loader, val_loader
        self.masking_fn = masking_fn
        self.probe = probe or self._collapse_probe
        self.resume_checkpoint = resume_checkpoint

        self.amp_dtype = distributed.amp_dtype(self.device, training.amp_dtype) if training.use_amp else None
        self.core = model  # wrap() moves it to the device, if need be piece by piece
        if training.compile:
            model.compile_blocks()
        names = parallel.parameter_names(model, optimizer)
        self.model = parallel.wrap(model, training.parallel, self.world, self.device, self.amp_dtype)
        parallel.rebind(optimizer, model, names)
        self.optimizer = optimizer
        self.train_step = TrainStep(
            self.model,
            self.core,
            optimizer,
            loss_fn.to(self.device),
            normalize=train_loader.normalize,
            clip_grad=training.clip_grad,
            amp_dtype=self.amp_dtype,
            accumulation_steps=training.accumulation_steps,
            world=self.world,
        )

        samples = train_loader.num_samples
        self.steps_per_epoch = samples / training.batch_size
        self.total_steps = -(-training.epochs * samples // training.batch_size)
        self.lr_schedule = create_lr_scheduler(
            optimizer_type=training.optimizer,
            base_lr=training.lr,
            min_lr=training.min_lr,
            epochs=training.epochs,
            steps_per_epoch=self.steps_per_epoch,
            warmup_epochs=training.warmup_epochs,
            schedule_type=training.schedule,
        )
        decay, decay_end = training.weight_decay, training.weight_decay_end
        self.weight_decay_schedule = create_weight_decay_scheduler(
            base=decay,
            final=decay if decay_end is None else decay_end,
            epochs=training.epochs,
            steps_per_epoch=self.steps_per_epoch,
        )
        ema = config.model.ema
        self.momentum_schedule = create_ema_scheduler(
            base_momentum=ema.momentum,
            final_momentum=ema.momentum_end,
            epochs=training.epochs,
            steps_per_epoch=self.steps_per_epoch,
            warmup_epochs=ema.momentum_warmup_epochs,
        )
        self.collapse = CollapseMonitor(config.collapse)
        self.checkpoints = CheckpointManager(
            config.checkpoint.checkpoint_dir,
            keep_best_n=config.checkpoint.keep_best_n,
            save_frequency=config.checkpoint.save_frequency,
            metric_name="collapse/rankme" if config.checkpoint.metric == "auto" else config.checkpoint.metric,
            mode=config.checkpoint.mode,
            on_saved=on_saved,
        )
        logs, main = config.logging, self.world.is_main
        self.logger = logger or MetricsLogger(
            logs.experiment_name,
            logs.log_dir,
            config,
            use_wandb=logs.wandb.enabled and main,
            use_tensorboard=logs.tensorboard.enabled and main,
            wandb_project=logs.wandb.project,
        )
        self.step = 0  # optimiser steps taken
        self.skipped = 0  # steps in a row whose loss or gradient was not finite
        self.overflows = 0  # likewise, of gradients that were too large for float16 and its loss scale
        self.rewinds = 0
        self.metrics: dict[str, float] = {}  # the newest value of everything logged
        self.measured: dict[str, float] = {}  # what was measured at this very step
        self.window: dict[str, float] = {}  # sums over the steps since the last log line, and their "count"
        self.readout: Readout[Batch] = Readout(self.device)
        self._probe_images: list[Tensor] = []
        self._incidents = 0
        self._saved_step: int | None = None
        self._signal: int | None = None
        self._told_to_stop = False

    def _require_sizes(self, loader: Loader) -> None:
        training = self.config.training
        if not hasattr(loader, "batches"):
            raise UserError(
                f"train_loader: a {type(loader).__name__} cannot resume at any step; "
                "use the loader that hjepa.data.create_dataloaders(config) makes"
            )
        share, rest = divmod(training.batch_size, self.world.size)
        if rest or share < training.accumulation_steps:
            raise UserError(
                f"training.batch_size={training.batch_size} does not divide over {self.world.size} ranks with "
                f"training.accumulation_steps={training.accumulation_steps}"
            )
        if loader.batch_size != training.batch_size:
            raise UserError(
                f"train_loader makes batches of {loader.batch_size} images, training.batch_size is "
                f"{training.batch_size}; make both the same"
            )

    # -- the loop ----------------------------------------------------------------------------------------------------

    def train(self) -> TrainingResult:
        """Train to the end, from the start or from the checkpoint to resume.

        Raises:
            PreemptedError: SIGTERM came, to this rank or another; the state is saved. SIGINT saves it too and is a
                KeyboardInterrupt.
            FutileRetryError: the representation collapsed or the numerics diverged.

        All ranks raise these together. Whoever catches them calls ``distributed.close()`` once what is left to do on
        the main rank is done: torchrun stops the others as soon as one has failed.
        """
        with self._signals(), self.logger:
            try:
                self._run()
            except BaseException:
                with suppress(HjepaError):  # what is on its way to the disk gets there; the first error is the one
                    self.checkpoints.wait()
                raise
            self.checkpoints.wait()
        if self._signal is not None and self.world.size == 1:
            self._raise_stop()
        distributed.close()  # the main rank's last checkpoint is durable when any rank returns
        latest = self.checkpoints.get_latest_checkpoint()
        return TrainingResult(
            latest or self.checkpoints.checkpoint_dir,
            self.step,
            self._epoch(self.step),
            self.images_seen,
            dict(self.metrics),
        )

    def _run(self) -> None:
        self._restore(self.resume_checkpoint)
        self._describe()
        if self.world.is_main:
            self.checkpoints.reserve(parallel.state_bytes(self.core, self.optimizer), pinned=self.device.type == "cuda")
        self._stop_if_collapsed()
        while self.step < self.total_steps:
            with ProgressLine(self.total_steps, self.step, shown=self.world.is_main) as line:
                try:
                    self._loop(line)
                except _RewoundError:
                    self.readout.clear()

    def _loop(self, line: ProgressLine) -> None:
        progress = ProgressTracker(self.total_steps, self.step)
        logs = self.config.logging
        waited = 0.0
        self.model.train()
        batches = iter(self.train_loader.batches(self.step, self.total_steps, self.masking_fn))
        while self.step < self.total_steps:
            started = time.monotonic()
            batch = next(batches)
            waited += time.monotonic() - started
            now = self.schedules(self.step)
            set_hyperparameters(self.optimizer, lr=now.lr, weight_decay=now.weight_decay)
            measured = self.train_step(
                batch.images,
                MaskTensors(*batch.masks),
                now.momentum,
                number=self.step,
                stop=self._signal is not None,
                keep_gradients=self._picture_due(self.step + 1),
            )
            self.step += 1
            line.advance(self.step)
            self.readout.push(measured, batch)
            self._read()
            self._told_to_stop |= self._signal is not None and self.world.size == 1
            if self.step % logs.log_frequency == 0 or self.step == self.total_steps:
                progress.step(self.step)
                self._log(now, progress, line, waited)
                waited = 0.0
            if self._epoch(self.step) > self._epoch(self.step - 1) or self.step == self.total_steps:
                progress.step(self.step)
                self._end_of_epoch(batch, progress)
            if self._told_to_stop and self.step < self.total_steps:
                self._stop()

    def schedules(self, step: int) -> Schedules:
        """Learning rate, weight decay and momentum of one step."""
        return Schedules(self.lr_schedule(step), self.weight_decay_schedule(step), self.momentum_schedule(step))

    def _read(self, *, all: bool = False) -> None:
        """Take in what past steps measured; act on those that were not finite."""
        for values, batch in self.readout.pop(all=all):
            self._told_to_stop |= values[STOP] > 0
            if not values[SKIPPED]:
                self.skipped = self.overflows = 0
                names = ["loss", "grad_norm", *self.train_step.parts]
                for name, value in zip(names, values[LOSS:], strict=True):
                    self.window[name] = self.window.get(name, 0.0) + value
                self.window["count"] = self.window.get("count", 0) + 1
            else:
                self._not_finite(values, batch)

    def _not_finite(self, values: list[float], batch: Batch) -> None:
        """A step that was not finite changed nothing; it is written down, and too many of them end the run."""
        said = f"step {batch.step}: loss {values[LOSS]:g}, gradient norm {values[NORM]:g}; the step is skipped"
        if self.train_step.scaler.is_enabled() and np.isfinite(values[LOSS]):
            self.overflows += 1
            if self.world.is_main:
                warn(f"{said}, float16's loss scale comes down")
            if self.overflows < MAX_OVERFLOWS:
                return
            raise FutileRetryError(
                f"{self.overflows} steps in a row had a gradient too large for float16, up to step {batch.step}. "
                "Resume with training.amp_dtype=bfloat16 or training.use_amp=false."
            )
        self.skipped += 1
        folder = self._write_incident(batch)
        if self.world.is_main:
            warn(f"{said}. Play it again with: hjepa replay {folder}" if folder else said)
        if self.skipped < self.config.training.max_skipped:
            return
        cause = f"{self.skipped} steps in a row had a loss or gradient that is not finite, up to step {batch.step}"
        if self.rewinds == 0 and self._rewind(cause):
            raise _RewoundError
        raise FutileRetryError(
            f"{cause}{', after a rewind' if self.rewinds else ', and there is no checkpoint to go back to'}. "
            "Look at the batches with hjepa replay. Resume with training.use_amp=false, or start anew with a lower "
            "training.lr in another checkpoint.checkpoint_dir (in a pipeline: another name of the run)."
        )

    def _write_incident(self, batch: Batch) -> Path | None:
        if self._incidents == incidents.MOST:
            return None
        self._incidents += 1
        folder = incidents.folder_of(self.checkpoints.checkpoint_dir / "incidents", batch.step)
        weights, _ = parallel.gather_state(self.model, None)
        try:
            if self.world.is_main:
                incidents.write_model(folder, self.config, weights or {}, step=self.step)
            incidents.write_batch(
                folder,
                self.world.rank,
                images=self.train_loader.normalize(batch.images),
                masks=MaskTensors(*batch.masks),
                samples=batch.samples,
                step=batch.step,
                amp_dtype=self.amp_dtype,
            )
        except OSError as error:
            warn(f"step {batch.step} cannot be written down: {error}")
            return None
        return folder

    def _rewind(self, cause: str) -> bool:
        """Go back to the last good checkpoint, in case the hardware and not the data was at fault."""

        def newest() -> Path | None:
            self.checkpoints.wait()
            found = good_checkpoints(self.checkpoints.checkpoint_dir, warn)
            return next((path for path, content in found if content["state"]["skipped"] == 0), None)

        path = distributed.on_main(newest, self.world)
        if path is None:
            return False
        if self.world.is_main:
            warn(f"{cause}; going back to {path}")
        self.optimizer.zero_grad(set_to_none=True)
        self._restore(path)
        self.rewinds, self.skipped = 1, 0
        return True

    # -- between steps -----------------------------------------------------------------------------------------------

    @property
    def images_seen(self) -> int:
        return self.step * self.config.training.batch_size

    def _epoch(self, step: int) -> int:
        """Epochs completed after ``step`` steps."""
        return step * self.config.training.batch_size // self.train_loader.num_samples

    def _due(self, step: int, frequency: int) -> bool:
        """Whether an epoch that is a multiple of ``frequency`` ends with ``step``; one step may cover several."""
        return step == self.total_steps or self._epoch(step) // frequency > self._epoch(step - 1) // frequency

    def _picture_due(self, step: int) -> bool:
        frequency = self.config.logging.picture_frequency
        return frequency > 0 and self.world.is_main and self._due(step, frequency)

    def _log(self, now: Schedules, progress: ProgressTracker, line: ProgressLine, waited: float) -> None:
        self._read(all=True)
        count = self.window.pop("count", 0)
        if count == 0:
            return  # every step since the last line was skipped, and said so
        means = {name: total / count for name, total in self.window.items()}
        self.window.clear()
        loss, norm = means.pop("loss"), means.pop("grad_norm")
        rate = progress.steps_per_second() * self.config.training.batch_size
        window = self.config.logging.log_frequency / max(progress.steps_per_second(), 1e-9)
        wait = min(waited / window, 1.0)
        metrics = {"train/loss": loss} | {f"train/loss_{name}": value for name, value in means.items()}
        metrics |= {"optim/lr": now.lr, "optim/grad_norm": norm, "optim/ema_momentum": now.momentum}
        if self.config.training.weight_decay_end is not None:
            metrics["optim/weight_decay"] = now.weight_decay
        if self.train_step.scaler.is_enabled():
            metrics["optim/loss_scale"] = self.train_step.scaler.get_scale()
        metrics |= {"perf/images_per_second": rate, "perf/data_wait_share": wait}
        self.metrics |= metrics
        if not self.world.is_main:
            return
        self.logger.log_metrics(metrics, self.images_seen)
        self.logger.log_system_metrics(self.images_seen)
        parts = " ".join(f"{name.replace('level_', 'L')} {value:.4f}" for name, value in means.items())
        epoch = min(self.step / self.steps_per_epoch, self.config.training.epochs)
        line.show(
            f"epoch {epoch:.2f}/{self.config.training.epochs}",
            f"step {self.step}/{self.total_steps}",
            f"loss {loss:.4f} ({parts})",
            f"lr {now.lr:.2e}",
            f"{rate:.0f} images/s",
            f"data wait {wait:.0%}",
            f"ETA {format_seconds(progress.get_eta())}",
        )

    def _end_of_epoch(self, batch: Batch, progress: ProgressTracker) -> None:
        """Sum up, measure the representation, act on collapse, save."""
        self._read(all=True)
        took = progress.epoch_summary(self.config.training.batch_size)
        if self.world.is_main:
            rate = "" if took.images_per_second is None else f", {took.images_per_second:.0f} images/s"
            say(f"  epoch {self._epoch(self.step)}: {took.steps} steps in {format_seconds(took.seconds)}{rate}")
        save = self._due(self.step, self.config.checkpoint.save_frequency)
        # What is saved is measured too: a checkpoint without a metric cannot be the best one.
        if save or self._due(self.step, self.config.collapse.frequency):
            if self.val_loader is not None:
                self._validate(self.val_loader)
            self._measure()
        if self._picture_due(self.step):
            try:
                self._draw(batch)
            except Exception as error:  # noqa: BLE001 - a picture is no reason to end a run
                warn(f"no pictures of step {self.step} ({type(error).__name__}: {error})")
        if save:
            self._save()
        self._stop_if_collapsed()
        self.measured = {}
        progress.start_epoch(self._epoch(self.step))  # what was measured and saved is not the next epoch's time

    @torch.no_grad()
    def _validate(self, loader: Loader) -> None:
        """Mean loss over the validation images, with the same masks every time. It watches, it never selects."""
        self.model.eval()
        losses = []
        steps = loader.num_samples // loader.batch_size
        for batch in loader.batches(0, steps, self.masking_fn):
            masks = move(MaskTensors(*batch.masks), self.device)
            images = batch.images.to(self.device, non_blocking=True)
            for start, end in self.train_step.micro_batches(len(images)):
                loss, _ = self.train_step.loss(images[start:end], rows_of(masks, start, end))
                losses.append(loss * (end - start) / len(images))
        self.model.train()
        found = {"val/loss": float(parallel.all_reduce_mean(torch.stack(losses).sum())) / steps}
        self.measured |= found
        if self.world.is_main:
            self.logger.log_metrics(found, self.images_seen)

    def _measure(self) -> None:
        self.core.target_encoder.eval()
        found: dict[str, float] = {}
        # A sharded encoder can only run on all ranks together.
        if self.world.is_main or parallel.is_sharded(self.model):
            sharded = parallel.is_sharded(self.model)  # then the weights come in the dtype of mixed precision
            with torch.no_grad(), self.train_step.autocast() if sharded else nullcontext():
                found = self.probe(self.core.target_encoder)
        self.model.train()
        found = distributed.broadcast_object(found, self.world)
        self.measured |= found
        diagnosis = self.collapse.update(found)
        if not self.world.is_main:
            return
        self.logger.log_metrics(found, self.images_seen)
        say("  " + "  ".join(f"{name} {value:.4g}" for name, value in found.items()))
        if diagnosis:
            warn(diagnosis)

    def _collapse_probe(self, target_encoder: nn.Module) -> dict[str, float]:
        """Collapse measures of each level and of all of them, on this rank's first training images."""
        encoder = HierarchicalEncoder(target_encoder, num_levels=self.core.num_levels)  # type: ignore[arg-type]
        wanted = min(self.config.collapse.probe_samples, self.train_loader.num_samples // self.world.size)
        share = self.config.training.batch_size // self.world.size
        if not self._probe_images:
            for batch in self.train_loader.batches(0, -(-wanted // share)):
                self._probe_images += [batch.images[i:j] for i, j in self.train_step.micro_batches(share)]
        parts = [encoder.embed(self.train_loader.normalize(i.to(self.device))) for i in self._probe_images]
        tables = {level: torch.cat([part[level] for part in parts])[:wanted].float().cpu() for level in parts[0]}
        return collapse_of_levels(tables)

    def _draw(self, batch: Batch) -> None:
        """Pictures of the masks and of what is predicted, and how weights and gradients are spread."""
        from hjepa.utils import pictures

        self.logger.log_model_weights(self.core, self.images_seen)
        self.logger.log_model_gradients(self.core, self.images_seen)
        if parallel.is_sharded(self.model) or not self.logger.listening:
            return  # a sharded model can only run on all ranks together
        images = self.train_loader.normalize(batch.images[:8].to(self.device))
        masks = move(rows_of(MaskTensors(*batch.masks), 0, 8), self.device)
        self.core.eval()
        with torch.no_grad():
            out = self.core(images, masks)
        self.core.train()
        shown = batch.images[:8].cpu()
        context, targets = masks.context.cpu(), [cells.cpu() for cells in masks.targets]
        grid = self.config.grid_size
        self.logger.log_image("masks", pictures.mask_picture(shown, context, targets, grid), self.images_seen)
        self.logger.log_prediction_comparison(
            out.predictions, out.targets, self.images_seen, images=shown, cells=targets, grid=grid
        )

    def _stop_if_collapsed(self) -> None:
        """Checked after a restart too: a retry must not train on from a collapsed state."""
        if not self.collapse.must_stop:
            return
        self._save()
        self.checkpoints.wait()
        raise FutileRetryError(
            f"{self.collapse.diagnosis}, up to step {self.step}. Training is stopped as collapse.action=stop asks. "
            "A faster target (lower model.ema.momentum), a smaller training.lr, larger masks or a regularizer "
            "(loss.regularizer.name) usually help; start anew in another checkpoint.checkpoint_dir (in a pipeline: "
            "with another name of the run)."
        )

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        """Once per step: a second save would lose what was measured before the first."""
        if self._saved_step == self.step:
            return
        self._saved_step = self.step
        self._read(all=True)
        weights, moments = parallel.gather_state(self.model, self.optimizer)
        if not self.world.is_main or weights is None:
            return
        scaler = self.train_step.scaler
        # A collapsed encoder can have a high rank or k-NN score, for neither knows a scale. It is never the best.
        found, ranked = self.metrics | self.measured, self.checkpoints.metric_name
        disqualified = self.collapse.strikes > 0
        self.checkpoints.save_checkpoint(
            epoch=self._epoch(self.step),
            model=weights,
            optimizer=moments,
            scaler=scaler if scaler.is_enabled() else None,
            metrics={name: value for name, value in found.items() if not disqualified or name != ranked},
            step=self.step,
            state={
                "config": dump_yaml(self.config),
                "lineage": self.lineage,
                "logged": self.metrics,  # without what was measured of these weights alone
                "ranked_by": [ranked, self.config.checkpoint.mode],
                "overflows": self.overflows,
                "images_seen": self.images_seen,
                "window": self.window,
                "skipped": self.skipped,
                "rewinds": self.rewinds,
                "strikes": self.collapse.strikes,
                "rng": torch.get_rng_state(),
                "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
                "world_size": self.world.size,
            },
        )

    def _restore(self, path: str | Path | None) -> None:
        """Go on from a checkpoint that the main rank can read; the other ranks get its content from there."""
        content: dict[str, Any] = {}

        def read() -> dict[str, Any] | None:
            found = self.checkpoints.find_resumable(warn) if path == "auto" else path
            if found is None:
                self.checkpoints.set_aside(-1, warn)
                return None
            content.update(read_checkpoint(Path(found)))
            if "lineage" not in content.get("state", {}) or content.get("optimizer") is None:
                raise UserError(f"{found} holds no training run to resume; load it with CheckpointManager instead")
            self._require_same_lineage(Path(found), content["state"]["lineage"])
            if path != "auto":
                self.checkpoints.set_aside(content["step"], warn)
            light = {key: content[key] for key in ("step", "metrics", "scaler", "state", "ranking")}
            return light | {"path": found}

        head = distributed.on_main(read, self.world)
        if head is None:
            return
        try:
            parallel.scatter_state(self.model, self.optimizer, content or None, self.world)
        except ValueError as error:
            raise UserError(f"{head['path']} does not fit this model and optimiser: {error}") from None
        state: Mapping[str, Any] = head["state"]
        self.step = head["step"]
        self.metrics = dict(state.get("logged", head["metrics"]))
        ranked_by = [self.checkpoints.metric_name, self.config.checkpoint.mode]
        # Values of another metric cannot be compared with those to come.
        known = head["ranking"] if state.get("ranked_by", ranked_by) == ranked_by else []
        self.checkpoints.ranking = [tuple(item) for item in known]
        self.overflows = state.get("overflows", 0)
        self.skipped, self.collapse.strikes = state["skipped"], state["strikes"]
        self.rewinds = state.get("rewinds", 0)
        self.window = dict(state.get("window", {}))
        if head["scaler"] and self.train_step.scaler.is_enabled():
            self.train_step.scaler.load_state_dict(head["scaler"])
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        self._saved_step = self.step
        if self.world.is_main:
            there = state.get("world_size", self.world.size)
            elsewhere = "" if there == self.world.size else f" (saved by {counted(there, 'rank')})"
            say(f"resumed from {head['path']} at step {self.step} of {self.total_steps}{elsewhere}")

    def _barrier(self) -> None:
        distributed.broadcast_object(None, self.world)

    @property
    def lineage(self) -> dict[str, Any]:
        """Everything that decides where the next step leads; a checkpoint of another lineage cannot be resumed."""
        data = {"images": self.train_loader.num_samples, "images' digest": getattr(self.train_loader, "digest", None)}
        return lineage(self.config) | data | {ORDER: getattr(self.train_loader, "order", RANDOM)}

    def _require_same_lineage(self, path: Path, theirs: Mapping[str, Any]) -> None:
        ours = self.lineage
        # A key that did not exist when the checkpoint was written had what is the default now.
        past = lineage(Config()) | {"images' digest": ours["images' digest"], ORDER: RANDOM}
        theirs = past | {key: value for key, value in theirs.items() if key in ours}
        if different := differences(theirs, ours):
            raise UserError(
                f"{path} was trained with other settings, and going on would mix two experiments. "
                "Use the settings it was trained with, or another checkpoint.checkpoint_dir (in a pipeline: another "
                "name of the run).\n  " + "\n  ".join(different)
            )

    def _describe(self) -> None:
        if not self.world.is_main:
            return
        trained = sum(p.numel() for p in self.core.parameters() if p.requires_grad)
        precision = str(self.amp_dtype or torch.float32).removeprefix("torch.")
        ranks = "1 rank" if self.world.size == 1 else f"{self.world.size} ranks ({self.config.training.parallel})"
        say(
            f"training {trained / 1e6:.2f} M parameters on {self.device} in {precision}, {ranks}, "
            f"{counted(torch.get_num_threads(), 'thread')}: {counted(self.total_steps, 'step')} of "
            f"{counted(self.config.training.batch_size, 'image')}, {counted(self.core.num_levels, 'level')}"
        )

    # -- signals -----------------------------------------------------------------------------------------------------

    def _signals(self) -> AbstractContextManager[None]:
        return _Handlers(self)

    def _stop(self) -> None:
        """All ranks are here at the same step: each was told, or has read that another was."""
        self._save()
        self.checkpoints.wait()
        self._barrier()  # nobody leaves before the checkpoint is durable
        self._raise_stop()

    def _raise_stop(self) -> None:
        if self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        name = "another rank's signal" if self._signal is None else signal.Signals(self._signal).name
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
