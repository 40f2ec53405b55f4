"""What evaluation costs: k-NN against a million features, its memory, and embedding against the bare forward pass.

    python -m benchmarks.evaluation [--train 1000000] [--queries 10000] [--config demo] [--rounds 6]

The memory of k-NN is the process's largest resident size during the search, less its size before, when the features
were there already. Extraction reads uint8 images from memory, prepares and embeds them and collects the features; the
forward pass is ``embed`` of the same batches, prepared before. Both take turns in one process, each first in every
other round; the ratio is that of processor seconds, which other load on the machine disturbs little.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.checkpoint import machine
from hjepa.config import EvaluationConfig, load_config
from hjepa.evaluation import extract, knn
from hjepa.export import untrained_encoder

RESULT = Path(__file__).parent / "results" / "evaluation.json"
DIM, CLASSES = 128, 1000
GOAL = 0.9  # of the forward rate


def search(train: int, queries: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    train_x, test_x = torch.randn(train, DIM, generator=generator), torch.randn(queries, DIM, generator=generator)
    train_y, test_y = (torch.randint(CLASSES, (count,), generator=generator) for count in (train, queries))
    before = psutil.Process().memory_info().rss
    start = time.perf_counter()
    knn.judge(train_x, train_y, test_x, test_y, EvaluationConfig(), CLASSES)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "train": train,
        "queries": queries,
        "dim": DIM,
        "seconds": seconds,
        "features_mb": (train_x.nbytes + test_x.nbytes) / 1e6,
        "search_mb": (peak - before) / 1e6,
        "peak_rss_mb": peak / 1e6,
    }


def extraction(name: str, rounds: int, batches: int = 8) -> dict[str, Any]:
    config = load_config(name)
    channels, size = config.data.channels, config.data.image_size
    encoder = untrained_encoder(config, mean=[0.5] * channels, std=[0.25] * channels)
    generator = torch.Generator().manual_seed(0)
    shape = (config.evaluation.batch_size, channels, size, size)
    images = [torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator) for _ in range(batches)]
    prepared = [encoder.preprocess(batch) for batch in images]

    def forward() -> None:
        with torch.inference_mode():
            for batch in prepared:
                encoder.embed(batch)

    def whole() -> None:
        extract(encoder, [(batch, None) for batch in images], "cpu")

    def seconds(work: Callable[[], None]) -> tuple[float, float]:
        cpu, wall = time.process_time(), time.perf_counter()
        work()
        return time.process_time() - cpu, time.perf_counter() - wall

    for work in (forward, whole):  # first allocations
        work()
    ratios, rates = [], []
    for number in range(rounds):
        order = (forward, whole) if number % 2 else (whole, forward)
        spent = {work: seconds(work) for work in order}
        ratios.append(spent[forward][0] / spent[whole][0])
        rates.append(len(images) * len(images[0]) / spent[whole][1])
    return {
        "config": name,
        "images_per_second": statistics.median(rates),
        "of_forward_rate": {"min": min(ratios), "median": statistics.median(ratios), "max": max(ratios)},
        "goal": GOAL,
        "rounds": rounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what evaluation costs.")
    parser.add_argument("--train", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--config", default="demo")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    # The search first: the peak that it is asked about is that of the whole process so far.
    found = search(arguments.train, arguments.queries)
    embedded = extraction(arguments.config, arguments.rounds)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    result = json.dumps({"knn": found, "extraction": embedded, "machine": machine()})
    rounded = json.loads(result, parse_float=lambda text: float(f"{float(text):.4g}"))
    arguments.output.write_text(json.dumps(rounded, indent=2) + "\n")
    print(
        f"k-NN of {found['queries']} queries against {found['train']} features of {DIM} dimensions: "
        f"{found['seconds']:.1f} s, peak RSS {found['peak_rss_mb']:.0f} MB, of which the features take "
        f"{found['features_mb']:.0f} MB and the search {found['search_mb']:.0f} MB\n"
        f"extraction with {arguments.config}: {embedded['images_per_second']:.0f} images/s, "
        f"{embedded['of_forward_rate']['median']:.1%} of the forward rate, goal {GOAL:.0%}"
    )


if __name__ == "__main__":
    main()
