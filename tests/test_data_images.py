"""Every kind of image file ends as what a person sees, or is refused with a reason."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hjepa.data.images import RejectedError, decode
from hjepa.data.png import decode_unfiltered, encode_unfiltered
from hjepa.data.transforms import decode_image

LIMIT = 10_000_000


def photo(height: int = 40, width: int = 60, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 30}])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_decode__plain_jpeg_keeps_its_bytes_and_both_decoders_agree(mode: str, options: dict[str, Any]) -> None:
    data = encode(photo().convert(mode), "JPEG", **options)
    picture = decode(data, max_pixels=LIMIT)
    assert picture.encoded == data
    assert picture.suffix == "jpg"
    assert picture.image.mode == mode
    trained_on = decode_image(data, 3 if mode == "RGB" else 1).numpy()
    np.testing.assert_array_equal(np.atleast_3d(np.asarray(picture.image)), trained_on.transpose(1, 2, 0))


def test_decode__plain_png_keeps_its_bytes() -> None:
    data = encode(photo(), "PNG")
    assert decode(data, max_pixels=LIMIT).encoded == data


@pytest.mark.parametrize("kind", ["BMP", "GIF", "WEBP", "TIFF", "PPM"])
def test_decode__other_formats_become_a_png_of_the_same_pixels(kind: str) -> None:
    data = encode(photo(), kind, **({"lossless": True} if kind == "WEBP" else {}))
    picture = decode(data, max_pixels=LIMIT)
    assert picture.suffix == "png"
    seen = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(decode_image(picture.encoded, 3).numpy().transpose(1, 2, 0), seen)


@pytest.mark.parametrize("orientation", range(2, 9))
def test_decode__exif_orientation_is_applied_as_viewers_do(orientation: int) -> None:
    data = encode(photo(), "PNG", exif=exif(orientation))
    pixels = np.asarray(photo())
    expected = {
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.transpose(1, 0, 2),
        6: np.rot90(pixels, -1),
        7: np.rot90(pixels.transpose(1, 0, 2), 2),
        8: np.rot90(pixels, 1),
    }[orientation]
    np.testing.assert_array_equal(np.asarray(decode(data, max_pixels=LIMIT).image), expected)


def test_decode__turned_jpeg_stays_a_jpeg_without_orientation() -> None:
    data = encode(photo(), "JPEG", quality=95, subsampling=0, exif=exif(6))
    picture = decode(data, max_pixels=LIMIT)
    stored = Image.open(io.BytesIO(picture.encoded))
    assert (picture.suffix, stored.size, dict(stored.getexif())) == ("jpg", (40, 60), {})
    expected = np.rot90(np.asarray(photo()), -1).astype(int)
    assert np.abs(np.asarray(picture.image).astype(int) - expected).mean() < 4
    np.testing.assert_array_equal(decode_image(picture.encoded, 3).numpy().transpose(1, 2, 0), picture.image)


def test_decode__transparent_pixels_are_white() -> None:
    pixels = np.full((4, 6, 4), 100, dtype=np.uint8)
    pixels[..., 3] = [0, 255, 0, 255, 0, 255]
    seen = np.asarray(decode(encode(Image.fromarray(pixels), "PNG"), max_pixels=LIMIT).image)
    assert seen[0, :, 0].tolist() == [255, 100, 255, 100, 255, 100]


def test_decode__grey_with_alpha_stays_grey() -> None:
    picture = decode(encode(photo().convert("LA"), "PNG"), max_pixels=LIMIT)
    assert picture.image.mode == "L"
    np.testing.assert_array_equal(picture.image, photo().convert("L"))


@pytest.mark.parametrize("options", [{"transparency": 0}, {}])
def test_decode__palette_image_shows_its_colours(options: dict[str, Any]) -> None:
    palette = photo().quantize(16)
    picture = decode(encode(palette, "PNG", **options), max_pixels=LIMIT)
    seen, indices = np.asarray(picture.image), np.asarray(palette)
    np.testing.assert_array_equal(seen[indices > 0], np.asarray(palette.convert("RGB"))[indices > 0])
    assert (seen[indices == 0] == 255).all() == ("transparency" in options)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_decode__sixteen_bit_grey_keeps_its_high_byte(kind: str) -> None:
    values = np.linspace(0, 65535, 60 * 40).astype(np.uint16).reshape(40, 60)
    picture = decode(encode(Image.fromarray(values), kind), max_pixels=LIMIT)
    np.testing.assert_array_equal(np.asarray(picture.image), values >> 8)


def test_decode__one_bit_image_is_black_and_white() -> None:
    bits = photo().convert("1")
    seen = decode(encode(bits, "PNG"), max_pixels=LIMIT).image
    np.testing.assert_array_equal(np.asarray(seen), np.asarray(bits) * np.uint8(255))


def test_decode__cmyk_jpeg_becomes_rgb() -> None:
    red = Image.new("RGB", (16, 16), (200, 30, 30))
    picture = decode(encode(red.convert("CMYK"), "JPEG", quality=95), max_pixels=LIMIT)
    assert picture.image.mode == "RGB"
    assert np.abs(np.asarray(picture.image).astype(int) - (200, 30, 30)).max() < 12


def test_decode__animation_shows_its_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.asarray(decode(data, max_pixels=LIMIT).image)[0, 0].tolist() == [255, 0, 0]


def test_decode__arrays_of_any_layout() -> None:
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for array in (grey, grey[..., None], np.stack([grey] * 3, -1)):
        pixels = decode_image(decode(array, max_pixels=LIMIT).encoded, 1).numpy()
        np.testing.assert_array_equal(pixels[0], grey)


BAD_FILES = {
    "empty": (b"", "empty"),
    "text": (b"this is no image\n", "not-an-image"),
    "half a JPEG": (encode(photo(), "JPEG")[:600], "truncated"),
    "half a PNG": (encode(photo(), "PNG")[:1000], "truncated"),
    "only a PNG signature": (b"\x89PNG\r\n\x1a\n", "not-an-image"),
    "PostScript, which needs an interpreter": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not-an-image"),
    "bomb": (encode(Image.new("1", (20_000, 20_000)), "PNG"), "too-many-pixels"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_decode__refuses_with_a_reason(case: str) -> None:
    data, reason = BAD_FILES[case]
    with pytest.raises(RejectedError) as caught:
        decode(data, max_pixels=LIMIT)
    assert caught.value.reason == reason


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_decode__random_damage_is_refused_or_decoded_but_never_fatal() -> None:
    rng = np.random.default_rng(0)
    originals = [encode(photo(), kind) for kind in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP")]
    outcomes = set()
    for _ in range(40):
        for original in originals:
            damaged = bytearray(original)
            for position in rng.integers(0, len(damaged), 8):
                damaged[position] = rng.integers(256)
            try:
                decode(bytes(damaged), max_pixels=LIMIT)
                outcomes.add("decoded")
            except RejectedError as error:
                outcomes.add(error.reason)
    assert {"decoded", "corrupt", "not-an-image"} <= outcomes


@pytest.mark.parametrize("shape", [(28, 28), (1, 1), (17, 5, 3), (64, 64, 3)])
def test_png__small_arrays_are_read_back_by_every_decoder(shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    data = encode_unfiltered(pixels)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), pixels)
    np.testing.assert_array_equal(decode_unfiltered(data), pixels)


@pytest.mark.parametrize("options", [{}, {"optimize": True}, {"dpi": (72, 72)}, {"bits": 4}])
@pytest.mark.parametrize("mode", ["L", "RGB", "P", "1", "RGBA", "I;16"])
def test_png__files_of_others_are_left_to_the_general_decoder(mode: str, options: dict[str, Any]) -> None:
    data = encode(photo(30, 30).convert("I;16" if mode == "I;16" else mode), "PNG", **options)
    ours = decode_unfiltered(data)
    if ours is not None:  # a file that happens to have no filters
        np.testing.assert_array_equal(ours, np.asarray(Image.open(io.BytesIO(data))))
    assert decode_unfiltered(data[:50]) is None
