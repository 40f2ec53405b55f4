"""The prepared data sets of a store: which there are, and whether every byte of one is as it was prepared."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hjepa.adapters.s3 import ObjectInfo, ObjectNotFoundError, S3Store
from hjepa.config import sha256_json
from hjepa.data.shards import BLOCK, parse_index
from hjepa.errors import HjepaError, UserError

PREFIX = "datasets/"
TAR_INDEXES = "tar-indexes/"
MANIFEST = "dataset.json"
CHECKSUM = "sha256"  # in the manifest, of the rest of it
NEEDED = {CHECKSUM, "name", "digest", "splits", "classes", "channels", "statistics", "quarantine", "source", "prepare"}
OF_THE_SOURCE = ("source", "quarantine")  # what a manifest says of the files that the images came from
PIECE = 8 << 20  # bytes read at a time
SHORTEST_DIGEST = 4
MOST_NAMES = 8  # in a message

Json = dict[str, Any]


class DamagedManifestError(HjepaError):
    """A data set whose manifest is not what was written. The message says how to get rid of it."""


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


@dataclass(frozen=True)
class TarIndexes:
    """Where the images in other people's tar files lie: ``hjepa.data.files.Findings`` in the store of the runs."""

    store: S3Store

    def get(self, name: str) -> bytes | None:
        try:
            return self.store.get_bytes(TAR_INDEXES + name)
        except ObjectNotFoundError:
            return None

    def put(self, name: str, content: bytes) -> None:
        self.store.put_bytes(TAR_INDEXES + name, content)


def put_manifest(store: S3Store, key: str, manifest: Mapping[str, Any]) -> None:
    """Make the data set in the folder ``key`` complete: from now on others find it."""
    store.put_json(f"{key}/{MANIFEST}", {**manifest, CHECKSUM: sha256_json(manifest)})


def load(store: S3Store, key: str) -> StoredDataset:
    """The data set in the folder ``key``.

    Raises:
        ObjectNotFoundError: there is none, or it is still being uploaded.
        DamagedManifestError: its manifest is not what was written.
    """
    place = store.uri(f"{key}/{MANIFEST}")
    remedy = f"`hjepa data rm {store.uri(key)} --yes` removes what is left of it; then prepare it again"
    data = store.get_bytes(f"{key}/{MANIFEST}")
    try:
        manifest = json.loads(data)
    except ValueError as error:
        raise DamagedManifestError(f"{place} is damaged, it is not valid JSON: {error}. {remedy}") from None
    if not isinstance(manifest, dict) or (missing := sorted(NEEDED - set(manifest))):
        lacks = f"it lacks {', '.join(missing)}" if isinstance(manifest, dict) else "it is no JSON object"
        raise DamagedManifestError(f"{place} is damaged, {lacks}. {remedy}")
    if manifest.pop(CHECKSUM) != sha256_json(manifest):
        raise DamagedManifestError(f"{place} is damaged, its content has another checksum than it says. {remedy}")
    return StoredDataset(key, manifest)


def by_recipe(store: S3Store, recipe: str) -> StoredDataset | None:
    """The data set that a source and its settings gave, with what was said of that source; None if there is none.

    Args:
        recipe: The object that leads to it; one that somebody has damaged leads nowhere.

    Raises:
        DamagedManifestError: as of ``load``.
    """
    try:
        lead = json.loads(store.get_bytes(recipe))
        found = load(store, str(lead["dataset"]).removesuffix(f"/{MANIFEST}"))
    except (ObjectNotFoundError, ValueError, LookupError, TypeError):
        return None
    of_source = {name: lead[name] for name in OF_THE_SOURCE if isinstance(lead.get(name), dict)}
    return StoredDataset(found.key, found.manifest | of_source)


def absent(store: S3Store, dataset: StoredDataset) -> list[str]:
    """The files of a data set that are not there in their full size, by one listing."""
    sizes = {item.key: item.size for item in store.list(f"{dataset.key}/")}
    own = [file for file in dataset.files() if "://" not in file["key"]]
    return [file["key"] for file in own if sizes.get(f"{dataset.key}/{file['key']}") != file["bytes"]]


def report_of(store: S3Store, dataset: StoredDataset) -> str:
    """The URI of the quarantine report."""
    report = str(dataset.manifest["quarantine"]["report"])
    return report if "://" in report else store.uri(f"{dataset.key}/{report}")


def whole(store: S3Store, key: str) -> StoredDataset | None:
    """The data set in a folder, if each of its files is there."""
    try:
        found = load(store, key)
    except (ObjectNotFoundError, DamagedManifestError):
        return None
    return None if absent(store, found) else found


def stored(store: S3Store) -> tuple[list[StoredDataset], list[DamagedManifestError]]:
    """Every complete data set, by name and digest, and what is wrong with the others."""
    found: list[StoredDataset] = []
    damaged: list[DamagedManifestError] = []
    for item in list(store.list(PREFIX)):
        if item.key.endswith(f"/{MANIFEST}"):
            try:
                found.append(load(store, item.key.removesuffix(f"/{MANIFEST}")))
            except DamagedManifestError as error:
                damaged.append(error)
            except ObjectNotFoundError:  # removed meanwhile
                continue
    return sorted(found, key=lambda item: (item.name, item.digest)), damaged


def find(store: S3Store, wanted: str) -> StoredDataset:
    """The data set of that name, beginning of its digest, NAME/DIGEST of both, or URI.

    Raises:
        UserError: there is none, or more than one.
        DamagedManifestError: the one at this URI is damaged.
    """
    if wanted.startswith("s3://"):
        try:
            return load(store, folder_of(store, wanted))
        except ObjectNotFoundError:
            raise UserError(f"{wanted}: no {MANIFEST} there; `hjepa data ls` lists what there is") from None
    everything, damaged = stored(store)
    name, _, digest = wanted.rpartition("/")
    found = [item for item in everything if item.name == wanted]
    if not found and re.fullmatch(rf"[0-9a-f]{{{SHORTEST_DIGEST},64}}", digest):
        found = [item for item in everything if item.digest.startswith(digest) and name in ("", item.name)]
    if len(found) == 1:
        return found[0]
    if found:
        which = ", ".join(short_name(item) for item in found)
        raise UserError(f"there are {len(found)} data sets called {wanted}: name one of {which}")
    whole = "no whole data set" if damaged else "no data set"
    known = ", ".join(short_name(item) for item in everything[:MOST_NAMES]) or "none yet"
    if len(everything) > MOST_NAMES:
        known += f" and {len(everything) - MOST_NAMES} more, see `hjepa data ls`"
    raise UserError("\n  ".join([f"{whole} {wanted!r} in {store.uri(PREFIX)}; there is {known}", *map(str, damaged)]))


def short_name(dataset: StoredDataset) -> str:
    """By which ``find`` finds it and no other."""
    return f"{dataset.name}/{dataset.digest[:12]}"


def folder_of(store: S3Store, uri: str) -> str:
    """The key of the folder that a URI names: of a data set, or of the parts of an unfinished one.

    Raises:
        UserError: it is no such URI.
    """
    key = store.key_of(uri.rstrip("/").removesuffix(f"/{MANIFEST}"))
    own = re.fullmatch(rf"{PREFIX}[^/]+/(parts/)?[0-9a-f]{{16}}", key)
    if not own and not (key.startswith(PREFIX) and store.head(f"{key}/{MANIFEST}")):  # somebody else's
        raise UserError(f"{uri}: expected {store.uri(f'{PREFIX}NAME/DIGEST')}, as `hjepa data ls` shows it")
    return key


def unfinished(store: S3Store) -> dict[str, list[ObjectInfo]]:
    """The parts of data sets that are being prepared, or were until somebody stopped that, by their folder."""
    found: dict[str, list[ObjectInfo]] = {}
    for item in store.list(PREFIX):
        if match := re.match(rf"{PREFIX}[^/]+/parts/[0-9a-f]{{16}}(?=/)", item.key):
            found.setdefault(match[0], []).append(item)
    return found


def remove(store: S3Store, key: str) -> None:
    """Delete the data set in a folder, what leads to it first, so that nobody finds a half of it."""
    files = [item.key for item in contents(store, key)]
    recipes = [item.key for item in store.list(f"{key.rpartition('/')[0]}/recipes/") if item.key.endswith(".json")]
    leading = [recipe for recipe in recipes if f'"{key}/{MANIFEST}"'.encode() in store.get_bytes(recipe)]
    for each in [*leading, *sorted(files, key=lambda file: not file.endswith(f"/{MANIFEST}"))]:
        store.delete(each)


def contents(store: S3Store, key: str) -> list[ObjectInfo]:
    """The files of a data set or of parts, which lie in their folder and in none below it."""
    return [item for item in store.list(f"{key}/") if "/" not in item.key.removeprefix(f"{key}/")]


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
