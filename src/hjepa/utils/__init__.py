from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hjepa.utils.logging import MetricsLogger, ProgressLine, ProgressTracker, setup_logging
from hjepa.utils.scheduler import (
    CosineScheduler,
    EMAScheduler,
    HierarchicalScheduler,
    LinearScheduler,
    create_ema_scheduler,
    create_hierarchical_scheduler,
    create_lr_scheduler,
    create_weight_decay_scheduler,
)

if TYPE_CHECKING:
    from hjepa.utils.checkpoint import CheckpointManager
    from hjepa.utils.collapse import CollapseMonitor, collapse_metrics

__all__ = [
    "CheckpointManager",
    "CollapseMonitor",
    "CosineScheduler",
    "EMAScheduler",
    "HierarchicalScheduler",
    "LinearScheduler",
    "MetricsLogger",
    "ProgressLine",
    "ProgressTracker",
    "collapse_metrics",
    "create_ema_scheduler",
    "create_hierarchical_scheduler",
    "create_lr_scheduler",
    "create_weight_decay_scheduler",
    "setup_logging",
]

# What needs torch is imported when it is asked for: the command line and the light steps do without.
_LAZY = {"CheckpointManager": "checkpoint", "CollapseMonitor": "collapse", "collapse_metrics": "collapse"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
