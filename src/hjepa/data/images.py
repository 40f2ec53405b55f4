"""From whatever an image file holds to the 8-bit grey or RGB picture that a person sees."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from hjepa.data.jpeg import decode_jpeg, encode_jpeg
from hjepa.data.png import MAX_PIXELS, encode_unfiltered
from hjepa.data.sources import Payload

Pixels = NDArray[np.uint8]  # (H, W) or (H, W, 3)

# Formats that decode in this process alone; PIL would hand others, such as EPS, to an external interpreter.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA")
ORIENTATION = 0x0112  # EXIF tag
SCAN, MAX_SCANS = b"\xff\xda", 200  # progressive encoders make a dozen; thumbnails and the like have some, too
LARGE_PIXELS = 16_000_000  # a larger picture takes up to 900 MB, so there should be one at a time
BAND_BYTES = 16_000_000  # of a picture that is worked on a few rows at a time
UPRIGHT: dict[int, Callable[[Pixels], Pixels]] = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: pixels[::-1].swapaxes(0, 1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: pixels[:, ::-1].swapaxes(0, 1),
}
# Decoders meet hostile bytes with almost any exception; each of them is one file's fault, never the run's.
DECODE_ERRORS = (
    OSError, ValueError, TypeError, ArithmeticError, LookupError, SyntaxError, EOFError, AttributeError,
    AssertionError, RuntimeError, MemoryError, struct.error, zlib.error,
    Image.DecompressionBombError, Image.DecompressionBombWarning,
)  # fmt: skip


class RejectedError(Exception):
    """A file that cannot be used, with a reason that can be counted and a detail that can be read."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Picture:
    pixels: Pixels  # upright, opaque
    encoded: bytes  # what training decodes to exactly these pixels
    suffix: str  # "jpg" or "png"


def decode(
    payload: Payload,
    *,
    max_pixels: int,
    short_side: int | None = None,
    jpeg_quality: int = 90,
    on_large: Callable[[], object] = lambda: None,
) -> Picture:
    """Decode once, and keep the file's own bytes where they need no change.

    Args:
        short_side: Pixels that the short side of a larger picture is reduced to; None keeps every size.
        jpeg_quality: Of a JPEG that was reduced. Pictures from other files are stored without loss.
        on_large: Called before a file of more than ``LARGE_PIXELS`` is decoded.

    Raises:
        RejectedError: whatever is wrong with the payload.
    """
    try:
        if isinstance(payload, np.ndarray):
            image = Image.fromarray(payload[..., 0] if payload.shape[2:] == (1,) else payload)
            return _lossless(_seen(image), short_side)
        if isinstance(payload, Image.Image):
            return _lossless(_seen(payload), short_side)
        return _decode_file(payload, max_pixels, short_side, jpeg_quality, on_large)
    except DECODE_ERRORS as error:
        if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
            raise RejectedError("too-many-pixels", str(error)) from None
        reason = "truncated" if "truncated" in str(error).lower() else "corrupt"
        raise RejectedError(reason, f"{type(error).__name__}: {error}") from None


def _decode_file(
    data: bytes, max_pixels: int, short_side: int | None, jpeg_quality: int, on_large: Callable[[], object]
) -> Picture:
    if not data:
        raise RejectedError("empty", "the file has no bytes")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise RejectedError("not-an-image", f"starts with {data[:16]!r}") from None
    width, height = image.size
    if width * height > max_pixels:
        raise RejectedError(
            "too-many-pixels", f"{width} x {height} = {width * height} pixels, data.max_pixels is {max_pixels}"
        )
    if width * height > LARGE_PIXELS:
        on_large()
    if image.format in ("JPEG", "MPO"):
        return _decode_photo(image, data, short_side, jpeg_quality)
    return _decode_other(image, data, short_side)


def _decode_other(image: Image.Image, data: bytes, short_side: int | None) -> Picture:
    image.load()
    if image.format == "PNG":
        _match_transparency(image, depth=data[24])
    kept = image.format == "PNG" and _plain_png(image, data) and not _is_larger(image, short_side)
    pixels = _seen(image)
    image.close()  # a large picture fits in memory once or twice, not three times
    return Picture(pixels, data, "png") if kept else _lossless(pixels, short_side)


def _decode_photo(image: Image.Image, data: bytes, short_side: int | None, jpeg_quality: int) -> Picture:
    """A JPEG of which PIL has read the header. It stays one, for as a PNG a photograph would grow tenfold."""
    # Each scan goes over the whole picture, so that a small file can take minutes.
    if (scans := data.count(SCAN)) > MAX_SCANS:
        raise RejectedError("too-many-scans", f"{scans} scans of a JPEG, expected at most {MAX_SCANS}")
    larger = _is_larger(image, short_side)
    pixels = None
    if image.mode in ("L", "RGB"):
        pixels = _as_trained_on(image, data, least=2 * short_side if larger and short_side else None)
        if pixels is not None and not larger and _orientation(image) not in UPRIGHT:
            return Picture(pixels, data, "jpg")
    pixels = _seen(_loaded(image)) if pixels is None else _upright(pixels, image)
    image.close()
    if larger:
        encoded = encode_jpeg(_reduced(pixels, short_side), quality=jpeg_quality, halve_colour=True)
    else:
        encoded = encode_jpeg(pixels, quality=95, halve_colour=False)
    del pixels
    return Picture(decode_jpeg(encoded, strict=True), encoded, "jpg")


def _as_trained_on(image: Image.Image, data: bytes, *, least: int | None) -> Pixels | None:
    """What training's decoder makes of these bytes; None if that is not what a viewer shows.

    A decoder that goes on past damage may show anything, so then, and only then, a second one is asked as well.
    """
    try:
        return decode_jpeg(data, strict=True, least=least)
    except ValueError:
        seen = _opaque(_loaded(image))
    try:
        pixels = decode_jpeg(data)
    except ValueError:
        return None
    return pixels if np.array_equal(pixels, seen) else None


def _loaded(image: Image.Image) -> Image.Image:
    image.load()
    return image


def _is_larger(image: Image.Image, short_side: int | None) -> bool:
    return short_side is not None and min(image.size) > short_side


def _reduced(pixels: Pixels, short_side: int | None) -> Pixels:
    """Antialiased, like the views that training cuts; never enlarged."""
    height, width = pixels.shape[:2]
    short = min(height, width)
    if short_side is None or short <= short_side:
        return pixels
    width, height = (max(1, round(side * short_side / short)) for side in (width, height))
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))


def _plain_png(image: Image.Image, data: bytes) -> bool:
    """One frame, upright, opaque, 8 bits per sample, grey or RGB: what every decoder reads as the same pixels."""
    depth, colour_type = data[24], data[25]
    plain = depth == 8 and colour_type in (0, 2) and image.mode in ("L", "RGB")
    opaque = "transparency" not in image.info
    return plain and opaque and not getattr(image, "is_animated", False) and _orientation(image) not in UPRIGHT


def _match_transparency(image: Image.Image, depth: int) -> None:
    """Give the colour that a PNG calls transparent in the scale that Pillow gave the pixels.

    Args:
        depth: Bits per sample of the file.
    """
    key = image.info.get("transparency")
    if image.mode == "L" and isinstance(key, int) and depth < 8:
        image.info["transparency"] = key * (255 // (2**depth - 1))
    elif image.mode == "RGB" and isinstance(key, tuple) and depth == 16:
        image.info["transparency"] = tuple(value >> 8 for value in key)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except DECODE_ERRORS:
        return 1  # broken metadata does not make the picture unusable


def _seen(image: Image.Image) -> Pixels:
    """What a viewer shows: upright, opaque (on white), 8 bits.

    A few rows at a time, for all of them in another mode, or in four channels, would take many times the memory.
    """
    bands = list(row_bands(image.height, 4 * image.width))
    if len(bands) == 1:
        return _upright(_opaque(image), image)
    levels = _levels(_rows(image, rows) for rows in bands) if _of_unknown_range(image) else None
    pixels: Pixels | None = None
    for rows in bands:
        band = _opaque(_rows(image, rows), levels)
        if pixels is None:
            pixels = np.empty((image.height, *band.shape[1:]), dtype=np.uint8)
        pixels[rows] = band
    assert pixels is not None
    return _upright(pixels, image)


def row_bands(height: int, row_bytes: int, multiple: int = 1) -> Iterator[slice]:
    """Rows to work on at a time, so that those take about ``BAND_BYTES``; a multiple of so many, but for the last."""
    rows = max(1, BAND_BYTES // max(1, row_bytes * multiple)) * multiple
    return (slice(top, min(top + rows, height)) for top in range(0, height, rows))


def _rows(image: Image.Image, rows: slice) -> Image.Image:
    band = image.crop((0, rows.start, image.width, rows.stop))
    band.info = image.info
    return band


def _upright(pixels: Pixels, image: Image.Image) -> Pixels:
    turn = UPRIGHT.get(_orientation(image))
    return pixels if turn is None else np.ascontiguousarray(turn(pixels))


def _opaque(image: Image.Image, levels: _Levels | None = None) -> Pixels:
    """The image, or a band of one, without transparency and in 8 bits; ``levels`` are those of the whole image."""
    if image.mode.startswith("I") and isinstance(key := image.info.get("transparency"), int):
        values = np.asarray(image)
        return np.where(values == key, np.uint8(255), _eight_bits(image, levels))
    if image.mode in ("LA", "La", "RGBA", "RGBa", "PA") or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        opaque = Image.alpha_composite(white, image.convert("RGBA"))
        return np.asarray(opaque.convert("L" if image.mode in ("L", "LA", "La") else "RGB"))
    if image.mode.startswith("I") or image.mode == "F":
        return _eight_bits(image, levels)
    if image.mode in ("L", "RGB"):
        return np.asarray(image)
    return np.asarray(image.convert("L" if image.mode == "1" else "RGB"))


class _Levels(NamedTuple):
    """The smallest and the largest finite value, or 0 where all are on one side of it."""

    low: float
    high: float


def _of_unknown_range(image: Image.Image) -> bool:
    """Whether values are wider than 16 bits, or floats, so that all have to be seen to know their range."""
    return image.mode in ("I", "F")


def _levels(bands: Iterable[Image.Image]) -> _Levels:
    low = high = 0.0
    for band in bands:
        values = np.asarray(band, dtype=np.float32)
        finite = values[np.isfinite(values)]
        low, high = float(finite.min(initial=low)), float(finite.max(initial=high))
    return _Levels(low, high)


def _eight_bits(image: Image.Image, levels: _Levels | None) -> Pixels:
    """Scale by the range that the values were made for, as far as they show it.

    16-bit integers fill 16 bits. Wider ones fill 8 or 16 bits, whichever holds them all; floats 0..1, or likewise. What
    fits nowhere, such as heights or counts, goes from its smallest value to its largest.
    """
    values = np.asarray(image)
    if not _of_unknown_range(image):
        return (values >> 8).astype(np.uint8)
    low, high = levels or _levels([image])
    scaled = np.nan_to_num(values.astype(np.float32), nan=0.0, posinf=high, neginf=low)
    if high > 65535 or low < -0.1 * high:
        scaled = (scaled - low) * (255 / max(high - low, 1e-30))
    elif image.mode == "F" and high <= 2:  # resampling takes some values a little above 1
        scaled = scaled * 255
    elif high > 255:
        scaled = np.floor(scaled / 256)
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)


def _lossless(pixels: Pixels, short_side: int | None) -> Picture:
    pixels = _reduced(pixels, short_side)
    if pixels.shape[0] * pixels.shape[1] <= MAX_PIXELS:
        return Picture(pixels, encode_unfiltered(pixels), "png")
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")  # without metadata, which would speak of the old pixels
    return Picture(pixels, buffer.getvalue(), "png")
