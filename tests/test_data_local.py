from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hjepa.config import Config, validate
from hjepa.data import create_dataloaders, open_prepared
from hjepa.data.loader import ShardDataset
from hjepa.data.transforms import eval_view
from hjepa.distributed import World
from hjepa.errors import UserError
from hjepa.files import file_sha256


def write_images(folder: Path, count: int, *, side: int = 24, first: int = 0) -> None:
    """PNGs and JPEGs of two sizes."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(first, first + count):
        shape = (side + 4 * (i % 2), side, 3)
        image = Image.fromarray(np.random.default_rng(i).integers(0, 256, shape, dtype=np.uint8))
        image.save(folder / f"{i}.{'png' if i % 3 else 'jpg'}")


def config(tmp_path: Path, **data: object) -> Config:
    return validate(
        {
            "data": {
                "root": str(tmp_path / "pictures"),
                "cache_dir": str(tmp_path / "cache"),
                "image_size": 16,
                "num_workers": 0,
                **data,
            },
            "model": {"patch_size": 4, "embed_dim": 32, "num_heads": 2},
            "training": {"batch_size": 8, "device": "cpu"},
        }
    )


@pytest.fixture
def labelled(tmp_path: Path) -> Config:
    """60 pictures in two classes: 54 to train on, 6 held out."""
    for label, name in enumerate(("cats", "dogs")):
        write_images(tmp_path / "pictures" / name, 30, first=30 * label)
    return config(tmp_path)


def prepared_folders(settings: Config) -> list[Path]:
    return [path for path in (Path(settings.data.cache_dir) / "prepared").iterdir() if path.is_dir()]


# -- loaders ---------------------------------------------------------------------------------------------------------


def test_create_dataloaders__every_training_image_once_and_the_test_split_in_order(labelled: Config) -> None:
    train, val = create_dataloaders(labelled)
    assert (train.num_samples, train.batch_size) == (54, 8)
    seen = np.concatenate([batch.samples for batch in train.batches(0, 27)])[: 4 * 54]
    assert np.bincount(seen).tolist() == [4] * 54
    assert val is not None
    assert (val.num_samples, val.batch_size) == (6, 6)
    (batch,) = val.batches(0, val.num_samples // val.batch_size)
    assert batch.global_samples.tolist() == list(range(6))
    assert batch.global_epochs.tolist() == [0] * 6
    manifest, fetch = open_prepared(labelled)
    test = ShardDataset(manifest, "test", fetch)
    assert sorted(test.labels().tolist()) == [0, 0, 0, 1, 1, 1]
    for i in range(6):
        assert torch.equal(batch.images[i], eval_view(torch.from_numpy(test.read(i)[0]), 16))
    assert val.normalize(batch.images).shape == (6, 3, 16, 16)


def test_create_dataloaders__two_ranks_share_batches_and_one_prepared_set(labelled: Config) -> None:
    alone, alone_val = create_dataloaders(labelled)
    pairs = [create_dataloaders(labelled, world=World(rank=rank, size=2)) for rank in range(2)]
    assert len(prepared_folders(labelled)) == 1
    batch = next(alone.batches(3, 4))
    shares = [next(train.batches(3, 4)) for train, _ in pairs]
    assert torch.equal(batch.images, torch.cat([share.images for share in shares]))
    vals = [val for _, val in pairs if val is not None]
    assert alone_val is not None
    assert [val.batch_size for val in vals] == [6, 6]
    held_out = torch.cat([next(val.batches(0, 1)).images for val in vals])
    assert torch.equal(held_out, next(alone_val.batches(0, 1)).images)


@pytest.mark.parametrize(("size", "val_batch"), [(4, 4), (8, None)])
def test_create_dataloaders__validation_batch_divides_into_ranks(
    labelled: Config, size: int, val_batch: int | None
) -> None:
    _, val = create_dataloaders(labelled, world=World(rank=size - 1, size=size))
    assert (val.batch_size if val else None) == val_batch


def test_create_dataloaders__unlabelled_folder(tmp_path: Path) -> None:
    write_images(tmp_path / "pictures", 20)
    train, val = create_dataloaders(config(tmp_path, test_fraction=0.2))
    assert train.num_samples == 16
    assert val is not None
    assert val.batch_size == 4
    assert set(train.dataset.labels().tolist()) == {-1}


def test_create_dataloaders__no_test_split_no_validation(tmp_path: Path) -> None:
    write_images(tmp_path / "pictures" / "train", 12)
    (tmp_path / "pictures" / "test").mkdir()
    (tmp_path / "pictures" / "test" / "1.png").write_bytes(b"no picture")
    settings = config(tmp_path, quarantine_limit=0.2)
    train, val = create_dataloaders(settings)
    assert train.num_samples == 12
    assert val is None
    assert "the test split is left out" in str(open_prepared(settings)[0]["source"]["notes"])


# -- the prepared set ------------------------------------------------------------------------------------------------


def test_open_prepared__second_call_prepares_nothing(labelled: Config, capsys: pytest.CaptureFixture[str]) -> None:
    first, _ = open_prepared(labelled)
    assert "prepared in" in capsys.readouterr().out
    (folder,) = prepared_folders(labelled)
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    second, fetch = open_prepared(labelled)
    assert second == first
    assert first["uri"] == folder.as_uri()
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times
    said = capsys.readouterr().out
    assert "54 train, 6 test images: already prepared" in said
    assert len(said.splitlines()) == 1
    for split in first["splits"].values():
        for file in (*split["shards"], split["index"]):
            assert file_sha256(fetch(file["key"])) == file["sha256"]
    open_prepared(labelled, world=World(rank=1, size=2))
    assert capsys.readouterr().out == ""


def test_open_prepared__changed_images_are_another_set(labelled: Config, tmp_path: Path) -> None:
    before, _ = open_prepared(labelled)
    write_images(tmp_path / "pictures" / "dogs", 2, first=90)
    after, _ = open_prepared(labelled)
    assert after["splits"]["train"]["samples"] == 56
    assert after["digest"] != before["digest"]
    assert len(prepared_folders(labelled)) == 2


@pytest.mark.parametrize("damage", ["removed shard", "short shard", "no manifest", "half a manifest"])
def test_open_prepared__damaged_set_is_prepared_again(labelled: Config, damage: str) -> None:
    before, fetch = open_prepared(labelled)
    shard, manifest = fetch("train-000000.tar"), fetch("dataset.json")
    if damage == "removed shard":
        shard.unlink()
    elif damage == "short shard":
        os.truncate(shard, 1000)
    elif damage == "no manifest":
        manifest.unlink()
    else:
        os.truncate(manifest, 100)
    after, _ = open_prepared(labelled)
    assert after == before
    assert file_sha256(shard) == before["splits"]["train"]["shards"][0]["sha256"]
    assert len(prepared_folders(labelled)) == 1


def test_open_prepared__names_the_report_of_unusable_files(tmp_path: Path) -> None:
    write_images(tmp_path / "pictures", 10)
    for i in range(5):
        (tmp_path / "pictures" / f"bad{i}.png").write_bytes(b"no picture")
    settings = config(tmp_path)
    with pytest.raises(UserError, match="5 of 15 files") as refused:
        open_prepared(settings)
    found = re.search(r"The report: (.*)$", str(refused.value))
    assert found is not None
    assert Path(found[1]).read_text().count("not-an-image") == 5
    assert prepared_folders(settings) == []


def test_open_prepared__holds_a_prepared_set_to_the_limit_of_now(tmp_path: Path) -> None:
    write_images(tmp_path / "pictures", 10)
    (tmp_path / "pictures" / "bad.png").write_bytes(b"no picture")
    open_prepared(config(tmp_path, quarantine_limit=0.1))
    with pytest.raises(UserError, match=r"1 of 11 files \(9\.1%\).*allows 5\.0%") as refused:
        open_prepared(config(tmp_path))
    found = re.search(r"The report: (.*)$", str(refused.value))
    assert found is not None
    assert "bad.png" in Path(found[1]).read_text()
    assert open_prepared(config(tmp_path, quarantine_limit=0.1))[0]["quarantine"]["total"] == 1


def test_open_prepared__folder_that_cannot_be_written_to(labelled: Config, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match=r"data\.cache_dir=.*Choose a folder"):
        open_prepared(labelled)


# -- several processes -----------------------------------------------------------------------------------------------

OPEN = """
import sys
from hjepa.config import load_config
from hjepa.data import open_prepared

print("digest", open_prepared(load_config(sys.argv[1]))[0]["digest"], flush=True)
"""


@pytest.fixture
def many(tmp_path: Path) -> Config:
    """Takes a good part of a second to prepare."""
    write_images(tmp_path / "pictures", 150, side=128)
    settings = config(tmp_path)
    (tmp_path / "config.yaml").write_text(settings.model_dump_json())
    return settings


def start(tmp_path: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", OPEN, str(tmp_path / "config.yaml")]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def begun(settings: Config) -> Iterator[Path]:
    return Path(settings.data.cache_dir).glob("prepared/prepare-*/made/train-000000.tar")


def test_open_prepared__killed_in_the_middle_leaves_nothing_half(many: Config, tmp_path: Path) -> None:
    with start(tmp_path) as process:
        deadline = time.monotonic() + 60
        while not any(begun(many)):
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    left = prepared_folders(many)
    assert [path.name.startswith("prepare-") for path in left] == [True]
    manifest, fetch = open_prepared(many)
    assert manifest["splits"]["train"]["samples"] == 135
    assert [path.name for path in prepared_folders(many)] == [fetch("").name]


def test_open_prepared__of_two_at_once_one_prepares_and_one_waits(many: Config, tmp_path: Path) -> None:
    with start(tmp_path) as one, start(tmp_path) as two:
        said = [process.communicate(timeout=120)[0] for process in (one, two)]
    assert [one.returncode, two.returncode] == [0, 0]
    assert sum("source: pictures" in text for text in said) == 1
    assert sum("already prepared" in text for text in said) == 1
    assert len({text.split("digest ")[-1] for text in said}) == 1
    assert len(prepared_folders(many)) == 1


def test_package__import_costs_no_torch() -> None:
    code = "import hjepa.data, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
