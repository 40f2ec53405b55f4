"""Loaders without a pipeline: the configured images are prepared once, into a folder of this machine.

A prepared set lies in ``data.cache_dir/prepared/<key>``, where the key is a hash of the images' names, times and sizes
and of what decides the shards, so that changed images are another set. Any number of processes may ask at once: one
prepares, the others wait for it. The folder appears by one rename, whole.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from hjepa.config import Config, DataConfig, sha256_json
from hjepa.data.datasets import open_source
from hjepa.data.loader import Fetch, ShardDataset, TrainLoader, build_train_loader
from hjepa.data.prepare import REPORT, QuarantineError, check_quarantine, prepare, prepared_key, scratch
from hjepa.data.sources import Source
from hjepa.distributed import World
from hjepa.errors import UserError
from hjepa.files import file_sha256, sync

Json = dict[str, Any]

MANIFEST = "dataset.json"
SCHEMA = 1


def create_dataloaders(config: Config, *, world: World | None = None) -> tuple[TrainLoader, TrainLoader | None]:
    """(train_loader, val_loader) over the configured images, which are prepared first where they are not yet.

    The validation loader visits the first images of the test split, each at most once, uncropped and in fixed order,
    in ``num_samples // batch_size`` batches; it is None where the split has fewer images than there are ranks.

    Args:
        world: This process among the ranks; None reads it from the environment, as torchrun sets it.

    Raises:
        UserError: no such images, too many that cannot be used, or a batch that does not divide into the ranks.
    """
    world = world or World.from_environment()
    manifest, fetch = open_prepared(config, world=world)
    training = config.training
    pin_memory = training.device != "cpu" and torch.cuda.is_available()
    train = build_train_loader(config, ShardDataset(manifest, "train", fetch), world, pin_memory=pin_memory)
    images = manifest["splits"]["test"]["samples"] if "test" in manifest["splits"] else 0
    batch_size = min(training.batch_size, images // world.size * world.size)
    if batch_size == 0:
        return train, None
    test = ShardDataset(manifest, "test", fetch)
    return train, build_train_loader(config, test, world, pin_memory=pin_memory, batch_size=batch_size, validation=True)


def open_prepared(config: Config, *, world: World | None = None) -> tuple[Json, Fetch]:
    """The manifest of the prepared data set, as ``prepare`` describes it, with its ``uri``, and where its files are.

    Args:
        world: Only its main process speaks of a set that is there already; None reads it from the environment.

    Raises:
        UserError: no such images, too many that cannot be used, or a cache folder that cannot be used.
    """
    speaks = (world or World.from_environment()).is_main
    cache = Path(config.data.cache_dir).expanduser().absolute() / "prepared"
    # Whoever comes first may have to download the source, alone. Later, all ranks may list its files at once.
    lock = cache / f"{sha256_json([config.data.name, config.data.root])[:16]}.lock"
    with _alone(lock, config.data, speaks) as first:
        if first:
            manifest, folder = _find_or_prepare(config.data, open_source(config.data), cache, speaks)
            lock.write_text("opened\n", "ascii")
            return manifest, folder.joinpath
    source = open_source(config.data)
    missing = _read(_folder(cache, source, config.data)) is None
    with _alone(lock, config.data, speaks) if missing else contextlib.nullcontext():
        manifest, folder = _find_or_prepare(config.data, source, cache, speaks)
    return manifest, folder.joinpath


@contextlib.contextmanager
def _alone(lock: Path, data: DataConfig, speaks: bool) -> Iterator[bool]:
    """Holds a lock that ends with this process, however it ends; gives whether the lock file is still empty."""
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("ab")
    except OSError as error:
        raise UserError(f"data.cache_dir={data.cache_dir}: {error}. Choose a folder that can be written to.") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if speaks:
                _say("another process prepares this data set; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            raise UserError(
                f"data.cache_dir={data.cache_dir}: this file system has no locks ({error.strerror}). "
                "Choose a folder on a disk of this machine."
            ) from None
        yield lock.stat().st_size == 0


def _find_or_prepare(data: DataConfig, source: Source, cache: Path, speaks: bool) -> tuple[Json, Path]:
    folder = _folder(cache, source, data)
    manifest = _read(folder)
    if manifest is not None:
        try:
            check_quarantine(manifest, data, folder / REPORT)
        except QuarantineError as error:
            raise UserError(f"{error}\nThe report: {error.report}") from None
        if speaks:
            _say(f"{_described(manifest)}: already prepared in {folder}, nothing to do")
        return manifest, folder
    _say(f"source: {source.name}, {source.detail}")
    with scratch(cache) as work:
        made = work / "made"
        try:
            prepared = prepare(source, data, made, progress=lambda state: _say(str(state)))
        except QuarantineError as error:
            # The report names the files to mend, so it must outlive the work folder.
            kept = cache / f"{folder.name}-{REPORT}"
            shutil.copyfile(error.report, kept)
            raise UserError(f"{error}\nThe report: {kept}") from None
        (made / MANIFEST).write_text(json.dumps(prepared.manifest, indent=1), "utf-8")
        for path in (*(file.path for file in prepared.files), made / MANIFEST, made):
            sync(path)
        with contextlib.suppress(FileNotFoundError):
            folder.rename(work / "damaged")  # _read has refused it
        made.rename(folder)
        sync(cache)
    manifest = {**prepared.manifest, "uri": folder.as_uri()}
    for note in manifest["source"]["notes"]:
        _say(f"note: {note}")
    quarantine = manifest["quarantine"]["total"]
    _say(f"{_described(manifest)}, {quarantine:,} quarantined: prepared in {folder}")
    return manifest, folder


def _folder(cache: Path, source: Source, data: DataConfig) -> Path:
    return cache / prepared_key(source, data)[:16]


def _read(folder: Path) -> Json | None:
    """The manifest of a set of which every file is there in its full length, and the indexes as they were written.

    The indexes have the checksum of each image, which is checked when that is read.
    """
    try:
        manifest: Json = json.loads((folder / MANIFEST).read_text("utf-8"))
        if manifest["schema"] != SCHEMA:
            return None
        files = [file for split in manifest["splits"].values() for file in (*split["shards"], split["index"])]
        if any((folder / file["key"]).stat().st_size != file["bytes"] for file in files):
            return None
        indexes = [split["index"] for split in manifest["splits"].values()]
        if any(file_sha256(folder / index["key"]) != index["sha256"] for index in indexes):
            return None
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return manifest | {"uri": folder.as_uri()}


def _described(manifest: Json) -> str:
    counts = ", ".join(f"{split['samples']:,} {name}" for name, split in manifest["splits"].items())
    return f"data set {manifest['name']} {manifest['digest'][:16]}: {counts} images"


def _say(message: str) -> None:
    print(message, flush=True)
