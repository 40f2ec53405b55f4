"""The table of data sets: a name in the configuration, how it is opened, how it is checked before any long work."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from hjepa.config import DataConfig
from hjepa.data import torchvision_sets
from hjepa.data.fashion_mnist import check_fashion_mnist, open_fashion_mnist
from hjepa.data.image_folder import check_image_folder, open_image_folder
from hjepa.data.sources import Source
from hjepa.errors import UserError


class Row(NamedTuple):
    open: Callable[[DataConfig], Source]
    check: Callable[[DataConfig], list[str]]


DATASETS: dict[str, Row] = {
    "fashion-mnist": Row(open_fashion_mnist, check_fashion_mnist),
    "image-folder": Row(open_image_folder, check_image_folder),
}


def open_source(data: DataConfig) -> Source:
    """The splits of ``data.name``, fetched if need be. Images are not decoded yet.

    Raises:
        UserError: if the name is unknown or nothing usable is found.
    """
    return _row(data.name).open(data)


def check_source(data: DataConfig) -> list[str]:
    """The cheap plausibility check before any long work; returns notes for the user.

    Raises:
        UserError: if ``prepare_data`` would fail for a reason that can be seen already.
    """
    return _row(data.name).check(data)


def require_known(name: str) -> None:
    """
    Raises:
        UserError: ``data.name`` is that of no data set. Whether its images are there is not looked at.
    """
    _row(name)


def _row(name: str) -> Row:
    wanted = torchvision_sets.plain(name)
    for known, row in DATASETS.items():
        if torchvision_sets.plain(known) == wanted:
            return row
    dataset_class = torchvision_sets.find(name)
    if dataset_class is not None:
        return Row(
            partial(torchvision_sets.open_torchvision, dataset_class=dataset_class),
            partial(torchvision_sets.check_torchvision, dataset_class=dataset_class),
        )
    known_names = [*DATASETS, *torchvision_sets.names()]
    by_plain = {torchvision_sets.plain(known): known for known in reversed(known_names)}
    near = [by_plain[match] for match in difflib.get_close_matches(wanted, list(by_plain), n=3, cutoff=0.6)]
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise UserError(
        f"data.name={name}: no such data set.{hint} "
        f"Expected one of {', '.join(DATASETS)}, or the name of a class in torchvision.datasets."
    )
