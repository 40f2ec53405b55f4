"""A table of paths and labels: a CSV or Parquet file.

Columns are found by name. Relative paths are relative to ``data.image_root``, or else to the table's own folder; what
leads out of there is refused image by image, for a table may come from somebody who should not choose what is read.
Rows are read as a stream and kept in columns, so that a million of them take about a hundred megabytes.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hjepa.config import DataConfig
from hjepa.data.files import Files, OpenStore, open_folder, split_path
from hjepa.data.image_folder import SUFFIXES
from hjepa.data.images import RejectedError
from hjepa.data.labelled import NONE, PART_WORDS, Samples, build_source
from hjepa.data.plausibility import check_samples
from hjepa.data.sources import Names, Payload, Source, key_order, name_keys, slug
from hjepa.errors import UserError

DELIMITERS = {".csv": ",;\t|", ".tsv": "\t", ".txt": ",;\t|"}  # tried in this order
PARQUET = (".parquet", ".pq")
# Names of columns that say what they hold, in any case.
PATH_COLUMNS = (
    "path", "paths", "file", "filename", "file_name", "filepath", "file_path", "image", "image_path", "image_file",
    "image_name", "img", "img_path",
)  # fmt: skip
LABEL_COLUMNS = ("label", "labels", "class", "class_name", "classname", "category", "target")
SPLIT_COLUMNS = ("split", "subset", "partition")
BATCH_ROWS = 16_384
FINE, OUTSIDE, CONTRADICTORY = range(3)

Row = tuple[str | None, str | None, str | None]
"""Path, label and split as text; None where the cell is empty or there is no such column."""


class TableSplit:
    """Rows of a table in a fixed order, whose files are read when asked for."""

    chunk = 8

    def __init__(
        self,
        files: Files,
        names: Names,
        faults: NDArray[np.uint8],
        rows: NDArray[np.int64],
        labels: NDArray[np.int32] | None,
    ):
        """
        Args:
            names: Of all rows of the table.
            faults: Of all rows: FINE, or why the row is not to be used.
            rows: (N,) those of this split.
            labels: (N,) class numbers, or None.
        """
        self.files, self.names, self.faults, self.rows, self.labels = files, names, faults, rows, labels

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, i: int) -> str:
        return self.names[int(self.rows[i])]

    def read(self, i: int) -> tuple[Payload, int | None]:
        fault = self.faults[self.rows[i]]
        if fault == OUTSIDE:
            raise RejectedError("outside", f"the path leads out of {self.files.where}; see data.image_root")
        if fault == CONTRADICTORY:
            raise RejectedError("contradictory", "the table gives this path more than one label or split")
        return self.files.read(self.name(i)), None if self.labels is None else int(self.labels[i])

    def fingerprint(self) -> str:
        hasher = hashlib.sha256()
        for row in self.rows.tolist():
            hasher.update(ascii(self.names[row]).encode() + b"\n")
        hasher.update(self.faults[self.rows].tobytes())
        if self.labels is not None:
            hasher.update(self.labels.tobytes())
        fine = self.rows[self.faults[self.rows] == FINE]
        hasher.update(self.files.hash_states(_Chosen(self.names, fine)).encode())
        return hasher.hexdigest()


class _Chosen(Sequence[str]):
    """Some of many names, without a copy."""

    def __init__(self, names: Names, rows: NDArray[np.int64]):
        self.names, self.rows = names, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: Any) -> Any:
        return self.names[int(self.rows[i])]


def open_table(data: DataConfig, open_store: OpenStore | None = None) -> Source:
    """
    Raises:
        UserError: if there is no such table, it cannot be read, its columns are not clear, or it names no image.
    """
    folder, name = _place(data, open_store)
    where = f"data.root={data.root}"
    images = folder
    if data.image_root is not None:
        images = open_folder(data.image_root, open_store, key="data.image_root", holds="the folder that paths start in")
    try:
        content = folder.read(name)
    except FileNotFoundError:
        raise UserError(f"{where}: there is no such file. Set data.root to the table, a CSV or Parquet file.") from None
    except OSError as error:
        raise UserError(f"{where}: cannot be read: {error.strerror or error}.") from None
    suffix = os.path.splitext(name)[1].lower()
    rows = _parquet_rows(content, data, where) if suffix in PARQUET else _csv_rows(content, suffix, data, where)
    samples, faults, notes = _collect(rows, images, where)
    if not len(samples.names):
        raise UserError(
            f"{where}: the table names no image. Expected one row per image below the names of the columns."
        )
    keys = name_keys(samples.names)
    repeated = _mark_repeated(samples, faults, keys, notes)
    return build_source(
        samples,
        data=data,
        name=slug(os.path.splitext(name)[0]),
        detail=f"table {folder.where}/{name}",
        make_split=lambda rows, labels: TableSplit(images, samples.names, faults, rows, labels),
        notes=notes,
        keys=keys,
        left_out=repeated,
    )


def check_table(data: DataConfig, open_store: OpenStore | None = None) -> list[str]:
    """Reads the table and opens a few of its images."""
    return check_samples(open_table(data, open_store), data)


def _place(data: DataConfig, open_store: OpenStore | None) -> tuple[Files, str]:
    """The table's folder and its name there."""
    if data.root is None:
        raise UserError("data.name=table needs data.root: the CSV or Parquet file.")
    known = (*DELIMITERS, *PARQUET)
    if os.path.splitext(data.root)[1].lower() not in known:
        raise UserError(f"data.root={data.root}: expected a file named {', '.join(known)}.")
    folder, name = split_path(data.root, "data.root")
    return open_folder(folder, open_store, key="data.root", holds="the table"), name


# -- reading ---------------------------------------------------------------------------------------------------------


def _csv_rows(content: bytes, suffix: str, data: DataConfig, where: str) -> Iterator[Row]:
    encoding, errors = "utf-8-sig", "surrogateescape"  # a file's name need not be text
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding, errors = "utf-16", "strict"
    # Line ends are left to the reader of CSV: they may stand inside a quoted cell.
    text = io.TextIOWrapper(io.BytesIO(content), encoding, errors, newline="")
    line = 0
    try:
        first = text.readline()
        text.seek(0)
        counts = {mark: first.count(mark) for mark in DELIMITERS[suffix]}
        delimiter = max(counts, key=lambda mark: counts[mark])
        reader = csv.reader(text, delimiter=delimiter, strict=True, skipinitialspace=True)
        header = [name.strip() for name in next(reader, [])]
        if any(os.path.splitext(name)[1].lower() in SUFFIXES for name in header):
            raise UserError(
                f"{where}: the first line is {first.strip()!a}, expected the names of the columns, such as path,label."
            )
        columns = [header.index(name) if name else None for name in _columns(header, data, where)]
        for cells in reader:
            line = reader.line_num
            if not cells:
                continue
            if len(cells) > len(header):
                raise UserError(
                    f"{where}: line {line} has {len(cells)} cells, the first line names {len(header)} columns. "
                    "Put cells that hold the separator into quotes."
                )
            path, label, part = (
                None if column is None or column >= len(cells) else cells[column] or None for column in columns
            )
            yield path, label, part
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{where}: not a readable table after line {line}: {error}.") from None


def _parquet_rows(content: bytes, data: DataConfig, where: str) -> Iterator[Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(f"{where}: Parquet needs the package pyarrow ({error}): pip install pyarrow.") from None
    try:
        file = parquet.ParquetFile(pyarrow.BufferReader(content))
        fields = {field.name: field.type for field in file.schema_arrow}
        names = _columns(list(fields), data, where)
        for name in filter(None, names):
            kind = fields[name]
            kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
            if pyarrow.types.is_nested(kind) or pyarrow.types.is_temporal(kind):
                raise UserError(f"{where}: the column {name!a} holds {kind}, expected texts or whole numbers.")
        for batch in file.iter_batches(BATCH_ROWS, columns=sorted({name for name in names if name})):
            cells = [batch.column(name).to_pylist() if name else [None] * batch.num_rows for name in names]
            for path, label, part in zip(*cells, strict=True):
                yield _text(path), _text(label), _text(part)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{where}: not a readable Parquet file: {str(error).splitlines()[0]}") from None


def _text(cell: Any) -> str | None:
    if cell is None or cell == "" or cell != cell:  # NaN, by which pandas means that there is nothing
        return None
    return os.fsdecode(cell) if isinstance(cell, bytes) else str(cell)


def _columns(header: Sequence[str], data: DataConfig, where: str) -> tuple[str, str | None, str | None]:
    """Names of the columns of path, label and split."""
    path = _column(header, data.path_column, "data.path_column", PATH_COLUMNS, where)
    if path is None:
        raise UserError(
            f"{where}: no column is known to hold the paths of the images; the table has "
            f"{', '.join(map(ascii, header)) or 'none at all'}. Set data.path_column to the one that does."
        )
    label = _column(header, data.label_column, "data.label_column", LABEL_COLUMNS, where)
    return path, label, _column(header, data.split_column, "data.split_column", SPLIT_COLUMNS, where)


def _column(header: Sequence[str], wanted: str | None, key: str, known: Sequence[str], where: str) -> str | None:
    if wanted == "":
        return None
    found = [name for name in header if (name == wanted if wanted else name.lower() in known)]
    if len(found) > len(set(found)):
        raise UserError(f"{where}: more than one column is called {found[0]!a}. Rename one of them.")
    if len(found) > 1:
        raise UserError(
            f"{where}: the columns {' and '.join(map(ascii, found))} may both be meant. Set {key} to the right one"
            f"{'' if key == 'data.path_column' else ', or to an empty text to use none'}."
        )
    if wanted and not found:
        raise UserError(f"{where}: {key}={wanted}, but the columns are {', '.join(map(ascii, header))}.")
    return found[0] if found else None


# -- rows ------------------------------------------------------------------------------------------------------------


def _collect(rows: Iterable[Row], images: Files, where: str) -> tuple[Samples, NDArray[np.uint8], list[str]]:
    """The samples, what is wrong with each, and notes."""
    samples, faults = Samples(), array("B")
    without_path = 0
    for path, label, part in rows:
        if path is None:
            without_path += 1
            continue
        number = NONE
        if part is not None and part.strip():
            number = PART_WORDS.get(part.strip().lower(), NONE)
            if number == NONE:
                raise UserError(
                    f"{where}: the split of {path!a} is {part!a}, expected one of {', '.join(PART_WORDS)}. "
                    "Correct it, or set data.split_column to another column, or to an empty text to hold images out."
                )
        label = label and label.strip()
        if label and any("\ud800" <= letter <= "\udfff" for letter in label):
            raise UserError(f"{where}: the label of {path!a} is {label!a}, expected UTF-8. Save the table so.")
        if os.path.splitext(stripped := path.rstrip())[1].lower() in SUFFIXES:
            path = stripped  # of a table that is aligned by eye
        inside = images.inside(path)
        samples.append(path if inside is None else inside, label or None, number)
        faults.append(OUTSIDE if inside is None else FINE)
    notes = [f"{without_path} rows have no path and were left out"] if without_path else []
    return samples, np.frombuffer(faults, dtype=np.uint8), notes


def _mark_repeated(
    samples: Samples, faults: NDArray[np.uint8], keys: NDArray[np.uint64], notes: list[str]
) -> NDArray[np.bool_]:
    """(N,) rows whose path an earlier one has; where the two disagree, ``faults`` says so of the earlier one."""
    order = key_order(keys)  # stable: rows of one path stay in the order of the table
    same = np.zeros(len(keys), dtype=bool)
    same[1:] = (keys[order[1:]] == keys[order[:-1]]).all(axis=1)
    repeated = np.zeros(len(keys), dtype=bool)
    if not same.any():
        return repeated
    repeated[order[same]] = True
    firsts = order[np.maximum.accumulate(np.where(same, 0, np.arange(len(order))))]  # of each row, in that order
    labels, parts = np.frombuffer(samples.labels, dtype=np.int32), np.frombuffer(samples.parts, dtype=np.int8)
    differs = (labels[order] != labels[firsts]) | (parts[order] != parts[firsts])
    faults[firsts[differs]] = CONTRADICTORY
    notes.append(f"{int(repeated.sum())} rows name a path for the second time and were left out")
    return repeated
