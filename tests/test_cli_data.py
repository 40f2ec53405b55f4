"""``hjepa data``: list, show and verify prepared data sets in a real S3 server."""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hjepa import cli_data
from hjepa.adapters.datasets import DamagedManifestError, StoredDataset, find, put_manifest, stored, verify
from hjepa.adapters.s3 import S3Store
from hjepa.config import DataConfig
from hjepa.data import prepare
from hjepa.data.shards import encode_index, parse_index
from hjepa.data.sources import ArraySplit, Source
from hjepa.errors import HjepaError, UserError


def upload(store: S3Store, folder: Path, name: str, seed: int = 0) -> StoredDataset:
    """60 training and 20 test images of two classes, prepared and stored as the pipeline does."""
    rng = np.random.default_rng(seed)

    def split(count: int) -> ArraySplit:
        return ArraySplit(rng.integers(0, 256, (count, 12, 10, 3), dtype=np.uint8), np.arange(count) % 2)

    source = Source(name, "made up", {"train": split(60), "test": split(20)}, ("cat", "dog"), ("a note",))
    made = prepare.prepare(source, DataConfig(), folder / name / str(seed), workers=1)
    key = f"datasets/{name}/{made.manifest['digest'][:16]}"
    for file in made.files:
        store.put_file(f"{key}/{file.key}", file.path, sha256=file.sha256)
    put_manifest(store, key, {**made.manifest, "uri": store.uri(key)})
    store.put_json(f"datasets/{name}/recipes/0123456789abcdef.json", {"dataset": f"{key}/dataset.json"})
    return StoredDataset(key, made.manifest)


@pytest.fixture
def dataset(store: S3Store, tmp_path: Path) -> StoredDataset:
    return upload(store, tmp_path, "pets")


def data(store: S3Store, *arguments: str) -> None:
    parser = argparse.ArgumentParser(prog="hjepa")
    cli_data.add_parser(parser.add_subparsers(required=True), lambda command: None, lambda options: store)
    options = parser.parse_args(["data", *arguments])
    options.command(options)


def test_ls__names_digests_and_counts(
    store: S3Store, dataset: StoredDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = upload(store, tmp_path, "birds")
    store.put_bytes("datasets/half/0123/train-000000.tar", b"still being uploaded")
    data(store, "ls")
    lines = [line for line in capsys.readouterr().out.splitlines() if "s3://" in line]
    assert [re.findall(r"[^\s│┃|]+", line)[:6] for line in lines] == [
        ["birds", other.digest[:12], "60", "train,", "20", "test"],
        ["pets", dataset.digest[:12], "60", "train,", "20", "test"],
    ]


def test_ls__of_an_empty_store(store: S3Store, capsys: pytest.CaptureFixture[str]) -> None:
    data(store, "ls")
    assert "nothing is prepared" in capsys.readouterr().out


def test_show__says_all_of_it(store: S3Store, dataset: StoredDataset, capsys: pytest.CaptureFixture[str]) -> None:
    data(store, "show", "pets")
    said = capsys.readouterr().out
    for pattern in (dataset.digest, "a note", r"60 images, all 10x12", r"'cat' 30, 'dog' 30", r"0 files \(0.00%\)"):
        assert re.search(pattern, said), pattern


def test_find__by_name_digest_and_uri(store: S3Store, dataset: StoredDataset, tmp_path: Path) -> None:
    for wanted in ("pets", dataset.digest[:6], dataset.digest, store.uri(dataset.key), store.uri(dataset.key) + "/"):
        assert find(store, wanted).key == dataset.key
    with pytest.raises(UserError, match=r"no data set 'cats'.*pets"):
        find(store, "cats")
    for nothing in ("datasets/pets/nowhere", "datasets/pets/0123456789abcdef"):
        with pytest.raises(UserError, match=r"hjepa data ls"):
            find(store, store.uri(nothing))
    upload(store, tmp_path, "pets", seed=1)
    with pytest.raises(UserError, match=f"2 data sets called pets: name one of .*pets/{dataset.digest[:12]}"):
        find(store, "pets")
    assert find(store, f"pets/{dataset.digest[:12]}").key == dataset.key
    with pytest.raises(UserError, match="no data set 'birds/"):
        find(store, f"birds/{dataset.digest[:12]}")


def test_verify__whole_data_set(store: S3Store, dataset: StoredDataset, capsys: pytest.CaptureFixture[str]) -> None:
    steps: list[tuple[int, int]] = []
    assert verify(store, dataset, lambda done, total: steps.append((done, total))) == []
    assert steps[-1] == (dataset.bytes, dataset.bytes)
    data(store, "verify", "pets")
    assert "as it was prepared" in capsys.readouterr().out


def test_verify__finds_a_flipped_bit_a_missing_and_a_short_file(store: S3Store, dataset: StoredDataset) -> None:
    shard = bytearray(store.get_bytes(f"{dataset.key}/train-000000.tar"))
    shard[1000] ^= 1
    store.put_bytes(f"{dataset.key}/train-000000.tar", bytes(shard))
    store.delete(f"{dataset.key}/quarantine.jsonl")
    store.put_bytes(f"{dataset.key}/test-000000.tar", b"short")
    problems = verify(store, dataset, lambda done, total: None)
    assert [problem.partition(":")[0] for problem in problems] == [
        "train-000000.tar",
        "test-000000.tar",
        "quarantine.jsonl",
    ]
    assert "sha256" in problems[0]
    assert "5 bytes, expected" in problems[1]
    assert "missing" in problems[2]
    with pytest.raises(HjepaError, match="is damaged in 3 places"):
        data(store, "verify", "pets")


@pytest.mark.parametrize(("field", "value"), [("offset", 1 << 40), ("shard", 7), ("length", 1 << 30)])
def test_verify__finds_an_index_of_other_shards(store: S3Store, dataset: StoredDataset, field: str, value: int) -> None:
    """Its checksum fits, as after a manifest that was mended by hand."""
    index = dataset.manifest["splits"]["train"]["index"]
    records = parse_index(store.get_bytes(f"{dataset.key}/{index['key']}"), "index").copy()
    records[field][3] = value
    content = encode_index(records)
    store.put_bytes(f"{dataset.key}/{index['key']}", content)
    index["sha256"] = hashlib.sha256(content).hexdigest()
    assert verify(store, dataset, lambda done, total: None) == ["train.index: it points outside the shards"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{}", "it lacks channels"),
        (b"[]", "it is no JSON object"),
        (b"{", "it is not valid JSON"),
        (None, "another checksum than it says"),
    ],
)
def test_manifest__damaged_one_hides_no_other_and_can_be_removed(
    store: S3Store,
    dataset: StoredDataset,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: bytes | None,
    words: str,
) -> None:
    other = upload(store, tmp_path, "birds")
    key = f"{dataset.key}/dataset.json"
    store.put_bytes(key, content or store.get_bytes(key).replace(b'"samples": 60', b'"samples": 61'))
    found, (damaged,) = stored(store)
    assert [item.key for item in found] == [other.key]
    assert words in str(damaged)
    data(store, "ls")
    said = capsys.readouterr()
    assert "birds" in said.out
    assert words in said.out + said.err
    assert find(store, "birds").key == other.key
    with pytest.raises(UserError, match=words):
        find(store, "pets")
    with pytest.raises(DamagedManifestError, match="hjepa data rm"):
        data(store, "verify", store.uri(dataset.key))
    data(store, "rm", store.uri(dataset.key), "--yes")
    assert list(store.list("datasets/pets/")) == []
    assert stored(store)[1] == []


def test_rm__says_what_it_would_do_and_then_leaves_nothing(store: S3Store, dataset: StoredDataset) -> None:
    before = len(list(store.list("datasets/pets/")))
    with pytest.raises(UserError, match=r"this would delete .*Add --yes"):
        data(store, "rm", "pets")
    assert len(list(store.list("datasets/pets/"))) == before
    data(store, "rm", "pets", "--yes")
    assert list(store.list("datasets/pets/")) == []
    with pytest.raises(UserError, match="no data set"):
        data(store, "rm", "pets", "--yes")
    with pytest.raises(UserError, match="nothing is there"):
        data(store, "rm", store.uri(dataset.key), "--yes")


@pytest.mark.parametrize("place", ["datasets/", "datasets/pets", "runs/demo/0123456789abcdef"])
def test_rm__of_what_is_no_data_set_is_refused(store: S3Store, dataset: StoredDataset, place: str) -> None:
    with pytest.raises(UserError, match="expected s3://"):
        data(store, "rm", store.uri(place), "--yes")
    assert stored(store)[0]


def test_show__contact_sheet_that_is_gone(store: S3Store, dataset: StoredDataset, tmp_path: Path) -> None:
    store.delete(f"{dataset.key}/{dataset.manifest['contact_sheet']['key']}")
    with pytest.raises(HjepaError, match=r"is missing from S3; `hjepa data verify"):
        data(store, "show", "pets", "--contact-sheet", str(tmp_path / "sheet.png"))


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output__that_nobody_reads_ends_without_a_word(unbuffered: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "hjepa", "config"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
    ) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        said = process.stderr.read()
    assert (process.returncode, said) == (141, "")
