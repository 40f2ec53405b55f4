"""From an image folder, a table, tar shards or a torchvision data set to batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hjepa.data.local import create_dataloaders, open_prepared

__all__ = ["create_dataloaders", "open_prepared"]


def __getattr__(name: str) -> Any:
    """Imported when asked for, so that a check of the configuration costs no torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from hjepa.data import local

    return getattr(local, name)
