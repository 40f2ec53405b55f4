"""Tar shards as input: what other writers make, what damage does, and what hjepa wrote itself."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hjepa.config import DataConfig
from hjepa.data.datasets import check_source, open_source
from hjepa.data.prepare import QuarantineError, prepare, prepared_key
from hjepa.data.sources import Source
from hjepa.data.tar_index import CompressedTarError, Member, TarDamagedError, Window, members
from hjepa.errors import UserError

Content = tuple[str, bytes]


def jpeg(seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def write_tar(path: Path, content: list[Content], format: int = tarfile.GNU_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in content:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def samples(count: int, *, start: int = 0, labels: str | None = "cls") -> list[Content]:
    """Images 000000.jpg and so on, in two classes."""
    content: list[Content] = []
    for i in range(start, start + count):
        content.append((f"{i:06d}.jpg", jpeg(i)))
        if labels == "cls":
            content.append((f"{i:06d}.cls", str(i % 2).encode()))
        elif labels == "json":
            content.append((f"{i:06d}.json", json.dumps({"label": ["cat", "dog"][i % 2], "kind": i % 3}).encode()))
    return content


def config(root: Path | str, **settings: Any) -> DataConfig:
    return DataConfig(name="tar-shards", root=str(root), **settings)


def contents(source: Source) -> dict[str, list[tuple[str, int | None]]]:
    return {
        name: sorted((split.name(i), split.read(i)[1]) for i in range(len(split)))
        for name, split in source.splits.items()
    }


def everything(source: Source) -> list[tuple[str, int | None]]:
    return [pair for pairs in contents(source).values() for pair in pairs]


def images(source: Source) -> int:
    return sum(len(split) for split in source.splits.values())


def spoken(source: Source) -> str:
    return "\n".join(source.notes)


# -- the index ---------------------------------------------------------------------------------------------------------


def index(content: bytes, window: int = 4096) -> list[Member]:
    return list(members(Window(lambda start, length: content[start : start + length], window)))


ODD_NAMES = [
    "a.jpg",
    "deep/er/b.jpg",
    f"{'long/' * 18}c.jpg",
    f"{'x' * 90}/{'y' * 90}.jpg",
    f"{'very-long-' * 40}.jpg",
    "Käse/日本.jpg",
    "new\nline.jpg",
    "/absolute.jpg",
    "../../up.jpg",
]


@pytest.mark.parametrize("window", [512, 4096, 1 << 20])
@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_index__agrees_with_tarfile(tmp_path: Path, format: int, window: int) -> None:
    names = [name for name in ODD_NAMES if format != tarfile.USTAR_FORMAT or len(name) < 300]
    content = [(name, bytes([i]) * (700 * i)) for i, name in enumerate(names)]
    path = write_tar(tmp_path / "t.tar", content, format)
    with tarfile.open(path) as tar:
        expected = [Member(info.name, info.offset_data, info.size, info.isreg()) for info in tar]
    assert [name for name, *_ in expected] == [name.rstrip("/") for name in names]
    assert index(path.read_bytes(), window) == expected


def test_index__knows_folders_links_pipes_and_sparse_files(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for name, kind in (("d", tarfile.DIRTYPE), ("s.jpg", tarfile.SYMTYPE), ("l.jpg", tarfile.LNKTYPE),
                           ("p.jpg", tarfile.FIFOTYPE), ("c.jpg", tarfile.CHRTYPE)):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        info = tarfile.TarInfo("real.jpg")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    found = index((tmp_path / "t.tar").read_bytes())
    assert [member.name.rstrip("/") for member in found if not member.regular] == [
        "d", "s.jpg", "l.jpg", "p.jpg", "c.jpg",
    ]  # fmt: skip
    assert [member.name for member in found if member.regular] == ["real.jpg"]


def test_index__sizes_above_eight_gigabytes() -> None:
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        info = tarfile.TarInfo("huge.jpg")
        info.size = 9 << 30
        header = info.tobuf(format)

        def read(start: int, length: int, header: bytes = header) -> bytes:
            end = len(header) + (9 << 30) + 1024
            piece = header[start : start + length]
            return piece + bytes(max(0, min(length - len(piece), end - start - len(piece))))

        assert [(member.name, member.size) for member in members(read)] == [("huge.jpg", 9 << 30)]


def test_index__whatever_is_cut_off_or_changed_it_ends_and_members_lie_inside() -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in ODD_NAMES:
            info = tarfile.TarInfo(name)
            info.size = 800
            tar.addfile(info, io.BytesIO(bytes(800)))
    whole = buffer.getvalue()
    rng = np.random.default_rng(0)
    damaged = [whole[: int(cut)] for cut in rng.integers(0, len(whole), 200)]
    for _ in range(300):
        changed = bytearray(whole)
        position = int(rng.integers(len(whole) // 512)) * 512 + int(rng.integers(512))
        changed[position] = int(rng.integers(256))
        damaged.append(bytes(changed))
    for content in damaged:
        found: list[Member] = []
        with contextlib.suppress(TarDamagedError, CompressedTarError):
            found.extend(members(lambda start, length, content=content: content[start : start + length]))
        assert all(member.offset + member.size <= len(content) for member in found)


def with_checksum(header: bytes) -> bytes:
    blank = header[:148] + b"        " + header[156:]
    return header[:148] + b"%06o\0 " % sum(blank) + header[156:]


@pytest.mark.parametrize("size", [b"-0000001000\0", b"0_000001000\0", b"\xff" * 12, b"notanumber!\0"])
def test_index__a_size_that_is_none_is_damage_and_no_endless_loop(size: bytes) -> None:
    header = tarfile.TarInfo("a.jpg").tobuf(tarfile.USTAR_FORMAT)
    content = with_checksum(header[:124] + size + header[136:512]) + bytes(2048)
    with pytest.raises(TarDamagedError, match="no size"):
        index(content)


# -- samples, labels, splits -------------------------------------------------------------------------------------------


def test_tar__labels_from_cls_are_sorted_as_numbers(tmp_path: Path) -> None:
    content = [
        (f"{i}.{end}", data) for i in range(30) for end, data in (("png", jpeg(i)), ("cls", b"%d\n" % (8 + i % 3)))
    ]
    source = open_source(config(write_tar(tmp_path / "set.tar", content)))
    assert source.classes == ("8", "9", "10")
    assert images(source) == 30
    for name, label in everything(source):
        assert label == int(name.rpartition(":")[2]) % 3


def test_tar__labels_from_json_and_the_field_can_be_chosen(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "set.tar", samples(30, labels="json"))
    assert open_source(config(path)).classes == ("cat", "dog")
    assert open_source(config(path, label_column="kind")).classes == ("0", "1", "2")
    assert open_source(config(path, label_column="")).classes == ()
    with pytest.raises(UserError, match=r"no sample has a \.json with the field 'nothing'"):
        open_source(config(path, label_column="nothing"))


def test_tar__cls_outranks_json_wherever_it_stands(tmp_path: Path) -> None:
    content = [
        (f"{i}.{end}", data)
        for i in range(20)
        for end, data in (("json", b'{"label": "j"}'), ("jpg", jpeg(i)), ("cls", b"ab"[i % 2 : i % 2 + 1]))
    ]
    assert open_source(config(write_tar(tmp_path / "set.tar", content))).classes == ("a", "b")
    assert open_source(config(write_tar(tmp_path / "set.tar", content[::-1]))).classes == ("a", "b")


def test_tar__images_and_labels_may_be_apart(tmp_path: Path) -> None:
    content = sorted(samples(20), key=lambda item: item[0].rpartition(".")[2])
    source = open_source(config(write_tar(tmp_path / "set.tar", content)))
    assert [label for _, label in contents(source)["train"]].count(None) == 0
    assert images(source) == 20


@pytest.mark.parametrize(
    ("shards", "splits"),
    [
        (["train-0.tar", "train-1.tar", "test-0.tar"], {"train": 40, "test": 20}),
        (["train-0.tar", "val-0.tar", "test-0.tar"], {"train": 20, "test": 20}),
        (["imagenet-train-0.tar", "imagenet-validation-0.tar"], {"train": 20, "test": 20}),
        (["train/0.tar", "val/0.tar"], {"train": 20, "test": 20}),
        (["0.tar", "1.tar"], {"train": 36, "test": 4}),
        (["train-0.tar"], {"train": 18, "test": 2}),
        (["val-0.tar"], {"train": 18, "test": 2}),
        (["train-0.tar", "extra-0.tar", "test-0.tar"], {"train": 20, "test": 20}),
    ],
)
def test_tar__splits_follow_the_names_of_the_files(tmp_path: Path, shards: list[str], splits: dict[str, int]) -> None:
    for i, shard in enumerate(shards):
        write_tar(tmp_path / shard, samples(20, start=20 * i))
    source = open_source(config(tmp_path))
    assert {name: len(split) for name, split in source.splits.items()} == splits
    unused = 20 * len(shards) - sum(splits.values())
    assert ("not used: 20" in spoken(source) or "20 images belong to no split" in spoken(source)) == bool(unused)


def test_tar__unlabelled_test_gives_way_to_labelled_val(tmp_path: Path) -> None:
    for shard, labels in (("train", "cls"), ("val", "cls"), ("test", None)):
        write_tar(tmp_path / f"{shard}-0.tar", samples(20, labels=labels))
    source = open_source(config(tmp_path))
    assert {name.partition(":")[0] for name, _ in contents(source)["test"]} == {"val-0.tar"}


def test_tar__classes_that_train_lacks_are_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "train-0.tar", samples(20))
    write_tar(tmp_path / "test-0.tar", [("a.jpg", jpeg()), ("a.cls", b"7")])
    with pytest.raises(UserError, match=r"test images have classes that the training images lack: '7'"):
        check_source(config(tmp_path))


def test_tar__without_labels_says_so(tmp_path: Path) -> None:
    source = open_source(config(write_tar(tmp_path / "set.tar", samples(20, labels=None))))
    assert source.classes == ()
    assert "no labels" in spoken(source)
    assert {label for _, label in everything(source)} == {None}


def test_tar__order_and_hold_out_depend_on_names_alone(tmp_path: Path) -> None:
    content = samples(40)
    pairs = [content[i : i + 2] for i in range(0, 80, 2)]
    write_tar(tmp_path / "x" / "a.tar", content)
    write_tar(tmp_path / "y" / "a.tar", [item for pair in pairs[::-1] for item in pair])
    orders = [
        {name: [split.name(i) for i in range(len(split))] for name, split in open_source(config(folder)).splits.items()}
        for folder in (tmp_path / "x", tmp_path / "y")
    ]
    assert orders[0] == orders[1]
    assert orders[0]["train"] != sorted(orders[0]["train"])


def test_tar__as_the_webdataset_library_writes_it(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    with webdataset.ShardWriter(str(tmp_path / "train-%06d.tar"), maxcount=15, verbose=0) as sink:
        for i in range(40):
            sink.write({"__key__": f"sample{i:05d}", "jpg": jpeg(i), "cls": i % 4, "json": {"label": "no"}})
    source = open_source(config(tmp_path))
    assert source.classes == ("0", "1", "2", "3")
    for split in source.splits.values():
        for i in range(len(split)):
            number = int(split.name(i).rpartition("sample")[2])
            assert split.read(i) == (jpeg(number), number % 4)
    theirs = {sample["__key__"] for sample in webdataset.WebDataset(
        str(tmp_path / "train-{000000..000002}.tar"), shardshuffle=False)}  # fmt: skip
    ours = {name.rpartition(":")[2] for name, _ in everything(source)}
    assert ours == theirs


# -- which files -------------------------------------------------------------------------------------------------------


def test_root__a_pattern_stands_for_its_files(tmp_path: Path) -> None:
    for name in ("train-000000", "train-000001", "train-000002", "test-000000"):
        write_tar(tmp_path / f"{name}.tar", samples(10))
    assert images(open_source(config(tmp_path / "train-{000000..000001}.tar"))) == 20
    nested = open_source(config(tmp_path / "{train-{000000..000002},test-000000}.tar"))
    assert {name: len(split) for name, split in nested.splits.items()} == {"train": 30, "test": 10}
    both = open_source(config(tmp_path / "{train,test}-000000.tar"))
    assert {name: len(split) for name, split in both.splits.items()} == {"train": 10, "test": 10}


def test_root__a_pattern_may_name_folders(tmp_path: Path) -> None:
    for folder in ("train", "val"):
        write_tar(tmp_path / folder / "0.tar", samples(10))
    source = open_source(config(tmp_path / "{train,val}" / "{0..0}.tar"))
    assert {name: len(split) for name, split in source.splits.items()} == {"train": 10, "test": 10}


def test_root__a_file_whose_name_has_braces(tmp_path: Path) -> None:
    assert images(open_source(config(write_tar(tmp_path / "{a,b}.tar", samples(10))))) == 10


def test_root__missing_files_of_a_pattern_are_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "a-0.tar", samples(10))
    with pytest.raises(UserError, match=r"there is no a-1\.tar and 1 more in"):
        check_source(config(tmp_path / "a-{0..2}.tar"))


@pytest.mark.parametrize("pattern", ["a-{5..1}.tar", "a-{0..999999999999}.tar", "{0..999}{0..999}.tar"])
def test_root__a_pattern_for_no_or_too_many_files_is_refused(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(UserError, match=r"not a range|more than"):
        check_source(config(tmp_path / pattern))


@pytest.mark.parametrize("name", ["set.tar.gz", "set.tgz", "set.tar"])
def test_root__compressed_files_are_refused_with_the_way_out(tmp_path: Path, name: str) -> None:
    plain = write_tar(tmp_path / "plain", samples(10))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(gzip.compress(plain.read_bytes()))
    for root in (tmp_path / "in", tmp_path / "in" / name):
        with pytest.raises(UserError, match=r"compressed tar file .*Unpack it to set\.tar"):
            check_source(config(root))


def test_root__missing_empty_or_not_given(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        check_source(config(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"there is no a\.tar in"):
        check_source(config(tmp_path / "a.tar"))
    with pytest.raises(UserError, match=r"no \.tar file in this folder"):
        check_source(config(tmp_path))
    with pytest.raises(UserError, match=r"needs data\.root"):
        check_source(DataConfig(name="tar-shards"))
    write_tar(tmp_path / "text.tar", [("readme.txt", b"x")])
    with pytest.raises(UserError, match=r"no image in 1 tar files"):
        check_source(config(tmp_path))


# -- damage ------------------------------------------------------------------------------------------------------------


def test_tar__cut_off_gives_what_is_whole_and_names_the_file(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", samples(20))
    whole = write_tar(tmp_path / "b.tar", samples(20, start=20)).read_bytes()
    with tarfile.open(tmp_path / "b.tar") as tar:
        cut = tar.getmember("000029.jpg").offset_data + 100
    (tmp_path / "b.tar").write_bytes(whole[:cut])
    with pytest.raises(UserError, match=r"1 of 2 tar files are damaged.*to use the 29 images .*:\s+b\.tar"):
        check_source(config(tmp_path))
    source = open_source(config(tmp_path, quarantine_limit=0.5))
    assert images(source) == 29
    assert "b.tar is damaged: it ends inside '000029.jpg'; the 9 images before are used" in spoken(source)
    assert all(split.read(i)[0] for split in source.splits.values() for i in range(len(split)))


def test_tar__garbage_in_the_middle_is_no_silent_end(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", samples(20))
    with tarfile.open(path) as tar:
        start = tar.getmember("000015.jpg").offset
    content = bytearray(path.read_bytes())
    content[start : start + 512] = b"garbage!" * 64
    path.write_bytes(content)
    source = open_source(config(tmp_path, quarantine_limit=1.0))
    assert images(source) == 15
    assert f"a.tar is damaged: no member starts at byte {start}" in spoken(source)


def test_tar__joined_files_are_told(tmp_path: Path) -> None:
    one = write_tar(tmp_path / "one", samples(10)).read_bytes()
    (tmp_path / "both.tar").write_bytes(one.rstrip(b"\0") + bytes(-len(one.rstrip(b"\0")) % 512 + 1024) + one)
    assert "both.tar is damaged: something follows its end mark" in spoken(
        open_source(config(tmp_path, quarantine_limit=1.0))
    )


def test_tar__without_end_mark_or_empty_is_told(tmp_path: Path) -> None:
    content = write_tar(tmp_path / "a.tar", samples(10)).read_bytes()
    (tmp_path / "a.tar").write_bytes(content.rstrip(b"\0") + bytes(-len(content.rstrip(b"\0")) % 512))
    assert "a.tar is damaged: it ends without an end mark" in spoken(open_source(config(tmp_path)))
    (tmp_path / "empty.tar").write_bytes(b"")
    source = open_source(config(tmp_path, quarantine_limit=0.5))
    assert images(source) == 10
    assert "a.tar is damaged: it ends without an end mark" in spoken(source)
    assert "empty.tar is damaged" in spoken(source)


def test_tar__repeated_keys_and_second_images_are_told(tmp_path: Path) -> None:
    content = [*samples(20), ("000003.jpg", jpeg(99)), ("000004.png", jpeg(98)), ("000005.mask.png", jpeg(97))]
    source = open_source(config(write_tar(tmp_path / "set.tar", content)))
    assert images(source) == 20
    assert "3 images have the key of another one" in spoken(source)
    read = {split.name(i): split.read(i)[0] for split in source.splits.values() for i in range(len(split))}
    assert read["set.tar:000003"] == jpeg(3)
    assert read["set.tar:000005"] == jpeg(5)


def test_tar__an_image_of_many_suffixes_gives_way_to_a_plain_one(tmp_path: Path) -> None:
    content = [(f"{i}.{end}.png", jpeg(i)) for i in range(10) for end in ("left", "right")] + [("3.png", jpeg(77))]
    source = open_source(config(write_tar(tmp_path / "set.tar", content)))
    read = {split.name(i): split.read(i)[0] for split in source.splits.values() for i in range(len(split))}
    assert len(read) == 10
    assert read["set.tar:3"] == jpeg(77)


def test_tar__names_that_lead_out_are_only_names(tmp_path: Path) -> None:
    content = [*samples(20, labels=None), ("../../../up.jpg", jpeg(1)), ("/etc/abs.jpg", jpeg(2)), ("._0.jpg", b"x")]
    source = open_source(config(write_tar(tmp_path / "in" / "set.tar", content)))
    names = {name for name, _ in everything(source)}
    assert {"set.tar:../../../up", "set.tar:/etc/abs"} <= names
    prepare(source, config(tmp_path / "in"), tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}


def test_tar__labels_that_cannot_be_read_leave_their_images_out(tmp_path: Path) -> None:
    bad = [b"\xff\xfe", b"two\nlines", b"", b"x" * 100_000]
    content = [
        *samples(20),
        *((f"bad{i}.{end}", data) for i, label in enumerate(bad) for end, data in (("jpg", jpeg()), ("cls", label))),
    ]
    content += [("j0.jpg", jpeg()), ("j0.json", b"{"), ("j1.jpg", jpeg()), ("j1.json", b"[" * 60_000)]
    content += [
        ("j2.jpg", jpeg()),
        ("j2.json", b'{"label": [1]}'),
        ("j3.jpg", jpeg()),
        ("j3.json", b'{"label": "\\ud800"}'),
    ]
    source = open_source(config(write_tar(tmp_path / "set.tar", content)))
    assert images(source) == 20
    assert "8 images have no label among others that do" in spoken(source)


def test_quarantine__bad_images_in_tars_are_listed_and_above_the_limit_exit_with_2(tmp_path: Path) -> None:
    content = [*samples(40), ("zero.jpg", b""), ("zero.cls", b"0"), ("text.jpg", b"no picture"), ("text.cls", b"1")]
    data = config(write_tar(tmp_path / "set.tar", content), quarantine_limit=0.1)
    prepared = prepare(open_source(data), data, tmp_path / "out")
    assert prepared.manifest["quarantine"]["by_reason"] == {"empty": 1, "not-an-image": 1}
    strict = data.model_copy(update={"quarantine_limit": 0.01})
    with pytest.raises(QuarantineError) as caught:
        prepare(open_source(strict), strict, tmp_path / "strict")
    assert caught.value.exit_code == 2
    report = [json.loads(line) for line in caught.value.report.read_text().splitlines()]
    assert sorted(line["name"] for line in report) == ["set.tar:text", "set.tar:zero"]


def test_check__refuses_tars_of_texts(tmp_path: Path) -> None:
    content = [(f"{i}.jpg", b"no picture") for i in range(20)]
    with pytest.raises(UserError, match=r"not usable images.*'set\.tar:\d+' is not-an-image"):
        check_source(config(write_tar(tmp_path / "set.tar", content)))


def test_check__looks_at_a_few_of_many_large_tars(tmp_path: Path) -> None:
    for i in range(12):
        path = write_tar(tmp_path / f"{'train' if i > 2 else 'test'}-{i:02d}.tar", samples(10, start=10 * i))
        with path.open("r+b") as file:
            file.truncate(100_000_000)  # zeros that take no space
    notes = check_source(config(tmp_path))
    assert notes[-1] == "looked at 4 of 12 tar files"
    assert "36 train, 4 test" in notes[0]
    assert images(open_source(config(tmp_path))) == 120


def test_read__a_file_that_was_cut_after_the_listing_is_truncated(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "set.tar", samples(40))
    data = config(path, quarantine_limit=1.0)
    source = open_source(data)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    by_reason = prepare(source, data, tmp_path / "out").manifest["quarantine"]["by_reason"]
    assert set(by_reason) == {"truncated"}


def test_fingerprint__follows_files_and_labels(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "set.tar", samples(40))
    data = config(path)
    before = open_source(data).fingerprint()
    assert open_source(data).fingerprint() == before
    assert open_source(config(path, label_column="")).fingerprint() != before
    content = path.read_bytes()
    path.write_bytes(content[:1000] + b"x" + content[1001:])
    assert open_source(data).fingerprint() != before


# -- what hjepa wrote itself -------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> DataConfig:
    """Pictures of several modes and sizes in two classes, some of them to be turned."""
    rng = np.random.default_rng(0)
    for i in range(40):
        image = Image.fromarray(rng.integers(0, 256, (20 + i % 5, 24, 3), dtype=np.uint8))
        path = tmp_path / "folder" / ["cat", "dog"][i % 2] / f"{i}.{['jpg', 'png'][i % 4 // 2]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        exif = Image.Exif()
        exif[0x0112] = 1 + i % 8
        image.convert(["RGB", "L"][i % 3 // 2]).save(path, exif=exif)
    return DataConfig(root=str(tmp_path / "folder"), shard_mb=1)


@pytest.mark.parametrize("labelled", [True, False])
def test_own_shards__prepared_again_give_the_same_digest_and_the_same_bytes(
    folder: DataConfig, tmp_path: Path, labelled: bool
) -> None:
    data = folder if labelled else folder.model_copy(update={"root": f"{folder.root}/cat"})
    first = prepare(open_source(data), data, tmp_path / "first")
    (tmp_path / "first" / "dataset.json").write_text(json.dumps(first.manifest))
    again = config(tmp_path / "first", shard_mb=1)
    source = open_source(again)
    assert "written by hjepa" in spoken(source)
    second = prepare(source, again, tmp_path / "second")
    assert second.manifest["digest"] == first.manifest["digest"]
    assert [file.sha256 for file in second.files] == [file.sha256 for file in first.files]
    assert second.manifest["classes"] == (["cat", "dog"] if labelled else [])


def test_own_shards__without_their_manifest_are_tars_like_others(folder: DataConfig, tmp_path: Path) -> None:
    prepare(open_source(folder), folder, tmp_path / "first")
    source = open_source(config(tmp_path / "first"))
    assert source.classes == ("0", "1")
    assert {name: len(split) for name, split in source.splits.items()} == {"train": 36, "test": 4}


@pytest.mark.parametrize("wrong", ["{", "[]", '{"splits": {}}', None])
def test_own_shards__a_manifest_of_something_else_is_not_believed(
    folder: DataConfig, tmp_path: Path, wrong: str | None
) -> None:
    manifest = json.loads(json.dumps(prepare(open_source(folder), folder, tmp_path / "first").manifest))
    if wrong is None:
        manifest["splits"]["train"]["shards"][0]["samples"] += 1
    (tmp_path / "first" / "dataset.json").write_text(json.dumps(manifest) if wrong is None else wrong)
    source = open_source(config(tmp_path / "first"))
    assert "written by hjepa" not in spoken(source)
    assert images(source) == 40


def test_prepared_key__is_known_without_reading_images(tmp_path: Path) -> None:
    data = config(write_tar(tmp_path / "set.tar", samples(20)))
    assert prepared_key(open_source(data), data) == prepared_key(open_source(data), data)
