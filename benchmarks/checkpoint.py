"""How long a save stops the training loop: our checkpoint against torch.save of the same training state.

    python -m benchmarks.checkpoint [--size base|tiny] [--rounds 5] [--folder FOLDER]

The state is the default configuration's: a ViT-B/16 with its EMA copy, the predictor, and AdamW's moments (1.64 GB, and
as much again for our snapshot). Both ways take turns in one process, after one save of each that is not counted among
the rounds. Our snapshot's memory is reserved before, as the trainer does when it starts. ``blocked`` is the time until
the training loop may go on, ``durable`` the time until the file has been fsynced. ``disk`` writes as many bytes past
the page cache and fsyncs, as ``dd oflag=direct`` would.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from hjepa.config import load_config
from hjepa.models import HJEPAModel
from hjepa.trainers.optim import create_optimizer
from hjepa.utils.checkpoint import CheckpointManager, read_checkpoint

RESULT = Path(__file__).parent / "results" / "checkpoint.json"
GOAL = 0.15  # of torch.save's time, at most
SIZES = {
    "base": [],
    "tiny": ["model.embed_dim=192", "model.num_heads=3", "model.predictor.embed_dim=96", "model.predictor.num_heads=3"],
}
Times = dict[str, float]


def training_state(size: str) -> tuple[HJEPAModel, torch.optim.Optimizer]:
    """As after one step, with random moments: their values do not matter, their pages have to exist."""
    config = load_config("default", SIZES[size])
    model = HJEPAModel(config)
    optimizer = create_optimizer(model, config)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            moments = {name: torch.rand_like(parameter.detach()) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": torch.tensor(1.0), **moments}
    return model, optimizer


def tensor_bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.nbytes
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return sum(map(tensor_bytes, items))


def timed(save: Callable[[], None], finish: Callable[[], None]) -> Times:
    start = time.perf_counter()
    save()
    blocked = time.perf_counter() - start
    finish()
    return {"blocked": blocked, "durable": time.perf_counter() - start}


def fsync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.system(),
    }


def measure(size: str, rounds: int, parent: Path | None) -> dict[str, Any]:
    model, optimizer = training_state(size)
    total = tensor_bytes(model.state_dict()) + tensor_bytes(optimizer.state_dict())
    with tempfile.TemporaryDirectory(prefix="hjepa-bench-", dir=parent) as name:
        folder = Path(name)
        manager = CheckpointManager(folder / "ours")
        theirs, plain = folder / "torch.pth", folder / "plain"
        block = mmap.mmap(-1, 8 << 20)  # at the start of a memory page, as direct writes need
        block.write(os.urandom(8 << 20))

        def torch_save() -> None:
            content = {"epoch": 0, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(content, theirs)

        def our_save() -> None:
            manager.save_checkpoint(0, model, optimizer)

        def plain_write() -> None:
            file = os.open(plain, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_DIRECT)
            for _ in range(total // len(block)):
                os.write(file, block)
            os.close(file)

        ways: dict[str, Callable[[], Times]] = {
            "torch": lambda: timed(torch_save, lambda: fsync(theirs)),
            "ours": lambda: timed(our_save, manager.wait),
            "disk": lambda: timed(plain_write, lambda: fsync(plain)),
        }
        manager.reserve(total)  # as the trainer does when it starts; torch's first save takes longer than this
        first = {way: run() for way, run in ways.items()}
        found: dict[str, list[Times]] = {way: [] for way in ways}
        for round_ in range(rounds):
            # Whoever comes first in one round comes last in the next.
            for way in list(ways)[:: 1 if round_ % 2 == 0 else -1]:
                found[way].append(ways[way]())
            newest = [f"{way} {times[-1]['blocked']:.3f} {times[-1]['durable']:.3f}" for way, times in found.items()]
            print(f"round {round_ + 1}, seconds blocked and until durable: {', '.join(newest)}", flush=True)
        latest = manager.get_latest_checkpoint()
        assert latest is not None
        start = time.perf_counter()
        read_checkpoint(latest)
        read_seconds = time.perf_counter() - start

    blocked, durable = (
        [a[key] / b[key] for a, b in zip(found["ours"], found["torch"], strict=True)] for key in ("blocked", "durable")
    )
    against_disk = [a["durable"] / b["durable"] for a, b in zip(found["ours"], found["disk"], strict=True)]
    return {
        "size": size,
        "state_gb": round(total / 1e9, 3),
        "seconds": {
            way: {
                key: {"min": min(t[key] for t in times), "median": statistics.median(t[key] for t in times)}
                for key in ("blocked", "durable")
            }
            for way, times in found.items()
        },
        "first_save_blocked_seconds": first["ours"]["blocked"],
        "read_and_verify_seconds": read_seconds,
        "blocked_ratio": {"min": min(blocked), "median": statistics.median(blocked), "max": max(blocked)},
        "durable_ratio": {"min": min(durable), "median": statistics.median(durable)},
        "durable_to_disk_ratio": {"min": min(against_disk), "median": statistics.median(against_disk)},
        "goal": GOAL,
        "rounds": rounds,
        "machine": machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare a checkpoint with torch.save.")
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured; default: the system's temporary one")
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    result = measure(arguments.size, arguments.rounds, arguments.folder)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    rounded = json.loads(json.dumps(result), parse_float=lambda text: float(f"{float(text):.4g}"))
    arguments.output.write_text(json.dumps(rounded, indent=2) + "\n")
    ratio = result["blocked_ratio"]
    print(
        f"{result['state_gb']} GB: our save blocks the loop for {ratio['min']:.3f} (min), {ratio['median']:.3f} "
        f"(median) of torch.save's time; goal: at most {GOAL}\n"
        f"durable after {result['durable_ratio']['median']:.2f} of torch.save's time and "
        f"{result['durable_to_disk_ratio']['median']:.2f} of a plain write's (medians); "
        f"read and verified in {result['read_and_verify_seconds']:.2f} s"
    )


if __name__ == "__main__":
    main()
