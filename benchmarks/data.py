"""What images cost on their way from a file to a view, and what preparing them costs, on the CPU.

    python -m benchmarks.data [--rounds 10] [--folder FOLDER] [--smoke]

The images are made here, once, into ``data.cache_dir``: synthetic photographs of about 500 x 375 pixels (noise in
octaves, shapes, grain), as JPEGs of quality 90 with colour at half resolution. The plain path is torchvision's: PIL
reads a file, then RandomResizedCrop(224, scale 0.3 to 1), flip, float32, normalised, in a DataLoader. hjepa's is its
TrainLoader over the same images in shards, of which uint8 views come out. Each has one worker process with one thread.
Subjects take turns, each first in every other round; what counts is processor time of the worker and of whoever takes
the batches, and the ratios are those of a round's pairs.

``prepare`` is timed in processes of its own, whose memory is added up ten times a second with everything that they
share counted for each of them. Its 20,000 images are the 2,000 under ten names each.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as tv
from torchvision.transforms import functional as tvf

from benchmarks.checkpoint import machine
from hjepa.config import DataConfig
from hjepa.data.jpeg import decode_jpeg
from hjepa.data.loader import ShardDataset, TrainLoader
from hjepa.data.transforms import crop_box, decode_image, train_view, view_draws

RESULT = Path(__file__).parent / "results" / "data.json"
SIZE, SCALE = 224, (0.3, 1.0)
SHORT_SIDE = 256
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GOALS = {"same JPEGs": 2.5, f"short side {SHORT_SIDE}": 5.0, "psnr_db": 55.0, "reader_us": 30.0, "peak_rss_mb": 1000.0}
SHAPES = ((500, 375), (500, 375), (375, 500), (500, 333), (500, 400))  # width and height of photographs
VERSION = 1  # of the photographs; another one makes them anew


class Plan(NamedTuple):
    images: int = 2000
    many: int = 20_000
    batch: int = 64
    batches: int = 4  # per round and subject
    rounds: int = 10


SMOKE = Plan(images=40, many=80, batch=4, batches=1, rounds=2)


# -- the images ------------------------------------------------------------------------------------------------------


def photograph(number: int) -> Image.Image:
    """A picture whose JPEG is about as large as a photograph's: the same one for the same number, on any machine."""
    random = np.random.default_rng((VERSION, number))
    width, height = SHAPES[number % len(SHAPES)]
    pixels = np.full((height, width, 3), 128, dtype=np.float32)
    contrast = 34.0
    for cells in (2**octave for octave in range(1, 9)):
        shape = (max(2, cells * height // 500), max(2, cells * width // 500))
        noise = random.normal(size=(*shape, 1)) * 0.75 + random.normal(size=(*shape, 3)) * 0.45
        for channel in range(3):
            plane = Image.fromarray(noise[..., channel].astype(np.float32))
            pixels[..., channel] += contrast * np.asarray(plane.resize((width, height), Image.Resampling.BICUBIC))
        contrast *= 0.82
    pixels += random.normal(size=(height, width, 1)) * 11.5 * random.uniform(0.6, 1.4)
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(8):
        x, y, across, down = (
            int(random.integers(low, high)) for low, high in ((0, width), (0, height), (4, 50), (4, 50))
        )
        shape_of = draw.ellipse if random.random() < 0.5 else draw.rectangle
        shape_of((x - across, y - down, x + across, y + down), fill=tuple(random.integers(0, 256, 3).tolist()))
    return image


def _write(path: Path) -> None:
    buffer = io.BytesIO()
    photograph(int(path.stem)).save(buffer, "JPEG", quality=90)
    partial = path.with_suffix(".part")
    partial.write_bytes(buffer.getvalue())
    partial.rename(path)


def photographs(folder: Path, count: int) -> list[Path]:
    """JPEGs in ``folder``; those that are there already are not made again."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:05d}.jpg" for number in range(count)]
    missing = [path for path in paths if not path.exists()]
    with ProcessPoolExecutor() as pool:
        for _ in pool.map(_write, missing, chunksize=8):
            pass
    return paths


def under_more_names(paths: list[Path], folder: Path, count: int) -> Path:
    """Hard links, so that many files cost no space."""
    folder.mkdir()
    for number in range(count):
        (folder / f"{number:06d}.jpg").hardlink_to(paths[number % len(paths)])
    return folder


def with_damage(paths: list[Path], folder: Path) -> Path:
    """The same images, of which 3 in 100 are cut off, empty or no image."""
    under_more_names(paths, folder, len(paths))
    for number in range(len(paths) * 3 // 100 or 1):
        path = folder / f"{number * 100 // 3:06d}.jpg"
        content = path.read_bytes()
        path.unlink()  # the link, not the image
        path.write_bytes((content[: len(content) // 2], b"", b"no image")[number % 3])
    return folder


# -- views -----------------------------------------------------------------------------------------------------------


class PlainImages(Dataset[Tensor]):
    def __init__(self, paths: list[Path]):
        self.paths = paths
        self.transform = tv.Compose(
            [
                tv.RandomResizedCrop(SIZE, scale=SCALE),
                tv.RandomHorizontalFlip(),
                tv.ToTensor(),
                tv.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return 1 << 40  # as long as anybody asks

    def __getitem__(self, i: int) -> Tensor:
        view: Tensor = self.transform(Image.open(self.paths[i % len(self.paths)]).convert("RGB"))
        return view


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)


def plain_batches(paths: list[Path], batch: int) -> Iterator[Tensor]:
    loader = DataLoader(
        PlainImages(paths),
        batch_size=batch,
        sampler=itertools.count(),  # type: ignore[arg-type]
        num_workers=1,
        worker_init_fn=_one_thread,
        multiprocessing_context="fork",
    )
    yield from loader


def our_batches(dataset: ShardDataset, batch: int) -> Iterator[Any]:
    loader = TrainLoader(
        dataset,
        batch_size=batch,
        seed=0,
        image_size=SIZE,
        channels=3,
        crop_scale=SCALE,
        horizontal_flip=True,
        num_workers=1,
    )
    return loader.batches(0, 1 << 40)


class Subject:
    """Batches from one worker process, and what they cost."""

    def __init__(self, batches: Iterable[Any]):
        others = {child.pid for child in psutil.Process().children()}
        self.batches = iter(batches)
        next(self.batches)
        (self.worker,) = {child.pid for child in psutil.Process().children()} - others

    def seconds(self, count: int) -> float:
        """Processor time of ``count`` batches, here and in the worker, which ends as full of batches as it began."""
        before = self._idle_worker()
        here = time.process_time()
        for _ in range(count):
            next(self.batches)
        here = time.process_time() - here
        return here + self._idle_worker() - before

    def _idle_worker(self) -> float:
        """The worker's processor time once it has made all batches that it makes ahead."""
        spent = -1.0
        while spent != (spent := self._spent()):
            time.sleep(0.05)
        return spent

    def _spent(self) -> float:
        tasks = Path(f"/proc/{self.worker}/task").glob("*/schedstat")
        return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9


def spread(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def compare_views(subjects: dict[str, Subject], plan: Plan) -> dict[str, Any]:
    found: dict[str, list[float]] = {name: [] for name in subjects}
    for number in range(plan.rounds):
        for name in list(subjects)[:: -1 if number % 2 else 1]:
            found[name].append(subjects[name].seconds(plan.batches) / (plan.batches * plan.batch))
    return {
        name: {
            "images_per_second_per_core": 1 / statistics.median(seconds),
            "x_plain": spread([a / b for a, b in zip(found["plain"], seconds, strict=True)]),
        }
        for name, seconds in found.items()
    }


def compare_decoders(paths: list[Path], plan: Plan) -> dict[str, Any]:
    """Microseconds to decode an image in memory, whole: PIL, and what training and prepare decode with."""
    files = [path.read_bytes() for path in paths[: plan.batch * plan.batches]]
    decoders: dict[str, Callable[[bytes], object]] = {
        "PIL": lambda data: np.asarray(Image.open(io.BytesIO(data))),
        "simplejpeg": decode_jpeg,
    }
    found: dict[str, list[float]] = {name: [] for name in decoders}
    for number in range(plan.rounds):
        for name in list(decoders)[:: -1 if number % 2 else 1]:
            start = time.process_time()
            for data in files:
                decoders[name](data)
            found[name].append((time.process_time() - start) / len(files) * 1e6)
    return {
        name: {
            "us": statistics.median(times),
            "x_pil": spread([a / b for a, b in zip(found["PIL"], times, strict=True)]),
        }
        for name, times in found.items()
    }


def likeness(paths: list[Path]) -> dict[str, float]:
    """PSNR in dB between hjepa's views and those of PIL and torchvision, with the same crops and flips.

    Returns:
        ``psnr_db`` over all pixels of all views, ``worst_psnr_db`` of one view, and the largest difference in grey
        levels of a pixel.
    """
    errors, largest = [], 0.0
    for number, path in enumerate(paths):
        draws = view_draws(0, 0, number)[0].tolist()
        ours = train_view(
            decode_image(path.read_bytes(), 3),
            image_size=SIZE,
            crop_scale=SCALE,
            horizontal_flip=True,
            draws=draws,
        )
        image = Image.open(path)
        top, left, height, width = crop_box(image.height, image.width, SCALE, draws)
        plain = tvf.resized_crop(image, top, left, height, width, [SIZE, SIZE])
        plain = tvf.pil_to_tensor(tvf.hflip(plain) if draws[-1] < 0.5 else plain)
        difference = ours.double() - plain.double()
        errors.append(difference.square().mean().item())
        largest = max(largest, difference.abs().max().item())
    psnr = [10 * math.log10(255**2 / max(error, 1e-9)) for error in (statistics.mean(errors), max(errors))]
    return {"psnr_db": psnr[0], "worst_psnr_db": psnr[1], "largest_difference": largest}


def reader_us(dataset: ShardDataset) -> float:
    """Microseconds of processor time to read and verify one encoded image, in random order, from the page cache."""
    order = np.random.default_rng(0).permutation(len(dataset)).tolist()
    spent = []
    for _ in range(4):  # the first round fills the cache
        start = time.process_time()
        for i in order:
            dataset.read_bytes(i)
        spent.append((time.process_time() - start) / len(order) * 1e6)
    return min(spent[1:])


# -- prepare ---------------------------------------------------------------------------------------------------------

PREPARE = """
import json, resource, sys, time
from pathlib import Path
from hjepa.config import DataConfig
from hjepa.data.datasets import open_source
from hjepa.data.prepare import prepare

data, folder = DataConfig(**json.loads(sys.argv[1])), Path(sys.argv[2])
source = open_source(data)

def times():
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return time.perf_counter(), sum(use.ru_utime + use.ru_stime for use in used)

before = times()
manifest = prepare(source, data, folder).manifest
seconds, cpu_seconds = (after - then for after, then in zip(times(), before))
(folder / "dataset.json").write_text(json.dumps(manifest))
print(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds}))
"""


def prepared(root: Path, folder: Path, **settings: Any) -> dict[str, Any]:
    """Prepare a folder of images in a process of its own; how fast that was, and its largest memory."""
    data = {"root": str(root), "quarantine_limit": 0.1, **settings}
    command = [sys.executable, "-c", PREPARE, json.dumps(data), str(folder)]
    peak = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            peak = max(peak, _tree_rss(process.pid))
            time.sleep(0.1)
        assert process.stdout is not None
        output = process.stdout.read()
    if process.returncode:
        raise RuntimeError(f"prepare ended with {process.returncode}")
    measured = json.loads(output)
    manifest = json.loads((folder / "dataset.json").read_text())
    samples = sum(split["samples"] for split in manifest["splits"].values())
    total = samples + manifest["quarantine"]["total"]
    stored = sum(shard["bytes"] for split in manifest["splits"].values() for shard in split["shards"])
    read = sum(path.stat().st_size for path in root.iterdir())
    return {
        "images": total,
        "quarantined": manifest["quarantine"]["total"],
        "images_per_second": total / measured["seconds"],
        "mb_read_per_second": read / 1e6 / measured["seconds"],
        "cores_busy": measured["cpu_seconds"] / measured["seconds"],
        "cpu_us_per_image": measured["cpu_seconds"] / total * 1e6,
        "stored_bytes_per_image": stored / max(1, samples),
        "peak_rss_mb": peak / 1e6,
    }


def _tree_rss(pid: int) -> int:
    """Bytes of memory of a process and those that it started."""
    total = 0
    try:
        parent = psutil.Process(pid)
        for process in (parent, *parent.children(recursive=True)):
            try:
                total += process.memory_info().rss
            except psutil.NoSuchProcess:
                continue
    except psutil.NoSuchProcess:
        pass
    return total


def open_train_split(folder: Path) -> ShardDataset:
    return ShardDataset(json.loads((folder / "dataset.json").read_text()), "train", folder.joinpath)


# -- all of it -------------------------------------------------------------------------------------------------------


def measure(plan: Plan, cache: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    paths = photographs(cache / f"photographs-{VERSION}", plan.images)
    with tempfile.TemporaryDirectory(prefix="bench-", dir=cache) as name:
        work = Path(name)
        few = under_more_names(paths, work / "few", plan.images)
        rates = {
            "once": prepared(few, work / "same"),
            f"short side {SHORT_SIDE}": prepared(few, work / "small", short_side=SHORT_SIDE),
            "with 3 % damaged": prepared(with_damage(paths, work / "damaged"), work / "most"),
            "ten times": prepared(under_more_names(paths, work / "many", plan.many), work / "all"),
        }
        same, small = open_train_split(work / "same"), open_train_split(work / "small")
        subjects = {
            "plain": Subject(plain_batches(paths, plan.batch)),
            "same JPEGs": Subject(our_batches(same, plan.batch)),
            f"short side {SHORT_SIDE}": Subject(our_batches(small, plan.batch)),
        }
        views = compare_views(subjects, plan)
        result = {
            "jpeg_bytes": statistics.mean(path.stat().st_size for path in paths),
            "views": views,
            "decoders": compare_decoders(paths, plan),
            "likeness": likeness(paths[:256]),
            "reader_us": reader_us(same),
            "prepare": rates,
            "goals": GOALS,
            "plan": plan._asdict(),
            "load_average": os.getloadavg()[0],
            "machine": machine(),
        }
        del subjects  # ends the workers, before their shards are removed
    return result


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure decoding, cropping and data preparation.")
    parser.add_argument("--rounds", type=int, default=Plan().rounds)
    parser.add_argument("--folder", type=Path, help="for images and shards; default: benchmarks in data.cache_dir")
    parser.add_argument("--smoke", action="store_true", help="a few images, to see that all of it runs")
    parser.add_argument("--output", type=Path, default=RESULT)
    chosen = parser.parse_args(arguments)
    cache = chosen.folder or Path(DataConfig().cache_dir).expanduser() / "benchmarks"
    result = measure(SMOKE if chosen.smoke else Plan(rounds=chosen.rounds), cache)
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    rounded = json.loads(json.dumps(result), parse_float=lambda text: float(f"{float(text):.4g}"))
    chosen.output.write_text(json.dumps(rounded, indent=2) + "\n")
    for name, row in result["views"].items():
        ratio, goal = row["x_plain"], f", goal {GOALS[name]}" if name in GOALS else ""
        print(
            f"{name}: {row['images_per_second_per_core']:.0f} images/s per core, {ratio['median']:.2f} x plain "
            f"({ratio['min']:.2f} to {ratio['max']:.2f}){goal}"
        )
    decoders = ", ".join(f"{name} {row['us']:.0f}" for name, row in result["decoders"].items())
    print(f"to decode an image of {result['jpeg_bytes'] / 1e3:.1f} KB takes, in us: {decoders}")
    like = result["likeness"]
    print(
        f"PSNR to PIL's views: {like['psnr_db']:.1f} dB, goal {GOALS['psnr_db']:.0f}; of the worst view "
        f"{like['worst_psnr_db']:.1f} dB; no pixel is off by more than {like['largest_difference']:.0f} of 255"
    )
    print(f"reading a sample from a shard: {result['reader_us']:.1f} us, goal at most {GOALS['reader_us']:.0f}")
    for name, row in result["prepare"].items():
        print(
            f"prepare {row['images']:,} images, {name}: {row['images_per_second']:.0f} images/s, "
            f"{row['mb_read_per_second']:.1f} MB/s read, {row['cores_busy']:.2f} cores busy, "
            f"peak RSS {row['peak_rss_mb']:.0f} MB, {row['quarantined']} quarantined"
        )


if __name__ == "__main__":
    main()
