"""What the process and its GPU are doing."""

from __future__ import annotations

import contextlib
import sys

import psutil

GIB = 2**30


class SystemMonitor:
    """Percentages are means since the previous call of ``read``."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        psutil.cpu_percent()
        self._process.cpu_percent()
        self._gpu_utilization = True

    def read(self) -> dict[str, float]:
        """CPU of the machine (of all cores) and of this process (100: one core), memory, and the current GPU's."""
        found = {
            "system/cpu_percent": psutil.cpu_percent(),
            "system/process_cpu_percent": self._process.cpu_percent(),
            "system/process_memory_gib": self._process.memory_info().rss / GIB,
            "system/memory_percent": psutil.virtual_memory().percent,
        }
        return found | self._gpu()

    def _gpu(self) -> dict[str, float]:
        torch = sys.modules.get("torch")
        if torch is None or not torch.cuda.is_initialized():
            return {}
        memory = torch.cuda.memory_stats()
        found = {
            f"system/gpu_memory_{name}_gib": memory[f"{kind}.all.{when}"] / GIB
            for name, kind, when in (
                ("allocated", "allocated_bytes", "current"),
                ("reserved", "reserved_bytes", "current"),
                ("peak", "allocated_bytes", "peak"),
            )
        }
        if self._gpu_utilization:
            self._gpu_utilization = False  # until it has worked: NVML may be absent, or refuse (MIG, a locked-down pod)
            # NVML's own errors are RuntimeErrors of torch or of a module that may not be there to name them.
            with contextlib.suppress(Exception):
                found["system/gpu_percent"] = float(torch.cuda.utilization())
                self._gpu_utilization = True
        return found
