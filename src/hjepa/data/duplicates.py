"""Images that are there twice, in their pixels or nearly so by a perceptual hash, within splits and across them.

Near duplicates are found by the DCT hash of the ImageHash library (64 bits; Zauner 2010, section 3.2.1): two images are
near when their hashes differ in at most ``MAX_DISTANCE`` bits. All such pairs are found, without comparing all pairs:
hashes that differ in at most 3 bits agree in at least one of 4 parts of 16 bits (Manku et al. 2007, section 3).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import imagehash
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hjepa.data.images import Pixels, row_bands

PARTS, PART_BITS = 4, 16
MAX_DISTANCE = PARTS - 1  # bits
REDUCED = 64  # pixels of the short side before hashing; the library resizes large images slowly
PLAIN_LEVELS = 2  # grey levels between the darkest and the brightest place of an image without a content
PAIRS_AT_ONCE = 1 << 22  # compared at a time: 32 MB
Hashes = NDArray[np.uint64]


def perceptual_hash(pixels: Pixels) -> int | None:
    """64 bits that change little when an image is scaled, recompressed or slightly retouched.

    None for an image of one plain colour: all of those would have the same hash, whatever their colours.
    """
    height, width = pixels.shape[:2]
    factor = max(1, min(height, width) // REDUCED)
    small = Image.new("L", (-(-width // factor), -(-height // factor)))
    for rows in row_bands(height, pixels[0].nbytes, multiple=factor):
        band = Image.fromarray(pixels[rows]).convert("L")
        small.paste(band.reduce(factor) if factor > 1 else band, (0, rows.start // factor))
    if np.ptp(np.asarray(small)) <= PLAIN_LEVELS:
        return None
    bits = np.packbits(imagehash.phash(small).hash)
    return int.from_bytes(bits.tobytes(), "big")


class Twin(NamedTuple):
    """Two images, by split and number in it; ``distance`` is None where their pixels are the same."""

    split: str
    number: int
    other_split: str
    other_number: int
    distance: int | None


@dataclass(frozen=True)
class Fingerprints:
    """What is known of the images of a split.

    64 bits of content are enough: among 14 million images the odds that two differ in pixels alone are 1 to 100,000.
    """

    contents: Hashes  # [N], the beginning of a sha256 over pixels
    hashes: Hashes  # [N]
    labels: NDArray[np.int32]  # [N], -1: none

    def __len__(self) -> int:
        return len(self.hashes)


class _Part:
    """Hashes sorted by one of their parts."""

    def __init__(self, hashes: Hashes, part: int):
        self.shift = np.uint64(part * PART_BITS)
        keys = _key(hashes, self.shift)
        self.order = np.argsort(keys, kind="stable")
        self.keys, self.hashes = keys[self.order], hashes[self.order]


def _key(hashes: Any, shift: np.uint64) -> Any:
    return (hashes >> shift) & np.uint64((1 << PART_BITS) - 1)


def near_pairs(hashes: Hashes) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint8]]]:
    """All pairs of unequal hashes that differ in at most ``MAX_DISTANCE`` bits, each once.

    Args:
        hashes: [N], each value once.

    Yields:
        Positions i, positions j, and the bits in which they differ; [n] each.
    """
    for part in range(PARTS):
        sorted_ = _Part(hashes, part)
        # The pairs within a run of equal keys: a hash with the next one, with the one after that, and so on.
        ends = np.searchsorted(sorted_.keys, sorted_.keys, side="right")
        reach = ends - np.arange(len(hashes)) - 1  # how many follow it in its run
        active, offset = np.flatnonzero(reach > 0), 1
        while len(active):
            for start in range(0, len(active), PAIRS_AT_ONCE):
                one = active[start : start + PAIRS_AT_ONCE]
                a, b = sorted_.hashes[one], sorted_.hashes[one + offset]
                bits = np.bitwise_count(a ^ b)
                near = bits <= MAX_DISTANCE
                # A pair that agrees in an earlier part too was found there.
                for earlier in range(part):
                    near &= _key(a, np.uint64(earlier * PART_BITS)) != _key(b, np.uint64(earlier * PART_BITS))
                if near.any():
                    yield sorted_.order[one[near]], sorted_.order[one[near] + offset], bits[near]
            offset += 1
            active = active[reach[active] >= offset]


class Counts(NamedTuple):
    exact: int = 0  # images whose pixels another one has
    near: int = 0  # further images with a near twin


@dataclass(frozen=True)
class Duplicates:
    """What ``find`` found. An image counts once, however many twins it has."""

    within: Mapping[str, Counts]  # split -> images with a twin before them in the split
    leaked: Counts  # test images with a twin in the training split
    conflicting_labels: int  # images whose pixels an earlier image of any split has under another label
    examples: tuple[Twin, ...]  # leaks first
    leaking: NDArray[np.bool_]  # [N], the training images with a twin in the test split

    def to_json(self) -> dict[str, Any]:
        return {
            "method": f"exact: the same pixels; near: DCT hashes of 64 bits with at most {MAX_DISTANCE} different",
            "within": {split: counts._asdict() for split, counts in self.within.items()},
            "leaked": self.leaked._asdict(),
            "conflicting_labels": self.conflicting_labels,
        }


NOWHERE = np.iinfo(np.int64).max


def find(splits: Mapping[str, Fingerprints], *, most_examples: int = 10_000) -> Duplicates:
    """Every duplicate within the splits and across them.

    Args:
        splits: "train" and, where there is one, "test".
        most_examples: Of the pairs that are listed.
    """
    contents, same = np.unique(np.concatenate([each.contents for each in splits.values()]), return_inverse=True)
    hashes, place = np.unique(np.concatenate([each.hashes for each in splits.values()]), return_inverse=True)
    bounds = np.cumsum([0, *(len(images) for images in splits.values())])
    parts = {name: slice(bounds[i], bounds[i + 1]) for i, name in enumerate(splits)}
    # The first image of a split with certain pixels, and the first with a certain hash or one near it.
    exact = {name: _first(same[part], len(contents)) for name, part in parts.items()}
    own = {name: _first(place[part], len(hashes)) for name, part in parts.items()}
    near = {name: first.copy() for name, first in own.items()}
    for one, other, _ in near_pairs(hashes):
        for name in splits:
            np.minimum.at(near[name], one, own[name][other])
            np.minimum.at(near[name], other, own[name][one])

    within: dict[str, Counts] = {}
    examples: list[Twin] = []

    def count(name: str, other: str, *, earlier: bool) -> Counts:
        """Images of split ``name`` with a twin in ``other``, or with one before them where that is the same."""
        pixels, similar = exact[other][same[parts[name]]], near[other][place[parts[name]]]
        limit = np.arange(len(pixels)) if earlier else NOWHERE
        equal = pixels < limit
        alike = (similar < limit) & ~equal
        for number in np.flatnonzero(equal | alike)[: max(0, most_examples - len(examples))].tolist():
            twin = int(pixels[number] if equal[number] else similar[number])
            difference = splits[name].hashes[number] ^ splits[other].hashes[twin]
            distance = None if equal[number] else int(np.bitwise_count(difference))
            examples.append(Twin(name, number, other, twin, distance))
        return Counts(int(equal.sum()), int(alike.sum()))

    leaked = count("test", "train", earlier=False) if "test" in splits else Counts()
    for name in splits:
        within[name] = count(name, name, earlier=True)
    labels = np.concatenate([each.labels for each in splits.values()])
    conflicting = int((labels != labels[_first(same, len(contents))[same]]).sum()) if len(labels) else 0
    leaking = np.zeros(len(splits["train"]), dtype=bool)
    if "test" in splits:
        images = parts["train"]
        leaking = (exact["test"][same[images]] < NOWHERE) | (near["test"][place[images]] < NOWHERE)
    return Duplicates(within, leaked, conflicting, tuple(examples), leaking)


def _first(values: NDArray[np.integer[Any]], count: int) -> NDArray[np.int64]:
    """The first position of each value in ``range(count)``; NOWHERE where there is none."""
    first = np.full(count, NOWHERE, dtype=np.int64)
    first[values[::-1]] = np.arange(len(values))[::-1]
    return first
