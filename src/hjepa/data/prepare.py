"""Decode every image once, set aside what cannot be used, and write deterministic shards."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import multiprocessing
import os
import platform
import re
import shutil
import signal
import tempfile
import time
import warnings
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
from PIL import Image

from hjepa.config import DataConfig, sha256_json
from hjepa.data.images import DECODE_ERRORS, RejectedError, decode
from hjepa.data.shards import ShardWriter, StoredFile
from hjepa.data.sources import MIN_TRAIN_IMAGES, Source, Split, require_train_images
from hjepa.data.workers import begin
from hjepa.errors import HjepaError, UserError

FORMAT = 2  # raised when the same images would give other shards
REPORT = "quarantine.jsonl"
REPORT_SECONDS = 1.0
SCRATCH_NAME = re.compile(r"prepare-(?P<pid>\d+)-(?P<started>\d+)-(?P<host>.+)-[^-]+")
CLOCK_TOLERANCE_SECONDS = 5.0  # start times are read off a clock that may have been set in between


@dataclass(frozen=True)
class Prepared:
    manifest: dict[str, Any]  # dataset.json, but for where it was uploaded to
    files: list[StoredFile]  # what the manifest names: shards, indexes, quarantine report


class Progress(NamedTuple):
    split: str
    done: int
    total: int
    quarantined: int
    seconds: float  # since the start of this split

    def __str__(self) -> str:
        rate = self.done / max(self.seconds, 1e-9)
        left = f", {(self.total - self.done) / rate:.0f} s left" if 0 < self.done < self.total else ""
        return (
            f"{self.split}: {self.done:,} of {self.total:,} images, {self.quarantined} in quarantine, "
            f"{rate:,.0f} images/s{left}"
        )


class QuarantineError(UserError):
    """Too many files cannot be used; ``report`` lists them."""

    def __init__(self, message: str, report: Path):
        super().__init__(message)
        self.report = report


def recipe(data: DataConfig) -> dict[str, Any]:
    """The settings that decide what the shards hold, for given splits."""
    return {
        "format": FORMAT,
        "channels": data.channels,
        "shard_mb": data.shard_mb,
        "max_pixels": data.max_pixels,
    }


def prepared_key(source: Source, data: DataConfig) -> str:
    """sha256 (hex) under which a prepared data set can be found again without reading any image."""
    return sha256_json({"source": source.fingerprint(), "prepare": recipe(data)})


@contextlib.contextmanager
def scratch(cache: Path) -> Iterator[Path]:
    """A work folder in ``cache``, removed at the end; what killed processes left behind there is removed first.

    A folder's name says whose it is. Those of other hosts stay: from here nobody can tell whether they are in use.
    """
    cache.mkdir(parents=True, exist_ok=True)
    for folder in cache.glob("prepare-*"):
        owner = SCRATCH_NAME.fullmatch(folder.name)
        if owner and owner["host"] == platform.node() and not _runs(int(owner["pid"]), int(owner["started"])):
            shutil.rmtree(folder, ignore_errors=True)  # another process may be removing it as well
    owner_name = f"{os.getpid()}-{psutil.Process().create_time():.0f}-{platform.node()}"
    with tempfile.TemporaryDirectory(dir=cache, prefix=f"prepare-{owner_name}-") as folder_name:
        yield Path(folder_name)


def _runs(pid: int, started: int) -> bool:
    """Whether that very process still runs: its number alone may by now belong to another one."""
    try:
        process = psutil.Process(pid)
        same = abs(process.create_time() - started) < CLOCK_TOLERANCE_SECONDS
        return bool(same and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def prepare(
    source: Source,
    data: DataConfig,
    workdir: Path,
    *,
    workers: int | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Prepared:
    """Write the shards of every split into ``workdir``.

    The same images, labels and settings give the same bytes and the same digest on any number of workers.
    The manifest leaves out a split of which no image can be used.

    Args:
        workers: Processes that decode; None takes every core that this process may use.
        progress: Called about once a second.

    Raises:
        QuarantineError: if more than ``data.quarantine_limit`` of the files cannot be used, or too few are left to
            train on; the report is written.
        UserError: if the source has too few images to train on, or the disk is full.
    """
    require_train_images(len(source.splits["train"]), source.detail)
    workdir.mkdir(parents=True, exist_ok=True)
    workers = workers or len(os.sched_getaffinity(0))
    pool = ProcessPoolExecutor(
        max_workers=workers,
        # Workers inherit the source instead of receiving it: millions of names need not be sent.
        mp_context=multiprocessing.get_context("fork"),
        initializer=_start_worker,
        initargs=(source.splits, data, os.getpid()),
    )
    try:
        with (workdir / REPORT).open("w", encoding="ascii") as report:
            splits = {
                name: _prepare_split(
                    _in_order(pool, name, split, in_flight=3 * workers),
                    name=name,
                    total=len(split),
                    data=data,
                    workdir=workdir,
                    write_report=report.write,
                    progress=progress,
                )
                for name, split in source.splits.items()
            }
    except BrokenProcessPool:
        raise HjepaError(
            "a worker of prepare_data was killed, most likely for want of memory: "
            f"lower data.max_pixels ({data.max_pixels}) or give this step more memory"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(workdir).free
        raise UserError(f"the disk of {workdir} is full ({free / 1e6:.0f} MB free): free some space there") from None
    finally:
        pool.shutdown(cancel_futures=True)
    return _conclude(source, data, workdir, splits)


# -- one split -------------------------------------------------------------------------------------------------------


@dataclass
class _SplitResult:
    shards: list[StoredFile]
    index: StoredFile
    labels: Counter[int | None]
    content: str  # sha256 over pixels and labels in order
    shapes: set[tuple[int, int]]  # (H, W); two of them are enough to know that they differ
    sums: np.ndarray[tuple[int, int], np.dtype[np.float64]]  # (2, C): mean and mean square, summed over images
    reasons: Counter[str]
    examples: list[str]

    @property
    def samples(self) -> int:
        return self.index.samples


class _Sample(NamedTuple):
    encoded: bytes
    suffix: str
    label: int | None
    content: bytes  # sha256 of the pixels
    shape: tuple[int, int]
    moments: tuple[tuple[float, ...], tuple[float, ...]]  # per channel: mean and mean square of x / 255
    crc32: int


class _Refused(NamedTuple):
    name: str
    reason: str
    detail: str


def _prepare_split(
    chunks: Iterable[list[_Sample | _Refused]],
    *,
    name: str,
    total: int,
    data: DataConfig,
    workdir: Path,
    write_report: Callable[[str], object],
    progress: Callable[[Progress], None] | None,
) -> _SplitResult:
    hasher = hashlib.sha256()
    labels: Counter[int | None] = Counter()
    shapes: set[tuple[int, int]] = set()
    sums = np.zeros((2, data.channels))
    reasons: Counter[str] = Counter()
    examples: list[str] = []
    start = reported = time.monotonic()
    done = 0
    with ShardWriter(workdir, name, shard_bytes=data.shard_mb * 1_000_000) as writer:
        for results in chunks:
            for result in results:
                if isinstance(result, _Refused):
                    reasons[result.reason] += 1
                    write_report(json.dumps({"split": name, **result._asdict()}) + "\n")
                    if len(examples) < 3:
                        examples.append(f"{result.name!a} ({result.reason})")
                    continue
                writer.add(result.encoded, suffix=result.suffix, label=result.label, crc32=result.crc32)
                hasher.update(result.content + f" {result.label}\n".encode())
                labels[result.label] += 1
                if len(shapes) < 2:
                    shapes.add(result.shape)
                sums += result.moments
            done += len(results)
            now = time.monotonic()
            if progress is not None and (now - reported >= REPORT_SECONDS or done == total):
                reported = now
                progress(Progress(name, done, total, reasons.total(), now - start))
        index = writer.finish()
    return _SplitResult(writer.shards, index, labels, hasher.hexdigest(), shapes, sums, reasons, examples)


def _in_order(
    pool: ProcessPoolExecutor, name: str, split: Split, *, in_flight: int
) -> Iterator[list[_Sample | _Refused]]:
    """Results in the order of the split, with few tasks in flight, so that memory stays bounded."""
    pending: deque[Future[list[_Sample | _Refused]]] = deque()
    for start in range(0, len(split), split.chunk):
        pending.append(pool.submit(_work, name, start, min(start + split.chunk, len(split))))
        if len(pending) >= in_flight:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


# -- in a worker process ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Task:
    splits: Mapping[str, Split]
    data: DataConfig


_task: _Task  # set once in each worker


def _start_worker(splits: Mapping[str, Split], data: DataConfig, parent: int) -> None:
    global _task
    _task = _Task(splits, data)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    begin(parent)
    warnings.simplefilter("ignore")  # what matters is in the quarantine report
    Image.MAX_IMAGE_PIXELS = None  # data.max_pixels takes its place


def _work(split_name: str, start: int, stop: int) -> list[_Sample | _Refused]:
    split = _task.splits[split_name]
    results: list[_Sample | _Refused] = []
    for i in range(start, stop):
        try:
            results.append(_sample(split, i))
        except RejectedError as error:
            results.append(_Refused(split.name(i), error.reason, error.detail))
    return results


def _sample(split: Split, i: int) -> _Sample:
    try:
        payload, label = split.read(i)
    except DECODE_ERRORS as error:
        raise RejectedError("unreadable", f"{type(error).__name__}: {error}") from None
    picture = decode(payload, max_pixels=_task.data.max_pixels)
    image = picture.image
    return _Sample(
        encoded=picture.encoded,
        suffix=picture.suffix,
        label=label,
        content=hashlib.sha256(f"{image.mode} {image.width} {image.height}\n".encode() + image.tobytes()).digest(),
        shape=(image.height, image.width),
        moments=_moments(image, _task.data.channels),
        crc32=zlib.crc32(picture.encoded),
    )


def _moments(image: Image.Image, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if channels == 1 and image.mode == "RGB":
        image = image.convert("L")
    counts = np.array(image.histogram(), dtype=np.int64).reshape(-1, 256)
    levels = np.arange(256, dtype=np.int64)
    pixels = image.width * image.height
    means = [int(total) / (255 * pixels) for total in counts @ levels]
    squares = [int(total) / (255 * 255 * pixels) for total in counts @ levels**2]
    repeat = channels // len(means)
    return tuple(means * repeat), tuple(squares * repeat)


# -- all splits ------------------------------------------------------------------------------------------------------


def _conclude(source: Source, data: DataConfig, workdir: Path, splits: Mapping[str, _SplitResult]) -> Prepared:
    reasons = sum((result.reasons for result in splits.values()), Counter())
    quarantined = reasons.total()
    samples = sum(result.samples for result in splits.values())
    total = quarantined + samples
    report = workdir / REPORT
    examples = [text for result in splits.values() for text in result.examples][:3]
    _require_few_refused(reasons, samples, data, report, examples)
    train = splits["train"]
    if train.samples < MIN_TRAIN_IMAGES:
        raise QuarantineError(
            f"{source.detail}: {train.samples} of {train.samples + train.reasons.total()} training images can be used, "
            f"expected at least {MIN_TRAIN_IMAGES}; unusable is for example {', '.join(train.examples)}. "
            "Replace the files that the report lists, or add images.",
            report,
        )
    notes = list(source.notes)
    for name, result in splits.items():
        if result.samples == 0:
            notes.append(f"the {name} split is left out: none of its {result.reasons.total()} images can be used")
    splits = {name: result for name, result in splits.items() if result.samples > 0}
    labels = {label for result in splits.values() for label in result.labels if label is not None}
    classes = list(source.classes)
    if labels and max(labels) >= len(classes):
        classes = [str(label) for label in range(max(labels) + 1)]
    prepare_section = recipe(data)
    content = {name: result.content for name, result in splits.items()}
    report_bytes = report.read_bytes()
    report_file = StoredFile(
        REPORT, report, len(report_bytes), hashlib.sha256(report_bytes).hexdigest(), samples=quarantined
    )
    manifest = {
        "schema": 1,
        "name": source.name,
        "digest": sha256_json({"prepare": prepare_section, "classes": classes, "content": content}),
        "source": {"kind": data.name, "detail": source.detail, "notes": notes},
        "channels": data.channels,
        "classes": classes,
        "splits": {name: _split_section(result, len(classes)) for name, result in splits.items()},
        "statistics": _statistics(train),
        "quarantine": {
            "total": quarantined,
            "share": quarantined / total,
            "by_reason": dict(sorted(reasons.items())),
            "report": REPORT,
            "bytes": report_file.bytes,
            "sha256": report_file.sha256,
        },
        "prepare": prepare_section,
    }
    stored = [file for result in splits.values() for file in (*result.shards, result.index)]
    return Prepared(manifest, [*stored, report_file])


def check_quarantine(manifest: Mapping[str, Any], data: DataConfig, report: Path) -> None:
    """Hold a set that was prepared under another ``data.quarantine_limit`` to the present one.

    Raises:
        QuarantineError: as ``prepare`` would.
    """
    samples = sum(split["samples"] for split in manifest["splits"].values())
    _require_few_refused(Counter(manifest["quarantine"]["by_reason"]), samples, data, report)


def _require_few_refused(
    reasons: Counter[str], samples: int, data: DataConfig, report: Path, examples: Sequence[str] = ()
) -> None:
    refused = reasons.total()
    total = refused + samples
    if refused <= data.quarantine_limit * total:
        return
    counts = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    shown = f"; for example {', '.join(examples)}" if examples else ""
    raise QuarantineError(
        f"{refused} of {total} files ({refused / total:.1%}) cannot be used: {counts}{shown}. data.quarantine_limit "
        f"allows {data.quarantine_limit:.1%}. Remove or replace the files that the report lists, or raise "
        "data.quarantine_limit.",
        report,
    )


def _split_section(result: _SplitResult, classes: int) -> dict[str, Any]:
    return {
        "samples": result.samples,
        "per_class": [result.labels[label] for label in range(classes)] if classes else None,
        "shape": list(next(iter(result.shapes))) if len(result.shapes) == 1 else None,  # (H, W) if all share it
        "shards": [
            {"key": shard.key, "bytes": shard.bytes, "sha256": shard.sha256, "samples": shard.samples}
            for shard in result.shards
        ],
        "index": {"key": result.index.key, "bytes": result.index.bytes, "sha256": result.index.sha256},
    }


def _statistics(train: _SplitResult) -> dict[str, list[float]]:
    """Per channel, of x / 255, with every image weighing the same; std is at least one grey level."""
    mean, square = train.sums / train.samples
    std = np.sqrt(np.maximum(square - mean**2, 0.0)).clip(min=1 / 255)
    return {"mean": mean.tolist(), "std": std.tolist()}
