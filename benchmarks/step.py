"""What a training step costs: hjepa's against a plain I-JEPA step and a dense one, on the CPU.

    python -m benchmarks.step [--config tiny|small|all] [--masks own|published] [--rounds 8] [--threads 1]

All subjects start from the same weights, see the same images and masks, and take turns in one process; a step is
forward, backward, clip, optimiser and EMA, timed in CPU seconds (``time.process_time``), so that other processes do not
count. Ratios are those of the rounds' pairs. How much a step saves depends on how much the masks hide: beside hjepa's
own masks, ``published`` ones are drawn as in I-JEPA's published code, which hides more. Beside it: the machine's fp32
matrix-product rate in the same run and the share of it that hjepa's step attains, the operators of a ViT-B step, and
the time to make masks.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.checkpoint import machine
from benchmarks.plain import DenseModel, PlainModel, PlainStep
from hjepa.config import Config, load_config
from hjepa.distributed import World
from hjepa.losses import HierarchicalLoss
from hjepa.masks import Masks, MultiBlockMasking
from hjepa.models import HJEPAModel, MaskTensors
from hjepa.trainers import create_optimizer
from hjepa.trainers.step import TrainStep

RESULT = Path(__file__).parent / "results" / "step-cpu.json"
POOL = 4  # batches of masks, of different sizes
MOMENTUM = 0.996
# Names as in Touvron et al. 2021: Ti is 192 wide, S 384. The last setting is for tests.
NAMES = {"tiny": "ViT-Ti/4@32", "small": "ViT-S/16@224", "smoke": "smoke"}
SETTINGS = {
    "tiny": """
data: {image_size: 32}
model: {num_levels: 1, patch_size: 4, embed_dim: 192, num_heads: 3, predictor: {embed_dim: 192, num_heads: 3}}
training: {batch_size: 16}
""",
    "small": """
model: {num_levels: 1, embed_dim: 384, num_heads: 6}
training: {batch_size: 8}
""",
    "smoke": """
data: {image_size: 32}
model: {num_levels: 1, patch_size: 4, embed_dim: 48, depth: 2, predictor: {embed_dim: 24, depth: 2}}
training: {batch_size: 4}
""",
}
Run = Callable[[int], object]


def normalize(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


def tensors(masks: Masks, device: torch.device | str = "cpu") -> MaskTensors:
    context, targets, union, place, rows = masks
    context, union, place, *targets = (torch.from_numpy(a).to(device) for a in (context, union, place, *targets))
    return MaskTensors(context, targets, union, place, rows)


def published_masks(config: Config, batch: int, step: int) -> Masks:
    """Masks with the habits of I-JEPA's published sampler.

    One number decides both scale and aspect, no block touches the last row or column, and all contexts are cut to the
    smallest of the batch, of each the first patches in raster order.
    """
    random, grid = np.random.default_rng(step), config.grid_size
    masking, patches = config.masking, np.arange(grid**2)

    def inside(side: tuple[int, int], *shape: int) -> NDArray[np.bool_]:
        row, column = (random.integers(0, grid - edge, (*shape, 1)) for edge in side)
        down, right = patches // grid - row, patches % grid - column
        return (down >= 0) & (down < side[0]) & (right >= 0) & (right < side[1])  # type: ignore[no-any-return]

    share = random.random()
    scale, aspect = (low + share * (high - low) for low, high in (masking.target_scale, masking.target_aspect))
    area = int(scale * grid**2)
    height, width = (min(round(math.sqrt(area * ratio)), grid - 1) for ratio in (aspect, 1 / aspect))
    side = min(round(math.sqrt(random.uniform(*masking.context_scale)) * grid), grid - 1)
    target = inside((height, width), batch, masking.num_targets)
    visible = inside((side, side), batch) & ~target.any(1)
    count = int(visible.sum(1).min())
    if count < masking.min_context:
        return published_masks(config, batch, step + POOL)
    context = np.argsort(~visible, axis=1, kind="stable")[:, :count]
    targets = np.nonzero(target)[2].reshape(batch, masking.num_targets, height * width)
    return Masks(context, [targets], *MultiBlockMasking(config).union(targets), height)


def train_step(
    model: HJEPAModel,
    config: Config,
    amp_dtype: torch.dtype | None = None,
    normalize: Callable[[Tensor], Tensor] = normalize,
) -> TrainStep:
    return TrainStep(
        model,
        model,
        create_optimizer(model, config),
        HierarchicalLoss(config),
        normalize=normalize,
        clip_grad=config.training.clip_grad,
        amp_dtype=amp_dtype,
        accumulation_steps=1,
        world=World(),
    )


# -- against the plain steps -----------------------------------------------------------------------------------------


def compare(name: str, rounds: int, steps: int, *, published: bool = False) -> dict[str, Any]:
    """Time all subjects: ``rounds`` turns of ``steps`` steps each."""
    config = load_config(SETTINGS[name])
    batch, size = config.training.batch_size, config.data.image_size
    torch.manual_seed(0)
    model = HJEPAModel(config)
    weights = model.state_dict()
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8)
    masking = MultiBlockMasking(config)
    pool = [
        tensors(
            published_masks(config, batch, step)
            if published
            else masking(step=step, epochs=0, samples=np.arange(batch) + step * batch)
        )
        for step in range(POOL)
    ]

    def written(kind: type[PlainModel], *, fused_attention: bool) -> PlainStep:
        plain = kind(config, fused_attention=fused_attention)
        plain.load_state_dict(weights)
        return PlainStep(plain, config, normalize=normalize)

    plain, fused = written(PlainModel, fused_attention=False), written(PlainModel, fused_attention=True)
    dense, ours = written(DenseModel, fused_attention=False), train_step(model, config)
    loss_error, gradient_error = differences(model, plain.model, config, normalize(images), pool[0])
    subjects: dict[str, Run] = {
        "hjepa": lambda i: ours(images, pool[i % POOL], MOMENTUM, number=i),
        "plain": lambda i: plain(images, (pool[i % POOL].context, pool[i % POOL].targets), MOMENTUM),
        "plain, fused attention": lambda i: fused(images, (pool[i % POOL].context, pool[i % POOL].targets), MOMENTUM),
        "dense": lambda i: dense(images, (pool[i % POOL].context, *pool[i % POOL][2:4]), MOMENTUM),
    }
    flops = {subject: flops_per_step(run) for subject, run in subjects.items()}  # also the warm-up
    seconds: dict[str, list[float]] = {subject: [] for subject in subjects}
    rates = [matmul_rate()]
    for turn in range(rounds):
        # Whoever comes first in one round comes last in the next.
        for subject in list(subjects)[:: 1 if turn % 2 == 0 else -1]:
            start = time.process_time()
            for i in range(steps):
                subjects[subject](turn * steps + i)
            seconds[subject].append((time.process_time() - start) / steps)
        rates.append(matmul_rate())
    rate = max(rates)
    return {
        "model": NAMES[name],
        "batch": batch,
        "masks": "published" if published else "own",
        "visible_patches": statistics.mean(masks.context.shape[1] for masks in pool),
        "rounds": rounds,
        "steps_per_round": steps,
        "loss_relative_difference_to_plain": loss_error,
        "largest_gradient_relative_difference_to_plain": gradient_error,
        "matmul_gflops_per_second": rate / 1e9,
        "subjects": {
            subject: {
                "cpu_seconds_per_step": {"min": min(times), "median": statistics.median(times)},
                "gflop_per_image": flops[subject] / batch / 1e9,
                "share_of_matmul_rate": flops[subject] / min(times) / rate,
                "time_over_hjepa": {
                    "of_minima": min(times) / min(seconds["hjepa"]),
                    "median_of_pairs": statistics.median(a / b for a, b in zip(times, seconds["hjepa"], strict=True)),
                },
            }
            for subject, times in seconds.items()
        },
    }


def differences(
    model: HJEPAModel, plain: PlainModel, config: Config, images: Tensor, masks: MaskTensors
) -> tuple[float, float]:
    """Relative differences of the loss, and of the worst parameter's gradient in norm, on the same weights."""
    out = model(images, masks)
    loss, _ = HierarchicalLoss(config)(out.predictions, out.targets, out.embeddings)
    expected = plain(images, masks.context, masks.targets)
    found, written = gradients(loss, model), gradients(expected, plain)
    worst = max(((found[name] - written[name]).norm() / written[name].norm()).item() for name in written)
    return abs(loss.item() / expected.item() - 1), worst


def gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def flops_per_step(run: Run) -> float:
    """Mean over the pool of masks."""
    with FlopCounterMode(display=False) as counter:
        for i in range(POOL):
            run(i)
    return counter.get_total_flops() / POOL


def matmul_rate(size: int = 1024, tries: int = 7) -> float:
    """FLOP per CPU second of the best of some square fp32 products."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    seconds = []
    for _ in range(tries):
        start = time.process_time()
        a @ b
        seconds.append(time.process_time() - start)
    return 2 * size**3 / min(seconds)


# -- operators and masks ---------------------------------------------------------------------------------------------

VIEWS = {
    *("view", "_unsafe_view", "_reshape_alias", "as_strided", "alias", "detach", "lift_fresh", "set_"),
    *("t", "transpose", "permute", "expand", "unsqueeze", "squeeze", "unflatten", "slice", "select", "unbind"),
    *("split", "split_with_sizes", "size", "stride"),
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "zeros_like"),
}
SYNCS = ("_local_scalar_dense", "nonzero")


class Operators(TorchDispatchMode):
    """Counts the aten operators that run inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def count_operators(levels: int, *overrides: str) -> dict[str, int]:
    """Operators of one bf16 step of a ViT-B/16 that are not views, and those that a GPU would have to wait for."""
    config = load_config("default", [f"model.num_levels={levels}", "training.batch_size=2", *overrides])
    step = train_step(HJEPAModel(config), config, torch.bfloat16)
    images = torch.zeros((2, 3, config.data.image_size, config.data.image_size), dtype=torch.uint8)
    masks = tensors(MultiBlockMasking(config)(step=0, epochs=0, samples=np.arange(2)))
    step(images, masks, MOMENTUM)  # makes the optimiser's state
    with Operators() as mode:
        step(images, masks, MOMENTUM)
    operators = sum(number for name, number in mode.count.items() if name not in VIEWS)
    return {"operators": operators, "syncs": sum(mode.count[name] for name in SYNCS)}


def mask_microseconds(levels: int, batch: int = 128, steps: int = 100) -> float:
    """CPU microseconds per image to make all masks of a batch at 14x14 patches; best of 5."""
    masking = MultiBlockMasking(load_config("default", [f"model.num_levels={levels}"]))
    found = []
    for turn in range(6):  # the first fills the cache of block sizes
        start = time.process_time()
        for step in range(steps):
            masking(step=step, epochs=turn, samples=np.arange(batch) + step * batch)
        found.append((time.process_time() - start) / steps / batch * 1e6)
    return min(found[1:])


# -- report ----------------------------------------------------------------------------------------------------------


def table(found: dict[str, Any]) -> str:
    lines = [
        f"{found['model']}, batch {found['batch']}, {found['masks']} masks ({found['visible_patches']:.0f} visible "
        f"patches), fp32, {found['rounds']} rounds of {found['steps_per_round']} steps; matrix products: "
        f"{found['matmul_gflops_per_second']:.0f} GFLOP/s; against plain: loss differs by "
        f"{found['loss_relative_difference_to_plain']:.1e}, the worst gradient by "
        f"{found['largest_gradient_relative_difference_to_plain']:.1e}",
        f"{'':24}{'CPU s/step: min':>16}{'median':>9}{'GFLOP/image':>13}{'of matmul':>11}"
        f"{'time/hjepa: min':>17}{'pairs':>7}",
    ]
    for subject, row in found["subjects"].items():
        seconds, ratio = row["cpu_seconds_per_step"], row["time_over_hjepa"]
        lines.append(
            f"{subject:24}{seconds['min']:16.3f}{seconds['median']:9.3f}{row['gflop_per_image']:13.2f}"
            f"{row['share_of_matmul_rate']:11.0%}{ratio['of_minima']:17.2f}{ratio['median_of_pairs']:7.2f}"
        )
    return "\n".join(lines)


def rounded(value: Any) -> Any:
    """Four digits are all that a timing holds."""
    return json.loads(json.dumps(value), parse_float=lambda text: float(f"{float(text):.4g}"))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Compare hjepa's training step with a plain and a dense one.")
    parser.add_argument("--config", choices=[*SETTINGS, "all"], default="all")
    parser.add_argument("--masks", choices=["own", "published", "both"], default="both")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4, help="per subject and round")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    smoke = options.config == "smoke"
    result: dict[str, Any] = {
        "machine": machine(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "steps": [],
    }
    for name in ["tiny", "small"] if options.config == "all" else [options.config]:
        for published in {"own": [False], "published": [True], "both": [False, True]}[options.masks]:
            result["steps"].append(compare(name, options.rounds, options.steps, published=published))
            print(table(result["steps"][-1]), flush=True)
    narrow = ["model.embed_dim=48", "model.predictor.embed_dim=48", "model.depth=2"] if smoke else []
    result["vit_b_operators"] = {str(levels): count_operators(levels, *narrow) for levels in (1, 2)}
    result["mask_microseconds_per_image"] = {
        str(levels): mask_microseconds(levels, steps=2 if smoke else 100) for levels in (1, 2)
    }
    for levels, count in result["vit_b_operators"].items():
        masks = result["mask_microseconds_per_image"][levels]
        print(
            f"{levels} level(s): a ViT-B/16 step in bf16 has {count['operators']} operators that are not views and "
            f"{count['syncs']} host synchronisations; masks cost {masks:.1f} us per image"
        )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(rounded(result), indent=2) + "\n")


if __name__ == "__main__":
    main()
