"""Tables of paths and labels as input: how columns and cells are understood, and what a million rows cost."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hjepa.config import DataConfig, load_config
from hjepa.data.datasets import check_source, open_source
from hjepa.data.prepare import QuarantineError, prepare
from hjepa.data.sources import Names, Source, hold_out, name_hash, scattered
from hjepa.errors import UserError

Rows = Sequence[Sequence[Any]]


def jpeg(seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def pictures(root: Path, count: int = 20) -> list[str]:
    (root / "img").mkdir(parents=True, exist_ok=True)
    names = [f"img/{i}.jpg" for i in range(count)]
    for i, name in enumerate(names):
        (root / name).write_bytes(jpeg(i))
    return names


def config(root: Path | str, **settings: Any) -> DataConfig:
    return DataConfig(name="table", root=str(root), **settings)


def write_csv(path: Path, header: Sequence[str], rows: Rows) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def write_parquet(path: Path, header: Sequence[str], rows: Rows) -> Path:
    import pyarrow
    from pyarrow import parquet

    columns = {name: [row[i] for row in rows] for i, name in enumerate(header)}
    parquet.write_table(pyarrow.table(columns), path)
    return path


WRITERS: dict[str, Callable[[Path, Sequence[str], Rows], Path]] = {"t.csv": write_csv, "t.parquet": write_parquet}
kinds = pytest.mark.parametrize("kind", WRITERS)


def contents(source: Source) -> dict[str, dict[str, int | None]]:
    return {
        title: {split.name(i): split.read(i)[1] for i in range(len(split))} for title, split in source.splits.items()
    }


def everything(source: Source) -> dict[str, int | None]:
    return {name: label for part in contents(source).values() for name, label in part.items()}


def spoken(source: Source) -> str:
    return "\n".join(source.notes)


# -- columns -----------------------------------------------------------------------------------------------------------


@kinds
def test_table__paths_labels_and_splits(tmp_path: Path, kind: str) -> None:
    names = pictures(tmp_path)
    rows = [(name, "ab"[i % 2], "train" if i < 15 else "test") for i, name in enumerate(names)]
    source = open_source(config(WRITERS[kind](tmp_path / kind, ["path", "label", "split"], rows)))
    assert source.classes == ("a", "b")
    assert contents(source) == {
        part: {name: "ab".index(label) for name, label, split in rows if split == part} for part in ("train", "test")
    }
    payload, _ = source.splits["train"].read(0)
    assert isinstance(payload, bytes)


@pytest.mark.parametrize(
    ("header", "settings"),
    [
        (["Filename", "Class"], {}),
        ([" image ", "category"], {}),
        (["file_name", "target"], {}),
        (["a", "b"], {"path_column": "a", "label_column": "b"}),
        (["path", "label", "label_name"], {}),
    ],
)
def test_columns__are_found_by_their_names(tmp_path: Path, header: list[str], settings: dict[str, str]) -> None:
    rows = [(name, "xy"[i % 2], "?")[: len(header)] for i, name in enumerate(pictures(tmp_path))]
    assert open_source(config(write_csv(tmp_path / "t.csv", header, rows), **settings)).classes == ("x", "y")


@pytest.mark.parametrize(
    ("header", "settings", "message"),
    [
        (["where", "label"], {}, r"no column is known to hold the paths.*'where', 'label'.*Set data\.path_column"),
        (["path", "image"], {}, r"'path' and 'image' may both be meant\. Set data\.path_column"),
        (["path", "label", "class"], {}, r"'label' and 'class' may both be meant\. Set data\.label_column.*empty text"),
        (["path", "split", "subset"], {}, r"'split' and 'subset' may both be meant"),
        (["path", "path"], {}, r"more than one column is called 'path'\. Rename"),
        (["path", "x"], {"label_column": "y"}, r"data\.label_column=y, but the columns are 'path', 'x'"),
        (["img/0.jpg", "cat"], {}, r"the first line is 'img/0\.jpg,cat', expected the names of the columns"),
        ([], {}, r"no column is known.*none at all"),
    ],
)
def test_columns__that_are_not_clear_are_refused(
    tmp_path: Path, header: list[str], settings: dict[str, str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_source(config(write_csv(tmp_path / "t.csv", header, []), **settings))


@kinds
def test_columns__may_be_turned_off(tmp_path: Path, kind: str) -> None:
    rows = [(name, "ab"[i % 2], "fold3") for i, name in enumerate(pictures(tmp_path))]
    path = WRITERS[kind](tmp_path / kind, ["path", "label", "split"], rows)
    with pytest.raises(UserError, match=r"the split of 'img/0\.jpg' is 'fold3', expected one of train, .*split_column"):
        check_source(config(path))
    source = open_source(config(path, split_column="", label_column=""))
    assert source.classes == ()
    assert {title: len(split) for title, split in source.splits.items()} == {"train": 18, "test": 2}


def test_columns__of_another_kind_of_data_set_contradict() -> None:
    for setting in ("image_root=a", "path_column=a", "label_column=a", "split_column=a"):
        with pytest.raises(UserError, match=rf"data\.{setting.partition('=')[0]} and data\.name"):
            load_config("default", ["data.name=image-folder", f"data.{setting}"])
        load_config("default", ["data.name=Table", f"data.{setting}"])
    load_config("default", ["data.name=tar-shards", "data.label_column=kind"])


# -- labels and splits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ([10, 9, 2, 10], ("2", "9", "10")),
        (["10", "9", "2", "10"], ("2", "9", "10")),
        (["b", "a", "10", "9"], ("10", "9", "a", "b")),
        ([1.0, 0.0, 2.0, 0.0], ("0", "1", "2")),
        (["01", "1", "2", "2"], ("1", "2")),
        ([True, False, True, False], ("False", "True")),
    ],
)
@kinds
def test_labels__are_sorted_by_name_and_numbers_by_value(
    tmp_path: Path, kind: str, labels: list[Any], classes: tuple[str, ...]
) -> None:
    rows = [(name, labels[i % 4]) for i, name in enumerate(pictures(tmp_path))]
    source = open_source(config(WRITERS[kind](tmp_path / kind, ["path", "label"], rows)))
    assert source.classes == classes
    assert set(everything(source).values()) == set(range(len(classes)))


@kinds
def test_labels__missing_ones_are_left_out_and_negative_numbers_are_none(tmp_path: Path, kind: str) -> None:
    labels = [0, 1, None, -1, 1]
    rows = [(name, labels[i % 5]) for i, name in enumerate(pictures(tmp_path))]
    source = open_source(config(WRITERS[kind](tmp_path / kind, ["path", "label"], rows)))
    assert source.classes == ("0", "1")
    assert len(everything(source)) == 12
    assert "8 images have no label among others that do" in spoken(source)


def test_labels__as_pandas_writes_whole_numbers_with_gaps(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"path": pictures(tmp_path), "label": [2, 10, None, 2] * 5})
    frame.to_csv(tmp_path / "t.csv", index=False)
    frame.to_parquet(tmp_path / "t.parquet")
    for name in ("t.csv", "t.parquet"):
        assert open_source(config(tmp_path / name)).classes == ("2", "10")


@kinds
def test_labels__none_at_all_or_one_class_is_unlabelled(tmp_path: Path, kind: str) -> None:
    names = pictures(tmp_path)
    for header, rows in ((["path"], [(n,) for n in names]), (["path", "label"], [(n, "only") for n in names])):
        source = open_source(config(WRITERS[kind](tmp_path / kind, header, rows)))
        assert source.classes == ()
        assert "probes are skipped" in spoken(source)
        assert set(everything(source).values()) == {None}
        assert len(everything(source)) == 20


def test_split__words_in_any_case_and_rows_without_one(tmp_path: Path) -> None:
    words = ["Train", "training", " test ", "", "VALIDATION"]
    rows = [(name, "ab"[i // 5 % 2], words[i % 5]) for i, name in enumerate(pictures(tmp_path))]
    source = open_source(config(write_csv(tmp_path / "t.csv", ["path", "label", "split"], rows)))
    assert {title: len(split) for title, split in source.splits.items()} == {"train": 8, "test": 4}
    assert "4 images belong to no split" in spoken(source)
    assert "not used: 4 images of the val split" in spoken(source)


def test_split__unlabelled_test_gives_way_to_labelled_val(tmp_path: Path) -> None:
    rows = [
        (name, "" if i % 4 == 3 else "ab"[i // 4 % 2], ["train", "train", "val", "test"][i % 4])
        for i, name in enumerate(pictures(tmp_path))
    ]
    source = open_source(config(write_csv(tmp_path / "t.csv", ["path", "label", "split"], rows)))
    assert set(contents(source)["test"]) == {name for name, _, part in rows if part == "val"}


def test_split__train_alone_is_held_out_from_and_depends_on_names_alone(tmp_path: Path) -> None:
    rows = [(name, "ab"[i % 2], "train") for i, name in enumerate(pictures(tmp_path, 40))]
    header = ["path", "label", "split"]
    one = open_source(config(write_csv(tmp_path / "one.csv", header, rows)))
    two = open_source(config(write_csv(tmp_path / "two.csv", header, rows[::-1])))
    orders = [{t: [s.name(i) for i in range(len(s))] for t, s in source.splits.items()} for source in (one, two)]
    assert orders[0] == orders[1]
    assert len(orders[0]["test"]) == 4
    # The same names as an image folder gives are split and ordered in the same way.
    names, labels = [name for name, *_ in rows], [i % 2 for i in range(40)]
    train, test = hold_out(names, labels, 0.1)
    assert orders[0]["train"] == [names[i] for i in scattered(train, names)]
    assert set(orders[0]["test"]) == {names[i] for i in test}


def test_split__classes_that_train_lacks_are_refused(tmp_path: Path) -> None:
    rows = [(name, "abc"[i % 3], "test" if i % 3 == 2 else "train") for i, name in enumerate(pictures(tmp_path))]
    with pytest.raises(UserError, match=r"classes that the training images lack: 'c'"):
        check_source(config(write_csv(tmp_path / "t.csv", ["path", "label", "split"], rows)))


# -- text --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-8"])
@pytest.mark.parametrize(
    ("separator", "suffix"), [(",", "csv"), (";", "csv"), ("\t", "tsv"), ("\t", "txt"), ("|", "csv")]
)
def test_csv__byte_order_marks_separators_and_line_ends(
    tmp_path: Path, encoding: str, separator: str, suffix: str
) -> None:
    rows = [f"{name}{separator} {'äb'[i % 2]}" for i, name in enumerate(pictures(tmp_path))]
    text = "\r\n".join([f"path{separator}label", *rows, "", ""])
    (tmp_path / f"t.{suffix}").write_bytes(text.encode(encoding))
    source = open_source(config(tmp_path / f"t.{suffix}"))
    assert source.classes == ("b", "ä")
    assert len(everything(source)) == 20


def test_csv__quotes_hold_separators_and_line_breaks(tmp_path: Path) -> None:
    pictures(tmp_path)
    odd = ["img/a,b.jpg", "img/two\nlines.jpg", 'img/say "hi".jpg', "img/ blank.jpg", "img/tail "]
    for i, name in enumerate(odd):
        (tmp_path / name).write_bytes(jpeg(i))
    rows = [(name, f"class\n{i % 2}") for i, name in enumerate([*odd, *pictures(tmp_path)])]
    source = open_source(config(write_csv(tmp_path / "t.csv", ["path", "label"], rows)))
    assert source.classes == ("class\n0", "class\n1")
    assert set(odd) <= set(everything(source))


def test_csv__blanks_after_paths_that_are_aligned_by_eye_are_no_part_of_them(tmp_path: Path) -> None:
    names = pictures(tmp_path)
    (tmp_path / "t.csv").write_text("path    , label\n" + "".join(f"{name}   , {len(name) % 2}\n" for name in names))
    assert set(everything(open_source(config(tmp_path / "t.csv")))) == set(names)


@pytest.mark.parametrize("other", ["test", "val"])
def test_splits__images_of_no_split_are_trained_on_where_none_is_marked_so(tmp_path: Path, other: str) -> None:
    names = pictures(tmp_path, 30)
    rows = [(name, "ab"[i % 2], other if i < 10 else "") for i, name in enumerate(names)]
    source = open_source(config(write_csv(tmp_path / "t.csv", ["path", "label", "split"], rows)))
    assert {title: set(part) for title, part in contents(source).items()} == {
        "train": set(names[10:]),
        "test": set(names[:10]),
    }
    assert "no image is marked for training, so the 20 of no split are trained on" in spoken(source)


def test_splits__a_set_of_test_images_alone_is_one_without_splits(tmp_path: Path) -> None:
    rows = [(name, "ab"[i % 2], "test") for i, name in enumerate(pictures(tmp_path, 30))]
    source = open_source(config(write_csv(tmp_path / "t.csv", ["path", "label", "split"], rows)))
    assert sum(map(len, source.splits.values())) == 30
    assert "all images are of the test split: they are taken as one set without splits" in spoken(source)


@pytest.mark.parametrize(
    ("labels", "classes", "note"),
    [
        (["-1", "1"], ("-1", "1"), None),
        (["-1", "0", "1"], ("0", "1"), "10 images have a negative label"),
        (["0.0", "1.0", "nan"], ("0", "1"), "10 images have a negative label, or one such as nan"),
        (["None", "some"], ("None", "some"), None),
    ],
)
def test_labels__that_mean_none(tmp_path: Path, labels: list[str], classes: tuple[str, ...], note: str | None) -> None:
    rows = [(name, labels[i % len(labels)]) for i, name in enumerate(pictures(tmp_path, 30))]
    source = open_source(config(write_csv(tmp_path / "t.csv", ["path", "label"], rows)))
    assert source.classes == classes
    assert ("negative" in spoken(source)) == (note is not None)
    assert note is None or note in spoken(source)


def test_csv__paths_that_are_not_utf8_are_read(tmp_path: Path) -> None:
    names = pictures(tmp_path)
    with open(os.fsencode(tmp_path) + b"/img/caf\xe9.jpg", "wb") as file:
        file.write(jpeg())
    (tmp_path / "t.csv").write_bytes(b"path\nimg/caf\xe9.jpg\n" + "\n".join(names).encode())
    assert os.fsdecode(b"img/caf\xe9.jpg") in everything(open_source(config(tmp_path / "t.csv")))


def test_csv__labels_that_are_not_utf8_are_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"path,label\na.jpg,caf\xe9\n")
    with pytest.raises(UserError, match=r"the label of 'a\.jpg' is 'caf.*expected UTF-8"):
        check_source(config(tmp_path / "t.csv"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('path,label\na.jpg,x\n"b.jpg,y\n', r"not a readable table after line \d+: unexpected end of data"),
        ("path,label\na.jpg,x\nb,c.jpg,y\n", r"line 3 has 3 cells, the first line names 2 columns"),
        (f"path,label\n{'x' * 200_000},y\n", r"not a readable table after line 0: field larger than field limit"),
        ("path\n", "the table names no image"),
        ("path,label\n,x\n", "the table names no image"),
        ("", "no column is known"),
    ],
)
def test_csv__what_is_no_table_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        check_source(config(tmp_path / "t.csv"))


def test_csv__short_rows_and_rows_without_a_path(tmp_path: Path) -> None:
    lines = [f"{name},{'ab'[i % 2]}" for i, name in enumerate(pictures(tmp_path))]
    (tmp_path / "t.csv").write_text("\n".join(["path,label", *lines[:-1], "img/19.jpg", ",a", ""]))
    source = open_source(config(tmp_path / "t.csv"))
    assert len(everything(source)) == 19
    assert "1 rows have no path" in spoken(source)


def test_parquet__columns_of_other_types_and_damage_are_refused(tmp_path: Path) -> None:
    rows = [({"bytes": b"x"}, 1)]
    with pytest.raises(UserError, match=r"column 'image' holds struct.*expected texts or whole numbers"):
        check_source(config(write_parquet(tmp_path / "s.parquet", ["image", "label"], rows)))
    whole = write_parquet(tmp_path / "t.parquet", ["path"], [(name,) for name in pictures(tmp_path)]).read_bytes()
    for damaged in (whole[:-20], b"", b"path,label\n", whole[:40] + b"\xff" * 40 + whole[80:]):
        (tmp_path / "t.parquet").write_bytes(damaged)
        with pytest.raises(UserError, match="not a readable Parquet file"):
            check_source(config(tmp_path / "t.parquet"))


def test_parquet__categories_and_bytes(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    names = pictures(tmp_path)
    labels = pyarrow.array(["b", "a"] * 10).dictionary_encode()
    table = pyarrow.table({"path": [name.encode() for name in names], "label": labels})
    parquet.write_table(table, tmp_path / "t.parquet", row_group_size=7)
    source = open_source(config(tmp_path / "t.parquet"))
    assert source.classes == ("a", "b")
    assert set(everything(source)) == set(names)


def test_parquet__without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "t.parquet", ["path"], [("a.jpg",)])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        check_source(config(path))


# -- paths -------------------------------------------------------------------------------------------------------------


def test_paths__absolute_ones_inside_and_the_same_file_written_differently(tmp_path: Path) -> None:
    names = pictures(tmp_path)
    rows = [[name] for name in names] + [[f"./{names[0]}"], [f"img/../{names[1]}"], [str(tmp_path / names[2])]]
    source = open_source(config(write_csv(tmp_path / "t.csv", ["path"], rows)))
    assert sorted(everything(source)) == sorted(names)
    assert "3 rows name a path for the second time" in spoken(source)


def test_paths__that_lead_out_are_refused_one_by_one(tmp_path: Path) -> None:
    root = tmp_path / "set"
    names = pictures(root, 40)
    (tmp_path / "secret.jpg").write_bytes(jpeg())
    outside = ["../secret.jpg", str(tmp_path / "secret.jpg"), "img/../../secret.jpg", "s3://bucket/x.jpg"]
    data = config(write_csv(root / "t.csv", ["path"], [[name] for name in [*names, *outside]]), quarantine_limit=0.2)
    prepared = prepare(open_source(data), data, tmp_path / "out")
    report = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert {line["name"]: line["reason"] for line in report} == dict.fromkeys(outside, "outside")
    assert sum(split["samples"] for split in prepared.manifest["splits"].values()) == 40


def test_paths__image_root_is_where_they_start(tmp_path: Path) -> None:
    names = pictures(tmp_path / "images")
    (tmp_path / "tables").mkdir()
    rows = [[name] for name in names[:10]] + [[str(tmp_path / "images" / name)] for name in names[10:]]
    path = write_csv(tmp_path / "tables" / "t.csv", ["path"], rows)
    source = open_source(config(path, image_root=str(tmp_path / "images")))
    assert sorted(everything(source)) == sorted(names)
    whole = open_source(config(path, image_root="/", split_column=""))
    absolute = str(tmp_path / "images" / names[10]).lstrip("/")
    assert absolute in {split.name(i) for split in whole.splits.values() for i in range(len(split))}
    with pytest.raises(UserError, match=r"data\.image_root=.*no such folder"):
        check_source(config(path, image_root=str(tmp_path / "nowhere")))


def test_paths__contradictory_rows_are_refused_and_equal_ones_kept_once(tmp_path: Path) -> None:
    rows = [[name, "ab"[i % 2]] for i, name in enumerate(pictures(tmp_path, 40))]
    again = [rows[0], rows[1], [rows[2][0], "b"]]
    data = config(write_csv(tmp_path / "t.csv", ["path", "label"], [*rows, *again]))
    source = open_source(data)
    assert "3 rows name a path for the second time" in spoken(source)
    prepared = prepare(source, data, tmp_path / "out")
    assert prepared.manifest["quarantine"]["by_reason"] == {"contradictory": 1}
    report = json.loads((tmp_path / "out" / "quarantine.jsonl").read_text())
    assert report["name"] == rows[2][0]


def test_quarantine__missing_folders_pipes_and_links_are_listed_and_above_the_limit_exit_with_2(tmp_path: Path) -> None:
    names = pictures(tmp_path, 60)
    os.mkfifo(tmp_path / "pipe.jpg")  # opening it would wait for ever
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "folder.jpg").mkdir()
    bad = ["gone.jpg", "pipe.jpg", "loop.jpg", "folder.jpg", "nul\0.jpg", f"{'x' * 300}.jpg"]
    path = write_csv(tmp_path / "t.csv", ["path"], [[name] for name in [*names, *bad]])
    data = config(path)
    assert len(open_source(data).fingerprint()) == 64
    with pytest.raises(QuarantineError, match=r"6 of 66 files \(9\.1%\) cannot be used: 6 unreadable") as caught:
        prepare(open_source(data), data, tmp_path / "out")
    assert caught.value.exit_code == 2
    report = [json.loads(line) for line in caught.value.report.read_text().splitlines()]
    assert {line["name"]: line["reason"] for line in report} == dict.fromkeys(bad, "unreadable")


def test_check__refuses_a_table_whose_files_are_elsewhere(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", ["path"], [[f"nowhere/{i}.jpg"] for i in range(20)])
    with pytest.raises(UserError, match=r"'nowhere/\d+\.jpg' cannot be read: No such file or directory"):
        check_source(config(path))


def test_root__missing_a_folder_another_suffix_or_not_given(tmp_path: Path) -> None:
    (tmp_path / "folder.csv").mkdir()
    for root, message in (
        (tmp_path / "no.csv", "there is no such file"),
        (tmp_path / "no" / "no.csv", "no such folder"),
        (tmp_path / "folder.csv", "cannot be read"),
        (tmp_path / "t.xlsx", r"expected a file named \.csv"),
        (tmp_path / "t.csv.gz", r"expected a file named \.csv"),
    ):
        with pytest.raises(UserError, match=message):
            check_source(config(root))
    with pytest.raises(UserError, match=r"needs data\.root"):
        check_source(DataConfig(name="table"))


def test_fingerprint__follows_files_labels_and_splits_but_not_the_table_s_form(tmp_path: Path) -> None:
    names = pictures(tmp_path)
    rows = [[name, "ab"[i % 2], "train" if i < 15 else "test"] for i, name in enumerate(names)]
    header = ["path", "label", "split"]
    data = config(write_csv(tmp_path / "t.csv", header, rows))
    before = open_source(data).fingerprint()
    write_csv(tmp_path / "t.csv", [*header, "more"], [[*row, "x"] for row in rows])
    assert open_source(data).fingerprint() == before
    write_csv(tmp_path / "t.csv", header, [[*rows[0][:2], "test"], *rows[1:]])
    moved = open_source(data).fingerprint()
    write_csv(tmp_path / "t.csv", header, [[rows[0][0], "b", "train"], *rows[1:]])
    relabelled = open_source(data).fingerprint()
    write_csv(tmp_path / "t.csv", header, rows)
    os.utime(tmp_path / names[3], ns=(1, 1))
    assert len({before, moved, relabelled, open_source(data).fingerprint()}) == 4


# -- many rows ---------------------------------------------------------------------------------------------------------


def test_names__are_what_went_in() -> None:
    names = ["", "a", "ä/日本", "new\nline", os.fsdecode(b"caf\xe9")] * 3
    packed = Names(names)
    assert list(packed) == names
    assert (len(packed), packed[4], list(packed[1:3])) == (15, names[4], names[1:3])
    with pytest.raises(IndexError):
        packed[15]


def test_scattered__order_by_numbers_is_the_order_by_hashes() -> None:
    from hjepa.data.sources import key_order, name_keys

    names = [f"{i}.jpg" for i in range(3000)]
    assert key_order(name_keys(names)).tolist() == sorted(range(3000), key=lambda i: name_hash(names[i]))


MEASURE = """
import resource, sys
from hjepa.config import DataConfig
from hjepa.data.datasets import open_source

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

before = peak()
source = open_source(DataConfig(name="table", root=sys.argv[1]))
assert sum(len(split) for split in source.splits.values()) == int(sys.argv[2])
print(peak() - before)
"""


def test_memory__a_row_takes_a_few_hundred_bytes(tmp_path: Path) -> None:
    count = 200_000
    with (tmp_path / "t.csv").open("w") as file:
        file.write("path,label,split\n")
        file.writelines(f"images/class{i % 100:03d}/photo-{i:09d}.jpg,class{i % 100:03d},train\n" for i in range(count))
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "t.csv"), str(count)]
    grown = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert grown * 2**20 / count < 400  # a list of rows of texts alone takes about 500
