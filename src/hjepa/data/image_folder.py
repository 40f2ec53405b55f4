"""A folder of image files: flat, or one sub-folder per class, with or without train/ and test/ folders above."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from hjepa.config import DataConfig
from hjepa.data.files import Files, LocalFiles, OpenStore, open_folder
from hjepa.data.plausibility import check_samples
from hjepa.data.sources import Payload, Skipped, Source, Split, hold_out, hold_out_note, scattered, slug
from hjepa.errors import UserError

SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".avif", ".tga",
)  # fmt: skip
TEST_FOLDERS = ("test", "val", "valid", "validation")


class FileSplit:
    """Files under one folder, read when asked for."""

    chunk = 8

    def __init__(self, files: Files, names: list[str], labels: list[int] | None):
        self.files, self.names, self.labels = files, names, labels

    def __len__(self) -> int:
        return len(self.names)

    def name(self, i: int) -> str:
        return self.names[i]

    def read(self, i: int) -> tuple[Payload, int | None]:
        return self.files.read(self.names[i]), None if self.labels is None else self.labels[i]

    def fingerprint(self) -> str:
        hasher = hashlib.sha256()
        for i, name in enumerate(self.names):
            label = None if self.labels is None else self.labels[i]
            hasher.update(ascii((name, self.files.state(name), label)).encode())
        return hasher.hexdigest()


@dataclass(frozen=True)
class _Listing:
    """The image files of one folder, by sub-folder ("" for those that lie in the folder itself)."""

    groups: dict[str, list[str]]
    others: int  # files that are not named like images

    @property
    def classes(self) -> list[str]:
        return sorted(name for name, files in self.groups.items() if name and files)

    @property
    def names(self) -> list[str]:
        return sorted(name for files in self.groups.values() for name in files)


def open_image_folder(data: DataConfig, open_store: OpenStore | None = None) -> Source:
    """
    Raises:
        UserError: if there is no such folder, no image in it, or classes that the splits do not share.
    """
    if data.root is None:
        raise UserError("data.name=image-folder needs data.root: the folder that holds the images.")
    root = open_folder(data.root, open_store, key="data.root", holds="the folder of images")
    skipped = Skipped()
    listing = _grouped(_without_cache(root, root.names(skipped), data))
    notes = skipped.notes()
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


def check_image_folder(data: DataConfig, open_store: OpenStore | None = None) -> list[str]:
    """Lists the folder and opens a few files; refuses a folder whose sample does not look like images."""
    return check_samples(open_image_folder(data, open_store), data)


def _grouped(names: Iterable[str]) -> _Listing:
    groups: dict[str, list[str]] = {}
    others = 0
    for name in names:
        if os.path.splitext(name)[1].lower() in SUFFIXES:
            first, slash, _ = name.partition("/")
            groups.setdefault(first if slash else "", []).append(name)
        else:
            others += 1
    return _Listing(groups, others)


def _without_cache(root: Files, names: Iterable[str], data: DataConfig) -> Iterator[str]:
    """The names but for those in ``data.cache_dir``, whose contact sheets are no images of the user's."""
    cache = None
    if isinstance(root, LocalFiles):
        cache = root.inside(os.path.abspath(os.path.expanduser(data.cache_dir)))
    return (name for name in names if cache is None or not name.startswith(f"{cache}/"))


def _part(listing: _Listing, folder: str) -> _Listing:
    """The listing of one sub-folder, seen from inside."""
    return _grouped(name.partition("/")[2] for name in listing.groups[folder])


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


def _presplit(root: Files, listing: _Listing, data: DataConfig, notes: list[str]) -> Source:
    train = _part(listing, "train")
    labels_of = _labels(train, notes)
    classes = () if labels_of is None else tuple(train.classes)
    names = [name for name in train.names if labels_of is None or name in labels_of]
    labels = None if labels_of is None else [labels_of[name] for name in names]
    if listing.groups.get(""):
        notes.append(f"{len(listing.groups[''])} images lie beside train/ and were left out")
    candidates = [name for name in TEST_FOLDERS if name in listing.classes]
    # Some sets ship a test/ without labels beside a labelled val/.
    test_folder = next((name for name in candidates if not classes or _part(listing, name).classes), None)
    unused = [name for name in candidates if name != test_folder]
    if unused:
        notes.append(f"not used: {', '.join(f'{name}/' for name in unused)}")
    if test_folder is None:
        return _held_out(root.below("train"), names, labels, classes, data, notes, named=root)
    test = _part(listing, test_folder)
    unknown = [name for name in test.classes if name not in classes]
    if classes and unknown:
        raise UserError(
            f"data.root={data.root}: {test_folder}/ holds classes that train/ lacks: {', '.join(map(ascii, unknown))}. "
            f"Expected a subset of {', '.join(map(ascii, classes))}."
        )
    test_names = [name for name in test.names if not classes or "/" in name]
    if loose := len(test.names) - len(test_names):
        notes.append(f"{loose} images in {test_folder}/ lie beside its class folders and were left out")
    test_labels = [classes.index(name.partition("/")[0]) for name in test_names] if classes else None
    return Source(
        name=slug(root.name),
        detail=f"image folder {root.where} (train/ and {test_folder}/)",
        splits={
            "train": _scattered_split(root.below("train"), names, labels, range(len(names))),
            "test": _scattered_split(root.below(test_folder), test_names, test_labels, range(len(test_names))),
        },
        classes=classes,
        notes=tuple(notes),
    )


def _held_out(
    root: Files,
    names: list[str],
    labels: list[int] | None,
    classes: tuple[str, ...],
    data: DataConfig,
    notes: list[str],
    named: Files | None = None,
) -> Source:
    train, test = hold_out(names, labels, data.test_fraction)
    splits: dict[str, Split] = {"train": _scattered_split(root, names, labels, train)}
    if len(test):
        splits["test"] = _scattered_split(root, names, labels, test)
    notes.append(hold_out_note(len(test), len(names)))
    return Source(
        name=slug((named or root).name),
        detail=f"image folder {root.where}",
        splits=splits,
        classes=classes,
        notes=tuple(notes),
    )


def _scattered_split(root: Files, names: list[str], labels: list[int] | None, positions: Iterable[int]) -> FileSplit:
    order = scattered(positions, names)
    return FileSplit(root, [names[i] for i in order], None if labels is None else [labels[i] for i in order])
