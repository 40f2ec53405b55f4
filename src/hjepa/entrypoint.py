"""The images' entrypoint, ``python -m hjepa.entrypoint ARGUMENTS``: the command line as a cluster needs it.

``train`` becomes as many ranks as this pod has GPUs. torchrun on its own exits with 1 whatever the ranks say; here the
exit code is theirs: 0 done, 2 the user's mistake, 13 a retry would fail again, 137 killed, 143 told to stop, 1 anything
else. The reason goes to the file that the kubelet shows as the container's termination message.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

MESSAGE_BYTES = 4096  # what the kubelet reads of a termination message
TERMINATION_LOG = Path("/dev/termination-log")
ERROR_FILE = "HJEPA_ERROR_FILE"  # where a step, or the command line, leaves its last error
PROCESSES = "HJEPA_PROCESSES"  # ranks on this node, where nothing else says it
MEETING_SECONDS = 900  # for the first node of the job to come, as long as torchrun waits for the others
ROUND_OVER_SECONDS = 30  # for the ranks of this node to end by themselves, once the first node is gone
STOP_SECONDS = 2  # for the main thread to act on SIGTERM before it is taken to be out of reach
SHUTDOWN_SECONDS = 90  # from SIGTERM to SIGKILL of a rank, where PET_SHUTDOWN_TIMEOUT does not say it
PROGRAMS = {"sh", "bash", "python", "python3"}  # KFP brings a command of its own, which Docker takes for arguments
_STEP = "--step"  # how train_here tells its ranks from commands

# What tells most if ranks end differently: the death of one makes the others fail somehow.
_TELLING = (2, 13, 137)
_STOPPED = 143
_MEANING = {
    2: "a mistake in the configuration or the data; the log has it",
    13: "training stopped itself, and a retry would end in the same way; the log says why",
    137: "a process was killed, most likely for want of memory",
    143: "told to stop; the same command goes on from the last checkpoint",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments and arguments[0] in PROGRAMS:
        os.execvp(arguments[0], arguments)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return _rank(arguments)
    code, previous = 1, signal.getsignal(signal.SIGTERM)
    with _error_file() as errors:
        try:
            # Process 1 of a container ignores every signal that it has not asked for.
            signal.signal(signal.SIGTERM, _terminated)
            code = _run(arguments)
        except SystemExit as stop:
            code = _as_code(stop.code)
            raise
        finally:
            signal.signal(signal.SIGTERM, previous)
            _write_termination(code, errors)
    return code


def train_here(**paths: str) -> None:
    """``steps.train(**paths)`` in this process, or in one rank per GPU of this machine.

    Raises:
        SystemExit: ranks failed; with their exit code. Their error is in the log and in HJEPA_ERROR_FILE.
    """
    from hjepa import steps

    device = paths.get("device") or steps.Run.read(paths["resolved_path"]).config.training.device
    processes = processes_here(device)
    if processes == 1:
        steps.train(**paths)
        return
    code = _torchrun(processes, [_STEP, json.dumps(paths)])
    if code:
        raise SystemExit(code)


def processes_here(device: str = "auto") -> int:
    """Ranks to start on this node: what the platform says, or one per visible GPU, or one."""
    for name in ("PET_NPROC_PER_NODE", PROCESSES):
        value = os.environ.get(name, "")
        if value.isdecimal() and int(value) > 0:
            return int(value)
    if device not in {"auto", "cuda"}:
        return 1
    import torch

    return max(1, torch.cuda.device_count())


# -- one command -----------------------------------------------------------------------------------------------------


def _run(arguments: list[str]) -> int:
    from hjepa.errors import HjepaError
    from hjepa.words import print_line

    if arguments[:1] != ["train"]:
        return _command(arguments)
    try:
        processes, nodes = processes_here(_device(arguments)), _nodes()
        if processes > 1 or nodes > 1:
            return _torchrun(processes, arguments)
    except HjepaError as error:
        _note(type(error).__name__, str(error))
        print_line(f"error: {error}", sys.stderr)
        return error.exit_code
    _forget_rendezvous()
    return _command(arguments)


def _command(arguments: Sequence[str]) -> int:
    """The command line in this process; what it says on its way out is noted."""
    from hjepa import cli

    heard = _Listening(sys.stderr)
    sys.stderr = heard
    try:
        with _noting_crashes():
            return cli.main(arguments)
    finally:
        sys.stderr = heard.stream
        if heard.error and os.environ.get("RANK", "0") == "0":
            _note("", heard.error)


def _rank(arguments: list[str]) -> int:
    """This process is one of torchrun's; the launcher above writes the termination message."""
    if arguments[:1] != [_STEP]:
        from hjepa.adapters import lifeline

        lifeline.die_with_parent()  # a step does so itself
        return _command(arguments)
    from hjepa import steps

    if os.environ.get("RANK") != "0":
        os.environ.pop("HJEPA_TIMINGS_FILE", None)  # one line per step
    with _noting_crashes():
        steps.train(**json.loads(arguments[1]))
    return 0


def _device(arguments: Sequence[str]) -> str:
    """The device that a ``train`` command asks for, as far as its arguments tell."""
    from hjepa.cli import build_parser
    from hjepa.config import load_config
    from hjepa.errors import HjepaError

    options = build_parser().parse_args(arguments)
    if options.device:
        return str(options.device)
    if getattr(options, "run_uri", None):
        return "auto"  # its configuration is in S3
    try:
        return load_config(options.config, options.set).training.device
    except HjepaError:
        return "cpu"  # the command itself reports it, once


def _forget_rendezvous() -> None:
    """An operator describes a job of one process too; nobody has to be met."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)


# -- ranks -----------------------------------------------------------------------------------------------------------


def _torchrun(processes: int, arguments: Sequence[str]) -> int:
    """Run this module once per rank under torchrun, in this process, and return the ranks' exit code."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    from hjepa.adapters import lifeline
    from hjepa.utils.logging import say

    options = ["--nproc-per-node", str(processes)]
    if _nodes() == 1:
        # Meets nobody else, so it needs no fixed port, nor a name that others could resolve.
        options += ["--standalone", "--local-addr", "127.0.0.1"]
    if "PET_MAX_RESTARTS" not in os.environ:
        options += ["--max-restarts", "0"]  # the platform restarts all ranks; one alone would meet nobody
    if "PET_SHUTDOWN_TIMEOUT" not in os.environ:
        options += ["--shutdown-timeout", str(SHUTDOWN_SECONDS)]
    say(f"training with {processes} processes on this node")
    above = os.environ.get(lifeline.PARENT)
    lifeline.announce(os.environ)  # ranks have sessions of their own, and would outlive a launcher that is killed
    try:
        with _within_reach(), _first_node():
            run(parse_args([*options, "-m", "hjepa.entrypoint", *arguments]))  # type: ignore[no-untyped-call]
    except SignalException as stop:
        return 128 + int(stop.sigval)
    except ChildFailedError as failed:
        return _code_of([(failure.timestamp, failure.exitcode) for failure in failed.failures.values()])
    finally:
        del os.environ[lifeline.PARENT]
        if above is not None:
            os.environ[lifeline.PARENT] = above
    return 0


@contextmanager
def _within_reach() -> Iterator[None]:
    """End on SIGTERM while torchrun waits for other nodes too: it does so in C++, where no handler of Python's runs."""
    import psutil

    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    ended = threading.Event()

    def watch() -> None:
        while received := os.read(reader, 64):
            if signal.SIGTERM not in received or psutil.Process().children():
                continue  # once there are ranks, torchrun looks after them and after itself
            if not ended.wait(STOP_SECONDS):
                _write_termination(128 + signal.SIGTERM, Path(os.environ.get(ERROR_FILE, os.devnull)))
                os._exit(128 + signal.SIGTERM)

    previous = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    thread = threading.Thread(target=watch, name="within-reach", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        signal.set_wakeup_fd(previous)
        os.close(writer)
        thread.join()
        os.close(reader)


@contextmanager
def _first_node() -> Iterator[None]:
    """Wait for the first node of the job, and end this process once that node has started anew.

    Where pods restart one by one, one that comes back at once still meets the old launcher of the first node, a moment
    before that fails too. Its ranks would then wait for ranks that the next launcher there starts only when it has met
    this node's launcher, which believes that it has met it already.

    Raises:
        HjepaError: the first node did not come.
        UserError: no port is given.
    """
    from hjepa.errors import HjepaError

    if _nodes() == 1 or os.environ.get("PET_NODE_RANK", "0") == "0" or "PET_MASTER_ADDR" not in os.environ:
        yield
        return
    where = os.environ["PET_MASTER_ADDR"], _number("PET_MASTER_PORT", os.environ.get("PET_MASTER_PORT", ""))
    end = time.monotonic() + MEETING_SECONDS
    while (connection := _connect(where)) is None:
        if time.monotonic() > end:
            raise HjepaError(f"the first node, {where[0]}, did not come within {MEETING_SECONDS} s; see its pod")
        time.sleep(1)
    ended = threading.Event()

    def watch() -> None:
        with suppress(OSError):
            connection.recv(1)  # its store never speaks first: this returns when the process behind it has ended
        if not ended.wait(ROUND_OVER_SECONDS):
            _note("HjepaError", "the first node of the job has ended; the ranks start again together")
            _write_termination(1, Path(os.environ[ERROR_FILE]))
            os._exit(1)  # the main thread may be anywhere in torchrun; the ranks end with this process

    threading.Thread(target=watch, name="first-node", daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        with suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)  # wakes the thread
        connection.close()


def _connect(where: tuple[str, int]) -> socket.socket | None:
    try:
        connection = socket.create_connection(where, timeout=5)
    except OSError:  # not there yet, or its name is not known yet
        return None
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a machine that is lost closes nothing
    for option, seconds in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), seconds)
    return connection


def _nodes() -> int:
    """Nodes of this job, at most: ``PET_NNODES`` is a number or a range."""
    return _number("PET_NNODES", os.environ.get("PET_NNODES", "1").rpartition(":")[2])


def _number(name: str, text: str) -> int:
    from hjepa.errors import UserError

    if not text.isdecimal() or int(text) == 0:
        raise UserError(
            f"{name}={os.environ.get(name, '')!r}: expected a number above 0, as the training operator sets it"
        )
    return int(text)


def _code_of(ends: Sequence[tuple[int, int]]) -> int:
    """(when in seconds, exit code, negative for a signal) of each rank that failed -> the code that says why.

    torchrun ends the ranks that are left with SIGTERM and, half a minute later, with SIGKILL; those tell nothing.
    """
    first = min(when for when, _ in ends)
    codes = [_as_code(code) for when, code in ends if when - first <= 1]
    for code in _TELLING:
        if code in codes:
            return code
    return next((code for code in codes if code != _STOPPED), _STOPPED)


def _as_code(code: object) -> int:
    """What ``sys.exit`` or a process ended with -> an exit code as a shell shows it."""
    if code is None:
        return 0
    if not isinstance(code, int):
        return 1
    return 128 - code if code < 0 else code & 0xFF


# -- what is left behind ---------------------------------------------------------------------------------------------


@contextmanager
def _error_file() -> Iterator[Path]:
    """The file for the last error, shared with every process started from here."""
    if given := os.environ.get(ERROR_FILE):
        yield Path(given)
        return
    with tempfile.TemporaryDirectory(prefix="hjepa-") as folder:
        os.environ[ERROR_FILE] = str(Path(folder) / "error.json")
        try:
            yield Path(os.environ[ERROR_FILE])
        finally:
            del os.environ[ERROR_FILE]


@contextmanager
def _noting_crashes() -> Iterator[None]:
    """Leave the last line of a traceback in the error file."""
    try:
        yield
    except Exception as error:
        _note(type(error).__name__, "".join(traceback.format_exception_only(error)).strip())
        raise


class _Listening:
    """stderr, with the last error that the command line has printed there: those of arguments come from argparse."""

    def __init__(self, stream: TextIO):
        self.stream, self.error = stream, ""

    def write(self, text: str) -> int:
        before, mark, error = text.partition("error: ")
        if mark and (not before or before.endswith(": ")):
            self.error = error.strip()
        return self.stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _note(kind: str, message: str) -> None:
    """Write the error file unless a step, or a rank that failed earlier, has left a better reason there."""
    with suppress(OSError), Path(os.environ.get(ERROR_FILE, os.devnull)).open("x", encoding="utf-8") as file:
        json.dump({"step": "", "kind": kind, "message": message, "exit_code": 1}, file)


def _write_termination(code: int, errors: Path) -> None:
    """``{"rc", "reason"}`` for the kubelet; without its file, as outside a pod, nothing is written."""
    given = os.environ.get("TERMINATION_LOG")
    path = Path(given) if given else TERMINATION_LOG
    if not given and not path.exists():
        return
    reason = "done" if code == 0 else _MEANING.get(code, "see the log")
    if code not in {0, 137}:  # after a kill, what is found is how the others missed the one that was killed
        with suppress(OSError, ValueError, KeyError, TypeError):
            reason = str(json.loads(errors.read_text("utf-8"))["message"])
    with suppress(OSError):  # a folder that may not be written; the exit code still tells most
        path.write_text(termination_message(code, reason), "utf-8")


def termination_message(code: int, reason: str) -> str:
    """JSON of at most ``MESSAGE_BYTES`` ASCII bytes; a longer reason loses its end."""
    message = json.dumps({"rc": code, "reason": reason})
    while len(message) > MESSAGE_BYTES:
        reason = reason[: len(reason) - max(1, (len(message) - MESSAGE_BYTES) // 12)]
        message = json.dumps({"rc": code, "reason": reason})
    return message


def _terminated(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
