"""Image folders, tables and tar shards in S3, against the real embedded server."""

from __future__ import annotations

import csv
import io
import json
import tarfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hjepa.adapters.datasets import TarIndexes
from hjepa.adapters.s3 import ObjectInfo, ObjectNotFoundError, S3Store
from hjepa.cli import main
from hjepa.config import DataConfig, StorageConfig
from hjepa.data.datasets import check_source, open_source
from hjepa.data.prepare import QuarantineError, prepare, prepared_key
from hjepa.data.sources import Source
from hjepa.errors import HjepaError, UserError

Json = dict[str, Any]


def jpeg(seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def tar(content: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in content.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def table(names: list[str]) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerows([["path", "label"], *([name, name.split("/")[-2]] for name in names)])
    return text.getvalue().encode()


NAMES = [f"{kind}/{i}.jpg" for kind in ("cat", "dog") for i in range(20)]
PICTURES = {name: jpeg(i) for i, name in enumerate(NAMES)}


def folder_objects() -> tuple[str, dict[str, bytes]]:
    return "", dict(PICTURES)


def table_objects() -> tuple[str, dict[str, bytes]]:
    return "t.csv", {**PICTURES, "t.csv": table(NAMES)}


def tar_objects() -> tuple[str, dict[str, bytes]]:
    shards = {}
    for k in range(3):
        members: dict[str, bytes] = {}
        for i in range(k, len(NAMES), 3):
            members |= {f"{i:03d}.jpg": PICTURES[NAMES[i]], f"{i:03d}.cls": NAMES[i][:3].encode()}
        shards[f"part-{k}.tar"] = tar(members)
    return "", shards


KINDS: dict[str, Callable[[], tuple[str, dict[str, bytes]]]] = {
    "image-folder": folder_objects,
    "table": table_objects,
    "tar-shards": tar_objects,
}
kinds = pytest.mark.parametrize("kind", KINDS)


class Counting:
    """A store that says what it was asked; the requests themselves go to the real server."""

    def __init__(self, store: S3Store):
        self.store = store
        self.reads: list[tuple[str, int | None, int | None]] = []

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        return self.store.list(prefix)

    def get_bytes(self, key: str, *, start: int | None = None, length: int | None = None) -> bytes:
        self.reads.append((key, start, length))
        return self.store.get_bytes(key, start=start, length=length)


def put(store: S3Store, objects: dict[str, bytes]) -> None:
    for key, content in objects.items():
        store.put_bytes(key, content)


def there(store: S3Store, name: str = "") -> str:
    return f"{store.uri()}/{name}".rstrip("/")


def config(store: S3Store, kind: str, name: str = "", **settings: Any) -> DataConfig:
    return DataConfig(name=kind, root=there(store, name), **settings)


def here(folder: Path, kind: str, name: str, objects: dict[str, bytes]) -> DataConfig:
    for key, content in objects.items():
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        (folder / key).write_bytes(content)
    return DataConfig(name=kind, root=str(folder / name))


OPEN = partial(S3Store.from_config, StorageConfig())


def names(source: Source) -> dict[str, list[str]]:
    return {title: [split.name(i) for i in range(len(split))] for title, split in source.splits.items()}


# -- the same as on a disk ---------------------------------------------------------------------------------------------


@kinds
def test_s3__gives_what_the_same_files_give_on_a_disk(store: S3Store, tmp_path: Path, kind: str) -> None:
    name, objects = KINDS[kind]()
    put(store, objects)
    remote = config(store, kind, name)
    assert "36 train, 4 test, 2 classes" in check_source(remote, OPEN)[0]
    local = here(tmp_path / "local", kind, name, objects)
    sources = open_source(remote, OPEN), open_source(local)
    assert names(sources[0]) == names(sources[1])
    assert sources[0].classes == sources[1].classes == ("cat", "dog")
    manifests = [
        prepare(source, data, tmp_path / where, workers=2).manifest
        for source, data, where in zip(sources, (remote, local), ("a", "b"), strict=True)
    ]
    assert manifests[0]["digest"] == manifests[1]["digest"]
    assert manifests[0]["quarantine"]["total"] == 0


@kinds
def test_s3__fingerprint_reads_no_image_and_follows_every_change(store: S3Store, kind: str) -> None:
    name, objects = KINDS[kind]()
    put(store, objects)
    opened: list[Counting] = []

    def open_store(uri: str) -> Counting:
        opened.append(Counting(S3Store(uri)))
        return opened[-1]

    data = config(store, kind, name)
    key = prepared_key(open_source(data, open_store), data)
    assert prepared_key(open_source(data, open_store), data) == key
    read = {key for counting in opened for key, *_ in counting.reads}
    assert not [key for key in read if key.endswith(".jpg")]
    victim = next(key for key in objects if not key.endswith(".csv"))
    changed = bytearray(objects[victim])
    changed[600 if kind == "tar-shards" else 100] ^= 1  # of the same size
    store.put_bytes(victim, bytes(changed))
    other = prepared_key(open_source(data, OPEN), data)
    assert other != key
    store.delete(victim)
    assert prepared_key(open_source(data, OPEN), data) not in (key, other)


def test_s3__objects_beside_those_of_a_table_do_not_change_its_fingerprint(store: S3Store) -> None:
    put(store, table_objects()[1])
    data = config(store, "table", "t.csv")
    before = open_source(data, OPEN).fingerprint()
    put(store, {"other/x.jpg": b"x", "cat/100.jpg": b"y", "zzz": b"z"})
    assert open_source(data, OPEN).fingerprint() == before


def test_s3__tar_members_are_read_by_range_and_headers_in_large_pieces(store: S3Store) -> None:
    put(store, tar_objects()[1])
    counting = Counting(store)
    source = open_source(config(store, "tar-shards"), lambda _: counting)
    assert len([key for key, *_ in counting.reads if key.endswith(".tar")]) == 3
    counting.reads.clear()
    payload, label = source.splits["train"].read(0)
    ((key, start, length),) = counting.reads
    assert isinstance(payload, bytes)
    assert length == len(payload)
    number = int(source.splits["train"].name(0).rpartition(":")[2])
    assert (payload, label) == (PICTURES[NAMES[number]], number // 20)
    assert start is not None
    assert key.startswith("part-")


def tars_read(counting: Counting) -> list[str]:
    found = [key for key, *_ in counting.reads if key.endswith(".tar")]
    counting.reads.clear()
    return sorted(found)


def test_s3__what_lies_where_in_tar_files_is_found_once(store: S3Store) -> None:
    put(store, tar_objects()[1])
    shards = ["part-0.tar", "part-1.tar", "part-2.tar"]
    indexes, counting, data = TarIndexes(S3Store(f"{store.uri()}-runs")), Counting(store), config(store, "tar-shards")

    def open_again(**settings: Any) -> Source:
        return open_source(data.model_copy(update=settings), lambda _: counting, indexes)

    first = open_again()
    assert tars_read(counting) == shards
    again = open_again()
    assert tars_read(counting) == []
    assert names(again) == names(first) == names(open_source(data, OPEN))
    assert (again.fingerprint(), again.classes, again.notes) == (first.fingerprint(), first.classes, first.notes)
    # Other labels, other content, and damage are found out anew.
    with pytest.raises(UserError, match="caption"):
        open_again(label_column="caption")
    assert tars_read(counting) == shards
    store.put_bytes("part-1.tar", store.get_bytes("part-0.tar"))
    open_again()
    assert tars_read(counting) == ["part-1.tar"]
    for number, item in enumerate(list(indexes.store.list())):
        content = indexes.store.get_bytes(item.key)
        indexes.store.put_bytes(item.key, (content[:-3], b"", zlib.compress(b"[]"))[number % 3])
    open_again()
    assert tars_read(counting) == shards


def test_s3__pods_that_open_tar_files_together_share_the_reading(store: S3Store) -> None:
    tar = tar_objects()[1]["part-0.tar"]
    put(store, {f"{number:02d}.tar": tar for number in range(60)})
    indexes, data = TarIndexes(S3Store(f"{store.uri()}-runs")), config(store, "tar-shards")
    counting = Counting(store)
    with ThreadPoolExecutor(2) as pods:
        sources = list(pods.map(lambda _: open_source(data, lambda _: counting, indexes), range(2)))
    assert len(tars_read(counting)) < 1.5 * 60
    assert sources[0].fingerprint() == sources[1].fingerprint()


def test_s3__patterns_and_single_tars(store: S3Store) -> None:
    put(store, tar_objects()[1])
    for name, count in (("part-{0..1}.tar", 27), ("part-2.tar", 13), ("part-{0,2}.tar", 27)):
        source = open_source(config(store, "tar-shards", name), OPEN)
        assert sum(len(split) for split in source.splits.values()) == count
        assert len(source.fingerprint()) == 64
    with pytest.raises(UserError, match=r"there is no part-3\.tar and 1 more in s3://"):
        open_source(config(store, "tar-shards", "part-{2..4}.tar"), OPEN)


def test_s3__a_local_table_of_images_in_s3(store: S3Store, tmp_path: Path) -> None:
    put(store, PICTURES)
    rows = [*NAMES[:20], *(f"{there(store)}/{name}" for name in NAMES[20:]), "s3://elsewhere/dog/x.jpg"]
    (tmp_path / "t.csv").write_bytes(table(rows))
    data = DataConfig(name="table", root=str(tmp_path / "t.csv"), image_root=there(store))
    prepared = prepare(open_source(data, OPEN), data, tmp_path / "out", workers=2)
    assert prepared.manifest["quarantine"]["by_reason"] == {"outside": 1}
    assert sum(split["samples"] for split in prepared.manifest["splits"].values()) == 40


def test_s3__own_shards_where_the_store_keeps_them_give_the_same_digest(store: S3Store, tmp_path: Path) -> None:
    local = here(tmp_path / "in", "image-folder", "", PICTURES)
    first = prepare(open_source(local), local, tmp_path / "first")
    for file in first.files:
        store.put_file(f"set/{file.key}", file.path, sha256=file.sha256)
    store.put_json("set/dataset.json", {**first.manifest, "uri": there(store, "set")})
    again = config(store, "tar-shards", "set")
    assert prepare(open_source(again, OPEN), again, tmp_path / "again").manifest["digest"] == first.manifest["digest"]


def test_s3__names_of_every_kind_and_hidden_ones(store: S3Store) -> None:
    odd = ["new\nline.jpg", "Käse/日本.jpg", "a&b <c>.jpg", "plus+%25 blank.jpg", "a//b.jpg", "q?x=1#y.jpg"]
    hidden = [".hidden.jpg", "a/.hidden/b.jpg"]
    put(store, {name: jpeg() for name in [*odd, *hidden]} | {"mark/": b"", "note.txt": b"x"})
    for i in range(12):
        store.put_bytes(f"many/{i}.jpg", jpeg(i))
    source = open_source(config(store, "image-folder"), OPEN)
    found = {name for part in names(source).values() for name in part}
    assert {name.rpartition("/")[2] for name in found} >= {f"{i}.jpg" for i in range(12)}
    read = {}
    for split in source.splits.values():
        for i in range(len(split)):
            read[split.name(i)] = split.read(i)[0]
    assert not [name for name in read if ".hidden" in name]
    flat = open_source(config(store, "image-folder", "many"), OPEN)
    assert sum(len(split) for split in flat.splits.values()) == 12
    assert all(read[name] == jpeg() for name in odd if name in read)


def test_s3__bad_and_vanished_objects_are_quarantined_and_above_the_limit_exit_with_2(
    store: S3Store, tmp_path: Path
) -> None:
    put(store, {**PICTURES, "cat/text.jpg": b"no picture", "cat/zero.jpg": b"", "dog/gone.jpg": jpeg()})
    data = config(store, "image-folder", quarantine_limit=0.1)
    source = open_source(data, OPEN)
    store.delete("dog/gone.jpg")
    prepared = prepare(source, data, tmp_path / "out", workers=2)
    assert prepared.manifest["quarantine"]["by_reason"] == {"empty": 1, "not-an-image": 1, "unreadable": 1}
    strict = data.model_copy(update={"quarantine_limit": 0.05})
    with pytest.raises(QuarantineError) as caught:
        prepare(source, strict, tmp_path / "strict")
    assert caught.value.exit_code == 2
    report = {line["name"]: line for line in map(json.loads, caught.value.report.read_text().splitlines())}
    assert set(report) == {"cat/text.jpg", "cat/zero.jpg", "dog/gone.jpg"}
    assert "there is no object" in report["dog/gone.jpg"]["detail"]


# -- what goes wrong ---------------------------------------------------------------------------------------------------


@kinds
def test_errors__no_bucket_no_prefix_no_credentials_and_no_server(
    store: S3Store, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = {"table": "t.csv"}.get(kind, "prefix")
    with pytest.raises(UserError, match=r"no bucket 'nobodys'; create it, or correct s3://nobodys"):
        check_source(DataConfig(name=kind, root=f"s3://nobodys/{name}"), OPEN)
    empty = {
        "table": "there is no such file",
        "tar-shards": r"no \.tar file",
        "image-folder": "no image in this folder",
    }
    with pytest.raises(UserError, match=empty[kind]):
        check_source(config(store, kind, name), OPEN)
    closed = StorageConfig(endpoint_url="http://127.0.0.1:9")
    monkeypatch.setattr(S3Store.__init__, "__kwdefaults__", {**S3Store.__init__.__kwdefaults__, "attempts": 1})
    with pytest.raises(HjepaError, match="does not answer"):
        check_source(config(store, kind, name), partial(S3Store.from_config, closed))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(UserError, match="refuses the credentials"):
        check_source(config(store, kind, name), OPEN)


@pytest.mark.parametrize("root", ["s3://", "s3://name.tar", "s3://table.csv"])
def test_errors__a_uri_without_a_bucket(stack_environment: dict[str, str], root: str) -> None:
    kind = "table" if root.endswith("csv") else "tar-shards"
    with pytest.raises(UserError, match=r"expected s3://bucket|expected a file named"):
        check_source(DataConfig(name=kind, root=root), OPEN)


@pytest.mark.parametrize("name", ["fashion-mnist", "CIFAR10"])
def test_errors__sets_that_are_not_read_from_s3(name: str) -> None:
    with pytest.raises(UserError, match=r"is read from a local folder\. In S3 may be: image-folder, table, tar-shards"):
        check_source(DataConfig(name=name, root="s3://bucket/x"), OPEN)


@kinds
def test_errors__without_a_way_to_s3_says_who_has_one(kind: str) -> None:
    with pytest.raises(UserError, match=r"are read by the step prepare_data of a pipeline"):
        check_source(DataConfig(name=kind, root="s3://bucket/x/t.csv"))


def test_errors__a_server_that_goes_away_is_no_fault_of_the_images(store: S3Store, tmp_path: Path) -> None:
    put(store, PICTURES)
    data = config(store, "image-folder", quarantine_limit=1.0)
    closed = S3Store(data.root or "", endpoint_url="http://127.0.0.1:9", attempts=1)
    source = open_source(data, OPEN)
    for split in source.splits.values():
        split.files.store = closed  # type: ignore[attr-defined]
    with pytest.raises(HjepaError, match="does not answer") as caught:
        prepare(source, data, tmp_path / "out", workers=2)
    assert not isinstance(caught.value, UserError)


def test_not_found__is_also_what_a_missing_file_is() -> None:
    assert issubclass(ObjectNotFoundError, FileNotFoundError)
    assert str(ObjectNotFoundError("there is no object k")) == "there is no object k"


# -- the step ----------------------------------------------------------------------------------------------------------

SETTINGS = """
data: {{name: {kind}, root: {root}, image_size: 16, num_workers: 0, cache_dir: {cache}, quarantine_limit: {limit}}}
model: {{patch_size: 4, num_levels: 1}}
training: {{epochs: 1, warmup_epochs: 0, batch_size: 8, device: cpu}}
storage: {{uri: {storage}}}
logging: {{log_dir: {cache}/logs}}
"""


def test_step__prepares_from_s3_and_recognises_the_same_objects(
    store: S3Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(store, {f"in/{name}": content for name, content in tar_objects()[1].items()})
    text = SETTINGS.format(
        kind="tar-shards", root=there(store, "in"), cache=tmp_path / "cache", limit=0.05, storage=there(store, "out")
    )
    (tmp_path / "c.yaml").write_text(text)
    common = ["--config", str(tmp_path / "c.yaml"), "--run", "s3-input"]
    assert main(["resolve-config", *common]) == main(["prepare-data", *common]) == 0
    assert "36 train, 4 test images, 0 quarantined" in capsys.readouterr().out
    (info,) = [item for item in store.list("out/datasets/") if item.key.endswith("dataset.json")]
    assert store.get_json(info.key)["classes"] == ["cat", "dog"]
    assert main(["prepare-data", *common]) == 0
    assert "already done for these images" in capsys.readouterr().out


def test_step__too_many_bad_objects_exit_with_2_and_the_report_is_kept(
    store: S3Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(store, {f"in/{name}": content for name, content in PICTURES.items()})
    put(store, {f"in/cat/bad{i}.jpg": b"no picture" for i in range(10)})
    text = SETTINGS.format(
        kind="image-folder", root=there(store, "in"), cache=tmp_path / "cache", limit=0.1, storage=there(store, "out")
    )
    (tmp_path / "c.yaml").write_text(text)
    common = ["--config", str(tmp_path / "c.yaml"), "--run", "bad"]
    assert main(["resolve-config", *common]) == 0
    assert main(["prepare-data", *common]) == 2
    assert "10 of 50 files (20.0%) cannot be used: 10 not-an-image" in capsys.readouterr().err
    assert len(store.get_bytes("out/runs/bad/quarantine.jsonl").splitlines()) == 10
