"""Every kind of image file ends as what a person sees, or is refused with a reason."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import tempfile
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from hjepa.data import images, jpeg
from hjepa.data.files import LocalFiles
from hjepa.data.images import RejectedError, decode
from hjepa.data.jpeg import decode_jpeg
from hjepa.data.png import decode_unfiltered, encode_unfiltered
from hjepa.data.transforms import decode_image, size_of

LIMIT = 10_000_000


def photo(height: int = 40, width: int = 60, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def psnr(ours: Any, theirs: Any) -> float:
    """In dB."""
    error = np.mean((np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float)) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"progressive": True},
        {"subsampling": 0},
        {"subsampling": 1},
        {"subsampling": "4:1:1"},
        {"quality": 30},
        {"keep_rgb": True},
        {"restart_marker_rows": 1},
    ],
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_decode__plain_jpeg_keeps_its_bytes_and_both_decoders_agree(mode: str, options: dict[str, Any]) -> None:
    data = encode(photo().convert(mode), "JPEG", **options)
    picture = decode(data, max_pixels=LIMIT)
    assert picture.encoded == data
    assert picture.suffix == "jpg"
    assert picture.pixels.ndim == (3 if mode == "RGB" else 2)
    trained_on = decode_image(data, 3 if mode == "RGB" else 1).numpy()
    np.testing.assert_array_equal(np.atleast_3d(picture.pixels), trained_on.transpose(1, 2, 0))
    np.testing.assert_array_equal(picture.pixels, np.asarray(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("size", [(1, 1), (9, 17), (16, 16), (31, 15), (251, 333)])
@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"subsampling": 1}, {"progressive": True}])
def test_decode__jpegs_of_any_size_have_the_pixels_of_pil(size: tuple[int, int], options: dict[str, Any]) -> None:
    data = encode(photo(*size), "JPEG", **options)
    np.testing.assert_array_equal(decode(data, max_pixels=LIMIT).pixels, np.asarray(Image.open(io.BytesIO(data))))


def test_decode__harmless_damage_keeps_the_bytes_and_is_trained_on_as_pil_shows_it() -> None:
    data = encode(photo(), "JPEG")
    padded = data[:-2] + bytes(50) + data[-2:]
    picture = decode(padded, max_pixels=LIMIT)
    assert picture.encoded == padded
    np.testing.assert_array_equal(decode_image(padded, 3).numpy().transpose(1, 2, 0), Image.open(io.BytesIO(data)))


@pytest.mark.parametrize("answer", ["refused", "shown differently"])
def test_decode__jpeg_that_only_pil_reads_is_encoded_anew(monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    """The other decoder is a library of its own: here it dislikes one file."""
    data = encode(photo(), "JPEG", quality=95)
    library = simplejpeg.decode_jpeg

    def disliking(content: bytes, *arguments: Any, strict: bool = True, **options: Any) -> Any:
        pixels = library(content, *arguments, strict=strict, **options)
        if content != data:
            return pixels
        if strict or answer == "refused":
            raise ValueError("what is this?")
        return pixels ^ 1

    monkeypatch.setattr(simplejpeg, "decode_jpeg", disliking)
    picture = decode(data, max_pixels=LIMIT)
    assert picture.encoded != data
    assert picture.suffix == "jpg"
    np.testing.assert_array_equal(decode_image(picture.encoded, 3).numpy().transpose(1, 2, 0), picture.pixels)
    assert psnr(picture.pixels, np.asarray(Image.open(io.BytesIO(data)))) > 35


@pytest.mark.parametrize("subsampling", ["444", "422", "420", "440", "411", "Gray"])
@pytest.mark.parametrize("height", [41, 64, 100])
def test_decode_jpeg__first_rows_are_those_of_the_whole(subsampling: str, height: int) -> None:
    pixels = np.asarray(photo(height, 90))
    grey = subsampling == "Gray"
    pixels = np.ascontiguousarray(pixels[..., :1] if grey else pixels)
    data = simplejpeg.encode_jpeg(pixels, 90, "GRAY" if grey else "RGB", subsampling)
    whole = decode_jpeg(data)
    assert size_of(data) == whole.shape[:2] == (height, 90)
    for rows in range(1, height + 3):
        part = decode_jpeg(data, rows=rows)
        assert min(rows, height) <= len(part) <= rows + 8
        np.testing.assert_array_equal(part[:rows], whole[:rows])


@pytest.mark.parametrize("options", [{"restart_marker_rows": 1}, {"progressive": True}, {"optimize": True}])
def test_decode_jpeg__first_rows_of_other_kinds_of_files(options: dict[str, Any]) -> None:
    data = encode(photo(70, 90), "JPEG", quality=80, **options)
    whole = decode_jpeg(data)
    for rows in (1, 20, 47, 70):
        part = decode_jpeg(data, rows=rows)
        np.testing.assert_array_equal(part[:rows], whole[:rows])
        # Of a progressive file every scan has something of every row.
        assert (len(part) == 70) == ("progressive" in options or rows > 61)


def test_decode_jpeg__file_with_a_scan_per_colour_is_left_whole() -> None:
    data = bytearray(encode(photo(70, 90), "JPEG"))
    data[data.index(b"\xff\xda") + 4] = 1
    assert jpeg._first_rows(bytes(data), 8) == bytes(data)
    assert jpeg._first_rows(b"\xff\xd8\xff", 8) == b"\xff\xd8\xff"


def test_size_of__png() -> None:
    assert size_of(encode(photo(17, 30), "PNG")) == (17, 30)


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
    np.testing.assert_array_equal(decode(data, max_pixels=LIMIT).pixels, expected)


def test_decode__turned_jpeg_stays_a_jpeg_without_orientation() -> None:
    data = encode(photo(), "JPEG", quality=95, subsampling=0, exif=exif(6))
    picture = decode(data, max_pixels=LIMIT)
    stored = Image.open(io.BytesIO(picture.encoded))
    assert (picture.suffix, stored.size, dict(stored.getexif())) == ("jpg", (40, 60), {})
    expected = np.rot90(np.asarray(photo()), -1).astype(int)
    assert np.abs(picture.pixels.astype(int) - expected).mean() < 4
    np.testing.assert_array_equal(decode_image(picture.encoded, 3).numpy().transpose(1, 2, 0), picture.pixels)


def test_decode__transparent_pixels_are_white() -> None:
    pixels = np.full((4, 6, 4), 100, dtype=np.uint8)
    pixels[..., 3] = [0, 255, 0, 255, 0, 255]
    seen = decode(encode(Image.fromarray(pixels), "PNG"), max_pixels=LIMIT).pixels
    assert seen[0, :, 0].tolist() == [255, 100, 255, 100, 255, 100]


def test_decode__grey_with_alpha_stays_grey() -> None:
    picture = decode(encode(photo().convert("LA"), "PNG"), max_pixels=LIMIT)
    assert picture.pixels.ndim == 2
    np.testing.assert_array_equal(picture.pixels, photo().convert("L"))


@pytest.mark.parametrize("options", [{"transparency": 0}, {}])
def test_decode__palette_image_shows_its_colours(options: dict[str, Any]) -> None:
    palette = photo().quantize(16)
    picture = decode(encode(palette, "PNG", **options), max_pixels=LIMIT)
    seen, indices = picture.pixels, np.asarray(palette)
    np.testing.assert_array_equal(seen[indices > 0], np.asarray(palette.convert("RGB"))[indices > 0])
    assert (seen[indices == 0] == 255).all() == ("transparency" in options)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_decode__sixteen_bit_grey_keeps_its_high_byte(kind: str) -> None:
    values = np.linspace(0, 65535, 60 * 40).astype(np.uint16).reshape(40, 60)
    picture = decode(encode(Image.fromarray(values), kind), max_pixels=LIMIT)
    np.testing.assert_array_equal(picture.pixels, values >> 8)


def test_decode__one_bit_image_is_black_and_white() -> None:
    bits = photo().convert("1")
    seen = decode(encode(bits, "PNG"), max_pixels=LIMIT).pixels
    np.testing.assert_array_equal(np.asarray(seen), np.asarray(bits) * np.uint8(255))


def test_decode__cmyk_jpeg_becomes_rgb() -> None:
    red = Image.new("RGB", (16, 16), (200, 30, 30))
    picture = decode(encode(red.convert("CMYK"), "JPEG", quality=95), max_pixels=LIMIT)
    assert picture.pixels.ndim == 3
    assert np.abs(picture.pixels.astype(int) - (200, 30, 30)).max() < 12


def seen(data: bytes, channels: Literal[1, 3] = 3) -> NDArray[np.uint8]:
    """(H, W, C) that training will see."""
    pixels: NDArray[np.uint8] = decode_image(decode(data, max_pixels=LIMIT).encoded, channels).numpy()
    return pixels.transpose(1, 2, 0)


def test_decode__ycck_jpeg_becomes_rgb() -> None:
    """Photoshop's CMYK: the inks inverted, then as luminance and differences, told by a flag in the Adobe marker."""
    y, cb, cr = Image.new("RGB", (16, 16), (55, 225, 225)).convert("YCbCr").getpixel((0, 0))  # the inks of this red
    stored = Image.new("CMYK", (16, 16), tuple(255 - value for value in (y, cb, cr, 255)))  # Pillow inverts once more
    data = encode(stored, "JPEG", quality=95, subsampling=0)
    flag = data.index(b"Adobe") + 11
    assert np.abs(seen(data).astype(int) - (200, 30, 30)).max() > 12
    data = data[:flag] + b"\2" + data[flag + 1 :]
    assert np.abs(seen(data).astype(int) - (200, 30, 30)).max() < 12


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_decode__animation_shows_its_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert np.abs(seen(data)[0, 0].astype(int) - (255, 0, 0)).max() <= 2


def test_decode__clear_parts_of_the_first_frame_are_white() -> None:
    frames = [Image.new("RGBA", (16, 16), colour) for colour in ((255, 0, 0, 0), (0, 0, 255, 255))]
    for kind in ("GIF", "WEBP", "PNG"):
        assert (seen(encode(frames[0], kind, save_all=True, append_images=frames[1:])) == 255).all()


def png(depth: int, colour_type: int, row: bytes, transparent: bytes) -> bytes:
    """16 x 16 pixels, each row the same, with a colour that is called transparent."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 16, 16, depth, colour_type, 0, 0, 0)
    content = chunk(b"IDAT", zlib.compress((b"\0" + row) * 16))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"tRNS", transparent) + content + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("depth", "colour_type", "row", "hit", "miss", "value"),
    [
        (1, 0, b"\0" * 2, 0, 1, 0),
        (2, 0, b"\x55" * 4, 1, 2, 85),
        (4, 0, b"\x55" * 8, 5, 6, 85),
        (8, 0, b"\x55" * 16, 85, 5, 85),
        (16, 0, b"\x55\0" * 16, 0x5500, 0x5600, 0x55),
        (8, 2, b"\x55" * 48, 0x55, 0x56, 0x55),
        (16, 2, b"\x55\0" * 48, 0x5500, 0x5600, 0x55),
    ],
)
def test_decode__a_transparent_colour_is_white_in_every_depth(
    depth: int, colour_type: int, row: bytes, hit: int, miss: int, value: int
) -> None:
    samples = 3 if colour_type == 2 else 1
    for key, expected in ((hit, 255), (miss, value)):
        assert (seen(png(depth, colour_type, row, struct.pack(">H", key) * samples)) == expected).all()


def tiff(values: NDArray[Any]) -> bytes:
    return encode(Image.fromarray(values), "TIFF")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([0, 0.5, 1], np.float32), [0, 128, 255]),
        (np.array([-0.01, 0.5, 1.02], np.float32), [0, 128, 255]),
        (np.array([0, 100, 255], np.float32), [0, 100, 255]),
        (np.array([0, 25_600, 65_535], np.float32), [0, 100, 255]),
        (np.array([-1, 0, 1], np.float32), [0, 128, 255]),
        (np.array([0, 1e6, 2.55e6], np.float32), [0, 100, 255]),
        (np.array([np.nan, 0.5, np.inf], np.float32), [0, 128, 128]),
        (np.array([7, 7, 7], np.int32), [7, 7, 7]),
        (np.array([0, 25_600, 65_535], np.int32), [0, 100, 255]),
        (np.array([0, 2**29, 2**30], np.int32), [0, 128, 255]),
        (np.array([-500, 0, 500], np.int32), [0, 128, 255]),
        (np.array([0, 200, 65_535], np.uint16), [0, 0, 255]),
        (np.array([np.nan, np.nan, np.nan], np.float32), [0, 0, 0]),
    ],
)
def test_decode__wide_grey_values_are_scaled_by_their_range(values: NDArray[Any], expected: list[int]) -> None:
    assert seen(tiff(np.tile(values, (4, 1))), 1)[0, :, 0].tolist() == expected


def test_decode__a_strip_of_40_000_pixels_is_a_picture_until_it_has_too_many(tmp_path: Path) -> None:
    for kind in ("PNG", "JPEG"):
        assert seen(encode(Image.new("RGB", (40_000, 3), (9, 9, 9)), kind)).shape == (3, 40_000, 3)
        with pytest.raises(RejectedError, match="too-many-pixels: 40000 x 300"):
            decode(encode(Image.new("L", (40_000, 300)), kind), max_pixels=LIMIT)


# -- files that are not what they seem ---------------------------------------------------------------------------------


@contextlib.contextmanager
def somebody_else() -> Iterator[None]:
    """Run as a user who owns nothing, for root may read everything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_read__without_permission_a_pipe_a_loop_and_a_giant_are_errors_of_that_file() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "mine.jpg").write_bytes(b"x")
        (folder / "mine.jpg").chmod(0)
        os.mkfifo(folder / "pipe.jpg")
        (folder / "loop.jpg").symlink_to("loop.jpg")
        (folder / "folder.jpg").mkdir()
        with (folder / "giant.jpg").open("wb") as file:
            file.truncate(1 << 40)  # a terabyte that takes no space
        files = LocalFiles(folder)
        for name, message in (
            ("pipe.jpg", "not a regular file"),
            ("loop.jpg", "symbolic links"),
            ("folder.jpg", "not a regular file"),
            ("giant.jpg", "expected at most"),
            ("nowhere.jpg", "No such file"),
        ):
            with pytest.raises(OSError, match=message):
                files.read(name)
        with somebody_else(), pytest.raises(PermissionError):
            files.read("mine.jpg")


@pytest.mark.parametrize(("start", "length"), [(0, None), (3, 4), (0, 2), (7, None), (8, 99), (4, 0), (20, 5)])
def test_read__ranges_are_slices(tmp_path: Path, start: int, length: int | None) -> None:
    (tmp_path / "digits").write_bytes(b"0123456789")
    end = None if length is None else start + length
    assert LocalFiles(tmp_path).read("digits", start, length) == b"0123456789"[start:end]


def test_decode__arrays_of_any_layout() -> None:
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for array in (grey, grey[..., None], np.stack([grey] * 3, -1)):
        pixels = decode_image(decode(array, max_pixels=LIMIT).encoded, 1).numpy()
        np.testing.assert_array_equal(pixels[0], grey)


def giant_png() -> bytes:
    header = b"IHDR" + b"\x7f\xff\xff\xff" * 2 + bytes((8, 2, 0, 0, 0))
    whole = encode(photo(), "PNG")
    return whole[:12] + header + struct.pack(">I", zlib.crc32(header)) + whole[33:]


def png_with_comment(size: int) -> bytes:
    data = b"key\0\0" + zlib.compress(bytes(size))
    chunk = struct.pack(">I", len(data)) + b"zTXt" + data + struct.pack(">I", zlib.crc32(b"zTXt" + data))
    whole = encode(photo(), "PNG")
    return whole[:33] + chunk + whole[33:]


BAD_FILES = {
    "empty": (b"", "empty"),
    "text": (b"this is no image\n", "not-an-image"),
    "half a JPEG": (encode(photo(), "JPEG")[:600], "truncated"),
    "JPEG that lacks its last rows": (encode(photo(300, 400), "JPEG")[:-2000], "truncated"),
    "half a PNG": (encode(photo(), "PNG")[:1000], "truncated"),
    "only a PNG signature": (b"\x89PNG\r\n\x1a\n", "not-an-image"),
    "PostScript, which needs an interpreter": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not-an-image"),
    "all but the end of a JPEG": (encode(photo(), "JPEG")[:-2], "truncated"),
    "a page that says 404": (b"<html>404 Not Found</html>", "not-an-image"),
    "megabytes of zeros in the comment of a PNG": (png_with_comment(200_000_000), "corrupt"),
    "a PNG of 2^62 pixels": (giant_png(), "too-many-pixels"),
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
                picture = decode(bytes(damaged), max_pixels=LIMIT)
            except RejectedError as error:
                outcomes.add(error.reason)
            else:
                outcomes.add("decoded")
                channels = 1 if picture.pixels.ndim == 2 else 3
                trained_on = decode_image(picture.encoded, channels).numpy().transpose(1, 2, 0)
                np.testing.assert_array_equal(trained_on, np.atleast_3d(picture.pixels))
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


# -- data.short_side -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(375, 500), (500, 375), (100, 101), (65, 900), (800, 1000)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_short_side__larger_jpegs_become_smaller_jpegs(size: tuple[int, int], mode: str) -> None:
    """The largest is decoded at a quarter of its size first."""
    original = photo(*size).convert(mode)
    picture = decode(encode(original, "JPEG", quality=95), max_pixels=LIMIT, short_side=64)
    short = min(size)
    expected = original.resize([round(side * 64 / short) for side in original.size], Image.Resampling.BILINEAR)
    assert picture.suffix == "jpg"
    stored = Image.open(io.BytesIO(picture.encoded))
    assert (stored.size, stored.mode, min(stored.size)) == (expected.size, mode, 64)
    np.testing.assert_array_equal(picture.pixels, np.asarray(stored))
    assert psnr(stored.convert("L"), expected.convert("L")) > 30  # brightness, which is stored for each pixel
    if mode == "RGB":
        assert [layer[1:3] for layer in stored.layer] == [(2, 2), (1, 1), (1, 1)]  # colour at half resolution


def test_short_side__quality_is_that_of_the_configuration() -> None:
    data = encode(photo(375, 500), "JPEG", quality=95)
    sizes = [len(decode(data, max_pixels=LIMIT, short_side=128, jpeg_quality=q).encoded) for q in (50, 90, 98)]
    assert sizes == sorted(sizes)
    assert sizes[0] < 0.7 * sizes[1]


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_short_side__images_that_are_no_larger_keep_their_bytes(kind: str) -> None:
    data = encode(photo(70, 90), kind)
    assert decode(data, max_pixels=LIMIT, short_side=70).encoded == data


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
def test_short_side__other_files_stay_lossless(kind: str) -> None:
    picture = decode(encode(photo(200, 300), kind), max_pixels=LIMIT, short_side=64)
    assert picture.suffix == "png"
    np.testing.assert_array_equal(picture.pixels, photo(200, 300).resize((96, 64), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(decode_image(picture.encoded, 3).numpy().transpose(1, 2, 0), picture.pixels)


def test_short_side__arrays_and_turned_jpegs_are_reduced_too() -> None:
    array = decode(np.asarray(photo(200, 300)), max_pixels=LIMIT, short_side=64)
    assert array.pixels.shape == (64, 96, 3)
    turned = decode(encode(photo(200, 300), "JPEG", exif=exif(6)), max_pixels=LIMIT, short_side=64)
    assert turned.pixels.shape == (96, 64, 3)
    upright = photo(200, 300).transpose(Image.Transpose.ROTATE_270).resize((64, 96), Image.Resampling.BILINEAR)
    assert psnr(Image.fromarray(turned.pixels).convert("L"), upright.convert("L")) > 30


def odd_picture(kind: str) -> bytes:
    """67 x 50 pixels that have to be converted before they can be shown."""
    image = photo(67, 50)
    clear = Image.fromarray(np.arange(67 * 50, dtype=np.uint8).reshape(67, 50))
    values = np.asarray(image.convert("L"))
    match kind:
        case "RGBA" | "LA":
            image = image.convert(kind)
            image.putalpha(clear)
            return encode(image, "PNG")
        case "palette":
            return encode(image.quantize(16), "PNG", transparency=3)
        case "turned PNG":
            return encode(image, "PNG", exif=exif(6))
        case "turned JPEG":
            return encode(image, "JPEG", exif=exif(8))
        case "CMYK":
            return encode(image.convert("CMYK"), "JPEG")
        case "1 bit":
            return encode(image.convert("1"), "PNG")
        case "16 bits":
            return encode(Image.fromarray(values.astype(np.uint16) << 8), "PNG")
        case "16 bits, transparent":
            return encode(Image.fromarray(values.astype(np.uint16) << 8), "PNG", transparency=int(values[0, 0]) << 8)
        case "32 bits":
            return encode(Image.fromarray(values.astype(np.int32) - 100), "TIFF")
        case "float":
            return encode(Image.fromarray(values.astype(np.float32) * 1000), "TIFF")
        case "16 bits, big-endian":
            return tiff(values.astype(">u2") << 8)
    raise ValueError(kind)


@pytest.mark.parametrize("kind", [
    "RGBA", "LA", "palette", "turned PNG", "turned JPEG", "CMYK", "1 bit", "16 bits", "16 bits, transparent",
    "16 bits, big-endian", "32 bits", "float",
])  # fmt: skip
def test_decode__a_few_rows_at_a_time_gives_the_same(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    data = odd_picture(kind)
    whole = decode(data, max_pixels=LIMIT)
    monkeypatch.setattr(images, "BAND_BYTES", 10 * 4 * 50)
    by_rows = decode(data, max_pixels=LIMIT)
    np.testing.assert_array_equal(by_rows.pixels, whole.pixels)
    assert by_rows.encoded == whole.encoded
    assert len(np.unique(whole.pixels)) >= 2


def damaged_thumbnails() -> dict[str, bytes]:
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)
    good = encode_unfiltered(pixels)
    rows = np.pad(pixels.reshape(28, 84), ((0, 1), (1, 0)))  # a row too many

    def with_stream(stream: bytes) -> bytes:
        head = good[: good.index(b"IDAT") - 4]
        chunk = b"IDAT" + stream
        return head + struct.pack(">I", len(stream)) + chunk + struct.pack(">I", zlib.crc32(chunk)) + good[-12:]

    stream = zlib.compress(rows[:28].tobytes())
    return {
        "cut off": with_stream(stream[:-4]),
        "wrong checksum": with_stream(stream[:-1] + bytes([stream[-1] ^ 1])),
        "a row too many": with_stream(zlib.compress(rows.tobytes())),
        "a bomb": with_stream(zlib.compress(rows[:28].tobytes() + bytes(50_000_000))),
        "whole": with_stream(stream),
    }


@pytest.mark.parametrize("kind", ["cut off", "wrong checksum", "a row too many", "a bomb", "whole"])
def test_decode__damaged_thumbnails_are_refused_or_trained_on_as_prepared(kind: str) -> None:
    data = damaged_thumbnails()[kind]
    tracemalloc.start()
    assert (decode_unfiltered(data) is not None) == (kind == "whole")
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()
    try:
        picture = decode(data, max_pixels=LIMIT)
    except RejectedError:
        return
    np.testing.assert_array_equal(decode_image(picture.encoded, 3).numpy().transpose(1, 2, 0), picture.pixels)


def test_decode__jpeg_with_a_sampling_that_one_decoder_has_no_name_for_is_encoded_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = encode(photo(), "JPEG")

    def unnamed(*args: object, **options: object) -> None:
        raise KeyError(6)

    header = simplejpeg.decode_jpeg_header
    calls = iter([unnamed, unnamed, header, header])
    monkeypatch.setattr(simplejpeg, "decode_jpeg_header", lambda *args, **options: next(calls)(*args, **options))
    picture = decode(data, max_pixels=LIMIT)
    assert picture.suffix == "jpg"
    assert picture.encoded != data


def test_decode__refuses_a_jpeg_of_very_many_scans() -> None:
    data = encode(photo(), "JPEG", progressive=True)
    scan = data[data.rindex(images.SCAN) : -2]
    with pytest.raises(RejectedError, match=r"too-many-scans: 2\d\d scans of a JPEG"):
        decode(data[:-2] + scan * 200 + data[-2:], max_pixels=LIMIT)


def test_decode__tells_before_a_large_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    monkeypatch.setattr(images, "LARGE_PIXELS", 1000)
    for size in ((40, 60), (10, 10)):
        for kind in ("JPEG", "PNG", "BMP"):
            decode(encode(photo(*size), kind), max_pixels=LIMIT, on_large=lambda: told.append(1))
    assert len(told) == 3
