"""Shards read from a real S3 server through the block cache: damage, limits, kills, many processes, a bad network."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faulty_proxy import FaultyProxy, faulty_proxy

from hjepa.adapters import s3
from hjepa.adapters.s3 import ObjectNotFoundError, S3Store
from hjepa.config import DataConfig
from hjepa.data import cache as cache_module
from hjepa.data.cache import FULL, LOCKS, BlockCache, Filled, ReadAhead, Remote, ShardStream
from hjepa.data.loader import ShardDataset
from hjepa.data.prepare import prepare
from hjepa.data.sources import ArraySplit, Source
from hjepa.errors import HjepaError, UserError

SAMPLES = 200
BLOCK_BYTES = 40_000  # 3 to 4 images


@dataclass
class Prepared:
    """A data set of 3 shards on this machine and in the store."""

    manifest: dict[str, Any]
    folder: Path
    local: ShardDataset
    key: str  # of the folder in the store

    @property
    def shards(self) -> list[dict[str, Any]]:
        shards: list[dict[str, Any]] = self.manifest["splits"]["train"]["shards"]
        return shards

    @property
    def bytes(self) -> int:
        return sum(shard["bytes"] for shard in self.shards)


@pytest.fixture(scope="module")
def prepared(stack_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    images = np.random.default_rng(0).integers(0, 256, (SAMPLES, 61, 61, 3), dtype=np.uint8)
    folder = tmp_path_factory.mktemp("prepared")
    made = prepare(Source("noise", "", {"train": ArraySplit(images, None)}), DataConfig(shard_mb=1), folder)
    key, store = "block-cache", S3Store("s3://hjepa/tests")
    for file in made.files:
        store.put_file(f"{key}/{file.key}", file.path, sha256=file.sha256)
    assert len(made.manifest["splits"]["train"]["shards"]) == 3
    return Prepared(made.manifest, folder, ShardDataset(made.manifest, "train", folder.joinpath), key)


@pytest.fixture
def proxy(stack_environment: dict[str, str]) -> Iterator[tuple[str, FaultyProxy]]:
    with faulty_proxy(stack_environment["AWS_ENDPOINT_URL"]) as made:
        yield made


@dataclass
class Store:
    """What a stream reads from, with every request written down."""

    prepared: Prepared
    endpoint: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    asked: list[tuple[str, int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.store = S3Store("s3://hjepa/tests", endpoint_url=self.endpoint, **self.options)

    def get(self, key: str, first: int, length: int) -> bytes:
        self.asked.append((key, first, length))
        return self.store.get_bytes(f"{self.prepared.key}/{key}", start=first, length=length)

    def remote(self, cache: BlockCache) -> Remote:
        name = self.prepared.key
        return Remote(self.get, lambda key: self.store.uri(f"{name}/{key}"), cache, BLOCK_BYTES)


def open_stream(store: Store, folder: Path, limit: int = 10**9, **options: Any) -> ShardStream:
    cache = BlockCache(folder, limit_bytes=limit, **options)
    prepared = store.prepared
    dataset = ShardDataset(prepared.manifest, "train", prepared.folder.joinpath, remote=store.remote(cache))
    assert dataset.stream is not None
    return dataset.stream


def files_of(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_file()]


def held(folder: Path) -> int:
    return sum(path.stat().st_size for path in files_of(folder))


def read_all(stream: ShardStream, prepared: Prepared, order: Iterator[int] | range = range(SAMPLES)) -> None:
    for i in order:
        assert stream.read(i) == prepared.local.read_bytes(i), i


# -- blocks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_bytes", [1, 5_000, BLOCK_BYTES, 10**9])
def test_blocks__hold_whole_samples_and_each_sample_once(prepared: Prepared, tmp_path: Path, block_bytes: int) -> None:
    remote = Remote(lambda *_: b"", str, BlockCache(tmp_path, limit_bytes=10**9), block_bytes)
    index = prepared.local._index
    stream = ShardStream(remote, prepared.shards, index, "train")
    assert set(stream.block_of.tolist()) == set(range(len(stream)))
    for i, block in enumerate(stream.block_of.tolist()):
        shard, offset, length, *_ = index[i].item()
        assert stream._shard_of[block] == shard
        assert stream._first[block] <= offset < offset + length <= stream._stop[block]
    spans = sorted(zip(stream._shard_of, stream._first.tolist(), stream._stop.tolist(), strict=True))
    assert all(a[0] < b[0] or a[2] <= b[1] for a, b in itertools.pairwise(spans))
    assert len(stream) == {1: SAMPLES, 10**9: 3}.get(block_bytes, len(stream))
    longest = int(index["length"].max())
    assert int((stream._stop - stream._first).max()) < max(block_bytes, 1) + longest + 1024


def test_read__each_block_is_asked_for_once_and_never_again(prepared: Prepared, tmp_path: Path) -> None:
    store = Store(prepared)
    stream = open_stream(store, tmp_path)
    assert store.asked == []
    read_all(stream, prepared, iter(random.Random(0).sample(range(SAMPLES), SAMPLES)))
    assert len(store.asked) == len(set(store.asked)) == len(stream)
    assert sum(length for *_, length in store.asked) < prepared.bytes
    again = Store(prepared)
    for _ in range(2):
        read_all(open_stream(again, tmp_path), prepared)
    assert again.asked == []


def test_read_many__fetches_blocks_of_much_and_single_samples_of_little(prepared: Prepared, tmp_path: Path) -> None:
    store = Store(prepared)
    stream = open_stream(store, tmp_path)
    stream.remote = Remote(store.get, str, stream.cache, 10**9)
    big = ShardStream(stream.remote, prepared.shards, prepared.local._index, "train")
    wanted = [3, 199, 3, *range(100, 140)]
    assert big.read_many(wanted, sparse=True) == [prepared.local.read_bytes(i) for i in wanted]
    lengths = [int(prepared.local._index["length"][i]) for i in (3, 199)]
    singles = sorted(length for *_, length in store.asked)[:-1]
    assert singles == sorted(lengths)  # of the shards of which only one image is wanted
    assert len(files_of(tmp_path)) == 1
    store.asked.clear()
    assert big.read_many(wanted, sparse=False) == [prepared.local.read_bytes(i) for i in wanted]
    assert len(store.asked) == 2
    assert big.read_many(wanted, sparse=False) == big.read_many(wanted, sparse=True)
    assert len(store.asked) == 2


# -- damage ----------------------------------------------------------------------------------------------------------


def test_damaged_block__is_noticed_and_fetched_again(prepared: Prepared, tmp_path: Path) -> None:
    store, warnings = Store(prepared), []
    stream = open_stream(store, tmp_path, warn=warnings.append)
    read_all(stream, prepared)
    flipped = 0
    for number, path in enumerate(sorted(files_of(tmp_path))):
        content = bytearray(path.read_bytes())
        how = ("flipped", "torn", "empty", "longer", "gone")[number % 5]
        path.unlink()
        if how == "flipped":
            flipped += 1
            content[number * 997 % 5000] ^= 1 << number % 8  # of the first sample
        if how != "gone":
            size = {"torn": len(content) // 2, "empty": 0}.get(how, len(content))
            path.write_bytes(content[:size] + (b"x" if how == "longer" else b""))
    store.asked.clear()
    read_all(stream, prepared)
    read_all(open_stream(store, tmp_path), prepared)
    assert len(store.asked) == len(stream)
    assert len(warnings) == flipped > 5
    assert all("is damaged and is fetched again" in warning for warning in warnings)


def test_damaged_block__is_not_removed_once_it_is_replaced(prepared: Prepared, tmp_path: Path) -> None:
    """One process found the damage and mended it while another one had the damaged file open."""
    store = Store(prepared)
    ours, theirs = (open_stream(store, tmp_path, warn=lambda _: None) for _ in range(2))
    name, size = ours._file(0)
    read_all(ours, prepared, range(2))
    sound = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(bytes(size))
    assert theirs.cache.read(name, size, 0, 10) == bytes(10)  # open
    read_all(ours, prepared, range(2))
    assert (tmp_path / name).read_bytes() == sound
    store.asked.clear()
    read_all(theirs, prepared, range(2))
    assert store.asked == []


def test_whole_shard__is_read_without_s3_until_it_is_damaged(prepared: Prepared, tmp_path: Path) -> None:
    store, warnings = Store(prepared), []
    cache = BlockCache(tmp_path / "cache", limit_bytes=10**9)
    for shard in prepared.shards:
        copy = tmp_path / "copy"
        copy.write_bytes((prepared.folder / shard["key"]).read_bytes())
        cache.adopt(copy, shard["sha256"])
        assert not copy.exists()
    stream = open_stream(store, cache.folder, warn=warnings.append)
    read_all(stream, prepared)
    stream.fetch(range(SAMPLES))
    assert store.asked == []
    first = cache.folder / prepared.shards[0]["sha256"]
    content = bytearray(first.read_bytes())
    content[600] ^= 1
    first.write_bytes(content)
    read_all(stream, prepared)
    assert {key for key, *_ in store.asked} == {prepared.shards[0]["key"]}
    assert len(warnings) == 1
    assert not first.exists()
    assert all((cache.folder / shard["sha256"]).exists() for shard in prepared.shards[1:])


def test_wrong_object__is_an_error_that_names_object_and_bytes(prepared: Prepared, tmp_path: Path) -> None:
    store = Store(prepared)
    shard, offset, length, *_ = prepared.local._index[7].item()
    sound = store.get

    def get(key: str, first: int, size: int) -> bytes:
        data = bytearray(sound(key, first, size))
        place = offset + 3 - first
        if key == prepared.shards[shard]["key"] and 0 <= place < len(data):
            data[place] ^= 1
        return bytes(data)

    store.get = get  # type: ignore[method-assign]
    stream = open_stream(store, tmp_path)
    message = rf"sample 7 of the train split \(s3://hjepa/.*train-000000.tar, bytes {offset} to {offset + length}\)"
    for read in (stream.read, lambda i: stream.read_many([i], sparse=True)):
        store.asked.clear()
        with pytest.raises(HjepaError, match=message):
            read(7)
        assert len(store.asked) == cache_module.TRIES
    assert files_of(tmp_path) == []
    block = int(stream.block_of[7])
    read_all(stream, prepared, (i for i in range(SAMPLES) if stream.block_of[i] != block))


# -- limit -----------------------------------------------------------------------------------------------------------


def test_limit__is_kept_at_every_moment(prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "TOUCH_SECONDS", 0.0)
    limit = prepared.bytes // 3
    stream = open_stream(Store(prepared), tmp_path, limit)
    assert not stream.fits
    for i in random.Random(1).sample(range(SAMPLES), SAMPLES):
        assert stream.read(i) == prepared.local.read_bytes(i)
        assert held(tmp_path) <= limit
    assert held(tmp_path) > 0.7 * limit


def test_limit__least_recently_used_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "TOUCH_SECONDS", 0.0)
    cache = BlockCache(tmp_path, limit_bytes=1000)
    for name in "abcdefghij":
        assert cache.fill(name, 100, lambda: bytes(100)) is Filled.KEPT
        time.sleep(0.01)
    for name in "cab":  # used again, in whatever way
        assert cache.has(name, 100) if name == "a" else cache.read(name, 100, 0, 5) == bytes(5)
        os.utime(tmp_path / "d", ns=(time.time_ns(), (tmp_path / "d").stat().st_mtime_ns))  # atime alone says nothing
        time.sleep(0.01)
    cache.fill("k", 100, lambda: bytes(100))
    assert {path.name for path in files_of(tmp_path)} == set("abcfghijk")
    cache.fill("l", 300, lambda: bytes(300))
    assert {path.name for path in files_of(tmp_path)} == set("abcijkl")
    assert cache.fill("m", 1001, lambda: bytes(1001)) is Filled.REFUSED


def test_limit__of_two_runs_that_share_the_folder(prepared: Prepared, tmp_path: Path) -> None:
    """Two streams of different blocks, as of two data sets, in turns."""
    limit = prepared.bytes // 2
    ours, theirs = Store(prepared), Store(prepared)
    first = open_stream(ours, tmp_path, limit)
    second = ShardStream(
        Remote(theirs.get, str, BlockCache(tmp_path, limit_bytes=limit), 3 * BLOCK_BYTES),
        prepared.shards,
        prepared.local._index,
        "train",
    )
    for i in random.Random(2).sample(range(SAMPLES), SAMPLES):
        assert first.read(i) == second.read(i) == prepared.local.read_bytes(i)
        assert held(tmp_path) <= limit


def test_set_that_fits__is_never_evicted_by_itself(prepared: Prepared, tmp_path: Path) -> None:
    limit = int(prepared.bytes / FULL) + 1
    (tmp_path / "old").write_bytes(bytes(limit // 2))  # of another run, long ago
    os.utime(tmp_path / "old", (1, 1))
    store = Store(prepared)
    stream = open_stream(store, tmp_path, limit)
    assert stream.fits
    for _ in range(3):
        read_all(stream, prepared, iter(random.Random(0).sample(range(SAMPLES), SAMPLES)))
    assert len(store.asked) == len(stream)
    assert not (tmp_path / "old").exists()


# -- folders that are of no use --------------------------------------------------------------------------------------


def test_folder__that_is_read_only_is_refused(make_disk: Callable[[str], Path]) -> None:
    disk = make_disk("4m")
    BlockCache(disk / "shards", limit_bytes=10**6)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(UserError, match=r"data\.cache_dir: .*Read-only.*Choose a folder that can be written to"):
        BlockCache(disk / "shards", limit_bytes=10**6)
    with pytest.raises(UserError, match=r"data\.cache_dir: .*Read-only"):
        BlockCache(disk / "new", limit_bytes=10**6)


def test_folder__that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"data\.cache_dir: .*Choose a folder"):
        BlockCache(tmp_path / "file", limit_bytes=10**6)


def test_folder__that_becomes_read_only_ends_with_words(prepared: Prepared, make_disk: Callable[[str], Path]) -> None:
    disk = make_disk("4m")
    stream = open_stream(Store(prepared), disk)
    stream.read(0)
    stream.cache.drop("close what is open")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(UserError, match=r"data\.cache_dir: .*Read-only"):
        read_all(stream, prepared)


def test_folder__that_is_removed_while_a_block_is_on_its_way_is_made_again(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    cache = BlockCache(folder, limit_bytes=1000)

    def fetch() -> bytes:
        shutil.rmtree(folder)
        return b"block"

    assert cache.fill("name", 5, fetch) == Filled.KEPT
    assert cache.read("name", 5, 0, 5) == b"block"


def test_folder__that_cannot_be_written_is_still_read(make_disk: Callable[[str], Path]) -> None:
    disk = make_disk("4m")
    BlockCache(disk, limit_bytes=1000).fill("name", 5, lambda: b"block")
    cache = BlockCache(disk, limit_bytes=1000)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    assert cache.has("name", 5)
    assert cache.read("name", 5, 0, 5) == b"block"


def test_fill__an_object_that_is_gone_is_no_fault_of_the_folder(tmp_path: Path) -> None:
    def gone() -> bytes:
        raise ObjectNotFoundError("there is no object k")

    with pytest.raises(ObjectNotFoundError, match=r"^there is no object k$"):
        BlockCache(tmp_path, limit_bytes=1000).fill("name", 5, gone)


def test_disk__that_is_full_slows_down_and_harms_nothing(prepared: Prepared, small_disk: Path) -> None:
    """1 MiB for a set of 2.4 MB, and half of that is another's."""
    store, warnings = Store(prepared), []
    stream = open_stream(store, small_disk, warn=warnings.append)
    (small_disk / "another's").write_bytes(b"")
    other = small_disk / LOCKS / "checkpoint"  # which the cache does not count
    other.write_bytes(bytes(500_000))
    for _ in range(2):
        read_all(stream, prepared)
        spare = os.statvfs(small_disk)
        assert spare.f_bavail * spare.f_frsize >= 0.04 * 2**20
    other.write_bytes(bytes(2**20 - held(small_disk) - 200_000))
    with (small_disk / LOCKS / "rest").open("wb", buffering=0) as rest, contextlib.suppress(OSError):
        while True:
            rest.write(bytes(4096))
    assert os.statvfs(small_disk).f_bavail == 0
    read_all(stream, prepared)
    assert len(warnings) == 1
    assert "is full" in warnings[0]
    for path in (other, small_disk / LOCKS / "rest"):
        path.unlink()
    store.asked.clear()
    for _ in range(2):
        stream.read(0)
    assert len(store.asked) <= 1


# -- several processes -----------------------------------------------------------------------------------------------


def _read_in_child(store: Store, folder: Path, seed: int, failures: Any) -> None:
    try:
        stream = open_stream(store, folder)
        order = random.Random(seed).sample(range(SAMPLES), SAMPLES)
        for start in range(0, SAMPLES, 20):
            part = order[start : start + 20]
            assert stream.read_many(part, sparse=False) == [store.prepared.local.read_bytes(i) for i in part]
    except BaseException as error:
        failures.put(repr(error))
        raise


def test_processes__together_ask_for_each_block_once(
    prepared: Prepared, tmp_path: Path, proxy: tuple[str, FaultyProxy]
) -> None:
    url, seen = proxy
    seen.delay = 0.02  # time enough for the others to want the same
    context = multiprocessing.get_context("fork")
    failures = context.Queue()
    store = Store(prepared, url)
    children = [context.Process(target=_read_in_child, args=(store, tmp_path, seed, failures)) for seed in (0, 0, 1, 2)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0] * len(children), failures.get(timeout=1)
    assert len(seen.ranges) == len(set(seen.ranges)) == len(open_stream(store, tmp_path))


def test_cache__pickles(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, limit_bytes=10**6)
    cache.fill("a", 10, lambda: bytes(10))
    cache.read("a", 10, 0, 1)
    assert pickle.loads(pickle.dumps(cache)).read("a", 10, 2, 3) == bytes(3)  # noqa: S301 - made a moment ago


def test_lock__is_not_kept_by_a_process_that_was_forked_meanwhile(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, limit_bytes=10**6)
    inside, go_on = threading.Event(), threading.Event()

    def slow() -> bytes:
        inside.set()
        go_on.wait()
        raise HjepaError("no answer")

    def fill() -> None:
        with pytest.raises(HjepaError):
            cache.fill("a", 10, slow)

    thread = threading.Thread(target=fill)
    thread.start()
    inside.wait()
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    try:
        assert cache.fill("a", 10, lambda: bytes(10), wait=False) is Filled.BUSY
        go_on.set()
        thread.join()
        assert cache.fill("a", 10, lambda: bytes(10), wait=False) is Filled.KEPT
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


FILLER = """
import os, random, sys
from pathlib import Path
from hjepa.data import cache
from hjepa.data.cache import BlockCache
content = {f"{k:02d}": bytes([k]) * (20_000 + 1000 * k) for k in range(40)}
made = BlockCache(Path(sys.argv[1]), limit_bytes=500_000)
print("started", flush=True)
draw = random.Random(os.getpid())
while True:
    name = draw.choice(list(content))
    made.fill(name, len(content[name]), lambda: content[name])
"""


def test_sigkill__at_any_moment_leaves_a_sound_cache(tmp_path: Path) -> None:
    """Two processes that fetch and evict at full speed, killed again and again."""
    draw = random.Random(0)
    for _ in range(6):
        fillers = [
            subprocess.Popen([sys.executable, "-c", FILLER, str(tmp_path)], stdout=subprocess.PIPE) for _ in range(2)
        ]
        for filler in fillers:
            assert filler.stdout is not None
            assert filler.stdout.readline() == b"started\n"
        time.sleep(draw.uniform(0.0, 0.15))
        for filler in fillers:
            filler.kill()
            filler.wait()
            assert filler.stdout is not None
            filler.stdout.close()
        for path in files_of(tmp_path):
            if not path.name.startswith("."):
                assert path.read_bytes() == bytes([int(path.name)]) * (20_000 + 1000 * int(path.name))
        cache = BlockCache(tmp_path, limit_bytes=500_000)
        named = sum(path.stat().st_size for path in files_of(tmp_path) if not path.name.startswith("."))
        assert int((tmp_path / LOCKS / "bytes").read_text()) == named <= 500_000
        for k in range(40):  # no lock is left
            assert cache.fill(f"{k:02d}", 20_000 + 1000 * k, lambda k=k: bytes([k]) * (20_000 + 1000 * k), wait=False)
    left = tmp_path / ".new-of-a-killed-one"
    left.write_bytes(b"half")
    os.utime(left, (1, 1))
    BlockCache(tmp_path, limit_bytes=500_000)
    assert not left.exists()


# -- a bad network ---------------------------------------------------------------------------------------------------

FAULTS = ["500", "503", "reset", "truncated", "flipped", "slow", "stalled"]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "_SLOW_SECONDS", 0.3)
    monkeypatch.setattr(s3, "_CHUNK_BYTES", 1024)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("fault", FAULTS)
def test_fault__is_got_over(prepared: Prepared, tmp_path: Path, proxy: tuple[str, FaultyProxy], fault: str) -> None:
    url, faulty = proxy
    stream = open_stream(Store(prepared, url, {"read_timeout_seconds": 0.5}), tmp_path)
    faulty.faults.extend([fault, "", fault, ""])
    read_all(stream, prepared, range(20))
    assert not faulty.faults
    assert len(faulty.ranges) == 2 + len(set(faulty.ranges))  # asked again for what had failed


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("500", "500 InternalError"),
        ("503", "503 SlowDown"),
        ("reset", "cannot read s3://hjepa/tests/block-cache/train-000000.tar"),
        ("truncated", "cannot read s3://hjepa/tests/block-cache/train-000000.tar"),
        ("flipped", r"sample 0 of the train split .*checksum is wrong in each of 3 answers"),
        ("slow", "cannot read s3://hjepa/tests/block-cache/train-000000.tar"),
        ("stalled", "cannot read s3://hjepa/tests/block-cache/train-000000.tar"),
    ],
)
def test_fault__without_end_is_an_error_and_nothing_is_kept(
    prepared: Prepared, tmp_path: Path, proxy: tuple[str, FaultyProxy], fault: str, message: str
) -> None:
    url, faulty = proxy
    stream = open_stream(Store(prepared, url, {"attempts": 2, "read_timeout_seconds": 0.3}), tmp_path)
    faulty.endless = fault
    with pytest.raises(HjepaError, match=message):
        stream.read(0)
    assert files_of(tmp_path) == []
    faulty.endless = ""
    read_all(stream, prepared, range(5))


# -- reading ahead ---------------------------------------------------------------------------------------------------


def wait_until(what: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_read_ahead__in_order_and_so_far_and_no_further(prepared: Prepared, tmp_path: Path) -> None:
    store = Store(prepared)
    stream = open_stream(store, tmp_path)
    order = np.random.default_rng(0).permutation(len(stream)).tolist()
    ahead = ReadAhead(
        stream, lambda start: iter([(start + 10 * k, b) for k, b in enumerate(order)]), blocks=5, threads=1
    )
    try:
        ahead.at(0)  # the first block is due; five are not
        wait_until(lambda: len(store.asked) == 6)
        time.sleep(0.1)
        assert [first for _, first, _ in store.asked] == [int(stream._first[block]) for block in order[:6]]
        ahead.at(30)
        wait_until(lambda: len(store.asked) == 9)
        time.sleep(0.1)
        assert len(store.asked) == 9
    finally:
        ahead.close()
    ahead.at(10**6)
    time.sleep(0.1)
    assert len(store.asked) == 9


def test_read_ahead__an_error_is_the_readers_to_tell(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "PAUSE_SECONDS", 0.01)
    store = Store(prepared)
    sound, failing = store.get, [True]

    def get(key: str, first: int, length: int) -> bytes:
        if failing[0]:
            store.asked.append((key, first, length))
            raise HjepaError("the server is away")
        return sound(key, first, length)

    store.get = get  # type: ignore[method-assign]
    stream = open_stream(store, tmp_path)
    ahead = ReadAhead(stream, lambda start: iter((b, b) for b in range(len(stream))), blocks=len(stream), threads=2)
    try:
        ahead.at(0)
        wait_until(lambda: len(store.asked) > 3)
        with pytest.raises(HjepaError, match="the server is away"):
            stream.read(SAMPLES - 1)
        failing[0] = False
        wait_until(lambda: stream.fill(len(stream) - 1, wait=False) is Filled.KEPT)
        read_all(stream, prepared)
    finally:
        ahead.close()


def test_read_ahead__comes_back_to_what_another_was_fetching(prepared: Prepared, tmp_path: Path) -> None:
    store = Store(prepared)
    stream = open_stream(store, tmp_path)
    name, size = stream._file(1)
    inside, go_on = threading.Event(), threading.Event()

    def dies() -> bytes:
        inside.set()
        go_on.wait()
        raise HjepaError("died")

    def other() -> None:
        with pytest.raises(HjepaError):
            stream.cache.fill(name, size, dies)

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait()
    ahead = ReadAhead(stream, lambda start: iter((b, b) for b in range(6)), blocks=6, threads=1)
    try:
        ahead.at(0)
        wait_until(lambda: len(files_of(tmp_path)) == 5)
        assert not (tmp_path / name).exists()
        go_on.set()
        thread.join()
        wait_until(lambda: (tmp_path / name).exists())
    finally:
        ahead.close()
