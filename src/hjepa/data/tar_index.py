"""Where the members of a tar file lie, read from their headers alone; nothing is ever extracted.

Understands the formats that are in use: old Unix tar, POSIX ustar and pax, and GNU tar with its long names and large
sizes. Python's tarfile takes three times as long, and ends at a damaged header as if the file did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

BLOCK = 512  # bytes; headers and contents start at its multiples
ZEROS = bytes(BLOCK)
TAIL = 20 * BLOCK  # to which tar fills its files up with zeros
REGULAR = b"0\x007"  # 7 was meant for contiguous files
MAX_EXTENSION_BYTES = 1 << 20  # of a long name or a pax record; a larger one is damage
NO_END_MARK = "it ends without an end mark"
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}

ReadRange = Callable[[int, int], bytes]
"""(start, length) -> bytes, fewer where the file ends."""


class Member(NamedTuple):
    name: str  # as stored: it may be absolute or lead upwards
    offset: int  # of the content
    size: int  # bytes
    regular: bool  # False for folders, links, devices and sparse files


class TarDamagedError(Exception):
    """The file is not whole, or no tar file, from some position on."""


class CompressedTarError(Exception):
    """The file is compressed, so that no member can be read without all before it."""


class Window:
    """Reads a file front to back in pieces, skipping what nobody asks for."""

    def __init__(self, read: ReadRange, size: int):
        """
        Args:
            size: Bytes that are read at once.
        """
        self._read, self._size = read, size
        self._start, self._piece, self._is_last = 0, b"", False

    def __call__(self, start: int, length: int) -> bytes:
        first = start - self._start
        if first < 0 or (first + length > len(self._piece) and not self._is_last):
            wanted = max(length, self._size)
            self._start, self._piece = start, self._read(start, wanted)
            self._is_last = len(self._piece) < wanted
            first = 0
        return self._piece[first : first + length]


def members(read: ReadRange) -> Iterator[Member]:
    """The members in order; each is whole.

    Raises:
        CompressedTarError: before the first member.
        TarDamagedError: after the last member that can be told.
    """
    position = 0
    long_name: str | None = None
    extended: dict[str, str] = {}
    while True:
        header = read(position, BLOCK)
        if position == 0:
            for magic, program in COMPRESSED.items():
                if header.startswith(magic):
                    raise CompressedTarError(program)
        if header == ZEROS:
            if read(position, TAIL).strip(b"\0"):
                raise TarDamagedError(f"something follows its end mark at byte {position}, as in joined tar files")
            return
        if len(header) < BLOCK:
            raise TarDamagedError(f"{NO_END_MARK} after {position + len(header)} bytes")
        if not _checks(header):
            raise TarDamagedError(f"no member starts at byte {position}")
        kind = header[156:157]
        size = _number(header[124:136])
        offset = position + BLOCK
        if kind in b"LKxg":
            if size > MAX_EXTENSION_BYTES:
                raise TarDamagedError(f"a name of {size} bytes at byte {position}")
            content = read(offset, size)
            if len(content) < size:
                raise TarDamagedError(f"it ends inside a member's name, at byte {position}")
            if kind == b"L":
                long_name = _decoded(content)
            elif kind == b"x":
                extended = _pax_records(content, position)
        else:
            name = extended.get("path") or long_name or _short_name(header)
            if "size" in extended:
                size = _pax_size(extended["size"], position)
            sparse = kind == b"S" or any(key.startswith("GNU.sparse") for key in extended)
            regular = kind in REGULAR and not sparse and not name.endswith("/")
            if kind in b"123456":  # links, devices, folders and pipes have no content, whatever their size says
                size = 0
            if size and len(read(offset + size - 1, 1)) == 0:
                raise TarDamagedError(f"it ends inside {name!a}")
            yield Member(name, offset, size, regular)
            long_name, extended = None, {}
        position = offset + -(-size // BLOCK) * BLOCK


def _checks(header: bytes) -> bool:
    """Whether the checksum, which counts its own field as blanks, is right; old tars summed signed bytes."""
    try:
        stored = _number(header[148:156])
    except TarDamagedError:
        return False
    total = sum(header) - sum(header[148:156]) + 8 * 32
    return stored == total or stored == total - 256 * sum(byte > 127 for byte in header[:148] + header[156:])


def _number(digits: bytes) -> int:
    """An octal number, or GNU's binary one for what has no room."""
    if digits[0] == 0x80:
        return int.from_bytes(digits[1:], "big")
    octal = digits.split(b"\0", 1)[0].strip() or b"0"
    if octal.strip(b"01234567"):
        raise TarDamagedError(f"{digits!r} is no size")
    return int(octal, 8)


def _short_name(header: bytes) -> str:
    name = _decoded(header[:100])
    if header[257:263] == b"ustar\0" and header[345:346] != b"\0":
        return f"{_decoded(header[345:500])}/{name}"
    return name


def _decoded(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _pax_records(content: bytes, position: int) -> dict[str, str]:
    """Lines ``LENGTH KEY=VALUE``, whose length counts itself."""
    records, start = {}, 0
    while start < len(content) and content[start] != 0:
        digits, blank, _ = content[start : start + 20].partition(b" ")
        length = int(digits) if blank and digits.isdigit() else 0
        record = content[start + len(digits) + 1 : start + length]
        key, equals, value = record.partition(b"=")
        if not equals or not value.endswith(b"\n"):
            raise TarDamagedError(f"a broken pax record at byte {position}")
        records[key.decode("utf-8", "surrogateescape")] = value[:-1].decode("utf-8", "surrogateescape")
        start += length
    return records


def _pax_size(text: str, position: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise TarDamagedError(f"{text!a} is no size, at byte {position}")
    return int(text)
