"""Any labelled image data set of torchvision, through the signature of its own class."""

from __future__ import annotations

import hashlib
import inspect
import socket
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hjepa.config import DataConfig
from hjepa.data.sources import Payload, Skipped, Source, file_state, files_below, hold_out, scattered
from hjepa.errors import UserError

TRAIN_NAMES = ("train", "trainval", "train-standard")
TEST_NAMES = ("test", "val", "valid", "validation")
TRANSFER_SECONDS = 30.0  # without a byte
FINGERPRINT_FILES = 1_000_000  # files whose state is looked at: some seconds, and more than all but a few sets have

# What torchvision offers for other tasks: told by name, for its classes do not say so before they have downloaded.
OTHER_TASKS = {
    "detection or segmentation": (
        "CocoDetection", "VOCDetection", "VOCSegmentation", "SBDataset", "Cityscapes", "WIDERFace", "Kitti",
    ),
    "captions": ("CocoCaptions", "Flickr8k", "Flickr30k", "SBU"),
    "video": ("Kinetics", "HMDB51", "UCF101", "MovingMNIST"),
    "pairs of patches or faces": ("PhotoTour", "LFWPairs"),
    "optical flow": ("KittiFlow", "Sintel", "FlyingChairs", "FlyingThings3D", "HD1K"),
    "stereo matching": (
        "Kitti2012Stereo", "Kitti2015Stereo", "CarlaStereo", "Middlebury2014Stereo", "CREStereo",
        "FallingThingsStereo", "SceneFlowStereo", "SintelStereo", "InStereo2k", "ETH3DStereo",
    ),
    "databases that worker processes cannot share": ("LSUN", "LSUNClass"),
    "a base for other classes": ("DatasetFolder", "VisionDataset"),
}  # fmt: skip

# For sets whose defaults are no classification task. One that fixes its split here has no other: people in the train
# split of the two sets of faces are not those in the test split, so that their names cannot be tested there.
SETTINGS: dict[str, dict[str, Any]] = {
    "EMNIST": {"split": "balanced"},
    "CelebA": {"split": "train", "target_type": "identity"},
    "LFWPeople": {"split": "train"},
}
WITHDRAWN = ("LFWPeople", "StanfordCars")  # torchvision still reads them, but can no longer download them


class TorchvisionSplit:
    """Positions of a torchvision data set."""

    chunk = 32

    def __init__(self, dataset: Any, positions: list[int], identity: str):
        self.dataset, self.positions, self.identity = dataset, positions, identity

    def __len__(self) -> int:
        return len(self.positions)

    def name(self, i: int) -> str:
        return f"{self.positions[i]:08d}"

    def read(self, i: int) -> tuple[Payload, int | None]:
        payload, target = self.dataset[self.positions[i]]
        label = int(target)
        return payload, label if label >= 0 else None

    def fingerprint(self) -> str:
        return self.identity


def find(name: str) -> type | None:
    """The torchvision class of that name, whatever its case and separators."""
    return next((known for known in _classes() if plain(known.__name__) == plain(name)), None)


def names() -> list[str]:
    """Of the classes that can be used."""
    return [known.__name__ for known in _classes() if _other_task(known.__name__) is None]


def plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def open_torchvision(data: DataConfig, dataset_class: type) -> Source:
    """
    Raises:
        UserError: if the set cannot be had, or is not one of (image, class) pairs.
    """
    import torchvision

    title = dataset_class.__name__
    _require_classification(title)
    root = Path(data.root).expanduser() if data.root else Path(data.cache_dir).expanduser() / "torchvision" / title
    has_root = _accepts(dataset_class, "root")
    common = dict(SETTINGS.get(title, {}))
    if has_root:
        common["root"] = root
    if _accepts(dataset_class, "loader"):
        common["loader"] = _read_bytes  # so that files go into the shards as they are
    train_options, test_options = _split_options(dataset_class)
    refused: list[str] = []
    whole = next(_parts(dataset_class, common, train_options, refused), None)
    if whole is None:
        raise UserError(f"data.name={title} has no split that hjepa can use: {' '.join(refused)}")
    if (fault := _fault(whole)) is not None:
        raise UserError(
            f"data.name={title}: {fault}; expected pairs of an image and its class number. "
            "Choose a set made for classification."
        )
    candidates = _parts(dataset_class, common, test_options, refused)
    test_part = next((part for part in candidates if _fault(part) is None), None)
    notes: tuple[str, ...] = ()
    if test_part is not None:
        parts = {"train": whole, "test": test_part}
        positions = {name: list(range(len(part))) for name, part in parts.items()}
    else:
        train, test = hold_out([f"{i:08d}" for i in range(len(whole))], None, data.test_fraction)
        parts, positions = {"train": whole, "test": whole}, {"train": train.tolist(), "test": test.tolist()}
        notes = (f"no test split: {len(test)} of {len(whole)} images are held out (data.test_fraction)",)
    settings = "".join(f" {option}={value}" for option, value in SETTINGS.get(title, {}).items())
    identity = f"torchvision {torchvision.__version__} {title}{settings} {root} {len(whole)}"
    if has_root:
        identity += f" {_state_of_files(root)}"
    # ImageNet gives each class a tuple of synonyms; the sets of Caltech call their classes categories.
    classes = getattr(whole, "classes", getattr(whole, "categories", ()))
    return Source(
        name=title.lower(),
        detail=f"torchvision.datasets.{title}{settings}" + (f" in {root}" if has_root else ""),
        splits={
            name: TorchvisionSplit(part, _scatter(positions[name]), f"{identity} {name} {len(positions[name])}")
            for name, part in parts.items()
        },
        classes=tuple(name if isinstance(name, str) else ", ".join(name) for name in classes),
        notes=notes,
    )


def check_torchvision(data: DataConfig, dataset_class: type) -> list[str]:
    """Only what can be told without a download that may take hours.

    Raises:
        UserError: if the set is made for another task, or cannot be downloaded and is not there.
    """
    title = dataset_class.__name__
    _require_classification(title)
    downloads = _accepts(dataset_class, "download") and title not in WITHDRAWN
    if _accepts(dataset_class, "root") and not downloads:
        if data.root is None:
            raise UserError(f"data.name={title} cannot be downloaded by torchvision: set data.root to its folder.")
        if not Path(data.root).expanduser().is_dir():
            raise UserError(f"data.root={data.root}: there is no such folder. Set it to where {title} lies.")
    return [f"torchvision.datasets.{title}"]


def _classes() -> list[type]:
    from torchvision import datasets  # seconds of import that the built-in rows do not need

    known = [getattr(datasets, name) for name in datasets.__all__]
    return [entry for entry in known if inspect.isclass(entry)]


def _other_task(title: str) -> str | None:
    return next((task for task, titles in OTHER_TASKS.items() if title in titles), None)


def _require_classification(title: str) -> None:
    task = _other_task(title)
    if task is not None:
        raise UserError(
            f"data.name={title} is not a set of labelled images that hjepa can use ({task}). "
            "Choose one made for classification, such as CIFAR10, or point data.name=image-folder at its images."
        )


def _scatter(positions: list[int]) -> list[int]:
    keys = [f"{i:08d}" for i in positions]
    return [positions[k] for k in scattered(range(len(positions)), keys)]


def _state_of_files(root: Path) -> str:
    """sha256 (hex) over names, sizes and times: the length of a set stays the same when its files are replaced."""
    hasher = hashlib.sha256()
    for name in islice(files_below(root, Skipped()), FINGERPRINT_FILES):
        hasher.update(ascii((name, file_state(root / name))).encode())
    return hasher.hexdigest()


def _accepts(dataset_class: type, option: str) -> bool:
    """Whether the constructor takes a keyword, also where it only passes it on to its base class."""
    for ancestor in dataset_class.__mro__:
        if "__init__" in vars(ancestor):
            parameters = inspect.signature(ancestor).parameters
            if option in parameters:
                return True
            if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
                return False
    return False


def _split_options(dataset_class: type) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Keyword arguments to try, in order, for the train and the test split; none for test means to hold samples out."""
    if _accepts(dataset_class, "train"):
        return [{"train": True}], [{"train": False}]
    if _accepts(dataset_class, "split") and "split" not in SETTINGS.get(dataset_class.__name__, {}):
        return [{"split": name} for name in TRAIN_NAMES], [{"split": name} for name in TEST_NAMES]
    return [{}], []


def _parts(
    dataset_class: type, common: dict[str, Any], options: list[dict[str, Any]], refused: list[str]
) -> Iterator[Any]:
    """The data sets of those options that the class knows; what it says to the others goes to ``refused``."""
    for option in options:
        try:
            yield _construct(dataset_class, common | option)
        except ValueError as error:
            refused.append(str(error))


def _construct(dataset_class: type, settings: dict[str, Any]) -> Any:
    """
    Raises:
        ValueError: torchvision's answer to a split that the set does not have.
        UserError: if the set cannot be had.
    """
    title = dataset_class.__name__
    # Asked to download, some sets refuse to go on over files that are there already.
    attempts = [{"download": False}, {"download": True}] if _accepts(dataset_class, "download") else [{}]
    failure: Exception | None = None
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TRANSFER_SECONDS)
    try:
        for attempt in attempts:
            try:
                return dataset_class(**settings, **attempt)
            except (RuntimeError, OSError, ImportError) as error:
                failure = error
            except ValueError as error:
                if not attempt.get("download"):
                    raise
                failure = error  # withdrawn sets answer so
            except TypeError as error:
                raise UserError(f"data.name={title} needs settings that hjepa does not have: {error}.") from None
    finally:
        socket.setdefaulttimeout(before)
    raise UserError(
        f"data.name={title}: torchvision could not provide it: {failure}. "
        "Connect to a network, or set data.root to a folder where torchvision finds it."
    )


def _fault(dataset: Any) -> str | None:
    """Why a data set cannot be used, judged by its first sample; None if it can."""
    if len(dataset) == 0:
        return "the data set is empty"
    sample = dataset[0]
    is_pair = isinstance(sample, tuple) and len(sample) == 2
    if not is_pair or not isinstance(sample[0], bytes | Image.Image | np.ndarray):
        return "its samples are not labelled images"
    try:
        int(sample[1])
    except (TypeError, ValueError, RuntimeError):
        return f"its images have no class number, but {type(sample[1]).__name__}"
    return None


def _read_bytes(path: str | Path) -> bytes:
    return Path(path).read_bytes()
