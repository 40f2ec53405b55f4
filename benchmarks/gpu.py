"""How fast training runs on one CUDA device, as images per second and as a share of its matrix-product rate.

    python -m benchmarks.gpu [--models S/16 B/16 L/16 H/14] [--steps 30] [--batch 256]

bf16, with and without torch.compile of each block, on a small fixed pool of masks whose shapes are bucketed
(``masking.context_multiple``). Images are synthetic, but take the real path: training loader with worker processes,
uint8 in page-locked memory, asynchronous copy, normalisation on the device. Model FLOPs are those of the I-JEPA
algorithm (``plain_flops``), whatever is left out on the way. The plain step is that of ``benchmarks.plain``.

Without a CUDA device it says so and exits with 2.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.checkpoint import machine
from benchmarks.plain import PlainModel, PlainStep, plain_flops
from benchmarks.step import MOMENTUM, rounded, train_step
from hjepa.config import Config, load_config
from hjepa.data.loader import Batch, TrainLoader
from hjepa.distributed import amp_dtype
from hjepa.masks import Masks, MultiBlockMasking
from hjepa.models import HJEPAModel, MaskTensors
from hjepa.trainers.step import TrainStep, move
from hjepa.utils.checkpoint import CheckpointManager

RESULTS = Path(__file__).parent / "results"
POOL = 4  # shapes of masks
NOMINAL = 790e12  # FLOP/s in bf16: what matrix products reach on an H200
KEYS = (
    *("data.image_size", "model.patch_size", "model.embed_dim", "model.depth", "model.num_heads"),
    *("model.predictor.embed_dim", "model.predictor.depth", "model.predictor.num_heads"),
)
MODELS = {
    "S/16": (224, 16, 384, 12, 6, 384, 6, 6),
    "B/16": (224, 16, 768, 12, 12, 384, 6, 6),
    "L/16": (224, 16, 1024, 24, 16, 384, 12, 6),
    "H/14": (224, 14, 1280, 32, 16, 384, 12, 6),
    "smoke": (32, 4, 48, 2, 3, 24, 2, 2),  # for tests
}


class Synthetic:
    """Random images in memory, in place of a prepared data set."""

    split, channels = "train", 3

    def __init__(self, count: int, size: int):
        self.shape, self.count = (size, size), count
        self.statistics = {"mean": [0.5] * 3, "std": [0.25] * 3}

    def __len__(self) -> int:
        return self.count

    def in_memory(self) -> NDArray[np.uint8]:
        return np.random.default_rng(0).integers(0, 256, (self.count, 3, *self.shape), np.uint8)


class FixedMasks:
    """Made anew at every step, as in training, but of POOL shapes in turn."""

    def __init__(self, config: Config):
        self.masking = MultiBlockMasking(config)

    def __call__(self, *, step: int, epochs: NDArray[np.int64], samples: NDArray[np.int64]) -> Masks:
        return self.masking(step=step % POOL, epochs=0, samples=np.arange(len(samples)))


def setting(name: str, batch: int) -> Config:
    sizes = [f"{key}={value}" for key, value in zip(KEYS, MODELS[name], strict=True)]
    fixed = ["model.num_levels=1", "masking.context_multiple=8", "data.crop_scale=[1.0,1.0]"]
    return load_config("default", [*sizes, *fixed, f"training.batch_size={batch}"])


def create_loader(config: Config, device: torch.device, workers: int) -> TrainLoader:
    cuda, size = device.type == "cuda", config.data.image_size
    return TrainLoader(
        Synthetic(512 if cuda else config.training.batch_size, size),  # type: ignore[arg-type]
        batch_size=config.training.batch_size,
        seed=0,
        image_size=size,
        channels=3,
        crop_scale=config.data.crop_scale,
        horizontal_flip=False,
        num_workers=workers,
        pin_memory=cuda,
    )


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds until the device has done what ``run`` asks of it."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def matmul_rate(device: torch.device, size: int) -> float:
    """FLOP/s of the best of some square bf16 products."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / min(timed(lambda: a @ b, device) for _ in range(10))


def measure(name: str, batch: int, steps: int, *, compiled: bool, workers: int, device: torch.device) -> dict[str, Any]:
    """Our step on one model."""
    config = setting(name, batch)
    loader, masking = create_loader(config, device, workers), FixedMasks(config)
    torch.manual_seed(0)
    model = HJEPAModel(config).to(device)
    if compiled:
        torch.compiler.reset()  # what the model before has left
        model.compile_blocks()
    step = train_step(model, config, amp_dtype(device), loader.normalize)
    batches: Iterator[Batch] = loader.batches(0, 2 * POOL + 3 * steps, masking)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    waited = 0.0

    def run(count: int) -> None:
        nonlocal waited
        for _ in range(count):
            start = time.perf_counter()
            made = next(batches)
            waited += time.perf_counter() - start
            step(made.images, MaskTensors(*made.masks), MOMENTUM, number=made.step)

    warm_up = timed(lambda: run(2 * POOL), device)  # twice: the first meets each shape, and compiles
    waited = 0.0
    seconds = timed(lambda: run(steps), device)
    wait = waited / seconds
    stall = checkpoint_stall(model, step, run, steps, seconds, device)
    shapes = [masking(step=i, epochs=np.zeros(1), samples=np.arange(batch)) for i in range(POOL)]
    context = statistics.fmean(masks.context.shape[1] for masks in shapes)
    cells = statistics.fmean(masks.targets[0].shape[2] for masks in shapes)
    return {
        "batch": batch,
        "images_per_second": batch * steps / seconds,
        "model_gflop_per_image": plain_flops(config, context, cells) / 1e9,
        "peak_memory_gib": torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None,
        "data_wait_share": wait,
        "checkpoint_stall_seconds": stall,
        "warm_up_seconds": warm_up,
    }


def checkpoint_stall(
    model: HJEPAModel,
    step: TrainStep,
    run: Callable[[int], None],
    steps: int,
    seconds: float,
    device: torch.device,
) -> float:
    """Seconds by which a checkpoint in the background delays the next ``steps`` steps, which alone take ``seconds``."""
    with tempfile.TemporaryDirectory(prefix="hjepa-bench-") as folder:
        manager = CheckpointManager(folder)
        manager.save_checkpoint(0, model, step.optimizer, wait=True)  # the first one allocates the snapshot's memory
        run(steps)  # whatever the first one has evicted

        def save_and_train() -> None:
            manager.save_checkpoint(1, model, step.optimizer)
            run(steps)

        delayed = timed(save_and_train, device)
        manager.wait()
    return delayed - seconds


def measure_plain(name: str, batch: int, steps: int, *, fused_attention: bool, device: torch.device) -> float:
    """Images per second of the plain step, on one batch that lies on the device already."""
    config = setting(name, batch)
    torch.manual_seed(0)
    model = PlainModel(config, fused_attention=fused_attention).to(device)
    loader, masking = create_loader(config, device, 0), FixedMasks(config)
    step = PlainStep(model, config, normalize=loader.normalize, amp_dtype=amp_dtype(device))
    made = [loader.batch(i, masking).with_tensors() for i in range(POOL)]
    ready = [(batch.images.to(device), move(MaskTensors(*batch.masks), device)) for batch in made]

    def run(count: int) -> None:
        for i in range(count):
            images, masks = ready[i % POOL]
            step(images, (masks.context, masks.targets), MOMENTUM)

    run(POOL)
    return batch * steps / timed(lambda: run(steps), device)


def fitting(run: Callable[[int], Any], batch: int) -> tuple[int, Any]:
    """``run`` with the largest of batch, batch/2, ... that fits into memory, and its result."""
    while True:
        try:
            return batch, run(batch)
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
        # Out of the handler, for the error holds what did not fit.
        batch //= 2
        torch.cuda.empty_cache()


def study(name: str, batch: int, steps: int, workers: int, device: torch.device, rate: float) -> dict[str, Any]:
    """One model: compiled and not, and the plain step with either attention."""
    found: dict[str, Any] = {"model": f"ViT-{name}"}
    for compiled in (False, True):
        _, row = fitting(
            lambda b, c=compiled: measure(name, b, steps, compiled=c, workers=workers, device=device), batch
        )
        flops = row["images_per_second"] * row["model_gflop_per_image"] * 1e9
        row |= {"mfu_of_nominal": flops / NOMINAL, "mfu_of_matmul_rate": flops / rate}
        found["compiled" if compiled else "eager"] = row
        memory = row["peak_memory_gib"]
        print(
            f"ViT-{name} {'compiled' if compiled else 'eager'}, batch {row['batch']}: "
            f"{row['images_per_second']:.0f} images/s, MFU {row['mfu_of_nominal']:.1%} of {NOMINAL / 1e12:.0f} TFLOP/s "
            f"and {row['mfu_of_matmul_rate']:.1%} of the measured rate, "
            f"peak memory {'-' if memory is None else format(memory, '.1f')} GiB, "
            f"data wait {row['data_wait_share']:.1%}, checkpoint stall {row['checkpoint_stall_seconds']:.2f} s, "
            f"warm-up {row['warm_up_seconds']:.0f} s",
            flush=True,
        )
    for fused in (False, True):
        size, images = fitting(
            lambda b, f=fused: measure_plain(name, b, steps, fused_attention=f, device=device), batch
        )
        attention = "fused" if fused else "plain"
        ratios = {way: found[way]["images_per_second"] / images for way in ("eager", "compiled")}
        found[f"plain step, {attention} attention"] = {"batch": size, "images_per_second": images, "ratios": ratios}
        print(
            f"ViT-{name} plain I-JEPA step, {attention} attention, batch {size}: {images:.0f} images/s; "
            f"hjepa is {ratios['eager']:.2f} times as fast uncompiled, {ratios['compiled']:.2f} times compiled",
            flush=True,
        )
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure training on one CUDA device.")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[name for name in MODELS if name != "smoke"])
    parser.add_argument("--batch", type=int, default=256, help="images per step; halved until it fits")
    parser.add_argument("--steps", type=int, default=30, help="that are timed")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--smoke", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("benchmarks.gpu needs a CUDA device, and none is visible here", file=sys.stderr)
        raise SystemExit(2)
    if options.smoke:
        options.models, options.batch, options.steps, options.workers = ["smoke"], 2, 2, 0
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    rate = matmul_rate(device, 128 if options.smoke else 8192)
    print(f"{name}: matrix products in bf16 {rate / 1e12:.4g} TFLOP/s", flush=True)
    # Trying the code out without a GPU is not worth a compilation.
    with torch.compiler.set_stance("force_eager" if options.smoke else "default"):
        found = [study(m, options.batch, options.steps, options.workers, device, rate) for m in options.models]
    result = {
        "machine": machine() | {"device": name, "cuda": torch.version.cuda},
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "matmul_tflops_per_second": rate / 1e12,
        "nominal_tflops_per_second": NOMINAL / 1e12,
        "models": found,
    }
    output = options.output or RESULTS / f"gpu-{re.sub('[^a-z0-9]+', '-', name.lower())}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(rounded(result), indent=2) + "\n")


if __name__ == "__main__":
    main()
