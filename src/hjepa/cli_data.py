"""``hjepa data``: the prepared data sets of a store, one in full, and whether it is still as it was prepared."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hjepa.cli_models import add_row, console_of_any_width, plain_table
from hjepa.errors import HjepaError, UserError
from hjepa.utils.logging import format_seconds, say, warn
from hjepa.words import counted, in_bytes

if TYPE_CHECKING:
    from hjepa.adapters.datasets import StoredDataset
    from hjepa.adapters.s3 import S3Store

HELP = "The prepared data sets in S3: list, show, verify, remove."
MOST_CLASSES = 20
REPORT_SECONDS = 2.0


def add_parser(
    commands: Any,
    add_settings: Callable[[argparse.ArgumentParser], None],
    open_store: Callable[[argparse.Namespace], S3Store],
) -> None:
    """Adds ``data`` with its actions to the subparsers of the command line.

    Args:
        add_settings: Adds the options that say where the store is.
        open_store: The store that they say.
    """
    data = commands.add_parser("data", help=HELP, description=HELP)
    actions = data.add_subparsers(title="actions", metavar="ACTION", required=True)

    def add(name: str, function: Any, help: str) -> argparse.ArgumentParser:
        command: argparse.ArgumentParser = actions.add_parser(name, help=help, description=help)
        command.set_defaults(command=run, action=function, open_store=open_store)
        add_settings(command)
        if name != "ls":
            command.add_argument(
                "dataset", metavar="DATASET", help="its name, the beginning of its digest, NAME/DIGEST, or its URI"
            )
        return command

    add("ls", ls, "List the data sets.")
    command = add("show", show, "Show one: counts, statistics, quarantine, duplicates.")
    command.add_argument("--contact-sheet", type=Path, metavar="FILE", help="also save its contact sheet, a PNG")
    add("verify", verify, "Read every byte of one and check it against its checksum.")
    command = add("rm", rm, "Delete one from S3; images that it was made from are not touched.")
    command.add_argument("--yes", action="store_true", help="do it, instead of saying what would be deleted")


def run(options: argparse.Namespace) -> None:
    """Runs the chosen action. Raises UserError for an unknown data set, HjepaError if S3 is down or bytes are wrong."""
    options.action(options)


def ls(options: argparse.Namespace) -> None:
    from hjepa.adapters import datasets

    store = options.open_store(options)
    found, damaged = datasets.stored(store)
    for problem in damaged:
        warn(str(problem))
    for folder, parts in datasets.unfinished(store).items():
        size = in_bytes(sum(part.size for part in parts))
        say(f"being prepared, or left unfinished: {store.uri(folder)}, {counted(len(parts), 'file')}, {size}")
    if not found and not damaged:
        say(f"nothing is prepared in {store.uri(datasets.PREFIX)} yet; `hjepa prepare-data` makes the first data set")
    if not found:
        return
    table = plain_table("data sets", "name", "digest", "images", "classes", "size", "quarantined", "uri")
    for item in found:
        manifest = item.manifest
        counts = ", ".join(f"{split['samples']:,} {name}" for name, split in item.splits.items())
        add_row(
            table,
            item.name,
            item.digest[:12],
            counts,
            str(len(manifest["classes"]) or "-"),
            in_bytes(item.bytes),
            str(manifest["quarantine"]["total"]),
            store.uri(item.key),
        )
    console_of_any_width().print(table)


def show(options: argparse.Namespace) -> None:
    from hjepa.adapters import datasets
    from hjepa.adapters.s3 import ObjectNotFoundError

    store = options.open_store(options)
    item = datasets.find(store, options.dataset)
    for name, text in _facts(item):
        say(f"{name:<14} {text}")
    say(f"{'uri':<14} {store.uri(item.key)}")
    sheet = item.manifest.get("contact_sheet")
    if options.contact_sheet is not None:
        if not sheet:
            raise HjepaError(f"{item.name} was prepared without a contact sheet; prepare it again for one")
        try:
            store.download(f"{item.key}/{sheet['key']}", options.contact_sheet, sha256=sheet["sha256"])
        except ObjectNotFoundError:
            raise HjepaError(
                f"the contact sheet of {item.name} is missing from S3; `hjepa data verify {datasets.short_name(item)}` "
                "says what else is"
            ) from None
        say(f"{'contact sheet':<14} {options.contact_sheet}")


def _facts(item: StoredDataset) -> Iterator[tuple[str, str]]:
    manifest = item.manifest
    yield "name", item.name
    yield "digest", item.digest
    yield "source", f"{manifest['source']['kind']}: {manifest['source']['detail']}"
    for note in manifest["source"]["notes"]:
        yield "note", note
    for name, split in item.splits.items():
        shape = f", all {split['shape'][1]}x{split['shape'][0]}" if split["shape"] else ""
        size = in_bytes(sum(shard["bytes"] for shard in split["shards"]))
        yield name, f"{split['samples']:,} images{shape}, {counted(len(split['shards']), 'shard')}, {size}"
        if split["per_class"]:
            yield "", _per_class(manifest["classes"], split["per_class"])
    mean, std = (" ".join(f"{value:.4f}" for value in manifest["statistics"][name]) for name in ("mean", "std"))
    yield "pixels", f"mean {mean}, deviation {std}, of {manifest['channels']} channels in 0..1"
    quarantine = manifest["quarantine"]
    reasons = ", ".join(f"{count} {reason}" for reason, count in quarantine["by_reason"].items())
    yield (
        "quarantine",
        f"{quarantine['total']:,} files ({quarantine['share']:.2%})" + (f": {reasons}" if reasons else ""),
    )
    if duplicates := manifest.get("duplicates"):
        yield "duplicates", _duplicates(duplicates)
    yield "prepare", ", ".join(f"{key} {value}" for key, value in manifest["prepare"].items())


def _per_class(classes: list[str], counts: list[int]) -> str:
    shown = ", ".join(f"{name!a} {count:,}" for name, count in list(zip(classes, counts, strict=True))[:MOST_CLASSES])
    return shown + (f" and {len(classes) - MOST_CLASSES} classes more" if len(classes) > MOST_CLASSES else "")


def _duplicates(found: Mapping[str, Any]) -> str:
    within = "; ".join(f"{name}: {c['exact']:,} exact, {c['near']:,} near" for name, c in found["within"].items())
    leaked = found["leaked"]
    return f"{within}; of test in train: {leaked['exact']:,} exact, {leaked['near']:,} near"


def verify(options: argparse.Namespace) -> None:
    from hjepa.adapters import datasets

    store = options.open_store(options)
    item = datasets.find(store, options.dataset)
    say(f"verifying {item.name} {item.digest[:12]}: {sum(1 for _ in item.files())} files, {in_bytes(item.bytes)}")
    begun = told = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal told
        now = time.monotonic()
        if now - told >= REPORT_SECONDS:
            told = now
            rate = done / (now - begun)
            left = format_seconds((total - done) / rate)
            say(f"{done / 1e6:,.0f} of {total / 1e6:,.0f} MB, {rate / 1e6:,.0f} MB/s, {left} left")

    problems = datasets.verify(store, item, progress)
    if problems:
        raise HjepaError(
            "\n  ".join([f"{item.name} {item.digest[:12]} is damaged in {counted(len(problems), 'place')}:", *problems])
            + f"\nRemove it with `hjepa data rm {datasets.short_name(item)} --yes`, and prepare it again"
        )
    say(f"all of it is as it was prepared ({format_seconds(time.monotonic() - begun)})")


def rm(options: argparse.Namespace) -> None:
    from hjepa.adapters import datasets

    store = options.open_store(options)
    # By its URI a data set can be removed whose manifest nobody can read.
    given = options.dataset
    key = datasets.folder_of(store, given) if given.startswith("s3://") else datasets.find(store, given).key
    files = datasets.contents(store, key)
    if not files:
        raise UserError(f"{store.uri(key)}: nothing is there; `hjepa data ls` lists what there is")
    what = f"{store.uri(key)}, {counted(len(files), 'file')}, {in_bytes(sum(file.size for file in files))}"
    if not options.yes:
        raise UserError(f"this would delete {what}; runs that used it could not be evaluated again. Add --yes to do it")
    datasets.remove(store, key)
    say(f"deleted {what}")
