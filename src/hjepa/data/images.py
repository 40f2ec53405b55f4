"""From whatever an image file holds to the 8-bit grey or RGB picture that a person sees."""

from __future__ import annotations

import io
import struct
import zlib
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from hjepa.data.jpeg import decode_jpeg, encode_jpeg
from hjepa.data.png import MAX_PIXELS, encode_unfiltered
from hjepa.data.sources import Payload

# Formats that decode in this process alone; PIL would hand others, such as EPS, to an external interpreter.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA")
ORIENTATION = 0x0112  # EXIF tag
LARGE_PIXELS = 16_000_000  # decoding a larger picture takes up to a gigabyte, so it is done one at a time
BAND_BYTES = 64_000_000  # of a picture that is worked on a few rows at a time
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
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
    pixels: NDArray[np.uint8]  # (H, W) or (H, W, 3): upright, opaque
    encoded: bytes  # what training decodes to exactly these pixels
    suffix: str  # "jpg" or "png"


def decode(
    payload: Payload,
    *,
    max_pixels: int,
    short_side: int | None = None,
    jpeg_quality: int = 90,
    one_at_a_time: AbstractContextManager[Any] | None = None,
) -> Picture:
    """Decode once, and keep the file's own bytes where they need no change.

    Args:
        short_side: Pixels that the short side of a larger picture is reduced to; None keeps every size.
        jpeg_quality: Of a JPEG that was reduced. Pictures from other files are stored without loss.
        one_at_a_time: Held while a picture of more than ``LARGE_PIXELS`` is decoded.

    Raises:
        RejectedError: whatever is wrong with the payload.
    """
    try:
        if isinstance(payload, np.ndarray):
            image = Image.fromarray(payload[..., 0] if payload.shape[2:] == (1,) else payload)
            return _lossless(image if image.mode in ("L", "RGB") else _visible(image), short_side)
        if isinstance(payload, Image.Image):
            return _lossless(_visible(payload), short_side)
        return _decode_file(payload, max_pixels, short_side, jpeg_quality, one_at_a_time or nullcontext())
    except DECODE_ERRORS as error:
        if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
            raise RejectedError("too-many-pixels", str(error)) from None
        reason = "truncated" if "truncated" in str(error).lower() else "corrupt"
        raise RejectedError(reason, f"{type(error).__name__}: {error}") from None


def _decode_file(
    data: bytes,
    max_pixels: int,
    short_side: int | None,
    jpeg_quality: int,
    one_at_a_time: AbstractContextManager[Any],
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
    with one_at_a_time if width * height > LARGE_PIXELS else nullcontext():
        if image.format in ("JPEG", "MPO"):
            return _decode_photo(image, data, short_side, jpeg_quality)
        return _decode_other(image, data, short_side)


def _decode_other(image: Image.Image, data: bytes, short_side: int | None) -> Picture:
    image.load()
    if image.format == "PNG":
        _match_transparency(image, depth=data[24])
    visible = _visible(image)
    kept = visible is image and image.format == "PNG" and _plain_png(image, data) and not _is_larger(image, short_side)
    return Picture(np.asarray(image), data, "png") if kept else _lossless(visible, short_side)


def _decode_photo(image: Image.Image, data: bytes, short_side: int | None, jpeg_quality: int) -> Picture:
    """A JPEG of which PIL has read the header. It stays one, for as a PNG a photograph would grow tenfold."""
    larger = _is_larger(image, short_side)
    pixels = None
    if image.mode in ("L", "RGB") and _orientation(image) not in UPRIGHT:
        pixels = _as_trained_on(image, data, least=2 * short_side if larger and short_side else None)
        if pixels is not None and not larger:
            return Picture(pixels, data, "jpg")
    seen = _visible(_loaded(image)) if pixels is None else Image.fromarray(pixels)
    if larger:
        encoded = encode_jpeg(np.asarray(_reduced(seen, short_side)), quality=jpeg_quality, halve_colour=True)
    else:
        encoded = encode_jpeg(np.asarray(seen), quality=95, halve_colour=False)
    return Picture(decode_jpeg(encoded, strict=True), encoded, "jpg")


def _as_trained_on(image: Image.Image, data: bytes, *, least: int | None) -> NDArray[np.uint8] | None:
    """What training's decoder makes of these bytes; None if that is not what a viewer shows.

    A decoder that goes on past damage may show anything, so then, and only then, a second one is asked as well.
    """
    try:
        return decode_jpeg(data, strict=True, least=least)
    except ValueError:
        seen = np.asarray(_loaded(image))
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


def _reduced(image: Image.Image, short_side: int | None) -> Image.Image:
    """Antialiased, like the views that training cuts; never enlarged."""
    short = min(image.size)
    if short_side is None or short <= short_side:
        return image
    width, height = (max(1, round(side * short_side / short)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BILINEAR)


def _plain_png(image: Image.Image, data: bytes) -> bool:
    """One frame, 8 bits per sample, grey or RGB: what every decoder reads as the same pixels."""
    depth, colour_type = data[24], data[25]
    return depth == 8 and colour_type in (0, 2) and not getattr(image, "is_animated", False)


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


def _visible(image: Image.Image) -> Image.Image:
    """Upright, opaque (on white), 8 bits, L or RGB; the very same object if it is all that already."""
    turn = UPRIGHT.get(_orientation(image))
    if turn is not None:
        transparency = image.info.get("transparency")
        image = image.transpose(turn)
        if transparency is not None:
            image.info["transparency"] = transparency
    if image.mode.startswith("I") and isinstance(key := image.info.get("transparency"), int):
        values = np.asarray(image)
        return Image.fromarray(np.where(values == key, np.uint8(255), _eight_bits(values)))
    if image.mode in ("LA", "La", "RGBA", "RGBa", "PA") or "transparency" in image.info:
        return _on_white(image)
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_eight_bits(np.asarray(image)))
    if image.mode in ("L", "RGB"):
        return image
    return image.convert("L" if image.mode == "1" else "RGB")


def _on_white(image: Image.Image) -> Image.Image:
    """A few rows at a time: all of them in four channels, and once more on white, would take many times the memory."""
    opaque = Image.new("L" if image.mode in ("L", "LA", "La") else "RGB", image.size)
    rows = max(1, BAND_BYTES // (4 * image.width))
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height)))
        if (key := image.info.get("transparency")) is not None:
            band.info["transparency"] = key
        white = Image.new("RGBA", band.size, "white")
        opaque.paste(Image.alpha_composite(white, band.convert("RGBA")).convert(opaque.mode), (0, top))
    return opaque


def _eight_bits(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Scale by the range that the values were made for, as far as they show it.

    16-bit integers fill 16 bits. Wider ones fill 8 or 16 bits, whichever holds them all; floats 0..1, or likewise. What
    fits nowhere, such as heights or counts, goes from its smallest value to its largest.
    """
    if values.dtype.kind != "f" and values.itemsize == 2:
        return (values >> 8).astype(np.uint8)
    scaled = values.astype(np.float32)
    finite = scaled[np.isfinite(scaled)]
    low, high = float(finite.min(initial=0.0)), float(finite.max(initial=0.0))
    scaled = np.nan_to_num(scaled, nan=0.0, posinf=high, neginf=low)
    if high > 65535 or low < -0.1 * high:
        scaled = (scaled - low) * (255 / max(high - low, 1e-30))
    elif values.dtype.kind == "f" and high <= 2:  # resampling takes some values a little above 1
        scaled = scaled * 255
    elif high > 255:
        scaled = np.floor(scaled / 256)
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)


def _lossless(image: Image.Image, short_side: int | None) -> Picture:
    pixels = np.asarray(_reduced(image, short_side))
    if pixels.shape[0] * pixels.shape[1] <= MAX_PIXELS:
        return Picture(pixels, encode_unfiltered(pixels), "png")
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")  # without metadata, which would speak of the old pixels
    return Picture(pixels, buffer.getvalue(), "png")
