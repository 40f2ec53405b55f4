"""The shard format: POSIX tar files that any tool reads, and one binary index per split for random access.

A sample is ``KEY.png`` or ``KEY.jpg`` followed, if it has a label, by ``KEY.cls`` (the class number in ASCII), the
naming of the webdataset library. Times, owners and modes are fixed, so that the same samples give the same bytes.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hjepa.errors import HjepaError

BLOCK = 512  # tar's unit
END_BYTES = 2 * BLOCK  # of zeros, tar's end mark
INDEX_DTYPE = np.dtype([("shard", "<u4"), ("offset", "<u8"), ("length", "<u4"), ("label", "<i4"), ("crc32", "<u4")])
INDEX_HEADER = struct.Struct("<8sIIQ")  # magic, version, bytes per record, records
INDEX_MAGIC = b"HJEPAIDX"
INDEX_VERSION = 1
NO_LABEL = -1

Index = NDArray[np.void]


class StoredFile(NamedTuple):
    key: str  # name below the data set's prefix
    path: Path
    bytes: int
    sha256: str
    samples: int

    @property
    def origin(self) -> str:
        """The name of the file where it is, which for a shard of a part is not yet that in the data set."""
        return self.path.name


class ShardWriter:
    """Writes shards one after the other, then their index.

    Args:
        folder: Where the files go.
        prefix: Of their names.
        shard_bytes: A shard is closed before it would grow beyond this, unless one sample alone does.
        on_shard: Called with each shard once it is complete; it may take the file away.
    """

    def __init__(
        self, folder: Path, prefix: str, *, shard_bytes: int, on_shard: Callable[[StoredFile], None] | None = None
    ):
        self.folder, self.prefix, self.shard_bytes, self.on_shard = folder, prefix, shard_bytes, on_shard
        self.shards: list[StoredFile] = []
        self._records = bytearray()  # of the index; millions of tuples would take ten times as much
        self._count = 0
        self._shard: _OpenShard | None = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shard is not None:
            self._shard.file.close()

    def add(self, data: bytes, *, suffix: str, label: int | None, crc32: int, number: int | None = None) -> None:
        """``number`` names the sample in the tar file; None counts."""
        key = f"{self._count if number is None else number:09d}"
        members: tuple[bytes, ...] = tar_member(f"{key}.{suffix}", data)
        if label is not None:
            members += tar_member(f"{key}.cls", str(label).encode())
        size = sum(len(piece) for piece in members)
        if self._shard is not None and self._shard.size + size > self.shard_bytes:
            self._close_shard()
        if self._shard is None:
            self._shard = _OpenShard(self.folder / f"{self.prefix}-{len(self.shards):06d}.tar")
        offset = self._shard.size + BLOCK
        for piece in members:
            self._shard.write(piece)
        self._shard.samples += 1
        label = NO_LABEL if label is None else label
        self._records += np.array((len(self.shards), offset, len(data), label, crc32), dtype=INDEX_DTYPE).tobytes()
        self._count += 1

    def finish(self) -> StoredFile:
        """Closes the last shard and writes the index, which is returned."""
        if self._shard is not None:
            self._close_shard()
        path = self.folder / f"{self.prefix}.index"
        content = encode_index(np.frombuffer(self._records, dtype=INDEX_DTYPE))
        path.write_bytes(content)
        return StoredFile(path.name, path, len(content), hashlib.sha256(content).hexdigest(), self._count)

    def _close_shard(self) -> None:
        assert self._shard is not None
        self.shards.append(self._shard.close())
        self._shard = None
        if self.on_shard is not None:
            self.on_shard(self.shards[-1])


def copy_samples(source: Path, records: Index, keep: NDArray[np.bool_], target: Path) -> tuple[StoredFile, Index]:
    """Write a shard anew with some of its samples, each of the same bytes as before.

    Args:
        records: (N,) the index of all samples in the shard, in order.
        keep: (N,) at least one.

    Returns:
        The new shard, and the index of its samples.
    """
    ends = [*(records["offset"][1:] - BLOCK).tolist(), source.stat().st_size - END_BYTES]
    kept, shard = records[keep].copy(), _OpenShard(target)
    with source.open("rb") as file:
        for place, number in enumerate(np.flatnonzero(keep).tolist()):
            start = int(records["offset"][number]) - BLOCK
            kept["offset"][place] = shard.size + BLOCK
            file.seek(start)
            shard.write(file.read(ends[number] - start))
            shard.samples += 1
    return shard.close(), kept


class _OpenShard:
    def __init__(self, path: Path):
        self.path, self.file, self.size, self.samples = path, path.open("wb"), 0, 0
        self._hasher = hashlib.sha256()

    def write(self, data: bytes) -> None:
        self.file.write(data)
        self._hasher.update(data)
        self.size += len(data)

    def close(self) -> StoredFile:
        self.write(bytes(END_BYTES))
        self.file.close()
        return StoredFile(self.path.name, self.path, self.size, self._hasher.hexdigest(), self.samples)


def tar_member(name: str, data: bytes) -> tuple[bytes, bytes, bytes]:
    """One regular file as POSIX ustar: header, content, padding. Names are short ASCII."""
    head = b"%s0000644\0%07o\0%07o\0%011o\0%011o\0" % (name.encode("ascii").ljust(100, b"\0"), 0, 0, len(data), 0)
    tail = b"0" + bytes(100) + b"ustar\x0000" + bytes(64 + 16)
    blank_sum = sum(head) + 8 * 32 + sum(tail)  # the checksum counts its own field as blanks
    header = (head + b"%06o\0 " % blank_sum + tail).ljust(BLOCK, b"\0")
    return header, data, bytes(-len(data) % BLOCK)


def encode_index(records: Index) -> bytes:
    return INDEX_HEADER.pack(INDEX_MAGIC, INDEX_VERSION, INDEX_DTYPE.itemsize, len(records)) + records.tobytes()


def read_index(path: Path) -> Index:
    """The records of a split in order.

    Raises:
        HjepaError: if the file is no whole index of a known version.
    """
    return parse_index(path.read_bytes(), str(path))


def parse_index(content: bytes, path: str) -> Index:
    """As ``read_index``, of bytes; ``path`` is for the message."""
    try:
        magic, version, itemsize, count = INDEX_HEADER.unpack_from(content)
    except struct.error:
        raise HjepaError(f"{path} is too short for a shard index; prepare the data set again") from None
    if magic != INDEX_MAGIC or version != INDEX_VERSION or itemsize != INDEX_DTYPE.itemsize:
        raise HjepaError(f"{path} is not a shard index of version {INDEX_VERSION}; prepare the data set again")
    if len(content) != INDEX_HEADER.size + count * itemsize:
        raise HjepaError(f"{path} holds {len(content)} bytes, expected {count} records; fetch it again")
    return np.frombuffer(content, dtype=INDEX_DTYPE, offset=INDEX_HEADER.size)


class ShardReader:
    """Random access to encoded samples by ``os.pread``; safe in threads and after a fork."""

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}

    def read(self, path: Path, offset: int, length: int) -> bytes:
        descriptor = self._descriptors.get(path)
        if descriptor is None:
            opened = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            descriptor = self._descriptors.setdefault(path, opened)
            if descriptor != opened:  # another thread was faster
                os.close(opened)
        return os.pread(descriptor, length, offset)

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {"_descriptors": {}}  # descriptors mean nothing in another process
