"""Preparing in parts: several pods give what one gives, and a killed preparation makes only what is missing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hjepa.adapters import local_pipeline
from hjepa.adapters.s3 import S3Store
from hjepa.cli import compiled_pipeline
from hjepa.config import Config, load_config
from hjepa.data import parts, prepare
from hjepa.data.datasets import open_source
from hjepa.data.parts import PartResult

pytestmark = pytest.mark.timeout(600)

IMAGES = 2600


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise in two classes, a few files that are no images, and some images twice, once across the splits."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for name, count in (("train/a", IMAGES // 2), ("train/b", IMAGES // 2), ("test/a", 60), ("test/b", 60)):
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (10, 12, 3), dtype=np.uint8)).save(root / name / f"{i:05d}.png")
    for i in range(7):
        (root / "train" / "a" / f"bad-{i}.png").write_text("no image")
    (root / "train" / "b" / "twin.png").write_bytes((root / "train" / "b" / "00003.png").read_bytes())
    (root / "train" / "b" / "leak.png").write_bytes((root / "test" / "a" / "00004.png").read_bytes())
    return root


def configured(root: Path, store: S3Store, cache: Path, **data: Any) -> Config:
    settings = {"name": "image-folder", "root": str(root), "part_images": 1000, "cache_dir": str(cache), **data}
    overrides = [f"data.{key}={json.dumps(value)}" for key, value in settings.items()]
    return load_config("default", [*overrides, f"storage.uri={store.uri()}", "data.shard_mb=1"])


def alone(config: Config, workdir: Path, workers: int) -> prepare.Prepared:
    return prepare.prepare(open_source(config.data), config.data, workdir, workers=workers)


def contents(prepared: prepare.Prepared) -> dict[str, str]:
    return {file.key: file.sha256 for file in prepared.files}


def test_parts__cover_every_sample_once(root: Path, store: S3Store, tmp_path: Path) -> None:
    source = open_source(configured(root, store, tmp_path).data)
    found = parts.parts_of(source, 1000)
    assert [part.name for part in found] == ["train-00000", "train-00001", "train-00002", "test-00000"]
    for split in ("train", "test"):
        ranges = [range(part.start, part.stop) for part in found if part.split == split]
        assert [i for each in ranges for i in each] == list(range(len(source.splits[split])))


def test_merge__parts_made_in_any_order_by_anyone_give_the_same_bytes(
    root: Path, store: S3Store, tmp_path: Path
) -> None:
    config = configured(root, store, tmp_path)
    whole = alone(config, tmp_path / "whole", workers=2)
    source = open_source(config.data)
    wanted = parts.parts_of(source, 1000)
    folder = tmp_path / "shared"
    made = {}
    for share in (wanted[1::2], wanted[0::2]):
        for each in prepare.prepare_parts(source, config.data, folder, share, workers=1):
            stored = json.loads(json.dumps(each.to_json()))
            made[each.part] = PartResult.from_json(stored, folder)
    merged = prepare.merge(source, config.data, folder, [made[part] for part in wanted], fetch=lambda shard: shard.path)
    assert merged.manifest == whole.manifest
    assert contents(merged) == contents(whole)
    assert len(merged.manifest["splits"]["train"]["shards"]) > 3


def test_duplicates__twins_and_leaks_are_counted_and_taken_out_if_asked(
    root: Path, store: S3Store, tmp_path: Path
) -> None:
    kept = alone(configured(root, store, tmp_path), tmp_path / "kept", workers=2).manifest
    found = kept["duplicates"]
    assert found["within"]["train"]["exact"] == 1
    assert found["leaked"] == {"exact": 1, "near": 0}
    assert found["removed_from_train"] == 0
    assert any("1 test images are in the training split too" in note for note in kept["source"]["notes"])
    taken = alone(configured(root, store, tmp_path, remove_leaks=True), tmp_path / "taken", workers=2)
    assert taken.manifest["duplicates"]["removed_from_train"] == 1
    assert taken.manifest["splits"]["train"]["samples"] == kept["splits"]["train"]["samples"] - 1
    assert taken.manifest["splits"]["train"]["per_class"] == [IMAGES // 2, IMAGES // 2 + 1]
    assert taken.manifest["digest"] != kept["digest"]
    lines = [json.loads(line) for line in (tmp_path / "kept" / "duplicates.jsonl").read_text().splitlines()]
    assert lines[0]["split"] == "test"
    assert lines[0]["other_split"] == "train"
    assert lines[0]["distance"] is None


def test_contact_sheet__shows_images_of_the_set(root: Path, store: S3Store, tmp_path: Path) -> None:
    prepared = alone(configured(root, store, tmp_path), tmp_path / "made", workers=2)
    sheet = Image.open(tmp_path / "made" / "contact-sheet.png")
    assert sheet.size == (10 * 102 + 6, 6 * 114 + 6)
    assert prepared.manifest["contact_sheet"]["key"] == "contact-sheet.png"
    # 60 thumbnails of 96 x 80 pixels of noise on white paper, each with a word below it.
    grey = np.asarray(sheet.convert("L"))
    assert 0.5 < (grey < 250).mean() < 0.75


def test_fan_out__three_pods_under_kfp_local_give_the_digest_of_one(
    root: Path, store: S3Store, tmp_path: Path, stack_environment: dict[str, str]
) -> None:
    config = configured(root, store, tmp_path / "cache")
    whole = alone(config, tmp_path / "whole", workers=2)
    arguments = {
        "config": "default",
        "overrides": [
            f"data.root={root}",
            "data.part_images=1000",
            "data.shard_mb=1",
            f"data.cache_dir={tmp_path}/cache",
            f"checkpoint.checkpoint_dir={tmp_path}/checkpoints",
            f"logging.log_dir={tmp_path}/logs",
            "training.device=cpu",
            "export.formats=[]",
        ],
        "data_name": "image-folder",
        "storage_uri": store.uri(),
        "run": "pods",
        "pods": 3,
    }
    finished = local_pipeline.run(
        compiled_pipeline("prepare"), arguments, workdir=tmp_path / "run", items=["pod-0", "pod-1", "pod-2"]
    )
    for pod in range(3):
        assert f"uploaded train-0000{pod}" in finished.steps[f"pod-{pod}.prepare-parts"].log.read_text("utf-8")
    manifest = json.loads(finished.artifact("prepare-data", "dataset").read_text("utf-8"))
    assert manifest["digest"] == whole.manifest["digest"]
    key = store.key_of(manifest["uri"])
    stored = {item.key.rpartition("/")[2]: store.head(item.key) for item in store.list(f"{key}/")}
    assert {name: found.sha256 for name, found in stored.items() if found and name != "dataset.json"} == contents(whole)
    assert not list(store.list(f"datasets/{manifest['name']}/parts/"))
    log = finished.steps["prepare-data"].log.read_text("utf-8")
    assert "4 of 4 parts are prepared already" in log


def test_killed__goes_on_after_the_last_whole_part_and_uploads_nothing_twice(
    root: Path, store: S3Store, tmp_path: Path, stack_environment: dict[str, str]
) -> None:
    config = configured(root, store, tmp_path / "cache")
    whole = alone(config, tmp_path / "whole", workers=2)
    settings = [f"data.root={root}", "data.name=image-folder", "data.part_images=1000", "data.shard_mb=1"]
    settings += [f"data.cache_dir={tmp_path}/cache", f"storage.uri={store.uri()}", "export.formats=[]"]
    settings += [f"checkpoint.checkpoint_dir={tmp_path}/checkpoints", f"logging.log_dir={tmp_path}/logs"]
    settings += ["training.device=cpu"]
    command = [sys.executable, "-m", "hjepa.cli", "prepare-data", "--run", "killed", "--home", str(tmp_path / "home")]
    command += [part for text in settings for part in ("--set", text)]
    first = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 240
    base = f"datasets/{root.name}/parts/"
    while not any(item.key.endswith(".json") for item in store.list(base)):
        assert first.poll() is None, first.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    done = {item.key for item in store.list(base) if item.key.endswith(".json")}
    second = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert second.returncode == 0, second.stdout + second.stderr
    assert f"{len(done)} of 4 parts are prepared already" in second.stdout
    for key in done:
        part = key.rpartition("/")[2].removesuffix(".json")
        assert f"uploaded {part}" not in second.stdout
    assert whole.manifest["digest"][:16] in second.stdout
