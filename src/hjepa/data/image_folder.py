"""A folder of image files: flat, or one sub-folder per class, with or without train/ and test/ folders above."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from hjepa.config import DataConfig
from hjepa.data.images import RejectedError, decode
from hjepa.data.sources import (
    Payload,
    Source,
    Split,
    file_state,
    files_below,
    hold_out,
    require_train_images,
    scattered,
)
from hjepa.errors import UserError

SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".avif", ".tga",
)  # fmt: skip
TEST_FOLDERS = ("test", "val", "valid", "validation")
CHECKED_FILES = 32  # files that the plausibility check opens


class FileSplit:
    """Files under one folder, read when asked for."""

    chunk = 8

    def __init__(self, root: Path, names: list[str], labels: list[int] | None):
        self.root, self.names, self.labels = root, names, labels

    def __len__(self) -> int:
        return len(self.names)

    def name(self, i: int) -> str:
        return self.names[i]

    def read(self, i: int) -> tuple[Payload, int | None]:
        return (self.root / self.names[i]).read_bytes(), None if self.labels is None else self.labels[i]

    def fingerprint(self) -> str:
        hasher = hashlib.sha256()
        for i, name in enumerate(self.names):
            label = None if self.labels is None else self.labels[i]
            hasher.update(ascii((name, file_state(self.root / name), label)).encode())
        return hasher.hexdigest()


@dataclass(frozen=True)
class _Listing:
    """The image files of one folder, by sub-folder ("" for those that lie in the folder itself)."""

    groups: dict[str, list[str]]
    others: int  # files that are not named like images
    unreadable: list[str]  # folders that could not be listed

    @property
    def classes(self) -> list[str]:
        return sorted(name for name, files in self.groups.items() if name and files)

    @property
    def names(self) -> list[str]:
        return sorted(name for files in self.groups.values() for name in files)


def open_image_folder(data: DataConfig) -> Source:
    """
    Raises:
        UserError: if there is no such folder, no image in it, or classes that the splits do not share.
    """
    root = _root(data)
    listing = _list(root)
    notes = [f"{path} cannot be listed and was left out" for path in listing.unreadable]
    if listing.others:
        notes.append(f"{listing.others} files are not named like images and were left out")
    if not listing.names:
        raise UserError(
            f"data.root={data.root}: no image in this folder or below it (looked for {' '.join(SUFFIXES)}"
            + (f"; found {listing.others} other files" if listing.others else "; it is empty")
            + "). Point data.root at a folder of images, with one sub-folder per class if they are labelled."
        )
    if "train" in listing.classes and all(name in {"train", *TEST_FOLDERS} for name in listing.classes):
        return _presplit(root, listing, data, notes)
    labels_of = _labels(listing, notes)
    names = [name for name in listing.names if labels_of is None or name in labels_of]
    labels = None if labels_of is None else [labels_of[name] for name in names]
    return _held_out(root, names, labels, () if labels is None else tuple(listing.classes), data, notes)


def check_image_folder(data: DataConfig) -> list[str]:
    """Lists the folder and opens a few files; refuses a folder whose sample does not look like images."""
    source = open_image_folder(data)
    split = source.splits["train"]
    count = min(len(split), CHECKED_FILES)
    bad = []
    for k in range(count):
        i = k * len(split) // count
        try:
            decode(split.read(i)[0], max_pixels=data.max_pixels)
        except OSError as error:
            bad.append(f"{split.name(i)!a} cannot be read: {error.strerror}")
        except RejectedError as error:
            bad.append(f"{split.name(i)!a} is {error}")
    # A sample says nothing exact about the share in a large folder: prepare_data counts them all.
    limit = data.quarantine_limit if count == len(split) else max(data.quarantine_limit, 0.5)
    if len(bad) > limit * count:
        raise UserError(
            f"data.root={data.root}: {len(bad)} of {count} files looked at are not usable images "
            f"(data.quarantine_limit allows a share of {data.quarantine_limit:g}): {'; '.join(bad[:3])}"
            f"{'; ...' if len(bad) > 3 else ''}. Remove or replace them, or raise data.quarantine_limit."
        )
    require_train_images(len(split) - len(bad), f"data.root={data.root}")
    counts = ", ".join(f"{len(part)} {name}" for name, part in source.splits.items())
    return [f"{source.detail}: {counts}, {len(source.classes) or 'no'} classes", *source.notes]


def _root(data: DataConfig) -> Path:
    if data.root is None:
        raise UserError("data.name=image-folder needs data.root: the folder that holds the images.")
    root = Path(data.root).expanduser()
    if not root.exists():
        raise UserError(f"data.root={data.root}: there is no such folder. Set data.root to the folder of images.")
    if not root.is_dir():
        raise UserError(f"data.root={data.root} is a file, expected a folder of images.")
    if not os.access(root, os.R_OK | os.X_OK):
        raise UserError(f"data.root={data.root}: no permission to list this folder. Grant read access to it.")
    return root


def _list(root: Path) -> _Listing:
    groups: dict[str, list[str]] = {}
    unreadable: list[str] = []
    others = 0
    for name in files_below(root, unreadable):
        if os.path.splitext(name)[1].lower() in SUFFIXES:
            first, slash, _ = name.partition("/")
            groups.setdefault(first if slash else "", []).append(name)
        else:
            others += 1
    return _Listing(groups, others, unreadable)


def _labels(listing: _Listing, notes: list[str]) -> dict[str, int] | None:
    """Name -> class number, or None where there is nothing to tell apart."""
    classes = listing.classes
    if len(classes) < 2:
        if classes and not listing.groups.get(""):
            notes.append(
                f"only one class ({classes[0]!a}): nothing to tell apart, so the images are used without labels "
                "and k-NN and linear probes are skipped"
            )
        else:
            notes.append("no class sub-folders: the images are used without labels; k-NN and linear probes are skipped")
        return None
    loose = listing.groups.get("", [])
    if loose:
        notes.append(f"{len(loose)} images lie beside the class folders and were left out, for they have no label")
    return {name: label for label, group in enumerate(classes) for name in listing.groups[group]}


def _presplit(root: Path, listing: _Listing, data: DataConfig, notes: list[str]) -> Source:
    train = _list(root / "train")
    labels_of = _labels(train, notes)
    classes = () if labels_of is None else tuple(train.classes)
    names = [name for name in train.names if labels_of is None or name in labels_of]
    labels = None if labels_of is None else [labels_of[name] for name in names]
    if listing.groups.get(""):
        notes.append(f"{len(listing.groups[''])} images lie beside train/ and were left out")
    candidates = [name for name in TEST_FOLDERS if name in listing.classes]
    # Some sets ship a test/ without labels beside a labelled val/.
    test_folder = next((name for name in candidates if not classes or _list(root / name).classes), None)
    unused = [name for name in candidates if name != test_folder]
    if unused:
        notes.append(f"not used: {', '.join(f'{name}/' for name in unused)}")
    if test_folder is None:
        return _held_out(root / "train", names, labels, classes, data, notes, named=root)
    test = _list(root / test_folder)
    unknown = [name for name in test.classes if name not in classes]
    if classes and unknown:
        raise UserError(
            f"data.root={data.root}: {test_folder}/ holds classes that train/ lacks: {', '.join(map(ascii, unknown))}. "
            f"Expected a subset of {', '.join(map(ascii, classes))}."
        )
    test_names = [name for name in test.names if not classes or "/" in name]
    test_labels = [classes.index(name.partition("/")[0]) for name in test_names] if classes else None
    return Source(
        name=_slug(root.name),
        detail=f"image folder {root} (train/ and {test_folder}/)",
        splits={
            "train": _scattered_split(root / "train", names, labels, range(len(names))),
            "test": _scattered_split(root / test_folder, test_names, test_labels, range(len(test_names))),
        },
        classes=classes,
        notes=tuple(notes),
    )


def _held_out(
    root: Path,
    names: list[str],
    labels: list[int] | None,
    classes: tuple[str, ...],
    data: DataConfig,
    notes: list[str],
    named: Path | None = None,
) -> Source:
    train, test = hold_out(names, labels, data.test_fraction)
    splits: dict[str, Split] = {"train": _scattered_split(root, names, labels, train)}
    if test:
        splits["test"] = _scattered_split(root, names, labels, test)
        notes.append(f"no test split: {len(test)} of {len(names)} images are held out (data.test_fraction)")
    else:
        notes.append(
            "no test split, and no class has two images of which one could be held out: "
            "k-NN and linear probes are skipped"
        )
    return Source(
        name=_slug((named or root).name),
        detail=f"image folder {root}",
        splits=splits,
        classes=classes,
        notes=tuple(notes),
    )


def _scattered_split(root: Path, names: list[str], labels: list[int] | None, positions: list[int] | range) -> FileSplit:
    order = scattered(positions, names)
    return FileSplit(root, [names[i] for i in order], None if labels is None else [labels[i] for i in order])


def _slug(name: str) -> str:
    """A name fit for an object key."""
    return re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-.") or "images"
