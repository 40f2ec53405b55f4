"""The prepared data sets of a store: which there are, and whether every byte of one is as it was prepared."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hjepa.adapters.s3 import ObjectNotFoundError, S3Store
from hjepa.data.shards import BLOCK, parse_index
from hjepa.errors import HjepaError, UserError

PREFIX = "datasets/"
MANIFEST = "dataset.json"
PIECE = 8 << 20  # bytes read at a time
SHORTEST_DIGEST = 4

Json = dict[str, Any]


@dataclass(frozen=True)
class StoredDataset:
    key: str  # of its folder
    manifest: Json

    @property
    def name(self) -> str:
        return str(self.manifest["name"])

    @property
    def digest(self) -> str:
        return str(self.manifest["digest"])

    @property
    def splits(self) -> dict[str, Json]:
        """train before test, whatever order the JSON has."""
        return dict(sorted(self.manifest["splits"].items(), reverse=True))

    def files(self) -> Iterator[Mapping[str, Any]]:
        """{"key", "bytes", "sha256"} of everything that the manifest names."""
        for split in self.splits.values():
            yield split["index"]
            yield from split["shards"]
        yield {**self.manifest["quarantine"], "key": self.manifest["quarantine"]["report"]}
        for name in ("contact_sheet", "duplicates"):
            extra = self.manifest.get(name) or {}
            if "key" in extra:
                yield extra

    @property
    def bytes(self) -> int:
        return sum(int(file["bytes"]) for file in self.files())


def stored(store: S3Store) -> list[StoredDataset]:
    """Every complete data set, by name and digest: one without its manifest is still being uploaded."""
    keys = [item.key for item in store.list(PREFIX) if item.key.endswith(f"/{MANIFEST}")]
    found = [StoredDataset(key.removesuffix(f"/{MANIFEST}"), store.get_json(key)) for key in keys]
    return sorted(found, key=lambda item: (item.name, item.digest))


def find(store: S3Store, wanted: str) -> StoredDataset:
    """The data set of that name, beginning of its digest, or URI.

    Raises:
        UserError: there is none, or more than one.
    """
    if wanted.startswith("s3://"):
        key = store.key_of(wanted.rstrip("/").removesuffix(f"/{MANIFEST}"))
        try:
            return StoredDataset(key, store.get_json(f"{key}/{MANIFEST}"))
        except ObjectNotFoundError:
            raise UserError(f"{wanted}: no {MANIFEST} there; `hjepa data ls` lists what there is") from None
    everything = stored(store)
    found = [item for item in everything if item.name == wanted]
    if not found and re.fullmatch(rf"[0-9a-f]{{{SHORTEST_DIGEST},64}}", wanted):
        found = [item for item in everything if item.digest.startswith(wanted)]
    if len(found) == 1:
        return found[0]
    known = ", ".join(f"{item.name} {item.digest[:12]}" for item in everything) or "nothing is prepared there yet"
    if found:
        which = ", ".join(item.digest[:12] for item in found)
        raise UserError(f"there are {len(found)} data sets called {wanted}: name one by its digest: {which}")
    raise UserError(f"no data set {wanted!r} in {store.uri(PREFIX)}: {known}")


def verify(store: S3Store, dataset: StoredDataset, progress: Callable[[int, int], None]) -> list[str]:
    """Read every file of a data set and hold it against its checksum, and the indexes against the shards.

    Args:
        progress: Called with (bytes read, bytes in all).

    Returns:
        What is wrong, a line for each; empty if nothing is.
    """
    problems: list[str] = []
    total, done = dataset.bytes, 0
    for file in dataset.files():
        key = f"{dataset.key}/{file['key']}"
        digest = hashlib.sha256()
        size, expected = 0, int(file["bytes"])
        try:
            info = store.head(key)
            if info is None:
                problems.append(f"{file['key']}: missing")
                continue
            if info.size != expected:
                problems.append(f"{file['key']}: {info.size:,} bytes, expected {expected:,}")
                continue
            while size < expected:
                piece = store.get_bytes(key, start=size, length=min(PIECE, expected - size))
                digest.update(piece)
                size += len(piece)
                done += len(piece)
                progress(done, total)
        except HjepaError as error:
            problems.append(f"{file['key']}: cannot be read: {error}")
            continue
        if digest.hexdigest() != file["sha256"]:
            problems.append(f"{file['key']}: sha256 is {digest.hexdigest()[:16]}..., expected {file['sha256'][:16]}...")
    # A damaged index says nothing about the shards.
    whole = not any(problem.partition(":")[0].endswith(".index") for problem in problems)
    return problems + (_misfits(store, dataset) if whole else [])


def _misfits(store: S3Store, dataset: StoredDataset) -> list[str]:
    """Where an index does not fit the shards that the manifest names."""
    problems = []
    for name, split in dataset.splits.items():
        key = split["index"]["key"]
        records = parse_index(store.get_bytes(f"{dataset.key}/{key}"), key)
        if len(records) != split["samples"]:
            problems.append(f"{key}: {len(records):,} samples, the manifest has {split['samples']:,} of {name}")
        sizes = np.array([shard["bytes"] for shard in split["shards"]], dtype=np.uint64)
        outside = (records["shard"] >= len(sizes)) | (records["offset"] < BLOCK)
        inside = records[~outside]
        ends = inside["offset"] + inside["length"]
        if outside.any() or (ends > sizes[inside["shard"]]).any():
            problems.append(f"{key}: it points outside the shards")
    return problems
