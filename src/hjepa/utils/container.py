"""The file under a checkpoint: nested state in, nested state out, nothing executed on the way.

It is one safetensors file: tensors by name, everything else as JSON in its metadata. Its last tensor is 32 bytes long
and holds the sha256 of all bytes before it, so a change anywhere (lengths, JSON, padding, tensors) is found by reading
the file once from front to back, and the same pass yields the digest of the whole file for the uploader. sha256 because
object stores speak it and processors have instructions for it: it keeps up with a disk.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import itertools
import json
import math
import os
import queue
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hjepa.errors import HjepaError, UserError
from hjepa.files import sync

SCHEMA = 2

_CLOSING = "__sha256__"  # name of the last tensor
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAME_OF = {dtype: name for name, dtype in _DTYPES.items()}
BLOCK = 4096  # bytes; the tensors begin at a multiple of it, as direct writes need
_MAX_HEADER = 100_000_000  # bytes; safetensors' own limit
_CHUNK = 8 << 20  # bytes hashed, written or read at a time


class DamagedCheckpointError(HjepaError):
    """The file is not what was written: truncated, altered, or no checkpoint at all."""


# -- nested state <-> flat tensors + JSON ----------------------------------------------------------------------------


def pack(value: Any, tensors: dict[str, Tensor], name: str = "") -> Any:
    """A JSON twin of nested dicts, lists, tuples, numbers, arrays and tensors; tensors go to ``tensors`` by path."""
    if isinstance(value, Tensor):
        if hasattr(value, "full_tensor"):
            raise TypeError(f"{name}: a sharded tensor cannot be stored; gather the state first")
        if value.layout != torch.strided or value.dtype not in _NAME_OF:
            raise TypeError(f"{name}: a tensor of {value.dtype}, {value.layout} cannot be stored in a checkpoint")
        return {"tensor": _add(tensors, name, value.detach())}
    if isinstance(value, np.ndarray):
        array = torch.from_numpy(value.astype(np.int64) if value.dtype == np.uint32 else value)
        return {"array": _add(tensors, name, array), "dtype": str(value.dtype)}
    if isinstance(value, Mapping):
        items = []
        for key, item in value.items():
            if not isinstance(key, (str, int)):
                raise TypeError(f"{name}: the key {key!r} is neither a text nor a whole number")
            items.append([key, pack(item, tensors, f"{name}.{key}" if name else str(key))])
        return {"dict": items}
    if isinstance(value, (list, tuple)):
        items = [pack(item, tensors, f"{name}.{i}") for i, item in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{name}: a {type(value).__name__} cannot be stored in a checkpoint without pickling it")


def _add(tensors: dict[str, Tensor], name: str, tensor: Tensor) -> str:
    while name in tensors or name == _CLOSING:  # {"a.b": x, "a": {"b": y}}
        name += "_"
    tensors[name] = tensor
    return name


def unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Inverse of ``pack``. A tensor on the meta device, which has no values, stays one even in place of an array."""
    if isinstance(value, list):
        return [unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "array" in value:
        tensor = tensors[value["array"]]
        return tensor if tensor.is_meta else tensor.numpy().astype(value["dtype"])
    if "tuple" in value:
        return tuple(unpack(item, tensors) for item in value["tuple"])
    return {key: unpack(item, tensors) for key, item in value["dict"]}


# -- the file --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    name: str
    dtype: str  # as safetensors names it
    shape: tuple[int, ...]
    start: int  # bytes from the end of the header
    stop: int


def layout(tensors: Mapping[str, Tensor]) -> list[Entry]:
    """One tensor after the other without gaps, widest numbers first, so that each starts at a multiple of its width."""
    entries, start = [], 0
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].itemsize):
        stop = start + tensor.numel() * tensor.itemsize
        entries.append(Entry(name, _NAME_OF[tensor.dtype], tuple(tensor.shape), start, stop))
        start = stop
    return entries


def encode_header(tree: Any, entries: list[Entry]) -> bytes:
    """What stands before the tensors. ``read_header`` checks the sha256 of the JSON, which does not cover the rest."""
    text = json.dumps(tree)
    end = entries[-1].stop if entries else 0
    table: dict[str, Any] = {
        "__metadata__": {"hjepa": text, "schema": str(SCHEMA), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    }
    for entry in [*entries, Entry(_CLOSING, "U8", (32,), end, end + 32)]:
        table[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": (entry.start, entry.stop)}
    header = json.dumps(table, separators=(",", ":")).encode()
    header += b" " * (-(8 + len(header)) % BLOCK)
    if len(header) > _MAX_HEADER:
        raise TypeError(f"{len(header)} bytes of state outside tensors: keep large things in tensors")
    return len(header).to_bytes(8, "little") + header


def flat(tensor: Tensor) -> Tensor:
    """The bytes of a tensor (n,), without a copy where it is contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def view_of(flat: Tensor) -> memoryview:
    return flat.numpy().data


class _Digest:
    """A sha256 that is computed on a thread of its own, while the caller reads or writes the next chunk.

    A plain thread, because executors take no work once the main thread has ended, and the last save outlives it.
    """

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()
        self._chunks: queue.Queue[memoryview | bytes | None] = queue.Queue(1)
        self._thread = threading.Thread(target=self._work, name="checkpoint-digest")

    def _work(self) -> None:
        while (chunk := self._chunks.get()) is not None:
            self._sha256.update(chunk)

    def __enter__(self) -> _Digest:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread.is_alive():
            self._chunks.put(None)
            self._thread.join()

    def update(self, chunk: memoryview | bytes) -> None:
        """Hand over ``chunk``, which must not change until two more have been handed over."""
        self._chunks.put(chunk)

    def finish(self) -> hashlib._Hash:
        """The sha256 of all chunks, to go on with on this thread."""
        self._chunks.put(None)
        self._thread.join()
        return self._sha256


def write_file(path: Path, header: bytes, data: Iterable[memoryview], *, direct: bool = False) -> str:
    """Write atomically: after a kill at any moment ``path`` is the old file or the new one, never a torn one.

    Args:
        direct: Write past the page cache where the file system can, for data that begins at multiples of ``BLOCK`` in
            memory. A checkpoint is rarely read again, so the cache would cost a copy of gigabytes, evict the training
            data, and count as memory of the container.

    Returns:
        The file's sha256.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with _Digest() as digest, temporary.open("wb", buffering=0) as file:
            digest.update(header)
            _write_all(file, memoryview(header))
            direct = direct and _set_direct(file, True)
            for view in data:
                for at in range(0, len(view), _CHUNK):
                    chunk = view[at : at + _CHUNK]
                    digest.update(chunk)
                    if direct and len(chunk) % BLOCK:  # the last one
                        direct = _set_direct(file, False)
                    _write_all(file, chunk)
            _set_direct(file, False)
            sha256 = digest.finish()
            closing = sha256.digest()
            _write_all(file, memoryview(closing))
            sha256.update(closing)
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)
    return sha256.hexdigest()


def _set_direct(file: FileIO, on: bool) -> bool:
    """Turn O_DIRECT on or off and return whether it is on; some file systems do not have it."""
    flags = fcntl.fcntl(file, fcntl.F_GETFL)
    try:
        fcntl.fcntl(file, fcntl.F_SETFL, flags | os.O_DIRECT if on else flags & ~os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    return on


def _write_all(file: FileIO, view: memoryview) -> None:
    while view:
        try:
            view = view[file.write(view) :]
        except OSError as error:
            # A device with larger blocks, or the rest after a short write.
            if error.errno != errno.EINVAL or not fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT:
                raise
            _set_direct(file, False)


def write_checkpoint(path: Path, state: Mapping[str, Any]) -> str:
    """Write ``state`` atomically and durably, straight from its tensors, and return the file's sha256."""
    tensors: dict[str, Tensor] = {}
    tree = pack(state, tensors)
    entries = layout(tensors)
    return write_file(
        path, encode_header(tree, entries), (view_of(flat(tensors[entry.name].cpu())) for entry in entries)
    )


@dataclass(frozen=True)
class _Header:
    raw: bytes  # with the eight bytes of its length
    text: str  # JSON
    schema: int
    sha256: str
    entries: list[Entry]

    @property
    def start(self) -> int:
        """Where the tensors begin."""
        return len(self.raw)


@contextmanager
def _opened(path: Path) -> Iterator[FileIO]:
    try:
        file = path.open("rb", buffering=0)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"no checkpoint at {path}: give the path of a checkpoint_*.pth file, or 'auto' for the latest one"
        ) from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder: give the path of a checkpoint_*.pth file in it") from None
    except PermissionError:
        raise UserError(f"{path} may not be read by this user: change its permissions, or give another one") from None
    with file:
        try:
            yield file
        except OSError as error:
            raise DamagedCheckpointError(f"{path} is damaged: the disk cannot read it: {error}") from None


def _refuse(path: Path, start: bytes) -> None:
    """Name what is no safetensors file by its first bytes; a pickle could run any program, so it is not opened."""
    kind = ""
    if start.startswith(b"PK\x03\x04"):
        kind = "an archive written by torch.save"
    elif start[:1] == b"\x80" and start[8:] != b"{":  # with the brace, one of ours whose length is damaged
        kind = "a pickle"
    if not kind:
        raise DamagedCheckpointError(f"{path} is damaged, or no checkpoint at all: it does not begin like one")
    raise UserError(
        f"{path} is {kind}, not a checkpoint of hjepa. Such a file can run any program when it is loaded, so nothing "
        "in it was executed. Load its weights in a session you trust, and save them with "
        "CheckpointManager.save_checkpoint."
    )


def _parse(path: Path, file: FileIO) -> _Header:
    size = os.fstat(file.fileno()).st_size
    if size == 0:
        raise DamagedCheckpointError(f"{path} is damaged: it is empty")
    start = file.read(9)
    length = int.from_bytes(start[:8], "little")
    if not 2 <= length <= _MAX_HEADER:
        _refuse(path, start)
    if 8 + length > size:
        raise DamagedCheckpointError(f"{path} is damaged: it ends within its header")
    raw = bytearray(8 + length)
    file.seek(0)
    _read_all(path, file, memoryview(raw))
    try:
        table = json.loads(raw[8:])
        metadata = table.pop("__metadata__", {})
        entries = sorted(
            (_entry(name, item) for name, item in table.items()), key=lambda entry: (entry.start, entry.stop)
        )
        expected = 0
        for entry in entries:
            if entry.start != expected or entry.stop - entry.start != _nbytes(entry):
                raise ValueError(f"the bytes of {entry.name} are not where they should be")
            expected = entry.stop
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedCheckpointError(f"{path} is damaged: its header cannot be read: {error}") from None
    if not isinstance(metadata, dict) or "hjepa" not in metadata:
        raise DamagedCheckpointError(f"{path} is a safetensors file, but not a checkpoint of hjepa")
    schema = str(metadata.get("schema"))
    if schema not in {str(number) for number in _READERS}:
        if schema.isdecimal() and int(schema) > SCHEMA:
            raise UserError(
                f"{path} was written by a newer hjepa (schema {schema}); this one reads up to {SCHEMA}: update hjepa"
            )
        raise DamagedCheckpointError(f"{path} is damaged: there is no schema {schema}")
    if len(raw) + expected != size:
        raise DamagedCheckpointError(f"{path} is damaged: it has {size} bytes and should have {len(raw) + expected}")
    return _Header(bytes(raw), metadata["hjepa"], int(schema), metadata.get("sha256", ""), entries)


def _entry(name: str, item: Mapping[str, Any]) -> Entry:
    start, stop = item["data_offsets"]
    shape = tuple(item["shape"])
    if item["dtype"] not in _DTYPES or any(not isinstance(n, int) or n < 0 for n in (*shape, start, stop)):
        raise ValueError(f"{name} has no valid type, shape or place")
    return Entry(name, item["dtype"], shape, start, stop)


def _nbytes(entry: Entry) -> int:
    return math.prod(entry.shape) * _DTYPES[entry.dtype].itemsize


def _read_all(path: Path, file: FileIO, view: memoryview) -> None:
    while view:
        count = file.readinto(view)
        if not count:
            raise DamagedCheckpointError(f"{path} is damaged: it ends early")
        view = view[count:]


class _Source:
    """The tensors of a file, read one after the other into a digest and, where wanted, into memory."""

    def __init__(self, path: Path, file: FileIO, header: _Header, wanted: Callable[[str], bool]):
        self.path, self.file, self.header, self.wanted = path, file, header, wanted
        largest = max((entry.stop - entry.start for entry in header.entries), default=0)
        self._unwanted = itertools.cycle([memoryview(bytearray(min(largest, _CHUNK))) for _ in range(3)])

    def read(self, entry: Entry, digest: _Digest) -> Tensor:
        """The tensor, or a meta tensor of its shape."""
        keep = self.wanted(entry.name)
        tensor = torch.empty(entry.shape, dtype=_DTYPES[entry.dtype], device="cpu" if keep else "meta")
        view = view_of(flat(tensor)) if keep else None
        self.file.seek(self.header.start + entry.start)
        size = entry.stop - entry.start
        for at in range(0, size, _CHUNK):
            length = min(_CHUNK, size - at)
            chunk = next(self._unwanted)[:length] if view is None else view[at : at + length]
            _read_all(self.path, self.file, chunk)
            digest.update(chunk)
        return tensor


def _read_schema_1(source: _Source) -> dict[str, Tensor]:
    """The metadata holds a sha256 of the JSON and of every tensor, by name; nothing covers the rest of the header."""
    tensors = {}
    with _Digest() as digest:
        digest.update(source.header.text.encode())
        for entry in sorted(source.header.entries, key=lambda entry: entry.name):
            digest.update(f"{entry.name} {_DTYPES[entry.dtype]} {entry.shape}".encode())
            tensors[entry.name] = source.read(entry, digest)
        if digest.finish().hexdigest() != source.header.sha256:
            raise DamagedCheckpointError(f"{source.path} is damaged: its checksum does not match its content")
    return tensors


def _read_schema_2(source: _Source) -> dict[str, Tensor]:
    """The last 32 bytes are the sha256 of all before."""
    *entries, closing = source.header.entries or [Entry("", "U8", (0,), 0, 0)]
    tensors = {}
    with _Digest() as digest:
        digest.update(source.header.raw)
        for entry in entries:
            tensors[entry.name] = source.read(entry, digest)
        expected = bytearray(closing.stop - closing.start)
        _read_all(source.path, source.file, memoryview(expected))
        if closing.name != _CLOSING or digest.finish().digest() != bytes(expected):
            raise DamagedCheckpointError(f"{source.path} is damaged: its checksum does not match its content")
    return tensors


# Every schema ever written has its row. Where the content changes too, the reader brings it to today's names.
_READERS: dict[int, Callable[[_Source], dict[str, Tensor]]] = {1: _read_schema_1, 2: _read_schema_2}


def read_checkpoint(path: Path, parts: Collection[str] | None = None) -> dict[str, Any]:
    """The state that was written to ``path``, on the CPU, after every byte of the file has been checked.

    Args:
        parts: Entries of the state whose tensors are wanted, such as ("model",); the other tensors are checked without
            being kept, and stand on the meta device with their shapes. None means all.

    Raises:
        UserError: there is no such file, it may not be read, is a pickle, or was written by a newer hjepa.
        DamagedCheckpointError: its bytes are not those that were written.
    """

    def wanted(name: str) -> bool:
        return parts is None or name.partition(".")[0] in parts

    with _opened(path) as file:
        header = _parse(path, file)
        tensors = _READERS[header.schema](_Source(path, file, header, wanted))
    return _state(path, header, tensors)


def read_header(path: Path) -> dict[str, Any]:
    """The state that was written to ``path`` with all its tensors on the meta device: epoch, step, metrics at once.

    Of schema 2 on, the numbers and texts are checked; the tensors are not read, so they may be damaged.

    Raises:
        UserError, DamagedCheckpointError: as ``read_checkpoint``.
    """
    with _opened(path) as file:
        header = _parse(path, file)
    if header.schema > 1 and hashlib.sha256(header.text.encode()).hexdigest() != header.sha256:
        raise DamagedCheckpointError(f"{path} is damaged: the checksum of its header does not match")
    return _state(
        path, header, {e.name: torch.empty(e.shape, dtype=_DTYPES[e.dtype], device="meta") for e in header.entries}
    )


def _state(path: Path, header: _Header, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    try:
        state: dict[str, Any] = unpack(json.loads(header.text), tensors)
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpointError(f"{path} is damaged: its JSON cannot be read: {error}") from None
    return state
