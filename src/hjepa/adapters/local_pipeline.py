"""Run a compiled pipeline on this machine, step by step, from the YAML that a cluster would get.

``run`` starts a child process (this module, as ``__main__``) in a session of its own. The child executes the YAML with
``kfp.local``, each step in a process of its own, and prints what KFP and the steps say; the parent turns that into
a live view and one log file per step, and owns the child's process group: whatever way the run ends, nothing of it is
left running. If the parent itself is killed, a watchdog in the child ends the group.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from hjepa.adapters import lifeline, pipeline_spec
from hjepa.adapters.pipeline_view import Ending, View, default_view, showing
from hjepa.errors import FutileRetryError, HjepaError, PreemptedError, UserError

ERROR_FILE = "HJEPA_ERROR_FILE"  # a step that fails writes {"step", "kind", "message", "exit_code"} there
TIMINGS_FILE = "HJEPA_TIMINGS_FILE"  # a step appends {"step", "seconds"}: the time of its own work

# The executor's whole input is one argument of a command, and Linux takes 128 KiB for one.
_ARGUMENT_BYTES = 100_000
_TAIL_LINES = 12
_KINDS = (UserError, FutileRetryError, PreemptedError)

_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_KFP_LINE = re.compile(r"^\d\d:\d\d:\d\d\.\d{3} - (?:INFO|WARNING|ERROR) - (.*)$")
_STARTED = re.compile(r"^Executing task '(.+)'$")
_ENDED = re.compile(r"^Task '(.+)' finished with status (SUCCESS|FAILURE)$")
_STEP_INDENT = "    "  # kfp.local puts it in front of every line of a running step
_EXECUTOR_LINE = re.compile(r"^\[KFP Executor [^\]]*\]: ")
_EXECUTOR_CHATTER = ("Looking for component", "Loading KFP component", "Wrote executor output file")


@dataclass
class StepRun:
    """One step of a local run. ``seconds`` is None until the step has ended."""

    name: str
    started: float  # time.monotonic()
    log: Path
    seconds: float | None = None  # wall time, process start included
    own_seconds: float | None = None  # what the step says its work took
    succeeded: bool = False
    artifacts: dict[str, Path] = field(default_factory=dict)  # output name -> file


@dataclass(frozen=True)
class PipelineRun:
    """A finished local run: its steps in order, and where the time went."""

    steps: dict[str, StepRun]
    wall_seconds: float

    @property
    def overhead_seconds(self) -> float:
        """Wall time outside the steps' own work: starting processes, KFP, artifacts."""
        own = [step.own_seconds if step.own_seconds is not None else step.seconds for step in self.steps.values()]
        return self.wall_seconds - sum(seconds or 0.0 for seconds in own)

    def artifact(self, step: str, output: str) -> Path:
        return self.steps[step].artifacts[output]


def run(
    compiled_yaml: Path,
    arguments: Mapping[str, Any],
    *,
    workdir: Path,
    environment: Mapping[str, str] | None = None,
    items: Sequence[str] = (),
    view: View | None = None,
    grace_seconds: float = 30.0,
) -> PipelineRun:
    """Run a compiled pipeline and wait for its end.

    Args:
        compiled_yaml: The pipeline, as the compiler wrote it.
        arguments: Parameter name -> value; checked against the pipeline before anything starts.
        workdir: Gets ``artifacts/``, ``logs/<step>.log`` (of the latest run) and ``logs/kfp.log``.
        environment: Added to this process's environment, for KFP and all steps.
        items: What the pipeline's loop runs over, one after the other here; a step of it is called ``ITEM.STEP``.
        view: Where progress is shown; a live table on a terminal, plain lines otherwise.
        grace_seconds: How long an interrupted step may take to save its state before it is killed.

    Raises:
        UserError: bad arguments, or a step that says it was the user's mistake.
        HjepaError: a step failed; the message is the step's own reason, and the exit code is the step's.
        KeyboardInterrupt: after everything that was started has ended.
    """
    pipeline = pipeline_spec.load(compiled_yaml)
    pipeline.check_arguments(arguments)
    size = len(json.dumps(dict(arguments)).encode())
    if size > _ARGUMENT_BYTES:
        raise UserError(
            f"the pipeline's arguments take {size:,} bytes, more than the {_ARGUMENT_BYTES:,} that fit a command line; "
            "put a long configuration in a file or in S3 and pass its name"
        )
    begun = time.monotonic()
    workdir = workdir.resolve()
    files = _Files(workdir)
    files.prepare()
    request = {"yaml": pipeline.for_one_machine().to_yaml(), "arguments": dict(arguments), "root": str(files.artifacts)}
    files.request.write_text(json.dumps(request), "utf-8")
    # -P: the folder the user happens to stand in must not shadow an installed package.
    command = [sys.executable, "-P", "-m", "hjepa.adapters.local_pipeline", str(files.request)]
    view = view or default_view()
    names = _Names(pipeline.steps(), pipeline.looped(), items)
    # KFP leaves a folder per step in the temporary folder, so the run gets its own.
    with tempfile.TemporaryDirectory(prefix="hjepa-") as scratch, showing(view, names.in_order()):
        child = subprocess.Popen(
            [*command, scratch],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="backslashreplace",
            env={**_child_environment(environment or {}, files), "TMPDIR": scratch},
            start_new_session=True,  # a terminal's Ctrl-C reaches this process only, which then ends the steps in order
        )
        follower = _Follower(child, files, view, names)
        with _ended_with_us(child, follower, view, grace_seconds):
            follower.start()
            follower.join()
            if follower.error is not None:
                raise follower.error
            exit_code = child.wait()
    steps = follower.steps
    if exit_code != 0:
        raise _failure(exit_code, steps, files)
    return PipelineRun(steps=steps, wall_seconds=time.monotonic() - begun)


# -- the parent ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Files:
    workdir: Path

    @property
    def artifacts(self) -> Path:
        return self.workdir / "artifacts"

    @property
    def logs(self) -> Path:
        return self.workdir / "logs"

    @property
    def request(self) -> Path:
        return self.workdir / "request.json"

    @property
    def error(self) -> Path:
        return self.workdir / "error.json"

    @property
    def timings(self) -> Path:
        return self.workdir / "timings.jsonl"

    def prepare(self) -> None:
        self.artifacts.mkdir(parents=True, exist_ok=True)
        self.logs.mkdir(exist_ok=True)
        for old in (*self.logs.glob("*.log"), self.error, self.timings):
            old.unlink(missing_ok=True)

    def outputs_of(self, task: str) -> dict[str, Path]:
        """The files a task has just made, by output name.

        KFP puts each run in a folder named by its time, and each turn of a loop in one below that.
        """
        found = [*self.artifacts.glob(f"*/{task}"), *self.artifacts.glob(f"*/*-iteration-*/{task}")]
        folders = sorted((folder for folder in found if folder.is_dir()), key=lambda folder: folder.stat().st_mtime_ns)
        if not folders:
            return {}
        return {item.name: item for item in sorted(folders[-1].iterdir()) if item.name != "executor_output.json"}


class _Names:
    """What each task is called: by its own name, and in a loop by the item's name and its own.

    Items are taken one after the other, and each begins with the loop's first task, which waits for no other.
    """

    def __init__(self, tasks: Sequence[str], looped: Set[str], items: Sequence[str]):
        """``tasks`` are all tasks in order, of which those of the loop follow one another."""
        self._tasks, self._looped, self._items = list(tasks), looped, list(items)
        self._first = next((task for task in tasks if task in looped), None)
        self._turn = -1

    def in_order(self) -> list[str]:
        """All that will run."""
        if not self._items:
            return self._tasks
        before = list(itertools.takewhile(lambda task: task not in self._looped, self._tasks))
        inside = [task for task in self._tasks if task in self._looped]
        names = [f"{item}.{task}" for item in self._items for task in inside]
        return [*before, *names, *(task for task in self._tasks[len(before) :] if task not in self._looped)]

    def of_next(self, task: str) -> str:
        """Of a task that has just started."""
        if task not in self._looped:
            return task
        self._turn += task == self._first
        return f"{self._items[self._turn] if self._turn < len(self._items) else self._turn + 1}.{task}"


def _child_environment(extra: Mapping[str, str], files: _Files) -> dict[str, str]:
    environment = {
        **os.environ,
        **extra,
        ERROR_FILE: str(files.error),
        TIMINGS_FILE: str(files.timings),
        "PYTHONUNBUFFERED": "1",  # or a step's lines would arrive at its end
        "PYTHONUTF8": "1",  # KFP decodes a step's lines with the locale's encoding
        "PYTHONIOENCODING": "utf-8:backslashreplace",  # a file name that is no text must not end a training
    }
    lifeline.announce(environment)
    return environment


class _Follower(threading.Thread):
    """Reads the child's output to its end: keeps the books, writes the logs, tells the view.

    A thread of its own, so that a step's last words still arrive while the main thread is stopping it.
    """

    def __init__(self, child: subprocess.Popen[str], files: _Files, view: View, names: _Names):
        super().__init__(name="pipeline-output", daemon=True)
        assert child.stdout is not None
        self.steps: dict[str, StepRun] = {}
        self.error: Exception | None = None
        self.stopping = False
        self.step_ended = threading.Event()  # since it was cleared
        self._output = child.stdout
        self._files = files
        self._view = view
        self._names = names
        self._current: StepRun | None = None
        self._timings = 0  # lines that have been read
        self._in_executor_input = False

    def run(self) -> None:
        try:
            with (self._files.logs / "kfp.log").open("w", encoding="utf-8") as kfp_log:
                for raw in self._output:
                    line = raw.rstrip("\n")
                    if self._current is not None and line.startswith(_STEP_INDENT):
                        self._step_said(self._current, line.removeprefix(_STEP_INDENT))
                        continue
                    plain = _ANSI.sub("", line)
                    kfp_log.write(plain + "\n")
                    kfp_log.flush()
                    if said := _KFP_LINE.match(plain):
                        self._kfp_said(said[1])
        except (OSError, ValueError) as error:  # a full disk, a view whose terminal is gone: raised by the main thread
            self.error = error

    def _step_said(self, step: StepRun, text: str) -> None:
        with step.log.open("a", encoding="utf-8") as log:
            log.write(text + "\n")
        if (shown := self._for_people(text)).strip():
            self._view.line(step.name, shown)

    def _for_people(self, text: str) -> str:
        """The line without KFP's framing; empty if KFP's executor only talks to itself."""
        if self._in_executor_input:
            self._in_executor_input = text != "}"
            return ""
        message = _EXECUTOR_LINE.sub("", text)
        if message == text:
            return text
        self._in_executor_input = message.startswith("Got executor_input:")
        return "" if self._in_executor_input or message.startswith(_EXECUTOR_CHATTER) else message

    def _kfp_said(self, message: str) -> None:
        if match := _STARTED.match(message):
            if self.stopping:  # KFP would take the next turn of a loop
                return
            name = self._names.of_next(match[1])
            self._current = StepRun(name=name, started=time.monotonic(), log=self._files.logs / f"{name}.log")
            self.steps[name] = self._current
            self._view.started(name)
        elif (match := _ENDED.match(message)) and self._current is not None:
            step = self._current
            step.seconds = time.monotonic() - step.started
            step.own_seconds = self._own_seconds(match[1])
            step.succeeded = match[2] == "SUCCESS"
            step.artifacts = self._files.outputs_of(match[1]) if step.succeeded else {}
            self._current = None
            ending: Ending = "done" if step.succeeded else "stopped" if self.stopping else "failed"
            self._view.finished(step.name, ending, step.seconds)
            self.step_ended.set()

    def _own_seconds(self, task: str) -> float | None:
        """What the step that has just ended says of itself; None if it was killed before it could."""
        if not self._files.timings.exists():
            return None
        lines = self._files.timings.read_text("utf-8").splitlines()
        new, self._timings = lines[self._timings :], len(lines)
        records = [json.loads(line) for line in new]
        own = [float(item["seconds"]) for item in records if str(item["step"]).replace("_", "-") == task]
        return own[-1] if own else None


@contextmanager
def _ended_with_us(
    child: subprocess.Popen[str], follower: _Follower, view: View, grace_seconds: float
) -> Iterator[None]:
    """Leave nothing of the child's process group running, whichever way the block ends."""
    try:
        yield
    except BaseException:
        # Also KeyboardInterrupt. A second one while we wait skips the rest of the grace period.
        try:
            _stop_gently(child, follower, view, grace_seconds)
        finally:
            _kill_group(child)
        raise
    _kill_group(child)  # what a step left in the background


def _stop_gently(child: subprocess.Popen[str], follower: _Follower, view: View, grace_seconds: float) -> None:
    """SIGTERM to the running step, and time to end; the steps after it do not begin.

    Only the step's main process gets the signal: its loader processes and the pipe to its log stay, so that it can
    save its state and say so.
    """
    follower.stopping = True
    follower.step_ended.clear()
    step_processes = [process for process in _step_processes(child.pid) if _signal(process, signal.SIGTERM)]
    if not step_processes:
        return
    view.notice(f"stopping; a running step gets {grace_seconds:g} s to save its state (Ctrl-C again: at once)")
    _, alive = psutil.wait_procs(step_processes, timeout=grace_seconds)
    if not alive:
        follower.step_ended.wait(timeout=2.0)  # KFP passes the step's last lines on, then says that it has ended


def _step_processes(pid: int) -> list[psutil.Process]:
    """The main process of each running step: KFP starts it through a shell, which would not pass a signal on."""
    try:
        children = psutil.Process(pid).children()
    except psutil.NoSuchProcess:
        return []
    found: list[psutil.Process] = []
    for process in children:
        try:
            is_shell = process.name() in {"sh", "dash", "bash"}
            found += process.children() if is_shell else [process]
        except psutil.NoSuchProcess:
            continue
    return found


def _signal(process: psutil.Process, number: signal.Signals) -> bool:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return False
    return True


def _group_members(group: int) -> list[psutil.Process]:
    members = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                members.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return members


def _kill_group(child: subprocess.Popen[str]) -> None:
    members = _group_members(child.pid)
    for process in members:
        _signal(process, signal.SIGKILL)
    child.wait()
    psutil.wait_procs(members, timeout=5)


def _failure(exit_code: int, steps: Mapping[str, StepRun], files: _Files) -> HjepaError:
    """The error to raise for a failed run, with the reason the step itself gave."""
    failed = next((step for step in reversed(list(steps.values())) if not step.succeeded), None)
    if failed is None:
        tail = _tail(files.logs / "kfp.log")
        return HjepaError(f"the pipeline failed outside its steps (exit code {exit_code})\n{tail}")
    if files.error.exists():
        record = json.loads(files.error.read_text("utf-8"))
        kind = next((kind for kind in _KINDS if kind.exit_code == record["exit_code"]), HjepaError)
        error = kind(f"{failed.name}: {record['message']}")
        error.exit_code = int(record["exit_code"])
        return error
    tail = _tail(failed.log)
    if exit_code < 0:
        return HjepaError(f"{failed.name}: the pipeline was killed by signal {-exit_code}\n{tail}")
    if tail.endswith("Killed"):
        return HjepaError(
            f"{failed.name}: the step was killed, most often for lack of memory; use a smaller batch or fewer loader "
            f"processes, or free memory. Its last lines, of {failed.log}, were\n{tail}"
        )
    return HjepaError(f"{failed.name}: the step failed. Its last lines, of {failed.log}, were\n{tail}")


def _tail(path: Path) -> str:
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    return "\n".join("  " + line for line in [line for line in lines if line.strip()][-_TAIL_LINES:])


# -- the child -------------------------------------------------------------------------------------------------------


class _Watchdog:
    """Ends this process group once the process that started it is gone."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._fired = threading.Event()
        self._thread = lifeline.watch_parent(self.end_group)

    def end_group(self) -> None:
        self._fired.set()
        own = os.getpid()
        others = [process for process in _group_members(os.getpgid(0)) if process.pid != own]
        for process in _step_processes(own):
            _signal(process, signal.SIGTERM)
        _, alive = psutil.wait_procs(others, timeout=lifeline.GRACE_SECONDS)
        for process in alive:
            _signal(process, signal.SIGKILL)
        shutil.rmtree(self._scratch, ignore_errors=True)
        os.killpg(0, signal.SIGKILL)

    def let_finish(self) -> None:
        """If the group is being ended, wait for that instead of leaving a part of it behind."""
        if self._fired.is_set() and self._thread is not None:
            self._thread.join()


def _execute(request: Mapping[str, Any]) -> None:
    import warnings

    # KFP expects "python" in an image's name, and says for each step what a laptop cannot give it.
    warnings.filterwarnings("ignore", message="You may be attemping to run a task")
    warnings.filterwarnings("ignore", message="Task '.*': settings .* have no effect")
    from kfp import components, local

    # KFP puts it unquoted into the shell command of each step, where a blank in its path would end a word.
    sys.executable = shlex.quote(sys.executable)
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=request["root"], raise_on_error=True)
    components.load_component_from_text(request["yaml"])(**request["arguments"])


def _main() -> None:
    if os.getpgid(0) != os.getpid():
        sys.exit("hjepa.adapters.local_pipeline is started by run(), which gives it the process group that it may end")
    request = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    watchdog = _Watchdog(Path(sys.argv[2]))
    try:
        _execute(request)
    except BrokenPipeError:  # nobody reads us any more: the parent is gone
        watchdog.end_group()
    except RuntimeError as error:
        # A step failed. Its own words are in its log; this text adds only its name.
        print(error, flush=True)
        sys.exit(1)
    finally:
        watchdog.let_finish()


if __name__ == "__main__":
    _main()
