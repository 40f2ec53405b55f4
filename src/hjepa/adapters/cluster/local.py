"""The job on this machine: the same command that a training pod runs, as child processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from hjepa.adapters.cluster.spec import TrainSpec
from hjepa.errors import FutileRetryError, HjepaError, PreemptedError, UserError
from hjepa.utils.logging import say

# The pod's /dev/termination-log; the entrypoint writes {"rc", "reason"} there.
TERMINATION_LOG = "TERMINATION_LOG"


def launch(spec: TrainSpec, *, result: Callable[[], dict[str, Any] | None], run: str = "") -> dict[str, Any]:
    """Train here and return ``result()``. SIGTERM is passed on, and the ranks have ``grace_seconds`` to save.

    Raises:
        UserError: more than one node, or training found a mistake of the user (2).
        FutileRetryError: training collapsed or diverged (13).
        PreemptedError: told to stop (143); the state is saved.
        HjepaError: it failed otherwise, or ended without a result.
    """
    if spec.cluster.nodes != 1:
        raise UserError(f"cluster.backend=local is this machine alone, got cluster.nodes={spec.cluster.nodes}; use 1")
    with tempfile.TemporaryDirectory(prefix="hjepa-") as folder:
        message = Path(folder) / "termination-log"
        say(f"job {spec.name}: {spec.processes} ranks on this machine")
        code = _run(spec, message)
        reason = _reason(message) or f"exit code {code}"
    what = f"training of run {run}" if run else "training"
    if code == 2:
        raise UserError(reason)
    if code == 13:
        raise FutileRetryError(reason)
    if code == 143:
        raise PreemptedError(f"{what} was told to stop; the state is saved, and the same run goes on with it")
    if code == 137:
        raise HjepaError(f"{what} was killed, most likely for want of memory: {reason}")
    if code != 0:
        raise HjepaError(f"{what} failed: {reason}")
    found = result()
    if found is None:
        raise HjepaError(f"{what} succeeded but left no result; its log should say why")
    return found


def _run(spec: TrainSpec, message: Path) -> int:
    """The exit code, as a shell shows it."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PET_", "TORCHELASTIC_"))}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "HJEPA_ERROR_FILE"):
        kept.pop(name, None)
    environment = kept | dict(spec.env) | {
        "PET_NNODES": "1",
        "PET_NPROC_PER_NODE": str(spec.processes),
        "PET_MAX_RESTARTS": "0",
        "PET_SHUTDOWN_TIMEOUT": str(max(1, spec.cluster.grace_seconds * 3 // 4)),
        TERMINATION_LOG: str(message),
    }  # fmt: skip
    command = [sys.executable, "-m", "hjepa.entrypoint", *spec.args]
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    previous: Any = None
    in_main = threading.current_thread() is threading.main_thread()

    def pass_on(number: int, frame: FrameType | None) -> None:
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)

    if in_main:
        previous = signal.signal(signal.SIGTERM, pass_on)
    try:
        code = process.wait()
    except BaseException:  # Ctrl-C: the ranks are in a session of their own and would go on without us
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(spec.cluster.grace_seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        raise
    finally:
        if in_main:
            signal.signal(signal.SIGTERM, previous)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # what outlived it; ranks end by themselves
    return 128 - code if code < 0 else code


def _reason(message: Path) -> str:
    with suppress(OSError, ValueError, KeyError, TypeError):
        return str(json.loads(message.read_text("utf-8"))["reason"])
    return ""
