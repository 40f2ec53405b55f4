from hjepa.utils.checkpoint import CheckpointManager
from hjepa.utils.collapse import CollapseMonitor, collapse_metrics
from hjepa.utils.logging import MetricsLogger, ProgressTracker
from hjepa.utils.scheduler import (
    CosineScheduler,
    EMAScheduler,
    HierarchicalScheduler,
    LinearScheduler,
    create_ema_scheduler,
    create_lr_scheduler,
)

__all__ = [
    "CheckpointManager",
    "CollapseMonitor",
    "CosineScheduler",
    "EMAScheduler",
    "HierarchicalScheduler",
    "LinearScheduler",
    "MetricsLogger",
    "ProgressTracker",
    "collapse_metrics",
    "create_ema_scheduler",
    "create_lr_scheduler",
]
