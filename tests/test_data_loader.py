from __future__ import annotations

import io
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from hjepa.config import DataConfig, validate
from hjepa.data.cache import BlockCache, Remote
from hjepa.data.datasets import open_source
from hjepa.data.loader import (
    EvalLoader,
    ShardDataset,
    TrainLoader,
    Windows,
    _Parked,
    _Slots,
    _tensors,
    global_batch,
    order,
)
from hjepa.data.prepare import prepare
from hjepa.data.sources import ArraySplit, Source
from hjepa.data.transforms import eval_view, normalize
from hjepa.errors import HjepaError, UserError
from hjepa.masks import MultiBlockMasking

SAMPLES = 37
PLAIN: dict[str, Any] = {"crop_scale": (1.0, 1.0), "horizontal_flip": False}
RANDOM: dict[str, Any] = {"crop_scale": (0.3, 1.0), "horizontal_flip": True}


@pytest.fixture(scope="module")
def grey(tmp_path_factory: pytest.TempPathFactory) -> ShardDataset:
    """37 grey arrays of one size: held in memory by the loaders."""
    folder = tmp_path_factory.mktemp("grey")
    images = np.random.default_rng(0).integers(0, 256, (SAMPLES, 12, 12), dtype=np.uint8)
    source = Source("grey", "made here", {"train": ArraySplit(images, np.arange(SAMPLES) % 3)})
    return ShardDataset(prepare(source, DataConfig(channels=1), folder).manifest, "train", folder.joinpath)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> ShardDataset:
    """37 JPEGs of several sizes in two classes: read from the shards."""
    root, folder = tmp_path_factory.mktemp("photos"), tmp_path_factory.mktemp("prepared")
    rng = np.random.default_rng(0)
    for i in range(SAMPLES + 5):
        part = "train" if i < SAMPLES else "test"
        path = root / part / "ab"[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        small.resize((40 + i % 7, 30 + i % 5), Image.Resampling.BICUBIC).save(path)
    data = DataConfig(root=str(root))
    return ShardDataset(prepare(open_source(data), data, folder).manifest, "train", folder.joinpath)


def loader(dataset: ShardDataset, **options: Any) -> TrainLoader:
    settings = {
        "batch_size": 8,
        "seed": 3,
        "image_size": 16,
        "channels": dataset.channels,
        "num_workers": 0,
        **PLAIN,
        **options,
    }
    return TrainLoader(dataset, **settings)


# -- order -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 37, 1000])
@pytest.mark.parametrize("epoch", [0, 1, 99])
def test_order__is_a_permutation(n: int, epoch: int) -> None:
    assert sorted(order(5, epoch, n)) == list(range(n))


def test_order__never_changes() -> None:
    assert order(0, 0, 8).tolist() == [6, 3, 1, 4, 5, 2, 7, 0]
    assert not np.array_equal(order(0, 0, 50), order(0, 1, 50))
    assert not np.array_equal(order(0, 0, 50), order(1, 0, 50))


def test_order__every_sample_is_first_equally_often() -> None:
    firsts = np.bincount([order(seed, 0, 5)[0] for seed in range(2000)], minlength=5)
    assert firsts.min() > 330
    assert firsts.max() < 470


@pytest.mark.parametrize("batch_size", [1, 5, 8, 37, 100])
def test_global_batch__every_image_exactly_once_per_epoch(batch_size: int) -> None:
    epochs: dict[int, list[int]] = {}
    for step in range(-(-3 * SAMPLES // batch_size)):
        samples, of_epoch = global_batch(step, batch_size=batch_size, seed=0, n=SAMPLES)
        assert len(samples) == batch_size
        for sample, epoch in zip(samples.tolist(), of_epoch.tolist(), strict=True):
            epochs.setdefault(epoch, []).append(sample)
    for epoch in range(3):
        assert epochs[epoch] == order(0, epoch, SAMPLES).tolist()


# -- training batches ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("views", [PLAIN, RANDOM, {**PLAIN, "horizontal_flip": True}])
@pytest.mark.parametrize("kind", ["grey", "photos"])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches__resumed_run_equals_the_straight_one(
    kind: str, views: dict[str, Any], workers: int, request: pytest.FixtureRequest
) -> None:
    dataset = request.getfixturevalue(kind)
    straight = list(loader(dataset, **views).batches(0, 12))
    resumed = list(loader(dataset, **views, num_workers=workers).batches(7, 12))
    assert [batch.step for batch in resumed] == [7, 8, 9, 10, 11]
    for ours, theirs in zip(resumed, straight[7:], strict=True):
        assert (ours.step, ours.epoch, ours.position) == (theirs.step, theirs.epoch, theirs.position)
        np.testing.assert_array_equal(ours.samples, theirs.samples)
        np.testing.assert_array_equal(ours.epochs, theirs.epochs)
        assert torch.equal(ours.images, theirs.images)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("kind", ["grey", "photos"])
def test_batches__ranks_together_see_what_one_process_sees(
    kind: str, world_size: int, request: pytest.FixtureRequest
) -> None:
    dataset = request.getfixturevalue(kind)
    whole = loader(dataset, **RANDOM).batches(0, 10)
    ranks = [loader(dataset, **RANDOM, rank=rank, world_size=world_size).batches(0, 10) for rank in range(world_size)]
    for batch, *shares in zip(whole, *ranks, strict=True):
        assert torch.equal(batch.images, torch.cat([share.images for share in shares]))
        np.testing.assert_array_equal(batch.samples, np.concatenate([share.samples for share in shares]))
        assert all(np.array_equal(batch.samples, share.global_samples) for share in shares)


def test_batches__cached_flips_equal_single_views(grey: ShardDataset) -> None:
    cached = loader(grey, crop_scale=(1.0, 1.0), horizontal_flip=True)
    single = loader(grey, crop_scale=(1.0, 1.0), horizontal_flip=True)
    single._uncropped = None
    flipped = 0
    plain = loader(grey)
    for step in range(5):
        assert torch.equal(cached.batch(step).images, single.batch(step).images)
        flipped += int((cached.batch(step).images != plain.batch(step).images).flatten(1).any(1).sum())
    assert 0 < flipped < 40


def test_batches__images_are_those_of_their_samples(grey: ShardDataset) -> None:
    for batch in loader(grey).batches(0, 5):
        for sample, image in zip(batch.samples, batch.images, strict=True):
            assert torch.equal(image, eval_view(torch.from_numpy(grey.read(int(sample))[0]), 16))


def test_batches__leave_the_global_random_state_alone(photos: ShardDataset) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for workers in (0, 1):
        list(loader(photos, **RANDOM, num_workers=workers).batches(0, 2))
    assert torch.equal(before, torch.get_rng_state())


def test_batches__can_be_abandoned(photos: ShardDataset) -> None:
    for workers in (0, 1):
        stream = loader(photos, num_workers=workers).batches(0, 1000)
        assert next(stream).step == 0
        stream.close()  # type: ignore[attr-defined]


def test_batches__grey_pictures_for_a_colour_network(grey: ShardDataset) -> None:
    images = next(loader(grey, channels=3).batches(0, 1)).images
    assert images.shape == (8, 3, 16, 16)
    assert torch.equal(images[:, 0], images[:, 2])


def test_loader__batch_that_does_not_divide_into_ranks_is_refused(grey: ShardDataset) -> None:
    with pytest.raises(UserError, match="8 does not divide into 3 ranks; use 6"):
        loader(grey, world_size=3)


# -- masks -----------------------------------------------------------------------------------------------------------


class Asked(NamedTuple):
    """What a masking function was asked for, in the form of masks."""

    context: np.ndarray[Any, Any]  # (B, 2) sample and epoch
    targets: list[np.ndarray[Any, Any]]  # (B, 1) and (B, 3)
    rows: int

    def take(self, which: slice) -> Asked:
        return Asked(self.context[which], [cells[which] for cells in self.targets], self.rows)


def asked(*, step: int, epochs: np.ndarray[Any, Any], samples: np.ndarray[Any, Any]) -> Asked:
    return Asked(np.stack([samples, epochs], axis=1), [samples[:, None] * 7, np.tile(epochs[:, None], (1, 3))], step)


def test_masks__batch_over_two_epochs_has_an_epoch_per_sample(grey: ShardDataset) -> None:
    batch = next(loader(grey).batches(4, 5, asked))  # images 32 to 39 of epochs of 37
    assert batch.epoch == 0
    assert batch.masks.context[:, 1].tolist() == [0, 0, 0, 0, 0, 1, 1, 1]
    assert batch.masks.context[5:, 0].tolist() == order(3, 1, SAMPLES)[:3].tolist()
    np.testing.assert_array_equal(batch.global_epochs, batch.epochs)
    assert next(loader(grey).batches(4, 5)).masks is None


@pytest.mark.parametrize("kind", ["grey", "photos"])
def test_masks__workers_make_what_one_process_makes(kind: str, request: pytest.FixtureRequest) -> None:
    dataset = request.getfixturevalue(kind)
    alone = loader(dataset, **RANDOM).batches(0, 12, asked)
    workers = loader(dataset, **RANDOM, num_workers=2).batches(0, 12, asked)
    for ours, theirs in zip(workers, alone, strict=True):
        assert torch.equal(ours.images, theirs.images)
        assert type(ours.masks) is Asked
        assert ours.masks.rows == theirs.masks.rows == ours.step
        for a, b in zip(flat(ours.masks), flat(theirs.masks), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("workers", [0, 1])
def test_masks__ranks_together_have_those_of_the_global_batch(photos: ShardDataset, workers: int) -> None:
    whole = loader(photos).batches(0, 10, asked)
    ranks = [loader(photos, rank=r, world_size=2, num_workers=workers).batches(0, 10, asked) for r in range(2)]
    for batch, *shares in zip(whole, *ranks, strict=True):
        assert torch.equal(batch.images, torch.cat([share.images for share in shares]))
        for share in shares:
            np.testing.assert_array_equal(share.global_epochs, batch.epochs)
            assert share.masks.context[:, 0].tolist() == share.samples.tolist()
        parts = zip(*(flat(share.masks) for share in shares), strict=True)
        for ours, part in zip(flat(batch.masks), parts, strict=True):
            assert torch.equal(ours, torch.cat(part))


def flat(masks: Asked) -> list[torch.Tensor]:
    return [masks.context, *masks.targets]  # type: ignore[list-item]  # tensors by now


@pytest.mark.filterwarnings("error:The given NumPy array is not writable")
def test_masks__of_the_real_masking_function(photos: ShardDataset) -> None:
    config = validate({"data": {"image_size": 32}, "model": {"patch_size": 4}, "seed": 3})
    masking = MultiBlockMasking(config)
    batches = loader(photos, image_size=32, num_workers=1, rank=1, world_size=2).batches(3, 6, masking)
    for batch in batches:
        whole = masking(step=batch.step, epochs=batch.global_epochs, samples=batch.global_samples)
        assert torch.equal(batch.masks.context, torch.from_numpy(whole.context[4:]))
        for ours, theirs in zip(batch.masks.targets, whole.targets, strict=True):
            assert torch.equal(ours, torch.from_numpy(theirs[4:]))


@dataclass(frozen=True)
class Nested:
    inner: Asked
    pair: tuple[np.ndarray[Any, Any], str]


def test_workers__batches_that_are_kept_stay_as_they_were(photos: ShardDataset) -> None:
    """Workers write images into memory that they use again and again."""
    kept = list(loader(photos, num_workers=3).batches(0, 40))
    for batch, alone in zip(kept, loader(photos).batches(0, 40), strict=True):
        assert torch.equal(batch.images, alone.images)


def test_parked__is_pinned_from_its_slot(photos: ShardDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)  # which needs no GPU
    batch = loader(photos).batch(0, asked)
    slots = _Slots(2, tuple(batch.images.shape))
    slots.images[1, 2] = batch.images
    parked = _Parked(replace(batch, images=None), slots.number, (1, 2), len(batch.images))  # type: ignore[arg-type]
    pinned = parked.pin_memory()
    slots.images.zero_()
    assert torch.equal(pinned.images, batch.images)
    assert isinstance(pinned.masks.context, torch.Tensor)


def test_masks__any_structure_of_arrays_becomes_tensors() -> None:
    array = np.arange(6).reshape(3, 2)
    found = _tensors(Nested(Asked(array, [array, array + 1], 4), (array, "x")), pin=False)
    assert type(found.inner) is Asked
    assert torch.equal(found.inner.targets[1], torch.from_numpy(array + 1))
    assert found.inner.rows == 4
    assert torch.equal(found.pair[0], torch.from_numpy(array))
    assert found.pair[1] == "x"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs a GPU")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["grey", "photos"])
def test_masks__are_pinned_beside_a_gpu(kind: str, workers: int, request: pytest.FixtureRequest) -> None:
    dataset = request.getfixturevalue(kind)
    plain = loader(dataset).batches(0, 5, asked)
    pinned = loader(dataset, num_workers=workers, pin_memory=True).batches(0, 5, asked)
    for ours, theirs in zip(pinned, plain, strict=True):
        assert ours.images.is_pinned()
        assert torch.equal(ours.images, theirs.images)
        for a, b in zip(flat(ours.masks), flat(theirs.masks), strict=True):
            assert a.is_pinned()
            assert torch.equal(a, b)


# -- what the trainer relies on --------------------------------------------------------------------------------------


def test_normalize__gives_the_numbers_of_the_exported_model(photos: ShardDataset) -> None:
    train = loader(photos)
    images = next(train.batches(0, 1)).images
    for _ in range(2):
        assert torch.equal(train.normalize(images), normalize(images, **photos.statistics))


def test_batches__without_shuffling_follow_the_split(photos: ShardDataset) -> None:
    batches = list(loader(photos, shuffle=False, rank=1, world_size=2).batches(0, SAMPLES // 8))
    assert np.concatenate([batch.global_samples for batch in batches]).tolist() == list(range(SAMPLES // 8 * 8))
    assert batches[1].samples.tolist() == [12, 13, 14, 15]


SIGNALLED = """
import os, signal, sys, time
from pathlib import Path
from typing import NamedTuple
import numpy as np
from hjepa.config import DataConfig
from hjepa.data.loader import ShardDataset, TrainLoader
from hjepa.data.prepare import prepare
from hjepa.data.sources import ArraySplit, Source

images = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
folder = Path(sys.argv[1])
manifest = prepare(Source("grey", "", {"train": ArraySplit(images, None)}), DataConfig(channels=1), folder).manifest
loader = TrainLoader(
    ShardDataset(manifest, "train", folder.joinpath), batch_size=8, seed=0, image_size=8, channels=1,
    crop_scale=(0.5, 1.0), horizontal_flip=False, num_workers=2,
)
noted = []
signal.signal(signal.SIGTERM, lambda *_: noted.append(1))
for batch in loader.batches(0, 20):
    if batch.step == 1:
        os.killpg(0, signal.SIGTERM)
print(batch.step, noted, flush=True)

class Large(NamedTuple):
    context: np.ndarray
    def take(self, which):
        return self

batches = loader.batches(0, 1000, lambda **_: Large(np.zeros(1_000_000)))
next(batches)
print("going", flush=True)
time.sleep(600)
"""


def test_workers__outlive_a_signal_to_the_group_but_not_a_killed_parent(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SIGNALLED, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "19 [1]\n"
            assert process.stdout.readline() == "going\n"
            workers = psutil.Process(process.pid).children()
        finally:
            process.kill()
    assert len(workers) == 2
    deadline = time.monotonic() + 10
    while any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


# -- data set --------------------------------------------------------------------------------------------------------


def test_dataset__missing_split_is_named(grey: ShardDataset) -> None:
    manifest = {"name": "grey", "channels": 1, "splits": {"train": {}}}
    with pytest.raises(UserError, match="no test split, only train"):
        ShardDataset(manifest, "test", Path("/nowhere").joinpath)


@pytest.mark.parametrize("workers", [0, 1])
def test_dataset__damaged_bytes_are_never_trained_on(tmp_path: Path, workers: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8), dtype=np.uint8)
    source = Source("grey", "made here", {"train": ArraySplit(images, None)})
    manifest = prepare(source, DataConfig(channels=1), tmp_path).manifest
    dataset = ShardDataset(
        {**manifest, "splits": {"train": {**manifest["splits"]["train"], "shape": None}}}, "train", tmp_path.joinpath
    )
    shard = tmp_path / "train-000000.tar"
    content = bytearray(shard.read_bytes())
    content[10 * 1024 + 600] ^= 1
    shard.write_bytes(content)
    with pytest.raises(HjepaError, match=r"^sample \d+ of the train split is damaged in .*train-000000\.tar"):
        list(loader(dataset, num_workers=workers).batches(0, 3))
    shard.write_bytes(content[:2000])
    with pytest.raises(HjepaError, match="damaged"):
        dataset.read_bytes(19)


def test_dataset__shards_are_fetched_once_and_when_needed(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (40, 200, 200, 3), dtype=np.uint8)
    source = Source("big", "made here", {"train": ArraySplit(images, None)})
    manifest = prepare(source, DataConfig(shard_mb=1), tmp_path).manifest
    asked: list[str] = []

    def fetch(key: str) -> Path:
        asked.append(key)
        return tmp_path / key

    dataset = ShardDataset(manifest, "train", fetch)
    assert asked == ["train.index"]
    for i in (0, 1, 0, 39):
        np.testing.assert_array_equal(dataset.read(i)[0], images[i].transpose(2, 0, 1))
    assert asked == ["train.index", "train-000000.tar", manifest["splits"]["train"]["shards"][-1]["key"]]


def test_in_memory__respects_budget_and_limit(grey: ShardDataset, photos: ShardDataset) -> None:
    assert photos.in_memory() is None  # sizes differ
    assert grey.in_memory(budget_bytes=SAMPLES * 144 - 1) is None
    whole = grey.in_memory(budget_bytes=SAMPLES * 144)
    part = grey.in_memory(limit=5)
    assert whole is not None
    assert part is not None
    np.testing.assert_array_equal(part, whole[:5])
    assert whole.shape == (SAMPLES, 1, 12, 12)


# -- evaluation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("limit", [None, 10])
def test_eval_loader__every_image_once_in_order(photos: ShardDataset, workers: int, limit: int | None) -> None:
    batches = list(EvalLoader(photos, batch_size=8, image_size=16, channels=3, num_workers=workers, limit=limit))
    images = torch.cat([batch.images for batch in batches])
    count = limit or SAMPLES
    expected = torch.stack([eval_view(torch.from_numpy(photos.read(i)[0]), 16) for i in range(count)])
    assert torch.equal(images, expected)
    assert np.concatenate([batch.labels for batch in batches]).tolist() == photos.labels()[:count].tolist()


def test_read__gives_the_stored_pixels(photos: ShardDataset) -> None:
    for i in range(3):
        image, label = photos.read(i)
        pil = np.asarray(Image.open(io.BytesIO(photos.read_bytes(i))))
        np.testing.assert_array_equal(image, pil.transpose(2, 0, 1))
        assert label == photos.labels()[i]


# -- from a store, through the cache ---------------------------------------------------------------------------------

BLOCK_BYTES = 4_000  # 3 or so of the photos


class Streamed(NamedTuple):
    dataset: ShardDataset
    asked: list[tuple[str, int]]  # key and first byte of every request; of this process alone


@pytest.fixture
def streamed(photos: ShardDataset, tmp_path: Path) -> Callable[..., Streamed]:
    """The photos as they are read from a store, with a cache that holds them all or a share of them."""

    def make(
        share: float = 10.0, *, cache: str = "cache", block_bytes: int = BLOCK_BYTES, bytes_per_second: float = 1e9
    ) -> Streamed:
        asked: list[tuple[str, int]] = []

        def get(key: str, first: int, length: int) -> bytes:
            asked.append((key, first))
            time.sleep(length / bytes_per_second)
            with photos.fetch(key).open("rb") as file:
                file.seek(first)
                return file.read(length)

        total = sum(shard["bytes"] for shard in photos.manifest["splits"]["train"]["shards"])
        remote = Remote(get, str, BlockCache(tmp_path / cache, limit_bytes=int(share * total)), block_bytes)
        return Streamed(ShardDataset(photos.manifest, "train", photos.fetch, remote=remote), asked)

    return make


@pytest.mark.parametrize(("n", "blocks", "window"), [(1, 1, 1), (37, 5, 1), (37, 37, 4), (5000, 50, 8), (999, 9, 100)])
def test_windows__give_a_permutation_that_uses_few_blocks_at_a_time(n: int, blocks: int, window: int) -> None:
    block_of = np.arange(n) * blocks // n
    windows = Windows(block_of, window)
    for epoch in range(3):
        visited = windows.order(3, epoch)
        assert sorted(visited) == list(range(n))
        first, last = np.full(blocks, n), np.zeros(blocks, dtype=int)
        np.minimum.at(first, block_of[visited], np.arange(n))
        np.maximum.at(last, block_of[visited], np.arange(n))
        in_use = [int(((first <= position) & (last >= position)).sum()) for position in range(n)]
        assert max(in_use) <= min(blocks, window + 1)
    assert n < 10 or not np.array_equal(windows.order(3, 0), windows.order(3, 1))
    assert n < 10 or not np.array_equal(windows.order(3, 0), windows.order(4, 0))


def test_windows__never_change() -> None:
    assert Windows(np.arange(12) // 3, 2).order(0, 0).tolist() == [4, 5, 10, 3, 9, 11, 8, 1, 6, 7, 2, 0]


def test_windows__every_sample_is_early_equally_often() -> None:
    windows = Windows(np.arange(40) // 4, 3)
    firsts = np.bincount(np.concatenate([windows.order(seed, 0)[:4] for seed in range(2000)]), minlength=40)
    assert firsts.min() > 140
    assert firsts.max() < 260


def test_order__is_random_for_what_fits_and_in_windows_for_the_rest(
    streamed: Callable[..., Streamed], grey: ShardDataset, photos: ShardDataset
) -> None:
    for dataset in (grey, photos, streamed().dataset):
        made = loader(dataset)
        assert made.order == "random"
        visited = np.concatenate([made.batch(step).samples for step in range(5)])[:SAMPLES]
        assert visited.tolist() == order(3, 0, SAMPLES).tolist()
    dataset = streamed(0.8).dataset
    assert dataset.stream is not None
    made = loader(dataset, window_bytes=2 * BLOCK_BYTES)
    assert made.order == "random in windows of 2 blocks of 0.004 MB"
    visited = np.concatenate([made.batch(step).samples for step in range(5)])[:SAMPLES]
    assert visited.tolist() == Windows(dataset.stream.block_of, 2).order(3, 0).tolist()
    assert loader(dataset).order == "random in windows of 4 blocks of 0.004 MB"  # a quarter of the cache
    assert loader(dataset, shuffle=False).order == "as stored"


@pytest.mark.parametrize("share", [10.0, 0.8])
def test_elastic__ranks_and_workers_change_and_every_image_comes_once_per_epoch(
    streamed: Callable[..., Streamed], share: float
) -> None:
    """4 steps by 1 rank, 5 by 2, 6 by 3, with as many kinds of workers, from a cache that they share."""
    straight = list(loader(streamed(share, cache="straight").dataset, batch_size=12, **RANDOM).batches(0, 16))
    start = 0
    seen: list[int] = []
    for world_size, workers, steps in ((1, 0, 4), (2, 1, 5), (3, 3, 6), (1, 3, 1)):
        ranks = [
            loader(
                streamed(share).dataset, batch_size=12, rank=rank, world_size=world_size, num_workers=workers, **RANDOM
            ).batches(start, start + steps)
            for rank in range(world_size)
        ]
        for whole, *parts in zip(straight[start : start + steps], *ranks, strict=True):
            assert torch.equal(whole.images, torch.cat([part.images for part in parts]))
            seen += np.concatenate([part.samples for part in parts]).tolist()
            assert whole.samples.tolist() == seen[-12:]
        start += steps
    assert start == len(straight) > 5 * SAMPLES / 12
    for epoch in range(len(seen) // SAMPLES):
        assert sorted(seen[epoch * SAMPLES : (epoch + 1) * SAMPLES]) == list(range(SAMPLES))


def test_streamed__what_fits_is_asked_for_in_the_first_epoch_alone(streamed: Callable[..., Streamed]) -> None:
    dataset, asked = streamed()
    assert dataset.stream is not None
    batches = loader(dataset).batches(0, 40)
    for batch in batches:
        if batch.step == 0:
            end = time.monotonic() + 10
            while len(set(asked)) < len(dataset.stream) and time.monotonic() < end:
                time.sleep(0.01)  # everything is read ahead, however slow training is
            assert len(set(asked)) == len(dataset.stream)
        if batch.step == 5:
            asked.clear()
    assert asked == []
    list(loader(streamed().dataset).batches(0, 40))
    again = streamed()
    list(loader(again.dataset).batches(100, 105))
    assert again.asked == []


def test_streamed__in_windows_a_block_is_asked_for_about_once_per_epoch(streamed: Callable[..., Streamed]) -> None:
    dataset, asked = streamed(0.4, block_bytes=3 * BLOCK_BYTES)
    assert dataset.stream is not None
    for _ in loader(dataset, batch_size=1).batches(0, 3 * SAMPLES):
        time.sleep(0.002)
    blocks = len(dataset.stream)
    assert 1.5 * blocks < len(asked) < 3.6 * blocks
    assert 3.6 * blocks < 0.4 * 3 * SAMPLES  # what it would be at least in random order


@pytest.mark.parametrize("share", [10.0, 0.8])
@pytest.mark.parametrize("workers", [0, 2])
def test_streamed__first_batch_waits_for_its_images_alone(
    streamed: Callable[..., Streamed], share: float, workers: int
) -> None:
    """A block of 30 kB takes 3 s, an image less than 0.3."""
    dataset, _ = streamed(share, block_bytes=30_000, bytes_per_second=10_000)
    start = time.monotonic()
    stream = loader(dataset, batch_size=4, num_workers=workers).batches(5, 1000)
    assert next(stream).step == 5
    assert time.monotonic() - start < 2.5
    stream.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("workers", [0, 1])
def test_streamed__a_store_with_other_bytes_is_an_error_that_names_them(
    streamed: Callable[..., Streamed], workers: int, photos: ShardDataset
) -> None:
    dataset, _ = streamed()
    stream = dataset.stream
    assert stream is not None
    sound = stream.remote.get

    def get(key: str, first: int, length: int) -> bytes:
        return bytes(reversed(sound(key, first, length)))

    stream.remote = replace(stream.remote, get=get)
    with pytest.raises(HjepaError, match=r"^sample \d+ of the train split \(train-000000\.tar, bytes \d+ to \d+\)"):
        list(loader(dataset, num_workers=workers).batches(0, 3))


@pytest.mark.parametrize("workers", [0, 2])
def test_streamed__eval_loader_reads_each_block_once(streamed: Callable[..., Streamed], workers: int) -> None:
    dataset, asked = streamed(0.8)
    assert dataset.stream is not None
    labels = [
        batch.labels for batch in EvalLoader(dataset, batch_size=8, image_size=16, channels=3, num_workers=workers)
    ]
    assert np.concatenate(labels).tolist() == dataset.labels().tolist()
    assert len(asked) == (len(dataset.stream) if workers == 0 else 0)  # of this process


def test_streamed__small_sets_of_one_size_are_held_in_memory(grey: ShardDataset, tmp_path: Path) -> None:
    asked = []

    def get(key: str, first: int, length: int) -> bytes:
        asked.append(first)
        return grey.fetch(key).read_bytes()[first : first + length]

    remote = Remote(get, str, BlockCache(tmp_path, limit_bytes=5_000), 1_000)  # far too small, and not needed
    dataset = ShardDataset(grey.manifest, "train", grey.fetch, remote=remote)
    made = loader(dataset)
    assert made.order == "random"
    asked.clear()
    for ours, theirs in zip(made.batches(0, 10), loader(grey).batches(0, 10), strict=True):
        assert torch.equal(ours.images, theirs.images)
    assert asked == []
