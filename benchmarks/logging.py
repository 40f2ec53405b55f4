"""What logging costs: CPU seconds of one log line against those of the training steps between two of them.

    python -m benchmarks.logging [--config demo] [--rounds 5]

A step is a real one of the configuration (default: demo), on random images, on one thread. A line is what the trainer
logs every ``logging.log_frequency`` steps: its metrics and the system's, to TensorBoard and to a JSON journal, and the
text for the person. CPU seconds are those of the whole process, TensorBoard's threads included, until everything is on
disk; ``held_up`` is the time for which the training thread was stopped. Both take turns in one process. The pictures
and histograms of one ``logging.picture_frequency`` are told besides, in steps.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hjepa.config import Config, load_config
from hjepa.distributed import World
from hjepa.losses import HierarchicalLoss
from hjepa.masks import MultiBlockMasking
from hjepa.models import HJEPAModel, MaskTensors
from hjepa.trainers import create_optimizer
from hjepa.trainers.step import TrainStep
from hjepa.training import JsonLines
from hjepa.utils import MetricsLogger, ProgressTracker
from hjepa.utils.logging import format_seconds
from hjepa.utils.pictures import mask_picture

RESULT = Path(__file__).parent / "results" / "logging.json"
GOAL = 0.01  # of the steps between two lines, at most
STEPS, LINES = 20, 20  # per round


class Run:
    """One configuration's model, a batch of it, and a logger with everything on."""

    def __init__(self, config: Config, folder: Path):
        self.config = config
        generator = torch.Generator().manual_seed(0)
        data, batch = config.data, config.training.batch_size
        shape = (batch, data.channels, data.image_size, data.image_size)
        self.images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        masks = MultiBlockMasking(config)(step=0, epochs=0, samples=np.arange(batch))
        tensors = [torch.from_numpy(cells) for cells in masks.targets]
        context, union, place = (torch.from_numpy(item) for item in (masks.context, masks.union, masks.place))
        self.masks = MaskTensors(context, tensors, union, place, masks.rows)
        self.model = HJEPAModel(config)
        self.train_step = TrainStep(
            self.model,
            self.model,
            create_optimizer(self.model, config),
            HierarchicalLoss(config),
            normalize=lambda images: images.float() / 255 - 0.5,
            clip_grad=config.training.clip_grad,
            amp_dtype=None,
            accumulation_steps=1,
            world=World(),
        )
        self.folder = folder
        self.open_logger()
        self.progress = ProgressTracker(10**6)
        self.step = 0

    def open_logger(self) -> None:
        journal = JsonLines(self.folder / "metrics.jsonl")
        self.logger = MetricsLogger("run", self.folder, self.config, sinks=[journal])

    def steps(self) -> None:
        for _ in range(STEPS):
            self.measured = self.train_step(self.images, self.masks, 0.99, keep_gradients=True)

    def lines(self) -> None:
        for _ in range(LINES):
            self.step += self.config.logging.log_frequency
            loss, norm, *levels = self.measured[2:].tolist()
            self.progress.step(self.step)
            rate = self.progress.steps_per_second() * self.config.training.batch_size
            metrics = {"train/loss": loss, "optim/grad_norm": norm, "optim/lr": 1e-3, "optim/ema_momentum": 0.99}
            metrics |= {f"train/loss_level_{level}": value for level, value in enumerate(levels)}
            metrics |= {"perf/images_per_second": rate, "perf/data_wait_share": 0.03}
            self.logger.log_metrics(metrics, self.step)
            self.logger.log_system_metrics(self.step)
            f"step {self.step}  loss {loss:.4f}  {rate:.0f} images/s  ETA {format_seconds(self.progress.get_eta())}"

    def pictures(self) -> None:
        grid = self.config.grid_size
        context, targets, shown = self.masks.context[:8], [cells[:8] for cells in self.masks.targets], self.images[:8]
        with torch.no_grad():
            out = self.model(self.train_step.normalize(shown), MaskTensors(*(_first(item) for item in self.masks)))
        self.logger.log_image("masks", mask_picture(shown, context, targets, grid), self.step)
        self.logger.log_prediction_comparison(
            out.predictions, out.targets, self.step, images=shown, cells=targets, grid=grid
        )
        self.logger.log_model_weights(self.model, self.step)
        self.logger.log_model_gradients(self.model, self.step)


def _first(item: Any) -> Any:
    """The first 8 images' share of one field of the masks."""
    return item if isinstance(item, int) else [part[:8] for part in item] if isinstance(item, list) else item[:8]


def timed(run: Run, work: Callable[[], None]) -> tuple[float, float]:
    """CPU seconds of the process until everything is written, seconds that the caller had to wait."""
    run.open_logger()
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    waited = time.perf_counter() - wall
    run.logger.finish()
    return time.process_time() - cpu, waited


def measure(config: Config, rounds: int) -> dict[str, Any]:
    frequency = config.logging.log_frequency
    steps, lines, held = [], [], []
    with tempfile.TemporaryDirectory(prefix="hjepa-bench-") as folder:
        run = Run(config, Path(folder))
        for work in (run.steps, run.lines, run.pictures):  # imports, fonts, first allocations
            timed(run, work)
        for _ in range(rounds):
            steps.append(timed(run, run.steps)[0] / STEPS)
            cpu, waited = timed(run, run.lines)
            lines.append(cpu / LINES)
            held.append(waited / LINES)
        pictures = [timed(run, run.pictures) for _ in range(3)]
    shares = [line / (frequency * step) for line, step in zip(lines, steps, strict=True)]
    step = statistics.median(steps)
    return {
        "log_frequency": frequency,
        "share_of_steps": {"min": min(shares), "median": statistics.median(shares), "max": max(shares)},
        "step_cpu_ms": step * 1e3,
        "line_cpu_ms": statistics.median(lines) * 1e3,
        "line_held_up_ms": statistics.median(held) * 1e3,
        "pictures_cpu_steps": statistics.median(cpu for cpu, _ in pictures) / step,
        "pictures_held_up_ms": statistics.median(waited for _, waited in pictures) * 1e3,
        "goal": GOAL,
        "rounds": rounds,
        "machine": machine(),
    }


def machine() -> dict[str, Any]:
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what logging costs.")
    parser.add_argument("--config", default="demo")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = {"config": arguments.config} | measure(load_config(arguments.config), arguments.rounds)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    rounded = json.loads(json.dumps(result), parse_float=lambda text: float(f"{float(text):.4g}"))
    arguments.output.write_text(json.dumps(rounded, indent=2) + "\n")
    share = result["share_of_steps"]["median"]
    print(
        f"logging every {result['log_frequency']} steps costs {share:.3%} of the steps' CPU time, goal < {GOAL:.0%}\n"
        f"{result['line_cpu_ms']:.1f} ms per line, which holds training up for {result['line_held_up_ms']:.1f} ms; "
        f"{result['step_cpu_ms']:.1f} ms per step; pictures and histograms cost as much as "
        f"{math.ceil(result['pictures_cpu_steps'])} steps each time"
    )


if __name__ == "__main__":
    main()
