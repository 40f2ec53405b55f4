"""What a data set has to offer so that ``prepare`` can read it: splits of samples with stable names."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

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


def name_hash(name: str) -> bytes:
    """A fixed pseudo-random sort key, so that order and hold-out depend on names alone and on no seed."""
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()


def hold_out(names: Sequence[str], labels: Sequence[int] | None, fraction: float) -> tuple[list[int], list[int]]:
    """Split samples into (train, test) positions, each class by itself.

    A class of at least two samples keeps one on either side. The same names give the same split on any machine.
    """
    groups: dict[int, list[int]] = {}
    for i in range(len(names)):
        groups.setdefault(-1 if labels is None else labels[i], []).append(i)
    test: set[int] = set()
    for members in groups.values():
        members.sort(key=lambda i: name_hash(names[i]))
        if len(members) > 1:
            test.update(members[: min(len(members) - 1, max(1, round(len(members) * fraction)))])
    return [i for i in range(len(names)) if i not in test], sorted(test)


def scattered(positions: Iterable[int], names: Sequence[str]) -> list[int]:
    """The positions in an order that does not follow the names: sets sorted by class would give one-class blocks."""
    return sorted(positions, key=lambda i: name_hash(names[i]))
