"""Tar files of samples, named as the webdataset library names them: ``KEY.jpg`` with ``KEY.cls`` or ``KEY.json``.

One pass over the headers finds every image; workers then read single images from where they lie. Over a network that
pass takes as long as reading all of the files, so what it found is kept, and those who need it at the same time share
it. Nothing is extracted, so that a member's name, wherever it leads, is only a name. What ``prepare`` wrote itself is
recognised by its manifest and keeps its order and its classes: prepared again with the same settings, it gives the same
digest.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import zlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hjepa.config import DataConfig
from hjepa.data.files import Files, Findings, LocalFiles, OpenStore, open_folder, split_path
from hjepa.data.image_folder import SUFFIXES
from hjepa.data.images import RejectedError
from hjepa.data.labelled import NONE, PART_WORDS, TRAIN, MakeSplit, Samples, build_source
from hjepa.data.plausibility import check_samples
from hjepa.data.sources import Payload, Skipped, Source, Split, slug
from hjepa.data.tar_index import NO_END_MARK, CompressedTarError, TarDamagedError, Window, members
from hjepa.errors import UserError

LOCAL_WINDOW = 16_384  # bytes: some small members, or the end of a large one and the next header
REMOTE_WINDOW = 4 << 20  # a request costs as much time as some MiB
REMOTE_THREADS = 8
CHECKED_BYTES = 1_000_000_000  # a larger set is only sampled before prepare_data
CHECKED_SHARDS = 4
MAX_LABEL_BYTES = 1 << 16
MAX_EXPANSIONS = 100_000
MAX_DAMAGED = 20  # in a message
MANIFEST = "dataset.json"
COMPRESSED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
INDEX = "tar-index-1"  # in the names of findings; another number means that scans find something else
EXPANSION = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)")


class _Found(NamedTuple):
    """Columns of equal length: where every image lies."""

    shards: array[int]  # positions in the list of shards
    offsets: array[int]
    sizes: array[int]  # bytes


class TarSplit:
    """Images inside tar files in a fixed order, read when asked for."""

    chunk = 8

    def __init__(
        self,
        files: Files,
        shards: Sequence[str],
        samples: Samples,
        found: _Found,
        rows: NDArray[np.int64],
        labels: NDArray[np.int32] | None,
    ):
        """
        Args:
            rows: (N,) positions in ``samples`` and ``found``.
            labels: (N,) class numbers, or None.
        """
        self.files, self.shards, self.samples, self.found = files, shards, samples, found
        self.rows, self.labels = rows, labels

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, i: int) -> str:
        return self.samples.names[int(self.rows[i])]

    def read(self, i: int) -> tuple[Payload, int | None]:
        row = int(self.rows[i])
        size = self.found.sizes[row]
        data = self.files.read(self.shards[self.found.shards[row]], self.found.offsets[row], size)
        if len(data) < size:
            raise RejectedError("truncated", f"{len(data)} of {size} bytes are left in the tar file")
        label = None if self.labels is None else int(self.labels[i])
        return data, label

    def fingerprint(self) -> str:
        hasher = hashlib.sha256()
        columns = [np.array(column, dtype=np.int64)[self.rows] for column in self.found]
        for number in np.unique(columns[0]).tolist():
            hasher.update(ascii((self.shards[number], self.files.state(self.shards[number]))).encode())
        for column in columns:
            hasher.update(column.tobytes())
        if self.labels is not None:
            hasher.update(self.labels.tobytes())
        return hasher.hexdigest()


def open_tar_shards(data: DataConfig, open_store: OpenStore | None = None, findings: Findings | None = None) -> Source:
    """
    Args:
        findings: Keeps where the images in files in S3 lie.

    Raises:
        UserError: if there is no such file or folder, a shard is compressed or unreadable, or none holds an image.
    """
    files, shards, title = _shards(data, open_store)
    return _open(files, shards, title, data, findings)


def check_tar_shards(data: DataConfig, open_store: OpenStore | None = None) -> list[str]:
    """Reads the headers of the shards, of a large set only those of a few, and some of the images."""
    files, shards, title = _shards(data, open_store)
    if sum(files.state(shard)[0] for shard in shards) > CHECKED_BYTES and len(shards) > CHECKED_SHARDS:
        candidates = [shard for shard in shards if _part(shard) == TRAIN] or shards
        some = [candidates[k * len(candidates) // CHECKED_SHARDS] for k in range(CHECKED_SHARDS)]
        notes = [f"looked at {CHECKED_SHARDS} of {len(shards)} tar files"]
        shards = list(dict.fromkeys(some))
        # As few say nothing exact about the share of damaged ones: prepare_data counts them all.
        some_damaged = data.model_copy(update={"quarantine_limit": max(data.quarantine_limit, 0.5)})
        return check_samples(_open(files, shards, title, some_damaged), data) + notes
    return check_samples(_open(files, shards, title, data), data)


def _open(files: Files, shards: list[str], title: str, data: DataConfig, findings: Findings | None = None) -> Source:
    where = f"data.root={data.root}"
    own = _own_manifest(files, shards)
    if own is not None:
        shards = own.shards
    samples, found, notes, damaged = _joined(shards, _scan_all(files, shards, data, where, findings))
    _require_few_damaged(damaged, shards, len(samples.names), data, where)
    if data.label_column and not samples.values:
        raise UserError(
            f"{where}: no sample has a .json with the field {data.label_column!r} (data.label_column). Correct it, or "
            "set it to an empty text to use the images without labels."
        )
    if not len(samples.names):
        raise UserError(
            f"{where}: no image in {len(shards)} tar files (looked for members named {' '.join(SUFFIXES)})"
            + "".join(f"; {note}" for note in notes)
            + ". Expected samples such as 000001.jpg with 000001.cls."
        )
    make_split = partial(TarSplit, files, shards, samples, found)
    detail = f"tar shards {files.where} ({len(shards)} files)"
    if own is not None and (splits := _as_prepared(samples, found, own, make_split)):
        notes.append("these shards were written by hjepa: their order, splits and classes are kept")
        return Source(name=own.name, detail=detail, splits=splits, classes=own.classes, notes=tuple(notes))
    return build_source(samples, data=data, name=slug(title), detail=detail, make_split=make_split, notes=notes)


# -- which files -----------------------------------------------------------------------------------------------------


def _shards(data: DataConfig, open_store: OpenStore | None) -> tuple[Files, list[str], str]:
    """The folder, the names of the tar files in it, and a name for the data set."""
    if data.root is None:
        raise UserError("data.name=tar-shards needs data.root: a folder of .tar files, one of them, or a pattern.")
    where, root = f"data.root={data.root}", data.root.rstrip("/")
    if root.lower().endswith(COMPRESSED_SUFFIXES):
        raise UserError(_compressed(where, root))
    if root.lower().endswith(".tar") and not os.path.isdir(os.path.expanduser(root)):
        folder, pattern = split_path(root, "data.root")
        while "{" in folder:  # a pattern may name several folders
            folder, last = split_path(folder, "data.root")
            pattern = f"{last}/{pattern}"
        files = open_folder(folder, open_store, key="data.root", holds="a folder of .tar files, or one of them")
        wanted = [pattern] if not files.missing([pattern]) else _expand(pattern, where)
        if missing := files.missing(wanted):
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise UserError(f"{where}: there is no {missing[0]}{more} in {files.where}. Correct data.root.")
        return files, wanted, re.sub(r"[-_.]*[{].*", "", pattern).removesuffix(".tar")
    files = open_folder(data.root, open_store, key="data.root", holds="a folder of .tar files, or one of them")
    skipped = Skipped()
    names = list(files.names(skipped))
    packed = [name for name in names if name.lower().endswith(COMPRESSED_SUFFIXES)]
    if packed:
        raise UserError(_compressed(f"{where}: {packed[0]}", packed[0]))
    if skipped.unreadable:
        raise UserError(f"{where}: cannot list {skipped.unreadable[0]}. Grant read access to it.")
    shards = sorted(name for name in names if name.lower().endswith(".tar"))
    if not shards:
        raise UserError(f"{where}: no .tar file in this folder or below it ({len(names)} other files).")
    return files, shards, files.name


def _compressed(where: str, name: str) -> str:
    return (
        f"{where}: a compressed tar file can only be read from its start, and images are read from where they lie. "
        f"Unpack it to {re.sub(r'[.](tgz|tar[.][a-z0-9]+)$', '.tar', name.rpartition('/')[2])}, and use that: "
        "images inside are compressed already, so that it grows by little."
    )


def _expand(pattern: str, where: str) -> list[str]:
    """``a-{00..02}.tar`` and ``{train,test}.tar`` as a shell would expand them, in order."""
    names = [pattern]
    while any(EXPANSION.search(name) for name in names):
        names = [grown for name in names for grown in _expand_one(name, where)]
        if len(names) > MAX_EXPANSIONS:
            raise UserError(f"{where}: the pattern stands for more than {MAX_EXPANSIONS} files.")
    return list(dict.fromkeys(names))


def _expand_one(pattern: str, where: str) -> list[str]:
    """Without its first pair of braces that holds no other."""
    match = EXPANSION.search(pattern)
    if match is None:
        return [pattern]
    choices = match[1].split(",")
    if bounds := RANGE.fullmatch(match[1]):
        first, last = int(bounds[1]), int(bounds[2])
        if last < first or last - first >= MAX_EXPANSIONS:
            raise UserError(f"{where}: {match[0]} is not a range of files, expected such as {{000000..000099}}.")
        choices = [str(number).zfill(len(bounds[1])) for number in range(first, last + 1)]
    return [f"{pattern[: match.start()]}{choice}{pattern[match.end() :]}" for choice in choices]


def _part(shard: str) -> int:
    """The split of a shard, by the first word that names one: of its own name, else of its folders."""
    folder, _, base = shard.lower().rpartition("/")
    words = re.split(r"[^a-z]+", f"{base}/{folder}")
    return next((PART_WORDS[word] for word in words if word in PART_WORDS), NONE)


# -- what hjepa wrote itself -----------------------------------------------------------------------------------------


class _Own(NamedTuple):
    name: str
    classes: tuple[str, ...]
    splits: dict[str, dict[str, int]]  # split -> shard -> samples
    shards: list[str]


def _own_manifest(files: Files, shards: Sequence[str]) -> _Own | None:
    """From the manifest that ``prepare`` leaves beside its shards; None if there is none of these very shards."""
    try:
        manifest = json.loads(files.read(MANIFEST))
        splits = {
            str(split): {str(shard["key"]): int(shard["samples"]) for shard in section["shards"]}
            for split, section in sorted(manifest["splits"].items(), reverse=True)  # train before test
        }
        own = _Own(
            str(manifest["name"]),
            tuple(str(name) for name in manifest["classes"]),
            splits,
            [shard for section in splits.values() for shard in section],
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # none, or somebody else's
        return None
    return own if sorted(own.shards) == sorted(shards) and list(splits)[:1] == ["train"] else None


def _as_prepared(samples: Samples, found: _Found, own: _Own, make_split: MakeSplit) -> dict[str, Split] | None:
    """The splits as they were written, with class numbers as stored; None if the manifest says something else."""
    numbers = [int(value) if re.fullmatch(r"\d{1,9}", value) else NONE for value in samples.values]
    labels = np.array([*numbers, NONE], dtype=np.int32)[np.frombuffer(samples.labels, dtype=np.int32)]
    promised = [count for shards in own.splits.values() for count in shards.values()]
    there = np.bincount(np.frombuffer(found.shards, dtype=np.int32), minlength=len(promised))
    if there.tolist() != promised or bool((labels >= len(own.classes)).any()):
        return None
    splits: dict[str, Split] = {}
    start = 0
    for split, shards in own.splits.items():
        stop = start + sum(shards.values())
        labelled = own.classes and bool((labels[start:stop] != NONE).all())
        splits[split] = make_split(np.arange(start, stop, dtype=np.int64), labels[start:stop] if labelled else None)
        start = stop
    return splits


# -- what is in them -------------------------------------------------------------------------------------------------


class _Scan(NamedTuple):
    """The samples of one shard, and what is to be said of it."""

    keys: list[str]
    labels: list[str | None]
    offsets: list[int]
    sizes: list[int]
    notes: Counter[str]
    damage: str  # empty if the file is whole

    def encoded(self) -> bytes:
        """Some twenty bytes per sample, where a tuple of lists takes ten times as many."""
        return zlib.compress(json.dumps(self).encode())

    @classmethod
    def decoded(cls, content: bytes) -> _Scan:
        """
        Raises:
            ValueError: if that is nothing which ``encoded`` gave.
        """
        try:
            scan = cls(*json.loads(zlib.decompress(content)))
        except (zlib.error, TypeError) as error:
            raise ValueError(str(error)) from None
        return scan._replace(notes=Counter(scan.notes))


def _scan_all(
    files: Files, shards: Sequence[str], data: DataConfig, where: str, findings: Findings | None
) -> Iterator[_Scan]:
    """In the order of the shards; over a network several at once."""
    if isinstance(files, LocalFiles):
        yield from (_scan(files, shard, data, where, LOCAL_WINDOW) for shard in shards)
        return

    def scan(shard: str) -> bytes:
        """Encoded, for nearly all of them may have to wait for the first."""
        known = None if findings is None else _known(files, shard, data, findings)
        if known is None:
            known = _scan(files, shard, data, where, REMOTE_WINDOW).encoded()
            if findings is not None:
                findings.put(_finding(files, shard, data), known)
        return known

    pool = ThreadPoolExecutor(REMOTE_THREADS)
    try:
        # Pods that start together each begin somewhere else, and find the work of the others done.
        order = list(shards) if findings is None else random.sample(shards, len(shards))
        pending = {shard: pool.submit(scan, shard) for shard in order}
        for shard in shards:
            yield _Scan.decoded(pending.pop(shard).result())
    finally:
        pool.shutdown(cancel_futures=True)


def _finding(files: Files, shard: str, data: DataConfig) -> str:
    """The name of what is known of a shard in its present state."""
    state = ascii((files.where, shard, files.state(shard), data.label_column))
    return f"{INDEX}-{hashlib.sha256(state.encode()).hexdigest()}"


def _known(files: Files, shard: str, data: DataConfig, findings: Findings) -> bytes | None:
    content = findings.get(_finding(files, shard, data))
    if content is None:
        return None
    try:
        _Scan.decoded(content)
    except ValueError:  # damaged; it is found out again
        return None
    return content


def _scan(files: Files, shard: str, data: DataConfig, where: str, window: int) -> _Scan:
    read = Window(lambda start, length: files.read(shard, start, length), window)
    images: dict[str, tuple[int, int, int]] = {}  # key -> (rank of its suffix, offset, bytes)
    holders = () if data.label_column == "" else ("json",) if data.label_column else ("cls", "json")
    labels: dict[str, tuple[int, str | None]] = {}  # key -> (rank of its holder, label)
    keys: set[str] = set()
    notes: Counter[str] = Counter()
    damage = ""
    try:
        for member in members(read):
            folder, slash, base = member.name.rpartition("/")
            stem, _, suffix = base.partition(".")
            if not member.regular or not stem or not suffix:
                notes["members are no files with a key and a suffix"] += not member.name.endswith("/")
                continue
            key, suffix = f"{folder}{slash}{stem}", suffix.lower()
            keys.add(key)
            if (rank := _rank(suffix)) is not None:
                if key in images:
                    notes["images have the key of another one in their shard"] += 1
                if key not in images or rank < images[key][0]:
                    images[key] = rank, member.offset, member.size
            elif suffix in holders and (key not in labels or holders.index(suffix) < labels[key][0]):
                content = b"" if member.size > MAX_LABEL_BYTES else read(member.offset, member.size)
                try:
                    labels[key] = holders.index(suffix), _label(content, suffix, data.label_column or "label")
                except (ValueError, RecursionError):
                    notes["labels are not readable"] += 1
    except CompressedTarError as error:
        raise UserError(_compressed(f"{where}: {shard} is {error} data", shard)) from None
    except TarDamagedError as error:
        damage = str(error)
    except OSError as error:
        raise UserError(f"{where}: {shard} cannot be read: {error.strerror or error}.") from None
    notes["samples have no image"] += len(keys) - len(images)
    return _Scan(
        keys=list(images),
        labels=[labels[key][1] if key in labels else None for key in images],
        offsets=[offset for _, offset, _ in images.values()],
        sizes=[size for *_, size in images.values()],
        notes=notes,
        damage=damage,
    )


def _rank(suffix: str) -> int | None:
    """0 for ``jpg``, 1 for ``view.jpg``, which may be one of several, None for what is no image."""
    if f".{suffix}" in SUFFIXES:
        return 0
    return 1 if os.path.splitext(suffix)[1] in SUFFIXES else None


def _label(content: bytes, suffix: str, field: str) -> str | None:
    """
    Raises:
        ValueError: if it is no text or number of one line.
    """
    value: Any = json.loads(content) if suffix == "json" else content.decode("utf-8-sig")
    if suffix == "json":
        value = value.get(field) if isinstance(value, dict) else None
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(value)
    text = str(value).strip()
    if len(text.splitlines()) > 1 or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError(text)
    return text or None


def _joined(shards: Sequence[str], scans: Iterable[_Scan]) -> tuple[Samples, _Found, list[str], list[str]]:
    """The samples, where they are, notes, and what is damaged."""
    samples, found = Samples(), _Found(array("i"), array("Q"), array("Q"))
    counts: Counter[str] = Counter()
    damaged: list[str] = []
    unended: list[str] = []
    for number, (shard, scan) in enumerate(zip(shards, scans, strict=True)):
        part = _part(shard)
        for key, label in zip(scan.keys, scan.labels, strict=True):
            samples.append(f"{shard}:{key}", label, part)
        found.shards.extend([number] * len(scan.keys))
        found.offsets.extend(scan.offsets)
        found.sizes.extend(scan.sizes)
        counts.update(scan.notes)
        if scan.damage:
            told = f"{shard} is damaged: {scan.damage}; the {len(scan.keys)} images before are used"
            # Some programs write no end mark, so that on its own it is no sign of a loss.
            (unended if scan.damage.startswith(NO_END_MARK) and scan.keys else damaged).append(told)
    notes = [f"{count} {what}, and were left out" for what, count in counts.items() if count]
    return samples, found, [*notes, *damaged, *_shortened(unended)], damaged


def _shortened(lines: list[str]) -> list[str]:
    left = len(lines) - MAX_DAMAGED
    return lines if left <= 0 else [*lines[:MAX_DAMAGED], f"... and {left} more"]


def _require_few_damaged(damaged: list[str], shards: Sequence[str], images: int, data: DataConfig, where: str) -> None:
    """
    Raises:
        UserError: if more of the tar files are damaged than ``data.quarantine_limit`` allows.
    """
    if len(damaged) <= data.quarantine_limit * len(shards):
        return
    shown = "\n  ".join(_shortened(damaged))
    raise UserError(
        f"{where}: {len(damaged)} of {len(shards)} tar files are damaged, and data.quarantine_limit allows a share of "
        f"{data.quarantine_limit:g}. Fetch them again, or raise data.quarantine_limit to use the {images} images that "
        f"can be found:\n  {shown}"
    )
