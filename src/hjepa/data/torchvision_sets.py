"""Any labelled image data set of torchvision, through the signature of its own class."""

from __future__ import annotations

import inspect
import socket
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hjepa.config import DataConfig
from hjepa.data.sources import Payload, Source, hold_out, scattered
from hjepa.errors import UserError

TRAIN_NAMES = ("train", "trainval", "train-standard")
TEST_NAMES = ("test", "val", "valid", "validation")
TRANSFER_SECONDS = 30.0  # without a byte


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
    from torchvision import datasets  # seconds of import that the built-in rows do not need

    wanted = plain(name)
    return next((getattr(datasets, known) for known in datasets.__all__ if plain(known) == wanted), None)


def names() -> list[str]:
    from torchvision import datasets

    return [name for name in datasets.__all__ if inspect.isclass(getattr(datasets, name))]


def plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def open_torchvision(data: DataConfig, dataset_class: type) -> Source:
    """
    Raises:
        UserError: if the set cannot be had, or is not one of (image, class) pairs.
    """
    import torchvision

    title = dataset_class.__name__
    root = Path(data.root).expanduser() if data.root else Path(data.cache_dir).expanduser() / "torchvision" / title
    has_root = _accepts(dataset_class, "root")
    common: dict[str, Any] = {}
    if has_root:
        common["root"] = root
    if _accepts(dataset_class, "download"):
        common["download"] = True
    if _accepts(dataset_class, "loader"):
        common["loader"] = _read_bytes  # so that files go into the shards as they are
    options = _split_options(dataset_class)
    whole = _construct(dataset_class, common, options["train"])
    _require_pairs(whole, title)
    identity = f"torchvision {torchvision.__version__} {title} {root} {len(whole)}"
    # ImageNet gives each class a tuple of synonyms.
    classes = tuple(name if isinstance(name, str) else ", ".join(name) for name in getattr(whole, "classes", ()))
    if options["test"]:
        parts = {"train": whole, "test": _construct(dataset_class, common, options["test"])}
        positions = {name: list(range(len(part))) for name, part in parts.items()}
        notes: tuple[str, ...] = ()
    else:
        train, test = hold_out([f"{i:08d}" for i in range(len(whole))], None, data.test_fraction)
        parts, positions = {"train": whole, "test": whole}, {"train": train, "test": test}
        notes = (f"no test split: {len(test)} of {len(whole)} images are held out (data.test_fraction)",)
    return Source(
        name=title.lower(),
        detail=f"torchvision.datasets.{title} in {root}" if has_root else f"torchvision.datasets.{title}",
        splits={
            name: TorchvisionSplit(part, _scatter(positions[name]), f"{identity} {name} {len(positions[name])}")
            for name, part in parts.items()
        },
        classes=classes,
        notes=notes,
    )


def check_torchvision(data: DataConfig, dataset_class: type) -> list[str]:
    """Only what can be told without a download that may take hours."""
    title = dataset_class.__name__
    if _accepts(dataset_class, "root") and not _accepts(dataset_class, "download"):
        if data.root is None:
            raise UserError(f"data.name={title} cannot be downloaded by torchvision: set data.root to its folder.")
        if not Path(data.root).expanduser().is_dir():
            raise UserError(f"data.root={data.root}: there is no such folder. Set it to where {title} lies.")
    return [f"torchvision.datasets.{title}"]


def _scatter(positions: list[int]) -> list[int]:
    keys = [f"{i:08d}" for i in positions]
    return [positions[k] for k in scattered(range(len(positions)), keys)]


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


def _split_options(dataset_class: type) -> dict[str, list[dict[str, Any]]]:
    """Keyword arguments to try, in order, for either split; none for the test split means to hold samples out."""
    parameters = inspect.signature(dataset_class).parameters
    if "train" in parameters:
        return {"train": [{"train": True}], "test": [{"train": False}]}
    if "split" in parameters:
        return {"train": [{"split": name} for name in TRAIN_NAMES], "test": [{"split": name} for name in TEST_NAMES]}
    return {"train": [{}], "test": []}


def _construct(dataset_class: type, common: dict[str, Any], options: list[dict[str, Any]]) -> Any:
    title = dataset_class.__name__
    refused: list[str] = []
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TRANSFER_SECONDS)
    try:
        for option in options:
            try:
                return dataset_class(**common, **option)
            except ValueError as error:  # torchvision's answer to a split that the set does not have
                refused.append(str(error))
            except (RuntimeError, OSError, ImportError) as error:
                raise UserError(
                    f"data.name={title}: torchvision could not provide it: {error}. "
                    "Connect to a network, or set data.root to a folder where torchvision finds it."
                ) from None
            except TypeError as error:
                raise UserError(f"data.name={title} needs settings that hjepa does not have: {error}.") from None
    finally:
        socket.setdefaulttimeout(before)
    raise UserError(f"data.name={title} has no split that hjepa can use: {' '.join(refused)}")


def _require_pairs(dataset: Any, title: str) -> None:
    if len(dataset) == 0:
        raise UserError(f"data.name={title}: the data set is empty.")
    sample = dataset[0]
    is_pair = isinstance(sample, tuple) and len(sample) == 2
    if not is_pair or not isinstance(sample[0], bytes | Image.Image | np.ndarray):
        raise UserError(f"data.name={title} is not a set of labelled images; choose one made for classification.")
    try:
        int(sample[1])
    except (TypeError, ValueError):
        raise UserError(
            f"data.name={title}: expected one class number per image, got {type(sample[1]).__name__}."
        ) from None


def _read_bytes(path: str | Path) -> bytes:
    return Path(path).read_bytes()
