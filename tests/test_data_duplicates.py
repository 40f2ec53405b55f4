"""Duplicates against brute force, and hashes against what people call the same picture."""

from __future__ import annotations

import hashlib
import io
import itertools
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from hjepa.data.duplicates import MAX_DISTANCE, Counts, Fingerprints, Twin, find, near_pairs, perceptual_hash


def picture(seed: int, size: tuple[int, int] = (300, 200)) -> Image.Image:
    """Smooth colours, as a photograph has them."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC)


def fingerprints(*images: tuple[bytes, int, int | None]) -> Fingerprints:
    return Fingerprints(
        np.array([int.from_bytes(hashlib.sha256(pixels).digest()[:8], "big") for pixels, _, _ in images], np.uint64),
        np.array([perceptual for _, perceptual, _ in images], np.uint64),
        np.array([-1 if label is None else label for _, _, label in images], np.int32),
    )


def test_hash__survives_scaling_recompression_and_brightness() -> None:
    image = picture(1)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=60)
    others = [
        image.resize((200, 133)),
        Image.open(buffer),
        ImageEnhance.Brightness(image).enhance(1.05),
        image.convert("L"),
    ]
    hashes = [perceptual_hash(np.asarray(each)) for each in (image, *others)]
    distances = [(hashes[0] ^ other).bit_count() for other in hashes[1:]]
    assert max(distances) <= MAX_DISTANCE


def test_hash__different_pictures_are_far_apart() -> None:
    hashes = [perceptual_hash(np.asarray(picture(seed))) for seed in range(30)]
    assert min((a ^ b).bit_count() for a, b in itertools.combinations(hashes, 2)) > 10


@pytest.mark.parametrize("size", [(1, 1), (3, 500), (5000, 130)])
def test_hash__any_size(size: tuple[int, int]) -> None:
    hashed = perceptual_hash(np.asarray(picture(0, size)))
    assert hashed is None if size == (1, 1) else 0 <= hashed < 2**64


@pytest.mark.parametrize("colour", ["white", "black", "red", (7, 200, 30)])
def test_hash__a_plain_colour_has_none(colour: Any) -> None:
    assert perceptual_hash(np.asarray(Image.new("RGB", (90, 70), colour))) is None


@pytest.mark.parametrize("size", [(50, 40), (300, 301), (130, 999)])
def test_hash__of_a_few_rows_at_a_time_is_that_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]
) -> None:
    pixels = np.asarray(picture(3, size))
    whole = perceptual_hash(pixels)
    monkeypatch.setattr("hjepa.data.images.BAND_BYTES", 20_000)
    assert perceptual_hash(pixels) == whole


@pytest.mark.parametrize("count", [0, 1, 400])
def test_near_pairs__are_those_of_brute_force(count: int) -> None:
    rng = np.random.default_rng(count)
    centres = rng.integers(0, 2**64, 20, dtype=np.uint64)
    flips = np.array([sum(1 << int(bit) for bit in rng.integers(0, 64, rng.integers(0, 5))) for _ in range(count)])
    hashes = np.unique(centres[rng.integers(0, 20, count)] ^ flips.astype(np.uint64))
    found = [
        (min(i, j), max(i, j), bits)
        for one, other, distances in near_pairs(hashes)
        for i, j, bits in zip(one.tolist(), other.tolist(), distances.tolist(), strict=True)
    ]
    expected = [
        (i, j, (int(hashes[i]) ^ int(hashes[j])).bit_count())
        for i, j in itertools.combinations(range(len(hashes)), 2)
        if (int(hashes[i]) ^ int(hashes[j])).bit_count() <= MAX_DISTANCE
    ]
    assert sorted(found) == expected
    assert count < 2 or expected


def test_find__counts_each_image_once_and_lists_leaks_first() -> None:
    far = 0xFFFF_0000_FFFF_0000
    train = fingerprints((b"a", 0, 0), (b"b", far, 1), (b"a", 0, 0), (b"a", 0, 1), (b"c", 0b111, 0))
    test = fingerprints((b"b", far, 0), (b"d", far ^ 0b101, 1), (b"e", ~far & (2**64 - 1), 1))
    found = find({"train": train, "test": test})
    assert found.within == {"train": Counts(exact=2, near=1), "test": Counts(exact=0, near=1)}
    assert found.leaked == Counts(exact=1, near=1)
    assert found.conflicting_labels == 2  # the third "a" of train, and the "b" of test
    assert found.examples[0] == Twin("test", 0, "train", 1, None)
    assert found.examples[1] == Twin("test", 1, "train", 1, 2)
    assert Twin("train", 4, "train", 0, 3) in found.examples


def test_find__agrees_with_brute_force_on_random_fingerprints() -> None:
    rng = np.random.default_rng(5)
    centres = [int(value) for value in rng.integers(0, 2**63, 12)]

    def draw(count: int) -> list[tuple[bytes, int]]:
        drawn = []
        for _ in range(count):
            value = centres[rng.integers(12)]
            for bit in rng.integers(0, 64, rng.integers(0, 4)):
                value ^= 1 << int(bit)
            drawn.append((value.to_bytes(8, "big") if rng.random() < 0.5 else rng.bytes(8), value))
        return drawn

    drawn = {"train": draw(150), "test": draw(60)}
    found = find({name: fingerprints(*((a, b, None) for a, b in images)) for name, images in drawn.items()})

    def near(a: int, b: int) -> bool:
        return (a ^ b).bit_count() <= MAX_DISTANCE

    for name, images in drawn.items():
        exact = [any(images[j][0] == images[i][0] for j in range(i)) for i in range(len(images))]
        alike = [any(near(images[j][1], images[i][1]) for j in range(i)) for i in range(len(images))]
        assert found.within[name] == (sum(exact), sum(b and not a for a, b in zip(exact, alike, strict=True)))
    exact = [any(a == c for c, _ in drawn["train"]) for a, _ in drawn["test"]]
    alike = [any(near(b, d) for _, d in drawn["train"]) for _, b in drawn["test"]]
    assert found.leaked == (sum(exact), sum(b and not a for a, b in zip(exact, alike, strict=True)))
    leaking = [any(a == c or near(b, d) for c, d in drawn["test"]) for a, b in drawn["train"]]
    assert found.leaking.tolist() == leaking


def test_find__no_images_at_all() -> None:
    assert find({"train": fingerprints()}).within == {"train": Counts()}
