"""Small PNGs without row filters: for thumbnails, opening a general decoder costs several times the decoding."""

from __future__ import annotations

import struct
import zlib

import numpy as np
from numpy.typing import NDArray

MAX_PIXELS = 4096  # filters make larger pictures smaller
HEADER = struct.Struct(">IIBBBBB")  # width, height, depth, colour type, compression, filter, interlace
START = b"\x89PNG\r\n\x1a\n\x00\x00\x00\x0dIHDR"
DATA_AT = len(START) + HEADER.size + 4 + 8  # where the compressed pixels begin
END_BYTES = 4 + 12  # checksum of the data, end chunk
COLOUR_TYPES = {1: 0, 3: 2}


def encode_unfiltered(pixels: NDArray[np.uint8]) -> bytes:
    """A PNG of (H, W) or (H, W, 3) that every decoder reads."""
    height, width = pixels.shape[:2]
    channels = 1 if pixels.ndim == 2 else 3
    rows = np.zeros((height, 1 + width * channels), dtype=np.uint8)  # each row starts with its filter, none
    rows[:, 1:] = pixels.reshape(height, -1)
    header = HEADER.pack(width, height, 8, COLOUR_TYPES[channels], 0, 0, 0)
    return b"".join(
        (START[:8], _chunk(b"IHDR", header), _chunk(b"IDAT", zlib.compress(rows.tobytes())), _chunk(b"IEND", b""))
    )


def decode_unfiltered(data: bytes) -> NDArray[np.uint8] | None:
    """The (H, W) or (H, W, 3) pixels of ``encode_unfiltered``; None for any other file, damaged ones among them."""
    if not data.startswith(START) or len(data) < DATA_AT + END_BYTES or data[DATA_AT - 4 : DATA_AT] != b"IDAT":
        return None
    width, height, depth, colour_type, _, _, interlaced = HEADER.unpack_from(data, len(START))
    length = int.from_bytes(data[DATA_AT - 8 : DATA_AT - 4], "big")
    if depth != 8 or interlaced or width * height > MAX_PIXELS or DATA_AT + length + END_BYTES != len(data):
        return None
    channels = {0: 1, 2: 3}.get(colour_type)
    if channels is None:
        return None
    size, stream = height * (1 + width * channels), zlib.decompressobj()
    try:
        content = stream.decompress(data[DATA_AT : DATA_AT + length], size + 1)  # a bomb would fill the memory
    except zlib.error:
        return None
    if len(content) != size or not stream.eof:
        return None
    rows = np.frombuffer(content, dtype=np.uint8).reshape(height, 1 + width * channels)
    if rows[:, 0].any():
        return None
    pixels = rows[:, 1:].copy()
    return pixels if channels == 1 else pixels.reshape(height, width, 3)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
