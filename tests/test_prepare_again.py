"""What a second preparation finds: the same images from other files, files that are gone, another one's work."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hjepa import steps
from hjepa.adapters.s3 import S3Store
from hjepa.cli import main

Json = dict[str, Any]
Prepare = Callable[..., int]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """40 JPEGs in two classes, and two files that are none: 4.8 %."""
    root = tmp_path / "pets"
    rng = np.random.default_rng(0)
    for i in range(40):
        folder = root / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i:03d}.jpg")
    for i in range(2):
        (root / "a" / f"bad-{i}.jpg").write_text("no image")
    return root


@pytest.fixture
def prepare(root: Path, store: S3Store, tmp_path: Path) -> Prepare:
    """``hjepa prepare-data`` of the images, as a run of the given name; gives the exit code."""

    def prepared(name: str, *settings: str) -> int:
        given = [f"data.root={root}", "data.name=image-folder", f"data.cache_dir={tmp_path}/cache"]
        given += [f"storage.uri={store.uri()}", "export.formats=[]", "training.device=cpu", *settings]
        given += [f"checkpoint.checkpoint_dir={tmp_path}/checkpoints", f"logging.log_dir={tmp_path}/logs"]
        options = [part for text in given for part in ("--set", text)]
        return main(["prepare-data", "--run", name, "--home", str(tmp_path / "home"), *options])

    return prepared


def manifest_of(tmp_path: Path, name: str) -> Json:
    content: Json = json.loads((tmp_path / "home" / "runs" / name / "dataset.json").read_text("utf-8"))
    return content


def everything(store: S3Store) -> dict[str, bytes]:
    return {item.key: store.get_bytes(item.key) for item in store.list("datasets/")}


def comment(path: Path) -> None:
    """Other bytes of the same pixels."""
    data = path.read_bytes()
    path.write_bytes(data[:2] + b"\xff\xfe\x00\x07hello" + data[2:])


def test_again__the_same_images_in_other_files_leave_the_stored_set_as_it_is(
    prepare: Prepare, root: Path, store: S3Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare("first") == 0
    before = everything(store)
    comment(root / "a" / "000.jpg")
    (root / "a" / "bad-0.jpg").unlink()
    assert prepare("second") == 0
    assert "these images and labels are in" in capsys.readouterr().out
    assert prepare("third") == 0
    after = everything(store)
    assert {key: after[key] for key in before} == before
    assert {key.split("/")[2] for key in set(after) - set(before)} == {"recipes"}
    first, second, third = (manifest_of(tmp_path, name) for name in ("first", "second", "third"))
    assert first["digest"] == second["digest"]
    # What is said of the files is said of each source's own.
    assert [m["quarantine"]["total"] for m in (first, second, third)] == [2, 1, 1]
    report = store.get_bytes(store.key_of(third["quarantine"]["report"]))
    assert [json.loads(line)["name"] for line in report.splitlines()] == ["a/bad-1.jpg"]
    assert main(["data", "verify", "pets", "--set", f"storage.uri={store.uri()}"]) == 0


def test_again__a_lower_limit_holds_for_what_is_prepared_already(
    prepare: Prepare, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare("loose") == 0
    assert prepare("strict", "data.quarantine_limit=0.01") == 2
    said = capsys.readouterr().err
    assert "2 of 42 files (4.8%) cannot be used" in said
    assert "quarantine.jsonl" in said


@pytest.mark.parametrize("missing", ["train-000000.tar", "train.index", "contact-sheet.png"])
def test_again__files_that_are_gone_are_made_anew(
    prepare: Prepare, store: S3Store, tmp_path: Path, capsys: pytest.CaptureFixture[str], missing: str
) -> None:
    assert prepare("first") == 0
    key = store.key_of(manifest_of(tmp_path, "first")["uri"])
    before = everything(store)
    store.delete(f"{key}/{missing}")
    assert prepare("second") == 0
    assert f"{store.uri(key)}: 1 file no longer whole, such as {missing}" in capsys.readouterr().err
    assert everything(store) == before


@pytest.mark.parametrize("recipe", [b"{}", b"[]", b"null", b'{"dataset": 5}', b"no JSON"])
def test_again__a_damaged_recipe_leads_nowhere(prepare: Prepare, store: S3Store, recipe: bytes) -> None:
    assert prepare("first") == 0
    before = everything(store)
    (key,) = (key for key in before if "/recipes/" in key)
    store.put_bytes(key, recipe)
    assert prepare("second") == 0
    assert everything(store) == before
    store.put_bytes(key, recipe)
    assert main(["data", "rm", "pets", "--yes", "--set", f"storage.uri={store.uri()}"]) == 0


def test_together__whoever_is_second_uses_what_the_first_has_made(
    prepare: Prepare, store: S3Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make, other = steps._make_parts, threading.Event()

    def slow(*args: Any) -> str:
        """The parts are there; before they are put together, another process does so and tidies them up."""
        base = make(*args)
        if not other.is_set():
            other.set()
            assert prepare("faster") == 0
        return base

    monkeypatch.setattr(steps, "_make_parts", slow)
    assert prepare("slower") == 0
    assert manifest_of(tmp_path, "slower")["digest"] == manifest_of(tmp_path, "faster")["digest"]
    assert not list(store.list("datasets/pets/parts/"))


def test_unfinished__parts_are_listed_and_removed(
    prepare: Prepare, root: Path, store: S3Store, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare("over", "data.quarantine_limit=0.01") == 2
    (folder,) = {key.rpartition("/")[0] for key in everything(store)}
    where = f"storage.uri={store.uri()}"
    capsys.readouterr()
    assert main(["data", "ls", "--set", where]) == 0
    assert f"left unfinished: {store.uri(folder)}" in capsys.readouterr().out
    assert main(["data", "rm", store.uri(folder), "--yes", "--set", where]) == 0
    assert everything(store) == {}


def test_leaks__that_are_taken_out_are_in_no_shard(
    prepare: Prepare, root: Path, store: S3Store, tmp_path: Path
) -> None:
    for i in range(40):
        title, name = ("train", f"{i:03d}.jpg") if i < 30 else ("test", f"{i - 30:03d}.jpg")
        (root / title / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        (root / "ab"[i % 2] / f"{i:03d}.jpg").rename(root / title / "ab"[i % 2] / name)
    for folder in ("a", "b"):
        shutil.rmtree(root / folder)
    for i in (0, 2, 4):
        (root / "train" / "a" / f"leak-{i}.jpg").write_bytes((root / "test" / "a" / f"{i:03d}.jpg").read_bytes())
    assert prepare("taken", "data.remove_leaks=true") == 0
    manifest = manifest_of(tmp_path, "taken")
    key = store.key_of(manifest["uri"])
    names = []
    for shard in manifest["splits"]["train"]["shards"]:
        with tarfile.open(fileobj=io.BytesIO(store.get_bytes(f"{key}/{shard['key']}"))) as tar:
            names += [name for name in tar.getnames() if name.endswith(".jpg")]
        assert shard["samples"] == len(names)
    assert len(names) == manifest["splits"]["train"]["samples"] == 30
    twins = [json.loads(line) for line in store.get_bytes(f"{key}/duplicates.jsonl").splitlines()]
    assert {(twin["name"], twin["other_name"]) for twin in twins} == {
        (f"a/{i:03d}.jpg", f"a/leak-{i}.jpg") for i in (0, 2, 4)
    }
    assert not {f"{twin['other_number']:09d}.jpg" for twin in twins} & set(names)
    assert main(["data", "verify", manifest["digest"][:12], "--set", f"storage.uri={store.uri()}"]) == 0
