from __future__ import annotations

import io
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hjepa.config import DataConfig
from hjepa.data.datasets import DATASETS, check_source, open_source
from hjepa.data.fashion_mnist import FILES
from hjepa.data.prepare import QuarantineError, prepare
from hjepa.data.sources import hold_out
from hjepa.data.torchvision_sets import OTHER_TASKS, find, names, open_torchvision
from hjepa.errors import UserError


def jpeg(seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def tree(root: Path, names: list[str]) -> DataConfig:
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(jpeg(i))
    return DataConfig(name="image-folder", root=str(root))


def contents(data: DataConfig) -> dict[str, list[tuple[str, int | None]]]:
    source = open_source(data)
    return {
        name: sorted((split.name(i), split.read(i)[1]) for i in range(len(split)))
        for name, split in source.splits.items()
    }


def classed(*classes: str, count: int = 10) -> list[str]:
    return [f"{name}/{i}.jpg" for name in classes for i in range(count)]


# -- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "meant"),
    [("fashion_mnst", "fashion-mnist"), ("image-foldr", "image-folder"), ("cifer10", "CIFAR10"), ("stl-1O", "STL10")],
)
def test_name__misspelt_gets_the_near_one(name: str, meant: str) -> None:
    with pytest.raises(UserError, match=rf"no such data set\. Did you mean .*{meant}"):
        check_source(DataConfig(name=name))


@pytest.mark.parametrize("name", ["CIFAR10", "cifar10", "MNIST", "STL10", "SVHN", "Flowers102"])
def test_name__torchvision_class_is_known_without_a_download(name: str, tmp_path: Path) -> None:
    assert check_source(DataConfig(name=name, cache_dir=str(tmp_path)))
    assert not list(tmp_path.iterdir())


def test_name__separators_and_case_do_not_matter(tmp_path: Path) -> None:
    tree(tmp_path, classed("a", "b"))
    for name in ("image-folder", "ImageFolder", "image_folder"):
        assert len(open_source(DataConfig(name=name, root=str(tmp_path))).classes) == 2
    assert set(DATASETS) == {"fashion-mnist", "image-folder", "table", "tar-shards"}


# -- image folders ---------------------------------------------------------------------------------------------------


def test_folder__sub_folders_are_classes_and_some_images_are_held_out(tmp_path: Path) -> None:
    data = tree(tmp_path, [*classed("dog", "cat"), "cat/deep/er.jpg", "notes.txt", ".hidden.jpg"])
    source = open_source(data)
    splits = contents(data)
    assert source.classes == ("cat", "dog")
    assert len(splits["train"]) + len(splits["test"]) == 21
    assert {label for _, label in splits["test"]} == {0, 1}
    assert all(label == source.classes.index(name.split("/")[0]) for split in splits.values() for name, label in split)
    assert any("1 files are not named like images" in note for note in source.notes)


def test_folder__split_and_order_depend_on_names_alone(tmp_path: Path) -> None:
    names = classed("a", "b", "c", count=30)
    first = open_source(tree(tmp_path / "x", names))
    second = open_source(tree(tmp_path / "y", names[::-1]))
    orders = [
        {name: [split.name(i) for i in range(len(split))] for name, split in source.splits.items()}
        for source in (first, second)
    ]
    assert orders[0] == orders[1]
    assert not set(orders[0]["train"]) & set(orders[0]["test"])
    assert len(orders[0]["test"]) == 9
    leading = {name.split("/")[0] for name in orders[0]["train"][:20]}
    assert leading == {"a", "b", "c"}  # not sorted by class


def test_folder__train_and_test_folders_are_kept_apart(tmp_path: Path) -> None:
    data = tree(tmp_path, [*(f"train/{name}" for name in classed("a", "b")), *(f"val/{n}" for n in classed("b"))])
    splits = contents(data)
    assert len(splits["train"]) == 20
    assert splits["test"] == sorted((f"b/{i}.jpg", 1) for i in range(10))


def test_folder__unlabelled_test_beside_labelled_val_takes_val(tmp_path: Path) -> None:
    names = [f"{part}/{name}" for part in ("train", "val") for name in classed("a", "b")]
    data = tree(tmp_path, [*names, "test/1.jpg"])
    assert len(contents(data)["test"]) == 20
    assert any("not used: test/" in note for note in open_source(data).notes)


def test_folder__only_train_folder_holds_out_from_it(tmp_path: Path) -> None:
    splits = contents(tree(tmp_path, [f"train/{name}" for name in classed("a", "b")]))
    assert (len(splits["train"]), len(splits["test"])) == (18, 2)


def test_folder__a_class_may_be_called_train(tmp_path: Path) -> None:
    assert open_source(tree(tmp_path, classed("train", "plane"))).classes == ("plane", "train")


def test_folder__test_classes_that_train_lacks_are_refused(tmp_path: Path) -> None:
    data = tree(tmp_path, [*(f"train/{name}" for name in classed("a", "b")), *(f"test/{n}" for n in classed("c"))])
    with pytest.raises(UserError, match=r"'c'.*subset of 'a', 'b'"):
        check_source(data)


@pytest.mark.parametrize("names", [[f"{i}.jpg" for i in range(20)], classed("only", count=20)])
def test_folder__flat_or_one_class_is_unlabelled_and_says_so(tmp_path: Path, names: list[str]) -> None:
    data = tree(tmp_path, names)
    source = open_source(data)
    assert source.classes == ()
    assert any("probes are skipped" in note for note in source.notes)
    assert {label for split in contents(data).values() for _, label in split} == {None}
    assert sum(len(split) for split in source.splits.values()) == 20


def test_folder__images_beside_class_folders_are_named(tmp_path: Path) -> None:
    source = open_source(tree(tmp_path, [*classed("a", "b"), "logo.png"]))
    assert any("1 images lie beside the class folders" in note for note in source.notes)


@pytest.mark.parametrize("content", [[], ["labels.csv", "a/readme.txt"]])
def test_folder__without_images_is_refused(tmp_path: Path, content: list[str]) -> None:
    with pytest.raises(UserError, match="no image in this folder or below it"):
        check_source(tree(tmp_path, content))


def test_folder__missing_or_a_file_or_not_given(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for root, message in ((tmp_path / "nowhere", "no such folder"), (tmp_path / "file", "is a file")):
        with pytest.raises(UserError, match=message):
            check_source(DataConfig(root=str(root)))
    with pytest.raises(UserError, match=r"needs data\.root"):
        check_source(DataConfig())


def test_folder__texts_named_like_images_are_refused_before_any_work(tmp_path: Path) -> None:
    data = tree(tmp_path, classed("a", "b", count=3))
    for path in tmp_path.glob("*/[01].jpg"):
        path.write_text("not a picture")
    with pytest.raises(UserError, match=r"not usable images.*not-an-image"):
        check_source(data)


def test_folder__odd_names_links_and_pipes(tmp_path: Path) -> None:
    data = tree(tmp_path, classed("a", "b"))
    odd = os.fsencode(tmp_path) + b"/a/line\nbreak\xff.jpg"
    with open(odd, "wb") as file:
        file.write(jpeg())
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "a" / "self.jpg").symlink_to("self.jpg")
    os.mkfifo(tmp_path / "a" / "pipe.jpg")
    source = open_source(data)
    names = {split.name(i) for split in source.splits.values() for i in range(len(split))}
    assert os.fsdecode(b"a/line\nbreak\xff.jpg") in names
    assert "a/self.jpg" in names  # to be reported as unreadable, not dropped
    assert len(names) == 22
    assert len(source.fingerprint()) == 64
    said = "\n".join(source.notes)
    assert "a/loop is the same folder as another one and was left out" in said
    assert "pipes, sockets and devices left out: 1" in said


def test_folder__what_is_left_out_is_told(tmp_path: Path) -> None:
    names = [f"{part}/{name}" for part in ("train", "test") for name in classed("a", "b")]
    data = tree(tmp_path, [*names, "test/loose.jpg", "train/.hidden.jpg"])
    (tmp_path / "train" / "c").symlink_to("a")
    said = "\n".join(open_source(data).notes)
    assert "1 images in test/ lie beside its class folders and were left out" in said
    assert "train/c is the same folder as another one and was left out" in said
    assert "hidden files and folders left out: 1" in said


def test_folder__fingerprint_follows_content(tmp_path: Path) -> None:
    data = tree(tmp_path, classed("a", "b"))
    before = open_source(data).fingerprint()
    assert open_source(data).fingerprint() == before
    os.utime(tmp_path / "a" / "0.jpg", ns=(1, 1))
    assert open_source(data).fingerprint() != before


@pytest.mark.parametrize("layout", ["{}", "train/{}"])
def test_folder__fingerprint_follows_added_and_removed_files(tmp_path: Path, layout: str) -> None:
    data = tree(tmp_path, [layout.format(name) for name in classed("a", "b")])
    before = open_source(data).fingerprint()
    added = tmp_path / layout.format("b/new.jpg")
    added.write_bytes(jpeg())
    assert open_source(data).fingerprint() != before
    added.unlink()
    assert open_source(data).fingerprint() == before
    (tmp_path / layout.format("a/3.jpg")).unlink()
    assert open_source(data).fingerprint() != before


@pytest.mark.parametrize("layout", ["{}/0.jpg", "train/{}/0.jpg"])
def test_folder__one_image_per_class_has_no_test_split_and_says_so(tmp_path: Path, layout: str) -> None:
    source = open_source(tree(tmp_path, [layout.format(i) for i in range(9)]))
    assert {name: len(split) for name, split in source.splits.items()} == {"train": 9}
    assert any("no test split" in note and "probes are skipped" in note for note in source.notes)


def test_folder__a_single_class_with_two_images_is_enough_to_hold_out(tmp_path: Path) -> None:
    source = open_source(tree(tmp_path, [*(f"{i}/0.jpg" for i in range(9)), "0/1.jpg"]))
    assert {name: len(split) for name, split in source.splits.items()} == {"train": 9, "test": 1}


@pytest.mark.parametrize(
    "names",
    [
        [f"{i}.jpg" for i in range(8)],  # of which one is held out
        [f"{i}/0.jpg" for i in range(7)],
        [f"train/a/{i}.jpg" for i in range(7)] + [f"test/a/{i}.jpg" for i in range(20)],
    ],
)
def test_folder__with_fewer_than_eight_to_train_on_is_refused_before_any_work(tmp_path: Path, names: list[str]) -> None:
    with pytest.raises(UserError, match=r"data\.root=.*: 7 usable images.*at least 8.*Add images"):
        check_source(tree(tmp_path, names))
    for i in range(2):
        tree(tmp_path, [f"{Path(names[0]).parent}/more{i}.jpg"])
    assert check_source(DataConfig(root=str(tmp_path)))


def test_folder__unusable_files_do_not_count_as_images_to_train_on(tmp_path: Path) -> None:
    data = tree(tmp_path, [f"train/{i}.jpg" for i in range(9)] + [f"test/{i}.jpg" for i in range(9)])
    data = data.model_copy(update={"quarantine_limit": 0.5})
    assert check_source(data)
    for i in range(2):
        (tmp_path / "train" / f"{i}.jpg").write_text("x")
    with pytest.raises(UserError, match="7 usable images"):
        check_source(data)


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.99])
def test_hold_out__partitions_and_keeps_every_class_on_both_sides(fraction: float) -> None:
    names, labels = [str(i) for i in range(200)], [i % 7 for i in range(200)]
    train, test = hold_out(names, labels, fraction)
    assert sorted([*train, *test]) == list(range(200))
    assert {labels[i] for i in train} == {labels[i] for i in test} == set(range(7))
    assert [part.tolist() for part in hold_out(["one"], None, fraction)] == [[0], []]


# -- torchvision -----------------------------------------------------------------------------------------------------


def test_torchvision__set_without_splits_is_held_out() -> None:
    source = open_source(DataConfig(name="FakeData"))
    assert {name: len(split) for name, split in source.splits.items()} == {"train": 900, "test": 100}
    payload, label = source.splits["train"].read(0)
    assert isinstance(payload, Image.Image)
    assert isinstance(label, int)


def test_torchvision__files_are_taken_as_they_are(tmp_path: Path) -> None:
    # The layout of EuroSAT as torchvision unpacks it: a folder per class.
    tree(tmp_path / "eurosat" / "2750", classed("Forest", "River"))
    source = open_source(DataConfig(name="eurosat", root=str(tmp_path)))
    payload, _ = source.splits["train"].read(0)
    assert source.classes == ("Forest", "River")
    assert isinstance(payload, bytes)
    assert payload.startswith(b"\xff\xd8")


def test_torchvision__bad_files_are_quarantined_and_above_the_limit_exit_with_2(tmp_path: Path) -> None:
    names = classed("Forest", "River", count=20)
    tree(tmp_path / "set" / "eurosat" / "2750", names)
    for name in names[:3]:
        (tmp_path / "set" / "eurosat" / "2750" / name).write_text("no picture")
    data = DataConfig(name="eurosat", root=str(tmp_path / "set"), quarantine_limit=0.1)
    by_reason = prepare(open_source(data), data, tmp_path / "out").manifest["quarantine"]["by_reason"]
    assert by_reason == {"not-an-image": 3}
    strict = data.model_copy(update={"quarantine_limit": 0.05})
    with pytest.raises(QuarantineError, match=r"3 of 40 files \(7\.5%\)") as caught:
        prepare(open_source(strict), strict, tmp_path / "strict")
    assert (caught.value.exit_code, len(caught.value.report.read_text().splitlines())) == (2, 3)


def idx(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, dtype=">u4").tobytes()
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def emnist(root: Path, **samples: int) -> DataConfig:
    """The files of EMNIST's split "balanced" as torchvision unpacks them."""
    for part, count in samples.items():
        images = np.random.default_rng(count).integers(0, 256, (count, 28, 28))
        idx(root / "EMNIST" / "raw" / f"emnist-balanced-{part}-images-idx3-ubyte", images)
        idx(root / "EMNIST" / "raw" / f"emnist-balanced-{part}-labels-idx1-ubyte", np.arange(count) % 47)
    return DataConfig(name="EMNIST", root=str(root))


def test_torchvision__emnist_is_its_balanced_split_with_its_own_test_images(tmp_path: Path) -> None:
    source = open_source(emnist(tmp_path, train=94, test=47))
    assert {name: len(split) for name, split in source.splits.items()} == {"train": 94, "test": 47}
    assert len(source.classes) == 47
    assert "split=balanced" in source.detail


def test_torchvision__people_who_are_in_no_test_split_are_held_out_of_train(tmp_path: Path) -> None:
    datasets = pytest.importorskip("torchvision").datasets
    base = tmp_path / "celeba"
    tree(base / "img_align_celeba", [f"{i:06d}.jpg" for i in range(30)])
    rows = [f"{i:06d}.jpg" for i in range(30)]
    tables = {
        "list_eval_partition.txt": [f"{row} {2 * (i >= 20)}" for i, row in enumerate(rows)],
        "identity_CelebA.txt": [f"{row} {i % 5 + 5 * (i >= 20)}" for i, row in enumerate(rows)],
        **{
            f"list_{what}.txt": ["30", "x y", *(f"{row} 1 -1" for row in rows)]
            for what in ("bbox_celeba", "landmarks_align_celeba", "attr_celeba")
        },
    }
    for name, lines in tables.items():
        (base / name).write_text("\n".join(lines) + "\n")
    # The published files are known by their checksums, which those above do not have.
    celeba = type("CelebA", (datasets.CelebA,), {"file_list": [("", None, name) for name in tables]})
    source = open_torchvision(DataConfig(name="CelebA", root=str(tmp_path)), celeba)
    assert {name: len(split) for name, split in source.splits.items()} == {"train": 18, "test": 2}
    labels = {split.read(i)[1] for split in source.splits.values() for i in range(len(split))}
    assert labels == set(range(5))
    assert any("held out" in note for note in source.notes)


def test_torchvision__test_images_without_labels_give_way_to_those_with_labels(tmp_path: Path) -> None:
    # CLEVR publishes labels for train and val, but not for test.
    base = tmp_path / "clevr" / "CLEVR_v1.0"
    for part, count in (("train", 12), ("val", 3), ("test", 4)):
        tree(base / "images" / part, [f"{i}.png" for i in range(count)])
        scenes = [{"image_filename": f"{i}.png", "objects": [{}] * (i % 3 + 1)} for i in range(count)]
        if part != "test":
            (base / "scenes").mkdir(exist_ok=True)
            (base / "scenes" / f"CLEVR_{part}_scenes.json").write_text(json.dumps({"scenes": scenes}))
    source = open_source(DataConfig(name="CLEVRClassification", root=str(tmp_path)))
    assert {name: len(split) for name, split in source.splits.items()} == {"train": 12, "test": 3}


def test_torchvision__fingerprint_follows_the_files_under_the_root(tmp_path: Path) -> None:
    data = emnist(tmp_path, train=94, test=47)
    before = open_source(data).fingerprint()
    assert open_source(data).fingerprint() == before
    images = tmp_path / "EMNIST" / "raw" / "emnist-balanced-train-images-idx3-ubyte"
    content = bytearray(images.read_bytes())
    content[100] ^= 1  # of the same length
    images.write_bytes(content)
    assert open_source(data).fingerprint() != before


def test_torchvision__set_made_for_another_task_is_refused_before_a_download(tmp_path: Path) -> None:
    for title in (title for titles in OTHER_TASKS.values() for title in titles):
        with pytest.raises(UserError, match=rf"data\.name={title} is not a set of labelled images.*Choose one"):
            check_source(DataConfig(name=title, root=str(tmp_path), cache_dir=str(tmp_path)))
        with pytest.raises(UserError, match=rf"data\.name={title} is not a set"):
            open_source(DataConfig(name=title, root=str(tmp_path), cache_dir=str(tmp_path)))
    assert not list(tmp_path.iterdir())


def test_torchvision__every_class_is_either_for_classification_or_refused() -> None:
    usable = [
        "Caltech101", "Caltech256", "CelebA", "CIFAR10", "CIFAR100", "CLEVRClassification", "Country211", "DTD",
        "EMNIST", "EuroSAT", "FakeData", "FashionMNIST", "FER2013", "FGVCAircraft", "Flowers102", "Food101",
        "GTSRB", "ImageFolder", "Imagenette", "ImageNet", "INaturalist", "KMNIST", "LFWPeople", "MNIST", "Omniglot",
        "OxfordIIITPet", "PCAM", "Places365", "QMNIST", "RenderedSST2", "SEMEION", "StanfordCars", "STL10",
        "SUN397", "SVHN", "USPS",
    ]  # fmt: skip
    assert sorted(names()) == sorted(usable)
    assert find("wrap_dataset_for_transforms_v2") is None


@pytest.mark.parametrize("name", ["ImageNet", "LFWPeople", "StanfordCars"])
def test_torchvision__set_that_cannot_be_downloaded_needs_a_root(name: str) -> None:
    with pytest.raises(UserError, match=r"set data\.root to its folder"):
        check_source(DataConfig(name=name))


# -- Fashion-MNIST ---------------------------------------------------------------------------------------------------


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a network nor Debian's tools."""
    check_source(DataConfig(name="CIFAR10"))  # the import of torchvision is not what is timed
    for variable in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.mark.usefixtures("offline")
def test_fashion__no_source_is_one_clear_error_within_seconds(tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        check_source(DataConfig(name="fashion-mnist", cache_dir=str(tmp_path / "cache")))
    assert time.monotonic() - start < 15
    message = str(caught.value)
    assert "no source of Fashion-MNIST answered" in message
    for part in ("cache", "torchvision", "Debian package", "no apt-get", "data.root"):
        assert part in message
    assert not list((tmp_path / "cache").iterdir())


def test_fashion__folder_without_the_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"t10k-labels-idx1-ubyte\.gz are missing"):
        check_source(DataConfig(name="fashion-mnist", root=str(tmp_path)))


@pytest.fixture(scope="module")
def fashion() -> DataConfig:
    data = DataConfig(name="fashion-mnist", channels=1, image_size=28)
    try:
        check_source(data)
    except UserError as error:
        pytest.skip(str(error))
    return data


def test_fashion__has_its_published_shape(fashion: DataConfig) -> None:
    source = open_source(fashion)
    assert {name: len(split) for name, split in source.splits.items()} == {"train": 60_000, "test": 10_000}
    assert [source.splits["train"].read(i)[1] for i in range(6)] == [9, 0, 0, 3, 0, 2]
    assert source.classes[9] == "Ankle boot"


@pytest.fixture
def cache(fashion: DataConfig, tmp_path: Path) -> Path:
    """A cache of the test's own that holds the four files."""
    copy = tmp_path / "fashion-mnist"
    shutil.copytree(Path(fashion.cache_dir).expanduser() / "fashion-mnist", copy)
    return copy


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)


@pytest.mark.usefixtures("offline")
def test_fashion__a_damaged_cache_is_noticed(cache: Path) -> None:
    data = DataConfig(name="fashion-mnist", cache_dir=str(cache.parent))
    assert open_source(data).detail.startswith(f"cache {cache}")
    damage(cache / FILES[0])
    with pytest.raises(UserError, match=f"cache: .*{FILES[0]} is damaged"):
        open_source(data)


def test_fashion__a_damaged_folder_of_the_users_is_noticed(cache: Path) -> None:
    data = DataConfig(name="fashion-mnist", root=str(cache))
    assert len(open_source(data).splits["test"]) == 10_000
    damage(cache / FILES[0])
    with pytest.raises(UserError, match=f"cannot read .*{FILES[0]}"):
        open_source(data)


def test_image_folder__a_cache_inside_it_holds_no_images_of_the_user(tmp_path: Path) -> None:
    for name in ("cat", "dog", "cache/prepared/x"):
        (tmp_path / name).mkdir(parents=True)
        for i in range(8):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / name / f"{i}.png")
    data = DataConfig(name="image-folder", root=str(tmp_path), cache_dir=str(tmp_path / "cache"))
    source = open_source(data)
    assert source.classes == ("cat", "dog")
    assert sum(len(split) for split in source.splits.values()) == 16
