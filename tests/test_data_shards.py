from __future__ import annotations

import io
import pickle
import subprocess
import tarfile
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from hjepa.data.shards import ShardReader, ShardWriter, StoredFile, read_index, tar_member
from hjepa.errors import HjepaError


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (seed + 1, 9), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write(folder: Path, count: int = 7, shard_bytes: int = 6000, label: bool = True) -> tuple[ShardWriter, StoredFile]:
    folder.mkdir(exist_ok=True)
    with ShardWriter(folder, "train", shard_bytes=shard_bytes) as writer:
        for i in range(count):
            writer.add(png(i), suffix="png", label=i % 3 if label else None, crc32=zlib.crc32(png(i)))
        return writer, writer.finish()


def test_shards__plain_tar_reads_them(tmp_path: Path) -> None:
    writer, _ = write(tmp_path)
    extracted = tmp_path / "extracted"
    extracted.mkdir()
    for shard in writer.shards:
        done = subprocess.run(["tar", "-xf", shard.path, "-C", extracted], capture_output=True, text=True, check=True)
        assert done.stderr == ""
    assert [(extracted / f"{i:09d}.png").read_bytes() for i in range(7)] == [png(i) for i in range(7)]
    assert [(extracted / f"{i:09d}.cls").read_text() for i in range(7)] == [str(i % 3) for i in range(7)]


def test_shards__webdataset_reads_them(tmp_path: Path) -> None:
    writer, _ = write(tmp_path)
    urls = [str(shard.path) for shard in writer.shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("l8"))
    assert [sample["__key__"] for sample in samples] == [f"{i:09d}" for i in range(7)]
    assert [sample["cls"] for sample in samples] == [i % 3 for i in range(7)]
    assert [sample["png"].shape for sample in samples] == [(i + 1, 9) for i in range(7)]


def test_shards__member_is_what_the_standard_library_writes() -> None:
    info = tarfile.TarInfo("000000001.png")
    info.size, info.mode = 5, 0o644
    assert tar_member("000000001.png", b"hello")[0] == info.tobuf(tarfile.USTAR_FORMAT)


def test_shards__size_limit_is_kept_and_nothing_is_lost(tmp_path: Path) -> None:
    writer, index = write(tmp_path, count=30, shard_bytes=6000)
    assert len(writer.shards) > 3
    assert all(shard.bytes <= 6000 + 1024 for shard in writer.shards)
    assert sum(shard.samples for shard in writer.shards) == index.samples == 30
    assert all(shard.bytes == shard.path.stat().st_size for shard in writer.shards)


def test_shards__same_samples_same_bytes(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a"), write(tmp_path / "b")
    assert [shard.sha256 for shard in first[0].shards] == [shard.sha256 for shard in second[0].shards]
    assert first[1].sha256 == second[1].sha256


def test_index__points_at_every_sample(tmp_path: Path) -> None:
    writer, index = write(tmp_path)
    reader = ShardReader()
    records = read_index(index.path)
    for i, (shard, offset, length, label, crc32) in enumerate(records.tolist()):
        data = reader.read(writer.shards[shard].path, offset, length)
        assert (data, label, crc32) == (png(i), i % 3, zlib.crc32(png(i)))


def test_index__a_sample_without_label_has_no_cls_file(tmp_path: Path) -> None:
    writer, index = write(tmp_path, label=False)
    assert read_index(index.path)["label"].tolist() == [-1] * 7
    with tarfile.open(writer.shards[0].path) as tar:
        assert {Path(name).suffix for name in tar.getnames()} == {".png"}


@pytest.mark.parametrize("damage", [lambda data: data[:10], lambda data: data[:-1], lambda data: b"x" + data[1:]])
def test_index__damaged_file_is_refused(tmp_path: Path, damage: object) -> None:
    _, index = write(tmp_path)
    index.path.write_bytes(damage(index.path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(HjepaError, match=r"train\.index"):
        read_index(index.path)


def test_reader__survives_pickling(tmp_path: Path) -> None:
    writer, index = write(tmp_path)
    reader = ShardReader()
    _, offset, length, _, _ = read_index(index.path)[0].item()
    data = reader.read(writer.shards[0].path, offset, length)
    again = pickle.loads(pickle.dumps(reader))  # noqa: S301 - our own bytes
    assert again.read(writer.shards[0].path, offset, length) == data == png(0)


def test_writer__remembers_little_of_a_sample(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "train", shard_bytes=1_000_000_000) as writer:
        writer.add(b"x", suffix="jpg", label=0, crc32=0)
        tracemalloc.start()
        try:
            for i in range(5_000):
                writer.add(b"x", suffix="jpg", label=i, crc32=i)
            grown = tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()
    assert grown < 5_000 * 40  # bytes; a record of the index has 24
