"""What a data set has to offer so that ``prepare`` can read it: splits of samples with stable names."""

from __future__ import annotations

import hashlib
import os
import re
import stat as stat_modes
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hjepa.errors import UserError

MIN_TRAIN_IMAGES = 8  # fewer are a mistake in the configuration, and there is nothing to learn from them

Payload = bytes | NDArray[np.uint8] | Image.Image
"""An encoded file, an array (H, W) or (H, W, 3), or an opened picture."""


class Split(Protocol):
    """A sequence of samples in their final order. Reading is lazy, so that it happens in a worker process."""

    chunk: int  # samples that one task should hold

    def __len__(self) -> int: ...

    def name(self, i: int) -> str:
        """Stable and unique in the split; known without reading the sample."""

    def read(self, i: int) -> tuple[Payload, int | None]:
        """The picture and its label, None if it has none. May raise anything that a broken file makes it raise."""

    def fingerprint(self) -> str:
        """Changes whenever what ``read`` returns may have changed, and is cheap against reading."""


@dataclass(frozen=True)
class Source:
    name: str  # what the prepared data set will be called
    detail: str  # which source answered, for the person who runs it
    splits: Mapping[str, Split]  # "train" and, where there is one, "test"
    classes: tuple[str, ...] = ()  # empty: no labels, or names that are known only after reading
    notes: tuple[str, ...] = ()  # what a user should know about how the source was understood

    def fingerprint(self) -> str:
        """sha256 (hex) by which a prepared data set can be recognised before any image is read."""
        hasher = hashlib.sha256(repr((self.name, self.classes)).encode())
        for name, split in self.splits.items():
            hasher.update(f"{name} {split.fingerprint()}\n".encode())
        return hasher.hexdigest()


class ArraySplit:
    """Images that are in memory already."""

    chunk = 512

    def __init__(self, images: NDArray[np.uint8], labels: NDArray[np.integer] | None):
        """
        Args:
            images: (N, H, W) or (N, H, W, 3).
            labels: (N,), or None.
        """
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def name(self, i: int) -> str:
        return f"{i:08d}"

    def read(self, i: int) -> tuple[Payload, int | None]:
        return self.images[i], None if self.labels is None else int(self.labels[i])

    def fingerprint(self) -> str:
        hasher = hashlib.sha256(f"{self.images.shape}".encode())
        hasher.update(np.ascontiguousarray(self.images).data)
        if self.labels is not None:
            hasher.update(np.ascontiguousarray(self.labels, dtype=np.int64).data)
        return hasher.hexdigest()


def require_train_images(usable: int, detail: str) -> None:
    """
    Raises:
        UserError: if a source has too few images to train on.
    """
    if usable < MIN_TRAIN_IMAGES:
        raise UserError(
            f"{detail}: {usable} usable images to train on, expected at least {MIN_TRAIN_IMAGES}. "
            "Add images, lower data.test_fraction if images are held out, or choose another data.name or data.root."
        )


@dataclass
class Skipped:
    """What a walk through a folder left out."""

    unreadable: list[str] = field(default_factory=list)  # folders that cannot be listed
    repeated: list[str] = field(default_factory=list)  # links to folders that are there already
    hidden: int = 0
    special: int = 0  # pipes, sockets and devices, where opening one may wait for ever

    def notes(self) -> list[str]:
        notes = [f"{path} cannot be listed and was left out" for path in self.unreadable]
        notes += [f"{path} is the same folder as another one and was left out" for path in self.repeated[:5]]
        if len(self.repeated) > 5:
            notes.append(f"more links to such folders left out: {len(self.repeated) - 5}")
        if self.hidden:
            notes.append(f"hidden files and folders left out: {self.hidden}")
        if self.special:
            notes.append(f"pipes, sockets and devices left out: {self.special}")
        return notes


def files_below(root: Path, skipped: Skipped) -> Iterator[str]:
    """Relative names of the files below a folder, hidden ones left out, in a fixed order."""
    return _walk(root, "", skipped, set())


def _walk(root: Path, below: str, skipped: Skipped, seen: set[tuple[int, int]]) -> Iterator[str]:
    """Each folder once, however it is linked."""
    folder = root / below
    try:
        stat = folder.stat()
        if (stat.st_dev, stat.st_ino) in seen:
            skipped.repeated.append(below)
            return
        seen.add((stat.st_dev, stat.st_ino))
        with os.scandir(folder) as scan:
            entries = sorted(scan, key=lambda entry: entry.name)
    except OSError:
        skipped.unreadable.append(str(folder))
        return
    for entry in entries:
        if entry.name.startswith("."):
            skipped.hidden += 1
            continue
        name = f"{below}/{entry.name}" if below else entry.name
        try:
            mode = entry.stat().st_mode
        except OSError:
            yield name  # a dangling or looping link: reading it will say so
            continue
        if stat_modes.S_ISDIR(mode):
            yield from _walk(root, name, skipped, seen)
        elif stat_modes.S_ISREG(mode):
            yield name
        else:
            skipped.special += 1


def file_state(path: Path) -> tuple[int, int]:
    """(bytes, modification time in ns), which tell of a change without reading; (-1, -1) if there is no such file."""
    try:
        stat = path.stat()
    except (OSError, ValueError):  # ValueError: a name with a NUL, which a table may hold
        return -1, -1
    return stat.st_size, stat.st_mtime_ns


def name_hash(name: str) -> bytes:
    """A fixed pseudo-random sort key, so that order and hold-out depend on names alone and on no seed."""
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()


def name_keys(names: Iterable[str]) -> NDArray[np.uint64]:
    """The hashes of names as numbers that sort alike: (N, 4), 32 bytes a name."""
    digests = bytearray()
    for name in names:
        digests += name_hash(name)
    return np.frombuffer(digests, dtype=">u8").reshape(-1, 4).astype(np.uint64)


def key_order(keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Positions (N,) of the keys in ascending order."""
    return np.lexsort((keys[:, 3], keys[:, 2], keys[:, 1], keys[:, 0]))


def hold_out(
    names: Iterable[str], labels: Sequence[int] | NDArray[np.integer] | None, fraction: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split samples into (train, test) positions, ascending, each class by itself.

    A class of at least two samples keeps one on either side. The same names give the same split on any machine.
    """
    return hold_out_keys(name_keys(names), labels, fraction)


def hold_out_keys(
    keys: NDArray[np.uint64], labels: Sequence[int] | NDArray[np.integer] | None, fraction: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """``hold_out`` by what ``name_keys`` made of the names."""
    order = key_order(keys)
    groups = np.zeros(len(keys), dtype=np.int64) if labels is None else np.asarray(labels, dtype=np.int64)
    order = order[np.argsort(groups[order], kind="stable")]
    ends = np.flatnonzero(np.diff(groups[order], append=np.iinfo(np.int64).max)) + 1
    is_test = np.zeros(len(keys), dtype=bool)
    start = 0
    for end in ends.tolist():
        members = order[start:end]
        if len(members) > 1:
            is_test[members[: min(len(members) - 1, max(1, round(len(members) * fraction)))]] = True
        start = end
    return np.flatnonzero(~is_test), np.flatnonzero(is_test)


def scattered(positions: Iterable[int], names: Sequence[str]) -> list[int]:
    """The positions in an order that does not follow the names: sets sorted by class would give one-class blocks."""
    return sorted(positions, key=lambda i: name_hash(names[i]))


def hold_out_note(held_out: int, total: int) -> str:
    if held_out:
        return f"no test split: {held_out} of {total} images are held out (data.test_fraction)"
    return (
        "no test split, and no class has two images of which one could be held out: k-NN and linear probes are skipped"
    )


def slug(name: str) -> str:
    """A name fit for an object key."""
    return re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-.") or "images"


class Names(Sequence[str]):
    """Many strings in one block of bytes: as a list, a million paths take three times the memory."""

    def __init__(self, names: Iterable[str] = ()):
        self._bytes = bytearray()
        self._ends = array("Q", [0])
        for name in names:
            self.append(name)

    def append(self, name: str) -> None:
        self._bytes += name.encode("utf-8", "surrogateescape")
        self._ends.append(len(self._bytes))

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> Names: ...
    def __getitem__(self, i: int | slice) -> str | Names:
        if isinstance(i, slice):
            return Names(self[k] for k in range(*i.indices(len(self))))
        if not 0 <= i < len(self):
            raise IndexError(i)
        return self._bytes[self._ends[i] : self._ends[i + 1]].decode("utf-8", "surrogateescape")
