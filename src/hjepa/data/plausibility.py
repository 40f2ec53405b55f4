"""A look at a few samples before any long work: what is wrong with all of them should not take an hour to be found."""

from __future__ import annotations

from hjepa.config import DataConfig
from hjepa.data.images import DECODE_ERRORS, RejectedError, decode
from hjepa.data.sources import Source, require_train_images
from hjepa.errors import UserError

CHECKED_FILES = 32


def check_samples(source: Source, data: DataConfig) -> list[str]:
    """Reads and decodes a few training images; returns notes for the user.

    Raises:
        UserError: if more of them are unusable than ``data.quarantine_limit`` allows, or too few images are left.
    """
    split = source.splits["train"]
    count = min(len(split), CHECKED_FILES)
    bad = []
    for k in range(count):
        i = k * len(split) // count
        try:
            decode(split.read(i)[0], max_pixels=data.max_pixels)
        except DECODE_ERRORS as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            bad.append(f"{split.name(i)!a} cannot be read: {reason}")
        except RejectedError as error:
            bad.append(f"{split.name(i)!a} is {error}")
    # A sample says nothing exact about the share in a large folder: prepare_data counts them all.
    limit = data.quarantine_limit if count == len(split) else max(data.quarantine_limit, 0.5)
    if len(bad) > limit * count:
        raise UserError(
            f"data.root={data.root}: {len(bad)} of {count} files looked at are not usable images "
            f"(data.quarantine_limit allows a share of {data.quarantine_limit:g}): {'; '.join(bad[:3])}"
            f"{'; ...' if len(bad) > 3 else ''}. Remove or replace them, or raise data.quarantine_limit."
        )
    require_train_images(len(split) - len(bad), f"data.root={data.root}")
    counts = ", ".join(f"{len(part)} {name}" for name, part in source.splits.items())
    return [f"{source.detail}: {counts}, {len(source.classes) or 'no'} classes", *source.notes]
