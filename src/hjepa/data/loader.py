"""Shards -> batches. The order is a pure function of (seed, epoch), so a position is all that resuming needs.

Sets that are on this machine, or fit its cache, are visited in a random order. Of larger ones every batch is drawn from
a window of blocks, so that a block is fetched once per epoch and not once per image; see ``Windows``.
"""

from __future__ import annotations

import itertools
import math
import mmap
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar
from weakref import WeakValueDictionary

import numpy as np
import torch
from isal import isal_zlib
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hjepa.config import Config
from hjepa.data.cache import GETS_IN_FLIGHT, ReadAhead, Remote, ShardStream
from hjepa.data.shards import ShardReader, read_index
from hjepa.data.transforms import (
    decode_image,
    draw_view,
    empty_views,
    eval_view,
    size_of,
    to_channels,
    train_view,
    view_draws,
)
from hjepa.data.workers import begin
from hjepa.distributed import World
from hjepa.errors import HjepaError, UserError

Fetch = Callable[[str], Path]
"""Maps the key of a shard or index to a local, verified copy. Must be safe in several processes."""

MEMORY_BUDGET_BYTES = 256_000_000  # decoded sets up to this size are held in memory
PREFETCHED_BATCHES = 2
WINDOW_BYTES = 2_000_000_000
WINDOW_SHARE = 0.25  # of the cache, at most: beside the window it has to hold what is read ahead

T = TypeVar("T")


class MaskingFn(Protocol):
    """Masks of a whole global batch; its result has ``take(slice)``, the same for some of the images."""

    def __call__(self, *, step: int, epochs: NDArray[np.int64], samples: NDArray[np.int64]) -> Any: ...


class ShardDataset:
    """Random access to one split of a prepared data set.

    Args:
        manifest: dataset.json.
        split: "train" or "test".
        fetch: Where the files named in the manifest are; shards are asked for when first read.
        remote: Read the shards from there, block by block; ``fetch`` is then asked for the index alone.
    """

    def __init__(self, manifest: Mapping[str, Any], split: str, fetch: Fetch, *, remote: Remote | None = None):
        section = manifest["splits"].get(split)
        if section is None:
            raise UserError(
                f"the data set {manifest['name']} has no {split} split, only {', '.join(manifest['splits'])}"
            )
        self.manifest, self.split, self.fetch = manifest, split, fetch
        self.channels: int = manifest["channels"]
        self.statistics: Mapping[str, list[float]] = manifest["statistics"]
        self.shape: tuple[int, int] | None = tuple(section["shape"]) if section["shape"] else None
        self._keys = [shard["key"] for shard in section["shards"]]
        self._index = read_index(fetch(section["index"]["key"]))
        if len(self._index) != section["samples"]:
            raise HjepaError(
                f"{section['index']['key']} lists {len(self._index)} samples, the manifest {section['samples']}: "
                "they are of different data sets; fetch both again"
            )
        self.stream = None if remote is None else ShardStream(remote, section["shards"], self._index, split)
        self._paths: dict[int, Path] = {}
        self._reader = ShardReader()

    def __len__(self) -> int:
        return len(self._index)

    def labels(self) -> NDArray[np.int64]:
        """(N,) class numbers, -1 where there is none."""
        return self._index["label"].astype(np.int64)

    def read_bytes(self, i: int) -> bytes:
        """The encoded image.

        Raises:
            HjepaError: if the bytes are not those that were prepared.
        """
        if self.stream is not None:
            return self.stream.read(i)
        shard, offset, length, _, crc32 = self._index[i].item()
        path = self._paths.get(shard)
        if path is None:
            path = self._paths[shard] = self.fetch(self._keys[shard])
        data = self._reader.read(path, offset, length)
        if len(data) != length or isal_zlib.crc32(data) != crc32:
            raise HjepaError(
                f"sample {i} of the {self.split} split is damaged in {path} (bytes {offset} to {offset + length}): "
                "remove this file, so that it is fetched again"
            )
        return data

    def read(self, i: int, data: bytes | None = None) -> tuple[NDArray[np.uint8], int]:
        """The decoded image, uint8 (C, H, W), and its label (-1: none).

        Args:
            data: The encoded image, where it has been read already.
        """
        image: NDArray[np.uint8] = decode_image(self.read_bytes(i) if data is None else data, self.channels).numpy()
        return image, int(self._index[i]["label"])

    def encoded(self, samples: Sequence[int], *, sparse: bool) -> Sequence[bytes | None]:
        """The encoded images that are best fetched together, from a store; None where ``read`` will do.

        Args:
            sparse: See ``ShardStream.read_many``.
        """
        return [None] * len(samples) if self.stream is None else self.stream.read_many(samples, sparse=sparse)

    def in_memory(
        self, *, limit: int | None = None, budget_bytes: int = MEMORY_BUDGET_BYTES
    ) -> NDArray[np.uint8] | None:
        """The first ``limit`` images decoded, uint8 (N, C, H, W); None if they differ in size or exceed the budget."""
        count = len(self) if limit is None else min(limit, len(self))
        if self.shape is None or count * self.channels * self.shape[0] * self.shape[1] > budget_bytes:
            return None
        images = np.empty((count, *self.shape, self.channels), dtype=np.uint8).transpose(0, 3, 1, 2)
        if self.stream is not None:
            self.stream.fetch(range(count))

        def fill(start: int) -> None:
            for i in range(start, min(start + 1024, count)):
                images[i] = self.read(i)[0]

        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:  # decoders let go of the interpreter lock
            for _ in threads.map(fill, range(0, count, 1024)):
                pass
        return images


# -- order -----------------------------------------------------------------------------------------------------------


def order(seed: int, epoch: int, n: int) -> NDArray[np.int64]:
    """The permutation of ``range(n)`` in which an epoch visits the samples.

    Raw 64-bit draws are sorted, because NumPy promises that those never change, as it does not of ``permutation``.
    """
    draws = np.random.PCG64(np.random.SeedSequence((seed, epoch), spawn_key=(0,))).random_raw(n)
    return np.argsort(draws, kind="stable").astype(np.int64, copy=False)


class Windows:
    """An order for sets that are larger than the cache: random within a window that slides over shuffled blocks.

    The blocks are shuffled, and a sample of the k-th of them comes at the time k + window * u, with u drawn uniformly
    from [0, 1): so at any time ``window`` blocks are in use (fewer near both ends of an epoch), and a new one is needed
    whenever one of them is used up.

    Args:
        block_of: (N,) the block of each sample.
        window: Blocks.
    """

    def __init__(self, block_of: NDArray[np.int64], window: int):
        self.block_of, self.window = block_of, window

    def order(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """The permutation of the samples, of the same quality and stability as that of the function ``order``."""
        blocks = int(self.block_of.max()) + 1
        draws = np.random.PCG64(np.random.SeedSequence((seed, epoch), spawn_key=(1,))).random_raw(blocks)
        rank = np.empty(blocks, dtype=np.uint64)
        rank[np.argsort(draws, kind="stable")] = np.arange(blocks, dtype=np.uint64)
        draws = np.random.PCG64(np.random.SeedSequence((seed, epoch), spawn_key=(2,))).random_raw(len(self.block_of))
        # Fixed point with 32 bits after it: the same on every machine, which sums of floats need not be.
        times = (rank[self.block_of] << np.uint64(32)) + (draws >> np.uint64(32)) * np.uint64(self.window)
        return np.argsort(times, kind="stable").astype(np.int64, copy=False)


@lru_cache(maxsize=2)
def _cached_order(seed: int, epoch: int, n: int, windows: Windows | None) -> NDArray[np.int64]:
    permutation = order(seed, epoch, n) if windows is None else windows.order(seed, epoch)
    permutation.setflags(write=False)
    return permutation


def global_batch(
    step: int, *, batch_size: int, seed: int, n: int, shuffle: bool = True, windows: Windows | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(samples, epochs), each (B,), of one optimiser step over all ranks.

    Epochs follow one another without a gap, so a batch may hold the end of one and the start of the next.
    """
    positions = np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.int64)
    epochs, within = np.divmod(positions, n)
    if not shuffle:
        return within, epochs
    samples = np.empty(batch_size, dtype=np.int64)
    for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
        here = epochs == epoch
        samples[here] = _cached_order(seed, epoch, n, windows)[within[here]]
    return samples, epochs


# -- training --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    step: int
    epoch: int  # of the global batch's first sample
    position: int  # images seen before this step, over all ranks
    samples: NDArray[np.int64]  # (b,) this rank's samples
    epochs: NDArray[np.int64]  # (b,) the epoch that each of them belongs to
    global_samples: NDArray[np.int64]  # (B,) all ranks' samples, in rank order
    global_epochs: NDArray[np.int64]  # (B,) likewise
    images: Tensor  # uint8 (b, C, S, S), as ``empty_views`` has them in memory
    masks: Any = None  # this rank's part of what the masking function made, with tensors where it had arrays

    def pin_memory(self) -> Batch:
        return replace(self, images=self.images.pin_memory(), masks=_tensors(self.masks, pin=True))

    def with_tensors(self) -> Batch:
        """Masks cross from a worker as NumPy: one message, where every tensor would cost a file descriptor."""
        return self if self.masks is None else replace(self, masks=_tensors(self.masks, pin=False))


def _tensors(value: Any, *, pin: bool) -> Any:
    """The same structure of tuples, lists and dataclasses, with a tensor in place of every array."""
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    if isinstance(value, Tensor):
        return value.pin_memory() if pin else value
    if isinstance(value, list):
        return [_tensors(item, pin=pin) for item in value]
    if isinstance(value, tuple):
        items = [_tensors(item, pin=pin) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: _tensors(getattr(value, field.name), pin=pin) for field in fields(value)})
    return value


class TrainLoader:
    """Batches of training views, each a function of its step alone.

    Rank r of W gets the r-th of W equal parts of every global batch, so the global order does not depend on W.

    Args:
        batch_size: Global, over all ranks.
        num_workers: Processes that decode and make masks; 0 does so in one background thread. Sets that fit into
            memory and whose views are not cropped need them only where masks are to be made beside a GPU.
        pin_memory: Put images and masks into page-locked memory, for asynchronous copies to a GPU.
        shuffle: False visits the split in its own order, as validation does.
        window_bytes: How much of a set that is larger than its cache the images of a batch are drawn from.

    Raises:
        UserError: if the split is empty or the batch does not divide into ranks.
    """

    def __init__(
        self,
        dataset: ShardDataset,
        *,
        batch_size: int,
        seed: int,
        image_size: int,
        channels: int,
        crop_scale: tuple[float, float],
        horizontal_flip: bool,
        num_workers: int,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
        shuffle: bool = True,
        window_bytes: int = WINDOW_BYTES,
    ):
        if len(dataset) == 0:
            raise UserError(f"the {dataset.split} split holds no image")
        if batch_size % world_size:
            raise UserError(
                f"training.batch_size={batch_size} does not divide into {world_size} ranks; "
                f"use {max(1, batch_size // world_size) * world_size}"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size}")
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.image_size, self.channels = image_size, channels
        self.crop_scale, self.horizontal_flip = crop_scale, horizontal_flip
        self.rank, self.world_size = rank, world_size
        self.num_workers, self.pin_memory, self.shuffle = num_workers, pin_memory, shuffle
        self._scales: dict[torch.device, tuple[Tensor, Tensor]] = {}
        images = dataset.in_memory()
        self._decoded = None if images is None else to_channels(torch.from_numpy(images), channels)
        self._uncropped: Tensor | None = None
        if self._decoded is not None and tuple(crop_scale) == (1.0, 1.0):
            self._uncropped = eval_view(self._decoded, image_size)
        stream = self._stream = None if self._decoded is not None else dataset.stream
        self._windows: Windows | None = None
        self.order = "random" if shuffle else "as stored"
        if stream is not None:
            # All of what fits; else as much again as is in use.
            window = _window(stream, window_bytes)
            self._ahead = len(stream) if stream.fits else window
            if shuffle and not stream.fits:
                self._windows = Windows(stream.block_of, window)
                self.order = f"random in windows of {window} blocks of {stream.remote.block_bytes / 1e6:g} MB"
        self._batches_made = 0  # in this process

    @property
    def num_samples(self) -> int:
        return len(self.dataset)

    @property
    def digest(self) -> str:
        """Of the images and labels; a run cannot go on with others."""
        return str(self.dataset.manifest["digest"])

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 views (B, C, S, S) -> float32 by the data set's own mean and deviation, on the device they are on.

        The numbers of ``transforms.normalize``; mean and deviation are sent to a device once, for that waits for it.
        """
        scales = self._scales.get(images.device)
        if scales is None:
            mean, std = (
                torch.tensor(self.dataset.statistics[name], dtype=torch.float32).mul_(255).view(-1, 1, 1)
                for name in ("mean", "std")
            )
            scales = self._scales[images.device] = mean.to(images.device), std.to(images.device)
        return images.float().sub_(scales[0]).div_(scales[1])

    def batches(self, start_step: int, stop_step: int, masking_fn: MaskingFn | None = None) -> Iterator[Batch]:
        """The batches of steps ``start_step`` to ``stop_step - 1``, made ahead of their use, each with its masks."""
        steps = range(start_step, stop_step)

        def make(step: int, out: Tensor | None = None) -> Batch:
            return self.batch(step, masking_fn, out)

        workers = self.num_workers
        if self._stream is not None:
            yield from self._streamed(steps, make)
            return
        if self._uncropped is not None and not (self.pin_memory and masking_fn):
            workers = 0  # picking rows is cheaper than sending them between processes
            if not self.pin_memory:
                # On a CPU a second thread would only fight training for the cores.
                yield from (make(step).with_tensors() for step in steps)
                return
        for batch in self._produce(make, steps, workers):
            yield batch.with_tensors()

    def _produce(self, make: Make[Batch], steps: range, num_workers: int) -> Iterator[Batch]:
        shape = (self.batch_size // self.world_size, self.channels, self.image_size, self.image_size)
        return _produce(make, steps, shape=shape, num_workers=num_workers, pin_memory=self.pin_memory)

    def _streamed(self, steps: range, make: Make[Batch]) -> Iterator[Batch]:
        """The batches of a set that is read from a store, with the blocks that they need fetched before."""
        assert self._stream is not None
        needs = partial(block_needs, self._stream, self._order_of)
        with _reading_ahead(self._stream, needs, make, self.batch_size, self._ahead, self.num_workers) as make:
            for batch in self._produce(make, steps, self.num_workers):
                yield batch.with_tensors()

    def _order_of(self, epoch: int) -> NDArray[np.int64]:
        n = len(self.dataset)
        return _cached_order(self.seed, epoch, n, self._windows) if self.shuffle else np.arange(n)

    def batch(self, step: int, masking_fn: MaskingFn | None = None, out: Tensor | None = None) -> Batch:
        """This rank's part of a step's batch.

        Args:
            out: uint8 (b, C, S, S), where the images may be put.
        """
        samples, epochs = global_batch(
            step,
            batch_size=self.batch_size,
            seed=self.seed,
            n=len(self.dataset),
            shuffle=self.shuffle,
            windows=self._windows,
        )
        share = self.batch_size // self.world_size
        mine = slice(self.rank * share, (self.rank + 1) * share)
        masks = masking_fn(step=step, epochs=epochs, samples=samples).take(mine) if masking_fn else None
        return Batch(
            step=step,
            epoch=int(epochs[0]),
            position=step * self.batch_size,
            samples=samples[mine],
            epochs=epochs[mine],
            global_samples=samples,
            global_epochs=epochs,
            images=self._views(samples[mine], epochs[mine], out),
            masks=masks,
        )

    def _views(self, samples: NDArray[np.int64], epochs: NDArray[np.int64], out: Tensor | None) -> Tensor:
        if self._uncropped is not None:
            views = self._uncropped[torch.from_numpy(samples)]
            if not self.horizontal_flip:
                return views
            flipped = torch.from_numpy(view_draws(self.seed, epochs, samples)[:, -1] < 0.5)
            return torch.where(flipped[:, None, None, None], views.flip(-1), views)
        draws = view_draws(self.seed, epochs, samples)
        views = empty_views(len(samples), self.channels, self.image_size) if out is None else out
        # In random order a first batch is all over the set, so that its blocks are nearly the whole of it.
        sparse = self._windows is None or self._batches_made < PREFETCHED_BATCHES
        self._batches_made += 1
        encoded = self._encoded(samples.tolist(), sparse)
        for k, (sample, row, data) in enumerate(zip(samples.tolist(), draws.tolist(), encoded, strict=True)):
            views[k] = self._view(sample, data, row)
        return views

    def _encoded(self, samples: list[int], sparse: bool) -> Sequence[bytes | None]:
        if self._decoded is not None:
            return [None] * len(samples)
        return self.dataset.encoded(samples, sparse=sparse)

    def _view(self, sample: int, data: bytes | None, draws: Sequence[float]) -> Tensor:
        """(C, S, S), for which no more of the image is decoded than the crop needs."""
        settings: Any = {"crop_scale": self.crop_scale, "horizontal_flip": self.horizontal_flip, "draws": draws}
        if self._decoded is not None:
            return train_view(self._decoded[sample], image_size=self.image_size, **settings)
        data = self.dataset.read_bytes(sample) if data is None else data
        view = draw_view(*size_of(data), **settings)
        image = decode_image(data, self.dataset.channels, rows=view.top + view.height)
        return view.cut(to_channels(image, self.channels), self.image_size)


# -- evaluation ------------------------------------------------------------------------------------------------------


def build_train_loader(
    config: Config,
    dataset: ShardDataset,
    world: World,
    *,
    pin_memory: bool,
    batch_size: int | None = None,
    validation: bool = False,
) -> TrainLoader:
    """The loader that a configuration asks for.

    Args:
        pin_memory: For a GPU.
        batch_size: None takes ``training.batch_size``.
        validation: Uncropped, unmirrored, in the split's own order.
    """
    data = config.data
    return TrainLoader(
        dataset,
        batch_size=batch_size or config.training.batch_size,
        seed=config.seed,
        image_size=data.image_size,
        channels=data.channels,
        crop_scale=(1.0, 1.0) if validation else data.crop_scale,
        horizontal_flip=data.horizontal_flip and not validation,
        num_workers=data.num_workers,
        rank=world.rank,
        world_size=world.size,
        pin_memory=pin_memory,
        shuffle=not validation,
        window_bytes=data.window_mb * 1_000_000,
    )


@dataclass(frozen=True)
class EvalBatch:
    start: int  # position of the first image in the split
    images: Tensor  # uint8 (b, C, S, S), as ``empty_views`` has them in memory
    labels: NDArray[np.int64]  # (b,), -1: none

    def pin_memory(self) -> EvalBatch:
        return replace(self, images=self.images.pin_memory())


class EvalLoader:
    """Evaluation views of the first ``limit`` images of a split, in order, every one once."""

    def __init__(
        self,
        dataset: ShardDataset,
        *,
        batch_size: int,
        image_size: int,
        channels: int,
        num_workers: int,
        limit: int | None = None,
        pin_memory: bool = False,
    ):
        self.dataset, self.batch_size = dataset, batch_size
        self.image_size, self.channels = image_size, channels
        self.num_workers, self.pin_memory = num_workers, pin_memory
        self.samples = len(dataset) if limit is None else min(limit, len(dataset))
        self._labels = dataset.labels()

    def __len__(self) -> int:
        """Batches, the last of which may be smaller."""
        return -(-self.samples // self.batch_size)

    def __iter__(self) -> Iterator[EvalBatch]:
        shape = (self.batch_size, self.channels, self.image_size, self.image_size)
        produce = partial(_produce, shape=shape, num_workers=self.num_workers, pin_memory=self.pin_memory)
        stream = self.dataset.stream
        if stream is None:
            yield from produce(self.batch, range(len(self)))
            return

        def needs(position: int) -> Iterator[tuple[int, int]]:
            blocks, first = np.unique(stream.block_of[position : self.samples], return_index=True)
            return zip((position + first).tolist(), blocks.tolist(), strict=True)

        window = _window(stream, WINDOW_BYTES)
        with _reading_ahead(stream, needs, self.batch, self.batch_size, window, self.num_workers) as make:
            yield from produce(make, range(len(self)))

    def batch(self, number: int, out: Tensor | None = None) -> EvalBatch:
        """Args as those of ``TrainLoader.batch``."""
        start = number * self.batch_size
        stop = min(start + self.batch_size, self.samples)
        views = empty_views(stop - start, self.channels, self.image_size) if out is None else out[: stop - start]
        encoded = self.dataset.encoded(range(start, stop), sparse=False)
        for k, i in enumerate(range(start, stop)):
            image = to_channels(torch.from_numpy(self.dataset.read(i, encoded[k])[0]), self.channels)
            views[k] = eval_view(image, self.image_size)
        return EvalBatch(start, views, self._labels[start:stop])


# -- reading ahead ---------------------------------------------------------------------------------------------------


def _window(stream: ShardStream, window_bytes: int) -> int:
    """Blocks. A function of the configuration and the data set alone: the order of the images depends on it."""
    return max(1, min(window_bytes, int(WINDOW_SHARE * stream.cache.limit_bytes)) // stream.remote.block_bytes)


def block_needs(
    stream: ShardStream, order_of: Callable[[int], NDArray[np.int64]], position: int
) -> Iterator[tuple[int, int]]:
    """(position of the first need, block) of all blocks from a position on, epoch after epoch.

    Args:
        order_of: The samples in the order of an epoch.
    """
    n = len(stream.block_of)
    epoch, within = divmod(position, n)
    while True:
        blocks, first = np.unique(stream.block_of[order_of(epoch)[within:]], return_index=True)
        for k in np.argsort(first).tolist():
            yield epoch * n + within + int(first[k]), int(blocks[k])
        epoch, within = epoch + 1, 0


@contextmanager
def _reading_ahead(
    stream: ShardStream,
    needs: Callable[[int], Iterator[tuple[int, int]]],
    make: Make[M],
    batch_size: int,
    blocks: int,
    num_workers: int,
) -> Iterator[Make[M]]:
    """``make`` that also tells where it is: each process that makes batches fetches the blocks to come beside it."""
    ahead = ReadAhead(stream, needs, blocks=blocks, threads=max(1, GETS_IN_FLIGHT // max(1, num_workers)))

    def make_one(number: int, out: Tensor | None = None) -> M:
        made = make(number, out)
        ahead.at((number + 1) * batch_size)  # after it: a first batch, which training waits for, goes first
        return made

    try:
        yield make_one
    finally:
        ahead.close()


# -- making batches ahead of their use -------------------------------------------------------------------------------


class Made(Protocol):
    """A batch that another process or thread has made."""

    @property
    def images(self) -> Tensor: ...

    def pin_memory(self) -> Any: ...


M = TypeVar("M", bound=Made)
M_co = TypeVar("M_co", bound=Made, covariant=True)


class Make(Protocol[M_co]):
    def __call__(self, number: int, out: Tensor | None = None, /) -> M_co: ...


def _produce(
    make: Make[M], numbers: Sequence[int], *, shape: tuple[int, ...], num_workers: int, pin_memory: bool
) -> Iterator[M]:
    """The batches of these numbers, in order.

    Args:
        shape: Of the images of the largest batch.
    """
    if num_workers > 0 and len(numbers) > 0:
        slots = _Slots(num_workers, shape)
        loader = DataLoader(
            _Numbered(make, slots),
            batch_size=None,
            sampler=numbers,
            num_workers=num_workers,
            multiprocessing_context="fork",  # workers inherit decoded sets and ``fetch`` instead of unpickling them
            collate_fn=_identity,
            prefetch_factor=PREFETCHED_BATCHES,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # else every iterator would draw from the global generator
            worker_init_fn=partial(_start_worker, parent=os.getpid()),
        )
        for made in loader:
            if isinstance(made, HjepaError):
                raise made
            yield made.collect() if isinstance(made, _Parked) else made
    else:
        yield from _ahead((lambda number: make(number).pin_memory()) if pin_memory else make, numbers)


class _Slots:
    """Memory for images that is shared with forked workers: they write there, and send a batch without its images.

    The receiver copies them out. That takes a fraction of the time of shared memory of a batch's own, whose pages the
    kernel makes, clears and maps anew for each. It is anonymous, and so is no part of /dev/shm.

    A worker begins its n-th batch only when its (n - PREFETCHED_BATCHES)-th has been asked for, while the receiver may
    still copy that one; so it has one slot more.
    """

    _open: ClassVar[WeakValueDictionary[int, _Slots]] = WeakValueDictionary()  # in the receiver
    _numbers: ClassVar[Iterator[int]] = itertools.count()

    def __init__(self, workers: int, shape: tuple[int, ...]):
        count, channels, height, width = shape
        size = (workers, PREFETCHED_BATCHES + 1, count, height, width, channels)
        memory = torch.frombuffer(mmap.mmap(-1, math.prod(size)), dtype=torch.uint8)
        self.images = memory.view(size).permute(0, 1, 2, 5, 3, 4)  # as ``empty_views``
        self.number = next(self._numbers)
        self._open[self.number] = self

    @classmethod
    def numbered(cls, number: int) -> _Slots:
        return cls._open[number]


@dataclass(frozen=True)
class _Parked:
    """A batch on its way from a worker, with its images in a slot."""

    batch: Any
    slots: int
    slot: tuple[int, int]
    count: int  # images

    @property
    def _images(self) -> Tensor:
        return _Slots.numbered(self.slots).images[self.slot][: self.count]

    def collect(self) -> Any:
        return replace(self.batch, images=self._images.clone())

    def pin_memory(self) -> Any:
        return replace(self.batch, images=self._images).pin_memory()


class _Numbered(Dataset[Any]):
    def __init__(self, make: Make[Any], slots: _Slots):
        self.make, self.slots = make, slots
        self._made = 0  # by this worker

    def __getitem__(self, number: int) -> Any:
        worker = torch.utils.data.get_worker_info()
        assert worker is not None
        slot = worker.id, self._made % self.slots.images.shape[1]
        self._made += 1
        out = self.slots.images[slot]
        try:
            made = self.make(number, out)
        except HjepaError as error:
            return error  # raised in a worker, its message would arrive inside a traceback
        count = len(made.images)
        if made.images.data_ptr() != out.data_ptr():
            out[:count] = made.images
        return _Parked(replace(made, images=None), self.slots.number, slot, count)


def _start_worker(worker: int, *, parent: int) -> None:
    # SIGTERM or Ctrl-C for the whole group is for training to act on, which needs batches until its state is saved.
    os.setpgid(0, 0)
    begin(parent)


def _identity(batch: T) -> T:
    return batch


def _ahead(make: Callable[[int], T], numbers: Sequence[int]) -> Iterator[T]:
    """``make`` of each number in order, done by one background thread that stays a few ahead."""
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hjepa-loader")
    pending: deque[Future[T]] = deque()
    try:
        for number in numbers:
            pending.append(thread.submit(make, number))
            if len(pending) > PREFETCHED_BATCHES:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        thread.shutdown(cancel_futures=True)
