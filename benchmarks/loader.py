"""How well the loader feeds a consumer from S3: its rate against local files, the first batch, the reader's own cost.

    python -m benchmarks.loader [--rounds 5] [--steps 40] [--rate 150] [--smoke]

The server is the one that AWS_ENDPOINT_URL names, or an embedded one that is started for the purpose. The consumer
stands for a GPU: it takes a batch of 64, sleeps for as long as ``--rate`` images/s allow, and takes the next.

The set is 10 GB (``--gigabytes``) to the loader: its manifest and its index, both real, list that many bytes in shards
with keys and digests of their own. Behind them are two real shards of synthetic photographs in S3, and every request
for a block of a listed shard is a real range request for those bytes of one of the two. So what is measured is real
traffic, but the server has the shards in its page cache.

``fed``: images/s from the first batch to the last, and of the same consumer with the same images as local files, which
is the rate without I/O. Both take turns within a round. Three ways: ``windows``, where the cache holds a fifth of the
set and is empty when a round starts, timed once the first blocks have been read ahead; ``random``, where it would hold
all of the set and is as empty, the worst case, which lasts until the set has been fetched once; and ``cached``, where
it holds all of a set, as in later epochs. ``first_batch_seconds`` is the time from opening the set, the index included,
to its first batch of 256. ``reader``: CPU microseconds to read one encoded sample, at random, that is in the cache, and
of a plain read of the local shard.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.checkpoint import machine
from hjepa.adapters.s3 import S3Store
from hjepa.adapters.stack import BUCKET, Stack
from hjepa.config import DataConfig
from hjepa.data.cache import BlockCache, Remote
from hjepa.data.datasets import open_source
from hjepa.data.loader import ShardDataset, TrainLoader
from hjepa.data.prepare import prepare
from hjepa.data.shards import encode_index, read_index

RESULT = Path(__file__).parent / "results" / "loader.json"
GOAL = 0.95  # of the rate without I/O
FIRST_BATCH_GOAL = 3.0  # seconds
READER_GOAL = 30.0  # microseconds
PREFIX = f"s3://{BUCKET}/benchmarks/loader"
ORDERS = {"windows": 0.2, "random": 1.2}  # size of the cache, in sets
WAYS = (*ORDERS, "cached")


@dataclass(frozen=True)
class Size:
    images: int  # different ones
    width: int
    height: int
    set_bytes: int
    batch: int
    first_batch: int
    block_bytes: int


@contextmanager
def server() -> Iterator[None]:
    """An S3 server that the environment names."""
    if os.environ.get("AWS_ENDPOINT_URL"):
        yield
        return
    with tempfile.TemporaryDirectory(prefix="hjepa-bench-") as folder:
        stack = Stack(Path(folder))
        try:
            stack.up()
            os.environ.update(stack.environment())
            yield
        finally:
            stack.down()


def photographs(root: Path, size: Size) -> None:
    """JPEGs with about the bytes of photographs: smooth shapes, and grain. Of unequal width: none are held decoded."""
    rng = np.random.default_rng(0)
    root.mkdir()
    for i in range(size.images):
        small = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        smooth = np.asarray(small.resize((size.width + i % 9, size.height), Image.Resampling.BICUBIC), dtype=np.int16)
        grain = rng.normal(0, 9, smooth.shape).astype(np.int16)
        Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(root / f"{i:05d}.jpg", quality=90)


class Listed:
    """A set of ``size.set_bytes`` in S3 that lists two real shards again and again."""

    def __init__(self, folder: Path, size: Size):
        photographs(folder / "images", size)
        source = open_source(DataConfig(root=str(folder / "images"), test_fraction=0.01))
        total = sum(path.stat().st_size for path in (folder / "images").iterdir())
        made = prepare(source, DataConfig(shard_mb=max(1, round(total / 2e6) + 1)), folder / "made")
        section = made.manifest["splits"]["train"]
        self.local = ShardDataset(made.manifest, "train", (folder / "made").joinpath)
        self.store = S3Store(PREFIX, read_timeout_seconds=20.0)
        for file in made.files:
            self.store.put_file(file.key, file.path, sha256=file.sha256)
        records = read_index(folder / "made" / section["index"]["key"])
        copies = max(2, -(-size.set_bytes // sum(shard["bytes"] for shard in section["shards"])))
        index = np.tile(records, copies)
        index["shard"] += np.repeat(np.arange(copies, dtype=np.uint32) * len(section["shards"]), len(records))
        content = encode_index(index)
        self.store.put_bytes("large.index", content)
        self.real = {
            f"{copy:05d}-{shard['key']}": shard["key"] for copy in range(copies) for shard in section["shards"]
        }
        shards = [
            shard | {"key": f"{copy:05d}-{shard['key']}", "sha256": hashlib.sha256(b"%d %d" % (copy, i)).hexdigest()}
            for copy in range(copies)
            for i, shard in enumerate(section["shards"])
        ]
        self.bytes = sum(shard["bytes"] for shard in shards)
        self.samples = len(index)
        large = section | {
            "samples": len(index),
            "shards": shards,
            "index": {"key": "large.index", "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()},
        }
        self.manifest = made.manifest | {"splits": {"train": large}}
        self.block_bytes = size.block_bytes
        self.fetched = 0  # bytes, by this process

    def open(self, cache: Path, cache_bytes: int) -> ShardDataset:
        """As a run's training step opens it: the index comes from S3, shards when they are needed."""

        def index(key: str) -> Path:
            self.store.download(key, cache / key)
            return cache / key

        def get(key: str, first: int, length: int) -> bytes:
            self.fetched += length
            return self.store.get_bytes(self.real[key], start=first, length=length)

        remote = Remote(get, self.store.uri, BlockCache(cache, limit_bytes=cache_bytes), self.block_bytes)
        return ShardDataset(self.manifest, "train", index, remote=remote)

    def open_cached(self, cache: Path) -> ShardDataset:
        """The two real shards alone, all in the cache."""

        def get(key: str, first: int, length: int) -> bytes:
            self.fetched += length
            return self.store.get_bytes(key, start=first, length=length)

        remote = Remote(get, self.store.uri, BlockCache(cache, limit_bytes=10**12), self.block_bytes)
        dataset = ShardDataset(self.local.manifest, "train", self.local.fetch, remote=remote)
        assert dataset.stream is not None
        dataset.stream.fetch(range(len(dataset)))
        return dataset


def train_loader(dataset: ShardDataset, batch_size: int, workers: int) -> TrainLoader:
    return TrainLoader(
        dataset,
        batch_size=batch_size,
        seed=0,
        image_size=224,
        channels=3,
        crop_scale=(0.3, 1.0),
        horizontal_flip=True,
        num_workers=workers,
    )


def consume(loader: TrainLoader, steps: int, rate: float, settled: Callable[[], None] = lambda: None) -> float:
    """Images/s of a consumer that could take ``rate``, from the first batch to the last.

    Args:
        settled: Returns when the time may start.
    """
    pause = loader.batch_size / rate
    batches = loader.batches(0, steps + 1)
    next(batches)
    settled()
    start = time.perf_counter()
    due = start
    for _ in range(steps):
        due = max(due, time.perf_counter()) + pause
        next(batches)
        time.sleep(max(0.0, due - time.perf_counter()))
    return steps * loader.batch_size / (time.perf_counter() - start)


def wait_for_quiet(folder: Path) -> None:
    """Until nothing has been added to a cache for two seconds."""
    before, now = -1, 0
    while now != before:
        time.sleep(2)
        before, now = now, len(os.listdir(folder))


def fed(listed: Listed, way: str, size: Size, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    pairs, fetched, name = [], [], ""
    for round_ in range(arguments.rounds):

        def with_io(round_: int = round_) -> float:
            nonlocal name
            with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as cache:
                if way == "cached":
                    dataset = listed.open_cached(Path(cache))
                else:
                    dataset = listed.open(Path(cache), int(ORDERS[way] * listed.bytes))
                loader = train_loader(dataset, size.batch, arguments.workers)
                name, before = loader.order, listed.fetched
                settled = partial(wait_for_quiet, Path(cache)) if way == "windows" else lambda: None
                rate = consume(loader, arguments.steps, arguments.rate, settled)
                fetched.append(listed.fetched - before)
            return rate

        def without_io() -> float:
            return consume(train_loader(listed.local, size.batch, arguments.workers), arguments.steps, arguments.rate)

        # Whoever comes first in one round comes last in the next.
        if round_ % 2:
            plain = without_io()
            pairs.append((with_io(), plain))
        else:
            pairs.append((with_io(), without_io()))
        print(f"{way}: {pairs[-1][0]:.0f} images/s from S3, {pairs[-1][1]:.0f} from local files", flush=True)
    ratios = [ours / plain for ours, plain in pairs]
    return {
        "order": name,
        "images_per_second": statistics.median(ours for ours, _ in pairs),
        "without_io": statistics.median(plain for _, plain in pairs),
        "ratio": {"min": min(ratios), "median": statistics.median(ratios), "max": max(ratios)},
        # Of an empty cache: what it costs until the set is here, once, however long the epoch.
        "lost_seconds": arguments.steps * size.batch * statistics.median(1 / ours - 1 / plain for ours, plain in pairs),
        # Workers count for themselves.
        "fetched_mb": statistics.median(fetched) / 1e6 if arguments.workers == 0 else None,
    }


def first_batch(listed: Listed, order: str, size: Size, workers: int, folder: Path) -> float:
    with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as cache:
        start = time.perf_counter()
        dataset = listed.open(Path(cache), int(ORDERS[order] * listed.bytes))
        batches = train_loader(dataset, size.first_batch, workers).batches(0, 1000)
        next(batches)
        seconds = time.perf_counter() - start
        batches.close()  # type: ignore[attr-defined]
        time.sleep(0.5)  # requests on their way end before the folder goes
    return seconds


def reader(listed: Listed, rounds: int, folder: Path) -> dict[str, float]:
    """Both ways take turns."""
    cached = listed.open_cached(folder / "reader")
    samples = np.random.default_rng(0).permutation(len(cached)).tolist()
    times: dict[str, list[float]] = {"cached": [], "plain": []}
    for _ in range(rounds):
        for name, dataset in (("cached", cached), ("plain", listed.local)):
            start = time.process_time()
            for i in samples:
                dataset.read_bytes(i)
            times[name].append((time.process_time() - start) / len(samples) * 1e6)
    return {f"{name}_us": statistics.median(found) for name, found in times.items()}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    size = Size(600, 500, 375, int(arguments.gigabytes * 1e9), 64, 256, DataConfig().block_mb * 1_000_000)
    if arguments.smoke:
        size = Size(60, 64, 48, 400_000, 4, 8, 20_000)
    with server(), tempfile.TemporaryDirectory(prefix="hjepa-bench-", dir=arguments.folder) as name:
        folder = Path(name)
        listed = Listed(folder, size)
        result: dict[str, Any] = {
            "set": {
                "gigabytes": listed.bytes / 1e9,
                "images": listed.samples,
                "distinct_images": len(listed.local),
                "bytes_per_image": listed.bytes / listed.samples,
            },
            "block_mb": size.block_bytes / 1e6,
            "consumer": {"images_per_second": arguments.rate, "batch": size.batch, "workers": arguments.workers},
            "fed": {way: fed(listed, way, size, arguments, folder) for way in WAYS},
        }
        seconds: dict[str, Any] = {"batch": size.first_batch}
        for order in ORDERS:
            for workers in (0, 2):
                times = [first_batch(listed, order, size, workers, folder) for _ in range(arguments.rounds)]
                seconds[f"{order}, {workers} workers"] = {"median": statistics.median(times), "max": max(times)}
        result["first_batch_seconds"] = seconds
        result["reader"] = reader(listed, arguments.rounds, folder)
    goals = {"ratio": GOAL, "first_batch_seconds": FIRST_BATCH_GOAL, "reader_us": READER_GOAL}
    return result | {"goals": goals, "rounds": arguments.rounds, "steps": arguments.steps, "machine": machine()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure the loader on shards in S3.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40, help="batches of 64 per round")
    parser.add_argument("--rate", type=float, default=150.0, help="images/s that the consumer can take")
    parser.add_argument("--workers", type=int, default=1, help="loader processes")
    parser.add_argument("--gigabytes", type=float, default=10.0, help="size of the set")
    parser.add_argument("--folder", type=Path, help="on the disk of the cache; default: the system's temporary one")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--smoke", action="store_true", help="everything once, on a tiny set")
    arguments = parser.parse_args(argv)
    if arguments.smoke:
        arguments.rounds, arguments.steps, arguments.rate = 1, 3, 400.0
    result = measure(arguments)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    rounded = json.loads(json.dumps(result), parse_float=lambda text: float(f"{float(text):.4g}"))
    arguments.output.write_text(json.dumps(rounded, indent=2) + "\n")
    for way, found in result["fed"].items():
        print(
            f"{way}: {found['ratio']['median']:.3f} of the rate without I/O (median), goal >= {GOAL}; "
            f"{found['lost_seconds']:.1f} s lost"
        )
    for way, found in result["first_batch_seconds"].items():
        if way != "batch":
            print(f"first batch, {way}: {found['median']:.2f} s, goal < {FIRST_BATCH_GOAL:g}")
    cost = result["reader"]
    print(f"reader: {cost['cached_us']:.1f} us per sample, plain {cost['plain_us']:.1f}, goal <= {READER_GOAL:g}")


if __name__ == "__main__":
    main()
