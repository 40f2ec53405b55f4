from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from hjepa.config import DataConfig
from hjepa.data.datasets import open_source
from hjepa.data.loader import ShardDataset
from hjepa.data.prepare import Prepared, Progress, QuarantineError, prepare, prepared_key, scratch
from hjepa.data.sources import ArraySplit, Source
from hjepa.errors import UserError


def picture(seed: int, mode: str = "RGB") -> Image.Image:
    size = (20 + seed % 5, 24)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)).convert(mode)


def save(path: Path, image: Image.Image, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


@pytest.fixture
def folder(tmp_path: Path) -> DataConfig:
    """40 pictures in two classes, of every mode that files come in."""
    modes = ["RGB", "L", "RGBA", "P", "CMYK", "1", "LA"]
    root = tmp_path / "Two Kinds"
    for i in range(40):
        mode = modes[i % len(modes)]
        suffix = "jpg" if mode in ("RGB", "L", "CMYK") and i % 2 else ("tif" if mode == "CMYK" else "png")
        save(root / "ab"[i % 2] / f"{i}.{suffix}", picture(i, mode))
    return DataConfig(root=str(root), shard_mb=1)


def spoil(data: DataConfig) -> dict[str, str]:
    """Add one file of every bad kind to a folder; file name -> reason."""
    root = Path(str(data.root)) / "a"
    (root / "zero.jpg").write_bytes(b"")
    (root / "text.jpg").write_text("no picture")
    buffer = io.BytesIO()
    picture(1).save(buffer, "JPEG")
    (root / "cut.jpg").write_bytes(buffer.getvalue()[:-300])
    save(root / "bomb.png", Image.new("1", (12_000, 12_000)))
    (root / "loop.jpg").symlink_to("loop.jpg")
    return {
        "zero.jpg": "empty",
        "text.jpg": "not-an-image",
        "cut.jpg": "truncated",
        "bomb.png": "too-many-pixels",
        "loop.jpg": "unreadable",
    }


def hashes(prepared: Prepared) -> dict[str, str]:
    return {file.key: file.sha256 for file in prepared.files}


def test_prepare__any_number_of_workers_gives_the_same_bytes(folder: DataConfig, tmp_path: Path) -> None:
    spoil(folder)
    data = folder.model_copy(update={"quarantine_limit": 0.5})
    one = prepare(open_source(data), data, tmp_path / "one", workers=1)
    two = prepare(open_source(data), data, tmp_path / "two", workers=3)
    assert one.manifest == two.manifest
    assert hashes(one) == hashes(two)
    assert all(file.path.stat().st_size == file.bytes for file in two.files)


def test_prepare__reduced_images_are_the_same_on_any_number_of_workers(folder: DataConfig, tmp_path: Path) -> None:
    for i in range(12):
        image = picture(i).resize((90 + 10 * i, 150), Image.Resampling.BICUBIC)
        save(Path(str(folder.root)) / "ab"[i % 2] / f"large{i}.{('jpg', 'png', 'bmp')[i % 3]}", image)
    data = folder.model_copy(update={"short_side": 64})
    one = prepare(open_source(data), data, tmp_path / "one", workers=1)
    two = prepare(open_source(data), data, tmp_path / "two", workers=3)
    assert hashes(one) == hashes(two)
    assert one.manifest == two.manifest
    dataset = ShardDataset(one.manifest, "train", (tmp_path / "one").joinpath)
    shortest = [min(dataset.read(i)[0].shape[1:]) for i in range(len(dataset))]
    assert max(shortest) == 64
    assert min(shortest) == 20  # small ones are not enlarged
    whole = prepare(open_source(folder), folder, tmp_path / "whole")
    assert whole.manifest["digest"] != one.manifest["digest"]


def test_prepare__large_images_give_the_same_and_leave_nothing_on_the_disk(
    folder: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = prepare(open_source(folder), folder, tmp_path / "usual", workers=2)
    monkeypatch.setattr("hjepa.data.prepare.SPOOLED_BYTES", 100)
    monkeypatch.setattr("hjepa.data.images.LARGE_PIXELS", 10)
    monkeypatch.setattr("hjepa.data.images.BAND_BYTES", 100)
    spooled = prepare(open_source(folder), folder, tmp_path / "spooled", workers=2)
    assert spooled.manifest == usual.manifest
    assert sorted(path.name for path in (tmp_path / "spooled").iterdir()) == sorted(
        path.name for path in (tmp_path / "usual").iterdir()
    )


def test_prepared_key__follows_the_quality_only_where_images_are_reduced(folder: DataConfig) -> None:
    def key(**settings: Any) -> str:
        data = folder.model_copy(update=settings)
        return prepared_key(open_source(data), data)

    assert key(jpeg_quality=80) == key()
    assert len({key(), key(short_side=64), key(short_side=96), key(short_side=64, jpeg_quality=80)}) == 4


def test_prepare__manifest_counts_what_the_shards_hold(folder: DataConfig, tmp_path: Path) -> None:
    prepared = prepare(open_source(folder), folder, tmp_path / "out")
    manifest = json.loads(json.dumps(prepared.manifest))
    assert manifest["name"] == "two-kinds"
    assert manifest["classes"] == ["a", "b"]
    assert {name: section["per_class"] for name, section in manifest["splits"].items()} == {
        "train": [18, 18],
        "test": [2, 2],
    }
    for split in ("train", "test"):
        dataset = ShardDataset(manifest, split, (tmp_path / "out").joinpath)
        section = manifest["splits"][split]
        assert len(dataset) == section["samples"]
        assert np.bincount(dataset.labels()).tolist() == section["per_class"]
        assert all(dataset.read(i)[0].shape[0] == 3 for i in range(len(dataset)))
        assert section["shape"] is None


def test_prepare__statistics_weigh_every_image_alike(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (50, 9, 7, 3), dtype=np.uint8)
    source = Source("noise", "made here", {"train": ArraySplit(images, None)})
    statistics = prepare(source, DataConfig(), tmp_path).manifest["statistics"]
    scaled = images.reshape(-1, 3) / 255
    np.testing.assert_allclose(statistics["mean"], scaled.mean(0), atol=1e-12)
    np.testing.assert_allclose(statistics["std"], scaled.std(0), atol=1e-12)


def test_prepare__constant_images_have_a_usable_std(tmp_path: Path) -> None:
    source = Source("black", "made here", {"train": ArraySplit(np.zeros((9, 8, 8), dtype=np.uint8), None)})
    assert prepare(source, DataConfig(channels=1), tmp_path).manifest["statistics"]["std"] == [1 / 255]


def test_prepare__arrays_come_back_exactly(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (1200, 28, 28), dtype=np.uint8)
    source = Source("grey", "made here", {"train": ArraySplit(images, np.arange(1200) % 3)}, classes=("x", "y", "z"))
    manifest = prepare(source, DataConfig(channels=1), tmp_path).manifest
    dataset = ShardDataset(manifest, "train", tmp_path.joinpath)
    np.testing.assert_array_equal(dataset.in_memory(), images[:, None])
    np.testing.assert_array_equal(dataset.labels(), np.arange(1200) % 3)
    assert manifest["splits"]["train"]["shape"] == [28, 28]


def test_prepare__labels_without_names_are_numbered(tmp_path: Path) -> None:
    source = Source(
        "numbers", "made here", {"train": ArraySplit(np.zeros((8, 8, 8), np.uint8), np.array([0, 2, 2, 0] * 2))}
    )
    manifest = prepare(source, DataConfig(), tmp_path).manifest
    assert manifest["classes"] == ["0", "1", "2"]
    assert manifest["splits"]["train"]["per_class"] == [4, 0, 4]


def digest(source: Source, data: DataConfig, workdir: Path) -> str:
    return str(prepare(source, data, workdir).manifest["digest"])


def test_digest__follows_pixels_labels_and_settings_but_not_names_or_seed(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8), dtype=np.uint8)
    labels = np.arange(20) % 2

    def of(images: np.ndarray, labels: np.ndarray, name: str = "a", **settings: Any) -> str:
        source = Source(name, name, {"train": ArraySplit(images, labels)}, classes=("x", "y"))
        return digest(source, DataConfig(**settings), tmp_path)

    base = of(images, labels)
    assert of(images, labels, name="b", num_workers=3, image_size=32, quarantine_limit=0.5) == base
    changed = images.copy()
    changed[7, 3, 3] ^= 1
    assert len({base, of(changed, labels), of(images, 1 - labels), of(images, labels, channels=1)}) == 4
    assert of(images, labels, shard_mb=1) != base


def test_prepared_key__recognises_a_source_without_reading_images(folder: DataConfig) -> None:
    key = prepared_key(open_source(folder), folder)
    assert prepared_key(open_source(folder), folder) == key
    other = folder.model_copy(update={"test_fraction": 0.3})
    assert prepared_key(open_source(other), other) != key


def test_quarantine__bad_files_are_listed_and_the_rest_is_prepared(folder: DataConfig, tmp_path: Path) -> None:
    bad = spoil(folder)
    data = folder.model_copy(update={"quarantine_limit": 0.2})
    prepared = prepare(open_source(data), data, tmp_path / "out")
    report = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert {Path(line["name"]).name: line["reason"] for line in report} == bad
    section = prepared.manifest["quarantine"]
    assert (section["total"], section["by_reason"]["truncated"]) == (5, 1)
    assert section["share"] == pytest.approx(5 / 45)
    assert sum(split["samples"] for split in prepared.manifest["splits"].values()) == 40


def test_quarantine__above_the_limit_fails_and_keeps_the_report(folder: DataConfig, tmp_path: Path) -> None:
    spoil(folder)
    with pytest.raises(QuarantineError, match=r"5 of 45 files \(11\.1%\) cannot be used.*quarantine_limit") as caught:
        prepare(open_source(folder), folder, tmp_path / "out")
    assert caught.value.exit_code == 2
    assert len(caught.value.report.read_text().splitlines()) == 5


@pytest.mark.parametrize("usable", [0, 7])
def test_quarantine__too_few_left_to_train_on_is_an_error_even_without_a_limit(tmp_path: Path, usable: int) -> None:
    for i in range(10):
        save(tmp_path / "in" / "train" / f"{i}.png", picture(i))
        save(tmp_path / "in" / "test" / f"{i}.png", picture(i))
        if i >= usable:
            (tmp_path / "in" / "train" / f"{i}.png").write_text("x")
    data = DataConfig(root=str(tmp_path / "in"), quarantine_limit=1.0)
    with pytest.raises(QuarantineError, match=rf"{usable} of 10 training images.*at least 8.*'\d\.png'") as caught:
        prepare(open_source(data), data, tmp_path / "out")
    assert len(caught.value.report.read_text().splitlines()) == 10 - usable


def test_prepare__too_few_images_are_refused_before_any_is_read(tmp_path: Path) -> None:
    source = Source("few", "made here", {"train": ArraySplit(np.zeros((7, 8, 8), np.uint8), None)})
    with pytest.raises(UserError, match=r"made here: 7 usable images.*at least 8.*Add images"):
        prepare(source, DataConfig(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_quarantine__a_test_split_that_it_emptied_is_left_out(tmp_path: Path) -> None:
    for i in range(20):
        save(tmp_path / "in" / "train" / "ab"[i % 2] / f"{i}.png", picture(i))
    (tmp_path / "in" / "test" / "a").mkdir(parents=True)
    (tmp_path / "in" / "test" / "a" / "0.png").write_text("x")
    data = DataConfig(root=str(tmp_path / "in"), quarantine_limit=0.5)
    prepared = prepare(open_source(data), data, tmp_path / "out")
    assert list(prepared.manifest["splits"]) == ["train"]
    assert any("test split is left out" in note for note in prepared.manifest["source"]["notes"])
    assert not [file.key for file in prepared.files if file.key.startswith("test")]
    assert prepared.manifest["quarantine"]["total"] == 1


def test_quarantine__names_that_are_not_utf8_are_reported(folder: DataConfig, tmp_path: Path) -> None:
    with open(os.fsencode(str(folder.root)) + b"/a/new\nline\xff.jpg", "wb") as file:
        file.write(b"text")
    prepare(open_source(folder), folder, tmp_path / "out")
    line = json.loads((tmp_path / "out" / "quarantine.jsonl").read_text())
    assert os.fsencode(line["name"]) == b"a/new\nline\xff.jpg"


def test_progress__ends_at_the_total(folder: DataConfig, tmp_path: Path) -> None:
    seen: list[Progress] = []
    prepare(open_source(folder), folder, tmp_path / "out", progress=seen.append)
    assert [(item.split, item.done, item.total) for item in seen[-2:]] == [("train", 36, 36), ("test", 4, 4)]
    assert "36 of 36 images" in str(seen[-2])
    with tarfile.open(tmp_path / "out" / "train-000000.tar") as shard:
        pictures = [member.size for member in shard if not member.name.endswith(".cls")]
    assert seen[-2].bytes == sum(pictures)


@pytest.mark.parametrize(
    ("done", "seconds", "left"),
    [(900, 90.0, "10 s"), (100, 100.0, "15 min"), (10, 3600.0, "99.0 h"), (1000, 9.0, None)],
)
def test_progress__says_how_fast_and_how_long(done: int, seconds: float, left: str | None) -> None:
    line = str(Progress("train", done, 1000, 3, seconds, int(2.5e6 * seconds)))
    assert f"{done:,} of 1,000 images, 3 in quarantine, {done / seconds:,.0f} images/s, 2.5 MB/s" in line
    assert line.endswith(f", {left} left" if left else "MB/s")


def test_prepare__full_disk_is_one_clear_error(small_disk: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3000, 28, 28), dtype=np.uint8)
    source = Source("noise", "made here", {"train": ArraySplit(images, None)})
    with pytest.raises(UserError, match=r"the disk of .* is full"):
        prepare(source, DataConfig(), small_disk / "out")


KILLED = """
import sys
from pathlib import Path
import numpy as np
from hjepa.config import DataConfig
from hjepa.data.prepare import prepare
from hjepa.data.sources import ArraySplit, Source

images = np.random.default_rng(0).integers(0, 256, (200_000, 28, 28), dtype=np.uint8)
source = Source("noise", "made here", {"train": ArraySplit(images, None)})
prepare(source, DataConfig(), Path(sys.argv[1]), workers=2, progress=lambda _: print("going", flush=True))
"""


def test_prepare__workers_die_with_a_killed_parent(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"going\n"
        workers = psutil.Process(process.pid).children()
        assert len(workers) == 2
        process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


# -- work folders ----------------------------------------------------------------------------------------------------


HOLDER = """
import sys, time
from pathlib import Path
from hjepa.data.prepare import scratch

with scratch(Path(sys.argv[1])) as folder:
    (folder / "train-000000.tar").write_bytes(bytes(1000))
    print(folder.name, flush=True)
    time.sleep(600)
"""


def test_scratch__is_removed_at_the_end_also_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), scratch(tmp_path / "cache") as folder:  # noqa: PT012
        (folder / "file").write_text("x")
        assert folder.parent == tmp_path / "cache"
        assert folder.name.startswith(f"prepare-{os.getpid()}-")
        raise RuntimeError
    assert not list((tmp_path / "cache").iterdir())


def test_scratch__removes_what_a_killed_process_left_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "prepare-of-somebody-else").mkdir()
    (tmp_path / "shards").mkdir()
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        theirs = tmp_path / process.stdout.readline().strip()
        try:
            with scratch(tmp_path):
                assert (theirs / "train-000000.tar").exists()  # its owner runs
        finally:
            process.kill()
    assert theirs.exists()
    with scratch(tmp_path) as ours:
        assert {path.name for path in tmp_path.iterdir()} == {"prepare-of-somebody-else", "shards", ours.name}


def test_scratch__a_process_number_that_was_given_again_owns_nothing(tmp_path: Path) -> None:
    with scratch(tmp_path) as folder:
        mine = folder.name.removeprefix(f"prepare-{os.getpid()}-")
    started, _, rest = mine.partition("-")
    old = tmp_path / f"prepare-{os.getpid()}-{int(started) - 60}-{rest}"
    old.mkdir()
    elsewhere = tmp_path / f"prepare-{os.getpid()}-{int(started) - 60}-another-host-abc"
    elsewhere.mkdir()
    with scratch(tmp_path):
        assert not old.exists()
        assert elsewhere.exists()
