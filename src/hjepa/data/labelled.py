"""From names, labels as text and parts, as tables and tar shards give them, to splits and classes."""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from hjepa.config import DataConfig
from hjepa.data.sources import Names, Source, Split, hold_out_keys, hold_out_note, key_order, name_keys
from hjepa.errors import UserError

TRAIN, TEST, VAL = range(3)
PART_NAMES = ("train", "test", "val")
PART_WORDS = {
    "train": TRAIN, "training": TRAIN,
    "test": TEST, "testing": TEST,
    "val": VAL, "valid": VAL, "validation": VAL,
}  # fmt: skip
NONE = -1
MISSING = {"nan", "na", "n/a", "null", "none"}
# Also what pandas makes of whole numbers once one of them is missing.
INTEGER = re.compile(r"\s*([+-]?[0-9]{1,18})(?:\.0*)?\s*")

MakeSplit = Callable[[NDArray[np.int64], NDArray[np.int32] | None], Split]
"""From (N,) positions in their final order, and (N,) class numbers or None, to a split."""


@dataclass
class Samples:
    """Columns of equal length; a million rows take some ten bytes each beside their names."""

    names: Names = field(default_factory=Names)
    labels: array[int] = field(default_factory=lambda: array("i"))  # positions in ``values``, or NONE
    parts: array[int] = field(default_factory=lambda: array("b"))  # TRAIN, TEST, VAL, or NONE
    values: dict[str, int] = field(default_factory=dict)  # label -> its number, in the order of their appearance

    def append(self, name: str, label: str | None, part: int = NONE) -> None:
        self.names.append(name)
        self.labels.append(NONE if label is None else self.values.setdefault(label, len(self.values)))
        self.parts.append(part)


def build_source(
    samples: Samples,
    *,
    data: DataConfig,
    name: str,
    detail: str,
    make_split: MakeSplit,
    notes: list[str],
    keys: NDArray[np.uint64] | None = None,
    left_out: NDArray[np.bool_] | None = None,
) -> Source:
    """Splits as the parts say, or held out where there is no test part; classes sorted by name, numbers by value.

    Args:
        samples: At least one.
        keys: What ``name_keys`` makes of the names, where it is known already.
        left_out: (N,) samples that are not to be used.

    Raises:
        UserError: if the test part holds classes that the training part lacks.
    """
    keys = name_keys(samples.names) if keys is None else keys
    used = np.ones(len(samples.names), dtype=bool) if left_out is None else ~left_out
    parts = np.frombuffer(samples.parts, dtype=np.int8)
    labels, names = _numbered(samples)
    if negative := int((used & (labels == NONE) & (np.frombuffer(samples.labels, dtype=np.int32) != NONE)).sum()):
        notes.append(f"{negative} images have a negative label, or one such as nan: taken as none")
    train, is_split = _training_part(parts, used, notes)
    classes = _classes_of(labels, train, names, notes)
    test = _test_part(parts, used, labels, bool(classes), notes) if is_split else np.zeros_like(used)
    numbers = None
    if classes:
        unknown = sorted(set(np.unique(labels[test]).tolist()) - {NONE} - set(classes))
        if unknown:
            raise UserError(
                f"{detail}: the test images have classes that the training images lack: "
                f"{', '.join(ascii(names[label]) for label in unknown[:5])}. Correct their labels, or leave them out."
            )
        unlabelled = (train | test) & (labels == NONE)
        if unlabelled.any():
            notes.append(
                f"{int(unlabelled.sum())} images have no label among others that do, and were left out; an empty "
                "data.label_column takes all of them, without labels"
            )
            train, test = train & ~unlabelled, test & ~unlabelled
        numbers = np.full(len(names) + 1, NONE, dtype=np.int32)  # one more, for NONE
        numbers[classes] = np.arange(len(classes))
        numbers = numbers[labels]
    chosen = {"train": np.flatnonzero(train), "test": np.flatnonzero(test)}
    if not len(chosen["test"]):
        rows = chosen["train"]
        first, second = hold_out_keys(keys[rows], None if numbers is None else numbers[rows], data.test_fraction)
        chosen = {"train": rows[first], "test": rows[second]}
        notes.append(hold_out_note(len(second), len(rows)))
    splits: dict[str, Split] = {}
    for title, rows in chosen.items():
        if title == "train" or len(rows):
            rows = rows[key_order(keys[rows])]  # sets sorted by class would give blocks of one class
            splits[title] = make_split(rows, None if numbers is None else numbers[rows])
    return Source(
        name=name, detail=detail, splits=splits, classes=tuple(names[label] for label in classes), notes=tuple(notes)
    )


def _numbered(samples: Samples) -> tuple[NDArray[np.int32], list[str]]:
    """Labels (N,) that sort as their classes do, and the name of each.

    If all are whole numbers, ``01`` and ``1.0`` are the class ``1``, and a negative one, or what programs write for a
    missing number, means that there is no label. ``-1`` and ``1`` on their own are two classes.
    """
    labels = np.frombuffer(samples.labels, dtype=np.int32)
    matches = [INTEGER.fullmatch("-2" if value.lower() in MISSING else value) for value in samples.values]
    if all(matches):
        numbers = [int(match[1]) for match in matches if match is not None]
        least = -1 if set(numbers) == {-1, 1} else 0
        ordered = sorted({number for number in numbers if number >= least})
        place = {number: i for i, number in enumerate(ordered)}
        ranks, names = [place.get(number, NONE) for number in numbers], [str(number) for number in ordered]
    else:
        names = sorted(samples.values)
        place_of = {value: i for i, value in enumerate(names)}
        ranks = [place_of[value] for value in samples.values]
    return np.array([*ranks, NONE], dtype=np.int32)[labels], names


def _classes_of(labels: NDArray[np.int32], train: NDArray[np.bool_], names: list[str], notes: list[str]) -> list[int]:
    """The labels that the training images have; none where there is nothing to tell apart."""
    present = [label for label in np.unique(labels[train]).tolist() if label != NONE]
    if len(present) >= 2:
        return present
    without = "the images are used without labels; k-NN and linear probes are skipped"
    if present:
        notes.append(f"only one class ({names[present[0]]!a}), nothing to tell apart: {without}")
    else:
        notes.append(f"no labels: {without}")
    return []


def _training_part(
    parts: NDArray[np.int8], used: NDArray[np.bool_], notes: list[str]
) -> tuple[NDArray[np.bool_], bool]:
    """The training images, and whether the others are of other splits; images of no split are for training if need be.

    A set of which everything is of a test or a validation split is one without splits.
    """
    nowhere, marked = used & (parts == NONE), used & (parts == TRAIN)
    if marked.any():
        if nowhere.any():
            notes.append(f"{int(nowhere.sum())} images belong to no split and were left out")
        return marked, True
    others = used & (parts != NONE)
    if nowhere.any():
        if others.any():
            notes.append(f"no image is marked for training, so the {int(nowhere.sum())} of no split are trained on")
        return nowhere, bool(others.any())
    if others.any():
        given = " and ".join(PART_NAMES[part] for part in (TEST, VAL) if (parts[others] == part).any())
        notes.append(f"all images are of the {given} split: they are taken as one set without splits")
    return used, False


def _test_part(
    parts: NDArray[np.int8], used: NDArray[np.bool_], labels: NDArray[np.int32], labelled: bool, notes: list[str]
) -> NDArray[np.bool_]:
    """Test images, or those for validation where there are no others or the others have no labels."""
    found = None
    for part in (TEST, VAL):
        rows = used & (parts == part)
        if not rows.any():
            continue
        if found is None and (not labelled or (labels[rows] != NONE).any()):
            found = rows
        else:
            notes.append(f"not used: {int(rows.sum())} images of the {PART_NAMES[part]} split")
    return np.zeros_like(used) if found is None else found
