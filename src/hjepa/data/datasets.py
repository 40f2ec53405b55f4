"""The table of data sets: a name in the configuration, how it is opened, how it is checked before any long work."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeVar

from hjepa.config import DataConfig
from hjepa.data import torchvision_sets
from hjepa.data.fashion_mnist import check_fashion_mnist, open_fashion_mnist
from hjepa.data.files import S3, Findings, OpenStore
from hjepa.data.image_folder import check_image_folder, open_image_folder
from hjepa.data.sources import Source
from hjepa.data.table import check_table, open_table
from hjepa.data.tar_shards import check_tar_shards, open_tar_shards
from hjepa.errors import UserError

T = TypeVar("T")


class Row(NamedTuple):
    open: Callable[[DataConfig, OpenStore | None, Findings | None], Source]
    check: Callable[[DataConfig, OpenStore | None], list[str]]
    in_s3: bool = True  # whether data.root may be an S3 prefix


def _local(function: Callable[[DataConfig], T]) -> Callable[..., T]:
    """For a set that is read from this machine alone."""
    return lambda data, *_: function(data)


def _anywhere(function: Callable[[DataConfig, OpenStore | None], T]) -> Callable[..., T]:
    """For a set that a listing tells everything of."""
    return lambda data, open_store, *_: function(data, open_store)


DATASETS: dict[str, Row] = {
    "fashion-mnist": Row(_local(open_fashion_mnist), _local(check_fashion_mnist), in_s3=False),
    "image-folder": Row(_anywhere(open_image_folder), check_image_folder),
    "table": Row(_anywhere(open_table), check_table),
    "tar-shards": Row(open_tar_shards, check_tar_shards),
}


def open_source(data: DataConfig, open_store: OpenStore | None = None, findings: Findings | None = None) -> Source:
    """The splits of ``data.name``, fetched if need be. Images are not decoded yet.

    Args:
        open_store: The way to S3; None where there is none.
        findings: Where to keep what takes long to find out about files in S3.

    Raises:
        UserError: if the name is unknown or nothing usable is found.
    """
    return _row_for(data).open(data, open_store, findings)


def check_source(data: DataConfig, open_store: OpenStore | None = None) -> list[str]:
    """The cheap plausibility check before any long work; returns notes for the user.

    Raises:
        UserError: if ``prepare_data`` would fail for a reason that can be seen already.
    """
    return _row_for(data).check(data, open_store)


def _row_for(data: DataConfig) -> Row:
    row = _row(data.name)
    if data.root is not None and data.root.startswith(S3) and not row.in_s3:
        kinds = ", ".join(name for name, row in DATASETS.items() if row.in_s3)
        raise UserError(
            f"data.root={data.root}: {data.name} is read from a local folder. In S3 may be: {kinds} (data.name)."
        )
    return row


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
            _local(partial(torchvision_sets.open_torchvision, dataset_class=dataset_class)),
            _local(partial(torchvision_sets.check_torchvision, dataset_class=dataset_class)),
            in_s3=False,
        )
    known_names = [*DATASETS, *torchvision_sets.names()]
    by_plain = {torchvision_sets.plain(known): known for known in reversed(known_names)}
    near = [by_plain[match] for match in difflib.get_close_matches(wanted, list(by_plain), n=3, cutoff=0.6)]
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise UserError(
        f"data.name={name}: no such data set.{hint} "
        f"Expected one of {', '.join(DATASETS)}, or the name of a class in torchvision.datasets."
    )
