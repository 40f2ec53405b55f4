"""Files of a data set, wherever they are: below a folder of this machine, or below a prefix of an S3 bucket.

The core knows no object store. Whoever has one passes a function that opens it, and what is needed of it is said here.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat as stat_modes
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from hjepa.data.sources import Skipped, file_state, files_below, name_keys
from hjepa.errors import UserError

S3 = "s3://"
URL = re.compile(r"\w+://")
MAX_READ_BYTES = 2 << 30  # at once: no image is larger, and one sparse file can pretend to be of any size
MAX_KEY_BYTES = 1024
State = tuple[int, int | str]
"""(bytes, modification time in ns or ETag), by which a change is seen without reading."""


class StoredObject(Protocol):
    @property
    def key(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def etag(self) -> str | None: ...


class ObjectStore(Protocol):
    """Objects below one prefix; ``hjepa.adapters.s3.S3Store`` is one.

    It may be used after a fork. What is wrong with one object is an OSError, whatever else a HjepaError.
    """

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        """In order of their keys."""

    def get_bytes(self, key: str, *, start: int | None = None, length: int | None = None) -> bytes: ...


OpenStore = Callable[[str], ObjectStore]
"""From ``s3://bucket/prefix`` to its objects. It sends nothing, so nothing is wrong yet with what is not there."""


class Findings(Protocol):
    """What was found out about objects, kept for good, so that nobody has to read as much of them again."""

    def get(self, name: str) -> bytes | None:
        """None if nothing is kept under this name."""

    def put(self, name: str, content: bytes) -> None: ...


class Files(Protocol):
    """Files below one folder. Names are relative to it, with slashes."""

    where: str  # the folder, as messages name it
    name: str  # its last part

    def names(self, skipped: Skipped) -> Iterator[str]:
        """All but hidden files, in a fixed order; ``skipped`` is told of the others."""

    def below(self, folder: str) -> Files:
        """The files of a sub-folder."""

    def inside(self, path: str) -> str | None:
        """The name of the file that a path means, absolute or not; None if it would leave the folder.

        Links are followed wherever they lead: who made the folder made them.
        """

    def missing(self, names: Sequence[str]) -> list[str]:
        """Those of these files that do not exist."""

    def state(self, name: str) -> State:
        """Of a file that ``names`` gave, or that is not ``missing``."""

    def hash_states(self, names: Sequence[str]) -> str:
        """sha256 (hex) that tells of changes in any of these files, however they are known."""

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """The content, or ``length`` bytes of it from ``start``; like a slice, shorter where the file ends.

        Raises:
            OSError: if this file cannot be read.
        """


class LocalFiles:
    def __init__(self, root: Path):
        self.root, self.where, self.name = root, str(root), root.absolute().name

    def names(self, skipped: Skipped) -> Iterator[str]:
        return files_below(self.root, skipped)

    def below(self, folder: str) -> LocalFiles:
        return LocalFiles(self.root / folder)

    def inside(self, path: str) -> str | None:
        if path.startswith("/"):
            path = os.path.normpath(path)
            for base in (os.path.abspath(self.root), os.path.realpath(self.root)):
                if path.startswith(f"{base.rstrip('/')}/"):
                    return path[len(base.rstrip("/")) + 1 :]
            return None
        named = os.path.normpath(path)
        return None if URL.match(path) or named in (".", "..") or named.startswith("../") else named

    def missing(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if not (self.root / name).is_file()]

    def state(self, name: str) -> State:
        return file_state(self.root / name)

    def hash_states(self, names: Sequence[str]) -> str:
        hasher = hashlib.sha256()
        for name in names:
            hasher.update(ascii((name, self.state(name))).encode())
        return hasher.hexdigest()

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        # Opening a pipe would wait for ever for somebody to write into it.
        descriptor = os.open(self.root / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            stat = os.fstat(descriptor)
            if not stat_modes.S_ISREG(stat.st_mode):
                raise OSError(errno.EINVAL, "not a regular file", name)
            wanted = max(0, stat.st_size - start)
            wanted = wanted if length is None else min(wanted, length)
            _require_readable(wanted, name)
            parts: list[bytes] = []
            while wanted > 0 and (part := os.pread(descriptor, wanted, start)):
                parts.append(part)
                start, wanted = start + len(part), wanted - len(part)
            return parts[0] if len(parts) == 1 else b"".join(parts)
        finally:
            os.close(descriptor)


class ObjectFiles:
    """Objects whose keys start with a prefix; each process that reads has connections of its own."""

    def __init__(self, store: ObjectStore, where: str, prefix: str = "", seen: dict[str, State] | None = None):
        """
        Args:
            where: ``s3://bucket/prefix``.
            prefix: What comes before the names in the keys of the store: nothing, or something with a slash at its end.
            seen: What was listed, by key.
        """
        self.store, self.where, self.prefix = store, where.rstrip("/"), prefix
        self.name = self.where.rpartition("/")[2]
        self._seen = {} if seen is None else seen

    def names(self, skipped: Skipped) -> Iterator[str]:
        for name in self._list(""):
            if name.startswith(".") or "/." in name:
                skipped.hidden += 1
            else:
                yield name

    def _list(self, start: str) -> Iterator[str]:
        """Names that start so."""
        for item in self.store.list(self.prefix + start):
            if not item.key.endswith("/"):  # the mark of a folder
                self._seen[item.key] = (item.size, item.etag or "")
                yield item.key.removeprefix(self.prefix)

    def below(self, folder: str) -> ObjectFiles:
        return ObjectFiles(self.store, f"{self.where}/{folder}", f"{self.prefix}{folder}/", self._seen)

    def inside(self, path: str) -> str | None:
        if path.startswith(S3):
            if not path.startswith(f"{self.where}/"):
                return None
            path = path[len(self.where) + 1 :]
        if path.startswith("/"):
            return None
        if {".", ".."} & set(path.split("/")):
            path = os.path.normpath(path)
        return None if path in ("", ".", "..") or path.startswith("../") else path

    def missing(self, names: Sequence[str]) -> list[str]:
        present = set(self._list(_shared_start(names)))
        return [name for name in names if name not in present]

    def state(self, name: str) -> State:
        return self._seen.get(self.prefix + name, (-1, ""))

    def hash_states(self, names: Sequence[str]) -> str:
        """By a listing of the keys that start as all of them do, of which only their own lines count."""
        wanted = np.sort(name_keys(names)[:, 0])
        hasher = hashlib.sha256()
        for item in self.store.list(self.prefix + _shared_start(names)) if len(names) else ():
            key = name_keys([item.key.removeprefix(self.prefix)])[0, 0]
            place = int(np.searchsorted(wanted, key))
            if place < len(wanted) and wanted[place] == key:
                hasher.update(ascii((item.key, item.size, item.etag)).encode())
        return hasher.hexdigest()

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        if len(key := (self.prefix + name).encode("utf-8", "surrogateescape")) > MAX_KEY_BYTES:
            raise OSError(errno.ENAMETOOLONG, f"a key of {len(key)} bytes, S3 has {MAX_KEY_BYTES} at most", name)
        if b"\0" in key:
            raise OSError(errno.EINVAL, "a key with a NUL, which S3 does not have", name)
        _require_readable(self.state(name)[0] if length is None else length, name)
        if start == 0 and length is None:
            return self.store.get_bytes(self.prefix + name)
        return self.store.get_bytes(self.prefix + name, start=start, length=length)


def _shared_start(names: Sequence[str]) -> str:
    """The letters that all of the names start with."""
    first, last = min(names, default=""), max(names, default="")
    length = next((i for i, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), len(first))
    return first[:length]


def _require_readable(size: int, name: str) -> None:
    if size > MAX_READ_BYTES:
        raise OSError(errno.EFBIG, f"{size} bytes, expected at most {MAX_READ_BYTES}", name)


def split_path(root: str, key: str) -> tuple[str, str]:
    """(folder, name) of a file here or in S3.

    Raises:
        UserError: for a bucket without a key.
    """
    folder, slash, name = root.rpartition("/")
    if root.startswith(S3) and len(folder) < len(S3):
        raise UserError(f"{key}={root}: expected s3://bucket/name.")
    return folder or slash or ".", name


def open_folder(root: str, open_store: OpenStore | None, *, key: str, holds: str) -> LocalFiles | ObjectFiles:
    """The files below a folder or an S3 prefix.

    Args:
        key: The setting that names it.
        holds: What it should hold, for messages.

    Raises:
        UserError: no such folder, or one that cannot be listed, or S3 where there is no way to it.
    """
    if root.startswith(S3):
        if open_store is None:
            raise UserError(
                f"{key}={root}: images in S3 are read by the step prepare_data of a pipeline (hjepa run, "
                f"hjepa prepare-data). Training alone reads local files: copy them, and set {key} to the copy."
            )
        return ObjectFiles(open_store(root), root)
    try:
        folder = Path(root).expanduser()
        there = folder.exists()
    except (OSError, RuntimeError, ValueError) as error:  # too long a name, or no such user
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"{key}={root}: {reason}. Set {key} to {holds}.") from None
    if not there:
        raise UserError(f"{key}={root}: there is no such folder. Set {key} to {holds}.")
    if not folder.is_dir():
        raise UserError(f"{key}={root} is a file, expected {holds}.")
    if not os.access(folder, os.R_OK | os.X_OK):
        raise UserError(f"{key}={root}: no permission to list this folder. Grant read access to it.")
    return LocalFiles(folder)
