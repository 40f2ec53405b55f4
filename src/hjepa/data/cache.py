"""Shards in an object store, read block by block through a bounded cache on a disk of this machine.

A block is a run of whole samples of one shard, about ``data.block_mb`` long, so that no sample lies in two. The folder
may be shared by any number of processes and runs, and holds

- ``<sha256>.<first>-<stop>``: these bytes of the shard with that digest;
- ``<sha256>``: a whole file, such as a shard that was prepared on this machine;
- ``locks/``: one file per group of names, locked while a block of the group is fetched, and the ledger of bytes.

Files appear by renaming and are never changed, so a kill at any moment leaves whole files, and a temporary one that the
next clean-up removes. A file's modification time is set at each use: it says what was used least recently, whatever the
file system makes of access times.

A block needs no checksum of its own. The index has one of each sample; all of them are verified before a block is kept,
and that of a sample again whenever it is read. So a torn file or a flipped bit, on the way or on the disk, is noticed
before anything is trained on it, and fetched again. For the same reason nothing is synced to disk.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Any

import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray

from hjepa.errors import HjepaError, UserError
from hjepa.words import print_line

LOCKS = "locks"
LEDGER = "bytes"  # how much the folder holds; an estimate until it is counted anew
TEMPORARY = ".new-"
LOCK_GROUPS = 1024  # many more than requests in flight, or unrelated blocks wait for each other
FULL = 0.9  # of the limit: what is left after a clean-up, and the largest set that counts as one that fits
TOUCH_SECONDS = 10.0  # between two notes that a file is in use
STALE_SECONDS = 600.0  # after which a temporary file is a killed process's
SPARE_BYTES, SPARE_SHARE = 2**30, 0.05  # of the disk: the smaller of both is left to others, such as checkpoints
GETS_IN_FLIGHT = 8  # per rank
TRIES = 3  # to get the right bytes of an object
PAUSE_SECONDS = 5.0  # of reading ahead, after an error


def _print_warning(message: str) -> None:
    print_line(f"warning: {message}", sys.stderr)


class Filled(Enum):
    """What became of a block that was asked for."""

    KEPT = auto()  # it is in the cache
    BUSY = auto()  # another thread or process is fetching it
    REFUSED = auto()  # there is no room for it


class BlockCache:
    """Named immutable files in a folder, at most so many bytes of them; the least recently used ones go first.

    Args:
        folder: On a disk of this machine; made if it is not there.
        limit_bytes: Of all files together, whoever put them there; what is just being written comes on top.
        warn: Tells the person that the disk is full.

    Raises:
        UserError: the folder cannot be written to, or its file system has no locks.
    """

    def __init__(self, folder: Path, *, limit_bytes: int, warn: Callable[[str], None] = _print_warning):
        self.folder, self.limit_bytes, self.warn = folder, limit_bytes, warn
        self._touched: dict[str, float] = {}
        self._open = threading.local()
        self._warned = False
        with self._explained():
            (folder / LOCKS).mkdir(parents=True, exist_ok=True)
            # Now, for later the disk may be full.
            for group in {_group(k) for k in range(LOCK_GROUPS)} - set(os.listdir(folder / LOCKS)):
                (folder / LOCKS / group).touch()
            with self._locked(LEDGER) as ledger:
                _write_number(ledger, self._count())

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in {"_open", "_touched"}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _open=threading.local(), _touched={})

    def has(self, name: str, size: int) -> bool:
        """Whether the file is there in its full size; if so it counts as used now."""
        try:
            there = (self.folder / name).stat().st_size == size
        except FileNotFoundError:
            return False
        if there:
            self._touch(name)
        return there

    def read(self, name: str, size: int, offset: int, length: int) -> bytes | None:
        """``length`` bytes of a file from ``offset``; None if it is not there in its full ``size``.

        Each thread keeps the file that it read last open, and no other: an evicted file frees its space.
        """
        handle: _Handle | None = getattr(self._open, "handle", None)
        if handle is None or handle.name != name:
            try:
                handle = _Handle(name, self.folder / name)
            except FileNotFoundError:
                return None
            if os.fstat(handle.descriptor).st_size != size:
                return None
            self._open.handle = handle
        self._touch(name)
        try:
            return os.pread(handle.descriptor, length, offset)
        except OSError:  # a bad sector is damage like any other: the caller fetches the file again
            return b""

    def drop(self, name: str) -> None:
        """Remove a file that is damaged, unless another one has taken its place since this thread opened it."""
        handle: _Handle | None = getattr(self._open, "handle", None)
        self._open.handle = None
        path = self.folder / name
        with contextlib.suppress(FileNotFoundError):
            if handle is None or handle.name != name or os.fstat(handle.descriptor).st_ino == path.stat().st_ino:
                path.unlink()

    def fill(self, name: str, size: int, fetch: Callable[[], bytes], *, wait: bool = True) -> Filled:
        """Keep the ``size`` bytes that ``fetch`` returns under ``name``, unless they are there already.

        However many threads and processes ask at once, one fetches.

        Args:
            wait: For another one that is fetching it.

        Raises:
            UserError: the folder can no longer be written to.
            HjepaError: what ``fetch`` raises.
        """
        if self.has(name, size):
            return Filled.KEPT
        with self._explained(), self._locked(_group(isal_zlib.crc32(name.encode()) % LOCK_GROUPS), wait=wait) as lock:
            if lock is None:
                return Filled.BUSY
            if self.has(name, size):
                return Filled.KEPT
            if size > self.limit_bytes or not self._clear_disk(size):
                return Filled.REFUSED
            content = fetch()
            self.folder.mkdir(parents=True, exist_ok=True)  # somebody may have removed all of it meanwhile
            return Filled.KEPT if self._store(name, content) else Filled.REFUSED

    def adopt(self, path: Path, name: str) -> None:
        """Move a file of the same disk into the cache, if it fits, as a whole file that any reader may use."""
        with self._explained():
            if path.stat().st_size <= self.limit_bytes:
                self._put(path, name)

    # -- inside ------------------------------------------------------------------------------------------------------

    def _store(self, name: str, content: bytes) -> bool:
        temporary = self.folder / f"{TEMPORARY}{uuid.uuid4().hex}"
        try:
            with temporary.open("xb", buffering=0) as file:
                view = memoryview(content)
                while len(view):
                    view = view[file.write(view) :]
            self._put(temporary, name)
        except OSError as error:
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()
            if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
                raise
            self._warn_full()
            return False
        return True

    def _put(self, path: Path, name: str) -> None:
        """Give a file its name, once there is room for it below the limit."""
        size = path.stat().st_size
        with self._locked(LEDGER) as ledger:
            total = _read_number(ledger)
            if total is None or total + size > self.limit_bytes:
                total = self._count()
                if total + size > self.limit_bytes:
                    total = self._remove_down_to(int(FULL * self.limit_bytes) - size)
            _write_number(ledger, total + size)  # before: a kill in between makes it too large, not too small
            path.replace(self.folder / name)

    def _clear_disk(self, size: int) -> bool:
        """See to it that the disk has room for ``size`` bytes, and for others; False if it has not."""
        if self._disk_short_by(size) <= 0:
            return True
        self._warn_full()
        with self._locked(LEDGER) as ledger:
            short = self._disk_short_by(size)
            if short > 0:
                held = self._count()
                _write_number(ledger, self._remove_down_to(held - max(short, held // 10)))
        return self._disk_short_by(size) <= 0

    def _remove_down_to(self, goal: int) -> int:
        """Remove the least recently used files until at most ``goal`` bytes are left; gives how many are."""
        files = sorted(self._scan())
        held = sum(size for _, size, _ in files)
        for _, size, path in files:
            if held <= goal:
                break
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
            held -= size
        return held

    def _disk_short_by(self, size: int) -> int:
        disk = os.statvfs(self.folder)
        spare = min(SPARE_BYTES, int(disk.f_blocks * disk.f_frsize * SPARE_SHARE))
        return size + spare - disk.f_bavail * disk.f_frsize

    def _warn_full(self) -> None:
        if not self._warned:
            self._warned = True
            self.warn(
                f"the disk of data.cache_dir ({self.folder}) is full: less than data.cache_gb is kept there, and what "
                "is not kept is read from the store again, image by image, which is slow. Free some space there"
            )

    def _scan(self) -> Iterator[tuple[int, int, Path]]:
        """(time of last use in ns, bytes, path) of every file; temporary ones of killed processes are removed."""
        with os.scandir(self.folder) as entries:
            for entry in entries:
                try:
                    if not entry.is_file(follow_symlinks=False):
                        continue
                    facts = entry.stat(follow_symlinks=False)
                    if entry.name.startswith("."):
                        if time.time() - facts.st_mtime > STALE_SECONDS:
                            os.unlink(entry.path)
                        continue  # being written
                except FileNotFoundError:
                    continue
                yield facts.st_mtime_ns, facts.st_size, Path(entry.path)

    def _count(self) -> int:
        return sum(size for _, size, _ in self._scan())

    def _touch(self, name: str) -> None:
        now = time.monotonic()
        if now - self._touched.get(name, -TOUCH_SECONDS) >= TOUCH_SECONDS:
            self._touched[name] = now
            with contextlib.suppress(OSError):  # without it the file only seems less used than it is
                os.utime(self.folder / name)

    @contextlib.contextmanager
    def _locked(self, name: str, *, wait: bool = True) -> Iterator[int | None]:
        """Holds a lock that ends with this process, however it ends; gives its file, or None if it is taken."""
        path = self.folder / LOCKS / name
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:  # somebody has removed the whole folder
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield None
                return
            try:
                yield descriptor
            finally:
                # Closing is not enough: a process that was forked meanwhile has the lock, too.
                fcntl.flock(descriptor, fcntl.LOCK_UN)
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except HjepaError:  # of the store, where no object is an OSError as well
            raise
        except OSError as error:
            where = f"data.cache_dir: {self.folder}"
            if error.errno in {errno.ENOSPC, errno.EDQUOT}:
                raise UserError(f"{where}: the disk is full; free some space there, or choose another folder") from None
            if error.errno in {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS}:
                raise UserError(
                    f"{where}: this file system has no locks ({error.strerror}). Choose a folder on a disk of this "
                    "machine."
                ) from None
            if error.errno in {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST}:
                raise UserError(f"{where}: {error.strerror}. Choose a folder that can be written to.") from None
            raise HjepaError(f"{where}: {error}") from error


def _group(number: int) -> str:
    return f"{number:04d}"


def _read_number(descriptor: int | None) -> int | None:
    assert descriptor is not None
    text = os.pread(descriptor, 20, 0)
    return int(text) if text.isdigit() else None


def _write_number(descriptor: int | None, number: int) -> None:
    """In place and of fixed width, which needs no space on a full disk."""
    assert descriptor is not None
    os.pwrite(descriptor, b"%020d" % number, 0)


class _Handle:
    """A file that is closed when nobody refers to it any longer, such as at the end of a thread."""

    def __init__(self, name: str, path: Path):
        self.name = name
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


# -- one split -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Remote:
    """Where the shards of a data set are, and how they are kept here.

    Args:
        get: (key of a shard, first byte, number of bytes) -> the bytes. It tries again where that may help; it is
            called from several threads and after a fork.
        name: Key -> what messages call the object.
        block_bytes: Length of a block, but for the samples at its ends, which are not cut.
    """

    get: Callable[[str, int, int], bytes]
    name: Callable[[str], str]
    cache: BlockCache
    block_bytes: int


class ShardStream:
    """The samples of one split of a data set in an object store, each verified by its checksum.

    Attributes:
        block_of: (N,) the block that holds each sample. Blocks are numbered in the order of the shards.
        fits: Whether all blocks of the split may be in the cache at once.
    """

    def __init__(self, remote: Remote, shards: Sequence[Mapping[str, Any]], index: NDArray[np.void], split: str):
        self.remote, self.cache, self.split = remote, remote.cache, split
        self._shards, self._index = shards, index
        first = index["offset"].astype(np.int64)
        stop = first + index["length"]
        shard = index["shard"].astype(np.int64)
        # Shards have less than 2^40 blocks.
        names, self.block_of = np.unique((shard << 40) + first // remote.block_bytes, return_inverse=True)
        self._first = np.full(len(names), np.iinfo(np.int64).max)
        np.minimum.at(self._first, self.block_of, first)
        self._stop = np.zeros(len(names), dtype=np.int64)
        np.maximum.at(self._stop, self.block_of, stop)
        self._shard_of = (names >> 40).tolist()
        self._members = np.argsort(self.block_of, kind="stable")
        self._bounds = np.searchsorted(self.block_of[self._members], np.arange(len(names) + 1))
        self.fits = sum(facts["bytes"] for facts in shards) <= FULL * self.cache.limit_bytes
        # Asked once: a reader that misses a whole shard later turns to its blocks.
        self._whole = {i for i, facts in enumerate(shards) if self.cache.has(facts["sha256"], facts["bytes"])}

    def __len__(self) -> int:
        """Blocks."""
        return len(self._shard_of)

    def read(self, i: int) -> bytes:
        """One sample; its block is fetched if it is not here.

        Raises:
            HjepaError: the store does not answer, or has other bytes than were prepared.
        """
        data = self._local(i)
        if data is None and self.fill(int(self.block_of[i])) is Filled.KEPT:
            data = self._local(i)
        return self._direct(i) if data is None else data

    def read_many(self, samples: Sequence[int], *, sparse: bool) -> list[bytes]:
        """Samples in the order given; what is missing is fetched by several threads.

        Args:
            sparse: Do not wait for a block of which only little is wanted: read its samples themselves from the store.
        """
        found = {i: self._local(i) for i in samples}
        missing: dict[int, list[int]] = {}
        for i, data in found.items():
            if data is None:
                missing.setdefault(int(self.block_of[i]), []).append(i)
        if missing:
            blocks, singles = [], []
            for block, wanted in missing.items():
                few = 4 * int(self._index["length"][wanted].sum()) < self._stop[block] - self._first[block]
                if sparse and few:
                    singles += wanted
                else:
                    blocks.append(block)
            threads = ThreadPoolExecutor(min(GETS_IN_FLIGHT, len(blocks) + len(singles)), "hjepa-fetch")
            try:
                filled = [threads.submit(self.fill, block) for block in blocks]
                read = [threads.submit(self._direct, i) for i in singles]
                found |= zip(singles, (each.result() for each in read), strict=True)
                for each in filled:
                    each.result()
            finally:
                threads.shutdown(cancel_futures=True)
        return [self.read(i) if (data := found[i]) is None else data for i in samples]

    def fetch(self, samples: Sequence[int]) -> None:
        """Bring the blocks of samples here, as far as there is room for them."""
        with ThreadPoolExecutor(GETS_IN_FLIGHT, "hjepa-fetch") as threads:
            for _ in threads.map(self.fill, np.unique(self.block_of[np.asarray(samples)]).tolist()):
                pass

    def fill(self, block: int, *, wait: bool = True) -> Filled:
        """Have a block in the cache."""
        facts = self._shards[self._shard_of[block]]
        if self._shard_of[block] in self._whole and self.cache.has(facts["sha256"], facts["bytes"]):
            return Filled.KEPT
        return self.cache.fill(*self._file(block), lambda: self._download(block), wait=wait)

    # -- inside ------------------------------------------------------------------------------------------------------

    def _file(self, block: int) -> tuple[str, int]:
        """Name and size of a block's file."""
        first, stop = int(self._first[block]), int(self._stop[block])
        return f"{self._shards[self._shard_of[block]]['sha256']}.{first}-{stop}", stop - first

    def _local(self, i: int) -> bytes | None:
        """A sample from this machine; None if it is not here, or damaged, and then it is removed."""
        shard, offset, length, _, crc32 = self._index[i].item()
        if shard in self._whole:
            facts = self._shards[shard]
            data = self.cache.read(facts["sha256"], facts["bytes"], offset, length)
            if data is not None and isal_zlib.crc32(data) == crc32:
                return data
            self._whole.discard(shard)
            if data is not None:
                self._drop(facts["sha256"], i)
        block = int(self.block_of[i])
        name, size = self._file(block)
        data = self.cache.read(name, size, offset - int(self._first[block]), length)
        if data is None or isal_zlib.crc32(data) == crc32:
            return data
        self._drop(name, i)
        return None

    def _drop(self, name: str, i: int) -> None:
        self.cache.warn(f"the cached copy of {self._place(i)} is damaged and is fetched again")
        self.cache.drop(name)

    def _download(self, block: int) -> bytes:
        first, stop = int(self._first[block]), int(self._stop[block])
        members = self._members[self._bounds[block] : self._bounds[block + 1]].tolist()

        def damaged(data: bytes) -> int | None:
            view = memoryview(data)
            for i in members:
                _, offset, length, _, crc32 = self._index[i].item()
                if isal_zlib.crc32(view[offset - first : offset - first + length]) != crc32:
                    return int(i)
            return None

        return self._verified(self._shard_of[block], first, stop - first, damaged)

    def _direct(self, i: int) -> bytes:
        shard, offset, length, _, crc32 = self._index[i].item()
        return self._verified(shard, offset, length, lambda data: None if isal_zlib.crc32(data) == crc32 else i)

    def _verified(self, shard: int, first: int, length: int, damaged: Callable[[bytes], int | None]) -> bytes:
        """Bytes of the object that ``damaged`` finds no fault with; it gives the sample that is not what it was."""
        key = self._shards[shard]["key"]
        tries = 0
        while True:
            tries += 1
            data = self.remote.get(key, first, length)
            wrong = damaged(data)
            if wrong is None:
                return data
            if tries == TRIES:
                raise HjepaError(
                    f"{self._place(wrong)} is not what was prepared: its checksum is wrong in each of {TRIES} answers. "
                    "Put that object back, or remove the data set from the store and prepare it again."
                )
            time.sleep(0.1 * 2**tries)

    def _place(self, i: int) -> str:
        shard, offset, length, _, _ = self._index[i].item()
        name = self.remote.name(self._shards[shard]["key"])
        return f"sample {i} of the {self.split} split ({name}, bytes {offset} to {offset + length})"


class ReadAhead:
    """Fetches the blocks that are needed next, by threads of the process in which ``at`` is called.

    Args:
        needs: From a position on, (position of the first need, block), endless or not, by position.
        blocks: How many of those whose time has not come yet are fetched at most.
    """

    def __init__(
        self,
        stream: ShardStream,
        needs: Callable[[int], Iterator[tuple[int, int]]],
        *,
        blocks: int,
        threads: int = GETS_IN_FLIGHT,
    ):
        self.stream, self._needs_from, self.blocks, self.threads = stream, needs, blocks, threads
        self._process = 0
        self._closed = threading.Event()

    def at(self, position: int) -> None:
        """Tell where the reader is; the first call in a process starts the threads."""
        if self._process != os.getpid():
            self._process = os.getpid()
            self._changed = threading.Condition()
            self._needs = self._needs_from(position)
            self._position = position
            self._ahead: deque[int] = deque()  # positions of the blocks that were handed out and are still to come
            self._later: deque[int] = deque()  # blocks that somebody else was fetching
            for _ in range(self.threads):
                threading.Thread(target=self._work, name="hjepa-read-ahead", daemon=True).start()
        with self._changed:
            self._position = max(self._position, position)
            self._changed.notify_all()

    def close(self) -> None:
        """Fetch no further block."""
        self._closed.set()
        if self._process == os.getpid():
            with self._changed:
                self._changed.notify_all()

    def _work(self) -> None:
        while not self._closed.is_set():
            with self._changed:
                block = self._next()
                if block is None:
                    self._changed.wait(0.05 if self._later else None)
                    block = self._later.popleft() if self._later and not self._closed.is_set() else None
            if block is None:
                continue
            try:
                filled = self.stream.fill(block, wait=False)
            except HjepaError:
                # Whoever needs the block meets the same error, and tells it.
                self._closed.wait(PAUSE_SECONDS)
                continue
            if filled is Filled.BUSY:
                with self._changed:
                    self._later.append(block)
            elif filled is Filled.REFUSED:
                self._closed.wait(PAUSE_SECONDS)

    def _next(self) -> int | None:
        while self._ahead and self._ahead[0] <= self._position:
            self._ahead.popleft()
        if len(self._ahead) >= self.blocks:
            return None
        position, block = next(self._needs, (0, None))
        if block is not None:
            self._ahead.append(position)
        return block
