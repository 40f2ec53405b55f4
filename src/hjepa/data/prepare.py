"""Decode every image once, set aside what cannot be used, and write deterministic shards."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
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
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.synchronize import Lock
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
from isal import isal_zlib
from numpy.typing import NDArray
from PIL import Image

from hjepa.config import DataConfig, sha256_json
from hjepa.data import contact_sheet
from hjepa.data.duplicates import Duplicates, Fingerprints, find, perceptual_hash
from hjepa.data.images import DECODE_ERRORS, Pixels, RejectedError, decode, row_bands
from hjepa.data.parts import INDEX, PRINTS, SIDECARS, Part, PartResult, Thumbnail, parts_of, read_prints
from hjepa.data.parts import REPORT as PARTS_REPORT
from hjepa.data.shards import Index, ShardWriter, StoredFile, copy_samples, encode_index, read_index
from hjepa.data.sources import MIN_TRAIN_IMAGES, Source, Split, require_train_images
from hjepa.data.workers import begin
from hjepa.errors import HjepaError, UserError
from hjepa.files import file_sha256

FORMAT = 4  # raised when the same images would give other shards
REPORT = "quarantine.jsonl"
DUPLICATES = "duplicates.jsonl"
SHEET = "contact-sheet.png"
REPORT_SECONDS = 1.0
SCRATCH_NAME = re.compile(r"prepare-(?P<pid>\d+)-(?P<started>\d+)-(?P<host>.+)-[^-]+")
SPOOLED_BYTES = 1_000_000  # an encoded image that is larger waits for its turn on the disk
CLOCK_TOLERANCE_SECONDS = 5.0  # start times are read off a clock that may have been set in between


FetchShard = Callable[[StoredFile], Path]


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
    bytes: int  # of the images that were stored

    def __str__(self) -> str:
        seconds = max(self.seconds, 1e-9)
        left = ""
        if 0 < self.done < self.total:
            left = f", {_duration(seconds * (self.total - self.done) / self.done)} left"
        return (
            f"{self.split}: {self.done:,} of {self.total:,} images, {self.quarantined:,} in quarantine, "
            f"{self.done / seconds:,.0f} images/s, {self.bytes / 1e6 / seconds:,.1f} MB/s{left}"
        )


def _duration(seconds: float) -> str:
    minutes, hours = round(seconds / 60), round(seconds / 3600, 1)
    return f"{seconds:.0f} s" if seconds < 100 else f"{minutes} min" if minutes < 100 else f"{hours:,} h"


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
        "short_side": data.short_side,
        # Without reduction nothing is stored at this quality, and a change of it is no other data set.
        "jpeg_quality": None if data.short_side is None else data.jpeg_quality,
        "part_images": data.part_images,
        "find_duplicates": data.find_duplicates,
        "remove_leaks": data.remove_leaks,
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

    The same images, labels and settings give the same bytes and the same digest on any number of workers, and however
    many machines have made which parts of it; see ``prepare_parts`` and ``merge``.
    The manifest leaves out a split of which no image can be used.

    Args:
        workers: Processes that decode; None takes every core that this process may use.
        progress: Called about once a second.

    Raises:
        QuarantineError: if more than ``data.quarantine_limit`` of the files cannot be used, or too few are left to
            train on; the report is written.
        UserError: if the source has too few images to train on, or the disk is full.
    """
    wanted = parts_of(source, data.part_images)
    made = list(prepare_parts(source, data, workdir, wanted, workers=workers, progress=progress))
    prepared = merge(source, data, workdir, made, fetch=lambda shard: shard.path)
    files = [file._replace(path=workdir / file.key) for file in prepared.files]
    for before, file in zip(prepared.files, files, strict=True):
        before.path.rename(file.path)
    for part in wanted:
        for kind in SIDECARS:
            (workdir / part.file(kind)).unlink()
    return Prepared(prepared.manifest, files)


def prepare_parts(
    source: Source,
    data: DataConfig,
    workdir: Path,
    wanted: Sequence[Part],
    *,
    workers: int | None = None,
    progress: Callable[[Progress], None] | None = None,
    on_shard: Callable[[StoredFile], None] | None = None,
) -> Iterator[PartResult]:
    """Decode the images of some parts and write their shards and other files, but for the JSON, into ``workdir``.

    Args:
        workers, progress: As of ``prepare``.
        on_shard: Called with each shard once it is complete; it may take the file away.

    Yields:
        Each part once all of its files are there.

    Raises:
        UserError: if the source has too few images to train on, or the disk is full.
    """
    require_train_images(len(source.splits["train"]), source.detail)
    workdir.mkdir(parents=True, exist_ok=True)
    workers = workers or len(os.sched_getaffinity(0))
    totals = Counter({split: sum(p.stop - p.start for p in wanted if p.split == split) for split in source.splits})
    pool = ProcessPoolExecutor(
        max_workers=workers,
        # Workers inherit the source instead of receiving it: millions of names need not be sent.
        mp_context=multiprocessing.get_context("fork"),
        initializer=_start_worker,
        initargs=(source.splits, data, workdir, multiprocessing.get_context("fork").Lock(), os.getpid()),
    )
    try:
        results = _in_order(pool, source, wanted, in_flight=3 * workers)
        told: dict[str, _Told] = {split: _Told(split, totals[split], progress) for split in source.splits}
        for part, chunks in itertools.groupby(results, key=lambda item: item[0]):
            told[part.split].begin()
            yield _prepare_part(part, (chunk for _, chunk in chunks), data, workdir, told[part.split], on_shard)
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


# -- one part --------------------------------------------------------------------------------------------------------


class _Sample(NamedTuple):
    number: int  # in the split of the source
    encoded: bytes | Path  # a file of its own, if it is large
    suffix: str
    label: int | None
    content: bytes  # sha256 of the pixels
    shape: tuple[int, int]
    moments: tuple[tuple[float, ...], tuple[float, ...]]  # per channel: mean and mean square of x / 255
    crc32: int
    perceptual: int | None
    thumbnail: bytes | None


class _Refused(NamedTuple):
    number: int  # in the split of the source
    name: str
    reason: str
    detail: str


class _Told:
    """Tells how far the parts of one split are."""

    def __init__(self, split: str, total: int, progress: Callable[[Progress], None] | None):
        self.split, self.total, self.progress = split, total, progress
        self.done = self.quarantined = self.stored = 0
        self._start = self._reported = 0.0

    def begin(self) -> None:
        """A part of the split is about to be told of; the first one starts the clock."""
        if not self._start:
            self._start = self._reported = time.monotonic()

    def add(self, done: int, quarantined: int, stored: int) -> None:
        now = time.monotonic()
        self.done += done
        self.quarantined += quarantined
        self.stored += stored
        if self.progress is not None and (now - self._reported >= REPORT_SECONDS or self.done == self.total):
            self._reported = now
            self.progress(Progress(self.split, self.done, self.total, self.quarantined, now - self._start, self.stored))


def _prepare_part(
    part: Part,
    chunks: Iterable[list[_Sample | _Refused]],
    data: DataConfig,
    workdir: Path,
    told: _Told,
    on_shard: Callable[[StoredFile], None] | None,
) -> PartResult:
    hasher = hashlib.sha256()
    labels: Counter[int | None] = Counter()
    shapes: set[tuple[int, int]] = set()
    sums = np.zeros((2, data.channels))
    reasons: Counter[str] = Counter()
    examples: list[str] = []
    thumbnails: list[Thumbnail] = []
    with (
        (workdir / part.file(PARTS_REPORT)).open("w", encoding="ascii") as report,
        (workdir / part.file(PRINTS)).open("wb") as prints,
        ShardWriter(workdir, part.name, shard_bytes=data.shard_mb * 1_000_000, on_shard=on_shard) as writer,
    ):
        for results in chunks:
            stored = refused = 0
            for result in results:
                if isinstance(result, _Refused):
                    refused += 1
                    reasons[result.reason] += 1
                    report.write(json.dumps({"split": part.split, **result._asdict()}) + "\n")
                    if len(examples) < 3:
                        examples.append(f"{result.name!a} ({result.reason})")
                    continue
                encoded = result.encoded
                if isinstance(encoded, Path):
                    path, encoded = encoded, encoded.read_bytes()
                    path.unlink()
                writer.add(
                    encoded,
                    number=result.number,
                    suffix=result.suffix,
                    label=result.label,
                    crc32=result.crc32,
                )
                stored += len(encoded)
                hasher.update(result.content + f" {result.label}\n".encode())
                if result.perceptual is not None:
                    prints.write(result.content[7::-1] + result.perceptual.to_bytes(8, "little"))
                labels[result.label] += 1
                if len(shapes) < 2:
                    shapes.add(result.shape)
                sums += result.moments
                if result.thumbnail is not None:
                    thumbnails.append(Thumbnail(result.number, result.label, result.thumbnail))
            told.add(len(results), refused, stored)
        index = writer.finish()
    return PartResult(
        part=part,
        shards=writer.shards,
        samples=index.samples,
        content=hasher.hexdigest(),
        labels=labels,
        shapes=shapes,
        sums=sums,
        reasons=reasons,
        examples=examples,
        thumbnails=thumbnails,
        sidecars={kind: file_sha256(workdir / part.file(kind)) for kind in SIDECARS},
    )


def _in_order(
    pool: ProcessPoolExecutor, source: Source, wanted: Iterable[Part], *, in_flight: int
) -> Iterator[tuple[Part, list[_Sample | _Refused]]]:
    """Results in the order of the parts, with few tasks in flight, so that memory stays bounded."""
    pending: deque[tuple[Part, Future[list[_Sample | _Refused]]]] = deque()
    for part in wanted:
        chunk = source.splits[part.split].chunk
        for start in range(part.start, part.stop, chunk):
            pending.append((part, pool.submit(_work, part.split, start, min(start + chunk, part.stop))))
            if len(pending) >= in_flight:
                done, future = pending.popleft()
                yield done, future.result()
    for done, future in pending:
        yield done, future.result()


# -- in a worker process ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Task:
    splits: Mapping[str, Split]
    data: DataConfig
    folder: Path  # for large images on their way
    large: Lock  # held by whoever has one in memory
    shown: Set[int]  # numbers of the training images on the contact sheet


_task: _Task  # set once in each worker


def _start_worker(splits: Mapping[str, Split], data: DataConfig, folder: Path, large: Lock, parent: int) -> None:
    global _task
    _task = _Task(splits, data, folder, large, contact_sheet.shown(len(splits["train"])))
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
            results.append(_sample(split, i, shown=split_name == "train" and i in _task.shown))
        except RejectedError as error:
            results.append(_Refused(i, split.name(i), error.reason, error.detail))
    return results


def _sample(split: Split, i: int, *, shown: bool) -> _Sample:
    with contextlib.ExitStack() as turn:  # of large pictures, of which there is one at a time
        return _looked_at(split, i, shown=shown, on_large=lambda: turn.enter_context(_task.large))


def _looked_at(split: Split, i: int, *, shown: bool, on_large: Callable[[], object]) -> _Sample:
    try:
        payload, label = split.read(i)
    except DECODE_ERRORS as error:
        raise RejectedError("unreadable", f"{type(error).__name__}: {error}") from None
    data = _task.data
    picture = decode(
        payload,
        max_pixels=data.max_pixels,
        short_side=data.short_side,
        jpeg_quality=data.jpeg_quality,
        on_large=on_large,
    )
    height, width = picture.pixels.shape[:2]
    content = hashlib.sha256(f"{'L' if picture.pixels.ndim == 2 else 'RGB'} {width} {height}\n".encode())
    content.update(np.ascontiguousarray(picture.pixels).data)
    return _Sample(
        number=i,
        encoded=_spooled(picture.encoded),
        suffix=picture.suffix,
        label=label,
        content=content.digest(),
        shape=(height, width),
        moments=_moments(picture.pixels, data.channels),
        crc32=isal_zlib.crc32(picture.encoded),
        perceptual=_likeness(picture.pixels, content.digest()) if data.find_duplicates else None,
        thumbnail=contact_sheet.thumbnail(picture.pixels) if shown else None,
    )


def _likeness(pixels: Pixels, content: bytes) -> int:
    """The perceptual hash, or for an image that has none one like no other image's."""
    hashed = perceptual_hash(pixels)
    return int.from_bytes(content[8:16], "big") if hashed is None else hashed


def _spooled(encoded: bytes) -> bytes | Path:
    """A few dozen images wait for their turn at any time: of large ones in files."""
    if len(encoded) <= SPOOLED_BYTES:
        return encoded
    with tempfile.NamedTemporaryFile(dir=_task.folder, prefix="large-", delete=False) as file:
        file.write(encoded)
    return Path(file.name)


def _moments(pixels: Pixels, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    height, width = pixels.shape[:2]
    counts = sum(_histogram(pixels[rows], channels) for rows in row_bands(height, pixels[0].nbytes))
    levels = np.arange(256, dtype=np.int64)
    area = width * height
    means = [int(total) / (255 * area) for total in counts @ levels]
    squares = [int(total) / (255 * 255 * area) for total in counts @ levels**2]
    repeat = channels // len(means)
    return tuple(means * repeat), tuple(squares * repeat)


def _histogram(pixels: Pixels, channels: int) -> NDArray[np.int64]:
    """How often each level is there, [channels of the picture, or 1, 256]."""
    image = Image.fromarray(pixels)
    if channels == 1 and image.mode == "RGB":
        image = image.convert("L")
    return np.array(image.histogram(), dtype=np.int64).reshape(-1, 256)


# -- all parts -------------------------------------------------------------------------------------------------------


@dataclass
class _Split:
    """The parts of one split put together."""

    name: str
    parts: list[PartResult]

    def __post_init__(self) -> None:
        self.labels = sum((part.labels for part in self.parts), Counter[int | None]())
        self.reasons = sum((part.reasons for part in self.parts), Counter[str]())
        self.samples = sum(part.samples for part in self.parts)
        self.examples = [text for part in self.parts for text in part.examples][:3]
        self.shapes = {shape for part in self.parts for shape in part.shapes}
        self.sums = np.sum([part.sums for part in self.parts], axis=0)
        self._files = [shard for part in self.parts for shard in part.shards]

    def shards(self) -> list[StoredFile]:
        """Under the names that they get in the data set, which counts them through."""
        return [shard._replace(key=f"{self.name}-{number:06d}.tar") for number, shard in enumerate(self._files)]

    def index(self, workdir: Path) -> Index:
        records, before = [], 0
        for part in self.parts:
            found = read_index(workdir / part.part.file(INDEX)).copy()
            found["shard"] += before
            before += len(part.shards)
            records.append(found)
        return np.concatenate(records)

    def without(self, gone: NDArray[np.bool_], index: Index, workdir: Path, fetch: FetchShard) -> Index:
        """The index without some samples, whose shards are written anew: whoever reads them gets no more either."""
        files: list[StoredFile] = []
        records: list[Index] = []
        for number, shard in enumerate(self._files):
            here = index["shard"] == number
            found, keep = index[here].copy(), ~gone[here]
            if not keep.any():
                continue
            if not keep.all():
                path = fetch(shard)
                shard, found = copy_samples(path, found, keep, workdir / f"kept-{shard.origin}")
                path.unlink()
            found["shard"] = len(files)
            files.append(shard)
            records.append(found)
        self._files = files
        return np.concatenate(records)

    def numbers(self, refused: Iterable[int]) -> NDArray[np.int64]:
        """(N,) of the samples in the split of the source, which also name them in the shards."""
        stop = max(part.part.stop for part in self.parts)
        return np.setdiff1d(np.arange(stop), np.fromiter(refused, dtype=np.int64))


def merge(
    source: Source, data: DataConfig, workdir: Path, made: Sequence[PartResult], *, fetch: FetchShard
) -> Prepared:
    """Put all parts of a source together into one data set.

    Args:
        workdir: Has the parts' ``SIDECARS``, and gets the files of the data set; shards may be elsewhere.
        made: Every part of ``parts_of``.
        fetch: Gives a copy of a shard, which is removed; asked for those that hold images to be taken out.

    Returns:
        The manifest and its files; the shards under the names of their parts, to be renamed or copied.

    Raises:
        QuarantineError: as of ``prepare``.
    """
    splits = [_Split(name, [each for each in made if each.part.split == name]) for name in source.splits]
    reasons = sum((split.reasons for split in splits), Counter[str]())
    quarantined = reasons.total()
    samples = sum(split.samples for split in splits)
    report = _joined(made, workdir)
    examples = [text for split in splits for text in split.examples][:3]
    _require_few_refused(reasons, samples, data, report, examples)
    train = splits[0] if splits[0].name == "train" else next(split for split in splits if split.name == "train")
    if train.samples < MIN_TRAIN_IMAGES:
        raise QuarantineError(
            f"{source.detail}: {train.samples} of {train.samples + train.reasons.total()} training images can be used, "
            f"expected at least {MIN_TRAIN_IMAGES}; unusable is for example {', '.join(train.examples)}. "
            "Replace the files that the report lists, or add images.",
            report,
        )
    notes = list(source.notes)
    for split in splits:
        if split.samples == 0:
            notes.append(f"the {split.name} split is left out: none of its {split.reasons.total()} images can be used")
    splits = [split for split in splits if split.samples > 0]
    labels = {label for split in splits for label in split.labels if label is not None}
    classes = list(source.classes)
    if labels and max(labels) >= len(classes):
        classes = [str(label) for label in range(max(labels) + 1)]
    indexes = {split.name: split.index(workdir) for split in splits}
    section = recipe(data)
    content: dict[str, Any] = {split.name: [part.content for part in split.parts] for split in splits}
    files: list[StoredFile] = []
    manifest: dict[str, Any] = {}
    if data.find_duplicates:
        found = _duplicates(splits, indexes, workdir)
        manifest["duplicates"] = _duplicates_section(found, _named(found, splits, source, report), workdir, data, files)
        notes += _notes_of_duplicates(found, data)
        if data.remove_leaks and found.leaking.any():
            left = int((~found.leaking).sum())
            require_train_images(left, f"{source.detail}, without the images that the test split has")
            before = set(indexes["train"]["label"].tolist())
            indexes["train"] = train.without(found.leaking, indexes["train"], workdir, fetch)
            content["removed"] = hashlib.sha256(np.packbits(found.leaking).tobytes()).hexdigest()
            if emptied := sorted(before - set(indexes["train"]["label"].tolist())):
                lost = ", ".join(f"{classes[label]!a}" for label in emptied[:5])
                notes.append(f"{len(emptied)} of the classes lost all of their training images by that: {lost}")
    sheet = contact_sheet.draw([t for part in train.parts for t in part.thumbnails], classes)
    files.append(_write(workdir / SHEET, sheet))
    files.append(_stored(report, quarantined))
    for split in splits:
        files.append(
            _write(workdir / f"{split.name}.index", encode_index(indexes[split.name]), len(indexes[split.name]))
        )
    by_key = {file.key: file for file in files}
    manifest = {
        "schema": 1,
        "name": source.name,
        "digest": sha256_json({"prepare": section, "classes": classes, "content": content}),
        "source": {"kind": data.name, "detail": source.detail, "notes": notes},
        "channels": data.channels,
        "classes": classes,
        "splits": {
            split.name: _split_section(split, indexes[split.name], by_key[f"{split.name}.index"], len(classes))
            for split in splits
        },
        "statistics": _statistics(train),
        "quarantine": {
            "total": quarantined,
            "share": quarantined / (quarantined + samples),
            "by_reason": dict(sorted(reasons.items())),
            "report": REPORT,
            "bytes": by_key[REPORT].bytes,
            "sha256": by_key[REPORT].sha256,
        },
        "contact_sheet": _facts(by_key[SHEET]),
        "prepare": section,
        **manifest,
    }
    shards = [shard for split in splits for shard in split.shards()]
    return Prepared(manifest, [*shards, *files])


def _joined(made: Sequence[PartResult], workdir: Path) -> Path:
    """The quarantine reports of all parts in one file."""
    path = workdir / REPORT
    with path.open("wb") as joined:
        for each in made:
            joined.write((workdir / each.part.file(PARTS_REPORT)).read_bytes())
    return path


def _duplicates(splits: Sequence[_Split], indexes: Mapping[str, Index], workdir: Path) -> Duplicates:
    prints = {}
    for split in splits:
        found = np.concatenate([read_prints(workdir / each.part.file(PRINTS), each.samples) for each in split.parts])
        labels = indexes[split.name]["label"].astype(np.int32)
        prints[split.name] = Fingerprints(contents=found[:, 0].copy(), hashes=found[:, 1].copy(), labels=labels)
    return find(prints)


def _named(found: Duplicates, splits: Sequence[_Split], source: Source, report: Path) -> list[dict[str, Any]]:
    """The pairs by their names in the source, and the numbers that name them in the shards."""
    refused: dict[str, list[int]] = {split.name: [] for split in splits}
    with report.open(encoding="ascii") as lines:
        for line in map(json.loads, lines):
            refused.setdefault(line["split"], []).append(line["number"])
    numbers = {split.name: split.numbers(refused[split.name]) for split in splits}
    named = []
    for twin in found.examples:
        one, other = (
            (int(numbers[split][number]), source.splits[split])
            for split, number in ((twin.split, twin.number), (twin.other_split, twin.other_number))
        )
        line = twin._replace(number=one[0], other_number=other[0])._asdict()
        named.append(line | {"name": one[1].name(one[0]), "other_name": other[1].name(other[0])})
    return named


def _duplicates_section(
    found: Duplicates, named: Sequence[dict[str, Any]], workdir: Path, data: DataConfig, files: list[StoredFile]
) -> dict[str, Any]:
    """Of the manifest; the pairs themselves are in a file of their own."""
    lines = "".join(json.dumps(line) + "\n" for line in named)
    files.append(_write(workdir / DUPLICATES, lines.encode(), len(named)))
    removed = int(found.leaking.sum()) if data.remove_leaks else 0
    return {**found.to_json(), "removed_from_train": removed, "report": DUPLICATES, **_facts(files[-1])}


def _notes_of_duplicates(found: Duplicates, data: DataConfig) -> list[str]:
    notes = []
    if leaked := sum(found.leaked):
        what = "were taken out of the training split" if data.remove_leaks else "data.remove_leaks=true takes them out"
        notes.append(
            f"{leaked:,} test images are in the training split too, {found.leaked.exact:,} exactly and "
            f"{found.leaked.near:,} nearly: {int(found.leaking.sum()):,} training images; {what}"
        )
    if found.conflicting_labels:
        notes.append(f"{found.conflicting_labels:,} images are there a second time under another label")
    return notes


def _write(path: Path, content: bytes, samples: int = 0) -> StoredFile:
    path.write_bytes(content)
    return StoredFile(path.name, path, len(content), hashlib.sha256(content).hexdigest(), samples)


def _stored(path: Path, samples: int) -> StoredFile:
    return StoredFile(path.name, path, path.stat().st_size, file_sha256(path), samples)


def _facts(file: StoredFile) -> dict[str, Any]:
    return {"key": file.key, "bytes": file.bytes, "sha256": file.sha256}


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


def _split_section(split: _Split, index: Index, stored: StoredFile, classes: int) -> dict[str, Any]:
    counts = np.bincount(index["label"][index["label"] >= 0], minlength=classes).tolist()
    return {
        "samples": len(index),
        "per_class": counts if classes else None,
        "shape": list(next(iter(split.shapes))) if len(split.shapes) == 1 else None,  # (H, W) if all share it
        "shards": [{**_facts(shard), "samples": shard.samples} for shard in split.shards()],
        "index": _facts(stored),
    }


def _statistics(train: _Split) -> dict[str, list[float]]:
    """Per channel, of x / 255, with every image weighing the same; std is at least one grey level."""
    mean, square = train.sums / train.samples
    std = np.sqrt(np.maximum(square - mean**2, 0.0)).clip(min=1 / 255)
    return {"mean": mean.tolist(), "std": std.tolist()}
