"""What every forked worker process does first."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def begin(parent: int) -> None:
    """Settle in as a child of process ``parent``."""
    # What the parent had left to collect is not this process's to collect: the destructor of a process group, for one,
    # waits for threads that were not forked.
    gc.freeze()
    if sys.platform == "linux":
        # A worker that waits on a pipe, which it holds open itself, would outlive a killed parent. The signal comes
        # when the thread ends that started the worker.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
