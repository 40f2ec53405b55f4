"""End with the process that started us, even if it was killed with no chance to tell us."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, MutableMapping

import psutil

PARENT = "HJEPA_PARENT_PID"  # "pid:start time": a pid alone may by now belong to another process
GRACE_SECONDS = 2.0  # between SIGTERM, on which training saves its state, and SIGKILL
_POLL_SECONDS = 0.25
_CLOCK_TOLERANCE_SECONDS = 5.0  # start times are read off a clock that may have been set in between


def announce(environment: MutableMapping[str, str]) -> None:
    """Name this process in ``environment`` as the one whose end ends the children started with it."""
    environment[PARENT] = f"{os.getpid()}:{psutil.Process().create_time()}"


def die_with_parent() -> None:
    """End this process soon after the announced one has ended: SIGTERM, then SIGKILL. Without one, do nothing."""

    def end_self() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE_SECONDS)
        os.kill(os.getpid(), signal.SIGKILL)

    watch_parent(end_self)


def watch_parent(on_end: Callable[[], None]) -> threading.Thread | None:
    """Call ``on_end`` from a daemon thread once the announced process has ended; None if none is announced."""
    announced = os.environ.get(PARENT)
    if not announced:
        return None
    pid, _, started = announced.partition(":")
    try:
        parent = psutil.Process(int(pid))
        present = abs(parent.create_time() - float(started)) < _CLOCK_TOLERANCE_SECONDS
    except psutil.NoSuchProcess:
        present = False

    def watch() -> None:
        while present and _is_alive(parent):
            time.sleep(_POLL_SECONDS)
        on_end()

    thread = threading.Thread(target=watch, name="lifeline", daemon=True)
    thread.start()
    return thread


def _is_alive(process: psutil.Process) -> bool:
    """Whether the process still runs; a zombie does not, nor does another process with the same pid."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
